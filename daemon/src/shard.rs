//! The shard's thread, and how other threads ask its node something.
//!
//! The node lives on one thread and never leaves it: what others want of it travels there as a
//! closure, and the answer comes back over a channel.

use std::future::Future;
use std::thread::JoinHandle;

use ballast_env::linux::{LinuxEnv, LinuxShard};
use ballast_node::config::NodeConfig;
use ballast_node::node::Node;
use futures_util::future::LocalBoxFuture;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::DaemonError;

/// Questions that wait for the shard, at most: more callers wait in line.
const JOBS_MAX: usize = 64;

/// The node as the shard has it.
pub type LinuxNode = Node<LinuxEnv>;

type Job = Box<dyn FnOnce(LinuxNode) -> LocalBoxFuture<'static, ()> + Send>;

/// The shard has ended, or its node is stopping.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the node is stopping")]
pub struct ShardEnded;

/// How other threads reach the node. Clones share it.
#[derive(Clone)]
pub struct Shard {
    jobs: mpsc::Sender<Job>,
}

/// A shard's thread.
pub struct ShardThread {
    /// To ask the node.
    pub shard: Shard,
    /// Resolves when the node serves, or says why it does not.
    pub started: oneshot::Receiver<Result<(), DaemonError>>,
    /// Becomes `Some` with the reason when the node must end.
    pub failed: watch::Receiver<Option<String>>,
    /// Set it to stop the node.
    pub stop: watch::Sender<bool>,
    /// Resolves when the thread is about to end.
    pub ended: oneshot::Receiver<()>,
    /// The thread.
    pub thread: JoinHandle<()>,
}

impl Shard {
    /// Runs `question` on the shard's thread and brings back its answer.
    ///
    /// # Errors
    /// [`ShardEnded`].
    pub async fn ask<T, F, Fut>(&self, question: F) -> Result<T, ShardEnded>
    where
        T: Send + 'static,
        F: FnOnce(LinuxNode) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |node| {
            Box::pin(async move {
                // The asker may have gone away.
                let _ = reply.send(question(node).await);
            })
        });
        self.jobs.send(job).await.map_err(|_| ShardEnded)?;
        answer.await.map_err(|_| ShardEnded)
    }
}

/// Starts the thread, which starts the node.
///
/// # Errors
/// When the system gives no thread.
pub fn start(config: NodeConfig) -> Result<ShardThread, DaemonError> {
    let (jobs, queue) = mpsc::channel(JOBS_MAX);
    let (tell_started, started) = oneshot::channel();
    let (tell_failed, failed) = watch::channel(None);
    let (stop, stopping) = watch::channel(false);
    let (tell_ended, ended) = oneshot::channel();
    let main = move || {
        let no_shard = tell_failed.clone();
        let life = Life { queue, tell_failed, stopping };
        let ran = LinuxShard::run(|env| life.run(env, config, tell_started));
        if let Err(error) = ran {
            no_shard.send_replace(Some(format!("the shard can't be started: {error}")));
        }
        let _ = tell_ended.send(());
    };
    let thread = std::thread::Builder::new()
        .name("shard-0".into())
        .spawn(main)
        .map_err(DaemonError::system("start the shard's thread"))?;
    Ok(ShardThread { shard: Shard { jobs }, started, failed, stop, ended, thread })
}

struct Life {
    queue: mpsc::Receiver<Job>,
    tell_failed: watch::Sender<Option<String>>,
    stopping: watch::Receiver<bool>,
}

impl Life {
    async fn run(
        mut self,
        env: LinuxEnv,
        config: NodeConfig,
        tell_started: oneshot::Sender<Result<(), DaemonError>>,
    ) {
        let node = tokio::select! {
            biased;
            node = Node::start(env, config) => node,
            _ = self.stopping.wait_for(|&stop| stop) => return,
        };
        let node = match node {
            Ok(node) => node,
            Err(error) => {
                let _ = tell_started.send(Err(error.into()));
                return;
            }
        };
        let _ = tell_started.send(Ok(()));
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
                    self.tell_failed.send_replace(Some(reason));
                    // What its clients have in flight must end with errors of their connections,
                    // not with answers of a node that has lost its disk.
                    return;
                }
                job = self.queue.recv() => match job {
                    Some(job) => drop(tokio::task::spawn_local(job(node.clone()))),
                    None => break,
                },
            }
        }
        node.stop().await;
    }
}
