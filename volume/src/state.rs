//! The replicated state of a family, and apply's decision on each command.
//!
//! Pure. What is decided here decides guarantees **fenced** and **linearizable**: generation,
//! duplicates and size are checked at the entry's place in the log, the same on every replica.

use std::collections::BTreeSet;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{AttachmentId, BranchId, Generation, NodeId, Sequence};
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::types::{ApplyReply, Rejection};
use bytes::Bytes;
use prost::Message;

use crate::command::{FamilyCommand, FamilyCommandV1, FamilyReplyV1, Writer};
use crate::machine::{Decision, DecodeStateError, Machine};

/// The branch of a volume that was never rolled back or cloned.
pub const ROOT_BRANCH: BranchId = BranchId(1);

const STATE_VERSION: u32 = 1;

#[derive(Clone, PartialEq, Message)]
struct StateV1 {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(uint64, tag = "3")]
    size: u64,
    #[prost(uint64, tag = "4")]
    generation: u64,
    #[prost(message, optional, tag = "5")]
    writer: Option<WriterV1>,
}

#[derive(Clone, PartialEq, Message)]
struct WriterV1 {
    #[prost(uint64, tag = "1")]
    attachment: u64,
    #[prost(uint32, tag = "2")]
    node: u32,
    #[prost(uint64, tag = "3")]
    answered_below: u64,
    #[prost(uint64, repeated, tag = "4")]
    applied: Vec<u64>,
}

/// The state that a family is created with, kept in each replica's descriptor.
#[derive(Clone, PartialEq, Message)]
pub struct FoundingV1 {
    /// The volume's name, so that a disk explains itself.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The volume's size at creation, in bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

struct WriterState {
    attachment: AttachmentId,
    node: NodeId,
    /// Requests below were answered to the host: a retry of one can't be.
    answered_below: u64,
    /// Requests at or above `answered_below` that were applied. Bounded by what the serving node
    /// keeps in flight.
    applied: BTreeSet<u64>,
}

/// A family's replicated state.
pub struct FamilyState {
    founding_size: u64,
    sequence: Sequence,
    size: u64,
    generation: Generation,
    writer: Option<WriterState>,
}

impl FamilyState {
    /// The state at creation.
    pub fn new(founding: &FoundingV1) -> Self {
        Self {
            founding_size: founding.size,
            sequence: Sequence(0),
            size: founding.size,
            generation: Generation(0),
            writer: None,
        }
    }

    /// The volume's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The generation of the newest attachment there ever was.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Who may write.
    pub fn writer(&self) -> Option<Writer> {
        let generation = self.generation;
        let writer = self.writer.as_ref()?;
        Some(Writer { attachment: writer.attachment, generation, node: writer.node })
    }

    fn check(&mut self, origin: &Origin, end_block: u64) -> Result<(), Rejection> {
        let size = self.size;
        let current = self.generation;
        let writer = self.writer.as_mut().ok_or(Rejection::StaleGeneration)?;
        if writer.attachment != origin.attachment || current != origin.generation {
            return Err(Rejection::StaleGeneration);
        }
        if origin.request < writer.answered_below || writer.applied.contains(&origin.request) {
            return Err(Rejection::Duplicate);
        }
        if end_block > size.div_ceil(BLOCK_SIZE_U64) {
            return Err(Rejection::OutsideVolume);
        }
        if origin.answered_below > writer.answered_below {
            writer.answered_below = origin.answered_below;
            writer.applied = writer.applied.split_off(&origin.answered_below);
        }
        writer.applied.insert(origin.request);
        Ok(())
    }

    fn control(&mut self, bytes: &Bytes) -> Option<FamilyReplyV1> {
        let command = FamilyCommandV1::decode(bytes.clone()).ok()?.command?;
        let refused = match command {
            FamilyCommand::Attach(attach) => !self.attach(
                AttachmentId(attach.attachment),
                NodeId(attach.node),
                Generation(attach.seen_generation),
            ),
            FamilyCommand::Detach(detach) => {
                let named = self.writer().is_some_and(|writer| {
                    writer.attachment.0 == detach.attachment
                        && writer.generation.0 == detach.generation
                });
                if named {
                    self.writer = None;
                }
                false
            }
            FamilyCommand::Resize(resize) => {
                let grows = resize.size >= self.size;
                self.size = self.size.max(resize.size);
                !grows
            }
        };
        let writer = self.writer();
        Some(FamilyReplyV1 {
            refused,
            attachment: writer.map_or(0, |writer| writer.attachment.0),
            generation: self.generation.0,
            node: writer.map_or(0, |writer| writer.node.0),
            size: self.size,
        })
    }

    fn attach(&mut self, attachment: AttachmentId, node: NodeId, seen: Generation) -> bool {
        if self.writer.as_ref().is_some_and(|writer| writer.attachment == attachment) {
            return true;
        }
        if seen != self.generation {
            return false;
        }
        self.generation = Generation(self.generation.0 + 1);
        let applied = BTreeSet::new();
        self.writer = Some(WriterState { attachment, node, answered_below: 0, applied });
        true
    }

    fn next_sequence(&mut self) -> Sequence {
        self.sequence = Sequence(self.sequence.0 + 1);
        self.sequence
    }
}

impl Machine for FamilyState {
    fn decide(&mut self, command: &Command) -> Decision {
        let end_block = match &command.body {
            Body::Control(bytes) => {
                let Some(reply) = self.control(bytes) else {
                    return Decision::Halt("unknown family command: upgrade this node".into());
                };
                return Decision::Nothing(ApplyReply::Control(reply.encode_to_vec().into()));
            }
            Body::Write { range, .. } => range.end(),
            Body::Trim { start, count } => start + count,
        };
        if let Err(rejection) = self.check(&command.origin, end_block) {
            return Decision::Nothing(ApplyReply::Rejected(rejection));
        }
        let sequence = self.next_sequence();
        match command.body {
            Body::Write { .. } => Decision::Write { branch: ROOT_BRANCH, sequence },
            _ => Decision::Trim { branch: ROOT_BRANCH, sequence },
        }
    }

    fn encode(&self) -> Bytes {
        let writer = self.writer.as_ref().map(|writer| WriterV1 {
            attachment: writer.attachment.0,
            node: writer.node.0,
            answered_below: writer.answered_below,
            applied: writer.applied.iter().copied().collect(),
        });
        let state = StateV1 {
            version: STATE_VERSION,
            sequence: self.sequence.0,
            size: self.size,
            generation: self.generation.0,
            writer,
        };
        state.encode_to_vec().into()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DecodeStateError> {
        if state.is_empty() {
            let size = self.founding_size;
            *self = Self::new(&FoundingV1 { name: String::new(), size });
            return Ok(());
        }
        let state = StateV1::decode(state).map_err(|error| DecodeStateError(error.to_string()))?;
        if state.version != STATE_VERSION {
            let found = state.version;
            return Err(DecodeStateError(format!(
                "family state has version {found}, this program reads {STATE_VERSION}: upgrade it"
            )));
        }
        self.sequence = Sequence(state.sequence);
        self.size = state.size;
        self.generation = Generation(state.generation);
        self.writer = state.writer.map(|writer| WriterState {
            attachment: AttachmentId(writer.attachment),
            node: NodeId(writer.node),
            answered_below: writer.answered_below,
            applied: writer.applied.into_iter().collect(),
        });
        Ok(())
    }

    fn sequence(&self) -> Sequence {
        self.sequence
    }
}

#[cfg(test)]
mod tests {
    use ballast_block::AlignedBuf;

    use super::*;
    use crate::command::{AttachV1, DetachV1, ResizeV1};

    fn attach(state: &mut FamilyState, attachment: u64, seen_generation: u64) -> FamilyReplyV1 {
        let attach = AttachV1 { attachment, node: 1, seen_generation };
        control(state, FamilyCommand::Attach(attach))
    }

    fn control(state: &mut FamilyState, command: FamilyCommand) -> FamilyReplyV1 {
        match state.decide(&Command::control(command.to_log())) {
            Decision::Nothing(ApplyReply::Control(bytes)) => FamilyReplyV1::decode(bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn write(state: &mut FamilyState, attachment: u64, generation: u64, request: u64) -> Decision {
        let origin = Origin {
            attachment: AttachmentId(attachment),
            generation: Generation(generation),
            request,
            answered_below: request.saturating_sub(4),
            ..Origin::default()
        };
        state.decide(&Command::write(origin, 0, AlignedBuf::zeroed(4096).freeze()))
    }

    fn rejected(rejection: Rejection) -> Decision {
        Decision::Nothing(ApplyReply::Rejected(rejection))
    }

    fn fresh() -> FamilyState {
        FamilyState::new(&FoundingV1 { name: "v".into(), size: 1 << 20 })
    }

    #[test]
    fn only_the_newest_generation_writes() {
        let mut state = fresh();
        assert_eq!(write(&mut state, 7, 1, 1), rejected(Rejection::StaleGeneration));
        assert_eq!(attach(&mut state, 7, 0).generation, 1);
        assert!(matches!(write(&mut state, 7, 1, 1), Decision::Write { .. }));
        assert!(attach(&mut state, 8, 0).refused, "a race lost");
        assert_eq!(attach(&mut state, 8, 1).generation, 2);
        assert_eq!(write(&mut state, 7, 1, 2), rejected(Rejection::StaleGeneration));
        assert!(matches!(write(&mut state, 8, 2, 1), Decision::Write { .. }));
        assert!(!attach(&mut state, 8, 1).refused, "a retry is answered alike");
        let detach = DetachV1 { attachment: 7, generation: 1 };
        assert_eq!(control(&mut state, FamilyCommand::Detach(detach)).attachment, 8);
        let detach = DetachV1 { attachment: 8, generation: 2 };
        assert_eq!(control(&mut state, FamilyCommand::Detach(detach)).attachment, 0);
        assert_eq!(write(&mut state, 8, 2, 2), rejected(Rejection::StaleGeneration));
    }

    #[test]
    fn a_retry_is_applied_once_also_after_a_restore() {
        let mut state = fresh();
        attach(&mut state, 7, 0);
        for request in [1, 3, 2, 9] {
            assert!(matches!(write(&mut state, 7, 1, request), Decision::Write { .. }));
        }
        let mut again = fresh();
        again.restore(&state.encode()).unwrap();
        assert_eq!(again.encode(), state.encode());
        for request in [1, 3, 9, 4] {
            assert_eq!(write(&mut again, 7, 1, request), rejected(Rejection::Duplicate));
        }
        assert!(matches!(write(&mut again, 7, 1, 6), Decision::Write { .. }));
    }

    #[test]
    fn size_only_grows_and_bounds_writes() {
        let mut state = fresh();
        attach(&mut state, 7, 0);
        assert!(control(&mut state, FamilyCommand::Resize(ResizeV1 { size: 4096 })).refused);
        let body = Body::Trim { start: 255, count: 2 };
        let origin = Origin {
            attachment: AttachmentId(7),
            generation: Generation(1),
            request: 1,
            ..Origin::default()
        };
        let command = Command { origin, body };
        assert_eq!(state.decide(&command), rejected(Rejection::OutsideVolume));
        control(&mut state, FamilyCommand::Resize(ResizeV1 { size: 2 << 20 }));
        assert!(matches!(state.decide(&command), Decision::Trim { .. }));
    }
}
