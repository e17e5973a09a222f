//! From a command line to requests, and from their answers to text.

use std::time::{Duration, Instant};

use ballast_api::{Client, EndpointError, v1};
use thiserror::Error;
use tonic::{Code, Status};

use crate::cli::{Cli, Command, Format, LeaseCommand, NodeCommand, PoolCommand, VolumeCommand};
use crate::confirm::{self, confirm_delete};
use crate::render::Answer;
use crate::{create, leases, view};

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum Failure {
    /// The cluster refused, or nobody answered.
    #[error("{}", status_text(.0))]
    Refused(#[from] Box<Status>),
    /// An endpoint can't be used.
    #[error("{0} (--endpoint or BALLAST_ENDPOINT)")]
    Endpoint(#[from] EndpointError),
    /// An answer lacks what it must have.
    #[error("the node's answer has no {0}: ballastctl and ballastd do not fit; use one version")]
    AnswerIncomplete(&'static str),
    /// Deleting needs a yes.
    #[error("volume {0:?} was not deleted: there is no terminal to ask on; give --yes")]
    NobodyToAsk(String),
    /// The answer was no.
    #[error("volume {0:?} was not deleted: its name was not typed")]
    NotConfirmed(String),
    /// As for a volume.
    #[error("the pool of {0} was not given up: there is no terminal to ask on; give --yes")]
    NobodyToAskForPool(String),
    /// As for a volume.
    #[error("the pool of {0} was not given up: the node's name was not typed")]
    PoolNotConfirmed(String),
    /// As for a volume.
    #[error("volume {0:?} was not taken by force: there is no terminal to ask on; give --yes")]
    NobodyToAskForForce(String),
    /// As for a volume.
    #[error("volume {0:?} was not taken by force: its name was not typed")]
    ForceNotConfirmed(String),
    /// The terminal failed.
    #[error("terminal can't be read ({0}); give --yes")]
    Terminal(#[source] std::io::Error),
    /// `--wait` took too long.
    #[error(
        "volume {name:?} was created and is not ready after {} s: it waits for {missing}; see \
         `ballastctl status`, or wait longer with --timeout: the same command goes on with it",
        .waited.as_secs()
    )]
    NotReadyInTime {
        /// The volume.
        name: String,
        /// How long the command took.
        waited: Duration,
        /// What it waits for, in words.
        missing: String,
    },
    /// The process can't run.
    #[error("runtime can't be started ({0}); free some memory or file descriptors")]
    Runtime(#[source] std::io::Error),
    /// The answer can't be printed.
    #[error("standard output can't be written ({0})")]
    Output(#[source] std::io::Error),
}

impl Failure {
    /// 2 for wrong usage, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Endpoint(_)
            | Failure::NobodyToAsk(_)
            | Failure::NobodyToAskForPool(_)
            | Failure::NobodyToAskForForce(_) => 2,
            _ => 1,
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure::Refused(Box::new(status))
    }
}

/// Does what the command line says; returns what to print.
pub async fn run(cli: &Cli) -> Result<String, Failure> {
    let client = Client::new(&cli.endpoint)?;
    confirm_first(&cli.command)?;
    // Whoever was asked took the time that he wanted.
    let deadline = Instant::now() + cli.timeout;
    let client = client.with_deadline(deadline);
    match &cli.command {
        Command::Volume(command) => volume(cli, &client, deadline, command).await,
        Command::Lease(command) => leases::lease(cli, &client, command).await,
        Command::Node(NodeCommand::List) => {
            let nodes = client.list_nodes(v1::ListNodesRequest {}).await?.nodes;
            Ok(show(cli, &view::Nodes { nodes: all(nodes) }))
        }
        Command::Node(NodeCommand::Show { node }) => {
            let answer = client.get_node(v1::GetNodeRequest { node: node.clone() }).await?;
            let node = answer.node.ok_or(Failure::AnswerIncomplete("node"))?.into();
            Ok(show(cli, &view::NodeDetail { node, pools: all(answer.pools) }))
        }
        Command::Pool(PoolCommand::List { node }) => {
            let node = node.clone().unwrap_or_default();
            let pools = client.list_pools(v1::ListPoolsRequest { node }).await?.pools;
            Ok(show(cli, &view::Pools { pools: all(pools) }))
        }
        Command::Pool(PoolCommand::Replace { node, pool, force, reason, .. }) => {
            let request = v1::ReplacePoolRequest {
                node: node.clone(),
                pool_id: pool.clone(),
                force: *force,
                reason: reason.clone().unwrap_or_default(),
            };
            let it = client.replace_pool(request).await?;
            let (pool, node, replacement) = (it.pool_id, it.node, it.replacement);
            let (shard, without_number) = (it.shard, it.without_number);
            let replaced = view::PoolReplaced { pool, node, shard, replacement, without_number };
            Ok(show(cli, &replaced))
        }
        Command::Status => {
            let status = client.get_status(v1::GetStatusRequest {}).await?;
            Ok(show(cli, &view::Status::from(status)))
        }
    }
}

async fn volume(
    cli: &Cli,
    client: &Client,
    deadline: Instant,
    command: &VolumeCommand,
) -> Result<String, Failure> {
    match command {
        VolumeCommand::Create(it) => {
            let volume = create::volume(client, it, cli.timeout, deadline).await?;
            one_volume(cli, Some(volume))
        }
        VolumeCommand::List => {
            let volumes = client.all_volumes().await?;
            Ok(show(cli, &view::Volumes { volumes: all(volumes) }))
        }
        VolumeCommand::Show { volume } => {
            let request = v1::GetVolumeRequest { volume: volume.clone(), fresh: false };
            let answer = client.get_volume(request).await?;
            let volume = answer.volume.ok_or(Failure::AnswerIncomplete("volume"))?;
            Ok(show(cli, &view::VolumeDetail::new(volume, answer.replicas, answer.writers)))
        }
        VolumeCommand::Delete { volume, .. } => {
            let request = v1::DeleteVolumeRequest { volume: volume.clone() };
            let deleted = client.delete_volume(request).await?.deleted;
            Ok(show(cli, &view::Deleted { deleted }))
        }
        VolumeCommand::Resize { volume, size } => {
            let request = v1::ResizeVolumeRequest { volume: volume.clone(), size_bytes: *size };
            one_volume(cli, client.resize_volume(request).await?.volume)
        }
        VolumeCommand::MoveLeader { volume, node } => {
            let request = v1::MoveLeaderRequest { volume: volume.clone(), node: node.clone() };
            let leader_node = client.move_leader(request).await?.leader_node;
            Ok(show(cli, &view::LeaderMoved { leader_node }))
        }
        VolumeCommand::Attach(acquire) => leases::acquire(cli, client, acquire).await,
        VolumeCommand::Detach(release) => leases::release(cli, client, release).await,
    }
}

/// Asks the person at the terminal, where the command destroys something and does not say `--yes`.
fn confirm_first(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Volume(VolumeCommand::Delete { volume, yes: false }) => confirm(volume),
        Command::Pool(PoolCommand::Replace { node, yes: false, .. }) => confirm_pool(node),
        Command::Volume(VolumeCommand::Attach(it)) | Command::Lease(LeaseCommand::Acquire(it))
            if it.force && !it.yes =>
        {
            leases::confirm_force(&it.volume, &it.host)
        }
        _ => Ok(()),
    }
}

fn confirm(volume: &str) -> Result<(), Failure> {
    match confirm_delete(volume).map_err(Failure::Terminal)? {
        confirm::Answer::Yes => Ok(()),
        confirm::Answer::No => Err(Failure::NotConfirmed(volume.to_owned())),
        confirm::Answer::Nobody => Err(Failure::NobodyToAsk(volume.to_owned())),
    }
}

fn confirm_pool(node: &str) -> Result<(), Failure> {
    match confirm::confirm_replace(node).map_err(Failure::Terminal)? {
        confirm::Answer::Yes => Ok(()),
        confirm::Answer::No => Err(Failure::PoolNotConfirmed(node.to_owned())),
        confirm::Answer::Nobody => Err(Failure::NobodyToAskForPool(node.to_owned())),
    }
}

fn one_volume(cli: &Cli, volume: Option<v1::Volume>) -> Result<String, Failure> {
    let volume = volume.ok_or(Failure::AnswerIncomplete("volume"))?.into();
    Ok(show(cli, &view::OneVolume { volume }))
}

/// An answer in the form that was asked for.
pub fn show(cli: &Cli, answer: &impl Answer) -> String {
    match cli.output {
        Format::Table => answer.text(),
        Format::Json => answer.json(),
    }
}

/// Each of them as it is shown.
pub fn all<A, B: From<A>>(items: Vec<A>) -> Vec<B> {
    items.into_iter().map(B::from).collect()
}

/// The cluster's words; the code only where a node gave none.
fn status_text(status: &Status) -> String {
    match (status.code(), status.message()) {
        (Code::Unimplemented, _) => {
            "the node does not know this request: ballastd is older than ballastctl".to_owned()
        }
        (code, "") => format!("the node answered {code:?} and did not say why: see its log"),
        (_, message) => message.to_owned(),
    }
}
