//! Feeds bytes to an NBD session as a hostile client and a slow server would.

use std::collections::VecDeque;

use ballast_block::command::{ReadPart, StatusExtent};
use ballast_block::limits::{
    CONNECTION_INFLIGHT_BYTES_MAX, CONNECTION_INFLIGHT_COMMANDS_MAX, NBD_REQUEST_BYTES_MAX,
    NBD_STATUS_EXTENTS_MAX,
};
use ballast_block::{AlignedBuf, ByteRange, IoCommand, IoError, IoReply};
use ballast_nbd::{
    Access, CommandId, Event, ExportInfo, OpenExport, OpenExportError, Session, Want,
};
use bytes::{Buf, Bytes};

/// Size of the volume in bytes: large enough for the largest request.
pub const SIZE: u64 = 64 << 20;

/// Replies may exceed the window by what is on its way when it fills: one list of exports in the
/// handshake, and in the transmission a header, extents or words for each command.
const REPLIES_BYTES_MAX: usize = CONNECTION_INFLIGHT_BYTES_MAX
    + CONNECTION_INFLIGHT_COMMANDS_MAX * (8 * NBD_STATUS_EXTENTS_MAX + 4096);

/// A client that chose `disk`, with structured replies and block status.
pub fn attached_prefix() -> Vec<u8> {
    let option = |number: u32, data: &[u8]| {
        let length = (data.len() as u32).to_be_bytes();
        [b"IHAVEOPT", &number.to_be_bytes()[..], &length, data].concat()
    };
    let context = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    let flags = vec![0, 0, 0, 3];
    [flags, option(8, b""), option(10, context), option(7, b"\0\0\0\x04disk\0\0")].concat()
}

/// Takes numbers from the front of a plan; zeroes when it is used up.
pub struct Plan<'a>(pub &'a [u8]);

impl Plan<'_> {
    fn next(&mut self) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first)
    }
}

/// Runs a session over `input`. `plan` decides the sizes of pieces, the order of completions, how
/// much is sent, and what fails.
///
/// # Panics
/// When the session breaks a promise: that is what fuzzing looks for.
pub fn run(input: &[u8], plan: &mut Plan<'_>) {
    let mut session = Session::new();
    let mut commands = VecDeque::new();
    let mut left = input;
    loop {
        match session.next_event() {
            Err(_) => return fail(session, commands),
            Ok(Some(event)) => answer(&mut session, event, &mut commands, plan),
            Ok(None) => {}
        }
        assert!(session.commands_in_flight() <= CONNECTION_INFLIGHT_COMMANDS_MAX);
        assert!(session.replies().remaining() <= REPLIES_BYTES_MAX);
        match plan.next() {
            choice if choice % 4 == 1 => complete_one(&mut session, &mut commands, plan, choice),
            choice if choice % 4 == 2 => send(&mut session, choice * 64),
            _ => {}
        }
        let (fed, closed) = feed(&mut session, left, plan.next());
        left = &left[fed..];
        if closed {
            return;
        }
        if fed == 0 && !settle(&mut session, &mut commands, plan) {
            return;
        }
    }
}

/// With nothing to feed: makes progress some other way; `false` when none is left.
fn settle(
    session: &mut Session,
    commands: &mut VecDeque<(CommandId, IoCommand)>,
    plan: &mut Plan<'_>,
) -> bool {
    match session.next_event() {
        Err(_) => return false,
        Ok(Some(event)) => {
            answer(session, event, commands, plan);
            return true;
        }
        Ok(None) => {}
    }
    if session.replies().has_remaining() {
        send(session, usize::MAX);
        return true;
    }
    if !commands.is_empty() {
        complete_one(session, commands, plan, 0);
        return true;
    }
    let stuck = matches!(session.want(), Want::Nothing);
    assert!(!stuck, "all is answered and sent, yet nothing is wanted");
    false
}

/// A failed session takes completions, stays failed, and wants to be closed.
fn fail(mut session: Session, commands: VecDeque<(CommandId, IoCommand)>) {
    for (id, _) in commands {
        session.complete(id, Err(IoError::ShuttingDown));
    }
    assert!(session.next_event().is_err());
    assert!(matches!(session.want(), Want::Close));
}

fn feed(session: &mut Session, left: &[u8], size: usize) -> (usize, bool) {
    match session.want() {
        Want::Close => (0, true),
        Want::Nothing => (0, false),
        Want::Read { first, then } => {
            assert!(!first.is_empty(), "an empty read looks like the end of the stream");
            let size = (size + 1) * (size + 1);
            let size = size.min(left.len()).min(first.len() + then.len());
            let (into_first, into_then) = left[..size].split_at(size.min(first.len()));
            first[..into_first.len()].copy_from_slice(into_first);
            then[..into_then.len()].copy_from_slice(into_then);
            session.received(size);
            (size, false)
        }
    }
}

fn send(session: &mut Session, count: usize) {
    let replies = session.replies();
    let count = count.min(replies.remaining());
    replies.advance(count);
    assert_eq!(replies.chunk().is_empty(), !replies.has_remaining());
}

fn answer(
    session: &mut Session,
    event: Event,
    commands: &mut VecDeque<(CommandId, IoCommand)>,
    plan: &mut Plan<'_>,
) {
    match event {
        Event::ListExports => session.exports_listed(Ok(vec!["disk".into(); plan.next()])),
        Event::OpenExport(open) => session.export_opened(opened(&open)),
        Event::PayloadBuffer { length } => {
            assert!(length > 0 && length <= NBD_REQUEST_BYTES_MAX);
            session.payload_buffer(AlignedBuf::zeroed(length));
        }
        Event::Command { id, command } => {
            check(&command);
            commands.push_back((id, command));
        }
    }
}

fn opened(open: &OpenExport) -> Result<ExportInfo, OpenExportError> {
    match open.name.volume.as_deref() {
        Some("disk") | None => Ok(ExportInfo {
            name: "disk".into(),
            description: "fuzzed".into(),
            size: SIZE,
            read_only: open.name.access == Access::ReadOnly,
            multi_connection: true,
        }),
        Some(_) => Err(OpenExportError::Unknown),
    }
}

/// Whatever the client sent, a command is within the volume and the limits.
fn check(command: &IoCommand) {
    let range = match command {
        IoCommand::Flush => return,
        IoCommand::Write { range, data } => {
            assert_eq!(range.length, data.len() as u64);
            range
        }
        IoCommand::Read { range } => {
            assert!(range.length <= NBD_REQUEST_BYTES_MAX as u64);
            range
        }
        IoCommand::Trim { range }
        | IoCommand::WriteZeroes { range, .. }
        | IoCommand::BlockStatus { range } => range,
    };
    assert!(range.length > 0);
    range.check_inside(SIZE).expect("the session has checked it");
}

fn complete_one(
    session: &mut Session,
    commands: &mut VecDeque<(CommandId, IoCommand)>,
    plan: &mut Plan<'_>,
    which: usize,
) {
    if commands.is_empty() {
        return;
    }
    let (id, command) = commands.remove(which % commands.len()).expect("an index within");
    let result = if plan.next() % 8 == 7 { Err(IoError::NoSpace) } else { Ok(reply(&command)) };
    session.complete(id, result);
}

fn reply(command: &IoCommand) -> IoReply {
    match command {
        IoCommand::Read { range: ByteRange { length, .. } } => {
            let data = (*length).min(700);
            let part = ReadPart::Data(Bytes::from(vec![1; data as usize]));
            IoReply::Data(vec![part, ReadPart::Hole(length - data)])
        }
        IoCommand::BlockStatus { range } => {
            let extent =
                |number| StatusExtent { length: 1 + range.length / 9, allocated: number % 2 == 0 };
            IoReply::Status((0..9).map(extent).collect())
        }
        _ => IoReply::Done,
    }
}
