//! A follower that hangs: neither slows the others nor makes them grow.

use ballast_e2e::cluster::{Cluster, MIB};
use ballast_e2e::machine::Machine;
use ballast_e2e::process::resident_bytes;
use ballast_e2e::times;
use ballast_e2e::verify::{Verify, unix_ms};
use nix::sys::signal::Signal;

/// Growth of a node's memory that is allowed while a peer hangs: what may wait for one peer, and
/// as much again for what the allocator keeps.
const GROWTH: u64 = 256 * MIB;

/// Log that may be kept above the limit for the time that a purge takes: until the next checkpoint
/// covers it, and until the stream to a peer that hangs is given up, half a second after the log
/// is over its limit. A second and a half of writing, or so many bytes on a slow disk.
const RETAINED_BEYOND: u64 = 96 * MIB;

/// What is written to.
const SPAN_MIB: u64 = 256;

#[test]
fn a_stopped_follower_slows_nobody_and_catches_up() {
    let cluster = Cluster::start("pause");
    cluster.move_leader("demo", 1);
    let load = ["--expect-zeroes", "--span-mib", "256", "--reads", "0", "--depth", "32"];
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &load);
    verify.progress(2000, 60);
    let before: Vec<u64> = [1, 2].map(|id| resident_bytes(cluster.node(id).pid)).to_vec();
    cluster.signal(3, Signal::SIGSTOP);
    let machine = Machine::watch();
    let from = unix_ms();
    let end = from + 1000 * times(15, 60) as u64;
    let mut peak = before.clone();
    let mut retained = 0;
    let limit = cluster.metric(1, "ballast_retention_limit_bytes");
    let before_it = cluster.metric(1, "ballast_log_written_bytes_total");
    let written = || cluster.metric(1, "ballast_log_written_bytes_total") - before_it;
    let beyond = |written: u64| RETAINED_BEYOND.max(written * 1500 / (unix_ms() - from).max(1));
    // On a slow machine longer: so much must be written that the log can't have kept all of it.
    let has_enough = || {
        let written = written();
        written > 2 * (limit + beyond(written))
    };
    while unix_ms() < end || !has_enough() {
        verify.progress(100, 15);
        for (index, id) in [1, 2].into_iter().enumerate() {
            peak[index] = peak[index].max(resident_bytes(cluster.node(id).pid));
            retained = retained.max(cluster.metric(id, "ballast_retained_bytes"));
        }
    }
    let to = unix_ms();
    let written = written();
    let beyond = beyond(written);
    cluster.signal(3, Signal::SIGCONT);
    cluster.wait_in_sync("demo");
    verify.progress(100, 60);
    let (resyncs, moved) = (
        cluster.metric(3, "ballast_resyncs_total"),
        cluster.metric(3, "ballast_resync_received_bytes_total"),
    );
    println!(
        "written {written} while it hung; retained at most {retained}, limit {limit}; \
         caught up by {resyncs} differences of {moved} bytes"
    );
    assert!(retained < limit + beyond, "{retained} bytes of log kept, limit {limit}");
    assert!(resyncs > 0, "caught up from the log, which no longer had it");
    assert!(moved <= 2 * SPAN_MIB * MIB, "{moved} bytes moved for a span of {SPAN_MIB} MiB");
    let report = verify.finish();
    report.assert_ok();
    println!("resident before {before:?}, at most {peak:?}");
    for (before, peak) in before.iter().zip(&peak) {
        assert!(*peak < before + GROWTH, "memory grew from {before} to {peak}");
    }
    let stall = report.longest_stall_on(&machine, from, to);
    println!("longest stall {stall} ms");
    assert!(stall <= 1000, "a stall of {stall} ms while a follower hung");
    cluster.assert_replicas_are_equal();
}
