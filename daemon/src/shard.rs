//! The shards' threads, and how other threads ask their nodes something.
//!
//! A shard's node lives on one thread and never leaves it: what others want of it travels there as
//! a closure, and the answer comes back over a channel. Shard 0's end is the end of the process;
//! a further one ends alone.

use std::future::Future;
use std::sync::Arc;

use ballast_block::ShardId;
use ballast_env::linux::{LinuxEnv, LinuxShard};
use ballast_node::config::NodeConfig;
use ballast_node::node::Node;
use ballast_node::shards::Place;
use futures_util::future::LocalBoxFuture;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::DaemonError;
use crate::prometheus::ShardRecorder;

/// Questions that wait for a shard, at most: more callers wait in line.
const JOBS_MAX: usize = 64;

/// A shard's node.
pub type LinuxNode = Node<LinuxEnv>;

type Job = Box<dyn FnOnce(LinuxNode) -> LocalBoxFuture<'static, ()> + Send>;

/// How a shard is.
#[derive(Clone, Debug)]
pub enum Condition {
    /// Opening its pool, or waiting for shard 0.
    Starting,
    /// It answers.
    Serving,
    /// It was asked to stop and does.
    Stopping,
    /// It ended as it was asked to.
    Stopped,
    /// It could not start, or its pool failed.
    Ended(Arc<DaemonError>),
}

/// The shard does not serve.
#[derive(Clone, Debug, Error)]
pub enum ShardEnded {
    /// Not yet.
    #[error("{0} is starting")]
    Starting(ShardId),
    /// Not any more.
    #[error("{0} is stopping")]
    Stopping(ShardId),
    /// It could not start, or its pool failed.
    #[error("{0} has ended: {1}")]
    Ended(ShardId, Arc<DaemonError>),
}

/// How other threads reach a shard. Clones share it.
#[derive(Clone)]
pub struct Shard {
    id: ShardId,
    jobs: mpsc::Sender<Job>,
    condition: watch::Receiver<Condition>,
    stop: watch::Sender<bool>,
}

impl Shard {
    /// Which one it is.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// How it is now.
    pub fn condition(&self) -> Condition {
        self.condition.borrow().clone()
    }

    /// Whether it serves.
    pub fn is_serving(&self) -> bool {
        matches!(*self.condition.borrow(), Condition::Serving)
    }

    /// Waits until it is as wanted; `None` when it went without a word.
    pub async fn wait_for(&self, wanted: impl Fn(&Condition) -> bool) -> Option<Condition> {
        let mut condition = self.condition.clone();
        let found = condition.wait_for(|now| wanted(now)).await;
        found.ok().map(|condition| condition.clone())
    }

    /// Waits until it has ended, one way or the other; answers why, if not because it was asked to.
    pub async fn end(&self) -> Option<Arc<DaemonError>> {
        let ended = |now: &Condition| matches!(now, Condition::Ended(_) | Condition::Stopped);
        match self.wait_for(ended).await {
            Some(Condition::Ended(error)) => Some(error),
            Some(_) => None,
            None => {
                let text = format!("the thread of {} ended by itself: see the log", self.id);
                Some(Arc::new(DaemonError::NodeEnded(text)))
            }
        }
    }

    /// Asks it to stop in order; [`Shard::end`] waits for that.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Runs `question` on the shard's thread and brings back its answer.
    ///
    /// # Errors
    /// [`ShardEnded`]; while it starts, without waiting for it.
    pub async fn ask<T, F, Fut>(&self, question: F) -> Result<T, ShardEnded>
    where
        T: Send + 'static,
        F: FnOnce(LinuxNode) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        match self.condition() {
            Condition::Starting => return Err(ShardEnded::Starting(self.id)),
            Condition::Stopping | Condition::Stopped => return Err(ShardEnded::Stopping(self.id)),
            Condition::Ended(error) => return Err(ShardEnded::Ended(self.id, error)),
            Condition::Serving => {}
        }
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |node| {
            Box::pin(async move {
                // The asker may have gone away.
                let _ = reply.send(question(node).await);
            })
        });
        let answered = async {
            self.jobs.send(job).await.ok()?;
            answer.await.ok()
        };
        // A shard whose disk hangs may keep what it was asked for ever.
        let ended = tokio::select! {
            biased;
            answer = answered => match answer {
                Some(answer) => return Ok(answer),
                None => None,
            },
            error = self.end() => error,
        };
        Err(match (ended, self.condition()) {
            (Some(error), _) | (None, Condition::Ended(error)) => ShardEnded::Ended(self.id, error),
            (None, _) => ShardEnded::Stopping(self.id),
        })
    }
}

/// Starts a shard's thread, which starts its node.
///
/// # Errors
/// When the system gives no thread.
pub fn start(
    config: NodeConfig,
    place: Place<LinuxEnv>,
    recorder: ShardRecorder,
) -> Result<Shard, DaemonError> {
    let id = place.shard();
    let (jobs, queue) = mpsc::channel(JOBS_MAX);
    let (tell, condition) = watch::channel(Condition::Starting);
    let (stop, stopping) = watch::channel(false);
    let main = move || {
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let life = Life { queue, tell: tell.clone(), stopping };
        let ran = LinuxShard::run(|env| life.run(env, config, place));
        let last = match ran {
            Ok(Ok(())) => Condition::Stopped,
            Ok(Err(error)) => Condition::Ended(Arc::new(error)),
            Err(problem) => {
                let error = DaemonError::System { action: "start a shard", problem };
                Condition::Ended(Arc::new(error))
            }
        };
        tell.send_if_modified(|now| {
            let is_news = !matches!(now, Condition::Ended(_));
            if is_news {
                *now = last;
            }
            is_news
        });
    };
    std::thread::Builder::new()
        .name(id.to_string())
        .spawn(main)
        .map_err(DaemonError::system("start a shard's thread"))?;
    Ok(Shard { id, jobs, condition, stop })
}

struct Life {
    queue: mpsc::Receiver<Job>,
    tell: watch::Sender<Condition>,
    stopping: watch::Receiver<bool>,
}

impl Life {
    async fn run(
        mut self,
        env: LinuxEnv,
        config: NodeConfig,
        place: Place<LinuxEnv>,
    ) -> Result<(), DaemonError> {
        let node = tokio::select! {
            biased;
            node = Node::start_at(env, config, place) => node?,
            _ = self.stopping.wait_for(|&stop| stop) => return Ok(()),
        };
        self.tell.send_replace(Condition::Serving);
        let mut failure = node.failure();
        loop {
            tokio::select! {
                biased;
                _ = self.stopping.wait_for(|&stop| stop) => break,
                failed = failure.wait_for(Option::is_some) => {
                    let reason = match failed {
                        Ok(reason) => reason.as_ref().map(ToString::to_string).unwrap_or_default(),
                        Err(_) => "the pool was closed".to_owned(),
                    };
                    node.report_failure().await;
                    // Told before the thread ends: that may take as long as a failed disk does.
                    let error = Arc::new(DaemonError::NodeEnded(reason));
                    self.tell.send_replace(Condition::Ended(error));
                    // What its clients have in flight must end with errors of their connections,
                    // not with answers of a node that has lost its disk.
                    return Ok(());
                }
                job = self.queue.recv() => match job {
                    Some(job) => drop(tokio::task::spawn_local(job(node.clone()))),
                    None => break,
                },
            }
        }
        self.tell.send_replace(Condition::Stopping);
        drop(self.queue);
        node.stop().await;
        Ok(())
    }
}
