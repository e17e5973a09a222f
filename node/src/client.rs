//! A volume as the node that serves it to a host sees it: any node serves any volume.
//!
//! Cuts commands into operations, sends each to the leader, here or elsewhere, and goes on through
//! failovers. A retry of ours carries the same request number, and apply recognises it: it is not
//! a second write (guarantee **linearizable**).

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::command::{ReadPart, StatusExtent};
use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{
    AttachmentId, ByteRange, Epoch, FamilyId, Generation, IoCommand, IoError, IoReply, NodeId,
};
use ballast_env::Env;
use ballast_env::clock::Instant;
use ballast_raft_store::entry::Origin;
use ballast_volume::family::{ExecuteError, OperationReply};
use ballast_volume::split::{self, Operation};
use bytes::Bytes;
use futures_util::future::join_all;
use thiserror::Error;

use crate::attach;
use crate::calls::{AttachReplyV1, AttachV1, AttachmentV1, MovedV1, OperateReplyV1, Tag, decode};
use crate::meters::{self, VolumeMeter};
use crate::node::Inner;
use crate::operate;
use crate::peers::connection::PeerError;
use crate::peers::links::Lane;
use crate::peers::wire::{Frame, Kind};

/// Longest that an operation is retried before its host is told that the outcome is unknown. Hosts
/// prefer a long stall to an error: file systems turn read-only at the first one.
pub const OPERATION_MAX: Duration = Duration::from_secs(300);

/// Longest wait for the leader's answer before the operation is sent again, under the same number.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

/// How long the link to a leader is down before a replica that still hears it is asked to take the
/// lead over: longer than a lost connection takes to come back.
const LEADER_UNREACHABLE_MAX: Duration = Duration::from_secs(1);
const TAKE_LEAD_MAX: Duration = Duration::from_secs(2);
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(5);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(100);

/// A volume could not be opened for a host.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AttachError {
    /// There is no such volume.
    #[error("there is no volume {0}")]
    VolumeUnknown(String),
    /// Another attachment holds it.
    #[error("volume is attached for writing by a client of {0}")]
    Held(NodeId),
    /// The lease that it names is not in force, or does not let its holder write.
    #[error("{0} is not in force for this")]
    NotLeased(Epoch),
    /// The volume is leased, and the client names no lease.
    #[error("volume is leased")]
    Leased,
}

/// A host's attachment to a volume.
pub struct VolumeClient<E: Env> {
    inner: Rc<Inner<E>>,
    family: FamilyId,
    name: String,
    attachment: AttachmentId,
    generation: Generation,
    /// The lease that it was made under; 0 = none.
    epoch: Epoch,
    size: u64,
    read_only: bool,
    next_request: Cell<u64>,
    outstanding: RefCell<BTreeSet<u64>>,
    leader: Cell<Option<NodeId>>,
    /// A leader that the link is down to, and since when, or since when a replica was asked last to
    /// take over from it.
    unreachable: Cell<Option<(NodeId, Instant)>>,
    turn: Cell<usize>,
    meter: Rc<VolumeMeter>,
}

struct Request<'a, E: Env> {
    client: &'a VolumeClient<E>,
    number: u64,
}

impl<E: Env> Drop for Request<'_, E> {
    fn drop(&mut self) {
        self.client.outstanding.borrow_mut().remove(&self.number);
    }
}

impl<E: Env> VolumeClient<E> {
    /// Opens the volume `name`; for writing, makes it a writer. `epoch`: the lease that it is opened
    /// under; 0 = none. Asks until a leader answers: who calls sets the end, and may drop this at any
    /// time. An attachment that was made all the same stands for nobody, and the next one takes over.
    ///
    /// # Errors
    /// [`AttachError`].
    pub(crate) async fn open(
        inner: Rc<Inner<E>>,
        name: &str,
        read_only: bool,
        epoch: Epoch,
    ) -> Result<Self, AttachError> {
        let (family, size) = {
            let state = inner.cluster.state();
            let volume = state.volume_by_name(name);
            let volume = volume.ok_or_else(|| AttachError::VolumeUnknown(name.to_owned()))?;
            (volume.family, volume.size_bytes)
        };
        let attachment = AttachmentId(inner.env.random_u64() | 1);
        let meter = inner.meters.volume(family);
        let mut client = Self {
            inner,
            family,
            name: name.to_owned(),
            attachment,
            generation: Generation(0),
            epoch,
            size,
            read_only,
            next_request: Cell::new(1),
            outstanding: RefCell::default(),
            leader: Cell::new(None),
            unreachable: Cell::new(None),
            turn: Cell::new(0),
            meter,
        };
        if !read_only {
            client.inner.attachments.borrow_mut().insert(attachment, family);
        }
        if !read_only || epoch != Epoch(0) {
            client.attach().await?;
        }
        Ok(client)
    }

    /// The volume's size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size in bytes that the volume has by now, as far as this node knows.
    pub fn size_now(&self) -> u64 {
        let state = self.inner.cluster.state();
        let known = state.volume_of_family(self.family).map_or(self.size, |it| it.size_bytes);
        known.max(self.size_told())
    }

    /// The largest size of the volume that a client here was told before this node knew of it; else 0.
    pub(crate) fn size_told(&self) -> u64 {
        self.inner.nbd_sizes.of(self.family)
    }

    /// The volume's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    async fn attach(&mut self) -> Result<(), AttachError> {
        let ask = AttachV1 {
            attachment: self.attachment.0,
            node: self.inner.config.node.0,
            follow: self.inner.config.leader_follows_writer && !self.read_only,
            epoch: self.epoch.0,
            reads_only: self.read_only,
        };
        let mut pause = RETRY_PAUSE_MIN;
        loop {
            let target = self.target();
            let reply = self.attach_at(target, ask).await;
            match reply {
                Ok(reply) if reply.code == attach::DONE => {
                    self.leader.set(Some(target));
                    self.generation = Generation(reply.generation);
                    self.size = reply.size;
                    return Ok(());
                }
                Ok(reply) if reply.code == attach::HELD => {
                    return Err(AttachError::Held(NodeId(reply.node)));
                }
                Ok(reply) if reply.code == attach::NOT_LEASED => {
                    return Err(AttachError::NotLeased(self.epoch));
                }
                Ok(reply) if reply.code == attach::LEASED => return Err(AttachError::Leased),
                Ok(reply) if reply.code == attach::NOT_LEADER && reply.node != 0 => {
                    self.leader.set(Some(NodeId(reply.node)));
                    self.go_around(target, NodeId(reply.node)).await;
                }
                _ => self.leader.set(None),
            }
            self.inner.env.sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn attach_at(&self, target: NodeId, ask: AttachV1) -> Result<AttachReplyV1, PeerError> {
        if target == self.inner.config.node {
            return Ok(attach::attach_here(&self.inner, self.family, ask).await);
        }
        let frame = self.frame(Tag::Attach.message(&ask));
        decode(self.inner.links.call(target, Lane::Control, frame, ATTEMPT_MAX).await?.body)
    }

    /// Stands up for the attachment no longer: another one may take over and fence what is still
    /// in flight, whose host is gone.
    pub fn let_go(&self) {
        self.inner.attachments.borrow_mut().remove(&self.attachment);
    }

    /// Ends the attachment, as far as a leader can be told; otherwise the next one takes over.
    pub async fn detach(&self) {
        if self.read_only {
            return;
        }
        self.let_go();
        let ask = AttachmentV1 { attachment: self.attachment.0, generation: self.generation.0 };
        for _ in 0..3 {
            let target = self.target();
            let reply = if target == self.inner.config.node {
                Ok(attach::detach_here(&self.inner, self.family, ask).await)
            } else {
                let frame = self.frame(Tag::Detach.message(&ask));
                let reply = self.inner.links.call(target, Lane::Control, frame, ATTEMPT_MAX).await;
                reply.and_then(|reply| decode::<AttachReplyV1>(reply.body))
            };
            match reply {
                Ok(reply) if reply.code == attach::DONE => return,
                Ok(reply) if reply.node != 0 => self.leader.set(Some(NodeId(reply.node))),
                _ => self.leader.set(None),
            }
            self.inner.env.sleep(RETRY_PAUSE_MAX).await;
        }
    }

    /// Runs a host's command to its end.
    ///
    /// # Errors
    /// [`IoError`].
    pub async fn run(&self, command: IoCommand) -> Result<IoReply, IoError> {
        let kind = meters::kind_of(&command);
        let env = &self.inner.env;
        let start = env.now();
        let result = self.carry_out(command).await;
        self.inner.meters.note(&self.meter, kind, result.is_ok(), env.now().since(start));
        result
    }

    async fn carry_out(&self, command: IoCommand) -> Result<IoReply, IoError> {
        let writes = !matches!(
            command,
            IoCommand::Read { .. } | IoCommand::Flush | IoCommand::BlockStatus { .. }
        );
        if writes && self.read_only {
            return Err(IoError::ReadOnly);
        }
        match command {
            // Every completed write is durable on a majority: nothing is left to flush.
            IoCommand::Flush => Ok(IoReply::Done),
            IoCommand::Read { range } => self.read(range).await,
            IoCommand::BlockStatus { range } => self.status(range).await,
            IoCommand::Write { range, data } => self.write(range, data.freeze()).await,
            IoCommand::Trim { range } | IoCommand::WriteZeroes { range, .. } => {
                self.all(split::trim(range)).await
            }
        }
    }

    async fn read(&self, range: ByteRange) -> Result<IoReply, IoError> {
        if split::is_one_piece(range) {
            let reply = self.one(Operation::Read(range)).await?;
            let OperationReply::Data(parts) = reply else {
                unreachable!("a read is answered with data");
            };
            return Ok(IoReply::Data(parts));
        }
        let operations = split::pieces(range).map(|piece| self.one(Operation::Read(piece)));
        let mut parts: Vec<ReadPart> = Vec::new();
        for reply in join_all(operations).await {
            let OperationReply::Data(mut more) = reply? else {
                unreachable!("a read is answered with data");
            };
            parts.append(&mut more);
        }
        Ok(IoReply::Data(parts))
    }

    async fn write(&self, range: ByteRange, data: Bytes) -> Result<IoReply, IoError> {
        if split::is_one_piece(range) {
            self.one(Operation::Write { offset: range.offset, data }).await?;
            return Ok(IoReply::Done);
        }
        let operations = split::pieces(range).map(|piece| {
            let at = usize::try_from(piece.offset - range.offset).expect("a request fits memory");
            let length = usize::try_from(piece.length).expect("a request fits memory");
            Operation::Write { offset: piece.offset, data: data.slice(at..at + length) }
        });
        self.all(operations.collect()).await
    }

    async fn all(&self, operations: Vec<Operation>) -> Result<IoReply, IoError> {
        // All are awaited, also after an error: dropping one half-way would release its range lock
        // while its entry may still be on its way.
        let all = join_all(operations.into_iter().map(|operation| self.one(operation))).await;
        all.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(IoReply::Done)
    }

    async fn status(&self, range: ByteRange) -> Result<IoReply, IoError> {
        let blocks = range.covering_blocks();
        let reply = self.one(Operation::Status(blocks)).await?;
        let OperationReply::Status(runs) = reply else {
            unreachable!("a status is answered with runs");
        };
        let mut at = blocks.start * BLOCK_SIZE_U64;
        let mut extents: Vec<StatusExtent> = Vec::with_capacity(runs.len());
        for (allocated, count) in runs {
            let end = at + u64::from(count) * BLOCK_SIZE_U64;
            let length = end.min(range.end()).saturating_sub(at.max(range.offset));
            at = end;
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => last.length += length,
                _ if length > 0 => extents.push(StatusExtent { length, allocated }),
                _ => {}
            }
        }
        Ok(IoReply::Status(extents))
    }

    fn request(&self) -> Request<'_, E> {
        let number = self.next_request.get();
        self.next_request.set(number + 1);
        self.outstanding.borrow_mut().insert(number);
        Request { client: self, number }
    }

    /// Runs one operation at the leader, whoever that is.
    async fn one(&self, operation: Operation) -> Result<OperationReply, IoError> {
        let request = self.request();
        let start = self.inner.env.now();
        let mut pause = RETRY_PAUSE_MIN;
        let mut perhaps_proposed = false;
        loop {
            let target = self.target();
            match self.attempt(target, request.number, &operation).await {
                Ok(reply) => {
                    self.leader.set(Some(target));
                    return Ok(reply);
                }
                // ENOSPC says "not written"; an attempt before this one may still be (hazard F10).
                Err(ExecuteError::Failed(IoError::NoSpace)) if perhaps_proposed => {}
                Err(ExecuteError::Failed(error)) => return Err(error),
                Err(ExecuteError::NoRoomYet) => pause = RETRY_PAUSE_MIN,
                Err(ExecuteError::NotLeader { hint: Some(hint) }) if hint != target => {
                    perhaps_proposed = true;
                    self.leader.set(Some(hint));
                    self.go_around(target, hint).await;
                }
                Err(_) => {
                    perhaps_proposed = true;
                    self.leader.set(None);
                }
            }
            self.check_on(start)?;
            self.inner.env.sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    /// The replica on `via` says that `leader` leads. If only this node can't reach it, it keeps its
    /// majority and would lead for ever, while the host here waits: the lead must move to a replica
    /// that both reach (hazard F12).
    async fn go_around(&self, via: NodeId, leader: NodeId) {
        let own = self.inner.config.node;
        if leader == own || via == own {
            return;
        }
        let up = |lane| self.inner.links.connection(leader, lane).is_ok();
        if up(Lane::Data) && up(Lane::Control) {
            return self.unreachable.set(None);
        }
        let now = self.inner.env.now();
        match self.unreachable.get() {
            Some((known, since)) if known == leader => {
                if now.since(since) < LEADER_UNREACHABLE_MAX {
                    return;
                }
            }
            _ => return self.unreachable.set(Some((leader, now))),
        }
        self.unreachable.set(Some((leader, now)));
        let frame = self.frame(Bytes::from(vec![Tag::TakeLead as u8]));
        let asked = self.inner.links.call(via, Lane::Control, frame, TAKE_LEAD_MAX).await;
        let moved = asked.and_then(|reply| decode::<MovedV1>(reply.body));
        tracing::warn!(family = %self.family, %leader, %via, ?moved,
            "no link to the leader: asked another replica to take the lead");
    }

    /// Whether it makes sense to go on trying.
    fn check_on(&self, start: Instant) -> Result<(), IoError> {
        if *self.inner.stopping.borrow() {
            return Err(IoError::ShuttingDown);
        }
        if self.inner.cluster.state().volume_of_family(self.family).is_none() {
            return Err(IoError::ShuttingDown);
        }
        if self.inner.env.now().since(start) > OPERATION_MAX {
            return Err(IoError::TimedOut);
        }
        Ok(())
    }

    /// Where the leader is likely to be.
    fn target(&self) -> NodeId {
        if let Some(leader) = self.leader.get() {
            return leader;
        }
        let own = self.inner.families.borrow().get(&self.family).cloned();
        if let Some(leader) = own.and_then(|family| family.group().leader_node())
            && self.turn.get().is_multiple_of(2)
        {
            self.turn.set(self.turn.get() + 1);
            return leader;
        }
        let turn = self.turn.get() + 1;
        self.turn.set(turn);
        let state = self.inner.cluster.state();
        let nodes: Vec<NodeId> =
            state.replicas_of(self.family).map(|replica| replica.node).collect();
        nodes.get(turn / 2 % nodes.len().max(1)).copied().unwrap_or(self.inner.config.node)
    }

    async fn attempt(
        &self,
        target: NodeId,
        number: u64,
        operation: &Operation,
    ) -> Result<OperationReply, ExecuteError> {
        let answered_below = self.outstanding.borrow().first().copied().unwrap_or(number);
        let origin = Origin {
            attachment: self.attachment,
            generation: self.generation,
            request: number,
            answered_below,
            holder: self.inner.config.node,
            epoch: self.epoch,
            ..Origin::default()
        };
        if target == self.inner.config.node {
            let family = self.inner.families.borrow().get(&self.family).cloned();
            let family = family.ok_or(ExecuteError::Stopped)?;
            return family.execute(origin, operation.clone()).await;
        }
        let (message, payload) = operate::encode(&origin, operation);
        let frame = Frame { payload, ..self.frame(Tag::Operate.message(&message)) };
        let reply = self.inner.links.call(target, Lane::Data, frame, ATTEMPT_MAX).await;
        let reply = reply.map_err(|_| ExecuteError::Stopped)?;
        let message: OperateReplyV1 = decode(reply.body).map_err(|_| ExecuteError::Stopped)?;
        operate::decode_reply(operation, message, &reply.payload)
    }

    fn frame(&self, body: Bytes) -> Frame {
        Frame { family: self.family, ..Frame::plain(Kind::Call, 0, body) }
    }
}

impl<E: Env> Drop for VolumeClient<E> {
    fn drop(&mut self) {
        self.let_go();
    }
}
