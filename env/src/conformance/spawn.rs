//! Checks of tasks.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::Env;
use crate::spawn::OwnedTask;

/// Every check of tasks.
pub async fn all<E: Env>(env: &E) {
    detached(env).await;
    aborted(env).await;
}

/// A task whose handle is dropped runs on.
pub async fn detached<E: Env>(env: &E) {
    let (sender, receiver) = oneshot::channel();
    let pause = env.sleep(Duration::from_millis(2));
    drop(env.spawn(async move {
        pause.await;
        sender.send(7).expect("the check waits for it");
    }));
    assert_eq!(receiver.await, Ok(7), "a detached task ended early");
}

/// Dropping an [`OwnedTask`] ends its task: what it owns is dropped, it never runs on.
pub async fn aborted<E: Env>(env: &E) {
    let went_on = Rc::new(Cell::new(false));
    let (held, ended) = oneshot::channel::<()>();
    let (pause, flag) = (env.sleep(Duration::from_secs(3600)), went_on.clone());
    let task = OwnedTask(env.spawn(async move {
        pause.await;
        flag.set(true);
        drop(held);
    }));
    env.sleep(Duration::from_millis(1)).await;
    assert!(!task.0.is_finished(), "a task that sleeps has ended");
    drop(task);
    assert!(ended.await.is_err(), "what an aborted task owned is dropped");
    assert!(!went_on.get(), "an aborted task ran on");
}
