//! The command line.

use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::size::parse_size;

const EXAMPLES: &str = "\
Examples:
  export BALLAST_ENDPOINT=http://10.0.0.1:7400,http://10.0.0.2:7400
  ballastctl status
  ballastctl volume create db --size 100GiB --replicas 3 --wait
  ballastctl volume show db
  ballastctl -o json volume list
  ballastctl volume move-leader db --node 2
  ballastctl volume attach db --host host-1
  ballastctl lease list
  ballastctl volume delete db --yes

Exit codes: 0 done, 1 refused or no answer, 2 wrong usage.";

/// Administer a Ballast cluster.
#[derive(Debug, Parser)]
#[command(name = "ballastctl", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// Nodes to ask, in turn, until one answers: http://HOST:PORT[,http://HOST:PORT...]
    #[arg(
        long,
        global = true,
        env = "BALLAST_ENDPOINT",
        value_name = "URL[,URL...]",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:7400"
    )]
    pub endpoint: Vec<String>,

    /// How to print the answer; JSON has stable field names, and sizes in bytes
    #[arg(short, long, global = true, value_name = "FORMAT", default_value = "table")]
    pub output: Format,

    /// How long the command may take, all nodes that it asks and --wait together, in seconds
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value = "30",
        value_parser = parse_seconds
    )]
    pub timeout: Duration,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, show, delete and resize volumes, attach and detach them, move their leaders
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Say which host may use a volume, and in which way
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// List and show nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// List pools, and replace lost ones
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Whether the cluster is well, and if not, why
    Status,
}

/// `ballastctl volume ...`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume; the same name, size and replicas again is no change
    #[command(after_help = "Example:\n  ballastctl volume create db --size 100GiB --wait")]
    Create(CreateVolume),
    /// List all volumes
    List,
    /// Show a volume and its replicas
    Show {
        /// Name or id
        volume: String,
    },
    /// Delete a volume and its data, for good; one that is gone is no failure
    Delete {
        /// Name or id
        volume: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Grow a volume
    #[command(after_help = "Example:\n  ballastctl volume resize db --size 200GiB")]
    Resize {
        /// Name or id
        volume: String,
        /// The new size, such as 200GiB; not under the one it has
        #[arg(long, value_parser = parse_size, allow_hyphen_values = true)]
        size: u64,
    },
    /// Make a node's replica the leader of a volume
    MoveLeader {
        /// Name or id
        volume: String,
        /// The node's name or number
        #[arg(long)]
        node: String,
    },
    /// Let a host use a volume, and print the NBD export that it is to open: as `lease acquire`
    #[command(after_help = ATTACH_EXAMPLES)]
    Attach(AcquireLease),
    /// End a host's use of a volume: as `lease release`
    #[command(after_help = "Example:\n  ballastctl volume detach db --host host-1")]
    Detach(ReleaseLease),
}

/// `ballastctl lease ...`
#[derive(Debug, Subcommand)]
pub enum LeaseCommand {
    /// List all leases, or those of a volume or a host
    #[command(after_help = "Example:\n  ballastctl lease list --host host-1")]
    List {
        /// The volume's name or id
        #[arg(long)]
        volume: Option<String>,
        /// The host's name
        #[arg(long)]
        host: Option<String>,
    },
    /// Let a host use a volume; the same host, mode and access again is no change
    #[command(after_help = ACQUIRE_EXAMPLES)]
    Acquire(AcquireLease),
    /// End a host's lease; one that is not there is no failure
    #[command(after_help = "What the host still writes is refused.\n\n\
        Example:\n  ballastctl lease release db --host host-1")]
    Release(ReleaseLease),
}

const ATTACH_EXAMPLES: &str = "\
Examples:
  ballastctl volume attach db --host host-1
  nbdinfo nbd://10.0.0.1:10809/db@lease=41";

const ACQUIRE_EXAMPLES: &str = "\
Modes: single-node-writer, single-node-multi-writer, single-node-publisher, readers, writers.
Readers stand beside readers, and writers (of raw blocks) beside writers; else one host has it alone.

--force ends the leases that are in the way. Their hosts need not be reachable, and what they still
write is refused. A file system that is mounted there loses what it had not written yet.

Examples:
  ballastctl lease acquire db --host host-1
  ballastctl lease acquire db --host host-2 --force --reason 'host-1 is cut off'
  ballastctl lease acquire data --host host-3 --mode readers";

/// `ballastctl lease acquire ...`
#[derive(Debug, Args)]
pub struct AcquireLease {
    /// Name or id
    pub volume: String,
    /// Who is to use it: letters, digits, '.', '-' and '_'
    #[arg(long)]
    pub host: String,
    /// How, and beside whom
    #[arg(long, value_name = "MODE", default_value = "single-node-writer")]
    pub mode: Mode,
    /// Refuse its writes
    #[arg(long)]
    pub read_only: bool,
    /// End the leases of other hosts that are in the way
    #[arg(long, requires = "reason")]
    pub force: bool,
    /// Why by force: kept with the lease
    #[arg(long, requires = "force")]
    pub reason: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

/// `ballastctl lease release ...`
#[derive(Debug, Args)]
pub struct ReleaseLease {
    /// Name or id
    pub volume: String,
    /// Whose
    #[arg(long)]
    pub host: String,
    /// Only the lease with this epoch
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub epoch: u64,
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// One host, one use of it there
    SingleNodeWriter,
    /// One host, several uses of it there
    SingleNodeMultiWriter,
    /// One host, and one publish target on it (ReadWriteOncePod)
    SingleNodePublisher,
    /// Many hosts that read
    Readers,
    /// Many hosts that write raw blocks and agree among themselves
    Writers,
}

/// `ballastctl volume create ...`
#[derive(Debug, Args)]
pub struct CreateVolume {
    /// 1 to 63 of a-z, 0-9 and '-'
    pub name: String,
    /// Size, such as 512MiB or 1TiB
    #[arg(long, value_parser = parse_size, allow_hyphen_values = true)]
    pub size: u64,
    /// Number of copies, on different nodes: 1, 3 or 5
    #[arg(long, default_value_t = 3)]
    pub replicas: u32,
    /// Nodes, by name or number, that are to have a copy if there is room there
    #[arg(long, value_name = "NODE[,NODE...]", value_delimiter = ',')]
    pub prefer: Vec<String>,
    /// Wait until it can be used
    #[arg(long)]
    pub wait: bool,
}

/// `ballastctl node ...`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List all nodes
    List,
    /// Show a node and its pools
    Show {
        /// Name or number
        node: String,
    },
}

/// `ballastctl pool ...`
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// List the pools of all nodes, or of one
    List {
        /// The node's name or number
        #[arg(long)]
        node: Option<String>,
    },
    /// Give a node's pool up for ever, so that a new one can take its place
    #[command(after_help = "For a pool that is lost, rolled back or damaged beyond repair. Its \
        replicas come back from the other nodes, under new ids, once the new pool is there. Refused \
        while the pool serves, and when a volume has no majority in sync without it: --force takes \
        that loss.\n\n\
        Example:\n  ballastctl pool replace --node node-2")]
    Replace {
        /// The node's name or number
        #[arg(long)]
        node: String,
        /// The pool's id, where the node has several
        #[arg(long, default_value = "")]
        pool: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Also if it serves, or volumes are lost with it
        #[arg(long, requires = "reason")]
        force: bool,
        /// Why by force: logged
        #[arg(long, requires = "force")]
        reason: Option<String>,
    },
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u32>() {
        Ok(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds.into())),
        _ => Err("give whole seconds, 1 to 86400".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn clap_finds_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_may_stand_anywhere() {
        let cli = parse("ballastctl volume list -o json --endpoint http://a:1,http://b:2").unwrap();
        assert_eq!(cli.output, Format::Json);
        assert_eq!(cli.endpoint, ["http://a:1", "http://b:2"]);
        let cli = parse("ballastctl --timeout 3 volume create a --size 1GiB").unwrap();
        assert_eq!(cli.timeout, Duration::from_secs(3));
        let Command::Volume(VolumeCommand::Create(create)) = cli.command else { panic!() };
        assert_eq!((create.size, create.replicas, create.wait), (1 << 30, 3, false));
    }

    #[test]
    fn wrong_usage() {
        for (line, kind) in [
            ("ballastctl volume create a", ErrorKind::MissingRequiredArgument),
            ("ballastctl volume create a --size 1G", ErrorKind::ValueValidation),
            ("ballastctl volume create a --size -1GiB", ErrorKind::ValueValidation),
            ("ballastctl volume create a --size 1GiB --replicas x", ErrorKind::ValueValidation),
            ("ballastctl volume list -o yaml", ErrorKind::InvalidValue),
            ("ballastctl volume list --timeout 0", ErrorKind::ValueValidation),
            ("ballastctl volume frobnicate", ErrorKind::InvalidSubcommand),
            ("ballastctl lease acquire a", ErrorKind::MissingRequiredArgument),
            ("ballastctl lease acquire a --host h --force", ErrorKind::MissingRequiredArgument),
            ("ballastctl volume attach a --host h --reason r", ErrorKind::MissingRequiredArgument),
            ("ballastctl lease acquire a --host h --mode all", ErrorKind::InvalidValue),
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.kind(), kind, "{line}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
