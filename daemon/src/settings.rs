//! Settings of a node: the file with the flags over it, checked.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ballast_block::limits::NODE_SHARDS_MAX;
use ballast_block::{ClusterId, NodeId};
use ballast_env::network::Address;
use ballast_node::RaftSettings;
use ballast_node::config::{Founder, NodeConfig};
use ballast_node::leases::LeasePolicy;

use crate::cli::Overrides;
use crate::config::{ConfigError, ConfigFile, Leases, ListenAddress, Log, NodeEntry, RaftTimes};
use crate::size::Size;

/// Shortest heartbeat: below it, heartbeats of many idle volumes alone load a core.
const HEARTBEAT_MIN: Duration = Duration::from_millis(10);
/// Longest election timeout: hosts give a volume up that stalls for longer than a minute or so.
const ELECTION_MAX: Duration = Duration::from_secs(60);

/// The key of what clients' requests may hold.
const REQUESTS: &str = "memory.requests";

/// Everything a process needs to know to run a node.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What each shard of the node needs, shard 0 first; they differ in their pools.
    pub shards: Vec<NodeConfig>,
    /// Where to listen for administration.
    pub grpc: Option<SocketAddr>,
    /// Where to listen for metrics and health.
    pub metrics: Option<SocketAddr>,
    /// Logging.
    pub log: Log,
    /// Whether the process's memory stays in memory.
    pub lock_memory: bool,
}

impl Settings {
    /// Reads `path`, puts the flags over it and checks everything that can be checked without
    /// touching a disk or a port.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut file = ConfigFile::read(path)?;
        place(&mut file, path);
        apply(&mut file, overrides);
        Self::check(file)
    }

    /// Checks a file.
    ///
    /// # Errors
    /// [`ConfigError::Setting`].
    pub fn check(file: ConfigFile) -> Result<Self, ConfigError> {
        if file.cluster == ClusterId::default() {
            return setting("cluster", "is all zeroes: make a UUID of your own, with uuidgen");
        }
        check_nodes(&file.nodes)?;
        if !file.nodes.iter().any(|node| node.id == file.node) {
            return setting("node", format!("is {}, which is not among `nodes`", file.node));
        }
        let pools = pools(file.pool, file.pools)?;
        crate::logging::check_level(&file.log.level)
            .map_err(|problem| ConfigError::Setting { setting: "log.level", problem })?;
        let founders = file.nodes.iter().map(|node| Founder {
            node: NodeId(node.id),
            name: node.name.clone(),
            peer_address: Address::Tcp(node.peer),
        });
        let (cluster, id) = (file.cluster, NodeId(file.node));
        let mut node = NodeConfig::new(cluster, id, PathBuf::new(), founders.collect());
        node.peer_listen = file.listen.peer.map(Address::Tcp);
        node.nbd_listen = file.listen.nbd.into_iter().map(address).collect();
        node.raft = raft(&file.raft)?;
        node.leader_follows_writer = file.volumes.leader_follows_writer;
        node.leases = match file.volumes.leases {
            Leases::Required => LeasePolicy::Required,
            Leases::Optional => LeasePolicy::Optional,
        };
        if let Some(retention) = file.volumes.retention {
            node.retention_bytes = check_retention(retention.0)?;
        }
        let requests = file.memory.requests.map(|Size(bytes)| bytes);
        node.request_memory = request_memory(requests, pools.len())?;
        let (grpc, metrics) = (file.listen.grpc, file.listen.metrics);
        let shard = |pool| NodeConfig { pool, ..node.clone() };
        let shards = pools.into_iter().map(shard).collect();
        Ok(Self { shards, grpc, metrics, log: file.log, lock_memory: file.memory.lock })
    }

    /// Checks what depends on the machine that the node runs on.
    ///
    /// # Errors
    /// [`ConfigError::Setting`].
    pub fn check_machine(&self, memory_bytes: u64) -> Result<(), ConfigError> {
        let requests: usize = self.shards.iter().map(|shard| shard.request_memory).sum();
        if requests as u64 <= memory_bytes {
            return Ok(());
        }
        let (requests, memory) = (Size(requests as u64), memory_bytes >> 20);
        setting(REQUESTS, format!("is {requests}, and this machine has {memory}MiB: use less"))
    }

    /// What shard 0 needs: what is not about pools is the whole node's.
    pub fn first(&self) -> &NodeConfig {
        self.shards.first().expect("a checked node has a pool")
    }
}

fn setting<T>(setting: &'static str, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Setting { setting, problem: problem.into() })
}

/// Paths in the file are relative to its folder.
fn place(file: &mut ConfigFile, path: &Path) {
    let folder = path.parent().unwrap_or(Path::new(""));
    for pool in file.pool.iter_mut().chain(file.pools.iter_mut().flatten()) {
        if pool != Path::new("") {
            *pool = folder.join(&*pool);
        }
    }
    for listen in &mut file.listen.nbd {
        if let ListenAddress::Unix(socket) = listen {
            *socket = folder.join(&*socket);
        }
    }
}

fn apply(file: &mut ConfigFile, flags: &Overrides) {
    let Overrides { node, pool, peer_listen, nbd_listen, .. } = flags;
    if let Some(node) = node {
        file.node = *node;
    }
    if !pool.is_empty() {
        (file.pool, file.pools) = (None, Some(pool.clone()));
    }
    file.listen.peer = peer_listen.or(file.listen.peer);
    if !nbd_listen.is_empty() {
        file.listen.nbd.clone_from(nbd_listen);
    }
    file.listen.grpc = flags.grpc_listen.or(file.listen.grpc);
    file.listen.metrics = flags.metrics_listen.or(file.listen.metrics);
    if let Some(level) = &flags.log_level {
        file.log.level.clone_from(level);
    }
    if let Some(format) = flags.log_format {
        file.log.format = format;
    }
}

fn check_nodes(nodes: &[NodeEntry]) -> Result<(), ConfigError> {
    if ![1, 3, 5].contains(&nodes.len()) {
        return setting("nodes", format!("has {} entries: a cluster has 1, 3 or 5", nodes.len()));
    }
    let distinct = |what: &str, count: usize| match count == nodes.len() {
        true => Ok(()),
        false => setting("nodes", format!("names one {what} twice: give each node its own")),
    };
    distinct("id", nodes.iter().map(|node| node.id).collect::<BTreeSet<_>>().len())?;
    distinct("name", nodes.iter().map(|node| &node.name).collect::<BTreeSet<_>>().len())?;
    distinct("peer address", nodes.iter().map(|node| node.peer).collect::<BTreeSet<_>>().len())?;
    for node in nodes {
        let what = |problem: &str| setting("nodes", format!("{}: {problem}", node.name));
        if node.id == 0 {
            return what("id 0 is not valid: number nodes from 1");
        }
        if node.name.is_empty() {
            return setting("nodes", format!("node {} has an empty name", node.id));
        }
        if node.peer.port() == 0 || node.peer.ip().is_unspecified() {
            return what("peer must be an address and port that the other nodes can connect to");
        }
    }
    Ok(())
}

/// The node's pools, shard 0's first.
fn pools(one: Option<PathBuf>, several: Option<Vec<PathBuf>>) -> Result<Vec<PathBuf>, ConfigError> {
    let (key, pools) = match (one, several) {
        (Some(pool), None) => ("pool", vec![pool]),
        (None, Some(pools)) => ("pools", pools),
        (None, None) => {
            return setting("pool", "is missing: name a disk, partition or file");
        }
        (Some(_), Some(_)) => {
            return setting("pools", "and pool are both there: name all pools in `pools`");
        }
    };
    if pools.is_empty() || pools.iter().any(|pool| pool == Path::new("")) {
        return setting(key, "is empty: name a disk, partition or file");
    }
    if pools.len() > NODE_SHARDS_MAX {
        let count = pools.len();
        return setting(key, format!("has {count} entries: a node has at most {NODE_SHARDS_MAX}"));
    }
    let mut seen = BTreeSet::new();
    for pool in &pools {
        if !seen.insert(real_path(pool)) {
            let pool = pool.display();
            return setting(key, format!("names {pool} twice: give each shard a disk of its own"));
        }
    }
    Ok(pools)
}

/// Without links and detours, as far as it exists.
fn real_path(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.canonicalize().unwrap_or_else(|_| {
        let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
        folder.zip(path.file_name()).map_or_else(|| path.clone(), |(f, name)| f.join(name))
    })
}

fn check_retention(bytes: u64) -> Result<u64, ConfigError> {
    use ballast_block::limits::{POOL_RETENTION_BYTES_MAX, TRANSFER_BYTES_MAX};
    let least = 4 * TRANSFER_BYTES_MAX as u64;
    if (least..=POOL_RETENTION_BYTES_MAX).contains(&bytes) {
        return Ok(bytes);
    }
    let range = format!("{} to {}", Size(least), Size(POOL_RETENTION_BYTES_MAX));
    setting("volumes.retention", format!("is {bytes} bytes: use {range}"))
}

/// A shard's part of the memory for clients' requests.
fn request_memory(bytes: Option<u64>, shards: usize) -> Result<usize, ConfigError> {
    use ballast_block::limits::{
        REQUEST_MEMORY_BYTES, REQUEST_MEMORY_BYTES_MAX, REQUEST_MEMORY_BYTES_MIN,
    };
    let (least, most) = (REQUEST_MEMORY_BYTES_MIN * shards, REQUEST_MEMORY_BYTES_MAX * shards);
    let bytes = bytes.unwrap_or(REQUEST_MEMORY_BYTES.max(least) as u64);
    match usize::try_from(bytes) {
        Ok(fits) if (least..=most).contains(&fits) => Ok(fits / shards),
        _ => {
            let range = format!("{} to {}", Size(least as u64), Size(most as u64));
            setting(REQUESTS, format!("is {bytes} bytes: use {range}"))
        }
    }
}

fn raft(times: &RaftTimes) -> Result<RaftSettings, ConfigError> {
    let default = RaftSettings::default();
    let or = |ms: Option<u64>, default| ms.map_or(default, Duration::from_millis);
    let raft = RaftSettings {
        heartbeat: or(times.heartbeat_ms, default.heartbeat),
        election_min: or(times.election_min_ms, default.election_min),
        election_max: or(times.election_max_ms, default.election_max),
    };
    if raft.heartbeat < HEARTBEAT_MIN {
        return setting("raft.heartbeat_ms", "is under 10");
    }
    if raft.election_min < raft.heartbeat * 2 {
        return setting(
            "raft.election_min_ms",
            "is under twice heartbeat_ms: one lost heartbeat would start an election",
        );
    }
    if raft.election_max <= raft.election_min {
        return setting("raft.election_max_ms", "is not above election_min_ms");
    }
    if raft.election_max > ELECTION_MAX {
        return setting("raft.election_max_ms", "is over 60000");
    }
    Ok(raft)
}

fn address(listen: ListenAddress) -> Address {
    match listen {
        ListenAddress::Tcp(socket) => Address::Tcp(socket),
        ListenAddress::Unix(path) => Address::Unix(path),
    }
}
