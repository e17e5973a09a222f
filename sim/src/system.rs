//! What is simulated: the interface between the harness and a storage node's program.

use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;

use ballast_block::NodeId;
use ballast_env::network::Address;

use crate::claim::Claim;
use crate::env::SimEnv;
use crate::host::workload::Lessor;
use crate::world::World;

/// A program that runs on every node, with what the harness must know of it from outside.
pub trait System: Clone + 'static {
    /// The program's process on the machine of `env`; runs until it is crashed. Called at every
    /// start, so what must survive lies on the simulated disk.
    fn node(&self, env: SimEnv) -> impl Future<Output = ()>;

    /// Once, after the first start of all nodes: makes the cluster and its volumes.
    fn prepare(&self, world: &World) -> impl Future<Output = ()>;

    /// The volumes that hosts use, after [`System::prepare`].
    fn volumes(&self) -> Vec<VolumeView>;

    /// Where a host on another machine reaches `node`.
    fn nbd_address(&self, node: NodeId) -> Address;

    /// Largest request that is applied whole or not at all, in blocks.
    fn request_blocks_max(&self) -> u64;

    /// The files that a node keeps everything in; each stands for a disk.
    fn pools(&self) -> Vec<PathBuf>;

    /// Whether rot in them is to be survived.
    fn survives_rot(&self) -> bool;

    /// Whether a part of the node's process has ended that only a new process brings back.
    fn wants_restart(&self, node: NodeId) -> bool {
        let _ = node;
        false
    }

    /// What the node has applied, for comparing replicas; nothing of those that can't be read now.
    fn replicas(&self, world: &World, node: NodeId) -> impl Future<Output = Vec<ReplicaView>>;

    /// Whether a new attachment fences the writes of the one before, one attachment writes, and
    /// `NAME@ro` is for readers.
    fn fences(&self) -> bool;

    /// Who gives leases of a volume, by its place in [`System::volumes`], where there are leases.
    fn lessor(&self, world: &World, volume: usize) -> Option<Lessor> {
        let _ = (world, volume);
        None
    }

    /// What is made, formatted, deleted and made again beside the volumes.
    fn claims(&self, world: &World) -> Vec<Rc<Claim>> {
        let _ = world;
        Vec::new()
    }

    /// How many storage nodes there are.
    fn nodes(&self) -> u32;

    /// Makes `node` write a checkpoint now, and calls `done` when it is durable.
    fn checkpoint(&self, world: &World, node: NodeId, done: impl FnOnce() + 'static) {
        let _ = (world, node, done);
    }

    /// What `node` found damaged on its disk since its process started; nothing may be while no
    /// disk was harmed.
    fn damage(&self, node: NodeId) -> Option<String> {
        let _ = node;
        None
    }

    /// Guarantee **bounded**: what on `node` is over its named limit. `calm`: for long enough that
    /// what may exceed its bound for a moment must be back.
    fn over_limit(&self, node: NodeId, calm: bool) -> Option<String> {
        let _ = (node, calm);
        None
    }
}

/// A volume as a host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeView {
    /// Its export name.
    pub name: String,
    /// Its size in blocks.
    pub blocks: u64,
    /// How many nodes hold it.
    pub replicas: u32,
}

/// A replica as the harness sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaView {
    /// The volume's place in [`System::volumes`], or behind them that of a claim.
    pub volume: usize,
    /// The log position that is applied.
    pub applied: u64,
    /// A digest of the contents at that position.
    pub digest: u64,
}
