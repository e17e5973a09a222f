//! The simulated environment itself: what it promises, and what its faults do.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::{AlignedBuf, NodeId};
use ballast_env::clock::Clock;
use ballast_env::disk::{Disk, File, OpenMode};
use ballast_env::network::{Address, Listener, Network};
use ballast_env::spawn::Spawn;
use ballast_sim::env::disk::DiskFaults;
use ballast_sim::env::network::Link;
use ballast_sim::machine::{Crash, MachineOptions, ip_of};
use ballast_sim::world::{World, run};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);

fn block(byte: u8) -> Bytes {
    AlignedBuf::copy_of(&[byte; BLOCK_SIZE]).freeze()
}

fn two_machines(world: &World) {
    world.add_machine(A, MachineOptions::default());
    world.add_machine(B, MachineOptions::default());
}

fn address(node: NodeId, port: u16) -> Address {
    Address::Tcp(SocketAddr::new(ip_of(node), port))
}

#[test]
fn faults_of_one_file_leave_the_others_alone() {
    run(1, |world| async move {
        two_machines(&world);
        let machine = world.machine(A).unwrap();
        machine.start(|env| async move {
            let mode = OpenMode::CreateNew { size: 1 << 20 };
            let good = env.open(Path::new("good"), mode).await.unwrap();
            let bad = env.open(Path::new("bad"), mode).await.unwrap();
            let (disk, only) = (env.world().disk(A), Some("bad".into()));
            disk.set_faults(DiskFaults { write_error_rate: 1_000_000, only, ..Default::default() });
            good.write_at(0, vec![block(1)]).await.unwrap();
            bad.write_at(0, vec![block(1)]).await.unwrap_err();
            disk.set_faults(DiskFaults::default());
            let begun = env.world().now_ms();
            disk.stall_file_until(Path::new("bad"), begun + 1_000);
            good.write_at(0, vec![block(2)]).await.unwrap();
            assert!(env.world().now_ms() < begun + 100);
            bad.write_at(0, vec![block(2)]).await.unwrap();
            assert!(env.world().now_ms() >= begun + 1_000);
        });
        while !machine.has_exited() {
            world.sleep_ms(1).await;
        }
        let (disk, good) = (machine.disk(), Path::new("good"));
        let image = disk.image();
        disk.restore_file(good, None);
        assert!(disk.peek(good, 0, BLOCK_SIZE).is_none());
        assert!(disk.peek(Path::new("bad"), 0, BLOCK_SIZE).is_some());
        disk.restore_file(good, Some(&image));
        assert_eq!(disk.peek(good, 0, 1), Some(vec![2]));
    });
}

#[test]
fn a_completed_write_survives_power_loss_and_one_in_flight_may_tear() {
    let outcomes: Vec<Vec<u8>> = (0..40)
        .map(|seed| {
            run(seed, |world| async move {
                two_machines(&world);
                let machine = world.machine(A).unwrap();
                let written = Rc::new(Cell::new(false));
                let flag = written.clone();
                machine.start(move |env| async move {
                    let mode = OpenMode::CreateNew { size: 1 << 20 };
                    let file = env.open(Path::new("pool"), mode).await.unwrap();
                    file.write_at(0, vec![block(1)]).await.unwrap();
                    flag.set(true);
                    let _ = file.write_at(BLOCK_SIZE as u64, vec![block(2), block(3)]).await;
                    unreachable!("the power was lost before");
                });
                while !written.get() {
                    world.sleep_ms(1).await;
                }
                machine.crash(Crash::PowerLoss);
                world.disk(A).peek(Path::new("pool"), 0, 3 * BLOCK_SIZE).unwrap()
            })
        })
        .collect();
    assert!(outcomes.iter().all(|bytes| bytes[..BLOCK_SIZE] == [1; BLOCK_SIZE]));
    let second = |bytes: &Vec<u8>| bytes[BLOCK_SIZE..].iter().filter(|byte| **byte != 0).count();
    let kept: Vec<usize> = outcomes.iter().map(second).collect();
    assert!(kept.iter().all(|bytes| bytes.is_multiple_of(512)));
    assert!(kept.contains(&0) && kept.contains(&(2 * BLOCK_SIZE)));
    assert!(kept.iter().any(|bytes| *bytes > 0 && *bytes < 2 * BLOCK_SIZE));
}

#[test]
fn locks_end_with_the_process_and_rot_is_seen() {
    run(1, |world| async move {
        two_machines(&world);
        let machine = world.machine(A).unwrap();
        machine.start(|env| async move {
            let mode = OpenMode::CreateNew { size: 1 << 20 };
            let file = env.open(Path::new("pool"), mode).await.unwrap();
            file.write_at(0, vec![block(7)]).await.unwrap();
            let again = env.open(Path::new("pool"), OpenMode::Exclusive).await;
            assert_eq!(again.err().unwrap().kind(), std::io::ErrorKind::WouldBlock);
            std::future::pending().await
        });
        world.sleep_ms(100).await;
        machine.crash(Crash::Kill);
        assert!(world.disk(A).rot(Path::new("pool"), 0));
        let checked = Rc::new(Cell::new(false));
        let flag = checked.clone();
        machine.start(move |env| async move {
            let file = env.open(Path::new("pool"), OpenMode::Exclusive).await.unwrap();
            let (outcome, bytes) = file.read_at(0, AlignedBuf::zeroed(BLOCK_SIZE)).await;
            outcome.unwrap();
            assert_eq!(bytes.iter().filter(|byte| **byte != 7).count(), 1);
            flag.set(true);
        });
        world.sleep_ms(100).await;
        assert!(checked.get());
    });
}

/// Longer than any connection lives that nobody answers.
const LONG_MS: u64 = 200_000;

/// Sends bytes from A to B and returns what B got within `wait_ms` after the fault and how it ended.
fn echo_run(seed: u64, wait_ms: u64, fault: impl AsyncFn(World) + 'static) -> (Vec<u8>, String) {
    run(seed, |world| async move {
        two_machines(&world);
        let got = Rc::new(RefCell::new((Vec::new(), String::new())));
        let end = got.clone();
        world.machine(B).unwrap().start(move |env| async move {
            let listener = env.listen(&address(B, 10)).await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 1000];
            loop {
                match stream.read(&mut buffer).await {
                    Ok(0) => break end.borrow_mut().1 = "end".into(),
                    Ok(read) => end.borrow_mut().0.extend_from_slice(&buffer[..read]),
                    Err(error) => break end.borrow_mut().1 = error.kind().to_string(),
                }
            }
            std::future::pending().await
        });
        world.sleep_ms(5).await;
        world.machine(A).unwrap().start(|env| async move {
            let mut stream = env.connect(&address(B, 10)).await.unwrap();
            for number in 0..200_000_u32 {
                if stream.write_all(&number.to_le_bytes()).await.is_err() {
                    return;
                }
                if number % 1000 == 0 {
                    env.sleep(Duration::from_millis(1)).await;
                }
            }
            stream.shutdown().await.unwrap();
            std::future::pending().await
        });
        fault(world.clone()).await;
        world.sleep_ms(wait_ms).await;
        got.take()
    })
}

fn is_prefix_in_order(bytes: &[u8]) -> bool {
    let numbers = bytes.as_chunks::<4>().0.iter();
    (0..).zip(numbers).all(|(expected, bytes)| expected == u32::from_le_bytes(*bytes))
}

#[test]
fn bytes_arrive_in_order_and_wait_out_a_cut() {
    let (bytes, end) = echo_run(3, LONG_MS, async |_| {});
    assert_eq!((bytes.len(), end.as_str()), (800_000, "end"));
    assert!(is_prefix_in_order(&bytes));

    let mut ends = std::collections::BTreeMap::new();
    for seed in 0..30 {
        let (bytes, end) = echo_run(seed, LONG_MS, async |world| {
            world.sleep_ms(50).await;
            world.net().set_cut(&world, A, B, true);
            world.sleep_ms(6_000).await;
            world.net().set_cut(&world, A, B, false);
        });
        assert!(is_prefix_in_order(&bytes));
        assert!(end != "end" || bytes.len() == 800_000);
        *ends.entry(end).or_insert(0) += 1;
    }
    // Both fates of a connection: it goes on, or it is reset, by a machine or by its own silence.
    assert_eq!(ends.len(), 2, "{ends:?}");
}

#[test]
fn a_killed_peer_resets_and_one_without_power_is_silent() {
    let (bytes, end) = echo_run(4, LONG_MS, async |world| {
        world.sleep_ms(50).await;
        world.machine(A).unwrap().crash(Crash::Kill);
    });
    assert!(bytes.len() < 800_000 && is_prefix_in_order(&bytes));
    assert_eq!(end, "connection reset");
    let silent = |wait_ms| {
        let (_, end) = echo_run(4, wait_ms, async |world| {
            world.sleep_ms(50).await;
            world.machine(A).unwrap().crash(Crash::PowerLoss);
        });
        end
    };
    assert_eq!(silent(20_000), "");
    // After TCP_SILENCE_SECONDS_MAX the connection fails by itself.
    assert_eq!(silent(LONG_MS), "connection reset");
}

#[test]
fn a_reader_that_does_not_read_stops_the_writer() {
    run(5, |world| async move {
        two_machines(&world);
        world.machine(B).unwrap().start(|env| async move {
            let listener = env.listen(&address(B, 10)).await.unwrap();
            let _stream = listener.accept().await.unwrap();
            std::future::pending().await
        });
        world.sleep_ms(5).await;
        let written = Rc::new(Cell::new(0));
        let count = written.clone();
        world.machine(A).unwrap().start(move |env| async move {
            let mut stream = env.connect(&address(B, 10)).await.unwrap();
            loop {
                count.set(count.get() + stream.write(&[0; 4096]).await.unwrap());
            }
        });
        world.sleep_ms(10_000).await;
        assert_eq!(written.get(), 256 << 10);
    });
}

#[test]
fn connecting_to_nobody_fails_as_it_does_in_reality() {
    run(6, |world| async move {
        two_machines(&world);
        let kinds = Rc::new(RefCell::new(Vec::new()));
        let seen = kinds.clone();
        world.machine(B).unwrap().crash(Crash::PowerLoss);
        world.machine(A).unwrap().start(move |env| async move {
            let refused = env.connect(&address(A, 10)).await.err().unwrap();
            let silent = env.connect(&address(B, 10)).await.err().unwrap();
            seen.borrow_mut().extend([refused.kind(), silent.kind()]);
        });
        world.sleep_ms(30_000).await;
        use std::io::ErrorKind::{ConnectionRefused, TimedOut};
        assert_eq!(*kinds.borrow(), [ConnectionRefused, TimedOut]);
    });
}

#[test]
fn a_crash_ends_every_task_and_a_stopped_process_goes_on_later() {
    run(7, |world| async move {
        world.add_machine(A, MachineOptions { drift_ppm: 50_000, ..Default::default() });
        let machine = world.machine(A).unwrap();
        let ticks = Rc::new(Cell::new(0));
        let count = ticks.clone();
        machine.start(move |env| async move {
            let inner = env.clone();
            env.spawn(async move {
                loop {
                    inner.sleep(Duration::from_millis(105)).await;
                    count.set(count.get() + 1);
                }
            });
            std::future::pending().await
        });
        world.sleep_ms(1_050).await;
        assert_eq!(ticks.get(), 10, "a clock 5% fast makes 105 ms of 100");
        machine.stop();
        world.sleep_ms(1_000).await;
        assert_eq!(ticks.get(), 10);
        machine.resume();
        world.sleep_ms(150).await;
        assert_eq!(ticks.get(), 12);
        machine.crash(Crash::Kill);
        world.sleep_ms(1_000).await;
        assert_eq!(ticks.get(), 12);
        assert_eq!(Rc::strong_count(&ticks), 1, "the task is gone");
    });
}

#[test]
fn a_process_dies_at_the_chosen_effect() {
    run(8, |world| async move {
        two_machines(&world);
        let machine = world.machine(A).unwrap();
        machine.start(|env| async move {
            let mode = OpenMode::CreateNew { size: 1 << 20 };
            let file = env.open(Path::new("pool"), mode).await.unwrap();
            for number in 0..10 {
                file.write_at(number * BLOCK_SIZE as u64, vec![block(1)]).await.unwrap();
            }
        });
        machine.crash_after_effects(4, Crash::Kill);
        world.sleep_ms(1_000).await;
        assert!(!machine.is_running());
        let bytes = world.disk(A).peek(Path::new("pool"), 0, 10 * BLOCK_SIZE).unwrap();
        let whole = |number: usize| bytes[number * BLOCK_SIZE..][..BLOCK_SIZE] == [1; BLOCK_SIZE];
        assert!((0..4).all(whole) && !(5..10).any(whole));
    });
}

#[test]
fn a_slow_link_takes_its_time() {
    let duration = |bytes_per_ms| {
        run(9, move |world| async move {
            two_machines(&world);
            world.net().set_link(&world, A, B, Link { bytes_per_ms, ..Link::default() });
            let done = Rc::new(Cell::new(0));
            let at = done.clone();
            world.machine(B).unwrap().start(move |env| async move {
                let listener = env.listen(&address(B, 10)).await.unwrap();
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
                at.set(env.world().now_ms());
            });
            world.sleep_ms(5).await;
            world.machine(A).unwrap().start(|env| async move {
                let mut stream = env.connect(&address(B, 10)).await.unwrap();
                stream.write_all(&vec![0; 1 << 20]).await.unwrap();
                std::future::pending().await
            });
            world.sleep_ms(60_000).await;
            done.get()
        })
    };
    assert!(duration(0) < 100);
    assert!((900..1_500).contains(&duration(1_000)));
}
