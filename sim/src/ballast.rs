//! Ballast itself as the simulated [`System`]: the production node on every machine.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::checksum::crc32;
use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::limits::{
    APPEND_BYTES_MAX, FAMILY_INFLIGHT_BYTES_MAX, LOG_CACHE_BYTES_MAX, MAP_DELTA_BYTES_MAX,
    PEER_QUEUE_BYTES_MAX, TRANSFER_BYTES_MAX,
};
use ballast_block::{BlockRange, ClusterId, Epoch, NodeId, ReplicaId, ShardId, VolumeId};
use ballast_cluster::{LeaseMode, Volume};
use ballast_env::clock::Clock;
use ballast_env::network::Address;
use ballast_env::spawn::Spawn;
use ballast_node::config::{Founder, NodeConfig};
use ballast_node::leases::LeasePolicy;
use ballast_node::leasing::LeaseAsk;
use ballast_node::node::{self, Node};
use ballast_node::shards::{self, Place};
use ballast_raft_store::replica::ReadContent;
use ballast_volume::family::Family;
use ballast_volume::state::ROOT_BRANCH;
use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use crate::claim::{self, Claim};
use crate::env::SimEnv;
use crate::host::workload::Lessor;
use crate::machine::ip_of;
use crate::rng::Rng;
use crate::system::{ReplicaView, System, VolumeView};
use crate::world::World;

pub use crate::sizes::Sizes;

/// Path of a node's first pool: shard 0's.
pub const POOL: &str = "/pool";
const NBD_PORT: u16 = 10809;
const PEER_PORT: u16 = 7700;

/// How long a node that can't start waits before it tries again, as its supervisor would.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Requests of one leader that a follower has appended and not answered: the depth of the consensus
/// library's pipeline, and two on their way through it.
const UNFLUSHED_REQUESTS_MAX: usize = 66;

/// The product.
#[derive(Clone)]
pub struct Ballast(Rc<Inner>);

struct Inner {
    sizes: Sizes,
    cluster: ClusterId,
    running: RefCell<BTreeMap<(NodeId, ShardId), Node<SimEnv>>>,
    /// Further shards that have ended in a process that goes on.
    ended: RefCell<BTreeSet<(NodeId, ShardId)>>,
    /// Pools that were made.
    formatted: RefCell<BTreeSet<(NodeId, ShardId)>>,
    /// Members of the cluster group to make the next first pools of nodes with.
    replacements: RefCell<BTreeMap<NodeId, ReplicaId>>,
    /// Checkpoints that were asked for: the shards take turns.
    checkpoints: Cell<u32>,
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
            ended: RefCell::default(),
            formatted: RefCell::default(),
            replacements: RefCell::default(),
            checkpoints: Cell::new(0),
        }))
    }

    fn nodes(&self) -> impl Iterator<Item = NodeId> + use<> {
        (1..=self.0.sizes.nodes).map(NodeId)
    }

    /// All shards of a node, 0 first.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.0.sizes.shards).map(ShardId)
    }

    fn config(&self, id: NodeId, shard: ShardId) -> NodeConfig {
        let founder = |node: NodeId| Founder {
            node,
            name: format!("n{}", node.0),
            peer_address: Address::Tcp(SocketAddr::new(ip_of(node), PEER_PORT)),
        };
        let founders = self.nodes().map(founder).collect();
        let mut config = NodeConfig::new(self.0.cluster, id, pool_of(shard), founders);
        config.nbd_listen = vec![self.nbd_address(id)];
        config.retention_bytes = self.0.sizes.retention_bytes;
        config.leases = LeasePolicy::Optional;
        config
    }

    /// The node that runs on machine `id` now, or its shard 0, if it got that far.
    pub fn running(&self, id: NodeId) -> Option<Node<SimEnv>> {
        self.shard(id, ShardId(0))
    }

    /// One shard of the node that runs on machine `id` now, if it got that far and has not ended.
    pub fn shard(&self, id: NodeId, shard: ShardId) -> Option<Node<SimEnv>> {
        self.0.running.borrow().get(&(id, shard)).cloned()
    }

    /// All shards that run on machine `id` now.
    fn running_shards(&self, id: NodeId) -> Vec<Node<SimEnv>> {
        self.shards().filter_map(|shard| self.shard(id, shard)).collect()
    }

    /// The shard of a volume, as machine `id` knows it.
    pub fn shard_of(&self, id: NodeId, volume: usize) -> Option<ShardId> {
        let node = self.running_shards(id).into_iter().next()?;
        let shard = node.cluster_state().volume_by_name(&volume_name(volume))?.shard;
        Some(shard)
    }

    /// The volume's member on machine `id`, if its shard got that far.
    pub fn member(&self, id: NodeId, volume: usize) -> Option<Family<SimEnv>> {
        let node = self.shard(id, self.shard_of(id, volume)?)?;
        let family = node.cluster_state().volume_by_name(&volume_name(volume))?.family;
        node.family(family)
    }

    /// What ran on machine `id` is dead.
    pub fn forget_dead(&self, id: NodeId) {
        self.0.running.borrow_mut().retain(|(node, _), _| *node != id);
        self.0.ended.borrow_mut().retain(|(node, _)| *node != id);
    }

    /// The pool of a shard is gone from its machine, whose next start formats it anew; a first pool
    /// with the member of the cluster group that the cluster gave to the node's next one.
    pub fn reformat(&self, id: NodeId, shard: ShardId, replacement: Option<ReplicaId>) {
        self.0.formatted.borrow_mut().remove(&(id, shard));
        self.0.replacements.borrow_mut().extend(replacement.map(|member| (id, member)));
    }

    /// Formats the pools at the machine's first start only: it is an act of an administrator.
    async fn format(&self, env: &SimEnv) {
        let id = env.node();
        for shard in self.shards() {
            if self.0.formatted.borrow().contains(&(id, shard)) {
                continue;
            }
            let (config, bytes) = (self.config(id, shard), Some(self.0.sizes.pool_bytes));
            let replacement = self.0.replacements.borrow().get(&id).copied();
            let made = match shard {
                ShardId(0) => node::format(env, &config, bytes, false, replacement).await,
                _ => node::format_further(env, &config, bytes, false).await,
            };
            made.expect("an empty machine can be formatted");
            self.0.formatted.borrow_mut().insert((id, shard));
        }
    }

    /// A further shard: in the product a thread, which takes all its tasks along when it ends, and
    /// is missing until the process is started again.
    fn start_further(&self, env: SimEnv, place: Place<SimEnv>) {
        let (this, key) = (self.clone(), (env.node(), place.shard()));
        let ended = env.clone();
        ended.spawn(async move {
            let tasks = LocalSet::new();
            tasks.run_until(this.further(&env, place)).await;
            this.0.running.borrow_mut().remove(&key);
            this.0.ended.borrow_mut().insert(key);
        });
    }

    async fn further(&self, env: &SimEnv, place: Place<SimEnv>) {
        let (id, shard) = (env.node(), place.shard());
        let started = Node::start_at(env.clone(), self.config(id, shard), place).await;
        let node = match started {
            Ok(node) => node,
            Err(error) => return env.world().note(format!("{id} {shard} can't start: {error}")),
        };
        env.world().note(format!("{id} {shard} started"));
        self.0.running.borrow_mut().insert((id, shard), node.clone());
        let mut failure = node.failure();
        let failed = failure.wait_for(Option::is_some).await.map(|failure| format!("{failure:?}"));
        env.world().note(format!("{id} {shard} ends: {failed:?}"));
        node.report_failure().await;
    }
}

/// Path of a shard's pool.
pub fn pool_of(shard: ShardId) -> PathBuf {
    match shard.0 {
        0 => PathBuf::from(POOL),
        number => PathBuf::from(format!("{POOL}-{number}")),
    }
}

/// The name of a volume, by its place in the system's list; behind those, of a claim.
pub fn volume_name(index: usize) -> String {
    format!("vol-{index}")
}

impl System for Ballast {
    async fn node(&self, env: SimEnv) {
        self.format(&env).await;
        let id = env.node();
        self.forget_dead(id);
        let mut places = shards::places(self.0.cluster, self.0.sizes.shards as usize);
        for place in places.drain(1..) {
            self.start_further(env.clone(), place);
        }
        let first = places.pop().expect("a node has a shard");
        let node = match Node::start_at(env.clone(), self.config(id, ShardId(0)), first).await {
            Ok(node) => node,
            Err(error) => {
                env.world().note(format!("{id} can't start: {error}"));
                env.sleep(RESTART_PAUSE).await;
                return;
            }
        };
        env.world().note(format!("{id} started"));
        self.0.running.borrow_mut().insert((id, ShardId(0)), node.clone());
        let mut failure = node.failure();
        let failed = failure.wait_for(Option::is_some).await.map(|failure| format!("{failure:?}"));
        env.world().note(format!("{id} ends: {failed:?}"));
        env.sleep(RESTART_PAUSE).await;
    }

    async fn prepare(&self, world: &World) {
        world.note(format!("{:?}", self.0.sizes));
        let first = NodeId(1);
        let ready = |id| {
            let is_ready = |shard| self.shard(id, shard).is_some_and(|node| node.is_ready());
            self.shards().all(is_ready)
        };
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

    fn pools(&self) -> Vec<PathBuf> {
        self.shards().map(pool_of).collect()
    }

    fn survives_rot(&self) -> bool {
        // What a single replica has lost nobody can repair.
        self.0.sizes.replicas > 1
    }

    fn wants_restart(&self, id: NodeId) -> bool {
        self.0.ended.borrow().iter().any(|(node, _)| *node == id)
    }

    async fn replicas(&self, world: &World, id: NodeId) -> Vec<ReplicaView> {
        let Some(machine) = world.machine(id).filter(|machine| machine.is_running()) else {
            return Vec::new();
        };
        let found = Rc::new(RefCell::new(None));
        let (answer, this) = (found.clone(), self.clone());
        machine.inject(async move {
            let mut views = Vec::new();
            for volume in 0..this.0.sizes.volumes + this.0.sizes.claims {
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

    fn lessor(&self, world: &World, volume: usize) -> Option<Lessor> {
        let (this, world, rng) = (self.clone(), world.clone(), world.rng("lessor", volume as u64));
        Some(Rc::new(move |host: &str| {
            let through = this.any_node(&rng);
            let (mode, by_force) = (LeaseMode::SingleNodeWriter, Some("it moves".to_owned()));
            let (host, seen_revision) = (host.to_owned(), None);
            let ask = LeaseAsk { host, mode, read_only: false, by_force, seen_revision };
            this.clone().lease(world.clone(), through, volume, ask).boxed_local()
        }))
    }

    fn claims(&self, world: &World) -> Vec<Rc<Claim>> {
        let first = self.0.sizes.volumes;
        let indices = first..first + self.0.sizes.claims;
        indices.map(|index| Claim::new(self.clone(), world, index)).collect()
    }

    fn nodes(&self) -> u32 {
        self.0.sizes.nodes
    }

    fn checkpoint(&self, world: &World, id: NodeId, done: impl FnOnce() + 'static) {
        let asked = self.0.checkpoints.replace(self.0.checkpoints.get() + 1);
        let Some(node) = self.shard(id, ShardId(asked % self.0.sizes.shards)) else { return };
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
        self.running_shards(id).iter().find_map(damage_on)
    }

    fn over_limit(&self, id: NodeId, calm: bool) -> Option<String> {
        self.running_shards(id).iter().find_map(|node| over_limit_on(node, self.0.sizes, calm))
    }
}

fn damage_on(node: &Node<SimEnv>) -> Option<String> {
    let (stats, recovery) = (node.pool().stats(), node.recovery());
    let whole = stats.damaged_blocks == 0 && stats.suspects == 0;
    let found = || {
        let (shard, blocks, suspects) = (node.shard(), stats.damaged_blocks, stats.suspects);
        format!("{shard}: {blocks} damaged blocks, {suspects} suspect replicas, {recovery:?}")
    };
    (!whole || recovery.damaged_entries > 0 || !recovery.suspects.is_empty()).then(found)
}

fn over_limit_on(node: &Node<SimEnv>, sizes: Sizes, calm: bool) -> Option<String> {
    let stats = node.pool().stats();
    // Of what is claimed one may be deleted while the next one is there.
    let families = (sizes.volumes + 2 * sizes.claims) as u64 + 1;
    // What may be proposed while the log is being trimmed comes on top.
    let retained = families * (sizes.retention_bytes + FAMILY_INFLIGHT_BYTES_MAX as u64);
    let pending = families as usize * (UNFLUSHED_REQUESTS_MAX * APPEND_BYTES_MAX);
    let bounds = [
        ("changes of maps", stats.map_delta_bytes, MAP_DELTA_BYTES_MAX + TRANSFER_BYTES_MAX),
        ("log cache", stats.cache_bytes, LOG_CACHE_BYTES_MAX + TRANSFER_BYTES_MAX),
        ("queue to a peer", node.peer_queue_bytes(), PEER_QUEUE_BYTES_MAX),
        ("not yet durable", stats.pending_bytes, pending),
    ];
    let shard = node.shard();
    let over = |name, bytes, limit| format!("{shard}: {name}: {bytes} bytes, limit {limit}");
    for (name, bytes, limit) in bounds {
        if bytes > limit as u64 {
            return Some(over(name, bytes, limit as u64));
        }
    }
    if calm && stats.retained_bytes > retained {
        return Some(over("retained log", stats.retained_bytes, retained));
    }
    (stats.segments_free == 0).then(|| format!("{shard}: all segments are in use, reserves too"))
}

impl Ballast {
    /// Takes a volume's lease through one node, and answers its epoch when it is in force.
    pub async fn lease(
        self,
        world: World,
        through: NodeId,
        volume: usize,
        ask: LeaseAsk,
    ) -> Option<Epoch> {
        let shard = self.shard_of(through, volume)?;
        let name = volume_name(volume);
        let taken = self.call(&world, through, shard, move |node| async move {
            node.acquire_lease(&name, ask).await
        });
        taken.await?.ok().map(|(_, lease)| lease.epoch)
    }

    /// Runs a call on a shard of a node, as an administrator's; nothing when it does not run, or dies
    /// meanwhile. Goes on there when nobody waits any more.
    pub async fn call<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        world: &World,
        through: NodeId,
        shard: ShardId,
        call: impl FnOnce(Node<SimEnv>) -> F,
    ) -> Option<T> {
        let machine = world.machine(through).filter(|machine| machine.is_running())?;
        let called = call(self.shard(through, shard)?);
        let (answer, answered) = oneshot::channel();
        machine.inject(async move {
            let _ = answer.send(called.await);
        });
        // A node that dies meanwhile drops what would answer.
        answered.await.ok()
    }

    /// A volume as the node that runs on machine `id` knows it.
    pub fn known_to(&self, id: NodeId, volume: VolumeId) -> Option<Volume> {
        let node = self.running_shards(id).into_iter().next()?;
        node.cluster_state().volume(volume).cloned()
    }

    /// Any of the nodes.
    pub fn any_node(&self, rng: &Rng) -> NodeId {
        NodeId(rng.between(1, u64::from(self.0.sizes.nodes)) as u32)
    }

    async fn replica(&self, id: NodeId, volume: usize) -> Option<ReplicaView> {
        let family = self.member(id, volume)?;
        if family.group().replica().is_draining() {
            return None;
        }
        let applied = family.group().applied_id()?.1;
        let is_claimed = volume >= self.0.sizes.volumes;
        let blocks = if is_claimed { claim::USED_BLOCKS } else { self.0.sizes.volume_blocks };
        let digest = digest(&family, blocks).await?;
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
