//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{ListenAddress, LogFormat};
use crate::size::Size;

/// Storage node of Ballast: replicated block volumes over NBD.
#[derive(Debug, Parser)]
#[command(name = "ballastd", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the storage node that a configuration file describes, until SIGTERM or SIGINT.
    Run(RunArguments),
    /// Makes the pools of a new node, all or none, or one of them. Never done by `run`; what ever
    /// was a pool is refused.
    Format(FormatArguments),
    /// Runs a whole cluster on this machine for development: one process per node.
    #[command(after_help = DEV_HELP)]
    Dev(DevArguments),
    /// Runs one node of a development cluster again, in the foreground.
    DevNode(DevNodeArguments),
}

const DEV_HELP: &str = "Examples:
  ballastd dev --data /var/tmp/ballast
  ballastd dev --data /var/tmp/ballast --nodes 1 --volume disk=20GiB --volume scratch=1GiB

The folder keeps everything: the same command again goes on with the same cluster.";

/// Of `ballastd run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// The configuration file (TOML; docs/configuration.md).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Settings that replace those of the file.
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Flags that replace settings of the file.
#[derive(Clone, Debug, Default, Args)]
pub struct Overrides {
    /// Instead of `node`: which of the nodes this one is.
    #[arg(long, value_name = "ID")]
    pub node: Option<u32>,
    /// Instead of `pool` or `pools`; may be given more than once, in their order.
    #[arg(long, value_name = "PATH")]
    pub pool: Vec<PathBuf>,
    /// Instead of `listen.peer`.
    #[arg(long, value_name = "IP:PORT")]
    pub peer_listen: Option<SocketAddr>,
    /// Instead of `listen.nbd`; may be given more than once.
    #[arg(long, value_name = "IP:PORT|unix:PATH")]
    pub nbd_listen: Vec<ListenAddress>,
    /// Instead of `listen.grpc`.
    #[arg(long, value_name = "IP:PORT")]
    pub grpc_listen: Option<SocketAddr>,
    /// Instead of `listen.metrics`.
    #[arg(long, value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// Instead of `log.level`.
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Instead of `log.format`.
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Of `ballastd format`.
#[derive(Debug, Args)]
pub struct FormatArguments {
    /// The configuration file of the node (TOML; docs/configuration.md).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Create each pool as a new file of this size (4GiB); without it, they must exist.
    #[arg(long, value_name = "SIZE")]
    pub create: Option<Size>,
    /// Destroy what an existing file or disk holds, unless it is a Ballast pool.
    #[arg(long, conflicts_with = "create")]
    pub overwrite_foreign: bool,
    /// Make only the pool of this shard, its place in `pools` counted from 0: a disk that was added,
    /// or takes the place of one.
    #[arg(long, value_name = "SHARD")]
    pub shard: Option<u32>,
    /// Make only shard 0's pool, in the place of one that was given up: the number that
    /// `ballastctl pool replace` has printed.
    #[arg(long, value_name = "NUMBER")]
    pub replacement: Option<u64>,
    /// Settings that replace those of the file.
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Of `ballastd dev`.
#[derive(Debug, Args)]
pub struct DevArguments {
    /// The folder that keeps the cluster: a new or empty one, or one that this command made.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Number of nodes: 1, 3 or 5; 3 for a new cluster when not given.
    #[arg(long, value_name = "N")]
    pub nodes: Option<u32>,
    /// A volume to create unless it exists; may be given more than once. A new cluster gets
    /// demo=1GiB when none is given.
    #[arg(long = "volume", value_name = "NAME=SIZE")]
    pub volumes: Vec<String>,
    /// Pools of each node, with a shard (a thread) each; 1 for a new cluster when not given.
    #[arg(long, value_name = "N")]
    pub pools: Option<u32>,
    /// Size of each pool file, for a new cluster.
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub pool_size: Size,
    /// Start nodes that died again.
    #[arg(long)]
    pub respawn: bool,
    /// Level of the nodes' logs.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Of `ballastd dev-node`.
#[derive(Debug, Args)]
pub struct DevNodeArguments {
    /// The folder of the cluster.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// The node.
    #[arg(long, value_name = "N")]
    pub id: u32,
    /// Level of the log.
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// The process that started this one: its end ends this one too.
    #[arg(long, value_name = "PID", hide = true)]
    pub supervisor: Option<i32>,
}
