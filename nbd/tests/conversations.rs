//! Whole conversations, byte by byte as the protocol document has them, and hostile ones.

mod client;
#[path = "conversations/endings.rs"]
mod endings;

use ballast_block::limits::{
    CONNECTION_INFLIGHT_BYTES_MAX, CONNECTION_INFLIGHT_COMMANDS_MAX, NBD_OPTION_BYTES_MAX,
    NBD_OPTIONS_MAX, NBD_REQUEST_BYTES_MAX,
};
use ballast_block::{AlignedBuf, IoReply};
use ballast_nbd::{
    Event, ExportNameError, ListExportsError, OpenExportError, Session, SessionError, Want,
};
use bytes::Buf;
use client::{SIZE, converse, converse_across_threads, export, go, meta, option, request, string};
use proptest::prelude::*;

const FLAGS: &[u8] = &[0, 0, 0, 3];
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const REPLY: &[u8] = &[0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = data.len() as u32;
    [REPLY, &option.to_be_bytes(), &kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn ack(option: u32) -> Vec<u8> {
    answer(option, 1, b"")
}

fn error(option: u32, kind: u32, message: &str) -> Vec<u8> {
    answer(option, (1 << 31) + kind, message.as_bytes())
}

fn export_info(option: u32, flags: u16) -> Vec<u8> {
    let export = [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
    let sizes = [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 0, 0x10, 0, 0];
    [answer(option, 3, &export), answer(option, 3, &sizes)].concat()
}

/// Sends `options`, expects `answers` to each and that the connection stays.
fn negotiate(options: &[Vec<u8>], answers: &[Vec<u8>]) {
    let seen = converse(&[FLAGS, &options.concat()].concat(), &[usize::MAX]);
    assert_eq!(seen.error, None);
    let expected = [GREETING, &answers.concat()].concat();
    assert_eq!(seen.sent.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

fn fails(input: &[u8]) -> SessionError {
    converse(input, &[usize::MAX]).error.expect("the session fails")
}

#[test]
fn export_name() {
    let open = [FLAGS, &option(1, b"disk")].concat();
    let seen = converse(&open, &[usize::MAX]);
    // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CACHE, FAST_ZERO; no DF without structured replies
    let expected = [GREETING, &SIZE.to_be_bytes(), &[0x0c, 0x6d]].concat();
    assert_eq!(seen.sent, expected);
    assert_eq!((seen.error, seen.closed), (None, false));

    let padded = [&[0, 0, 0, 1], &option(1, b"disk")[..]].concat();
    let seen = converse(&padded, &[usize::MAX]);
    assert_eq!(seen.sent, [&expected[..], &[0; 124]].concat());

    let unknown = fails(&[FLAGS, &option(1, b"nosuch")].concat());
    assert_eq!(unknown, SessionError::ExportRefused(OpenExportError::Unknown));
    let invalid = fails(&[FLAGS, &option(1, b"disk@rw")].concat());
    assert_eq!(invalid, SessionError::ExportNameInvalid(ExportNameError::UnknownSuffix));
}

#[test]
fn go_and_info() {
    let infos = [answer(6, 3, b"\0\x01disk"), answer(6, 3, b"\0\x02a disk")].concat();
    negotiate(
        &[option(8, b""), go(6, "disk", &[3, 1, 2, 99]), go(7, "disk@ro", &[])],
        &[ack(8), export_info(6, 0x0ced), infos, ack(6), export_info(7, 0x048f), ack(7)],
    );
}

#[test]
fn list() {
    let disk = answer(3, 2, &string("disk"));
    negotiate(&[option(3, b"")], &[disk, answer(3, 2, &string("other")), ack(3)]);
    negotiate(&[option(3, b"x")], &[error(3, 3, "option takes no data")]);
}

#[test]
fn list_that_is_forbidden() {
    let mut session = Session::new();
    feed(&mut session, &[FLAGS, &option(3, b"")].concat());
    assert!(matches!(session.next_event(), Ok(Some(Event::ListExports))));
    session.exports_listed(Err(ListExportsError::Forbidden));
    let message = "listing exports is switched off on this node; name the export";
    assert_eq!(sent(&mut session), [GREETING, &error(3, 2, message)].concat());
}

#[test]
fn abort() {
    let seen = converse(&[FLAGS, &option(2, b""), b"junk"].concat(), &[usize::MAX]);
    assert_eq!(seen.sent, [GREETING, &ack(2)].concat());
    assert!(seen.closed);
}

#[test]
fn refused_options() {
    let tls = "this server has no TLS for NBD; protect the network instead";
    let extended = "extended headers are not supported; use structured replies";
    negotiate(
        &[option(5, b""), option(11, b""), option(4, b"x"), option(77, b"y")],
        &[
            error(5, 1, tls),
            error(11, 1, extended),
            error(4, 1, "option is not known"),
            error(77, 1, "option is not known"),
        ],
    );
    let shape = "option data is not a name and a list of information types";
    negotiate(&[option(7, b"\0\0\0\x05disk\0\0")], &[error(7, 3, shape)]);
    let big = option(77, &vec![0; NBD_OPTION_BYTES_MAX + 1]);
    negotiate(&[big, option(8, b"")], &[error(77, 9, "option data is over 8192 bytes"), ack(8)]);
}

#[test]
fn refused_exports() {
    let held = "volume is attached for writing by node-2; detach it there first, or add @ro to the \
                name to read it";
    let unknown = "no volume of this name; list the exports to see which there are";
    let suffix = "export name ends in an unknown \"@\" part; use NAME, NAME@ro to open it \
                  read-only, or NAME@lease=EPOCH or NAME@ro,lease=EPOCH to open it under a lease; further connections of a session \
                  that writes add session=16 HEX DIGITS,lane=0 to 15";
    negotiate(
        &[go(7, "held", &[]), go(7, "nosuch", &[]), go(7, "disk@token=7", &[]), option(8, b"")],
        &[error(7, 2, held), error(7, 6, unknown), error(7, 3, suffix), ack(8)],
    );
}

#[test]
fn meta_contexts() {
    let context =
        |number, id: u8| answer(number, 4, &[&[0, 0, 0, id][..], b"base:allocation"].concat());
    let early = "metadata contexts need structured replies; negotiate them first";
    negotiate(
        &[
            meta(10, "disk", &["base:allocation"]),
            option(8, b""),
            meta(9, "disk", &[]),
            meta(9, "disk", &["base:"]),
            meta(9, "disk", &["qemu:"]),
            meta(10, "disk", &["base:"]),
            meta(10, "disk", &[]),
            meta(10, "disk", &["x-y:z", "base:allocation", "base:allocation"]),
        ],
        &[
            error(10, 3, early),
            ack(8),
            [context(9, 0), ack(9)].concat(),
            [context(9, 0), ack(9)].concat(),
            ack(9),
            ack(10),
            ack(10),
            [context(10, 1), ack(10)].concat(),
        ],
    );
    let query = "metadata query is not \"namespace:\" or \"namespace:leaf\"";
    let many = "too many metadata queries; send one at a time";
    negotiate(
        &[option(8, b""), meta(10, "disk", &["base"]), meta(10, "disk", &["a:"; 65])],
        &[ack(8), error(10, 3, query), error(10, 9, many)],
    );
}

#[test]
fn violations_of_the_handshake() {
    assert_eq!(fails(&[0, 0, 0, 7]), SessionError::UnknownClientFlags { flags: 7 });
    let found = u64::from_be_bytes(*b"GET / HT");
    let http = [FLAGS, b"GET / HTTP/1.1\r\n\r\n"].concat();
    assert_eq!(fails(&http), SessionError::BadOptionMagic { found });
    let header = [FLAGS, b"IHAVEOPT\0\0\0\x07\x7f\0\0\0"].concat();
    let too_large = SessionError::OptionTooLarge { option: 7, length: 0x7f00_0000 };
    assert_eq!(fails(&header), too_large);
    let many = [FLAGS, &option(77, b"").repeat(NBD_OPTIONS_MAX + 1)].concat();
    assert_eq!(fails(&many), SessionError::TooManyOptions);
}

const SIMPLE: &[u8] = &[0x67, 0x44, 0x66, 0x98];
const CHUNK: &[u8] = &[0x66, 0x8e, 0x33, 0xef];

fn cookie(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

/// What is sent in answer to `requests`, after a handshake with what `options` ask for.
fn transmit(options: &[Vec<u8>], requests: &[Vec<u8>]) -> client::Seen {
    let start = [FLAGS, &options.concat(), &go(7, "disk", &[])].concat();
    let before = converse(&start, &[usize::MAX]).sent.len();
    let mut seen = converse(&[start, requests.concat()].concat(), &[usize::MAX]);
    seen.sent.drain(..before);
    seen
}

#[test]
fn simple_replies() {
    let done = |number| [SIMPLE, &[0; 4], &cookie(number)].concat();
    let seen = transmit(
        &[],
        &[
            request(0, 0, 1, 0, 8),
            [request(1, 1, 2, 4096, 4), b"data".to_vec()].concat(),
            request(1, 3, 3, 0, 0),
            request(0, 4, 4, 0, 512),
            request(0b10010, 6, 5, 0, 512),
            request(0, 5, 6, 0, 512),
            [request(0, 1, 7, SIZE - 3, 4), b"data".to_vec()].concat(),
            request(0, 0, 8, SIZE, 1),
            request(0, 7, 9, 0, 512),
            request(0, 2, 10, 0, 0),
        ],
    );
    let failed = |number, errno| [SIMPLE, &[0, 0, 0, errno], &cookie(number)].concat();
    let expected = [
        [&done(1)[..], b"xxx\0\0\0xx"].concat(),
        done(2),
        done(3),
        done(4),
        done(5),
        done(6),
        failed(7, 28),
        failed(8, 22),
        failed(9, 22),
    ];
    assert_eq!(seen.sent, expected.concat());
    assert_eq!(seen.error, None);
    assert!(seen.closed);
    assert!(seen.events.iter().any(|event| event.ends_with("[100, 97, 116, 97]")));
}

#[test]
fn structured_replies() {
    let options = [option(8, b""), meta(10, "disk", &["base:allocation"])];
    let seen = transmit(
        &options,
        &[
            request(0, 0, 1, 16, 8),
            request(0, 7, 2, 0, 8192),
            request(8, 7, 3, 0, 8192),
            request(0, 3, 4, 0, 0),
            request(0, 9, 5, 0, 0),
            request(0, 0, 6, 0, 0),
        ],
    );
    let chunk = |done: u8, kind: u16, number, data: &[u8]| {
        let length = data.len() as u32;
        let kind = kind.to_be_bytes();
        [CHUNK, &[0, done], &kind, &cookie(number), &length.to_be_bytes(), data].concat()
    };
    let at = |offset: u64, rest: &[u8]| [&offset.to_be_bytes(), rest].concat();
    let message = b"command 9 is not known to this server";
    let expected = [
        chunk(0, 1, 1, &at(16, b"xxx")),
        chunk(0, 2, 1, &at(19, &[0, 0, 0, 3])),
        chunk(1, 1, 1, &at(22, b"xx")),
        chunk(1, 5, 2, &[0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 3]),
        chunk(1, 5, 3, &[0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0]),
        [SIMPLE, &[0; 4], &cookie(4)].concat(),
        chunk(1, 0x8001, 5, &[&[0, 0, 0, 22, 0, message.len() as u8], &message[..]].concat()),
        chunk(1, 0, 6, b""),
    ];
    assert_eq!(seen.sent.escape_ascii().to_string(), expected.concat().escape_ascii().to_string());
}

#[test]
fn contexts_hold_for_their_export_only() {
    let options = [option(8, b""), meta(10, "other", &["base:allocation"])];
    let seen = transmit(&options, &[request(0, 7, 1, 0, 512)]);
    assert_eq!(seen.sent[4..8], [0, 1, 0x80, 1]);
    assert_eq!(seen.sent[20..24], [0, 0, 0, 22]);
}

#[test]
fn violations_of_the_transmission() {
    let bad = transmit(&[], &[b"IHAVEOPT\0\0\0\x07\0\0\0\0____________".to_vec()]);
    assert_eq!(bad.error, Some(SessionError::BadRequestMagic { found: 0x4948_4156 }));
    let length = NBD_REQUEST_BYTES_MAX as u32 + 1;
    let refused = transmit(&[], &[request(0, 0, 1, 0, u32::MAX), request(0, 3, 2, 0, 0)]);
    assert_eq!(refused.sent.len(), 32, "a read that never fits is refused, the next is served");
    let bad = transmit(&[], &[request(0, 1, 1, 0, length)]);
    assert_eq!(bad.error, Some(SessionError::WriteTooLarge { length }));
}

/// Gives the session all of `input`, as far as it takes it, without looking at events.
fn feed(session: &mut Session, mut input: &[u8]) -> usize {
    let all = input.len();
    while let Want::Read { first, .. } = session.want() {
        let size = first.len().min(input.len());
        if size == 0 {
            break;
        }
        first[..size].copy_from_slice(&input[..size]);
        session.received(size);
        input = &input[size..];
    }
    all - input.len()
}

fn sent(session: &mut Session) -> Vec<u8> {
    let replies = session.replies();
    replies.copy_to_bytes(replies.remaining()).to_vec()
}

fn attached() -> Session {
    let mut session = Session::new();
    feed(&mut session, &[FLAGS, &go(7, "disk", &[])].concat());
    assert!(matches!(session.next_event(), Ok(Some(Event::OpenExport(_)))));
    session.export_opened(Ok(ballast_nbd::ExportInfo { size: 1 << 40, ..export() }));
    sent(&mut session);
    session
}

#[test]
fn commands_in_flight_are_bounded() {
    let mut session = attached();
    let mut requests = &request(0, 3, 1, 0, 0).repeat(300)[..];
    let mut ids = Vec::new();
    loop {
        let taken = feed(&mut session, requests);
        requests = &requests[taken..];
        match session.next_event().expect("no violation") {
            Some(Event::Command { id, .. }) => ids.push(id),
            Some(other) => panic!("{other:?}"),
            None => break,
        }
    }
    assert_eq!(ids.len(), CONNECTION_INFLIGHT_COMMANDS_MAX);
    assert_eq!(session.commands_in_flight(), ids.len());
    assert!(matches!(session.want(), Want::Nothing));
    // out of order
    session.complete(ids.pop().expect("many"), Ok(IoReply::Done));
    assert!(matches!(session.next_event(), Ok(Some(Event::Command { .. }))));
    assert!(matches!(session.next_event(), Ok(None)));
}

#[test]
fn bytes_in_flight_are_bounded() {
    let mut session = attached();
    let large = NBD_REQUEST_BYTES_MAX as u32;
    let mut ids = Vec::new();
    feed(&mut session, &request(0, 0, 1, 0, large).repeat(3));
    while let Some(Event::Command { id, .. }) = session.next_event().expect("no violation") {
        ids.push(id);
    }
    assert_eq!(ids.len() * NBD_REQUEST_BYTES_MAX, CONNECTION_INFLIGHT_BYTES_MAX);
    assert!(matches!(session.want(), Want::Nothing));
    let hole = ballast_block::command::ReadPart::Hole(u64::from(large));
    session.complete(ids[0], Ok(IoReply::Data(vec![hole])));
    // the reply counts until it is sent
    assert!(matches!(session.next_event(), Ok(None)));
    assert!(matches!(session.want(), Want::Nothing));
    session.replies().advance(NBD_REQUEST_BYTES_MAX + 16);
    assert!(matches!(session.next_event(), Ok(Some(Event::Command { .. }))));
}

#[test]
fn handshake_answers_are_bounded() {
    let mut session = Session::new();
    feed(&mut session, FLAGS);
    assert!(matches!(session.next_event(), Ok(None)));
    let options = option(77, b"").repeat(NBD_OPTIONS_MAX);
    let mut left = &options[..];
    loop {
        let taken = feed(&mut session, left);
        left = &left[taken..];
        assert!(matches!(session.next_event(), Ok(None)));
        if matches!(session.want(), Want::Nothing) {
            break;
        }
    }
    assert!(!left.is_empty());
    assert!(session.replies().remaining() < 65 << 10);
    sent(&mut session);
    assert!(matches!(session.next_event(), Ok(None)));
    assert!(matches!(session.want(), Want::Read { .. }));
}

#[test]
fn payload_goes_straight_into_the_buffer() {
    let mut session = attached();
    feed(&mut session, &request(0, 1, 1, 0, 8192));
    assert!(matches!(session.next_event(), Ok(Some(Event::PayloadBuffer { length: 8192 }))));
    assert!(matches!(session.want(), Want::Nothing));
    let buffer = AlignedBuf::zeroed(8192);
    let memory = buffer.as_ptr();
    session.payload_buffer(buffer);
    assert!(matches!(session.next_event(), Ok(None)));
    match session.want() {
        Want::Read { first, then } => {
            assert_eq!((first.as_ptr(), first.len()), (memory, 8192));
            // only the next header: what follows it belongs into another buffer
            assert_eq!(then.len(), 28);
            first.fill(7);
            then.copy_from_slice(&request(0, 1, 2, 8192, 4096));
        }
        other => panic!("{other:?}"),
    }
    session.received(8192 + 28);
    match session.next_event() {
        Ok(Some(Event::Command {
            command: ballast_block::IoCommand::Write { range, data },
            ..
        })) => {
            assert_eq!((range.offset, range.length), (0, 8192));
            assert_eq!(data.as_ptr(), memory);
            assert!(data.iter().all(|byte| *byte == 7));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(session.next_event(), Ok(Some(Event::PayloadBuffer { length: 4096 }))));
}

#[test]
fn goodbye_waits_for_what_is_in_flight() {
    let mut session = attached();
    feed(&mut session, &[request(0, 3, 1, 0, 0), request(0, 2, 2, 0, 0)].concat());
    let Ok(Some(Event::Command { id, .. })) = session.next_event() else { panic!("a flush") };
    assert!(matches!(session.next_event(), Ok(None)));
    assert!(matches!(session.want(), Want::Nothing));
    session.complete(id, Ok(IoReply::Done));
    assert!(matches!(session.want(), Want::Nothing));
    assert_eq!(sent(&mut session).len(), 16);
    assert!(matches!(session.want(), Want::Close));
}

#[test]
#[should_panic(expected = "only commands in flight are completed")]
fn completing_twice_is_a_bug() {
    let mut session = attached();
    feed(&mut session, &request(0, 3, 1, 0, 0));
    let Ok(Some(Event::Command { id, .. })) = session.next_event() else { panic!("a flush") };
    session.complete(id, Ok(IoReply::Done));
    session.complete(id, Ok(IoReply::Done));
}

#[test]
fn exports_are_opened_by_other_threads() {
    let requests = [
        [request(0, 1, 1, 4096, 3), b"abc".to_vec()].concat(),
        request(1, 0, 2, 0, 8192),
        request(0, 7, 3, 0, 65536),
        request(0, 2, 4, 0, 0),
    ]
    .concat();
    let structured = [option(8, b""), meta(10, "disk", &["base:allocation"])].concat();
    let refused = [go(6, "disk", &[1]), go(7, "held", &[]), go(7, "nosuch", &[])].concat();
    for (handshake, opens) in [
        ([FLAGS, &go(7, "disk", &[3])].concat(), 1),
        ([FLAGS, &option(1, b"disk")].concat(), 1),
        ([&[0, 0, 0, 1], &option(1, b"disk@ro")[..]].concat(), 1),
        ([FLAGS, &option(1, b"nosuch")].concat(), 1),
        ([FLAGS, &structured, &go(7, "disk", &[])].concat(), 1),
        ([FLAGS, &structured, &option(1, b"disk")].concat(), 1),
        ([FLAGS, &refused, &structured, &option(3, b""), &go(7, "disk", &[])].concat(), 4),
    ] {
        let input = [handshake, requests.clone()].concat();
        for piece in [usize::MAX, 1, 50] {
            let stays = converse(&input, &[piece]);
            assert_eq!(converse_across_threads(&input, &[piece]), stays);
            assert_eq!(stays.closed, stays.error.is_none());
            let opened = stays.events.iter().filter(|event| event.starts_with("OpenExport"));
            assert_eq!(opened.count(), opens);
        }
    }
}

#[test]
fn what_is_not_sent_yet_moves_along() {
    let mut session = Session::new();
    feed(&mut session, &[FLAGS, &option(8, b""), &go(7, "disk", &[])].concat());
    assert!(matches!(session.next_event(), Ok(Some(Event::OpenExport(_)))));
    session.begin_shutdown();
    let mut session = Session::resume(session.suspend());
    session.export_opened(Ok(export()));
    let opened = [export_info(7, 0x0ced), ack(7)].concat();
    assert_eq!(sent(&mut session), [GREETING, &ack(8), &opened].concat());
    assert!(session.is_over(), "it still knows that the node stops");
    assert!(matches!(session.want(), Want::Close));
}

#[test]
#[should_panic(expected = "suspended while it was not asking to open an export")]
fn suspending_a_session_that_asks_nothing_is_a_bug() {
    attached().suspend();
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop::sample::select(vec!["", "disk", "held", "nosuch", "disk@x"]);
    let query = prop::sample::select(vec!["base:", "base:allocation", "x-a:b", "nocolon"]);
    prop_oneof![
        (0u32..14, prop::collection::vec(any::<u8>(), 0..20))
            .prop_filter("not final", |(number, _)| ![1, 2, 7].contains(number))
            .prop_map(|(number, data)| option(number, &data)),
        Just(option(8, b"")),
        Just(option(77, &[0; NBD_OPTION_BYTES_MAX + 5])),
        (name.clone(), prop::collection::vec(0u16..5, 0..4))
            .prop_map(|(name, infos)| go(6, name, &infos)),
        (9u32..11, name, prop::collection::vec(query, 0..4))
            .prop_map(|(number, name, queries)| meta(number, name, &queries)),
    ]
}

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let near = prop_oneof![0..SIZE, SIZE - 600..SIZE + 600, Just(u64::MAX - 5)];
    let flags = prop_oneof![Just(0u16), Just(1u16), 0..32u16];
    (flags, 0u16..9, any::<u64>(), near, 0u32..5000)
        .prop_filter("not final", |fields| fields.1 != 2)
        .prop_map(|(flags, command, cookie, offset, length)| {
            let payload = if command == 1 { length as usize } else { 0 };
            let mut bytes = request(flags, command, cookie, offset, length);
            bytes.extend((0..payload).map(|index| index as u8));
            bytes
        })
}

fn any_conversation() -> impl Strategy<Value = Vec<u8>> {
    let options = prop::collection::vec(any_option(), 0..6);
    let requests = prop::collection::vec(any_request(), 0..12);
    (options, "disk(@ro)?", requests).prop_map(|(options, name, requests)| {
        [FLAGS, &options.concat(), &go(7, &name, &[3]), &requests.concat()].concat()
    })
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        input in any_conversation(),
        pieces in prop::collection::vec(prop_oneof![1usize..40, 1usize..9000], 1..20),
    ) {
        let whole = converse(&input, &[usize::MAX]);
        prop_assert_eq!(&whole.error, &None);
        prop_assert_eq!(&converse(&input, &[1]), &whole);
        prop_assert_eq!(&converse(&input, &pieces), &whole);
        prop_assert_eq!(&converse_across_threads(&input, &[usize::MAX]), &whole);
        prop_assert_eq!(&converse_across_threads(&input, &pieces), &whole);
    }

    #[test]
    fn garbage_never_panics(
        mut input in any_conversation(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        piece in 1usize..100,
    ) {
        for (index, byte) in damage {
            let index = index.index(input.len());
            input[index] = byte;
        }
        prop_assert_eq!(converse(&input, &[usize::MAX]), converse(&input, &[piece]));
    }

    #[test]
    fn noise_never_panics(input in prop::collection::vec(any::<u8>(), 0..2000)) {
        converse(&input, &[usize::MAX]);
        converse(&[FLAGS, &go(7, "disk", &[]), &input].concat(), &[7]);
    }
}
