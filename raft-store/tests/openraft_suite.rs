//! openraft's own storage suite on a replica, over a disk in memory and over a real one.

mod store;
mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use ballast_env::Env;
use ballast_env::linux::{LinuxEnv, LinuxShard};
use ballast_raft_store::log::Log;
use ballast_raft_store::types::TypeConfig;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use store::Machine;
use support::MemoryEnv;

async fn build<E: Env>(env: E, path: &Path) -> (Log<E>, Machine<E>) {
    store::format(&env, path).await;
    let (pool, _) = store::open(&env, path).await.unwrap();
    let replica = pool.create_replica(store::descriptor(1)).await.unwrap();
    (replica.log(), Machine::new(pool, replica))
}

struct InMemory;

impl StoreBuilder<TypeConfig, Log<MemoryEnv>, Machine<MemoryEnv>> for InMemory {
    async fn build(
        &self,
    ) -> Result<((), Log<MemoryEnv>, Machine<MemoryEnv>), StorageError<TypeConfig>> {
        let (log, machine) = build(MemoryEnv::default(), Path::new("/pool")).await;
        Ok(((), log, machine))
    }
}

#[test]
fn suite_over_a_disk_in_memory() {
    support::run(async { Suite::test_all(InMemory).await.unwrap() });
}

/// A pool file on the disk of the target directory (`/tmp` may be in memory), gone at the end.
struct PoolFile(PathBuf);

impl Drop for PoolFile {
    #[allow(clippy::disallowed_methods, reason = "a real file")]
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

#[derive(Default)]
struct OnDisk {
    made: AtomicUsize,
}

impl StoreBuilder<TypeConfig, Log<LinuxEnv>, Machine<LinuxEnv>, PoolFile> for OnDisk {
    async fn build(
        &self,
    ) -> Result<(PoolFile, Log<LinuxEnv>, Machine<LinuxEnv>), StorageError<TypeConfig>> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let name = format!("suite-{}-{number}.pool", std::process::id());
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let (log, machine) = build(LinuxEnv::new().unwrap(), &path).await;
        Ok((PoolFile(path), log, machine))
    }
}

#[test]
fn suite_over_a_real_disk() {
    LinuxShard::run(|_| async { Suite::test_all(OnDisk::default()).await.unwrap() }).unwrap();
}
