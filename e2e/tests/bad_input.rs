//! What must be refused: a clear error, an exit code that is not 0, and nothing written.

use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use ballast_e2e::cluster::Cluster;
use ballast_e2e::process::{output, run};
use ballast_e2e::scratch;
use ballast_e2e::wait;

/// Refused: not 0, not a panic, and a message that names this.
#[track_caller]
fn assert_refused(what: &str, output: &Output, names: &str) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let code = output.status.code();
    assert!(code.is_some_and(|code| code != 0 && code != 124), "{what}: {code:?}\n{text}");
    assert!(!text.contains("panicked"), "{what}: {text}");
    let named = text.to_lowercase().contains(&names.to_lowercase());
    assert!(named, "{what}: the message does not say {names:?}:\n{text}");
}

fn ctl(cluster: &Cluster, arguments: &[&str]) -> Output {
    let program = scratch::program("ballastctl").display().to_string();
    output(&program, &[&["--endpoint", &cluster.node(1).grpc], arguments].concat())
}

#[test]
fn volumes_that_cannot_be_are_refused() {
    let cluster = Cluster::start("bad-volumes");
    let before = cluster.ballastctl(1, &["volume", "list"]);
    for (what, arguments, names) in [
        ("a slash in the name", &["a/b", "--size", "1GiB"][..], "a/b"),
        ("an empty name", &["", "--size", "1GiB"], "name"),
        ("size 0", &["x", "--size", "0"], "size"),
        ("a size that is no multiple", &["x", "--size", "4097B"], "multiple"),
        ("more replicas than nodes", &["x", "--size", "1GiB", "--replicas", "5"], "replicas"),
        ("an even number of replicas", &["x", "--size", "1GiB", "--replicas", "2"], "replicas"),
        ("a size beyond all limits", &["x", "--size", "9000TiB"], "size"),
        (
            "a preferred node that is not",
            &["x", "--size", "1GiB", "--prefer", "node-1,nope"],
            "nope",
        ),
        ("a node's number that is not", &["x", "--size", "1GiB", "--prefer", "9"], "node list"),
        ("another size of a volume that is", &["demo", "--size", "2GiB"], "demo"),
    ] {
        assert_refused(what, &ctl(&cluster, &[&["volume", "create"], arguments].concat()), names);
    }
    assert_refused("no such volume", &ctl(&cluster, &["volume", "show", "nope"]), "nope");
    assert_refused(
        "smaller",
        &ctl(&cluster, &["volume", "resize", "demo", "--size", "1MiB"]),
        "demo",
    );
    assert_eq!(cluster.ballastctl(1, &["volume", "list"]), before, "nothing changed");
    assert!(!output("nbdinfo", &[&cluster.uri(1).replace("demo", "nope")]).status.success());
}

#[test]
fn an_endpoint_that_is_another_port_of_a_node_is_told_so() {
    let cluster = Cluster::start("bad-endpoint");
    let program = scratch::program("ballastctl").display().to_string();
    let node = cluster.node(1);
    let other = |url: &str| {
        let address = url.split("://").nth(1).expect("an address");
        address.split('/').next().expect("an address").to_owned()
    };
    for (url, says) in [(&node.nbd, "an NBD server"), (&node.metrics, "a web server")] {
        let asked = output(&program, &["--endpoint", &other(url), "volume", "list"]);
        assert_refused("another port", &asked, &format!("{says} answers there"));
    }
}

/// A client that tries once gets through an election, and hears in words that there will be none.
#[test]
fn an_export_without_quorum_is_refused_in_words_and_in_time() {
    /// `NBD_OPEN_SECONDS_MAX`, and what a busy machine takes beside.
    const SECONDS: u64 = 10 + 3;
    let mut cluster = Cluster::start("bad-quorum");
    let uri = cluster.uri(1);
    let write = || output("qemu-io", &["-f", "raw", "-c", "write -P 7 0 4k", &uri]);
    cluster.move_leader("demo", 2);
    cluster.kill(2);
    let during_election = write();
    assert!(during_election.status.success(), "{during_election:?}");
    cluster.kill(3);
    let start = Instant::now();
    let refused = write();
    let took = start.elapsed();
    assert_refused("no quorum", &refused, "no quorum of replicas that this node reaches");
    assert_refused("no quorum", &refused, "no link to node-2, node-3");
    assert!(took < Duration::from_secs(SECONDS), "{took:?}");
    cluster.restart(3);
    run("qemu-io", &["-f", "raw", "-c", "read -P 7 0 4k", &uri]);
}

#[test]
fn waiting_for_a_volume_ends_in_time_and_says_what_is_missing() {
    const SECONDS: u64 = 6;
    let mut cluster = Cluster::start("bad-wait");
    cluster.kill(3);
    let create = ["volume", "create", "late", "--size", "64MiB", "--wait"];
    let start = Instant::now();
    let output = ctl(&cluster, &[&create[..], &["--timeout", &SECONDS.to_string()]].concat());
    let took = start.elapsed();
    assert_refused("a node is away", &output, "node 3 (node-3, which does not answer)");
    assert!(took < Duration::from_secs(SECONDS + 3), "{took:?}");
    cluster.restart(3);
    let made = cluster.ballastctl(1, &[&create[..], &["-o", "json"]].concat());
    assert!(made.contains("\"phase\": \"ready\""), "{made}");
}

/// The pool file of a node of the development cluster.
fn pool_file(cluster: &Cluster, id: u32) -> PathBuf {
    let find = format!(
        "find '{}' -type f -size +4M | grep -E '(node-?{id}|/{id})(/|\\.|-)'",
        cluster.data().display()
    );
    let found = run("bash", &["-c", &find]);
    PathBuf::from(found.lines().next().expect("a pool file"))
}

/// Starts one node, which must end by itself.
fn dev_node(cluster: &Cluster, id: u32) -> Output {
    let program = scratch::program("ballastd").display().to_string();
    let (data, id) = (cluster.data().display().to_string(), id.to_string());
    output("timeout", &["20", &program, "dev-node", "--data", &data, "--id", &id])
}

fn checksum(file: &std::path::Path) -> String {
    run("sha256sum", &[&file.display().to_string()])
}

#[test]
fn a_pool_in_use_is_refused() {
    let cluster = Cluster::start("bad-in-use");
    assert_refused("a second process", &dev_node(&cluster, 2), "in use");
    assert!(cluster.is_ready(2), "the first goes on");
}

#[test]
fn damaged_and_foreign_disks_are_refused_and_not_touched() {
    let mut cluster = Cluster::start("bad-disks");
    cluster.kill(3);
    let pool = pool_file(&cluster, 3);
    let path = pool.display().to_string();
    let good = cluster.scratch.file("good-pool");
    run("cp", &["--sparse=always", &path, &good]);
    let damage = |what: &str, script: &str, names: &str| {
        run("cp", &["--sparse=always", &good, &path]);
        run("bash", &["-c", &script.replace("POOL", &format!("'{path}'"))]);
        let before = checksum(&pool);
        assert_refused(what, &dev_node(&cluster, 3), names);
        assert_eq!(checksum(&pool), before, "{what}: the disk was written to");
    };
    damage(
        "a foreign disk",
        "truncate -s 0 POOL && truncate -s 64M POOL && mkfs.ext4 -q -F POOL",
        "superblock",
    );
    damage("a disk cut short", "truncate -s 2048 POOL", "pool");
    damage(
        "zeroes at both ends",
        "dd if=/dev/zero of=POOL bs=1M count=1 conv=notrunc status=none; \
        dd if=/dev/zero of=POOL bs=1M seek=$(( $(stat -c %s POOL) / 1048576 - 1 )) count=1 conv=notrunc status=none",
        "superblock",
    );
    run("cp", &["--sparse=always", &good, &path]);
    cluster.restart(3);
    cluster.wait_in_sync("demo");
}

/// A configuration of one node with this much memory for clients' requests.
fn with_requests(requests: &str) -> String {
    format!(
        "cluster = \"0f2b5c3e-7a4d-4c1b-9e56-3d8f0a6b7c21\"\nnode = 1\npool = \"pool\"\n\
         [memory]\nrequests = {requests}\n\
         [[nodes]]\nid = 1\nname = \"only\"\npeer = \"127.0.0.1:9\"\n"
    )
}

#[test]
fn configurations_that_are_wrong_are_refused() {
    let scratch = ballast_e2e::scratch::Scratch::new("bad-config");
    let program = scratch::program("ballastd").display().to_string();
    let file = scratch.file("config.toml");
    for (what, text, names) in [
        ("an unknown key", "no_such_key = 1\n", "no_such_key"),
        ("not TOML", "= = =\n", "config.toml"),
        ("no memory", with_requests("0").as_str(), "32MiB"),
        ("memory beyond all machines", with_requests("\"4096TiB\"").as_str(), "64GiB"),
    ] {
        std::fs::write(&file, text).expect("a file can be written");
        assert_refused(
            what,
            &output("timeout", &["20", &program, "run", "--config", &file]),
            names,
        );
    }
    let missing = scratch.file("missing.toml");
    assert_refused(
        "no file",
        &output("timeout", &["20", &program, "run", "--config", &missing]),
        "missing.toml",
    );
    let data = scratch.file("data");
    let dev = |more: &[&str]| {
        output("timeout", &[&["20", &program, "dev", "--data", &data], more].concat())
    };
    assert_refused("two nodes", &dev(&["--nodes", "2"]), "nodes");
    assert_refused("a volume without size", &dev(&["--volume", "x"]), "size");
    assert_refused("a bad size", &dev(&["--volume", "x=12parsecs"]), "12parsecs");
    assert!(!std::path::Path::new(&data).exists(), "nothing was written");
    wait::until_true("no process left", 5, || {
        ballast_e2e::process::with_argument_below(scratch.path()).is_empty()
    });
}
