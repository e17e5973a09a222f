//! The replicated state of a family, and apply's decision on each command.
//!
//! Pure. What is decided here decides guarantees **fenced** and **linearizable**: generation,
//! duplicates and size are checked at the entry's place in the log, the same on every replica.

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{AttachmentId, BranchId, Epoch, Generation, NodeId, Sequence};
use ballast_raft_store::entry::{Body, Command, Origin};
use ballast_raft_store::types::{ApplyReply, Rejection};
use bytes::Bytes;
use prost::Message;

use crate::command::{
    AttachV1, FamilyCommand, FamilyCommandV1, FamilyReplyV1, SetContentUnderV1, SetContentV1,
    Writer, refusal,
};
use crate::content::{Content, ContentRecord, ContentV1, Speaker};
use crate::leases::{LeaseTable, LeaseTableV1};
use crate::machine::{Decision, DecodeStateError, Machine};
use crate::writers::{WriterV1, Writers};

/// The branch of a volume that was never rolled back or cloned.
pub const ROOT_BRANCH: BranchId = BranchId(1);

/// 1: one writer, no leases, no content. 2: any number of writers, leases, content. 3: who formats; a
/// state without one is written as version 2.
const STATE_VERSION: u32 = 3;

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
    /// In version 1 only.
    #[prost(message, optional, tag = "5")]
    writer: Option<WriterV1>,
    #[prost(message, repeated, tag = "6")]
    writers: Vec<WriterV1>,
    #[prost(message, optional, tag = "7")]
    leases: Option<LeaseTableV1>,
    #[prost(message, optional, tag = "8")]
    content: Option<ContentV1>,
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

/// A family's replicated state.
pub struct FamilyState {
    founding_size: u64,
    sequence: Sequence,
    size: u64,
    generation: Generation,
    writers: Writers,
    leases: LeaseTable,
    content: ContentRecord,
}

impl FamilyState {
    /// The state at creation.
    pub fn new(founding: &FoundingV1) -> Self {
        Self {
            founding_size: founding.size,
            sequence: Sequence(0),
            size: founding.size,
            generation: Generation(0),
            writers: Writers::default(),
            leases: LeaseTable::default(),
            content: ContentRecord::default(),
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

    /// Who may write; the newest, where several may.
    pub fn writer(&self) -> Option<Writer> {
        self.writers.newest()
    }

    /// All who may write.
    pub fn writers(&self) -> impl Iterator<Item = Writer> {
        self.writers.all()
    }

    /// The leases that the family goes by.
    pub fn leases(&self) -> &LeaseTable {
        &self.leases
    }

    /// What the volume holds, and whether anything was ever written to it.
    pub fn content(&self) -> (&Content, bool) {
        (self.content.content(), self.is_written())
    }

    fn is_written(&self) -> bool {
        self.sequence != Sequence(0)
    }

    fn check(&mut self, origin: &Origin, end_block: u64) -> Result<(), Rejection> {
        self.writers.check(origin, &self.leases)?;
        if end_block > self.size.div_ceil(BLOCK_SIZE_U64) {
            return Err(Rejection::OutsideVolume);
        }
        self.writers.note(origin);
        Ok(())
    }

    fn control(&mut self, bytes: &Bytes) -> Option<FamilyReplyV1> {
        let command = FamilyCommandV1::decode(bytes.clone()).ok()?.command?;
        let mut named = None;
        let mut why = 0;
        let refused = match command {
            FamilyCommand::Attach(attach) => {
                named = Some(AttachmentId(attach.attachment));
                why = self.attach(&attach).err().unwrap_or(0);
                why != 0
            }
            FamilyCommand::Detach(detach) => {
                let attachment = AttachmentId(detach.attachment);
                self.writers.remove(attachment, Generation(detach.generation));
                false
            }
            FamilyCommand::Resize(resize) => {
                let grows = resize.size >= self.size;
                self.size = self.size.max(resize.size);
                !grows
            }
            FamilyCommand::SetLeases(leases) => {
                if self.leases.set(&leases) {
                    self.writers.keep_leased(&self.leases);
                }
                false
            }
            FamilyCommand::SetContent(said) => !self.say(said, Speaker::Earlier(Epoch(0)))?,
            FamilyCommand::SetContentUnder(SetContentUnderV1 { content, epoch }) => {
                why = if epoch == 0 { refusal::NOT_LEASED } else { self.not_leased(epoch) };
                let said = content?;
                Content::from_kind(said.kind, &said.fs_type)?;
                why != 0 || !self.say(said, Speaker::Earlier(Epoch(epoch)))?
            }
            FamilyCommand::SayContent(SetContentUnderV1 { content, epoch }) => {
                why = self.not_leased(epoch);
                let said = content?;
                Content::from_kind(said.kind, &said.fs_type)?;
                why != 0 || !self.say(said, Speaker::Known(Epoch(epoch)))?
            }
        };
        let writer = named.and_then(|named| self.writers.get(named)).or_else(|| self.writer());
        Some(FamilyReplyV1 { refused, why, ..self.reply(writer) })
    }

    /// Why a holder can't speak of the content; 0 when it can. Said by one that was overtaken, it may be
    /// about what another one destroyed.
    fn not_leased(&self, epoch: u64) -> u32 {
        let may_speak = epoch == 0 || self.leases.lets_write(Epoch(epoch));
        if may_speak { 0 } else { refusal::NOT_LEASED }
    }

    /// None for a kind of content that this program does not know.
    fn say(&mut self, said: SetContentV1, by: Speaker) -> Option<bool> {
        let asked = Content::from_kind(said.kind, &said.fs_type)?;
        let written = self.is_written();
        Some(self.content.say(asked, by, written))
    }

    fn reply(&self, writer: Option<Writer>) -> FamilyReplyV1 {
        FamilyReplyV1 {
            refused: false,
            attachment: writer.map_or(0, |writer| writer.attachment.0),
            generation: writer.map_or(self.generation, |writer| writer.generation).0,
            node: writer.map_or(0, |writer| writer.node.0),
            size: self.size,
            why: 0,
            content: self.content.content().kind(),
            fs_type: self.content.content().fs_type().to_owned(),
            ever_written: self.is_written(),
        }
    }

    fn attach(&mut self, ask: &AttachV1) -> Result<(), u32> {
        let attachment = AttachmentId(ask.attachment);
        if self.writers.get(attachment).is_some() {
            return Ok(());
        }
        let epoch = Epoch(ask.epoch);
        if !self.leases.lets_write(epoch) {
            let leased = epoch == Epoch(0);
            return Err(if leased { refusal::LEASED } else { refusal::NOT_LEASED });
        }
        if Generation(ask.seen_generation) != self.generation {
            return Err(refusal::RACED);
        }
        self.generation = Generation(self.generation.0 + 1);
        let shared = self.leases.grant(epoch).is_some_and(|grant| grant.shared);
        let (generation, node) = (self.generation, NodeId(ask.node));
        self.writers.admit(Writer { attachment, generation, node, epoch }, shared);
        Ok(())
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
        self.content.note_write(command.origin.epoch);
        let sequence = self.next_sequence();
        match command.body {
            Body::Write { .. } => Decision::Write { branch: ROOT_BRANCH, sequence },
            _ => Decision::Trim { branch: ROOT_BRANCH, sequence },
        }
    }

    fn encode(&self) -> Bytes {
        let state = StateV1 {
            version: if self.content.is_bound() { STATE_VERSION } else { 2 },
            sequence: self.sequence.0,
            size: self.size,
            generation: self.generation.0,
            writer: None,
            writers: self.writers.to_state(),
            leases: Some(self.leases.to_state()),
            content: Some(self.content.to_state()),
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
        if !(1..=STATE_VERSION).contains(&state.version) {
            let found = state.version;
            return Err(DecodeStateError(format!(
                "family state has version {found}, this program reads 1 to {STATE_VERSION}: \
                 upgrade it"
            )));
        }
        let content = match &state.content {
            None => ContentRecord::default(),
            Some(content) => ContentRecord::from_state(content)
                .ok_or_else(|| DecodeStateError("unknown content: upgrade this node".into()))?,
        };
        let only = state.writer.map(|writer| writer.of_generation(state.generation));
        self.sequence = Sequence(state.sequence);
        self.size = state.size;
        self.generation = Generation(state.generation);
        self.writers = Writers::from_state(only.into_iter().chain(state.writers).collect());
        self.leases = state.leases.as_ref().map(LeaseTable::from_state).unwrap_or_default();
        self.content = content;
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
    use crate::command::{DetachV1, GrantV1, ResizeV1, SetLeasesV1};

    fn attach(state: &mut FamilyState, attachment: u64, seen_generation: u64) -> FamilyReplyV1 {
        attach_under(state, attachment, seen_generation, 0)
    }

    fn attach_under(
        state: &mut FamilyState,
        attachment: u64,
        seen_generation: u64,
        epoch: u64,
    ) -> FamilyReplyV1 {
        let attach = AttachV1 { attachment, node: 1, seen_generation, epoch };
        control(state, FamilyCommand::Attach(attach))
    }

    fn lease(state: &mut FamilyState, revision: u64, grants: &[(u64, bool, bool)]) {
        let grant = |&(epoch, writes, shared): &_| GrantV1 { epoch, writes, shared };
        let grants = grants.iter().map(grant).collect();
        let reply = control(state, FamilyCommand::SetLeases(SetLeasesV1 { revision, grants }));
        assert!(!reply.refused);
    }

    fn write_under(
        state: &mut FamilyState,
        (attachment, generation, epoch): (u64, u64, u64),
        request: u64,
    ) -> Decision {
        let origin = Origin {
            attachment: AttachmentId(attachment),
            generation: Generation(generation),
            epoch: Epoch(epoch),
            request,
            ..Origin::default()
        };
        state.decide(&Command::write(origin, 0, AlignedBuf::zeroed(4096).freeze()))
    }

    fn is_written(decision: Decision) -> bool {
        matches!(decision, Decision::Write { .. })
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

    #[test]
    fn a_new_lease_fences_what_the_old_holder_still_sends() {
        let mut state = fresh();
        lease(&mut state, 1, &[(1, true, false)]);
        assert_eq!(attach(&mut state, 6, 0).why, refusal::LEASED);
        assert_eq!(attach_under(&mut state, 6, 0, 2).why, refusal::NOT_LEASED);
        assert_eq!(attach_under(&mut state, 7, 0, 1).generation, 1);
        assert!(is_written(write_under(&mut state, (7, 1, 1), 1)));
        assert_eq!(write_under(&mut state, (7, 1, 0), 2), rejected(Rejection::StaleEpoch));

        lease(&mut state, 2, &[(2, true, false)]);
        assert_eq!(write_under(&mut state, (7, 1, 1), 2), rejected(Rejection::StaleEpoch));
        assert_eq!(attach_under(&mut state, 8, 1, 2).generation, 2);
        lease(&mut state, 1, &[(1, true, false)]);
        assert_eq!(attach_under(&mut state, 9, 2, 1).why, refusal::NOT_LEASED, "came late");
        assert!(is_written(write_under(&mut state, (8, 2, 2), 1)));

        lease(&mut state, 3, &[]);
        assert_eq!(write_under(&mut state, (8, 2, 2), 2), rejected(Rejection::StaleEpoch));
        assert_eq!(attach(&mut state, 10, 2).generation, 3, "nobody leases it any more");
        lease(&mut state, 4, &[(3, false, true)]);
        assert_eq!(write(&mut state, 10, 3, 1), rejected(Rejection::StaleGeneration));
        assert_eq!(attach_under(&mut state, 11, 3, 3).why, refusal::NOT_LEASED, "it only reads");
    }

    #[test]
    fn holders_of_shared_leases_write_side_by_side() {
        let mut state = fresh();
        lease(&mut state, 1, &[(1, true, true), (2, true, true)]);
        assert_eq!(attach_under(&mut state, 7, 0, 1).generation, 1);
        assert_eq!(attach_under(&mut state, 8, 1, 2).generation, 2);
        for request in [1, 2] {
            assert!(is_written(write_under(&mut state, (7, 1, 1), request)));
            assert!(is_written(write_under(&mut state, (8, 2, 2), request)));
        }
        assert_eq!(attach_under(&mut state, 9, 2, 1).generation, 3, "the first host comes again");
        assert_eq!(write_under(&mut state, (7, 1, 1), 3), rejected(Rejection::StaleGeneration));
        assert!(is_written(write_under(&mut state, (8, 2, 2), 3)));

        let mut again = fresh();
        again.restore(&state.encode()).unwrap();
        assert_eq!(again.encode(), state.encode());
        assert_eq!(write_under(&mut again, (8, 2, 2), 3), rejected(Rejection::Duplicate));
        lease(&mut again, 2, &[(1, true, true)]);
        assert_eq!(write_under(&mut again, (8, 2, 2), 4), rejected(Rejection::StaleEpoch));
        assert!(is_written(write_under(&mut again, (9, 3, 1), 1)));
    }

    #[test]
    fn the_record_decides_on_formatting() {
        let mut state = fresh();
        let ask = |state: &mut FamilyState, kind, fs_type: &str| {
            let fs_type = fs_type.to_owned();
            control(state, FamilyCommand::SetContent(SetContentV1 { kind, fs_type }))
        };
        assert!(!ask(&mut state, 2, "xfs").refused);
        attach(&mut state, 7, 0);
        assert!(is_written(write(&mut state, 7, 1, 1)));
        assert!(!ask(&mut state, 2, "ext4").refused, "nobody has used it");
        let reply = ask(&mut state, 3, "ext4");
        assert_eq!((reply.refused, reply.content, &reply.fs_type[..]), (false, 3, "ext4"));
        let reply = ask(&mut state, 2, "ext4");
        assert_eq!((reply.refused, reply.content, reply.ever_written), (true, 3, true));
        let mut again = fresh();
        again.restore(&state.encode()).unwrap();
        assert_eq!(again.content(), (&Content::Filesystem("ext4".into()), true));

        let mut raw = fresh();
        attach(&mut raw, 7, 0);
        assert!(is_written(write(&mut raw, 7, 1, 1)));
        assert!(ask(&mut raw, 2, "ext4").refused, "somebody wrote to it");
    }

    #[test]
    fn what_a_former_holder_says_of_the_content_is_refused() {
        let mut state = fresh();
        let say = |state: &mut FamilyState, epoch, kind| {
            let content = Some(SetContentV1 { kind, fs_type: "ext4".into() });
            let said = SetContentUnderV1 { content, epoch };
            let reply = control(state, FamilyCommand::SetContentUnder(said));
            assert_eq!(reply.refused, reply.why != 0 || reply.content != kind);
            (reply.refused, reply.why, reply.content)
        };
        assert_eq!(say(&mut state, 1, 2), (true, refusal::NOT_LEASED, 1), "nobody leases it");
        assert_eq!(say(&mut state, 0, 2), (true, refusal::NOT_LEASED, 1));
        lease(&mut state, 1, &[(1, true, false)]);
        assert_eq!(say(&mut state, 1, 2), (false, 0, 2));
        // Another host takes the lease, and formats anew; then the first one is done.
        lease(&mut state, 2, &[(2, true, false)]);
        assert_eq!(say(&mut state, 2, 2), (false, 0, 2));
        assert_eq!(say(&mut state, 1, 3), (true, refusal::NOT_LEASED, 2));
        assert_eq!(say(&mut state, 2, 3), (false, 0, 3));
        assert_eq!(say(&mut state, 2, 2), (true, 0, 3), "it holds data");
        lease(&mut state, 3, &[(3, false, true)]);
        assert_eq!(say(&mut state, 3, 3), (true, refusal::NOT_LEASED, 3), "it only reads");
    }

    /// never-format-data: what another host wrote meanwhile is not formatted.
    #[test]
    fn a_write_under_another_lease_ends_formatting() {
        let say = |state: &mut FamilyState, epoch, kind| {
            let content = Some(SetContentV1 { kind, fs_type: "ext4".into() });
            let reply =
                control(state, FamilyCommand::SayContent(SetContentUnderV1 { content, epoch }));
            (reply.refused, reply.why, reply.content)
        };
        let begun = || {
            let mut state = fresh();
            lease(&mut state, 1, &[(1, true, false)]);
            assert_eq!(say(&mut state, 2, 2), (true, refusal::NOT_LEASED, 1));
            assert_eq!(say(&mut state, 1, 2), (false, 0, 2));
            assert_eq!(attach_under(&mut state, 7, 0, 1).generation, 1);
            assert!(is_written(write_under(&mut state, (7, 1, 1), 1)));
            lease(&mut state, 2, &[(2, true, false)]);
            let mut again = fresh();
            again.restore(&state.encode()).unwrap();
            assert_eq!(again.encode(), state.encode());
            again
        };
        let mut died = begun();
        assert_eq!(write_under(&mut died, (7, 1, 1), 2), rejected(Rejection::StaleEpoch));
        assert_eq!(say(&mut died, 2, 2), (false, 0, 2), "who began it is out");
        assert_eq!(say(&mut died, 2, 3), (false, 0, 3));

        let mut used = begun();
        assert_eq!(attach_under(&mut used, 8, 1, 2).generation, 2);
        assert!(is_written(write_under(&mut used, (8, 2, 2), 1)));
        lease(&mut used, 3, &[(3, true, false)]);
        assert_eq!(say(&mut used, 3, 2), (true, 0, 4), "it holds what host 2 wrote");
        assert_eq!(say(&mut used, 0, 2), (true, 0, 4));
    }

    /// Held by files that were written once: a difference is a new version.
    #[test]
    fn states_of_each_version_stay_as_they_are() {
        let hex = |bytes: &[u8]| bytes.iter().map(|it| format!("{it:02x}")).collect::<String>();
        let mut state = fresh();
        lease(&mut state, 1, &[(5, true, true), (6, false, true)]);
        attach_under(&mut state, 7, 0, 5);
        assert_eq!(include_str!("golden/state-v2.txt").trim(), hex(&state.encode()));
        let content = Some(SetContentV1 { kind: 2, fs_type: "ext4".into() });
        let said = SetContentUnderV1 { content, epoch: 5 };
        control(&mut state, FamilyCommand::SayContent(said));
        assert!(is_written(write_under(&mut state, (7, 1, 5), 1)));
        assert_eq!(include_str!("golden/state-v3.txt").trim(), hex(&state.encode()));
    }

    #[test]
    fn state_of_version_1_is_understood() {
        let mut state = fresh();
        attach(&mut state, 7, 0);
        assert!(is_written(write(&mut state, 7, 1, 5)));
        let mut old = StateV1::decode(state.encode()).unwrap();
        old.version = 1;
        old.writer = old.writers.pop().map(|writer| writer.of_generation(0));
        (old.leases, old.content) = (None, None);
        let mut again = fresh();
        again.restore(&old.encode_to_vec()).unwrap();
        assert_eq!(again.encode(), state.encode());
        old.version = 4;
        assert!(again.restore(&old.encode_to_vec()).is_err());
    }
}
