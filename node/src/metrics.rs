//! What this node counts, as metrics. `docs/metrics.md` is the page for users.
//!
//! Gauges and most counters are read off when somebody asks ([`Node::collect_metrics`]): the way of
//! a write pays for nothing but its histograms. Never decides anything.

use ballast_block::FamilyId;
use ballast_env::Env;
use ballast_raft_store::replica::Health;
use ballast_volume::group::Group;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge};
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;

use crate::meters::KINDS;
use crate::node::{Inner, Node};
use crate::peers::links::Lane;

/// The label of the cluster group, which replicates no volume.
const CLUSTER_GROUP: &str = "(cluster group)";

const HISTOGRAMS: [(&str, &str); 2] = [
    ("ballast_command_seconds", "From a host's command to its answer, on the serving node."),
    ("ballast_stage_seconds", "Stages of writes and reads, most on the leading node."),
];

const COUNTERS: [(&str, &str); 19] = [
    ("ballast_volume_commands_total", "Commands of hosts that this node answered."),
    ("ballast_volume_bytes_total", "Bytes that they were about, errors not counted."),
    ("ballast_volume_errors_total", "Commands that were answered with an error."),
    ("ballast_resync_received_bytes_total", "Pulled by replicas here that were far behind."),
    ("ballast_resync_sent_bytes_total", "Pulled from here by peers that were far behind."),
    ("ballast_resyncs_total", "Differences that were installed here."),
    ("ballast_log_written_bytes_total", "Written for log entries, payload and headers."),
    ("ballast_log_writes_total", "Disk writes that carried log entries."),
    ("ballast_cleaner_moved_bytes_total", "Moved by the cleaner."),
    ("ballast_cleaner_segments_total", "Segments that the cleaner emptied."),
    ("ballast_checkpoints_total", "Checkpoints made."),
    ("ballast_damaged_blocks_total", "Blocks on this disk whose checksum failed."),
    ("ballast_damaged_pages_total", "Map pages whose checksum failed: the replica is replaced."),
    (
        "ballast_damaged_headers_total",
        "Headers of batches and segments found damaged at the start.",
    ),
    ("ballast_damaged_superblocks_total", "Superblocks found damaged at the start."),
    ("ballast_damaged_votes_total", "Vote slots found damaged at the start."),
    ("ballast_repaired_blocks_total", "Damaged blocks that were repaired from a peer."),
    ("ballast_pool_boots_total", "How often the pool was opened, ever."),
    ("ballast_cluster_changes_total", "Changes of the cluster's state, ever, as applied here."),
];

const GAUGES: [(&str, &str); 41] = [
    (
        "ballast_nbd_request_memory_bytes",
        "What clients' requests hold beyond each connection's own.",
    ),
    ("ballast_nbd_request_memory_waiting", "Connections that wait for memory for a request."),
    ("ballast_recovery_seconds", "How long the last start took to open the pool."),
    ("ballast_peer_queue_bytes", "Waiting to be sent to the peer."),
    ("ballast_node_ready", "Whether the cluster has accepted this start of the node."),
    ("ballast_pool_refused", "Whether the cluster calls the pool lost: the node takes no part."),
    ("ballast_pool_failed", "Whether the pool stopped: the node then ends."),
    ("ballast_pool_size_bytes", "All segments of the pool."),
    ("ballast_pool_capacity_bytes", "What may live on the pool, data and map."),
    ("ballast_pool_used_bytes", "In segments that hold something."),
    ("ballast_pool_live_bytes", "In live blocks; an upper bound under load."),
    ("ballast_pool_free_bytes", "Capacity that nothing lives in."),
    ("ballast_pool_writable", "Whether the pool admits writes now: not full, and some credit."),
    ("ballast_pool_credit_bytes", "What can be appended before space has to be freed."),
    ("ballast_pool_full", "Whether what lives is as much as the pool takes: writes are refused."),
    ("ballast_pool_meta_segments", "Segments of map pages."),
    ("ballast_retention_limit_bytes", "What the log kept for followers may be at most."),
    ("ballast_pool_segments", "Segments of the pool."),
    ("ballast_pool_free_segments", "Free segments of the pool."),
    ("ballast_checkpoint_log_bytes", "Log since the last checkpoint: what a start would read."),
    ("ballast_retained_bytes", "Log kept on disk for followers that lag, all volumes."),
    ("ballast_log_cache_bytes", "Payload of recent log entries in memory."),
    ("ballast_map_delta_bytes", "Changes of extent maps in memory that no page has yet."),
    ("ballast_suspect_replicas", "Replicas that may have forgotten what they acknowledged."),
    ("ballast_recovery_replayed_records", "Records replayed by the last start."),
    ("ballast_recovery_replayed_bytes", "Log read by the last start."),
    ("ballast_recovery_damaged_entries", "Log entries with a damaged payload, at the last start."),
    ("ballast_damaged_entries", "Log entries known to be damaged here and not mended yet."),
    ("ballast_recovery_torn_tail", "Whether the last start dropped a torn, unacknowledged tail."),
    ("ballast_peer_link_up", "Whether there is a link to the peer."),
    ("ballast_attachments", "Clients of this node that may write."),
    ("ballast_replicas", "Replicas of volumes that run on this node."),
    ("ballast_raft_leader", "Whether this node's replica leads."),
    ("ballast_raft_term", "Raft's term."),
    ("ballast_raft_last_log_index", "The last entry in this replica's log."),
    ("ballast_raft_applied_index", "The last entry that this replica applied."),
    ("ballast_raft_suspect", "Whether this replica may have forgotten what it acknowledged."),
    (
        "ballast_raft_cramped",
        "Whether this replica can't catch up because its pool has no room for what it lacks.",
    ),
    ("ballast_raft_mixed", "Whether a difference replaces this replica's blocks in place."),
    ("ballast_raft_retained_bytes", "Log of this replica kept on disk."),
    (
        "ballast_raft_follower_lag_entries",
        "On the leader: entries that the replica on the peer is not known to have.",
    ),
];

/// Says what each metric means; once per process, after its recorder is installed.
pub fn describe() {
    for (name, text) in COUNTERS {
        describe_counter!(name, text);
    }
    for (name, text) in GAUGES {
        describe_gauge!(name, text);
    }
    for (name, text) in HISTOGRAMS {
        describe_histogram!(name, text);
    }
}

fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

impl<E: Env> Node<E> {
    /// Sets all gauges and counters to what they are now.
    pub fn collect_metrics(&self) {
        let inner = &*self.inner;
        gauge!("ballast_node_ready").set(flag(self.is_ready()));
        pool(inner);
        recovery(inner);
        clients(inner);
        peers(inner);
        volumes(inner);
        let damaged = |group: &Group<E>| group.replica().damaged_entries().len();
        let damaged: usize = inner.groups().iter().map(damaged).sum();
        gauge!("ballast_damaged_entries").set(damaged as f64);
        gauge!("ballast_attachments").set(inner.attachments.borrow().len() as f64);
        if let Some(member) = inner.cluster.group() {
            counter!("ballast_cluster_changes_total").absolute(inner.cluster.state().revision());
            group(inner, CLUSTER_GROUP, member);
        }
        let families: Vec<_> = inner.families.borrow().values().cloned().collect();
        gauge!("ballast_replicas").set(families.len() as f64);
        for family in families {
            let id = family.group().replica().family();
            group(inner, &volume_name(inner, id), family.group());
        }
    }
}

fn volume_name<E: Env>(inner: &Inner<E>, family: FamilyId) -> String {
    let state = inner.cluster.state();
    state.volume_of_family(family).map_or_else(|| family.to_string(), |volume| volume.name.clone())
}

fn pool<E: Env>(inner: &Inner<E>) {
    let stats = inner.pool.stats();
    let space = stats.space;
    let room = inner.pool.room();
    for (name, value) in [
        ("ballast_pool_capacity_bytes", space.capacity),
        ("ballast_pool_size_bytes", space.total),
        ("ballast_pool_used_bytes", space.used),
        ("ballast_pool_live_bytes", space.live),
        ("ballast_pool_free_bytes", space.free),
        ("ballast_pool_writable", u64::from(room.credit > 0 && !room.full)),
        ("ballast_pool_credit_bytes", room.credit),
        ("ballast_pool_full", u64::from(room.full)),
        ("ballast_pool_meta_segments", stats.meta_segments),
        ("ballast_retention_limit_bytes", stats.retention_limit),
        ("ballast_pool_refused", u64::from(inner.refused.borrow().is_some())),
        ("ballast_pool_failed", u64::from(inner.pool.failure().borrow().is_some())),
        ("ballast_pool_segments", stats.segments),
        ("ballast_pool_free_segments", stats.segments_free),
        ("ballast_checkpoint_log_bytes", stats.log_since_checkpoint),
        ("ballast_retained_bytes", stats.retained_bytes),
        ("ballast_log_cache_bytes", stats.cache_bytes),
        ("ballast_map_delta_bytes", stats.map_delta_bytes),
        ("ballast_suspect_replicas", stats.suspects),
    ] {
        gauge!(name).set(value as f64);
    }
    for (name, value) in [
        ("ballast_log_written_bytes_total", stats.log_bytes_written),
        ("ballast_log_writes_total", stats.log_writes),
        ("ballast_cleaner_moved_bytes_total", stats.cleaner_bytes_moved),
        ("ballast_cleaner_segments_total", stats.cleaner_segments),
        ("ballast_checkpoints_total", stats.checkpoints),
        ("ballast_damaged_blocks_total", stats.damaged_blocks),
        ("ballast_damaged_pages_total", stats.damaged_pages),
        ("ballast_damaged_headers_total", stats.damaged_headers),
        ("ballast_damaged_superblocks_total", stats.damaged_superblocks),
        ("ballast_damaged_votes_total", stats.damaged_votes),
        ("ballast_repaired_blocks_total", stats.repaired_blocks),
        ("ballast_pool_boots_total", inner.pool.boot_counter()),
    ] {
        counter!(name).absolute(value);
    }
}

/// What hosts did through this node; and resyncs, which no volume is told apart in.
fn volumes<E: Env>(inner: &Inner<E>) {
    let exists = |family| inner.cluster.state().volume_of_family(family).is_some();
    for (family, meter) in inner.meters.volumes(exists) {
        let volume = volume_name(inner, family);
        for (kind, operation) in KINDS.into_iter().enumerate() {
            for (name, value) in [
                ("ballast_volume_commands_total", &meter.commands[kind]),
                ("ballast_volume_bytes_total", &meter.bytes[kind]),
                ("ballast_volume_errors_total", &meter.errors[kind]),
            ] {
                let labels = [("volume", volume.clone()), ("operation", operation.to_owned())];
                counter!(name, &labels).absolute(value.get());
            }
        }
    }
    for (name, value) in [
        ("ballast_resync_received_bytes_total", &inner.meters.resync_received),
        ("ballast_resync_sent_bytes_total", &inner.meters.resync_sent),
        ("ballast_resyncs_total", &inner.meters.resyncs),
    ] {
        counter!(name).absolute(value.get());
    }
}

fn recovery<E: Env>(inner: &Inner<E>) {
    gauge!("ballast_recovery_seconds").set(inner.opened_in.as_secs_f64());
    let found = &inner.recovery;
    for (name, value) in [
        ("ballast_recovery_replayed_records", found.replayed_records),
        ("ballast_recovery_replayed_bytes", found.replayed_bytes),
        ("ballast_recovery_damaged_entries", found.damaged_entries),
        ("ballast_recovery_torn_tail", u64::from(found.torn_tail)),
    ] {
        gauge!(name).set(value as f64);
    }
}

fn clients<E: Env>(inner: &Inner<E>) {
    let memory = &inner.request_memory;
    gauge!("ballast_nbd_request_memory_bytes").set(memory.used() as f64);
    gauge!("ballast_nbd_request_memory_waiting").set(memory.waiting() as f64);
}

fn peers<E: Env>(inner: &Inner<E>) {
    for founder in &inner.config.founders {
        if founder.node != inner.config.node {
            let up = inner.links.peer(founder.node).is_some();
            gauge!("ballast_peer_link_up", "peer" => founder.name.clone()).set(flag(up));
            for (lane, name) in [(Lane::Data, "data"), (Lane::Control, "control")] {
                let connection = inner.links.connection(founder.node, lane);
                let queued = connection.map_or(0, |connection| connection.queued_bytes());
                let labels = [("peer", founder.name.clone()), ("lane", name.to_owned())];
                gauge!("ballast_peer_queue_bytes", &labels).set(queued as f64);
            }
        }
    }
}

fn group<E: Env>(inner: &Inner<E>, volume: &str, group: &Group<E>) {
    let metrics = group.raft().metrics();
    let metrics = metrics.borrow_watched();
    let store = group.replica();
    let last = metrics.last_log_index.unwrap_or(0);
    let leads = metrics.state == ServerState::Leader;
    for (name, value) in [
        ("ballast_raft_leader", flag(leads)),
        ("ballast_raft_term", metrics.current_term as f64),
        ("ballast_raft_last_log_index", last as f64),
        ("ballast_raft_applied_index", metrics.last_applied.map_or(0, |id| id.index) as f64),
        ("ballast_raft_retained_bytes", store.retained_bytes() as f64),
        ("ballast_raft_suspect", flag(store.health() != Health::Good)),
        ("ballast_raft_cramped", flag(store.is_cramped())),
        ("ballast_raft_mixed", flag(store.is_mixed())),
    ] {
        gauge!(name, "volume" => volume.to_owned()).set(value);
    }
    let membership = metrics.membership_config.membership();
    for (id, matched) in metrics.replication.iter().flatten() {
        let Some(member) = membership.get_node(id).filter(|m| m.node != inner.config.node) else {
            continue;
        };
        let founder = inner.config.founders.iter().find(|founder| founder.node == member.node);
        let peer = founder.map_or_else(|| member.node.to_string(), |founder| founder.name.clone());
        let lag = last.saturating_sub(matched.map_or(0, |id| id.index));
        let labels = [("volume", volume.to_owned()), ("peer", peer)];
        gauge!("ballast_raft_follower_lag_entries", &labels).set(lag as f64);
    }
}
