//! Sessions that end from the server's side: no answer says so, only the close. Linux's client takes
//! each error for one of the disk, and asks again what had no answer.

use std::time::Instant;

use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::nbd::{Answer, Connection, WRITE};
use nix::sys::signal::Signal;
use serde_json::Value;

fn small(test: &str) -> Cluster {
    Cluster::with(test, &Options { volume_mib: 64, ..Options::default() })
}

const BLOCK: [u8; 4096] = [7; 4096];

/// An answer to a write of block 0.
#[track_caller]
fn writes(connection: &mut Connection, handle: u64) {
    connection.send(WRITE, handle, 0, &BLOCK).expect("it can be sent");
    let answer = connection.answer().expect("it is answered");
    assert_eq!(answer, Answer { handle, error: 0 });
}

#[test]
fn a_node_that_stops_closes_and_answers_nothing_in_flight() {
    let cluster = small("stop");
    cluster.move_leader("demo", 1);
    let mut connection = Connection::open(&cluster.uri(1)).expect("it opens");
    writes(&mut connection, 1);
    for id in [2, 3] {
        cluster.signal(id, Signal::SIGSTOP);
    }
    // Without a quorum it stays in flight.
    connection.send(WRITE, 2, 0, &BLOCK).expect("it can be sent");
    cluster.signal(1, Signal::SIGTERM);
    let start = Instant::now();
    assert_eq!(connection.rest().expect("closed in order"), b"", "no answer, no error");
    println!("closed {:?} after SIGTERM", start.elapsed());
    for id in [2, 3] {
        cluster.signal(id, Signal::SIGCONT);
    }
    let mut elsewhere = Connection::open(&cluster.uri(2)).expect("it goes on elsewhere");
    writes(&mut elsewhere, 1);
}

#[test]
fn a_holder_whose_lease_was_taken_is_closed_and_told_why_when_it_comes_back() {
    let cluster = small("taken");
    let acquire = |more: &[&str]| {
        let words = [&["lease", "acquire", "demo", "-o", "json"], more].concat();
        let json: Value = serde_json::from_str(&cluster.ballastctl(1, &words)).expect("JSON");
        json["export"].as_str().expect("an export").to_owned()
    };
    let first = acquire(&["--host", "host-1"]);
    let uri = |export: &str| cluster.uri(1).replace("demo", export);
    let mut holder = Connection::open(&uri(&first)).expect("it opens");
    writes(&mut holder, 1);
    let by_force = ["--host", "host-2", "--force", "--yes", "--reason", "host-1 is cut off"];
    let second = acquire(&by_force);
    for handle in 2..6 {
        // It may be closed before the last one is sent.
        let _ = holder.send(WRITE, handle, 0, &BLOCK);
    }
    assert_eq!(holder.rest().unwrap_or_default(), b"", "no answer, no error");
    let refused = Connection::open(&uri(&first)).expect_err("its lease has ended");
    assert!(refused.to_string().contains("is not in force"), "{refused}");
    writes(&mut Connection::open(&uri(&second)).expect("it opens"), 1);
}
