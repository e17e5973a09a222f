//! A volume's family on this node: what the node calls to read, write and attach.
//!
//! Steps 3 and 4 of a write begin here (`execute`). A replica that does not lead answers so at
//! once, with a hint; nothing is forwarded from here.

use std::cell::{OnceCell, Ref, RefCell};
use std::rc::Rc;

use ballast_block::buffer::BufferPool;
use ballast_block::command::ReadPart;
use ballast_block::geometry::BLOCK_SIZE;
use ballast_block::limits::FAMILY_INFLIGHT_BYTES_MAX;
use ballast_block::{AttachmentId, FamilyId, IoError, NodeId, Payload};
use ballast_env::Env;
use ballast_env::spawn::OwnedTask;
use ballast_raft_store::entry::{Command, Origin};
use ballast_raft_store::replica::{DamagedBlock, Replica};
use ballast_raft_store::types::{ApplyReply, TypeConfig};
use futures_util::future::LocalBoxFuture;
use openraft::RaftNetworkFactory;
use openraft::network::NetSnapshot;
use prost::Message;
use thiserror::Error;
use tokio::sync::Semaphore;

use crate::acks::NotesAcks;
use crate::command::{FamilyCommand, FamilyReplyV1};
use crate::gather::{self, Gather};
use crate::group::{Group, ProposeError, RaftSettings, StartGroupError};
use crate::locks::RangeLocks;
use crate::machine::DecodeStateError;
use crate::read_gate::GateShut;
use crate::snapshot::{Checkpoint, GroupSnapshot};
use crate::split::Operation;
use crate::stages::Stages;
use crate::state::{FamilyState, FoundingV1};

/// What a family needs of the node around it.
pub trait Surroundings: 'static {
    /// Asks the pools of all these nodes for room for a write of `bytes` (hazard F11), and takes it
    /// where it is granted. A node that is not heard does not count: it lags, and catches up or is
    /// out of the majority. Answers at once.
    fn take_room(&self, members: &[NodeId], ask: RoomAsk) -> Room;

    /// The same for a write that has to wait: in turn, so that a large one gets room beside small
    /// ones. [`Room::Wait`] is the answer when it took too long for one attempt: who asks again soon
    /// has kept his place.
    fn wait_for_room(&self, members: Vec<NodeId>, ask: RoomAsk) -> LocalBoxFuture<'static, Room>;

    /// Asks the other replicas of `family` for a block that is damaged here.
    fn fetch_block(
        &self,
        family: FamilyId,
        wanted: DamagedBlock,
    ) -> LocalBoxFuture<'static, Option<Payload>>;
}

/// A write that asks for room. Attachment and request tell a retry, which keeps its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomAsk {
    /// Whose write it is.
    pub attachment: AttachmentId,
    /// Its number.
    pub request: u64,
    /// What it takes in a pool, in bytes.
    pub bytes: u64,
}

/// The pools' answer to a write that asks for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It is taken: propose.
    Taken,
    /// Not now: space is being freed, or writers are slowed down so that it can.
    Wait,
    /// What lives fills a pool, or nobody got room for long: waiting does not help.
    Full,
}

/// Why an operation has no result here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ExecuteError {
    /// Ask another node; the outcome of a write is unknown, a retry must carry the same request.
    #[error("this replica does not lead")]
    NotLeader {
        /// The node to ask next, if it is known.
        hint: Option<NodeId>,
    },
    /// The family has stopped on this node: ask another.
    #[error("the family has stopped on this node")]
    Stopped,
    /// The write waits for room in a pool and was not proposed: ask again, with the same request.
    #[error("no room yet: the write was not proposed")]
    NoRoomYet,
    /// The operation failed for good.
    #[error(transparent)]
    Failed(#[from] IoError),
}

impl From<ProposeError> for ExecuteError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::NotLeader { hint } => ExecuteError::NotLeader { hint },
            ProposeError::Stopped => ExecuteError::Stopped,
        }
    }
}

impl From<GateShut> for ExecuteError {
    fn from(shut: GateShut) -> Self {
        ExecuteError::NotLeader { hint: shut.hint }
    }
}

/// The result of an operation.
#[derive(Clone, Debug)]
pub enum OperationReply {
    /// Bytes read, in order.
    Data(Vec<ReadPart>),
    /// Written and durable on a majority.
    Done,
    /// Runs of blocks: allocated or not, and how many.
    Status(Vec<(bool, u32)>),
}

pub(crate) struct Inner<E: Env> {
    pub(crate) group: Group<E>,
    pub(crate) state: Rc<RefCell<FamilyState>>,
    pub(crate) locks: RangeLocks,
    pub(crate) inflight: Semaphore,
    pub(crate) buffers: BufferPool,
    pub(crate) surroundings: Rc<dyn Surroundings>,
    pub(crate) stages: Stages,
    pub(crate) gather: Rc<Gather>,
    _rounds: OnceCell<OwnedTask>,
    founding: FoundingV1,
}

/// A family's member on this node. Clones share it.
pub struct Family<E: Env> {
    pub(crate) inner: Rc<Inner<E>>,
}

impl<E: Env> Clone for Family<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<E: Env> Family<E> {
    /// Starts the member that `replica` is.
    ///
    /// # Errors
    /// [`StartGroupError`].
    pub async fn start<N>(
        env: E,
        replica: Replica<E>,
        network: N,
        settings: RaftSettings,
        checkpoint: Checkpoint,
        surroundings: Rc<dyn Surroundings>,
        buffers: BufferPool,
    ) -> Result<Self, StartGroupError>
    where
        N: RaftNetworkFactory<TypeConfig> + NotesAcks,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = GroupSnapshot<E>>,
    {
        let family = replica.family();
        let founding = FoundingV1::decode(replica.descriptor().bytes).map_err(|error| {
            let problem = DecodeStateError(error.to_string());
            StartGroupError::StateUnreadable { family, problem }
        })?;
        let state = Rc::new(RefCell::new(FamilyState::new(&founding)));
        let group =
            Group::start(env, replica, state.clone(), network, settings, checkpoint).await?;
        let inner = Inner {
            group,
            state,
            locks: RangeLocks::default(),
            inflight: Semaphore::new(FAMILY_INFLIGHT_BYTES_MAX / BLOCK_SIZE),
            buffers,
            surroundings,
            stages: Stages::default(),
            gather: Rc::default(),
            _rounds: OnceCell::new(),
            founding,
        };
        let inner = Rc::new(inner);
        let rounds = gather::keep(Rc::downgrade(&inner), inner.gather.clone());
        let task = OwnedTask(inner.group.env().spawn(rounds));
        assert!(inner._rounds.set(task).is_ok(), "set once");
        Ok(Self { inner })
    }

    /// The Raft group.
    pub fn group(&self) -> &Group<E> {
        &self.inner.group
    }

    /// The replicated state as it is applied here.
    pub fn state(&self) -> Ref<'_, FamilyState> {
        self.inner.state.borrow()
    }

    /// What the family was founded with.
    pub fn founding(&self) -> &FoundingV1 {
        &self.inner.founding
    }

    /// Does one operation, if this replica leads. Reads are linearizable; a write is durable on a
    /// majority and applied here when it is answered.
    ///
    /// # Errors
    /// [`ExecuteError`].
    pub async fn execute(
        &self,
        origin: Origin,
        operation: Operation,
    ) -> Result<OperationReply, ExecuteError> {
        match operation {
            Operation::Read(range) => self.read(&origin, range).await,
            Operation::Status(range) => self.status(&origin, range).await,
            Operation::Write { offset, data } => self.write(origin, offset, data).await,
            Operation::Zero(range) => self.zero(origin, range).await,
            Operation::Trim { start, count } => self.trim(origin, start, count).await,
        }
    }

    /// Proposes a control command; answers the state after it.
    ///
    /// # Errors
    /// [`ExecuteError`].
    pub async fn control(&self, command: FamilyCommand) -> Result<FamilyReplyV1, ExecuteError> {
        let command = Command::control(command.to_log());
        match self.inner.group.propose(command, None).await? {
            (_, ApplyReply::Control(bytes)) => {
                Ok(FamilyReplyV1::decode(bytes).expect("our own machine's encoding"))
            }
            (id, reply) => unreachable!("control entry {id} was answered {reply}"),
        }
    }

    /// Stops the member on this node.
    pub async fn stop(&self) {
        self.inner.group.stop().await;
    }
}
