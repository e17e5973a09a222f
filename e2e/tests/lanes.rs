//! Several connections of one client that write: one attachment, and no request runs twice in it.

use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::nbd::{Answer, CAN_MULTI_CONN, Connection, DISCONNECT, FLUSH, READ, WRITE};

const ONE: [u8; 4096] = [1; 4096];
const TWO: [u8; 4096] = [2; 4096];

fn small(test: &str) -> Cluster {
    Cluster::with(test, &Options { volume_mib: 64, ..Options::default() })
}

/// Lanes 0 and 1 of a session at node 1.
#[track_caller]
fn lanes(cluster: &Cluster, session: u64) -> [Connection; 2] {
    [0, 1].map(|lane| {
        let uri = format!("{}@session={session:016x},lane={lane}", cluster.uri(1));
        Connection::open(&uri).expect("it opens")
    })
}

/// A handle as Linux makes it.
fn handle(count: u32, queue: u16, tag: u16) -> u64 {
    u64::from(count) << 32 | u64::from(queue) << 16 | u64::from(tag)
}

#[track_caller]
fn does(connection: &mut Connection, command: u16, handle: u64, data: &[u8]) {
    connection.send(command, handle, 0, data).expect("it can be sent");
    let answer = connection.answer().expect("it is answered");
    assert_eq!(answer, Answer { handle, error: 0 });
}

#[track_caller]
fn reads(connection: &mut Connection, handle: u64, expected: &[u8]) {
    connection.send_head(READ, handle, 0, expected.len() as u32).expect("it can be sent");
    let answer = connection.answer().expect("it is answered");
    assert_eq!(answer, Answer { handle, error: 0 });
    assert_eq!(connection.data(expected.len()).expect("data follow"), expected);
}

#[test]
fn lanes_share_an_attachment_and_may_leave() {
    let cluster = small("lanes");
    let [mut first, mut second] = lanes(&cluster, 1);
    assert_ne!(first.flags & second.flags & CAN_MULTI_CONN, 0);
    does(&mut first, WRITE, handle(1, 0, 1), &ONE);
    reads(&mut second, handle(1, 1, 1), &ONE);
    does(&mut second, WRITE, handle(2, 1, 1), &TWO);
    does(&mut first, FLUSH, handle(2, 0, 1), &[]);
    second.send(DISCONNECT, 0, 0, &[]).expect("it can be sent");
    assert_eq!(second.rest().expect("closed in order"), b"");
    reads(&mut first, handle(3, 0, 1), &TWO);
    // A lane that comes twice is a client that has begun anew, in an attachment of its own.
    let [mut again, _other] = lanes(&cluster, 1);
    assert_eq!(first.rest().expect("closed in order"), b"");
    does(&mut again, WRITE, handle(4, 0, 1), &ONE);
}

#[test]
fn a_lane_that_is_lost_ends_the_session() {
    let cluster = small("lanes-lost");
    let [first, mut second] = lanes(&cluster, 1);
    does(&mut second, WRITE, handle(1, 1, 1), &ONE);
    drop(first);
    assert_eq!(second.rest().expect("closed in order"), b"");
    let [mut first, mut second] = lanes(&cluster, 2);
    does(&mut first, WRITE, handle(2, 0, 1), &TWO);
    reads(&mut second, handle(2, 1, 1), &TWO);
    drop((first, second));
    let plain = Connection::open(&cluster.uri(1)).expect("it opens");
    assert_eq!(plain.flags & CAN_MULTI_CONN, 0);
}

/// A write is on its way on one lane; for its client that lane is dead, and it asks on the other one.
/// Were that answered, the first copy could still land, on top of what was written since.
#[test]
fn a_request_that_moved_to_another_lane_is_not_run_and_ends_the_session() {
    let cluster = small("lanes-moved");
    let [mut first, mut second] = lanes(&cluster, 1);
    does(&mut second, WRITE, handle(1, 1, 1), &TWO);
    first.send_head(WRITE, handle(1, 0, 1), 0, 4096).expect("it can be sent");
    first.send_more(&ONE[..1000]).expect("it can be sent");
    second.send(WRITE, handle(2, 0, 1), 0, &ONE).expect("it can be sent");
    assert_eq!(second.rest().expect("closed in order"), b"", "no answer");

    let [mut next, mut other] = lanes(&cluster, 2);
    reads(&mut other, handle(1, 1, 2), &TWO);
    does(&mut next, WRITE, handle(3, 0, 1), &ONE);
    does(&mut next, WRITE, handle(4, 0, 1), &TWO);
    // The rest of the first copy. The connection may be cut off by now.
    let _ = first.send_more(&ONE[1000..]);
    assert_eq!(first.rest().unwrap_or_default(), b"", "no answer");
    reads(&mut next, handle(5, 0, 1), &TWO);
}
