//! Five nodes: volumes of one, three and five replicas, and the loss of two nodes at once.

use ballast_api::v1 as api;
use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::process::{output, run};
use ballast_e2e::wait::until_true;

/// The URI of a volume at a node.
fn uri(cluster: &Cluster, node: u32, volume: &str) -> String {
    format!("{}/{volume}", cluster.node(node).nbd.trim_end_matches('/'))
}

fn write(cluster: &Cluster, node: u32, volume: &str, pattern: u8, at: &str) {
    let command = format!("write -P {pattern} {at} 1M");
    run("qemu-io", &["-f", "raw", "-c", &command, &uri(cluster, node, volume)]);
}

fn read(cluster: &Cluster, node: u32, volume: &str, pattern: u8, at: &str) {
    let command = format!("read -P {pattern} {at} 1M");
    run("qemu-io", &["-f", "raw", "-r", "-c", &command, &uri(cluster, node, volume)]);
}

#[test]
fn five_replicas_survive_the_loss_of_two_nodes() {
    let more = vec!["--pool-size".into(), "384MiB".into()];
    let mut cluster = Cluster::with("five", &Options { nodes: 5, volume_mib: 64, more });
    for replicas in ["1", "3", "5"] {
        let name = format!("of{replicas}");
        let create = ["volume", "create", &name, "--size", "64MiB", "--replicas", replicas];
        cluster.ballastctl(2, &create);
        cluster.wait_in_sync(&name);
        cluster.wait_known(&name);
        let mut nodes: Vec<u32> = cluster.replicas(&name).iter().map(|one| one.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        assert_eq!(nodes.len().to_string(), replicas, "replicas lie on different nodes");
        // Every node serves every volume, also one that has no replica of it.
        write(&cluster, 4, &name, 0x11, "0");
        read(&cluster, 5, &name, 0x11, "0");
    }
    let leader = cluster.leader("of5");
    let other = (1..=5).find(|&node| node != leader).expect("five nodes");
    for node in [leader, other] {
        cluster.kill(node);
    }
    let alive: Vec<u32> = (1..=5).filter(|node| ![leader, other].contains(node)).collect();
    write(&cluster, alive[0], "of5", 0x22, "1M");
    read(&cluster, alive[1], "of5", 0x11, "0");
    for node in [leader, other] {
        cluster.restart(node);
    }
    cluster.wait_in_sync("of5");
    for node in 1..=5 {
        read(&cluster, node, "of5", 0x22, "1M");
    }
}

/// Nodes that are down get no replica of a new volume, as long as others are there, and a pool is not
/// given up while a volume has no majority in sync without it.
#[test]
fn nodes_that_are_down_are_passed_by_and_what_is_left_is_not_given_up() {
    let more = vec!["--pool-size".into(), "384MiB".into()];
    let mut cluster = Cluster::with("five-down", &Options { nodes: 5, volume_mib: 64, more });
    let mut holders: Vec<u32> = cluster.replicas("demo").iter().map(|one| one.node).collect();
    holders.sort_unstable();
    let [first, second, kept] = holders[..] else { panic!("three replicas: {holders:?}") };
    write(&cluster, kept, "demo", 0x33, "0");
    // Only who leads knows of itself that it is in sync, when the others are gone.
    cluster.move_leader("demo", kept);
    let down = [first, second];
    down.iter().for_each(|&node| cluster.kill(node));
    let asked = (1..=5).find(|node| !holders.contains(node)).expect("five nodes");
    let gone = |node: &u32| {
        let request = || api::ListNodesRequest {};
        let nodes = cluster.ask(asked, async |admin| admin.list_nodes(request()).await);
        let nodes = nodes.expect("it runs").expect("it answers").into_inner().nodes;
        nodes.iter().any(|it| it.id == *node && it.liveness() == api::NodeLiveness::Down)
    };
    until_true("the word that both are down", 30, || down.iter().all(gone));
    for name in ["new-1", "new-2", "new-3"] {
        let create = ["volume", "create", name, "--size", "64MiB", "--replicas", "3", "--wait"];
        cluster.ballastctl(asked, &create);
        let nodes: Vec<u32> = cluster.replicas(name).iter().map(|one| one.node).collect();
        assert!(nodes.len() == 3 && !nodes.iter().any(|node| down.contains(node)), "{nodes:?}");
        write(&cluster, asked, name, 0x44, "0");
    }

    let program = ballast_e2e::scratch::program("ballastctl").display().to_string();
    let (grpc, node) = (cluster.node(asked).grpc, first.to_string());
    let replace = ["--endpoint", &grpc, "pool", "replace", "--yes", "--node", &node];
    let refused = output(&program, &replace);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    let says = "1 of the 3 replicas of volume \"demo\" are in sync";
    assert!(!refused.status.success() && text.contains(says), "{text}");
    // With one of them back the other one can be missed.
    cluster.restart(second);
    until_true("two replicas in sync", 60, || {
        let replicas = cluster.replicas("demo");
        replicas.iter().filter(|it| it.node != first && it.live && it.in_sync).count() == 2
    });
    cluster.ballastctl(asked, &replace[2..]);
    read(&cluster, asked, "demo", 0x33, "0");
}

#[test]
fn more_replicas_than_nodes_and_even_numbers_are_refused() {
    let cluster = Cluster::with("replicas-refused", &Options { nodes: 1, ..Options::default() });
    let program = ballast_e2e::scratch::program("ballastctl").display().to_string();
    let grpc = cluster.node(1).grpc;
    for replicas in ["0", "2", "3", "4", "7"] {
        let create = ["volume", "create", "x", "--size", "64MiB", "--replicas", replicas];
        let answer = output(&program, &[&["--endpoint", &grpc][..], &create].concat());
        assert!(!answer.status.success(), "{replicas} replicas were taken");
        let text = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert!(text.contains("replicas"), "{replicas}: {text}");
    }
}
