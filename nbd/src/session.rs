//! One connection: the handshake, then requests until the client says good-bye.
//!
//! Owns the life of a request as one enum ([`Receiving`], then a slot in
//! [`InFlight`]). Never reads, writes or waits: see [`Want`]. Write path, step 2.

use std::rc::Rc;
use std::task::{Poll, Waker};

use ballast_block::limits::{NBD_HANDSHAKE_REPLY_BYTES_MAX, NBD_REQUEST_BYTES_MAX};
use ballast_block::{AlignedBuf, ByteRange, IoCommand, IoError, IoReply};
use bytes::Buf;

use crate::error::SessionError;
use crate::export::{ExportInfo, ListExportsError, OpenExport, OpenExportError};
use crate::handshake::{Handshake, Question, Step};
use crate::in_flight::{CommandId, InFlight};
use crate::input::{HANDSHAKE_INPUT_BYTES, INPUT_BYTES, Input};
use crate::io_command::{self, Action, Negotiated, Refusal, Reply};
use crate::memory::{RequestMemory, Share};
use crate::reply::{Replier, ReplyQueue, errno_of};
use crate::wire::{Errno, REQUEST_BYTES, Request, command};

/// Payload that is read ahead with the headers around it, many requests in one system call. What
/// arrives this way is copied, which for up to so many bytes is cheaper than a call for each.
const READ_AHEAD_PAYLOAD_BYTES: usize = 16 << 10;

/// The server's side of one NBD connection.
///
/// The caller's loop: take [`Session::next_event`] until it gives `None`, send
/// [`Session::replies`], then do what [`Session::want`] says. Commands are completed at any time,
/// in any order.
pub struct Session {
    input: Input,
    replies: ReplyQueue,
    phase: Phase,
    shutting_down: bool,
    /// Of the memory of all connections; none: this one counts for itself only.
    share: Option<Share>,
}

enum Phase {
    Handshake(Handshake),
    Transmission(Transmission),
    /// The client gave up during the handshake.
    Aborted,
    Failed(SessionError),
}

/// A session that waits for the answer to an [`Event::OpenExport`], on its way to the thread that
/// has the answer. Holds what was negotiated, what was received and what is still to be sent.
pub struct SuspendedHandshake {
    handshake: Handshake,
    input: Input,
    replies: ReplyQueue,
    shutting_down: bool,
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<SuspendedHandshake>();
    is_send::<OpenExport>();
};

/// What the caller is asked to do.
#[derive(Debug)]
pub enum Event {
    /// Answer with [`Session::exports_listed`].
    ListExports,
    /// Answer with [`Session::export_opened`].
    OpenExport(OpenExport),
    /// A write of so many bytes arrives: answer with [`Session::payload_buffer`].
    PayloadBuffer {
        /// Bytes of its payload.
        length: usize,
    },
    /// Run it, then [`Session::complete`] it. Ranges lie inside the export. Reads and writes may
    /// be larger than one transfer (up to `limits::NBD_REQUEST_BYTES_MAX`), trims, zeroes and
    /// block status up to 4 GiB: the caller splits them.
    Command {
        /// Names it in the completion.
        id: CommandId,
        /// What to do.
        command: IoCommand,
    },
}

/// What the session needs before it can go on; asked when there is no event.
#[derive(Debug)]
pub enum Want<'a> {
    /// Read from the socket into `first`, and in the same call, if that is convenient, on into
    /// `then`; tell [`Session::received`] how much came. `first` is never empty, `then` may be.
    Read {
        /// Where the next bytes belong.
        first: &'a mut [u8],
        /// Where those after `first` belong.
        then: &'a mut [u8],
    },
    /// Read nothing: an answer, a buffer, a completion or the sending of replies comes first.
    Nothing,
    /// The client has said good-bye and all is answered and sent, or the session has ended and what
    /// was answered before is sent, or it has failed: close the connection.
    Close,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A new connection; the greeting waits in [`Session::replies`].
    pub fn new() -> Self {
        let mut replies = ReplyQueue::default();
        let phase = Phase::Handshake(Handshake::new(&mut replies));
        Self { input: Input::new(), replies, phase, shutting_down: false, share: None }
    }

    /// Takes part in the memory for requests that all connections of this thread share, until it is
    /// dropped: commands count until then, also when the session has failed.
    pub fn share(&mut self, memory: Rc<RequestMemory>) {
        self.share = Some(Share::new(memory));
    }

    /// Ready when a request waits for memory and there is enough by now: [`Session::next_event`] goes
    /// on with it. Otherwise `waker` is woken when there may be.
    pub fn poll_memory(&self, waker: &Waker) -> Poll<()> {
        self.share.as_ref().map_or(Poll::Pending, |share| share.poll_room(waker))
    }

    /// Nothing more is taken from the client: others need not wait until it had its turn. Call it
    /// when the session is kept only until what is in flight has ended.
    pub fn stop_waiting(&mut self) {
        if let Some(share) = &mut self.share {
            share.give_up();
        }
    }

    /// Stops between [`Event::OpenExport`] and its answer, so that another thread can go on with
    /// [`Session::resume`]. Bytes received are to be told before, by [`Session::received`].
    ///
    /// # Panics
    /// When no export is to be opened: a bug of the caller.
    pub fn suspend(self) -> SuspendedHandshake {
        let Self { input, replies, phase, shutting_down, share: _ } = self;
        match phase {
            Phase::Handshake(handshake) if handshake.is_opening() => {
                SuspendedHandshake { handshake, input, replies, shutting_down }
            }
            _ => panic!("a session was suspended while it was not asking to open an export"),
        }
    }

    /// Goes on where [`Session::suspend`] stopped: the next call is [`Session::export_opened`].
    pub fn resume(suspended: SuspendedHandshake) -> Self {
        let SuspendedHandshake { handshake, input, replies, shutting_down } = suspended;
        let phase = Phase::Handshake(handshake);
        Self { input, replies, phase, shutting_down, share: None }
    }

    /// The next thing to do; `None` when there is nothing before what [`Session::want`] says.
    ///
    /// # Errors
    /// [`SessionError`] when the connection must be closed, then and ever after. Commands in
    /// flight may still be completed.
    pub fn next_event(&mut self) -> Result<Option<Event>, SessionError> {
        let event = self.advance();
        if let Err(error) = &event {
            self.phase = Phase::Failed(error.clone());
        }
        event
    }

    fn advance(&mut self) -> Result<Option<Event>, SessionError> {
        match &mut self.phase {
            Phase::Handshake(handshake) => {
                while self.replies.remaining() <= NBD_HANDSHAKE_REPLY_BYTES_MAX {
                    let step =
                        handshake.step(&mut self.input, &mut self.replies, self.shutting_down)?;
                    let event = match step {
                        Step::Taken => continue,
                        Step::Starved => return Ok(None),
                        Step::Ask(Question::List) => Event::ListExports,
                        Step::Ask(Question::Open(open)) => Event::OpenExport(open),
                        Step::Ask(Question::Abort) => {
                            self.phase = Phase::Aborted;
                            return Ok(None);
                        }
                    };
                    return Ok(Some(event));
                }
                Ok(None)
            }
            Phase::Transmission(transmission) => {
                if let Some(share) = &mut self.share {
                    share.settle(transmission.in_flight.held(&self.replies));
                }
                let (input, out, share) = (&mut self.input, &mut self.replies, &mut self.share);
                transmission.advance(input, out, share)
            }
            Phase::Aborted => Ok(None),
            Phase::Failed(error) => Err(error.clone()),
        }
    }

    /// What is needed to go on, when [`Session::next_event`] gives `None`.
    pub fn want(&mut self) -> Want<'_> {
        let drained = !self.replies.has_remaining();
        match &mut self.phase {
            Phase::Handshake(handshake) => {
                let room = self.replies.remaining() <= NBD_HANDSHAKE_REPLY_BYTES_MAX;
                let first = self.input.space(HANDSHAKE_INPUT_BYTES);
                if handshake.wants_input() && room && !first.is_empty() {
                    Want::Read { first, then: &mut [] }
                } else {
                    Want::Nothing
                }
            }
            Phase::Transmission(transmission) => transmission.want(&mut self.input, &self.replies),
            Phase::Aborted if !drained => Want::Nothing,
            Phase::Aborted | Phase::Failed(_) => Want::Close,
        }
    }

    /// `count` bytes came into what [`Want::Read`] gave.
    ///
    /// # Panics
    /// When that is more than it gave: a bug of the caller.
    pub fn received(&mut self, mut count: usize) {
        if let Phase::Transmission(Transmission {
            receiving: Receiving::Payload { buffer, filled, .. },
            ..
        }) = &mut self.phase
        {
            let part = count.min(buffer.len() - *filled);
            *filled += part;
            count -= part;
        }
        self.input.received(count);
    }

    /// Answers [`Event::ListExports`] with volume names.
    ///
    /// # Panics
    /// When it was not asked: a bug of the caller.
    pub fn exports_listed(&mut self, exports: Result<Vec<String>, ListExportsError>) {
        match &mut self.phase {
            Phase::Handshake(handshake) => handshake.listed(exports, &mut self.replies),
            _ => panic!("exports were listed unasked"),
        }
    }

    /// Answers [`Event::OpenExport`]. With [`crate::Purpose::Attach`], `Ok` means that the caller
    /// has attached and lets go when this session ends.
    ///
    /// # Panics
    /// When it was not asked: a bug of the caller.
    pub fn export_opened(&mut self, export: Result<ExportInfo, OpenExportError>) {
        let Phase::Handshake(handshake) = &mut self.phase else {
            panic!("an export was opened unasked");
        };
        match handshake.opened(export, &mut self.replies) {
            Ok(None) => {}
            Ok(Some(negotiated)) => {
                self.phase = Phase::Transmission(Transmission::new(negotiated));
                if self.shutting_down {
                    self.end();
                }
            }
            Err(error) => self.phase = Phase::Failed(error),
        }
    }

    /// Answers [`Event::PayloadBuffer`] with memory of exactly the length asked for.
    ///
    /// # Panics
    /// When it was not asked, or the length differs: a bug of the caller.
    pub fn payload_buffer(&mut self, buffer: AlignedBuf) {
        match &mut self.phase {
            Phase::Transmission(transmission) if transmission.is_over() => {}
            Phase::Transmission(transmission) => transmission.payload_buffer(buffer),
            _ => panic!("a buffer was given unasked"),
        }
    }

    /// Answers a command; its reply is then in [`Session::replies`]. Ignored when the session has
    /// failed or ended. An [`IoError::ends_session`] is no answer: the session ends
    /// ([`Session::end`]).
    ///
    /// # Panics
    /// When the command is not in flight, or the reply is not one to it: a bug of the caller.
    pub fn complete(&mut self, id: CommandId, result: Result<IoReply, IoError>) {
        match &mut self.phase {
            Phase::Transmission(transmission) => {
                transmission.complete(id, result, &mut self.replies);
            }
            Phase::Failed(_) => {}
            Phase::Handshake(_) | Phase::Aborted => panic!("a completion without a command"),
        }
    }

    /// The export has grown to `size` bytes: requests up to there are taken from now on. The client
    /// is not told, the protocol has no words for that. A smaller size changes nothing.
    pub fn grow(&mut self, size: u64) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            let negotiated = &mut transmission.negotiated;
            negotiated.size = negotiated.size.max(size);
        }
    }

    /// The node stops: from now on options are refused, and of a client that is past its handshake
    /// the session ends as by [`Session::end`].
    pub fn begin_shutdown(&mut self) {
        self.shutting_down = true;
        self.end();
    }

    /// What the client has attached is not its own any more: nothing more is taken from it, run or
    /// answered, and the connection is to be closed once the answers that are there are sent. For a
    /// client an error is the volume's, and final; a connection that was closed is made again, and
    /// what had no answer asked again. Nothing happens before the export is opened.
    pub fn end(&mut self) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.receiving = Receiving::Over;
        }
    }

    /// Whether [`Session::end`] was called, or what it does has come to pass by itself.
    pub fn is_over(&self) -> bool {
        matches!(&self.phase, Phase::Transmission(transmission) if transmission.is_over())
    }

    /// Bytes to send; take them off as they are sent.
    pub fn replies(&mut self) -> &mut ReplyQueue {
        &mut self.replies
    }

    /// What the client calls a command in flight: its handle, as a big-endian number.
    ///
    /// # Panics
    /// When the command is not in flight: a bug of the caller.
    pub fn handle_of(&self, id: CommandId) -> u64 {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.in_flight.reply(id).cookie(),
            _ => panic!("a handle without a command"),
        }
    }

    /// Commands given out and not completed.
    pub fn commands_in_flight(&self) -> usize {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.in_flight.count(),
            _ => 0,
        }
    }
}

struct Transmission {
    negotiated: Negotiated,
    replier: Replier,
    receiving: Receiving,
    in_flight: InFlight,
    /// Payload of the last request, in bytes: a client that sends large ones goes on doing so, and
    /// then only the next header is read ahead.
    last_payload: usize,
}

/// The request at the front of the input, from its first byte until it is a command in flight.
enum Receiving {
    /// 28 bytes of header are awaited.
    Header,
    /// It is good, and waits until there is room for it.
    Admitting(Action),
    /// It is a write that has its slot and waits for memory,
    AwaitingBuffer { range: ByteRange, id: CommandId },
    /// whose payload then fills it.
    Payload { range: ByteRange, id: CommandId, buffer: AlignedBuf, filled: usize },
    /// It is refused, once the payload is thrown away if it is a write.
    Discarding { left: usize, cookie: u64, refusal: Refusal },
    /// The client said good-bye: nothing follows.
    Ended,
    /// The session has ended from this side: nothing is read, and nothing more is answered.
    Over,
}

impl Transmission {
    fn new(negotiated: Negotiated) -> Self {
        Self {
            negotiated,
            replier: Replier { structured: negotiated.structured },
            receiving: Receiving::Header,
            in_flight: InFlight::default(),
            last_payload: 0,
        }
    }

    fn advance(
        &mut self,
        input: &mut Input,
        out: &mut ReplyQueue,
        share: &mut Option<Share>,
    ) -> Result<Option<Event>, SessionError> {
        loop {
            match &mut self.receiving {
                Receiving::Header => {
                    if !self.in_flight.has_room(0, out) {
                        return Ok(None);
                    }
                    let Some(bytes) = input.take::<REQUEST_BYTES>() else { return Ok(None) };
                    self.header(&bytes)?;
                }
                Receiving::Admitting(action) => {
                    if !self.in_flight.take_room(action.memory_cost(), out, share.as_mut()) {
                        return Ok(None);
                    }
                    let event = self.admit(out);
                    if event.is_some() {
                        return Ok(event);
                    }
                }
                Receiving::Payload { buffer, filled, .. } => {
                    *filled += input.take_into(&mut buffer[*filled..]);
                    if *filled < buffer.len() {
                        return Ok(None);
                    }
                    return Ok(Some(self.payload_is_complete()));
                }
                Receiving::Discarding { left, cookie, refusal } => {
                    *left -= input.skip(*left);
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.replier.error(out, *cookie, refusal.errno(), &refusal.to_string());
                    self.receiving = Receiving::Header;
                }
                Receiving::AwaitingBuffer { .. } | Receiving::Ended | Receiving::Over => {
                    return Ok(None);
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.receiving, Receiving::Over)
    }

    fn header(&mut self, bytes: &[u8; REQUEST_BYTES]) -> Result<(), SessionError> {
        let request =
            Request::decode(bytes).map_err(|found| SessionError::BadRequestMagic { found })?;
        let is_write = request.command == command::WRITE;
        let payload = if is_write { request.length as usize } else { 0 };
        self.last_payload = payload;
        if payload > NBD_REQUEST_BYTES_MAX {
            return Err(SessionError::WriteTooLarge { length: request.length });
        }
        self.receiving = match io_command::check(&request, &self.negotiated) {
            Ok(action) => Receiving::Admitting(action),
            Err(refusal) => {
                Receiving::Discarding { left: payload, cookie: request.cookie, refusal }
            }
        };
        Ok(())
    }

    fn admit(&mut self, out: &mut ReplyQueue) -> Option<Event> {
        let admitted = std::mem::replace(&mut self.receiving, Receiving::Header);
        let Receiving::Admitting(action) = admitted else {
            unreachable!("called in this state only");
        };
        let cost = action.memory_cost();
        match action {
            Action::Submit(command, reply) => {
                let id = self.in_flight.insert(reply, cost);
                return Some(Event::Command { id, command });
            }
            Action::Write(range, reply) => {
                let id = self.in_flight.insert(reply, cost);
                let length = usize::try_from(range.length).expect("within the request limit");
                self.receiving = Receiving::AwaitingBuffer { range, id };
                return Some(Event::PayloadBuffer { length });
            }
            Action::Answer(Reply::Read(read)) => self.replier.empty_read(out, read.cookie),
            Action::Answer(reply) => self.replier.done(out, reply.cookie()),
            Action::Disconnect => self.receiving = Receiving::Ended,
        }
        None
    }

    fn payload_buffer(&mut self, buffer: AlignedBuf) {
        let Receiving::AwaitingBuffer { range, id } = self.receiving else {
            panic!("a buffer was given unasked");
        };
        assert_eq!(buffer.len() as u64, range.length, "buffer for another payload");
        self.receiving = Receiving::Payload { range, id, buffer, filled: 0 };
    }

    fn payload_is_complete(&mut self) -> Event {
        let received = std::mem::replace(&mut self.receiving, Receiving::Header);
        let Receiving::Payload { range, id, buffer: data, .. } = received else {
            unreachable!("called in this state only");
        };
        Event::Command { id, command: IoCommand::Write { range, data } }
    }

    fn want<'a>(&'a mut self, input: &'a mut Input, replies: &ReplyQueue) -> Want<'a> {
        match &mut self.receiving {
            Receiving::Header if self.in_flight.has_room(0, replies) => {
                let small = self.last_payload <= READ_AHEAD_PAYLOAD_BYTES;
                let limit = if small { INPUT_BYTES } else { REQUEST_BYTES };
                non_empty(input.space(limit), &mut [])
            }
            Receiving::Payload { buffer, filled, .. } => {
                non_empty(&mut buffer[*filled..], input.space(REQUEST_BYTES))
            }
            Receiving::Discarding { .. } => non_empty(input.space(INPUT_BYTES), &mut []),
            Receiving::Ended if self.in_flight.count() == 0 && !replies.has_remaining() => {
                Want::Close
            }
            Receiving::Over if !replies.has_remaining() => Want::Close,
            Receiving::Header
            | Receiving::Admitting(_)
            | Receiving::AwaitingBuffer { .. }
            | Receiving::Ended
            | Receiving::Over => Want::Nothing,
        }
    }

    fn complete(&mut self, id: CommandId, result: Result<IoReply, IoError>, out: &mut ReplyQueue) {
        let reply = self.in_flight.remove(id);
        if result.as_ref().is_err_and(IoError::ends_session) {
            self.receiving = Receiving::Over;
        }
        if self.is_over() {
            return;
        }
        match (reply, result) {
            (Reply::Read(read), Ok(IoReply::Data(parts))) => self.replier.data(out, read, parts),
            (Reply::Status(ask), Ok(IoReply::Status(all))) => self.replier.status(out, ask, &all),
            (Reply::Done { cookie, .. }, Ok(IoReply::Done)) => self.replier.done(out, cookie),
            (_, Err(error)) => {
                let beyond_end = match reply {
                    Reply::Done { beyond_end, .. } => beyond_end,
                    Reply::Read(_) | Reply::Status(_) => Errno::Invalid,
                };
                let errno = errno_of(&error, beyond_end);
                self.replier.error(out, reply.cookie(), errno, &error.to_string());
            }
            (reply, Ok(wrong)) => panic!("{wrong:?} is no answer to {reply:?}"),
        }
    }
}

/// Nothing to read into means that an event is still to be taken.
fn non_empty<'a>(first: &'a mut [u8], then: &'a mut [u8]) -> Want<'a> {
    if first.is_empty() { Want::Nothing } else { Want::Read { first, then } }
}
