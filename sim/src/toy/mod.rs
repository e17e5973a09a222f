//! A small replicated register store on the consensus library: what the simulator is proved with.
//!
//! Three nodes, one volume, one log slot per entry on the simulated disk, NBD towards hosts. It is
//! right as it stands, and [`Planted`] makes it wrong in the ways that the simulator must find. It
//! is a test object: nothing in the product depends on it, and it keeps its whole state in memory.

mod log;
mod machine;
mod peer;
mod serve;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ballast_block::{BlockRange, NodeId};
use ballast_env::network::{Address, Network};
use ballast_env::raft_runtime::RaftRuntime;
use ballast_env::spawn::Spawn;
use bytes::Bytes;
use openraft::impls::leader_id_std;
use openraft::{Config, EmptyNode, Raft, SnapshotPolicy};

use crate::env::SimEnv;
use crate::machine::ip_of;
use crate::system::{ReplicaView, System, VolumeView};
use crate::toy::log::ToyLog;
use crate::toy::machine::{Stored, ToyMachine};
use crate::toy::peer::ToyNetwork;
use crate::world::World;

openraft::declare_raft_types!(
    /// The toy's types.
    pub ToyConfig:
        D = ToyCommand,
        R = (),
        NodeId = u64,
        Node = EmptyNode,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = RaftRuntime,
);

type Entry = openraft::type_config::alias::EntryOf<ToyConfig>;
type LogId = openraft::type_config::alias::LogIdOf<ToyConfig>;
type Vote = openraft::type_config::alias::VoteOf<ToyConfig>;
type ToyRaft = Raft<ToyConfig, ToyMachine>;

/// Port of NBD.
pub const NBD_PORT: u16 = 10809;
/// Port between the nodes.
const PEER_PORT: u16 = 7000;
/// The name of the only volume.
pub const VOLUME: &str = "toy";
/// Blocks of the only volume.
pub const VOLUME_BLOCKS: u64 = 64;
/// Largest write, in blocks.
pub const WRITE_BLOCKS_MAX: usize = 8;

/// A write: `data` is empty for zeroes.
#[derive(Clone, Debug)]
pub struct ToyCommand {
    /// Where.
    pub range: BlockRange,
    /// What.
    pub data: Bytes,
}

impl fmt::Display for ToyCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.range.fmt(f)
    }
}

/// Bugs that the toy can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planted {
    /// A restarted leader goes on in its old term (hazard F1).
    pub leader_restore: bool,
    /// Entries count as durable before they are on the disk.
    pub early_ack: bool,
    /// Reads are answered by whoever believes to lead, without asking anybody.
    pub unchecked_reads: bool,
    /// Votes are not kept.
    pub forgets_votes: bool,
}

/// One node of the toy, as tests see it from outside.
#[derive(Default)]
pub struct ToyHandle {
    raft: RefCell<Option<ToyRaft>>,
    log: RefCell<Option<ToyLog>>,
    stored: RefCell<Rc<RefCell<Stored>>>,
}

impl ToyHandle {
    /// Proposes zeroes for one block at this node; whether that was acknowledged.
    pub async fn propose(&self, block: u64) -> bool {
        let raft = self.raft.borrow().clone();
        let Some(raft) = raft else { return false };
        let command = ToyCommand { range: BlockRange::new(block, 1), data: Bytes::new() };
        raft.client_write(command).await.is_ok()
    }

    /// Term and first block of the write in the log at `index`, durable or not.
    pub fn logged(&self, index: u64) -> Option<(u64, u64)> {
        self.log.borrow().as_ref()?.logged(index)
    }

    /// Whether the node believes to lead.
    pub fn leads(&self) -> bool {
        self.raft.borrow().as_ref().is_some_and(|raft| raft.as_leader().is_ok())
    }

    /// The log's last entry as (term, index), durable or not.
    pub fn last_log(&self) -> Option<(u64, u64)> {
        use openraft::async_runtime::WatchReceiver;
        let raft = self.raft.borrow();
        let metrics = raft.as_ref()?.metrics();
        let metrics = metrics.borrow_watched();
        Some((metrics.current_term, metrics.last_log_index?))
    }

    /// Applied index and a digest of all blocks.
    pub fn applied(&self) -> (u64, u64) {
        let stored = self.stored.borrow();
        let stored = stored.borrow();
        (stored.applied.map_or(0, |id| id.index), stored.digest())
    }
}

/// The address of NBD on `node`.
pub fn nbd_address(node: NodeId) -> Address {
    Address::Tcp(SocketAddr::new(ip_of(node), NBD_PORT))
}

fn peer_address(node: u64) -> Address {
    Address::Tcp(SocketAddr::new(ip_of(NodeId(node as u32)), PEER_PORT))
}

/// The process of one node: runs until it is crashed.
pub async fn node(env: SimEnv, members: BTreeSet<u64>, planted: Planted, handle: Rc<ToyHandle>) {
    let id = u64::from(env.node().0);
    let config = Config {
        heartbeat_interval: 100,
        election_timeout_min: 400,
        election_timeout_max: 800,
        snapshot_policy: SnapshotPolicy::Never,
        enable_leader_restore: Some(planted.leader_restore),
        allow_log_reversion: Some(false),
        ..Config::default()
    };
    let config = Arc::new(config.validate().expect("consistent"));
    let Ok(log) = ToyLog::open(&env, planted).await else { return };
    let fresh = log.is_empty();
    handle.log.replace(Some(log.clone()));
    let machine = ToyMachine::default();
    let stored = machine.stored();
    handle.stored.replace(stored.clone());
    let network = ToyNetwork::new(env.clone());
    let raft = Raft::new(id, config, network, log, machine).await.expect("the toy starts");
    handle.raft.replace(Some(raft.clone()));
    let peers = env.listen(&peer_address(id)).await.expect("a free port");
    env.spawn(peer::serve(env.clone(), peers, raft.clone()));
    if fresh {
        // Every node does; whoever was initialized meanwhile refuses.
        let _ = raft.initialize(members).await;
    }
    let hosts = env.listen(&nbd_address(env.node())).await.expect("a free port");
    serve::serve(env, hosts, raft, stored, planted).await;
}

/// The toy as a [`System`].
#[derive(Clone)]
pub struct Toy {
    planted: Planted,
    handles: Rc<BTreeMap<NodeId, Rc<ToyHandle>>>,
}

impl Toy {
    /// Three nodes with these bugs.
    pub fn new(planted: Planted) -> Self {
        let handles = (1..=3).map(|id| (NodeId(id), Rc::default())).collect();
        Self { planted, handles: Rc::new(handles) }
    }

    /// The view from outside of `node`.
    pub fn handle(&self, node: NodeId) -> Rc<ToyHandle> {
        self.handles[&node].clone()
    }
}

impl System for Toy {
    async fn node(&self, env: SimEnv) {
        let members = self.handles.keys().map(|id| u64::from(id.0)).collect();
        node(env.clone(), members, self.planted, self.handle(env.node())).await;
    }

    async fn prepare(&self, world: &World) {
        while !self.handles.values().any(|handle| handle.leads()) {
            world.sleep_ms(10).await;
        }
    }

    fn volumes(&self) -> Vec<VolumeView> {
        vec![VolumeView { name: VOLUME.to_owned(), blocks: VOLUME_BLOCKS, replicas: 3 }]
    }

    fn nbd_address(&self, node: NodeId) -> Address {
        nbd_address(node)
    }

    fn request_blocks_max(&self) -> u64 {
        WRITE_BLOCKS_MAX as u64
    }

    fn pools(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    fn survives_rot(&self) -> bool {
        false
    }

    async fn replicas(&self, _world: &World, node: NodeId) -> Vec<ReplicaView> {
        let (applied, digest) = self.handle(node).applied();
        vec![ReplicaView { volume: 0, applied, digest }]
    }

    fn fences(&self) -> bool {
        false
    }

    fn nodes(&self) -> u32 {
        self.handles.len() as u32
    }
}
