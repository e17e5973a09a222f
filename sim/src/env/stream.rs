//! One connection: two pipes of bytes with delay, window and an end.
//!
//! See [`crate::env::network`] for the fault model. A piece of bytes goes: window of the sender,
//! link (its delay, its cut, its speed), queue of the receiver.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use ballast_block::NodeId;
use ballast_block::limits::TCP_SILENCE_SECONDS_MAX;
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::env::SimEnv;
use crate::machine::Crash;
use crate::world::World;

/// Bytes of one direction that are sent and not yet read: what socket buffers hold, so that a
/// reader that does not read stops its writer.
const WINDOW: usize = 256 << 10;

/// How long until lost packets are sent again after a link was mended, at most, in milliseconds.
const RETRANSMIT_MS_MAX: u64 = 400;

/// How long a kernel repeats what nobody acknowledges, and probes that nobody answers, before it
/// reports an error, in milliseconds.
const GIVE_UP_MS: u64 = TCP_SILENCE_SECONDS_MAX as u64 * 1_000;

pub(crate) struct Connection {
    number: u64,
    ends: [End; 2],
    /// `pipes[0]` carries from end 0 to end 1.
    pipes: [RefCell<Pipe>; 2],
    /// The network forgot it: nothing passes any more, nobody is told.
    forgotten: Cell<bool>,
    /// Nothing passes in at least one direction now.
    silent: Cell<bool>,
    /// Counts the silences.
    watch: Cell<u64>,
}

struct End {
    node: NodeId,
    process: u64,
    /// The process is there and its stream was not dropped.
    open: Cell<bool>,
    /// Told that the connection is gone.
    reset: Cell<bool>,
}

#[derive(Default)]
struct Pipe {
    /// Sent, in order, each with the point of true time in milliseconds when it arrives.
    on_the_way: VecDeque<(u64, Piece)>,
    arrived: VecDeque<Bytes>,
    /// Bytes on the way and arrived.
    window_used: usize,
    /// When the last piece sent arrives, in milliseconds of true time.
    last_arrival_ms: u64,
    finished: bool,
    end_arrived: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

enum Piece {
    Data(Bytes),
    End,
}

impl Connection {
    pub(crate) fn new(number: u64, ends: [(NodeId, u64); 2]) -> Rc<Self> {
        let end =
            |(node, process)| End { node, process, open: Cell::new(true), reset: Cell::new(false) };
        Rc::new(Self {
            number,
            ends: ends.map(end),
            pipes: Default::default(),
            forgotten: Cell::new(false),
            silent: Cell::new(false),
            watch: Cell::new(0),
        })
    }

    /// Whether bytes from `from` to `to` pass through it in one direction.
    pub(crate) fn uses(&self, from: NodeId, to: NodeId) -> bool {
        let nodes = [self.ends[0].node, self.ends[1].node];
        nodes == [from, to] || nodes == [to, from]
    }

    /// Nothing passes any more; the kernels give up long after everyone else did.
    pub(crate) fn forget(self: &Rc<Self>, world: &World) {
        self.forgotten.set(true);
        self.watch_silence(world);
    }

    /// Both kernels give up if nothing gets through in one of the directions from now on: what one
    /// sends, or its answer, is lost.
    pub(crate) fn watch_silence(self: &Rc<Self>, world: &World) {
        let (silent, connection) = (self.silent.replace(true), self.clone());
        if silent {
            return;
        }
        let epoch = self.watch.replace(self.watch.get() + 1) + 1;
        world.after_ms(GIVE_UP_MS, move |world| {
            if connection.silent.get() && connection.watch.get() == epoch {
                connection.reset_both(world);
            }
        });
    }

    /// Both ends learn that it is gone.
    pub(crate) fn reset_both(self: &Rc<Self>, world: &World) {
        self.reset(world, 0);
        self.reset(world, 1);
    }

    fn reset(&self, world: &World, end: usize) {
        if self.ends[end].reset.replace(true) {
            return;
        }
        world.note(format!("connection {} reset at {}", self.number, self.ends[end].node));
        self.wake(end);
        self.bury_if_dead(world);
    }

    fn wake(&self, end: usize) {
        let reader = self.pipes[1 - end].borrow_mut().reader.take();
        let writer = self.pipes[end].borrow_mut().writer.take();
        for waker in reader.into_iter().chain(writer) {
            waker.wake();
        }
    }

    fn bury_if_dead(&self, world: &World) {
        let over = |end: &End| end.reset.get() || !end.open.get();
        if self.ends.iter().all(over) {
            world.net().forget_connection(self.number);
        }
    }

    /// The process at one end died.
    pub(crate) fn end_died(
        self: &Rc<Self>,
        world: &World,
        node: NodeId,
        process: u64,
        crash: Crash,
    ) {
        for end in 0..2 {
            if self.ends[end].node != node || self.ends[end].process != process {
                continue;
            }
            self.ends[end].open.set(false);
            // A dead machine says nothing; when it is back it answers what arrives with a reset.
            match crash {
                Crash::Kill => self.send_reset(world, end),
                Crash::PowerLoss => self.give_up_later(world, 1 - end),
            }
        }
        self.bury_if_dead(world);
    }

    /// `end` tells the other one that the connection is gone, if the network carries it.
    fn send_reset(self: &Rc<Self>, world: &World, end: usize) {
        let (from, to) = (self.ends[end].node, self.ends[1 - end].node);
        let link = world.net().link(from, to);
        if self.forgotten.get() || from != to && link.cut {
            // Said once, and lost: the other side's probes find out.
            return self.give_up_later(world, 1 - end);
        }
        let delay = world.net().rng.between(link.delay_min_ms, link.delay_max_ms);
        let connection = self.clone();
        world.after_ms(delay, move |world| connection.reset(world, 1 - end));
    }

    /// The kernel at `end` finds out by its probes that the other side is gone.
    fn give_up_later(self: &Rc<Self>, world: &World, end: usize) {
        let connection = self.clone();
        world.after_ms(GIVE_UP_MS, move |world| connection.reset(world, end));
    }

    fn send(self: &Rc<Self>, world: &World, end: usize, piece: Piece) {
        let (from, to) = (self.ends[end].node, self.ends[1 - end].node);
        let link = world.net().link(from, to);
        let now = world.now_ms();
        let length = if let Piece::Data(bytes) = &piece { bytes.len() } else { 0 };
        let delay = match from == to {
            true => 0,
            false => world.net().rng.between(link.delay_min_ms, link.delay_max_ms),
        };
        let mut pipe = self.pipes[end].borrow_mut();
        let carried = (length as u64).checked_div(link.bytes_per_ms).unwrap_or(0);
        let arrival = (now + delay).max(pipe.last_arrival_ms) + carried;
        pipe.last_arrival_ms = arrival;
        pipe.window_used += length;
        pipe.on_the_way.push_back((arrival, piece));
        drop(pipe);
        if from != to && world.net().rng.chance(link.reset_rate) {
            self.reset_both(world);
            return;
        }
        let connection = self.clone();
        world.after_ms(arrival - now, move |world| connection.deliver(world, end));
    }

    /// Pieces sent by `end` arrive, as far as they are due.
    fn deliver(self: &Rc<Self>, world: &World, end: usize) {
        let (from, to) = (self.ends[end].node, self.ends[1 - end].node);
        if self.forgotten.get() || from != to && world.net().link(from, to).cut {
            return;
        }
        let peer = &self.ends[1 - end];
        if peer.reset.get() || self.ends[end].reset.get() {
            return;
        }
        if !peer.open.get() && !world.machine(to).is_some_and(|machine| machine.is_powered()) {
            // The machine is off: what was sent is sent again, and answered when it is back.
            self.try_later(world, end);
            return;
        }
        let mut pipe = self.pipes[end].borrow_mut();
        let mut bytes_arrived = 0;
        while pipe.on_the_way.front().is_some_and(|(arrival, _)| *arrival <= world.now_ms()) {
            let (_, piece) = pipe.on_the_way.pop_front().expect("looked at");
            match piece {
                Piece::End => pipe.end_arrived = true,
                Piece::Data(bytes) => {
                    bytes_arrived += bytes.len();
                    pipe.arrived.push_back(bytes);
                }
            }
        }
        let reader = pipe.reader.take();
        drop(pipe);
        if !peer.open.get() {
            // Nobody is there to read: a living kernel says so.
            if bytes_arrived > 0 {
                self.send_reset(world, 1 - end);
            }
            return;
        }
        if bytes_arrived > 0 {
            world.note(format!("connection {} {from} to {to} +{bytes_arrived}", self.number));
        }
        if let Some(waker) = reader {
            waker.wake();
        }
    }

    fn try_later(self: &Rc<Self>, world: &World, end: usize) {
        let waiting_since = self.pipes[end].borrow().last_arrival_ms;
        if self.pipes[end].borrow().on_the_way.is_empty() {
            return;
        }
        let connection = self.clone();
        if world.now_ms() > waiting_since + GIVE_UP_MS {
            connection.reset(world, end);
            return;
        }
        let delay = world.net().rng.between(200, 2_000);
        world.after_ms(delay, move |world| connection.deliver(world, end));
    }

    /// The link from `from` works again: what waited arrives after a retransmission.
    pub(crate) fn link_mended(self: &Rc<Self>, world: &World, from: NodeId) {
        let [a, b] = [self.ends[0].node, self.ends[1].node];
        if !self.forgotten.get() && !world.net().link(a, b).cut && !world.net().link(b, a).cut {
            self.silent.set(false);
        }
        for end in (0..2).filter(|end| self.ends[*end].node == from) {
            let delay = world.net().rng.between(1, RETRANSMIT_MS_MAX);
            let connection = self.clone();
            world.after_ms(delay, move |world| connection.deliver(world, end));
        }
    }
}

/// One end of a connection.
pub struct SimStream {
    env: SimEnv,
    connection: Rc<Connection>,
    end: usize,
}

impl SimStream {
    pub(crate) fn new(env: SimEnv, connection: Rc<Connection>, end: usize) -> Self {
        Self { env, connection, end }
    }

    /// Nothing is sent from here any more; whether that was so before.
    fn finish(&self) -> bool {
        std::mem::replace(&mut self.connection.pipes[self.end].borrow_mut().finished, true)
    }

    fn poll_send(
        &self,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.env.process().is_alive() {
            return Poll::Pending;
        }
        let connection = &self.connection;
        let mut pipe = connection.pipes[self.end].borrow_mut();
        if connection.ends[self.end].reset.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if pipe.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let total: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let mut room = WINDOW.saturating_sub(pipe.window_used).min(total);
        if room == 0 {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        drop(pipe);
        let world = self.env.world();
        if world.net().rng.chance(30_000) {
            room = world.net().rng.between(1, room as u64) as usize;
        }
        let mut taken = Vec::with_capacity(room);
        for buffer in buffers {
            let part = buffer.len().min(room - taken.len());
            taken.extend_from_slice(&buffer[..part]);
        }
        // The effect that kills the process may still get out.
        self.env.process().count_effect();
        connection.send(world, self.end, Piece::Data(taken.into()));
        Poll::Ready(Ok(room))
    }
}

impl AsyncRead for SimStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.env.process().is_alive() {
            return Poll::Pending;
        }
        let connection = &self.connection;
        let mut pipe = connection.pipes[1 - self.end].borrow_mut();
        let mut room = into.remaining();
        if room > 0 && self.env.world().net().rng.chance(30_000) {
            room = self.env.world().net().rng.between(1, room as u64) as usize;
        }
        let mut read = 0;
        while let Some(first) = pipe.arrived.front_mut().filter(|_| read < room) {
            let part = first.len().min(room - read);
            into.put_slice(&first[..part]);
            first.advance(part);
            read += part;
            if first.is_empty() {
                pipe.arrived.pop_front();
            }
        }
        if read > 0 || into.remaining() == 0 {
            pipe.window_used -= read;
            let writer = pipe.writer.take();
            drop(pipe);
            if let Some(waker) = writer {
                waker.wake();
            }
            return Poll::Ready(Ok(()));
        }
        if connection.ends[self.end].reset.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if pipe.end_arrived {
            return Poll::Ready(Ok(()));
        }
        pipe.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.env.process().is_alive() {
            return Poll::Pending;
        }
        if !self.finish() {
            self.connection.send(self.env.world(), self.end, Piece::End);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        if !self.env.process().is_alive() {
            return;
        }
        let (connection, world) = (&self.connection, self.env.world());
        connection.ends[self.end].open.set(false);
        let unread = !connection.pipes[1 - self.end].borrow().arrived.is_empty();
        let finished = self.finish();
        if unread {
            connection.send_reset(world, self.end);
        } else if !finished && !connection.ends[self.end].reset.get() {
            connection.send(world, self.end, Piece::End);
        }
        connection.bury_if_dead(world);
    }
}
