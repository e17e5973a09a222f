//! Full pools and overwriting: new writes are refused before anything is lost, freed space is
//! used again.

use ballast_e2e::cluster::{Cluster, MIB, Options};
use ballast_e2e::process::{output, run};
use ballast_e2e::verify::Verify;

/// Small pools, so that they fill quickly.
fn small_pools(volume_mib: u64, pool_mib: u64) -> Options {
    let more = vec!["--pool-size".into(), format!("{pool_mib}MiB")];
    Options { nodes: 3, volume_mib, more }
}

/// Writes to a volume in runs of 8 MiB until the server refuses; returns how many it took.
fn fill(uri: &str, runs: u64) -> u64 {
    for number in 0..runs {
        let write = format!("write -P 0x77 {}M 8M", number * 8);
        if !output("qemu-io", &["-f", "raw", "-c", &write, uri]).status.success() {
            return number;
        }
    }
    runs
}

#[test]
fn a_full_pool_refuses_writes_loses_nothing_and_recovers() {
    let cluster = Cluster::with("full", &small_pools(256, 512));
    cluster.ballastctl(1, &["volume", "create", "filler", "--size", "1GiB", "--wait"]);
    cluster.wait_in_sync("filler");
    let uri = cluster.uri(1);
    let load = ["--expect-zeroes", "--span-mib", "32", "--allow-no-space"];
    let mut verify = Verify::start(&cluster.scratch, &[&uri], &load);
    verify.progress(300, 60);

    let filler = uri.replace("/demo", "/filler");
    let filled = fill(&filler, 128);
    assert!((8..128).contains(&filled), "{filled} runs of 8 MiB went into a pool of 512 MiB");
    verify.until("a write refused", 60, |line| line["refused"].as_u64() > Some(0));
    // Reads of both volumes go on.
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x77 0 8M", &filler]);
    assert!(cluster.is_ready(1), "a full pool does not make a node unready");

    // Trims work, and make room.
    let half = format!("discard 0 {}M", filled * 4);
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", &half, &filler]);
    verify.progress(300, 60);
    // So does a delete.
    fill(&filler, 128);
    verify.until("a write refused", 60, |line| line["refused"].as_u64() > Some(0));
    cluster.ballastctl(1, &["volume", "delete", "filler", "--yes"]);
    verify.progress(1000, 120);
    let report = verify.finish();
    report.assert_ok();
    cluster.assert_replicas_are_equal();
}

#[test]
fn a_volume_overwritten_twenty_times_stays_within_its_pool() {
    let cluster = Cluster::with("overwrite", &small_pools(64, 512));
    let load = ["--expect-zeroes", "--span-mib", "64", "--reads", "5", "--zeroes", "1"];
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &load);
    // 34 KiB is the mean of sizes from 4 to 64 KiB.
    verify.progress(20 * 64 * MIB / (34 << 10), 600);
    let report = verify.finish();
    report.assert_ok();
    assert!(report.number("bytes") > 15 * 64 * MIB, "{:#}", report.json);
    cluster.assert_replicas_are_equal();
}
