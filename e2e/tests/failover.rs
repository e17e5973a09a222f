//! Nodes die under load: nothing that was acknowledged is lost, and the wait is short.
//!
//! Short forms; `BALLAST_E2E_LONG=1` gives the counts of the long tier.

use std::path::Path;
use std::time::{Duration, Instant};

use ballast_e2e::cluster::{Cluster, MIB};
use ballast_e2e::machine::Machine;
use ballast_e2e::process::Running;
use ballast_e2e::verify::{Verify, unix_ms};
use ballast_e2e::{times, wait};

const LOAD: [&str; 3] = ["--expect-zeroes", "--span-mib", "128"];

/// Writes between two faults.
const BETWEEN: u64 = 300;

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[test]
fn killing_the_leader_loses_nothing_and_stalls_under_two_seconds() {
    let mut cluster = Cluster::start("kill-leader");
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &LOAD);
    let mut kills = Vec::new();
    for round in 0..times(3, 20) {
        verify.progress(BETWEEN, 60);
        // The client's node must not lead, or the test would be another one.
        let victim = 2 + (round as u32) % 2;
        cluster.move_leader("demo", victim);
        let from = unix_ms();
        cluster.kill(victim);
        verify.progress(BETWEEN, 60);
        kills.push((from, unix_ms()));
        cluster.restart(victim);
        cluster.wait_in_sync("demo");
    }
    assert_eq!(verify.lost, Vec::<u64>::new(), "the client's connection broke");
    let report = verify.finish();
    report.assert_ok();
    let stalls: Vec<u64> =
        kills.iter().map(|(from, to)| report.longest_stall_between(*from, *to)).collect();
    println!("stalls in ms after a kill of the leader: {stalls:?}");
    assert!(median(&stalls) < 2000, "median of {stalls:?}");
    assert!(stalls.iter().all(|stall| *stall <= 5000), "{stalls:?}");
    cluster.assert_replicas_are_equal();
}

/// Each run of fio is killed into once, and reads back all that it wrote.
#[test]
fn killing_the_leader_is_no_error_to_fio_and_nothing_that_it_verifies_is_wrong() {
    let mut cluster = Cluster::start("kill-leader-fio");
    let (uri, log) = (format!("--uri={}", cluster.uri(1)), cluster.scratch.file("fio.log"));
    let job = ["fio", "--name=verify", "--ioengine=nbd", &uri, "--size=96m", "--iodepth=16"];
    let sizes = ["--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--rate=24m"];
    let checks = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64"];
    for round in 0..times(2, 20) {
        let victim = 2 + (round as u32) % 2;
        cluster.move_leader("demo", victim);
        let seed = format!("--randseed={round}");
        let command = [&job[..], &sizes, &checks, &[&seed]].concat();
        let written = || cluster.metric(victim, "ballast_log_written_bytes_total");
        let before = written();
        let mut fio = Running::start(Path::new(&log), &command, false);
        wait::until_true("fio writes", 60, || written() > before + 8 * MIB);
        cluster.kill(victim);
        assert!(fio.is_running(), "it was to be killed into: {}", fio.log());
        assert_eq!(fio.wait(120), 0, "{}", fio.log());
        cluster.restart(victim);
        cluster.wait_in_sync("demo");
    }
    cluster.assert_replicas_are_equal();
}

#[test]
fn killing_a_follower_stalls_nobody() {
    let mut cluster = Cluster::start("kill-follower");
    let machine = Machine::watch();
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &LOAD);
    let mut kills = Vec::new();
    for round in 0..times(3, 20) {
        cluster.move_leader("demo", 1);
        verify.progress(BETWEEN, 60);
        let victim = 2 + (round as u32) % 2;
        let from = unix_ms();
        cluster.kill(victim);
        verify.progress(4 * BETWEEN, 60);
        kills.push((from, unix_ms()));
        cluster.restart(victim);
        cluster.wait_in_sync("demo");
    }
    let report = verify.finish();
    report.assert_ok();
    let stall = |(from, to): &(u64, u64)| report.longest_stall_on(&machine, *from, *to);
    let stalls: Vec<u64> = kills.iter().map(stall).collect();
    println!("stalls in ms after a kill of a follower (0: under 100): {stalls:?}");
    assert!(stalls.iter().all(|stall| *stall <= 250), "{stalls:?}");
}

#[test]
fn killing_the_serving_node_loses_nothing_for_a_client_that_reconnects() {
    let mut cluster = Cluster::start("kill-server");
    let uris = [cluster.uri(1), cluster.uri(2), cluster.uri(3)];
    let uris: Vec<&str> = uris.iter().map(String::as_str).collect();
    let mut verify =
        Verify::start(&cluster.scratch, &uris, &[&LOAD[..], &["--verify-all"]].concat());
    // The tool takes the addresses in turn; each of them may be dead when it comes to it.
    for _ in 0..times(4, 20) {
        verify.progress(BETWEEN, 60);
        let served = verify.served_by();
        let victim =
            1 + uris.iter().position(|uri| *uri == served).expect("a known address") as u32;
        cluster.kill(victim);
        verify.progress(BETWEEN, 60);
        cluster.restart(victim);
        cluster.wait_in_sync("demo");
    }
    verify.progress(BETWEEN, 60);
    let report = verify.finish();
    report.assert_ok();
    println!("longest stall: {} ms", report.number("longest_stall_ms"));
}

#[test]
fn killing_all_nodes_at_once_loses_nothing_and_recovery_takes_under_two_seconds() {
    let mut cluster = Cluster::start("kill-all");
    let uris = [cluster.uri(1), cluster.uri(2), cluster.uri(3)];
    let uris: Vec<&str> = uris.iter().map(String::as_str).collect();
    let mut verify =
        Verify::start(&cluster.scratch, &uris, &[&LOAD[..], &["--verify-all"]].concat());
    let (mut ready, mut serving) = (Vec::new(), Vec::new());
    let machine = Machine::watch();
    for _ in 0..times(3, 20) {
        verify.progress(2 * BETWEEN, 60);
        cluster.kill_all();
        let (start, from) = (Instant::now(), unix_ms());
        for id in 1..=3 {
            cluster.start_node(id);
        }
        for id in 1..=3 {
            cluster.wait_node(id);
        }
        let paused = Duration::from_millis(machine.paused_between(from, unix_ms()));
        ready.push(start.elapsed().saturating_sub(paused));
        verify.progress(1, 60);
        serving.push(start.elapsed());
    }
    let report = verify.finish();
    println!(
        "all nodes ready after {ready:?} of the machine's time, the volume written again after {serving:?}"
    );
    report.assert_ok();
    assert!(ready.iter().all(|time| *time < Duration::from_secs(2)), "{ready:?}");
    cluster.wait_in_sync("demo");
    cluster.assert_replicas_are_equal();
}
