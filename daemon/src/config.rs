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
    /// The pool, where the node has one: a disk, partition or file.
    pub pool: Option<PathBuf>,
    /// The pools, where it has several. Their places stay: each is a shard's.
    pub pools: Option<Vec<PathBuf>>,
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
    /// The process's own memory.
    #[serde(default)]
    pub memory: Memory,
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
    /// Whether an export needs a lease.
    pub leases: Leases,
    /// Log kept per volume for followers that lag.
    pub retention: Option<Size>,
}

/// Whether an export needs a lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Leases {
    /// Always.
    #[default]
    Required,
    /// Whoever connects may use a volume that has none: for development.
    Optional,
}

impl Default for Volumes {
    fn default() -> Self {
        Self { leader_follows_writer: true, leases: Leases::Required, retention: None }
    }
}

/// The process's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// Whether it is kept from being paged out.
    pub lock: bool,
    /// What clients' requests may hold together; none: `limits::REQUEST_MEMORY_BYTES`.
    pub requests: Option<Size>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { lock: true, requests: None }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The page for users, with the golden example.
    const PAGE: &str = include_str!("../../docs/configuration.md");

    fn example() -> String {
        let (_, rest) = PAGE.split_once("```toml\n").expect("there is an example");
        rest.split_once("```").expect("it ends").0.to_owned()
    }

    #[test]
    fn the_documented_example_is_read_as_it_says() {
        let file: ConfigFile = toml::from_str(&example()).unwrap();
        assert_eq!(file.node, 1);
        assert_eq!(file.listen.nbd.len(), 2);
        assert_eq!(file.listen.nbd[1].to_string(), "unix:/run/ballast/nbd.sock");
        assert_eq!(file.log, Log { format: LogFormat::Json, level: "info".into() });
        assert_eq!(file.volumes.retention, Some(Size(256 << 20)));
        assert_eq!(file.nodes.iter().map(|node| node.id).collect::<Vec<_>>(), [1, 2, 3]);
        // The defaults that the page names are the ones that apply.
        let settings = crate::settings::Settings::check(file).unwrap();
        let minimal = example().split("[listen]").next().unwrap().to_owned()
            + "\n[[nodes]]"
            + example().split_once("\n[[nodes]]").unwrap().1;
        let plain = crate::settings::Settings::check(toml::from_str(&minimal).unwrap()).unwrap();
        assert_eq!(plain.lock_memory, settings.lock_memory);
        let (plain, settings) = (plain.first(), settings.first());
        assert_eq!(plain.raft, settings.raft);
        assert_eq!(plain.retention_bytes, settings.retention_bytes);
        assert_eq!(plain.leader_follows_writer, settings.leader_follows_writer);
        assert_eq!(plain.leases, settings.leases);
        assert_eq!(plain.request_memory, settings.request_memory);
    }

    #[test]
    fn each_pool_is_the_one_of_a_shard() {
        let pool = "pool = \"/dev/disk/by-id/nvme-example_0001\"";
        let several = example().replacen(pool, "pools = [\"/dev/zero\", \"/dev/null\"]", 1);
        for (text, pools) in [
            (example(), &["/dev/disk/by-id/nvme-example_0001"][..]),
            (several, &["/dev/zero", "/dev/null"]),
        ] {
            let file = toml::from_str(&text).unwrap();
            let settings = crate::settings::Settings::check(file).unwrap();
            let shards = settings.shards.iter();
            assert!(shards.map(|shard| shard.pool.clone()).eq(pools.iter().map(PathBuf::from)));
        }
    }

    #[test]
    fn unknown_keys_are_errors_in_every_table() {
        let example = example();
        let tables =
            ["", "[listen]\n", "[log]\n", "[raft]\n", "[volumes]\n", "[memory]\n", "[[nodes]]\n"];
        for table in tables {
            let wrong = match table {
                "" => format!("surprise = 1\n{example}"),
                _ => example.replacen(table, &format!("{table}surprise = 1\n"), 1),
            };
            let error = toml::from_str::<ConfigFile>(&wrong).unwrap_err().to_string();
            assert!(error.contains("surprise"), "{table}: {error}");
        }
    }

    #[test]
    fn settings_that_can_not_be_are_refused_by_name() {
        const POOL: &str = "pool = \"/dev/disk/by-id/nvme-example_0001\"";
        let example = example();
        let many = format!("pools = {:?}", (0..17).map(|n| n.to_string()).collect::<Vec<_>>());
        let check = |from: &str, to: &str| {
            assert!(example.contains(from), "{from}");
            match toml::from_str::<ConfigFile>(&example.replacen(from, to, 1)) {
                Ok(file) => {
                    crate::settings::Settings::check(file).map(drop).unwrap_err().to_string()
                }
                Err(error) => error.to_string(),
            }
        };
        for (from, to, names) in [
            ("node = 1", "node = 9", "node is 9"),
            ("node = 1", "node = -1", "-1"),
            ("0f2b5c3e-7a4d", "x", "UUID"),
            (POOL, "pool = \"\"", "pool"),
            (POOL, "", "pool is missing"),
            (POOL, "pools = []", "pools is empty"),
            (POOL, "pools = [\"a\", \"\"]", "pools is empty"),
            (POOL, "pools = [\"/dev/null\", \"/dev/../dev/null\"]", "/dev/../dev/null twice"),
            (POOL, "pools = [\"/dev/none\", \"/dev/./none\"]", "/dev/./none twice"),
            (POOL, "pool = \"a\"\npools = [\"a\", \"b\"]", "both"),
            (POOL, &many, "17 entries"),
            ("id = 2", "id = 1", "twice"),
            ("id = 2", "id = 0", "0"),
            ("name = \"beta\"", "name = \"alpha\"", "twice"),
            ("peer = \"10.0.0.2:7430\"", "peer = \"10.0.0.1:7430\"", "twice"),
            ("peer = \"10.0.0.2:7430\"", "peer = \"0.0.0.0:7430\"", "connect"),
            ("peer = \"10.0.0.2:7430\"", "peer = \"beta:7430\"", "peer"),
            ("unix:/run/ballast/nbd.sock", "unix:", "path"),
            ("unix:/run/ballast/nbd.sock", "nowhere", "nowhere"),
            ("format = \"json\"", "format = \"xml\"", "xml"),
            ("level = \"info\"", "level = \"loud\"", "loud"),
            ("heartbeat_ms = 150", "heartbeat_ms = 500", "election_min_ms"),
            ("election_max_ms = 700", "election_max_ms = 400", "election_max_ms"),
            ("retention = \"256MiB\"", "retention = \"1KiB\"", "retention"),
            ("retention = \"256MiB\"", "retention = \"much\"", "much"),
            ("requests = \"256MiB\"", "requests = \"31MiB\"", "use 32MiB to 64GiB"),
            ("requests = \"256MiB\"", "requests = 0", "is 0 bytes: use 32MiB to 64GiB"),
            ("requests = \"256MiB\"", "requests = \"65GiB\"", "use 32MiB to 64GiB"),
            ("requests = \"256MiB\"", "requests = \"8388608TiB\"", "use 32MiB to 64GiB"),
            ("requests = \"256MiB\"", "requests = -1", "requests"),
            ("requests = \"256MiB\"", "requests = \"all\"", "all"),
        ] {
            let error = check(from, to);
            assert!(error.contains(names), "{to}: {error}");
        }
        let settings = crate::settings::Settings::check(toml::from_str(&example).unwrap()).unwrap();
        assert!(settings.check_machine(256 << 20).is_ok());
        let error = settings.check_machine(255 << 20).unwrap_err().to_string();
        assert!(
            error.contains("memory.requests is 256MiB, and this machine has 255MiB"),
            "{error}"
        );
        let two = example.rsplit_once("[[nodes]]").unwrap().0;
        let file = toml::from_str::<ConfigFile>(two).unwrap();
        let error = crate::settings::Settings::check(file).map(drop).unwrap_err().to_string();
        assert!(error.contains("2 entries"), "{error}");
    }
}
