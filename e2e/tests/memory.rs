//! Many clients with deep queues share what a node has for requests.

use std::fs;
use std::process::{Child, Command, Stdio};

use ballast_e2e::cluster::{Cluster, MIB, Options};
use ballast_e2e::process::{resident_bytes, run};
use ballast_e2e::wait;

/// The least that a node of one pool may be given: one largest request.
const REQUESTS_MIB: u64 = 32;
/// Each wants 32 MiB at a time: a quarter of a GiB together.
const CLIENTS: usize = 8;
/// What a node may grow by: what is given out, as much again in buffers that went back to the pool
/// of idle ones, the log cache, and what the allocator keeps.
const GROWTH: u64 = 256 * MIB;

fn fio(name: &str, uri: &str, work: &str) -> Child {
    Command::new("fio")
        .args(["--ioengine=nbd", "--bs=1m", "--iodepth=32", "--size=256m", "--time_based"])
        .args(["--runtime=6", "--thread"])
        .args([&format!("--name={name}"), &format!("--uri={uri}"), &format!("--rw={work}")])
        .stdout(Stdio::null())
        .spawn()
        .expect("fio starts")
}

#[test]
fn many_deep_queues_stay_within_the_memory_for_requests() {
    let one = Options { nodes: 1, volume_mib: 256, ..Options::default() };
    let mut cluster = Cluster::with("memory", &one);
    let config = cluster.data().join("node-1/config.toml");
    cluster.kill(1);
    let text = fs::read_to_string(&config).expect("a node has a configuration");
    let requests = format!("lock = false\nrequests = \"{REQUESTS_MIB}MiB\"\n");
    fs::write(&config, text.replace("lock = false\n", &requests)).expect("it can be changed");
    cluster.restart(1);
    cluster.wait_in_sync("demo");
    let uri = cluster.uri(1);
    let fill = ["--ioengine=nbd", "--name=fill", "--rw=write", "--bs=1m", "--iodepth=16"];
    run("fio", &[&fill[..], &["--size=256m", &format!("--uri={uri}")]].concat());

    let before = resident_bytes(cluster.node(1).pid);
    let mut clients: Vec<Child> = (1..CLIENTS)
        .map(|number| fio(&format!("reader-{number}"), &format!("{uri}@ro"), "randread"))
        .collect();
    clients.push(fio("writer", &uri, "randwrite"));
    let (mut held, mut waiting, mut resident) = (0, 0, 0);
    wait::until_true("the clients", 60, || {
        held = held.max(cluster.metric(1, "ballast_nbd_request_memory_bytes"));
        waiting = waiting.max(cluster.metric(1, "ballast_nbd_request_memory_waiting"));
        resident = resident.max(resident_bytes(cluster.node(1).pid));
        clients.iter_mut().all(|client| client.try_wait().expect("it is ours").is_some())
    });
    println!("held at most {held}, {waiting} waited; resident {before}, then at most {resident}");
    for client in &mut clients {
        assert!(client.wait().expect("it is ours").success(), "a client failed");
    }
    assert!(waiting > 1, "nobody waited: the test asked for too little");
    // Headers of replies are counted when they are there, not before.
    assert!(held <= (REQUESTS_MIB + 1) * MIB, "{held} bytes held");
    assert!(resident < before + GROWTH, "memory grew from {before} to {resident}");
    // The node gives back what a request had when its answer is sent: the client may be gone by then.
    wait::until_true("all memory is given back", 20, || {
        cluster.metric(1, "ballast_nbd_request_memory_bytes") == 0
    });
}
