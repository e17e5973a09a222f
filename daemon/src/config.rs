//! The configuration file: what may stand in it, and reading it. `docs/configuration.md` is the
//! page for users; its example is parsed by a test here.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ballast_block::ClusterId;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::size::Size;

/// The file as it is written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// The cluster's id: a UUID, the same on all nodes.
    #[serde(with = "cluster_id")]
    pub cluster: ClusterId,
    /// This node, as in `nodes`.
    pub node: u32,
    /// The pool: a disk, partition or file.
    pub pool: PathBuf,
    /// All nodes of the cluster.
    pub nodes: Vec<NodeEntry>,
    /// Where to listen.
    #[serde(default)]
    pub listen: Listen,
    /// Logging.
    #[serde(default)]
    pub log: Log,
    /// Raft's times.
    #[serde(default)]
    pub raft: RaftTimes,
    /// How volumes behave.
    #[serde(default)]
    pub volumes: Volumes,
}

/// A cluster's id as text.
pub mod cluster_id {
    use ballast_block::ClusterId;
    use serde::{Deserialize, Deserializer, Serializer};

    /// From a UUID.
    ///
    /// # Errors
    /// When it is none.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ClusterId, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = uuid::Uuid::try_parse(&text);
        parsed.map(ClusterId).map_err(|_| {
            serde::de::Error::custom(format!("{text:?} is not a UUID: make one with uuidgen"))
        })
    }

    /// As a UUID.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(id: &ClusterId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeEntry {
    /// Its number, from 1.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Where the others reach it.
    pub peer: SocketAddr,
}

/// Where to listen.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// For peers, if not where they are told to connect.
    pub peer: Option<SocketAddr>,
    /// For NBD clients.
    #[serde(default)]
    pub nbd: Vec<ListenAddress>,
    /// For administration.
    pub grpc: Option<SocketAddr>,
    /// For metrics and health.
    pub metrics: Option<SocketAddr>,
}

/// Logging, to standard error.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// How lines look.
    pub format: LogFormat,
    /// What is logged.
    pub level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".into() }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Raft's times, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RaftTimes {
    /// Between heartbeats of an idle leader.
    pub heartbeat_ms: Option<u64>,
    /// Least time without a leader before a follower campaigns.
    pub election_min_ms: Option<u64>,
    /// Most; also the leader's lease.
    pub election_max_ms: Option<u64>,
}

/// How volumes behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Volumes {
    /// Whether a volume's leader moves to the node that serves its writer.
    pub leader_follows_writer: bool,
    /// Log kept per volume for followers that lag.
    pub retention: Option<Size>,
}

impl Default for Volumes {
    fn default() -> Self {
        Self { leader_follows_writer: true, retention: None }
    }
}

/// `IP:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: needs a path after it".into()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                format!("{text:?} is not an address: write IP:PORT, [IPv6]:PORT or unix:PATH")
            }),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The configuration can't be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read configuration {}: {problem}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: std::io::Error,
    },
    /// It is not TOML, or not what is expected: names line and key.
    #[error("configuration {} is not valid: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, key and what was expected.
        problem: Box<toml::de::Error>,
    },
    /// A setting has a value that can't be.
    #[error("configuration: {setting} {problem}")]
    Setting {
        /// The key.
        setting: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`]: unreadable, or malformed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|problem| ConfigError::Unreadable { path: path.to_owned(), problem })?;
        toml::from_str(&text).map_err(|problem| ConfigError::Malformed {
            path: path.to_owned(),
            problem: Box::new(problem),
        })
    }
}
