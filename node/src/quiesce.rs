//! Puts idle families of this node to sleep, and wakes them when a node is lost.

use std::rc::{Rc, Weak};
use std::time::Duration;

use ballast_block::{NodeId, ReplicaId};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_volume::family::Family;
use openraft::async_runtime::WatchReceiver;

use crate::calls::{FlagV1, SleepV1, Tag, decode};
use crate::node::Inner;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// Time without any request after which a family sleeps. Long against an election, short against
/// the cost of a hundred idle volumes.
const IDLE: Duration = Duration::from_secs(10);
const ROUND: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(1);

pub(crate) async fn run<E: Env>(node: Weak<Inner<E>>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        let env = inner.env.clone();
        let now = env.now();
        let since = Instant(now.0.saturating_sub(nanos(IDLE)));
        let families: Vec<Family<E>> = inner.families.borrow().values().cloned().collect();
        for family in families {
            if let Some((term, last)) = family.group().may_sleep(since) {
                put_to_sleep(&inner, &family, SleepV1 { term, last }, since).await;
            }
        }
        drop(inner);
        env.sleep(ROUND).await;
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Every member must agree; one that does not answer keeps the leader awake, and the leader's next
/// heartbeat wakes those that agreed.
async fn put_to_sleep<E: Env>(
    inner: &Rc<Inner<E>>,
    family: &Family<E>,
    ask: SleepV1,
    since: Instant,
) {
    let own = family.group().replica().id();
    let members: Vec<(ReplicaId, NodeId)> = {
        let metrics = family.group().raft().server_metrics();
        let metrics = metrics.borrow_watched();
        let nodes = metrics.membership_config.membership().nodes();
        nodes.map(|(&id, member)| (ReplicaId(id), member.node)).collect()
    };
    for (to, node) in members.into_iter().filter(|&(id, _)| id != own) {
        let plain = Frame::plain(Kind::Call, 0, Tag::Sleep.message(&ask));
        let frame = Frame { family: family.group().replica().family(), from: own, to, ..plain };
        let answer = inner.links.call(node, Lane::Control, frame, ANSWER_MAX).await;
        let answer = answer.and_then(|reply| decode::<FlagV1>(reply.body));
        if !answer.is_ok_and(|agreed| agreed.flag) {
            return;
        }
    }
    family.group().sleep_as_leader(ask.term, since);
}

/// The link to a node went down: what it led may be without a leader.
pub(crate) fn lost_node<E: Env>(inner: &Inner<E>, node: NodeId) {
    for family in inner.families.borrow().values() {
        family.group().lost_node(node);
    }
}
