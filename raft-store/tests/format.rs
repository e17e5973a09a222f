//! Making a pool: only where there is none and never was (guarantee **never-format-data**).

mod support;

use ballast_block::{ClusterId, NodeId};
use ballast_env::disk::{Disk, OpenMode};
use ballast_raft_store::format::create::create;
use ballast_raft_store::format::geometry::PoolGeometry;
use ballast_raft_store::pool::{FormatPoolError, PoolExpectation};
use ballast_raft_store::stream::{OpenStoreError, inspect, open};
use support::crash::{IN_FLIGHT, Random, crash, env_of};
use support::pool::{append, expectation, format, options, path, reopen};
use support::{Image, MemoryEnv, run};

async fn create_on(image: &Image, force: bool) -> Result<MemoryEnv, FormatPoolError> {
    let env = env_of(image);
    let mut options = options(None);
    options.overwrite_foreign = force;
    create(&env, &path(), options).await?;
    Ok(env)
}

#[test]
fn a_pool_is_never_formatted_again() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let again = create(&env, &path(), options(Some(PoolGeometry::BYTES_MIN))).await;
        assert!(matches!(again, Err(FormatPoolError::Io(_))), "the file exists");
        let whole = env.image(&path());
        // With either copy, with a damaged one, with the remains of one.
        for damage in 0..4 {
            let mut image = whole.clone();
            match damage {
                0 => {}
                1 => image.set_block(0, &[0; 4096]),
                2 => image.set_block(16, &[0; 4096]),
                _ => {
                    image.rot(0, 50);
                    image.rot(16, 60);
                }
            }
            for force in [false, true] {
                let refused = create_on(&image, force).await.err().unwrap();
                assert!(matches!(refused, FormatPoolError::HoldsPool { .. }), "{refused}");
            }
        }
    });
}

#[test]
fn foreign_data_is_destroyed_only_on_demand() {
    run(async {
        let mut image = Image::new(PoolGeometry::BYTES_MIN);
        image.set_block(255, &[7; 4096]);
        let refused = create_on(&image, false).await.err().unwrap();
        assert!(matches!(refused, FormatPoolError::HoldsForeignData { .. }), "{refused}");
        let env = create_on(&image, true).await.unwrap();
        assert_eq!(env.image(&path()).block(255), [0; 4096]);
        assert!(reopen(&env, &path()).await.is_ok());
        let small = create_on(&Image::new(PoolGeometry::BYTES_MIN - 4096), true).await;
        assert!(matches!(small, Err(FormatPoolError::TooSmall { .. })));
    });
}

#[test]
fn a_format_cut_short_is_a_pool_or_can_be_repeated() {
    run(async {
        let mut base = Image::new(PoolGeometry::BYTES_MIN);
        base.set_block(3, &[9; 4096]);
        let env = create_on(&base, true).await.unwrap();
        let events = env.disk.borrow().events.len();
        let random = &mut Random(3);
        for event in 0..=events {
            for mode in IN_FLIGHT {
                let image = crash(&base, &env, event, mode, random);
                match reopen(&env_of(&image), &path()).await {
                    Ok(opened) => assert!(opened.replay.is_empty()),
                    Err(OpenStoreError::NotAPool) => {
                        assert!(create_on(&image, true).await.is_ok());
                    }
                    // A torn first superblock: was never a pool, but who could tell.
                    Err(OpenStoreError::SuperblocksDamaged { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        }
    });
}

#[test]
fn only_the_expected_pool_is_opened() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let open_as =
            async |expect: PoolExpectation| open(env.clone(), &path(), expect).await.err().unwrap();
        let cluster = ClusterId(uuid::Uuid::from_u128(9));
        let refused = open_as(PoolExpectation { cluster, ..expectation() }).await;
        assert!(matches!(refused, OpenStoreError::WrongCluster { .. }), "{refused}");
        let refused = open_as(PoolExpectation { node: NodeId(9), ..expectation() }).await;
        assert!(matches!(refused, OpenStoreError::WrongNode { .. }), "{refused}");
        let pool = Some(ballast_block::PoolId(uuid::Uuid::from_u128(9)));
        let refused = open_as(PoolExpectation { pool, ..expectation() }).await;
        assert!(matches!(refused, OpenStoreError::WrongPool { .. }), "{refused}");
        let mut image = env.image(&path());
        assert_eq!(env.disk.borrow().writes.len(), 2, "a refused open changes nothing");
        image.size -= 1 << 20;
        let refused = reopen(&env_of(&image), &path()).await.err().unwrap();
        assert!(matches!(refused, OpenStoreError::Shrunk { .. }), "{refused}");
        // One opener at a time, until the last handle is gone.
        let opened = reopen(&env, &path()).await.unwrap();
        assert!(matches!(reopen(&env, &path()).await, Err(OpenStoreError::Io(_))));
        drop(opened);
        tokio::task::yield_now().await;
        assert!(env.open(&path(), OpenMode::Exclusive).await.is_ok());
    });
}

#[test]
fn an_inspection_changes_nothing() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let streams = reopen(&env, &path()).await.unwrap().streams;
        let place = append(&streams, 1, 1, 3).place;
        streams.flush().await.unwrap();
        let writes = env.disk.borrow().writes.len();
        // Beside the opener, too.
        let inspected = inspect(&env, &path()).await.unwrap();
        assert_eq!((inspected.info.boot_counter, inspected.checkpoint), (1, 0));
        assert_eq!(inspected.replay.len(), 1);
        assert!(inspected.segments.is_live(place));
        assert_eq!(env.disk.borrow().writes.len(), writes);
    });
}

#[test]
fn boot_counters_only_grow() {
    run(async {
        let env = MemoryEnv::default();
        format(&env, &path()).await;
        let mut image = env.image(&path());
        for boot in 1..=6 {
            let env = env_of(&image);
            let opened = reopen(&env, &path()).await.unwrap();
            assert_eq!(opened.streams.info().boot_counter, boot);
            append(&opened.streams, 1, boot, 1);
            opened.streams.flush().await.unwrap();
            image = env.image(&path());
            // Whichever copy is lost.
            image.rot(16 * (boot % 2), 70);
        }
    });
}
