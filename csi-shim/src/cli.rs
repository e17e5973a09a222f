//! The command line.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use tracing_subscriber::EnvFilter;

use crate::NODE_TOPOLOGY_KEY;
use crate::context::Address;

/// The CSI driver of Ballast.
#[derive(Clone, Debug, Parser)]
#[command(name = "ballast-csi", version, about)]
pub struct Cli {
    /// Which services to serve beside Identity.
    #[arg(long, value_enum)]
    pub mode: Mode,
    /// The Unix socket to serve on: unix:///PATH.
    #[arg(long, value_parser = parse_endpoint)]
    pub endpoint: PathBuf,
    /// The daemons' administration addresses: http://HOST:PORT, separated by commas.
    #[arg(long, value_name = "URL", value_delimiter = ',', required = true)]
    pub ballast: Vec<String>,
    /// The name of this host; required to serve Node. Leases are held under it.
    #[arg(long, value_name = "NAME")]
    pub node_id: Option<String>,
    /// A topology segment of this host; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_segment)]
    pub topology: Vec<(String, String)>,
    /// The most volumes that this host may have; 0 = as many as the orchestrator likes.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_volumes: u32,
    /// Where records of staged volumes lie.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ballast-csi")]
    pub state_dir: PathBuf,
    /// How volumes become block devices.
    #[arg(long, value_enum, default_value_t = Nbd::Auto)]
    pub nbd: Nbd,
    /// Connections per volume that the kernel's NBD client has: 1 to 16, at most one per processor.
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u16).range(1..=16))]
    pub nbd_connections: u16,
    /// NBD addresses to try before those that the controller gives: HOST:PORT, separated by commas.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = parse_address)]
    pub nbd_address: Vec<Address>,
    /// The port on which the cluster's nodes serve NBD, told to the nodes that stage.
    #[arg(long, value_name = "PORT", default_value_t = 10809,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub nbd_port: u16,
    /// Which hosts the controller publishes to.
    #[arg(long, value_enum, default_value_t = HostRule::Known)]
    pub hosts: HostRule,
    /// error, warn, info, debug or trace, alone or as TARGET=LEVEL, separated by commas.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = parse_level)]
    pub log_level: String,
}

/// Which services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Controller.
    Controller,
    /// Node.
    Node,
    /// Both.
    All,
}

/// How volumes become block devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Nbd {
    /// The kernel's client where it has one, else fuse.
    Auto,
    /// The kernel's NBD client.
    Kernel,
    /// A file system in user space and a loop device: for development.
    Fuse,
}

/// Which hosts volumes are published to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HostRule {
    /// Those that have the name of a storage node.
    Known,
    /// Any: for clusters with hosts that store nothing.
    Any,
}

impl Mode {
    /// Whether Controller is served.
    pub fn controller(self) -> bool {
        matches!(self, Mode::Controller | Mode::All)
    }

    /// Whether Node is served.
    pub fn node(self) -> bool {
        matches!(self, Mode::Node | Mode::All)
    }
}

impl Cli {
    /// The topology segments, the same key only once.
    pub fn segments(&self) -> BTreeMap<String, String> {
        self.topology.iter().cloned().collect()
    }
}

fn parse_endpoint(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:"));
    match path {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err("use unix:///PATH".to_owned()),
    }
}

fn parse_segment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((NODE_TOPOLOGY_KEY, _)) => {
            Err(format!("{NODE_TOPOLOGY_KEY} is always --node-id: leave it out"))
        }
        Some((key, value)) if !key.is_empty() && !value.is_empty() => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("use KEY=VALUE".to_owned()),
    }
}

/// A word that is no level would be taken for the name of a target, and nothing else be logged.
fn parse_level(text: &str) -> Result<String, String> {
    let known = |word: &str| {
        let level = word.rsplit('=').next().unwrap_or(word).trim();
        ["off", "error", "warn", "info", "debug", "trace"].contains(&level)
    };
    match text.split(',').all(known) && EnvFilter::builder().parse(text).is_ok() {
        true => Ok(text.to_owned()),
        false => Err("use error, warn, info, debug or trace, alone or as TARGET=LEVEL, \
                      separated by commas"
            .to_owned()),
    }
}

pub(crate) fn parse_address(text: &str) -> Result<Address, String> {
    Address::parse(text).map_err(|()| "use HOST:PORT".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound_and_read() {
        Cli::command().debug_assert();
        let words = "ballast-csi --mode all --endpoint unix:///run/csi.sock --ballast a:1,b:2 \
                     --node-id n1 --topology zone=a --topology rack=b --nbd-address 127.0.0.1:1";
        let cli = Cli::parse_from(words.split_whitespace());
        assert_eq!(cli.endpoint, PathBuf::from("/run/csi.sock"));
        assert_eq!(cli.ballast, ["a:1", "b:2"]);
        assert_eq!(cli.segments().len(), 2);
        assert!(cli.mode.controller() && cli.mode.node());
        for wrong in ["tcp://a:1", "unix://run", "/run/csi.sock"] {
            assert!(parse_endpoint(wrong).is_err(), "{wrong}");
        }
        for right in ["--log-level warn,ballast_csi_shim=debug", "--log-level off", "--nbd-port 1"]
        {
            assert!(Cli::try_parse_from(format!("{words} {right}").split_whitespace()).is_ok());
        }
        for wrong in [
            "--log-level loud",
            "--log-level info,x=loud",
            "--log-level info,",
            "--nbd-port 0",
            "--topology topology.csi.ballast.storage/node=z",
            "--topology zone",
        ] {
            let refused = Cli::try_parse_from(format!("{words} {wrong}").split_whitespace());
            let error = refused.expect_err(wrong).to_string();
            let option = wrong.split(' ').next().expect("a word");
            assert!(error.contains(option), "{wrong}: {error}");
        }
    }
}
