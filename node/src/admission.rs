//! Which pools take part (hazard F5): peers that are let in, and what a node does that is not.
//!
//! A pool whose contents went back in time is told by its boot counter and by its marks, by every
//! peer that knows better and by the cluster group; it is lost then, whatever its counter is later.
//! A refused node stops all its groups: it votes for nothing and serves nothing, but stays up and
//! says why.

use std::rc::Rc;

use ballast_block::{NodeId, ReplicaId};
use ballast_cluster::{Command, Past, Pool, PoolState};
use ballast_env::Env;

use crate::node::Inner;
use crate::peers::identity::{Identity, Refusal};

const REMEDY: &str = "its replicas are lost; replace it: `ballastctl pool replace`";

/// What is known of the pools of a peer.
pub(crate) fn known_of<E: Env>(inner: &Inner<E>, node: NodeId) -> Vec<Pool> {
    inner.cluster.state().pools_of(node, inner.shard()).copied().collect()
}

/// Refuses a peer whose pool is another than the cluster knows, or has gone back in time.
///
/// A greeting may be of a process that has ended, and have waited for long. So it proves nothing
/// against the pool; an answer does, to whom asked while a later start was known: `asked_with` is
/// what was known then. Once that is so, the peer is told when it greets again.
pub(crate) fn admit<E: Env>(
    inner: &Rc<Inner<E>>,
    peer: &Identity,
    asked_with: Option<&[Pool]>,
) -> Result<(), Refusal> {
    if let Some(reason) = &*inner.refused.borrow() {
        return Err(format!("this node is refused itself: {reason}").into());
    }
    let known = known_pool(inner, peer)?;
    if let Some(pool) = known {
        if pool.state == PoolState::Lost {
            let text = format!("pool {} is lost and never serves again; {REMEDY}", peer.pool);
            return Err(Refusal { text, lost: true });
        }
        let is_older = |known: &Pool| {
            let past = known.past_of(peer.boot, peer.incarnation, peer.marks);
            known.id == peer.pool && past == Past::RolledBack
        };
        if is_older(&pool) {
            let proven = asked_with.is_some_and(|known| known.iter().any(is_older));
            if proven {
                inner.rolled_back.borrow_mut().insert(pool.id);
                declare_lost(inner, &pool);
            }
            let lost = inner.rolled_back.borrow().contains(&pool.id);
            let what = format!(
                "pool {} was accepted with start {} and says {} now",
                peer.pool, pool.boot_counter, peer.boot
            );
            let text = match lost {
                true => format!("{what}: it has been rolled back; {REMEDY}"),
                false => format!("{what}: an earlier process of it may have said so; not let in"),
            };
            return Err(Refusal { text, lost });
        }
    }
    let mut boots = inner.boots.borrow_mut();
    if let Some(&(pool, boot, incarnation)) = boots.get(&peer.node)
        && pool == peer.pool
        && (boot > peer.boot || (boot == peer.boot && incarnation != peer.incarnation))
    {
        return Err(format!(
            "pool {pool} was seen with start {boot}, now it says {} again: an earlier process of \
             it, or an older copy; not let in",
            peer.boot
        )
        .into());
    }
    boots.insert(peer.node, (peer.pool, peer.boot, peer.incarnation));
    Ok(())
}

/// What this node knows of the peer's pool; a pool that the peer's node is not known by is refused,
/// because it would bring a member of the cluster group that has forgotten everything.
fn known_pool<E: Env>(inner: &Inner<E>, peer: &Identity) -> Result<Option<Pool>, Refusal> {
    let state = inner.cluster.state();
    let of_shard = || state.pools_of(peer.node, inner.shard());
    if let Some(pool) = of_shard().find(|pool| pool.id == peer.pool) {
        return Ok(Some(*pool));
    }
    let Some(other) = of_shard().last() else { return Ok(None) };
    let expected = match peer.member {
        // A pool without a member of the cluster group has promised nothing to anybody yet.
        ReplicaId(0) => of_shard().all(|pool| pool.state == PoolState::Lost),
        member => state
            .node(peer.node)
            .is_some_and(|node| node.replacing && node.cluster_member() == member),
    };
    if expected {
        return Ok(None);
    }
    let text = format!(
        "pool {} is not the one that {} is known by ({}): if that one is lost, replace it: \
         `ballastctl pool replace`, and format this one as it tells you",
        peer.pool, peer.node, other.id
    );
    Err(text.into())
}

/// Makes the verdict the cluster's, so that everybody shows it; the peer can't say it itself.
fn declare_lost<E: Env>(inner: &Rc<Inner<E>>, pool: &Pool) {
    let (weak, pool) = (Rc::downgrade(inner), *pool);
    inner.env.spawn(async move {
        let Some(inner) = weak.upgrade() else { return };
        let (id, space) = (pool.id, pool.space);
        let lost = Command::ReportPool { pool: id, space, state: PoolState::Lost };
        match inner.cluster.propose(&lost).await {
            Ok(_) => tracing::error!(pool = %id, node = %pool.node, "pool was rolled back: lost"),
            // It will try again, and be refused again.
            Err(error) => tracing::debug!(pool = %id, %error, "loss of a pool not noted yet"),
        }
    });
}

/// The cluster does not take this node's pool, and never will: nothing of it may take part.
pub(crate) fn refused<E: Env>(inner: &Rc<Inner<E>>, reason: &str) {
    if inner.refused.borrow().is_some() {
        return;
    }
    tracing::error!(node = %inner.config.node, pool = %inner.links.identity().pool, reason,
        "REFUSED: this pool takes no part in the cluster; it votes for nothing and serves nothing");
    *inner.refused.borrow_mut() = Some(reason.to_owned());
    inner.announced.set(false);
    inner.stopping.send_replace(true);
    let inner = inner.clone();
    let env = inner.env.clone();
    env.spawn(async move {
        inner.links.hang_up();
        let families = std::mem::take(&mut *inner.families.borrow_mut());
        for family in families.values() {
            family.stop().await;
        }
        if let Some(group) = inner.cluster.group() {
            group.stop().await;
        }
    });
}
