//! The client's side of the protocol in bytes, and a driver that feeds it to a session.
//!
//! Written from the protocol document, not from the crate's own encoder.

use ballast_block::command::{ReadPart, StatusExtent};
use ballast_block::{AlignedBuf, IoCommand, IoError, IoReply};
use ballast_nbd::{CommandId, Event, ExportInfo, OpenExport, Purpose, Session, SessionError, Want};
use bytes::{Buf, Bytes};

pub const SIZE: u64 = 8 << 20;

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &length, data].concat()
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

pub fn go(number: u32, name: &str, infos: &[u16]) -> Vec<u8> {
    let infos: Vec<u8> =
        [infos.len() as u16].iter().chain(infos).flat_map(|info| info.to_be_bytes()).collect();
    option(number, &[string(name), infos].concat())
}

pub fn meta(number: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes().to_vec();
    let queries: Vec<u8> = queries.iter().flat_map(|query| string(query)).collect();
    option(number, &[string(name), count, queries].concat())
}

pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

pub fn export() -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: "a disk".into(),
        size: SIZE,
        read_only: false,
        multi_connection: false,
    }
}

/// What a test saw of a session.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub events: Vec<String>,
    pub sent: Vec<u8>,
    pub error: Option<SessionError>,
    pub closed: bool,
}

/// Feeds `input` in pieces of the given sizes (over and over), answering all at once.
pub fn converse(input: &[u8], pieces: &[usize]) -> Seen {
    go_on(Session::new(), Seen::default(), input, pieces, false)
}

/// The same, but wherever an export is to be opened another thread answers and goes on.
pub fn converse_across_threads(input: &[u8], pieces: &[usize]) -> Seen {
    go_on(Session::new(), Seen::default(), input, pieces, true)
}

fn go_on(
    mut session: Session,
    mut seen: Seen,
    mut left: &[u8],
    pieces: &[usize],
    moves: bool,
) -> Seen {
    for size in pieces.iter().cycle() {
        match take_events(&mut session, &mut seen, moves) {
            Ok(None) => {}
            Ok(Some(open)) => {
                let suspended = session.suspend();
                let elsewhere = move || {
                    let mut session = Session::resume(suspended);
                    session.export_opened(opened(&open));
                    go_on(session, seen, left, pieces, moves)
                };
                return std::thread::scope(|scope| scope.spawn(elsewhere).join().unwrap());
            }
            Err(error) => {
                let sent = session.replies();
                seen.sent.extend(sent.copy_to_bytes(sent.remaining()));
                seen.error = Some(error);
                break;
            }
        }
        match session.want() {
            Want::Close => {
                seen.closed = true;
                break;
            }
            Want::Nothing => panic!("all is answered and sent, yet nothing is wanted"),
            Want::Read { .. } if left.is_empty() => break,
            Want::Read { first, then } => {
                let size = (*size).max(1).min(left.len()).min(first.len() + then.len());
                let (into_first, into_then) = left[..size].split_at(size.min(first.len()));
                first[..into_first.len()].copy_from_slice(into_first);
                then[..into_then.len()].copy_from_slice(into_then);
                session.received(size);
                left = &left[size..];
            }
        }
    }
    seen
}

/// Answers all events, but not the opening of an export when the session moves there.
fn take_events(
    session: &mut Session,
    seen: &mut Seen,
    moves: bool,
) -> Result<Option<OpenExport>, SessionError> {
    loop {
        let sent = session.replies();
        seen.sent.extend(sent.copy_to_bytes(sent.remaining()));
        let Some(event) = session.next_event()? else {
            let sent = session.replies();
            if !sent.has_remaining() {
                return Ok(None);
            }
            continue;
        };
        seen.events.push(describe(&event));
        match event {
            Event::OpenExport(open) if moves => return Ok(Some(open)),
            event => answer(session, event),
        }
    }
}

/// Everything there is to an event, so that two can be compared.
fn describe(event: &Event) -> String {
    match event {
        Event::Command { command: IoCommand::Write { range, data }, .. } => {
            format!("write {range:?} {:?}", &data[..])
        }
        other => format!("{other:?}"),
    }
}

fn answer(session: &mut Session, event: Event) {
    match event {
        Event::ListExports => session.exports_listed(Ok(vec!["disk".into(), "other".into()])),
        Event::OpenExport(open) => session.export_opened(opened(&open)),
        Event::PayloadBuffer { length } => session.payload_buffer(AlignedBuf::zeroed(length)),
        Event::Command { id, command } => complete(session, id, &command),
    }
}

fn opened(open: &OpenExport) -> Result<ExportInfo, ballast_nbd::OpenExportError> {
    match open.name.volume.as_deref() {
        Some("held") if open.purpose == Purpose::Attach => {
            Err(ballast_nbd::OpenExportError::AlreadyAttached { holder: "node-2".into() })
        }
        Some("disk" | "held") | None => Ok(ExportInfo {
            read_only: open.name.access == ballast_nbd::Access::ReadOnly,
            ..export()
        }),
        Some(_) => Err(ballast_nbd::OpenExportError::Unknown),
    }
}

/// Canned results: reads find data, a hole, data; writes to the last block fail.
fn complete(session: &mut Session, id: CommandId, command: &IoCommand) {
    let result = match command {
        IoCommand::Read { range } => {
            let first = range.length.min(3);
            let last = (range.length - first).min(2);
            let hole = range.length - first - last;
            let data = |length| ReadPart::Data(Bytes::from(vec![b'x'; length as usize]));
            Ok(IoReply::Data(vec![data(first), ReadPart::Hole(hole), data(last)]))
        }
        IoCommand::Write { range, .. } if range.end() == SIZE => Err(IoError::NoSpace),
        IoCommand::BlockStatus { range } => Ok(IoReply::Status(vec![
            StatusExtent { length: 4096, allocated: true },
            StatusExtent { length: range.length, allocated: false },
        ])),
        _ => Ok(IoReply::Done),
    };
    session.complete(id, result);
}
