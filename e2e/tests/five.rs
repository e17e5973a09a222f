//! Five nodes: volumes of one, three and five replicas, and the loss of two nodes at once.

use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::process::{output, run};

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
