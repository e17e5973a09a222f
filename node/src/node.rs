//! A node, or one shard of it: opens the pool, starts the groups on it, links up with the peers,
//! serves.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::buffer::BufferPool;
use ballast_block::{AttachmentId, FamilyId, NodeId, PoolId, ReplicaId, ShardId, VolumeId};
use ballast_cluster::{Marks, PoolStart};
use ballast_env::Env;
use ballast_env::network::{Address, Listener};
use ballast_env::spawn::OwnedTask;
use ballast_nbd::RequestMemory;
use ballast_raft_store::pool::{
    CreateReplicaError, FormatOptions, FormatPoolError, Lineage, OpenPoolError, Pool,
    PoolExpectation, RecoveryReport, ReplicaDescriptor,
};
use ballast_raft_store::replica::Replica;
use ballast_raft_store::stream::PoolFailed;
use ballast_volume::acks::Acks;
use ballast_volume::family::Family;
use ballast_volume::group::{Group, StartGroupError};
use ballast_volume::snapshot::Checkpoint;
use prost::Message;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};

use crate::cluster_copy::ClusterCopy;
use crate::cluster_group::{
    ClusterFoundingV1, ClusterGroup, ClusterMachine, ClusterMember, cluster_replica,
};
use crate::config::{Founder, NodeConfig};
use crate::meters::Meters;
use crate::nbd_lanes::Sessions;
use crate::nbd_sizes::SizesTold;
use crate::peers::identity::Identity;
use crate::peers::links::{Handler, Links};
use crate::peers::raft_net::{RaftNet, Transfers};
use crate::resync::Incoming;
use crate::room::RoomTable;
use crate::shards::{self, Arrival, Doors, Place, Seat};
use crate::{members, mend, nbd_target, quiesce, reconcile, room, server};

/// How often logs are checked against their retention bound.
const RETENTION_INTERVAL: Duration = Duration::from_secs(1);

/// The shard that has the cluster group's member and listens.
const FIRST_SHARD: ShardId = ShardId(0);

/// A node could not be made ready or started.
#[derive(Debug, Error)]
pub enum StartNodeError {
    /// This node is not among the founders.
    #[error("{0} is not among the nodes of the configuration: add it to `nodes`")]
    NodeNotListed(NodeId),
    /// Not 1, 3 or 5 nodes, or one twice.
    #[error("{0} nodes are configured; a cluster starts with 1, 3 or 5 different ones")]
    FoundersInvalid(usize),
    /// The pool can't be formatted.
    #[error(transparent)]
    FormatPool(#[from] FormatPoolError),
    /// The pool can't be opened.
    #[error("{path}: {problem}")]
    OpenPool {
        /// Its path.
        path: String,
        /// Why.
        problem: OpenPoolError,
    },
    /// The cluster group's replica can't be made.
    #[error("can't make the cluster group's replica: {0}")]
    CreateReplica(#[from] CreateReplicaError),
    /// The pool has no replica of the cluster group.
    #[error(
        "pool {0} has no replica of the cluster group: either it is not the node's first one, then put \
         the node's pools back in their order; or formatting it was cut short, then wipe it by hand \
         and format it again"
    )]
    ClusterReplicaMissing(String),
    /// A pool of a further shard has a replica of the cluster group.
    #[error(
        "pool {path} is a node's first one, and is configured for {shard}: put the node's pools back \
         in their order"
    )]
    ClusterReplicaUnexpected {
        /// Its path.
        path: String,
        /// The shard that it is configured for.
        shard: ShardId,
    },
    /// Shard 0 could not be started, or has ended.
    #[error("shard 0 of this node is not there: {0} can't start without it")]
    FirstShardEnded(ShardId),
    /// A group can't be started.
    #[error(transparent)]
    StartGroup(#[from] StartGroupError),
    /// An address can't be listened on.
    #[error("can't listen on {address}: {problem}")]
    Listen {
        /// The address.
        address: Address,
        /// What the system says.
        problem: io::Error,
    },
}

pub(crate) struct Inner<E: Env> {
    pub(crate) env: E,
    pub(crate) config: NodeConfig,
    pub(crate) links: Rc<Links<E>>,
    /// The ways to the other shards of this node.
    pub(crate) doors: Rc<Doors<E>>,
    pub(crate) pool: Pool<E>,
    pub(crate) recovery: RecoveryReport,
    pub(crate) buffers: BufferPool,
    pub(crate) transfers: Rc<Transfers<E>>,
    /// What arrived of differences that broke.
    pub(crate) broken: RefCell<BTreeMap<ReplicaId, Incoming<E>>>,
    pub(crate) cluster: ClusterGroup<E>,
    pub(crate) families: RefCell<BTreeMap<FamilyId, Family<E>>>,
    /// Families that are being started or stopped right now.
    pub(crate) changing: RefCell<BTreeSet<FamilyId>>,
    /// Attachments that a client of this node holds now.
    pub(crate) attachments: RefCell<BTreeMap<AttachmentId, FamilyId>>,
    /// The newest start of each peer's pool that this process has seen (hazard F5).
    pub(crate) boots: RefCell<BTreeMap<NodeId, (PoolId, u64, u64)>>,
    /// Pools of peers that a living process has shown to have gone back in time.
    pub(crate) rolled_back: RefCell<BTreeSet<PoolId>>,
    pub(crate) room: RoomTable,
    pub(crate) meters: Meters,
    /// How long opening the pool took.
    pub(crate) opened_in: Duration,
    /// NBD clients connected now.
    pub(crate) nbd_connections: Cell<usize>,
    pub(crate) nbd_sessions: Sessions<E>,
    pub(crate) nbd_sizes: SizesTold,
    /// Told when there is one connection less.
    pub(crate) nbd_closed: Notify,
    pub(crate) request_memory: Rc<RequestMemory>,
    pub(crate) nbd_addresses: RefCell<Vec<Address>>,
    pub(crate) peer_address: RefCell<Option<Address>>,
    pub(crate) stopping: watch::Sender<bool>,
    /// Whether the cluster has accepted this start of the pool.
    pub(crate) announced: Cell<bool>,
    /// A later start of the pool that the cluster knows, as it told this process.
    pub(crate) told: Cell<Option<PoolStart>>,
    /// Why the cluster does not take this pool, for ever, if so.
    pub(crate) refused: RefCell<Option<String>>,
    tasks: RefCell<Vec<OwnedTask>>,
}

/// A running node, or one shard of it. Clones share it.
pub struct Node<E: Env> {
    pub(crate) inner: Rc<Inner<E>>,
}

impl<E: Env> Clone for Node<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

/// Makes a founding node's first pool: an explicit act of an administrator, once. Never called by
/// starting a node. `replacement` names the member of the cluster group that the cluster gave to
/// the node's next pool when the one before was given up: the old one's promises are forgotten, so
/// its id must not come back (hazard F5).
///
/// # Errors
/// [`StartNodeError`]; nothing is written unless everything in the configuration is right.
pub async fn format<E: Env>(
    env: &E,
    config: &NodeConfig,
    create_bytes: Option<u64>,
    overwrite_foreign: bool,
    replacement: Option<ReplicaId>,
) -> Result<PoolId, StartNodeError> {
    check(config)?;
    let options = format_options(config, create_bytes, overwrite_foreign);
    let id = Pool::format(env, &config.pool, options).await?;
    let (pool, _) = open(env, config, Some(id)).await?;
    let nodes = config.founders.iter().map(|founder| founder.node.0).collect();
    let descriptor = ReplicaDescriptor {
        replica: replacement.unwrap_or(cluster_replica(config.node)),
        family: FamilyId::CLUSTER,
        volume: VolumeId::default(),
        bytes: ClusterFoundingV1 { nodes }.encode_to_vec().into(),
    };
    pool.create_replica(descriptor).await?;
    if let Err(error) = pool.close().await {
        tracing::warn!(%error, "checkpoint of the fresh pool failed; its log has everything");
    }
    Ok(id)
}

/// Makes a pool for a further shard of a node, which has nothing on it yet. As [`format()`], an act of
/// an administrator.
///
/// # Errors
/// [`StartNodeError`]; nothing is written unless everything in the configuration is right.
pub async fn format_further<E: Env>(
    env: &E,
    config: &NodeConfig,
    create_bytes: Option<u64>,
    overwrite_foreign: bool,
) -> Result<PoolId, StartNodeError> {
    check(config)?;
    let options = format_options(config, create_bytes, overwrite_foreign);
    Ok(Pool::format(env, &config.pool, options).await?)
}

/// Refuses what [`format()`] and [`format_further`] would refuse, but for a file to be created that
/// exists. Writes nothing: for making several pools, or none.
///
/// # Errors
/// [`StartNodeError`].
pub async fn check_format<E: Env>(
    env: &E,
    config: &NodeConfig,
    create_bytes: Option<u64>,
    overwrite_foreign: bool,
) -> Result<(), StartNodeError> {
    check(config)?;
    let options = format_options(config, create_bytes, overwrite_foreign);
    Ok(Pool::check_format(env, &config.pool, &options).await?)
}

fn format_options(
    config: &NodeConfig,
    create: Option<u64>,
    overwrite_foreign: bool,
) -> FormatOptions {
    FormatOptions { cluster: config.cluster, node: config.node, create, overwrite_foreign }
}

fn check(config: &NodeConfig) -> Result<&Founder, StartNodeError> {
    let ids: BTreeSet<NodeId> = config.founders.iter().map(|founder| founder.node).collect();
    let count = config.founders.len();
    if ids.len() != count || ![1, 3, 5].contains(&count) {
        return Err(StartNodeError::FoundersInvalid(count));
    }
    config.own().ok_or(StartNodeError::NodeNotListed(config.node))
}

async fn open<E: Env>(
    env: &E,
    config: &NodeConfig,
    pool: Option<PoolId>,
) -> Result<(Pool<E>, RecoveryReport), StartNodeError> {
    let expect = PoolExpectation { cluster: config.cluster, node: config.node, pool };
    Pool::open(env.clone(), &config.pool, expect).await.map_err(|problem| {
        StartNodeError::OpenPool { path: config.pool.display().to_string(), problem }
    })
}

impl<E: Env> Node<E> {
    /// Opens the pool of a node that has one, and starts everything on it: see [`Node::start_at`].
    ///
    /// # Errors
    /// [`StartNodeError`].
    pub async fn start(env: E, config: NodeConfig) -> Result<Self, StartNodeError> {
        let only = shards::places(config.cluster, 1).pop().expect("one was asked for");
        Self::start_at(env, config, only).await
    }

    /// Opens the pool of one shard and starts everything on it. Returns when it serves; its groups
    /// may not have leaders yet. A further shard waits for shard 0, which must be started, too.
    ///
    /// # Errors
    /// [`StartNodeError`].
    pub async fn start_at(
        env: E,
        config: NodeConfig,
        place: Place<E>,
    ) -> Result<Self, StartNodeError> {
        let own = check(&config)?.clone();
        let Place { shard, doors, arrivals, seat } = place;
        let begun = env.now();
        let (pool, recovery) = open(&env, &config, None).await?;
        let opened_in = env.now().since(begun);
        tracing::info!(node = %config.node, %shard, pool = %pool.id(), boot = pool.boot_counter(),
            ?recovery, ?opened_in, "pool is open");
        let identity = identity_of(&env, &config, &pool, shard)?;
        let request_memory = RequestMemory::new(config.request_memory);
        let (buffers, doors) = (BufferPool::default(), Rc::new(doors));
        let links = Links::new(env.clone(), identity, buffers.clone(), doors.clone());
        let transfers = Rc::<Transfers<E>>::default();
        let (cluster, served) = match seat {
            Seat::First { publish, proposals } => {
                let member = start_member(&env, &config, &pool, &links, &transfers).await?;
                (ClusterGroup::Member(member), Some((publish, proposals)))
            }
            Seat::Further { copy, proposals } => {
                let copy = ClusterCopy::open(env.clone(), copy, proposals).await;
                (ClusterGroup::Copy(copy.ok_or(StartNodeError::FirstShardEnded(shard))?), None)
            }
        };
        let inner = Rc::new(Inner {
            env,
            config,
            links,
            doors,
            pool,
            recovery,
            buffers,
            transfers,
            broken: RefCell::default(),
            cluster,
            families: RefCell::default(),
            changing: RefCell::default(),
            attachments: RefCell::default(),
            boots: RefCell::default(),
            rolled_back: RefCell::default(),
            room: RoomTable::default(),
            meters: Meters::default(),
            opened_in,
            nbd_connections: Cell::new(0),
            nbd_sessions: RefCell::default(),
            nbd_sizes: SizesTold::default(),
            nbd_closed: Notify::new(),
            request_memory,
            nbd_addresses: RefCell::default(),
            peer_address: RefCell::default(),
            stopping: watch::Sender::new(false),
            announced: Cell::new(false),
            told: Cell::new(None),
            refused: RefCell::default(),
            tasks: RefCell::default(),
        });
        let node = Self { inner };
        node.connect(&own, arrivals).await?;
        if let Some((publish, proposals)) = served {
            node.keep(shards::serve_others(Rc::downgrade(&node.inner), publish, proposals));
        }
        node.run_background();
        Ok(node)
    }

    /// Dials the peers' shards of the same number; on shard 0, listens for all shards.
    async fn connect(
        &self,
        own: &Founder,
        arrivals: mpsc::Receiver<Arrival<E>>,
    ) -> Result<(), StartNodeError> {
        let inner = &self.inner;
        let handler = server::Server::of(inner);
        if inner.cluster.member().is_some() {
            self.listen(own, &handler).await?;
        }
        self.keep(shards::take_in(Rc::downgrade(inner), arrivals, handler.clone()));
        inner.doors.open(inner.shard());
        for founder in &inner.config.founders {
            if founder.node != own.node {
                let address = founder.peer_address.clone();
                inner.links.dial(founder.node, address, handler.clone());
            }
        }
        Ok(())
    }

    async fn listen(&self, own: &Founder, handler: &Rc<dyn Handler>) -> Result<(), StartNodeError> {
        let inner = &self.inner;
        let env = &inner.env;
        let bind = async |address: &Address| {
            let failed = |problem| StartNodeError::Listen { address: address.clone(), problem };
            env.listen(address).await.map_err(failed)
        };
        let peer_listen = inner.config.peer_listen.as_ref().unwrap_or(&own.peer_address);
        let listener = bind(peer_listen).await?;
        *inner.peer_address.borrow_mut() = Some(listener.address());
        self.keep(inner.links.clone().accept(listener, handler.clone()));
        for address in &inner.config.nbd_listen {
            let listener = bind(address).await?;
            inner.nbd_addresses.borrow_mut().push(listener.address());
            self.keep(nbd_target::accept(Rc::downgrade(inner), listener));
        }
        Ok(())
    }

    fn run_background(&self) {
        let weak = || Rc::downgrade(&self.inner);
        self.keep(reconcile::run(weak()));
        self.keep(room::tell(weak()));
        self.keep(keep_retention(weak()));
        self.keep(quiesce::run(weak()));
        self.keep(mend::run(weak()));
        self.keep(members::run(weak()));
    }

    fn keep(&self, future: impl Future<Output = ()> + 'static) {
        let task = OwnedTask(self.inner.env.spawn(future));
        self.inner.tasks.borrow_mut().push(task);
    }

    /// Stops serving, stops the groups, checkpoints and closes the pool.
    pub async fn stop(&self) {
        let inner = &self.inner;
        inner.stopping.send_replace(true);
        inner.tasks.borrow_mut().clear();
        nbd_target::all_closed(inner).await;
        let families = std::mem::take(&mut *inner.families.borrow_mut());
        for family in families.values() {
            family.stop().await;
        }
        if let Some(group) = inner.cluster.group() {
            group.stop().await;
        }
        inner.links.hang_up();
        if let Err(error) = inner.pool.close().await {
            tracing::warn!(%error, "last checkpoint failed; the log has everything");
        }
    }

    /// Turns `Some` when the pool fails: the node must then end.
    pub fn failure(&self) -> watch::Receiver<Option<PoolFailed>> {
        self.inner.pool.failure()
    }

    /// Where NBD clients connect.
    pub fn nbd_addresses(&self) -> Vec<Address> {
        self.inner.nbd_addresses.borrow().clone()
    }

    /// Who this process is.
    pub fn identity(&self) -> Identity {
        *self.inner.links.identity()
    }

    /// What opening the pool found.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.inner.recovery
    }

    /// The pool.
    pub fn pool(&self) -> &Pool<E> {
        &self.inner.pool
    }

    /// The family's member on this node, if it runs.
    pub fn family(&self, family: FamilyId) -> Option<Family<E>> {
        self.inner.families.borrow().get(&family).cloned()
    }

    /// Which shard of its node it is.
    pub fn shard(&self) -> ShardId {
        self.inner.shard()
    }
}

impl<E: Env> Inner<E> {
    pub(crate) fn shard(&self) -> ShardId {
        self.links.identity().shard
    }

    /// All groups that have a member here.
    pub(crate) fn groups(&self) -> Vec<Group<E>> {
        let families = self.families.borrow();
        let families = families.values().map(|family| family.group().clone());
        self.cluster.group().cloned().into_iter().chain(families).collect()
    }
}

fn identity_of<E: Env>(
    env: &E,
    config: &NodeConfig,
    pool: &Pool<E>,
    shard: ShardId,
) -> Result<Identity, StartNodeError> {
    Ok(Identity {
        cluster: config.cluster,
        node: config.node,
        shard,
        pool: pool.id(),
        boot: pool.boot_counter(),
        incarnation: env.random_u64() | 1,
        marks: marks_of(pool),
        member: member_on(config, pool, shard)?.map_or(ReplicaId(0), |member| member.id()),
    })
}

fn marks_of<E: Env>(pool: &Pool<E>) -> Marks {
    let Lineage { settled, settled_boot, offered } = pool.lineage();
    Marks { settled, settled_boot, offered }
}

fn cluster_member<E: Env>(pool: &Pool<E>) -> Option<Replica<E>> {
    pool.replicas().into_iter().find(|one| one.family() == FamilyId::CLUSTER)
}

/// The pool's replica of the cluster group: shard 0's has one, the others' have none.
fn member_on<E: Env>(
    config: &NodeConfig,
    pool: &Pool<E>,
    shard: ShardId,
) -> Result<Option<Replica<E>>, StartNodeError> {
    let path = || config.pool.display().to_string();
    match (cluster_member(pool), shard == FIRST_SHARD) {
        (None, true) => Err(StartNodeError::ClusterReplicaMissing(path())),
        (Some(_), false) => Err(StartNodeError::ClusterReplicaUnexpected { path: path(), shard }),
        (found, _) => Ok(found),
    }
}

async fn start_member<E: Env>(
    env: &E,
    config: &NodeConfig,
    pool: &Pool<E>,
    links: &Rc<Links<E>>,
    transfers: &Rc<Transfers<E>>,
) -> Result<ClusterMember<E>, StartNodeError> {
    let replica = cluster_member(pool).expect("found when the identity was made");
    let id = replica.id();
    let net = raft_net(env, links, transfers, FamilyId::CLUSTER, id);
    let machine = Rc::new(RefCell::new(ClusterMachine::new(config.cluster)));
    let checkpoint = checkpoint_of(pool);
    let group =
        Group::start(env.clone(), replica, machine.clone(), net, config.raft, checkpoint).await?;
    Ok(ClusterMember::new(env.clone(), links.clone(), group, machine, &config.founders))
}

/// The network of one group.
pub(crate) fn raft_net<E: Env>(
    env: &E,
    links: &Rc<Links<E>>,
    transfers: &Rc<Transfers<E>>,
    family: FamilyId,
    from: ReplicaId,
) -> RaftNet<E> {
    RaftNet {
        env: env.clone(),
        links: links.clone(),
        family,
        from,
        transfers: transfers.clone(),
        acks: Acks::default(),
    }
}

/// How groups make the pool checkpoint.
pub(crate) fn checkpoint_of<E: Env>(pool: &Pool<E>) -> Checkpoint {
    let pool = pool.clone();
    Rc::new(move || {
        let pool = pool.clone();
        Box::pin(async move { pool.checkpoint().await.map_err(io::Error::other) })
    })
}

async fn keep_retention<E: Env>(node: std::rc::Weak<Inner<E>>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        let keep = inner.config.retention_bytes;
        let groups = inner.groups();
        let wanted = inner.pool.purge_wanted();
        drop(inner);
        // Side by side: one that hangs keeps no other from giving up its log.
        futures_util::future::join_all(groups.iter().map(|one| one.trim_log(&env, keep))).await;
        tokio::select! {
            biased;
            () = wanted => {}
            () = env.sleep(RETENTION_INTERVAL) => {}
        }
    }
}
