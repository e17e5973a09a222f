//! Ballast itself as the simulated [`System`]: the production node on every machine.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use ballast_block::checksum::crc32;
use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::{
    APPEND_BYTES_MAX, FAMILY_INFLIGHT_BYTES_MAX, FAMILY_RETENTION_BYTES_MAX, LOG_CACHE_BYTES_MAX,
    MAP_DELTA_BYTES_MAX, PEER_QUEUE_BYTES_MAX, TRANSFER_BYTES_MAX,
};
use ballast_block::{BlockRange, ClusterId, NodeId, ReplicaId};
use ballast_env::clock::Clock;
use ballast_env::network::Address;
use ballast_node::config::{Founder, NodeConfig};
use ballast_node::node::{self, Node};
use ballast_raft_store::replica::ReadContent;
use ballast_volume::family::Family;
use ballast_volume::state::ROOT_BRANCH;

use crate::env::SimEnv;
use crate::machine::ip_of;
use crate::rng::Rng;
use crate::system::{ReplicaView, System, VolumeView};
use crate::world::World;

/// Path of a node's pool on its disk.
pub const POOL: &str = "/pool";
const NBD_PORT: u16 = 10809;
const PEER_PORT: u16 = 7700;

/// How long a node that can't start waits before it tries again, as its supervisor would.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Requests of one leader that a follower has appended and not answered: the depth of the consensus
/// library's pipeline, and two on their way through it.
const UNFLUSHED_REQUESTS_MAX: usize = 66;

/// Sizes of a simulated cluster.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Storage nodes.
    pub nodes: u32,
    /// Bytes of each pool.
    pub pool_bytes: u64,
    /// Replicas of each volume: 1, 3 or 5, at most one per node.
    pub replicas: u32,
    /// Log kept per family, in bytes.
    pub retention_bytes: u64,
    /// Volumes.
    pub volumes: usize,
    /// Blocks of each volume.
    pub volume_blocks: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            nodes: 3,
            pool_bytes: 1 << 30,
            replicas: 3,
            retention_bytes: FAMILY_RETENTION_BYTES_MAX,
            volumes: 1,
            volume_blocks: 1024,
        }
    }
}

impl Sizes {
    /// What `seed` makes of it: mostly three nodes; pools from ones that hosts fill, or that must be
    /// cleaned all the time, to ones that they never fill.
    pub fn of(seed: u64) -> Self {
        let rng = Rng::named(seed, "sizes", 0);
        let (nodes, replicas) = *rng.pick(&[
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 3),
            (3, 1),
            (1, 1),
            (5, 3),
            (5, 5),
        ]);
        let mib = *rng.pick(&[1024, 1024, 256, 128, 96, 96]);
        let small = mib <= 128;
        Self {
            nodes,
            pool_bytes: mib << 20,
            replicas,
            retention_bytes: *rng.pick(&[FAMILY_RETENTION_BYTES_MAX, 8 << 20, 1 << 20]),
            volumes: *rng.pick(&[1, 1, 1, 2, 3]),
            // More than a small pool holds. With several replicas only where each pool has all: else a
            // pool may have to hold what two others took meanwhile, each as much as it could.
            volume_blocks: if small && rng.chance(300_000) && (replicas == 1 || replicas == nodes) {
                16 << 10
            } else {
                1 << 10
            },
        }
    }
}

/// The product.
#[derive(Clone)]
pub struct Ballast(Rc<Inner>);

struct Inner {
    sizes: Sizes,
    cluster: ClusterId,
    running: RefCell<BTreeMap<NodeId, Node<SimEnv>>>,
    /// Machines whose pool was made.
    formatted: RefCell<BTreeSet<NodeId>>,
    /// Members of the cluster group to make the next pools of nodes with.
    replacements: RefCell<BTreeMap<NodeId, ReplicaId>>,
}

impl Ballast {
    /// A cluster that does not exist yet.
    pub fn new(seed: u64, sizes: Sizes) -> Self {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&seed.to_le_bytes());
        Self(Rc::new(Inner {
            sizes,
            cluster: ClusterId::from_random(id),
            running: RefCell::default(),
            formatted: RefCell::default(),
            replacements: RefCell::default(),
        }))
    }

    fn nodes(&self) -> impl Iterator<Item = NodeId> + use<> {
        (1..=self.0.sizes.nodes).map(NodeId)
    }

    fn config(&self, id: NodeId) -> NodeConfig {
        let founder = |node: NodeId| Founder {
            node,
            name: format!("n{}", node.0),
            peer_address: Address::Tcp(SocketAddr::new(ip_of(node), PEER_PORT)),
        };
        let founders = self.nodes().map(founder).collect();
        let mut config = NodeConfig::new(self.0.cluster, id, PathBuf::from(POOL), founders);
        config.nbd_listen = vec![self.nbd_address(id)];
        config.retention_bytes = self.0.sizes.retention_bytes;
        config
    }

    /// The node that runs on machine `id` now, if it got that far.
    pub fn running(&self, id: NodeId) -> Option<Node<SimEnv>> {
        self.0.running.borrow().get(&id).cloned()
    }

    /// The volume's member on machine `id`, if its node got that far.
    pub fn member(&self, id: NodeId, volume: usize) -> Option<Family<SimEnv>> {
        let node = self.running(id)?;
        let family = node.cluster_state().volume_by_name(&volume_name(volume))?.family;
        node.family(family)
    }

    /// What ran on machine `id` is dead.
    pub fn forget_dead(&self, id: NodeId) {
        self.0.running.borrow_mut().remove(&id);
    }

    /// The machine got an empty disk: its next start formats it, with the member of the cluster
    /// group that the cluster gave to the node's next pool.
    pub fn reformat(&self, id: NodeId, replacement: ReplicaId) {
        self.0.formatted.borrow_mut().remove(&id);
        self.0.replacements.borrow_mut().insert(id, replacement);
    }

    /// Formats the pool at the machine's first start only: it is an act of an administrator.
    async fn format(&self, env: &SimEnv) {
        let id = env.node();
        if self.0.formatted.borrow().contains(&id) {
            return;
        }
        let replacement = self.0.replacements.borrow().get(&id).copied();
        let bytes = Some(self.0.sizes.pool_bytes);
        let made = node::format(env, &self.config(id), bytes, false, replacement).await;
        made.expect("an empty machine can be formatted");
        self.0.formatted.borrow_mut().insert(id);
    }
}

fn volume_name(index: usize) -> String {
    format!("vol-{index}")
}

impl System for Ballast {
    async fn node(&self, env: SimEnv) {
        self.format(&env).await;
        let id = env.node();
        self.forget_dead(id);
        let node = match Node::start(env.clone(), self.config(id)).await {
            Ok(node) => node,
            Err(error) => {
                env.world().note(format!("{id} can't start: {error}"));
                env.sleep(RESTART_PAUSE).await;
                return;
            }
        };
        env.world().note(format!("{id} started"));
        self.0.running.borrow_mut().insert(id, node.clone());
        let mut failure = node.failure();
        let failed = failure.wait_for(Option::is_some).await.map(|failure| format!("{failure:?}"));
        env.world().note(format!("{id} ends: {failed:?}"));
        env.sleep(RESTART_PAUSE).await;
    }

    async fn prepare(&self, world: &World) {
        world.note(format!("{:?}", self.0.sizes));
        let first = NodeId(1);
        let ready = |id| self.running(id).is_some_and(|node| node.is_ready());
        while !self.nodes().all(ready) {
            world.sleep_ms(20).await;
        }
        let done = Rc::new(Cell::new(0));
        let (created, this) = (done.clone(), self.clone());
        world.machine(first).expect("a node").inject(async move {
            let sizes = this.0.sizes;
            for index in 0..sizes.volumes {
                let node = this.running(first).expect("it was ready");
                let bytes = sizes.volume_blocks * BLOCK_SIZE_U64;
                let made = node.create_volume(&volume_name(index), bytes, sizes.replicas).await;
                made.expect("a volume can be created while all is well");
                created.set(created.get() + 1);
            }
        });
        while done.get() < self.0.sizes.volumes {
            world.sleep_ms(20).await;
        }
    }

    fn volumes(&self) -> Vec<VolumeView> {
        let blocks = self.0.sizes.volume_blocks;
        (0..self.0.sizes.volumes)
            .map(|index| VolumeView {
                name: volume_name(index),
                blocks,
                replicas: self.0.sizes.replicas,
            })
            .collect()
    }

    fn nbd_address(&self, node: NodeId) -> Address {
        Address::Tcp(SocketAddr::new(ip_of(node), NBD_PORT))
    }

    fn request_blocks_max(&self) -> u64 {
        64
    }

    fn pool(&self) -> Option<PathBuf> {
        // What a single replica has lost nobody can repair.
        (self.0.sizes.replicas > 1).then(|| Path::new(POOL).to_owned())
    }

    async fn replicas(&self, world: &World, id: NodeId) -> Vec<ReplicaView> {
        let Some(machine) = world.machine(id).filter(|machine| machine.is_running()) else {
            return Vec::new();
        };
        let found = Rc::new(RefCell::new(None));
        let (answer, this) = (found.clone(), self.clone());
        machine.inject(async move {
            let mut views = Vec::new();
            for volume in 0..this.0.sizes.volumes {
                views.extend(this.replica(id, volume).await);
            }
            answer.replace(Some(views));
        });
        // A node that dies meanwhile never answers.
        for _ in 0..1_000 {
            if let Some(views) = found.take() {
                return views;
            }
            world.sleep_ms(10).await;
        }
        Vec::new()
    }

    fn fences(&self) -> bool {
        true
    }

    fn nodes(&self) -> u32 {
        self.0.sizes.nodes
    }

    fn checkpoint(&self, world: &World, id: NodeId, done: impl FnOnce() + 'static) {
        let Some(node) = self.running(id) else { return };
        let machine = world.machine(id).expect("a node");
        let world = world.clone();
        machine.inject(async move {
            let made = node.pool().checkpoint().await;
            world.note(format!("{id} checkpoint {made:?}"));
            if made.is_ok() {
                world.after_ms(0, |_| done());
            }
        });
    }

    fn damage(&self, id: NodeId) -> Option<String> {
        let node = self.running(id)?;
        let (stats, recovery) = (node.pool().stats(), node.recovery());
        let whole = stats.damaged_blocks == 0 && stats.suspects == 0;
        let found = || {
            let (blocks, suspects) = (stats.damaged_blocks, stats.suspects);
            format!("{blocks} damaged blocks, {suspects} suspect replicas, {recovery:?}")
        };
        (!whole || recovery.damaged_entries > 0 || !recovery.suspects.is_empty()).then(found)
    }

    fn over_limit(&self, id: NodeId, calm: bool) -> Option<String> {
        let node = self.running(id)?;
        let stats = node.pool().stats();
        let families = self.0.sizes.volumes as u64 + 1;
        // What may be proposed while the log is being trimmed comes on top.
        let retained = families * (self.0.sizes.retention_bytes + FAMILY_INFLIGHT_BYTES_MAX as u64);
        let pending = families as usize * (UNFLUSHED_REQUESTS_MAX * APPEND_BYTES_MAX);
        let bounds = [
            ("changes of maps", stats.map_delta_bytes, MAP_DELTA_BYTES_MAX + TRANSFER_BYTES_MAX),
            ("log cache", stats.cache_bytes, LOG_CACHE_BYTES_MAX + TRANSFER_BYTES_MAX),
            ("queue to a peer", node.peer_queue_bytes(), PEER_QUEUE_BYTES_MAX),
            ("not yet durable", stats.pending_bytes, pending),
        ];
        let over = |name, bytes, limit| format!("{name}: {bytes} bytes, limit {limit}");
        for (name, bytes, limit) in bounds {
            if bytes > limit as u64 {
                return Some(over(name, bytes, limit as u64));
            }
        }
        if calm && stats.retained_bytes > retained {
            return Some(over("retained log", stats.retained_bytes, retained));
        }
        (stats.segments_free == 0).then(|| "all segments are in use, the reserves too".to_owned())
    }
}

impl Ballast {
    async fn replica(&self, id: NodeId, volume: usize) -> Option<ReplicaView> {
        let family = self.member(id, volume)?;
        if family.group().replica().is_draining() {
            return None;
        }
        let applied = family.group().applied_id()?.1;
        let digest = digest(&family, self.0.sizes.volume_blocks).await?;
        // What was applied while the blocks were read would make the digest one of no position.
        (family.group().applied_id()?.1 == applied).then_some(ReplicaView {
            volume,
            applied,
            digest,
        })
    }
}

/// A digest of all blocks; `None` when some can't be read here now.
async fn digest(family: &Family<SimEnv>, blocks: u64) -> Option<u64> {
    const STEP: u32 = 64;
    let mut digest = 0_u64;
    let mut start = 0;
    while start < blocks {
        let range = BlockRange::new(start, STEP.min((blocks - start) as u32));
        let parts = family.group().replica().read(ROOT_BRANCH, range).await.ok()?;
        let mut bytes = Vec::with_capacity(range.bytes() as usize);
        for part in parts {
            match part.content {
                ReadContent::Data(data) => bytes.extend_from_slice(&data),
                ReadContent::Hole => {
                    bytes.resize(bytes.len() + part.count as usize * BLOCK_SIZE_U64 as usize, 0);
                }
            }
        }
        digest = (digest.rotate_left(5) ^ u64::from(crc32(&bytes))).wrapping_mul(0x0100_0000_01b3);
        start = range.end();
    }
    Some(digest)
}
