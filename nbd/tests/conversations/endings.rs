//! Sessions that end from the server's side: nothing more is run or answered, and all is closed. And
//! what a caller needs to know for that: how the client calls its requests.

use ballast_block::{AlignedBuf, IoError, IoReply};
use ballast_nbd::{CommandId, Event, Session, Want};
use bytes::Buf;

use super::client::request;
use super::{attached, feed, sent};

/// Three flushes, the first of which is answered and partly sent.
fn answered_and_two_more() -> (Session, [CommandId; 2]) {
    let mut session = attached();
    let flushes = [request(0, 3, 1, 0, 0), request(0, 3, 2, 0, 0), request(0, 3, 3, 0, 0)];
    feed(&mut session, &flushes.concat());
    let mut next = || match session.next_event() {
        Ok(Some(Event::Command { id, .. })) => id,
        other => panic!("a flush, and not {other:?}"),
    };
    let ids = [next(), next(), next()];
    session.complete(ids[0], Ok(IoReply::Done));
    session.replies().advance(5);
    (session, [ids[1], ids[2]])
}

/// The answer that was begun is sent whole; nothing follows it, whatever comes and ends.
#[track_caller]
fn assert_ended(mut session: Session, in_flight: &[CommandId]) {
    assert!(session.is_over());
    assert!(matches!(session.next_event(), Ok(None)));
    assert!(matches!(session.want(), Want::Nothing), "an answer is half sent");
    for id in in_flight {
        session.complete(*id, Ok(IoReply::Done));
    }
    assert_eq!(sent(&mut session), [&[0; 3][..], &1_u64.to_be_bytes()].concat());
    assert!(matches!(session.next_event(), Ok(None)));
    assert!(matches!(session.want(), Want::Close));
}

#[test]
fn a_command_of_an_attachment_that_has_ended_is_not_answered_but_ends_the_session() {
    for error in [IoError::Fenced, IoError::ShuttingDown] {
        let (mut session, [second, third]) = answered_and_two_more();
        session.complete(second, Err(error));
        assert_ended(session, &[third]);
    }
    let (mut session, [second, _]) = answered_and_two_more();
    session.complete(second, Err(IoError::TimedOut));
    assert!(!session.is_over(), "other errors are answered");
}

#[test]
fn a_node_that_stops_and_a_caller_that_says_so_end_the_session() {
    let (mut session, in_flight) = answered_and_two_more();
    session.begin_shutdown();
    assert_ended(session, &in_flight);
    let (mut session, in_flight) = answered_and_two_more();
    session.end();
    assert_ended(session, &in_flight);
}

#[test]
fn what_arrives_when_the_session_has_ended_is_not_run() {
    let write = [request(0, 1, 1, 4096, 4096), vec![7; 4096], request(0, 3, 2, 0, 0)].concat();
    for cut in [0, 10, 28, 100, 28 + 4096, 28 + 4096 + 28] {
        let mut session = attached();
        let mut left = &write[..cut];
        let mut awaits_buffer = false;
        while !left.is_empty() {
            let Want::Read { first, then } = session.want() else { panic!("it reads") };
            let size = left.len().min(first.len() + then.len());
            let (into_first, into_then) = left[..size].split_at(size.min(first.len()));
            first[..into_first.len()].copy_from_slice(into_first);
            then[..into_then.len()].copy_from_slice(into_then);
            session.received(size);
            left = &left[size..];
            awaits_buffer = matches!(session.next_event(), Ok(Some(Event::PayloadBuffer { .. })));
            if awaits_buffer && !left.is_empty() {
                session.payload_buffer(AlignedBuf::zeroed(4096));
            }
        }
        session.end();
        if awaits_buffer {
            session.payload_buffer(AlignedBuf::zeroed(4096));
        }
        assert!(matches!(session.next_event(), Ok(None)), "{cut}");
        assert!(matches!(session.want(), Want::Close), "{cut}");
    }
}

#[test]
fn a_command_in_flight_is_known_by_what_its_client_calls_it() {
    let mut session = attached();
    let handle = 0x0000_0007_0003_0009;
    feed(&mut session, &[request(0, 3, handle, 0, 0), request(0, 0, 5, 0, 512)].concat());
    for expected in [handle, 5] {
        let Ok(Some(Event::Command { id, .. })) = session.next_event() else { panic!("a command") };
        assert_eq!(session.handle_of(id), expected);
    }
}
