//! The cluster group as a further shard has it: a copy of the state that shard 0 publishes, and
//! commands that shard 0 proposes.
//!
//! As on any member the state may be behind the group's leader; it is never ahead of shard 0's.
//! When shard 0 ends, the copy stands still and no command is carried out any more.

use std::cell::{Ref, RefCell};
use std::sync::Arc;

use ballast_cluster::{ClusterState, Command, Reply};
use ballast_env::Env;
use tokio::sync::{mpsc, oneshot, watch};

use crate::cluster_group::{PROPOSE_MAX, ProposeClusterError};
use crate::shards::Proposal;

/// What a further shard has of the cluster group.
pub(crate) struct ClusterCopy<E: Env> {
    env: E,
    held: RefCell<Held>,
    proposals: mpsc::Sender<Proposal>,
}

struct Held {
    published: watch::Receiver<Arc<ClusterState>>,
    state: Arc<ClusterState>,
}

impl<E: Env> ClusterCopy<E> {
    /// Waits until shard 0 knows the state of its pool; `None` when it ends before.
    pub(crate) async fn open(
        env: E,
        mut published: watch::Receiver<Arc<ClusterState>>,
        proposals: mpsc::Sender<Proposal>,
    ) -> Option<Self> {
        published.changed().await.ok()?;
        let state = published.borrow_and_update().clone();
        Some(Self { env, held: RefCell::new(Held { published, state }), proposals })
    }

    /// The newest state that was published.
    pub(crate) fn state(&self) -> Ref<'_, ClusterState> {
        // Somebody who looks at the state right now goes on looking at the same one.
        if let Ok(mut held) = self.held.try_borrow_mut()
            && held.published.has_changed().unwrap_or(false)
        {
            let newest = held.published.borrow_and_update().clone();
            held.state = newest;
        }
        Ref::map(self.held.borrow(), |held| &*held.state)
    }

    /// Tells of new states, and of shard 0's end.
    pub(crate) fn published(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.held.borrow().published.clone()
    }

    /// Gets `command` applied, and waits until its effect is in [`ClusterCopy::state`].
    pub(crate) async fn propose(&self, command: &Command) -> Result<Reply, ProposeClusterError> {
        let (reply, answer) = oneshot::channel();
        let proposal = Proposal { command: command.clone(), reply };
        let asked = async {
            self.proposals.send(proposal).await.ok()?;
            answer.await.ok()
        };
        tokio::select! {
            biased;
            answered = asked => answered.unwrap_or(Err(ProposeClusterError::NoQuorum)),
            // It has to wait in line there; whoever asks tries again.
            () = self.env.sleep(PROPOSE_MAX * 2) => Err(ProposeClusterError::NoQuorum),
        }
    }
}
