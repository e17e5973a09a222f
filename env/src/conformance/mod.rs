//! What every [`Env`] must do: the contracts of the traits as checks that any implementation runs.
//!
//! Owns the checks only. Each panics with the contract that was broken; each leaves only files in
//! the folder it was given. [`all`] runs every one.

pub mod clock;
pub mod disk;
pub mod network;
pub mod spawn;

use std::path::Path;

use crate::Env;
use crate::network::Address;

/// Every check. `folder` exists and is empty; `address` is one to listen on (TCP, port 0), and the
/// same environment can connect to it.
pub async fn all<E: Env>(env: &E, folder: &Path, address: &Address) {
    clock::all(env).await;
    spawn::all(env).await;
    disk::all(env, folder).await;
    network::all(env, address).await;
}

/// Runs all futures at once, and waits for all.
async fn together<T: 'static>(
    env: &impl Env,
    futures: Vec<impl Future<Output = T> + 'static>,
) -> Vec<T> {
    let mut results = Vec::new();
    for future in futures {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let _detached = env.spawn(async move { drop(sender.send(future.await)) });
        results.push(receiver);
    }
    let mut values = Vec::new();
    for result in results {
        values.push(result.await.expect("the task ran to its end"));
    }
    values
}
