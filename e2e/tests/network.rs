//! One node cut off from the others, in each direction, while a client writes.

use std::time::Duration;

use ballast_e2e::cluster::Cluster;
use ballast_e2e::network::Cut;
use ballast_e2e::times;
use ballast_e2e::verify::{Verify, unix_ms};
use ballast_e2e::wait::until_true;

/// The volume must go on this soon, in seconds.
const GOES_ON: u64 = 15;

/// Cuts node 3 off while it leads, or while node 2 does; the client is on node 1.
fn cut_off(test: &str, cut: Cut, leads: bool) {
    let length = Duration::from_secs(times(6, 20) as u64);
    let mut cluster = Cluster::start(test);
    cluster.move_to_island(3);
    let load = ["--expect-zeroes", "--span-mib", "64"];
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &load);
    verify.progress(300, 60);
    cluster.move_leader("demo", if leads { 3 } else { 2 });
    let from = unix_ms();
    cluster.island(3).cut(cut, &[]);
    verify.progress(300, GOES_ON);
    let end = from + length.as_millis() as u64;
    until_true("the end of the cut", 60, || unix_ms() >= end);
    verify.progress(50, GOES_ON);
    cluster.island(3).heal();
    cluster.wait_in_sync("demo");
    verify.progress(300, 60);
    assert_eq!(verify.lost, Vec::<u64>::new(), "the client's connection broke");
    let report = verify.finish();
    report.assert_ok();
    let stall = report.longest_stall_between(from, unix_ms());
    println!("{cut:?}, leader {leads}: longest stall {stall} ms");
    cluster.assert_replicas_are_equal();
}

#[test]
fn a_follower_cut_off_both_ways_catches_up() {
    cut_off("cut-follower-both", Cut::Both, false);
}

#[test]
fn a_follower_that_cannot_send_catches_up() {
    cut_off("cut-follower-out", Cut::Outgoing, false);
}

#[test]
fn a_follower_that_cannot_receive_catches_up() {
    cut_off("cut-follower-in", Cut::Incoming, false);
}

#[test]
fn a_leader_cut_off_both_ways_is_replaced() {
    cut_off("cut-leader-both", Cut::Both, true);
}

#[test]
fn a_leader_that_cannot_send_is_replaced() {
    cut_off("cut-leader-out", Cut::Outgoing, true);
}

#[test]
fn a_leader_that_cannot_receive_is_replaced() {
    cut_off("cut-leader-in", Cut::Incoming, true);
}
