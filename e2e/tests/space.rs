//! Full pools and overwriting: new writes are refused before anything is lost, freed space is
//! used again.

use ballast_e2e::cluster::{Cluster, MIB, Options};
use ballast_e2e::process::{output, run};
use ballast_e2e::verify::Verify;
use ballast_e2e::wait;

/// Small pools, so that they fill quickly.
fn small_pools(volume_mib: u64, pool_mib: u64) -> Options {
    let more = vec!["--pool-size".into(), format!("{pool_mib}MiB")];
    Options { nodes: 3, volume_mib, more }
}

/// Writes to a volume in runs of 8 MiB until the server refuses; returns how many it took.
fn fill(uri: &str, runs: u64) -> u64 {
    fill_from(uri, 0, runs)
}

fn fill_from(uri: &str, first: u64, runs: u64) -> u64 {
    for number in 0..runs {
        let write = format!("write -P 0x77 {}M 8M", (first + number) * 8);
        if !output("qemu-io", &["-f", "raw", "-c", &write, uri]).status.success() {
            return number;
        }
    }
    runs
}

/// A volume on all nodes that grows: what a full pool must refuse. (Overwriting what is there may
/// go on: what it makes dead comes back.)
struct Growing {
    uri: String,
}

impl Growing {
    fn create(cluster: &Cluster) -> Growing {
        let create = ["volume", "create", "growing", "--size", "512MiB", "--wait"];
        cluster.ballastctl(1, &create);
        cluster.wait_in_sync("growing");
        Growing { uri: cluster.uri(1).replace("/demo", "/growing") }
    }

    /// Grows by up to 96 MiB from run `first` on, which must not all be taken.
    #[track_caller]
    fn refused(&self, cluster: &Cluster, first: u64) {
        let before = cluster.ballastctl(1, &["pool", "list"]);
        let taken = fill_from(&self.uri, first, 12);
        let after = cluster.ballastctl(1, &["pool", "list"]);
        assert!(taken < 12, "a full pool took {taken} runs of 8 MiB more:\n{before}\n{after}");
    }

    #[track_caller]
    fn taken(&self, first: u64) {
        wait::until_true("room again", 60, || fill_from(&self.uri, first, 1) == 1);
    }
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
    let growing = Growing::create(&cluster);

    let filler = uri.replace("/demo", "/filler");
    let filled = fill(&filler, 128);
    assert!((8..128).contains(&filled), "{filled} runs of 8 MiB went into a pool of 512 MiB");
    growing.refused(&cluster, 0);
    // Reads of both volumes go on.
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x77 0 8M", &filler]);
    assert!(cluster.is_ready(1), "a full pool does not make a node unready");

    // Trims work, and make room.
    let half = format!("discard 0 {}M", filled * 4);
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", &half, &filler]);
    growing.taken(16);
    verify.progress(300, 60);
    // So does a delete.
    fill(&filler, 128);
    growing.refused(&cluster, 20);
    cluster.ballastctl(1, &["volume", "delete", "filler", "--yes"]);
    growing.taken(40);
    verify.progress(1000, 120);
    let report = verify.finish();
    report.assert_ok();
    cluster.assert_replicas_are_equal();
}

/// Fills the pools of these nodes, each by a volume with its one replica there. Answers the volumes
/// and their nodes.
fn fill_nodes(cluster: &Cluster, nodes: &[u32]) -> Vec<(String, u32, u64)> {
    let fill_node = |&node: &u32| {
        let (name, prefer) = (format!("filler-{node}"), node.to_string());
        let create = ["volume", "create", &name, "--size", "1GiB", "--replicas", "1", "--wait"];
        cluster.ballastctl(1, &[&create[..], &["--prefer", &prefer]].concat());
        cluster.wait_in_sync(&name);
        cluster.wait_known(&name);
        assert_eq!(cluster.replicas(&name)[0].node, node, "there was room");
        let runs = fill(&cluster.uri(node).replace("/demo", &format!("/{name}")), 128);
        assert!((8..128).contains(&runs), "{runs} runs of 8 MiB went into a pool of 512 MiB");
        (name, node, runs)
    };
    nodes.iter().map(fill_node).collect()
}

/// With these nodes full, among them the leader or not: writes to a volume that has replicas
/// on all nodes are refused, reads go on, nothing is lost; trims and deletes make room.
fn full_nodes(test: &str, nodes: &[u32], leads: bool) {
    let cluster = Cluster::with(test, &small_pools(64, 512));
    let load = ["--expect-zeroes", "--span-mib", "32", "--allow-no-space"];
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &load);
    verify.progress(300, 60);
    let mut growing = Growing::create(&cluster);
    let full = fill_nodes(&cluster, nodes);
    let is_full = |node: u32| full.iter().any(|(_, taken, _)| *taken == node);
    let leader = (1..=3).find(|node| is_full(*node) == leads).expect("some of both");
    // The lead follows who writes.
    growing.uri = cluster.uri(leader).replace("/demo", "/growing");
    growing.refused(&cluster, 0);
    for (name, node, runs) in &full {
        let uri = cluster.uri(*node).replace("/demo", &format!("/{name}"));
        run("qemu-io", &["-f", "raw", "-c", "read -P 0x77 0 8M", &uri]);
        let trim = format!("discard 0 {}M", runs * 4);
        run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", &trim, &uri]);
    }
    growing.taken(16);
    verify.progress(300, 60);
    for (name, node, _) in &full {
        fill(&cluster.uri(*node).replace("/demo", &format!("/{name}")), 128);
    }
    growing.refused(&cluster, 20);
    for (name, _, _) in &full {
        cluster.ballastctl(1, &["volume", "delete", name, "--yes"]);
    }
    growing.taken(40);
    verify.progress(500, 60);
    let report = verify.finish();
    report.assert_ok();
    cluster.assert_replicas_are_equal();
}

#[test]
fn a_full_leader_refuses_writes_and_recovers() {
    full_nodes("full-leader", &[1], true);
}

#[test]
fn a_full_follower_refuses_writes_and_recovers() {
    full_nodes("full-follower", &[3], false);
}

#[test]
fn two_full_followers_refuse_writes_and_recover() {
    full_nodes("full-followers", &[2, 3], false);
}

#[test]
fn a_volume_overwritten_twenty_times_stays_within_its_pool() {
    let cluster = Cluster::with("overwrite", &small_pools(64, 512));
    let load = ["--expect-zeroes", "--span-mib", "64", "--reads", "5", "--zeroes", "1"];
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &load);
    // 34 KiB is the mean of sizes from 4 to 64 KiB; a quarter more, for zeroes and reads among them.
    verify.progress(25 * 64 * MIB / (34 << 10), 600);
    let report = verify.finish();
    report.assert_ok();
    assert!(report.number("bytes") >= 20 * 64 * MIB, "{:#}", report.json);
    cluster.assert_replicas_are_equal();
}
