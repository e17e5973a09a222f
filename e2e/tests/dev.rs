//! `ballastd dev` and `ballastctl` as the README shows them.

use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::process::{is_alive, output, run};
use ballast_e2e::scratch;
use ballast_e2e::wait::until_true;
use serde_json::Value;

#[test]
fn data_survives_ctrl_c_and_a_new_start() {
    let options = Options::default();
    let mut cluster = Cluster::with("dev-restart", &options);
    let write = ["-f", "raw", "-c", "write -P 0x42 1M 1M", "-c", "flush"];
    run("qemu-io", &[&write[..], &[&cluster.uri(1)]].concat());
    let pids: Vec<u32> = cluster.nodes().iter().map(|node| node.pid).collect();
    assert_eq!(cluster.interrupt(), 0, "{}", cluster.log());
    assert!(pids.iter().all(|pid| !is_alive(*pid)), "a node outlived Ctrl-C");
    cluster.start_again(&options);
    run("qemu-io", &["-f", "raw", "-r", "-c", "read -P 0x42 1M 1M", &cluster.uri(2)]);
}

#[test]
fn a_node_that_died_comes_back_only_when_told_to() {
    let mut cluster = Cluster::start("dev-respawn");
    let before = cluster.node(2).pid;
    cluster.kill(2);
    // The others notice and go on; nobody starts it.
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x01 0 1M", &cluster.uri(1)]);
    assert!(!is_alive(before));
    cluster.restart(2);
    assert_ne!(cluster.node(2).pid, before, "dev.json names the new process");

    let options = Options { more: vec!["--respawn".into()], ..Options::default() };
    let cluster = Cluster::with("dev-respawn-on", &options);
    let before = cluster.node(3).pid;
    ballast_e2e::process::kill_and_wait(before);
    until_true("the node's return", 30, || {
        let nodes = cluster.nodes();
        nodes.iter().any(|node| node.id == 3 && node.pid != before && is_alive(node.pid))
            && cluster.is_ready(3)
    });
}

#[test]
fn what_dev_prints_works_when_pasted() {
    let cluster = Cluster::start("dev-prints");
    // It prints when all is there: behind dev.json, by which the cluster counts as started.
    until_true("all that it prints", 20, || cluster.log().contains("keeps its data."));
    let log = cluster.log();
    let lines: Vec<&str> = log
        .lines()
        .map(str::trim)
        .filter(|line| ["qemu-img ", "nbdinfo ", "ballastctl "].iter().any(|p| line.starts_with(p)))
        .collect();
    assert!(!lines.is_empty(), "nothing to paste in:\n{log}");
    let path =
        format!("{}:{}", scratch::binaries().display(), std::env::var("PATH").unwrap_or_default());
    for line in lines {
        let script =
            format!("export PATH='{path}'; cd '{}'; {line}", cluster.scratch.path().display());
        run("bash", &["-c", &script]);
    }
}

#[test]
fn metrics_are_well_formed() {
    let cluster = Cluster::start("metrics");
    run("qemu-io", &["-f", "raw", "-c", "write 0 1M", "-c", "read 0 1M", &cluster.uri(1)]);
    for node in cluster.nodes() {
        let text = cluster.metrics(node.id);
        let file = cluster.scratch.file("metrics.txt");
        std::fs::write(&file, &text).expect("a file can be written");
        // promtool complains on standard output and in its exit code.
        run("bash", &["-c", &format!("promtool check metrics <'{file}'")]);
    }
}

#[test]
fn ballastctl_speaks_to_people_and_programs() {
    let cluster = Cluster::start("ctl");
    let ctl = |arguments: &[&str]| cluster.ballastctl(2, arguments);
    for command in [&["volume", "list"][..], &["node", "list"], &["pool", "list"], &["status"]] {
        assert!(!ctl(command).trim().is_empty(), "{command:?} printed nothing");
        let json = ctl(&[command, &["-o", "json"]].concat());
        serde_json::from_str::<Value>(&json).unwrap_or_else(|e| panic!("{command:?}: {e}: {json}"));
    }
    assert!(ctl(&["volume", "list"]).contains("demo"));
    let create = ["volume", "create", "second", "--size", "64MiB", "--replicas", "1"];
    ctl(&create);
    ctl(&create); // the same again is the same volume
    assert!(ctl(&["volume", "list"]).contains("second"));
    ctl(&["volume", "delete", "second", "--yes"]);
    until_true("the end of the volume", 30, || !ctl(&["volume", "list"]).contains("second"));
    ctl(&["volume", "move-leader", "demo", "--node", "3"]);
    assert_eq!(cluster.leader("demo"), 3);
}

#[test]
fn a_volume_can_grow() {
    let cluster = Cluster::start("resize");
    cluster.ballastctl(1, &["volume", "resize", "demo", "--size", "1280MiB"]);
    until_true("the new size", 20, || {
        output("nbdinfo", &["--size", &cluster.uri(2)]).stdout == b"1342177280\n"
    });
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x21 1270M 1M", &cluster.uri(1)]);
}
