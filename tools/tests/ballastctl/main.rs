//! The real `ballastctl` against a real server on 127.0.0.1.

mod failover;
mod fixture;

use std::process::{Command, Output, Stdio};

use fixture::Node;

/// What a run of `ballastctl` came to.
struct Run {
    code: i32,
    out: String,
    err: String,
}

fn ballastctl(endpoint: &str, line: &str) -> Run {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_ballastctl"))
        .args(line.split_whitespace())
        .env("BALLAST_ENDPOINT", endpoint)
        .stdin(Stdio::null())
        .output()
        .expect("ballastctl was built");
    Run {
        code: status.code().expect("it was not killed"),
        out: String::from_utf8(stdout).expect("it prints UTF-8"),
        err: String::from_utf8(stderr).expect("it prints UTF-8"),
    }
}

fn done(node: &Node, line: &str) -> String {
    let run = ballastctl(&node.url(), line);
    assert_eq!((run.code, run.err.as_str()), (0, ""), "{line}");
    run.out
}

fn failed(node: &Node, line: &str, code: i32) -> String {
    let run = ballastctl(&node.url(), line);
    assert_eq!((run.code, run.out.as_str()), (code, ""), "{line}: {}", run.err);
    run.err
}

/// Compares with `golden/NAME`. With BALLAST_UPDATE_GOLDEN set, writes it: look at the difference
/// before it is committed; JSON must only gain fields.
fn assert_golden(name: &str, text: &str) {
    let path = format!("{}/tests/ballastctl/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("BALLAST_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).expect("the folder is there");
    }
    let golden = std::fs::read_to_string(&path).expect("the golden file is there");
    assert_eq!(golden, text, "{name}");
}

#[test]
fn a_volume_from_creation_to_deletion() {
    let node = Node::start();
    assert_golden("create.txt", &done(&node, "volume create db --size 16GiB"));
    assert_golden("create-again.json", &done(&node, "volume create db --size 16GiB -o json"));
    assert_golden("create-wait.txt", &done(&node, "volume create db --size 16GiB --wait"));
    assert_eq!(done(&node, "volume move-leader db --node storage-2"), "node 2 leads\n");
    assert_golden("show.txt", &done(&node, "volume show db"));
    assert_golden("show.json", &done(&node, "-o json volume show db"));
    assert_golden("resize.txt", &done(&node, "volume resize db --size 20Gi"));
    let by_id = done(&node, "volume show a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1");
    assert_eq!(by_id, done(&node, "volume show db"));
    assert_eq!(done(&node, "volume delete db --yes"), "deleted\n");
    let again = done(&node, "volume delete db --yes -o json");
    assert_eq!(again, "{\n  \"deleted\": false\n}\n");
    assert_golden("list-deleting.txt", &done(&node, "volume list"));
}

#[test]
fn lists() {
    let node = Node::start();
    assert_eq!(
        done(&node, "volume list"),
        "NAME  SIZE  REPLICAS  PHASE  HEALTH  LEADER  ID\n",
        "an empty list still says what it lists"
    );
    for name in ["c", "a", "b", "e", "d"] {
        done(&node, &format!("volume create {name} --size 1536MiB --replicas 1"));
    }
    assert_golden("list.txt", &done(&node, "volume list"));
    assert_golden("list.json", &done(&node, "volume list --output json"));
    assert_golden("nodes.txt", &done(&node, "node list"));
    assert_golden("nodes.json", &done(&node, "node list -o json"));
    assert_golden("node.txt", &done(&node, "node show 1"));
    assert_golden("node.json", &done(&node, "node show storage-1 -o json"));
    assert_golden("pools.txt", &done(&node, "pool list"));
    assert_golden("pools.json", &done(&node, "pool list --node 2 -o json"));
    assert_golden("status.txt", &done(&node, "status"));
    assert_golden("status.json", &done(&node, "status -o json"));
}

#[test]
fn leases_are_acquired_taken_and_released() {
    let node = Node::start();
    for name in ["db", "data"] {
        done(&node, &format!("volume create {name} --size 16GiB --wait"));
    }
    let attach = "volume attach db --host host-1";
    assert_golden("attach.txt", &done(&node, attach));
    assert_golden("show-written.txt", &done(&node, "volume show db"));
    assert_eq!(done(&node, attach), done(&node, "lease acquire db --host host-1"), "the same");
    assert_eq!(
        failed(&node, "lease acquire db --host host-2", 1),
        "error: volume \"db\" is leased to host \"host-1\" (single-node-writer): release it there \
         first (unpublish it), or, if that host is gone or cut off, take it over by force, with a \
         reason\n"
    );
    let force = "lease acquire db --host host-2 --read-only --force --reason cut-off";
    assert_eq!(
        failed(&node, force, 2),
        "error: volume \"db\" was not taken by force: there is no terminal to ask on; give --yes\n"
    );
    assert_golden("acquire-force.json", &done(&node, &format!("{force} --yes -o json")));
    for host in ["host-1", "host-3"] {
        done(&node, &format!("lease acquire data --mode readers --host {host}"));
    }
    assert_golden("leases.txt", &done(&node, "lease list"));
    assert_golden("leases.json", &done(&node, "lease list --volume db -o json"));
    assert_golden("show-leased.txt", &done(&node, "volume show data"));
    done(&node, "volume create open --size 16GiB --wait");
    assert_golden("show-open.txt", &done(&node, "volume show open"));
    assert_golden("show-open.json", &done(&node, "volume show open -o json"));
    let of_host = done(&node, "lease list --host host-3");
    assert_eq!(of_host.lines().count(), 2, "{of_host}");
    assert_eq!(
        failed(&node, "volume delete db --yes", 1),
        "error: volume \"db\" is leased to host \"host-2\" (single-node-writer): a volume in use \
         is not deleted; release its leases first (see `ballastctl lease list`)\n"
    );
    let not_there = "not there: nothing to release\n";
    assert_eq!(done(&node, "lease release db --host host-1"), not_there, "taken by force");
    assert_eq!(done(&node, "lease release db --host host-2 --epoch 1"), not_there);
    assert_eq!(done(&node, "volume detach db --host host-2"), "released\n");
    let again = done(&node, "lease release db --host host-2 -o json");
    assert_eq!(again, "{\n  \"released\": false\n}\n");
    assert_eq!(done(&node, "volume delete db --yes"), "deleted\n");
}

#[test]
fn json_is_json() {
    let node = Node::start();
    let created = done(&node, "volume create db --size 16GiB --wait -o json");
    let created: serde_json::Value = serde_json::from_str(&created).expect("JSON");
    assert_eq!(created["volume"]["size_bytes"], 16_u64 << 30);
    assert_eq!(created["volume"]["phase"], "ready");
    let shown: serde_json::Value =
        serde_json::from_str(&done(&node, "volume show db -o json")).expect("JSON");
    assert_eq!(shown["replicas"][0]["role"], "leader");
    assert_eq!(shown["replicas"][2]["term"], serde_json::Value::Null, "its node is down");
}

#[test]
fn refusals_name_the_remedy() {
    let node = Node::start();
    done(&node, "volume create db --size 16GiB");
    for (line, message) in [
        (
            "volume create db --size 32GiB",
            "error: volume \"db\" exists and is different: it has 17179869184 bytes, not \
             34359738368; use another name, or ask for what it has\n",
        ),
        (
            "volume create DB --size 1GiB",
            "error: volume name \"DB\" is not valid: use 1 to 63 of a-z, 0-9 and '-', with a \
             letter or digit at both ends, and not a UUID\n",
        ),
        (
            "volume create x --size 1GiB --replicas 5",
            "error: volume \"x\" wants 5 replicas and the cluster has 3 nodes: register more \
             nodes, or ask for fewer replicas\n",
        ),
        (
            "volume create x --size 1GiB --replicas 0",
            "error: 0 replicas for volume \"x\" are not valid: use 1, 3 or 5\n",
        ),
        (
            "volume create x --size 5000B",
            "error: size of 5000 bytes for volume \"x\" is not valid: it is not a multiple of \
             4096\n",
        ),
        (
            "volume resize db --size 32GiB",
            "error: volume \"db\" is still being created: try again when it is ready\n",
        ),
        (
            "volume show nothing",
            "error: volume \"nothing\" does not exist: see `ballastctl volume list`\n",
        ),
        (
            "volume move-leader db --node 9",
            "error: node \"9\" does not exist: see `ballastctl node list`\n",
        ),
    ] {
        assert_eq!(failed(&node, line, 1), message, "{line}");
    }
    done(&node, "volume create db --size 16GiB --wait");
    assert_eq!(
        failed(&node, "volume resize db --size 8GiB", 1),
        "error: volume \"db\" has 17179869184 bytes and can't shrink to 8589934592: create a \
         smaller volume and copy\n"
    );
}

#[test]
fn waiting_has_an_end() {
    let node = Node::never_ready();
    assert_eq!(
        failed(&node, "--timeout 1 volume create db --size 1GiB --wait", 1),
        "error: volume \"db\" was created and is not ready after 1 s: it waits for its replicas on \
         node 1 (storage-1), node 2 (storage-2) and node 3 (storage-3, which does not answer); see \
         `ballastctl status`, or wait longer with --timeout: the same command goes on with it\n"
    );
    assert!(done(&node, "volume list").contains("creating"));
}

#[test]
fn wrong_usage_is_code_2() {
    let node = Node::start();
    let ambiguous = failed(&node, "volume create x --size 10G", 2);
    assert!(ambiguous.contains("write 10GiB"), "{ambiguous}");
    let negative = failed(&node, "volume create x --size -10GiB", 2);
    assert!(negative.contains("not a whole number"), "{negative}");
    assert_eq!(
        failed(&node, "volume delete db", 2),
        "error: volume \"db\" was not deleted: there is no terminal to ask on; give --yes\n"
    );
    let bad = failed(&node, "status --endpoint ftp://x", 2);
    assert!(bad.contains("use http://HOST:PORT"), "{bad}");
    let tls = failed(&node, "status --endpoint https://127.0.0.1:1", 2);
    assert!(tls.contains("TLS"), "{tls}");
}

#[test]
fn help_has_examples() {
    let node = Node::start();
    let help = done(&node, "--help");
    assert!(help.contains("ballastctl volume create db --size 100GiB"), "{help}");
    assert!(help.contains("BALLAST_ENDPOINT"), "{help}");
}
