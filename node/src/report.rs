//! What this node knows of itself, for peers and administrators.

use std::collections::BTreeMap;
use std::time::Duration;

use ballast_block::NodeId;
use ballast_env::Env;
use ballast_raft_store::replica::Health;
use ballast_raft_store::types::StoredMembership;
use ballast_volume::command::Writer;
use ballast_volume::group::Group;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;

use crate::calls::{NodeReportV1, ReplicaReportV1, Tag, WriterV1, decode};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// Longest wait for a peer's report: an administrator waits for it.
const REPORT_MAX: Duration = Duration::from_secs(1);

/// This node's report.
pub(crate) async fn own<E: Env>(inner: &Inner<E>) -> NodeReportV1 {
    let space = inner.pool.space();
    let families: Vec<_> = inner.families.borrow().values().cloned().collect();
    let mut replicas: Vec<_> = inner.cluster.group().map(replica).into_iter().collect();
    for family in &families {
        let mut report = replica(family.group());
        let state = family.state();
        report.writer_node = state.writer().map_or(0, |writer| writer.node.0);
        report.size = state.size();
        let writer = |it: Writer| WriterV1 { node: it.node.0, epoch: it.epoch.0 };
        report.writers = state.writers().map(writer).collect();
        replicas.push(report);
    }
    let links = inner.config.founders.iter().map(|founder| founder.node);
    let links = links.filter(|&node| inner.links.peer(node).is_some()).map(|node| node.0);
    let failure = inner.pool.failure().borrow().as_ref().map(ToString::to_string);
    NodeReportV1 {
        replicas,
        pool_total: space.total,
        pool_used: space.used,
        pool_free: space.free,
        pool_failure: failure.unwrap_or_default(),
        links: links.collect(),
    }
}

fn replica<E: Env>(group: &Group<E>) -> ReplicaReportV1 {
    let metrics = group.raft().metrics();
    let metrics = metrics.borrow_watched();
    let role = match metrics.state {
        ServerState::Leader => "leader",
        ServerState::Follower => "follower",
        ServerState::Candidate => "candidate",
        ServerState::Learner => "learner",
        ServerState::Shutdown => "stopped",
    };
    let matched: BTreeMap<u64, u64> = metrics
        .replication
        .iter()
        .flatten()
        .map(|(&id, matched)| (id, matched.map_or(0, |id| id.index)))
        .collect();
    let store = group.replica();
    let applied_index = metrics.last_applied.map_or(0, |id| id.index);
    ReplicaReportV1 {
        family: store.family().0,
        replica: store.id().0,
        role: role.to_owned(),
        term: metrics.current_term,
        last_index: metrics.last_log_index.unwrap_or(0),
        purged_index: metrics.purged.map_or(0, |id| id.index),
        applied_index,
        retained_bytes: store.retained_bytes(),
        suspect: store.health() != Health::Good,
        matched,
        writer_node: 0,
        size: 0,
        writers: Vec::new(),
        voters: voters_in_force(&metrics.membership_config, applied_index),
    }
}

/// Who counts for every leader that there may be: a change of members is in force at who has it in
/// its log, and another one may lead before that is a majority.
fn voters_in_force(members: &StoredMembership, applied_index: u64) -> Vec<u64> {
    let configs = members.membership().get_joint_config();
    let applied = members.log_id().is_none_or(|id| id.index <= applied_index);
    let Some((last, before)) = configs.split_last() else { return Vec::new() };
    if before.is_empty() && !applied {
        return Vec::new();
    }
    last.iter().filter(|id| before.iter().all(|config| config.contains(id))).copied().collect()
}

/// The reports of all nodes that answer, this one's first asked.
pub(crate) async fn all<E: Env>(inner: &Inner<E>) -> BTreeMap<NodeId, NodeReportV1> {
    let asks = inner.config.founders.iter().map(|founder| async {
        let node = founder.node;
        if node == inner.config.node {
            return Some((node, own(inner).await));
        }
        let frame = Frame::plain(Kind::Call, 0, Tag::NodeReport.message(&()));
        let reply = inner.links.call(node, Lane::Control, frame, REPORT_MAX).await.ok()?;
        Some((node, decode(reply.body).ok()?))
    });
    futures_util::future::join_all(asks).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ballast_raft_store::types::{Member, Membership, log_id};

    use super::*;

    fn in_force(configs: &[&[u64]], index: u64, applied: u64) -> Vec<u64> {
        let nodes = configs.iter().copied().flatten();
        let nodes: BTreeMap<_, _> = nodes.map(|&id| (id, Member { node: NodeId(1) })).collect();
        let configs: Vec<BTreeSet<u64>> =
            configs.iter().map(|config| config.iter().copied().collect()).collect();
        let members = Membership::new(configs, nodes).unwrap();
        voters_in_force(&StoredMembership::new(Some(log_id(1, index)), members), applied)
    }

    #[test]
    fn who_is_about_to_become_a_voter_does_not_count_yet() {
        assert_eq!(in_force(&[&[1, 2, 3]], 5, 9), [1, 2, 3]);
        assert_eq!(in_force(&[&[1, 2, 3], &[1, 3, 4]], 10, 9), [1, 3], "begun");
        assert_eq!(in_force(&[&[1, 2, 3], &[1, 3, 4]], 10, 10), [1, 3], "half-way");
        assert_eq!(in_force(&[&[1, 3, 4]], 11, 10), [0; 0], "its end is not everywhere yet");
        assert_eq!(in_force(&[&[1, 3, 4]], 11, 11), [1, 3, 4]);
    }
}
