//! What a volume holds, by its own record: guarantee **never-format-data**.
//!
//! Pure, part of the replicated state. Whoever formats asks here first and never goes by a probe:
//! a probe that fails or finds nothing says nothing about what was written.
//!
//! That a volume is being formatted is bound to the lease under which it was said: the first write under
//! another one is data, and ends it. Not on the write path but for that look (step 7).

use ballast_block::Epoch;
use prost::Message;

use crate::command::SetContentV1;

/// What a volume holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// Nobody has said what it is for.
    #[default]
    Blank,
    /// A file system is being made, by its type. Nobody has used it before this ends: it may be
    /// made again, by the holder of a lease.
    Formatting(String),
    /// A file system, by its type, for ever.
    Filesystem(String),
    /// Used as a raw device, for ever.
    Raw,
}

/// As it is kept in the family's state.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentV1 {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(string, tag = "2")]
    fs_type: String,
    /// Since version 3 of the state.
    #[prost(uint64, optional, tag = "3")]
    formatter: Option<u64>,
}

/// What a volume holds, and who is formatting it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ContentRecord {
    content: Content,
    /// While it is being formatted: the lease of who said so, 0 = an administrator without one. None: an
    /// earlier program said so, and nobody knows who.
    formatter: Option<Epoch>,
}

/// Who says what a volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// Under a lease in force that writes; 0 = an administrator.
    Known(Epoch),
    /// The same, by a program that binds formatting to nobody.
    Earlier(Epoch),
}

/// The kinds, as they stand in the log and on the wire. Frozen.
const BLANK: u32 = 1;
const FORMATTING: u32 = 2;
const FILESYSTEM: u32 = 3;
const RAW: u32 = 4;

impl Content {
    /// Its kind, as a number that never changes.
    pub fn kind(&self) -> u32 {
        match self {
            Content::Blank => BLANK,
            Content::Formatting(_) => FORMATTING,
            Content::Filesystem(_) => FILESYSTEM,
            Content::Raw => RAW,
        }
    }

    /// The file system's type; empty where there is none.
    pub fn fs_type(&self) -> &str {
        match self {
            Content::Formatting(fs_type) | Content::Filesystem(fs_type) => fs_type,
            Content::Blank | Content::Raw => "",
        }
    }

    /// From its kind; none for a kind that this program does not know.
    pub fn from_kind(kind: u32, fs_type: &str) -> Option<Self> {
        Some(match kind {
            BLANK => Content::Blank,
            FORMATTING => Content::Formatting(fs_type.to_owned()),
            FILESYSTEM => Content::Filesystem(fs_type.to_owned()),
            RAW => Content::Raw,
            _ => return None,
        })
    }
}

impl ContentRecord {
    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// Becomes what is asked, where that can't destroy anything. Answers whether it is so now.
    /// `written`: whether anything was ever written to the volume.
    pub(crate) fn say(&mut self, asked: Content, by: Speaker, written: bool) -> bool {
        let allowed = match (&self.content, &asked) {
            (Content::Blank, Content::Formatting(_)) => !written,
            (Content::Formatting(_), Content::Formatting(_)) => self.may_begin_again(by, written),
            (Content::Formatting(now), Content::Filesystem(made)) => {
                now == made && self.may_end(by)
            }
            (Content::Blank | Content::Formatting(_), Content::Raw) => true,
            (now, asked) => now == asked,
        };
        if allowed {
            self.formatter = match (&asked, by) {
                (Content::Formatting(_), Speaker::Known(epoch)) => Some(epoch),
                _ => None,
            };
            self.content = asked;
        }
        allowed
    }

    /// What was written since is the work of whoever began, if that one had a lease: a write under
    /// another would have ended it. Of those without a lease nobody knows which one wrote.
    fn may_begin_again(&self, by: Speaker, written: bool) -> bool {
        match (self.formatter, by) {
            (None, Speaker::Earlier(_)) => true,
            (Some(began), Speaker::Known(by) | Speaker::Earlier(by)) if began != Epoch(0) => {
                by != Epoch(0) || !written
            }
            _ => !written,
        }
    }

    /// Who began says that it is done, or an administrator.
    fn may_end(&self, by: Speaker) -> bool {
        let (Speaker::Known(by) | Speaker::Earlier(by)) = by;
        by == Epoch(0) || self.formatter.is_none_or(|began| began == by)
    }

    /// A write, zeroing or trim under that lease (0 = none) is applied. That of another than who formats
    /// is data: what it is nobody has said, so it is never formatted again.
    pub(crate) fn note_write(&mut self, epoch: Epoch) {
        if self.formatter.is_some_and(|formatter| formatter != epoch) {
            *self = Self { content: Content::Raw, formatter: None };
        }
    }

    /// Whether only programs that know of formatters may read it.
    pub(crate) fn is_bound(&self) -> bool {
        self.formatter.is_some()
    }

    pub(crate) fn to_state(&self) -> ContentV1 {
        ContentV1 {
            kind: self.content.kind(),
            fs_type: self.content.fs_type().to_owned(),
            formatter: self.formatter.map(|epoch| epoch.0),
        }
    }

    pub(crate) fn from_state(state: &ContentV1) -> Option<Self> {
        let content = Content::from_kind(state.kind, &state.fs_type)?;
        Some(Self { content, formatter: state.formatter.map(Epoch) })
    }
}

impl SetContentV1 {
    /// Asks for `content`.
    pub fn of(content: &Content) -> Self {
        Self { kind: content.kind(), fs_type: content.fs_type().to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADMIN: Speaker = Speaker::Known(Epoch(0));

    fn host(epoch: u64) -> Speaker {
        Speaker::Known(Epoch(epoch))
    }

    fn fs(name: &str) -> Content {
        Content::Filesystem(name.to_owned())
    }

    fn formatting(name: &str) -> Content {
        Content::Formatting(name.to_owned())
    }

    fn formatted_by(by: Speaker) -> ContentRecord {
        let mut record = ContentRecord::default();
        assert!(record.say(formatting("ext4"), by, false));
        record
    }

    fn says(record: &ContentRecord, asked: Content, by: Speaker, written: bool) -> bool {
        let mut after = record.clone();
        let done = after.say(asked.clone(), by, written);
        assert_eq!(after.content, if done { asked } else { record.content.clone() });
        assert!(done || after == *record);
        done
    }

    #[test]
    fn what_holds_data_is_never_formatted() {
        for by in [ADMIN, host(7), Speaker::Earlier(Epoch(0)), Speaker::Earlier(Epoch(7))] {
            let blank = ContentRecord::default();
            assert!(says(&blank, formatting("ext4"), by, false));
            assert!(!says(&blank, formatting("ext4"), by, true));
            assert!(!says(&blank, fs("ext4"), by, false), "nobody has made it");
            assert!(says(&blank, Content::Raw, by, true));
            let begun = formatted_by(by);
            assert!(says(&begun, formatting("xfs"), by, false), "nobody has used it");
            assert!(says(&begun, fs("ext4"), by, true));
            assert!(!says(&begun, fs("xfs"), by, true));
            assert!(says(&begun, Content::Raw, by, true));
            for content in [fs("ext4"), Content::Raw] {
                let holds = ContentRecord { content: content.clone(), formatter: None };
                assert!(says(&holds, content, by, true), "a retry");
                assert!(!says(&holds, formatting("ext4"), by, true));
                assert!(!says(&holds, Content::Blank, by, true));
            }
            let made = ContentRecord { content: fs("ext4"), formatter: None };
            assert!(!says(&made, Content::Raw, by, true));
        }
    }

    #[test]
    fn formatting_is_bound_to_who_began() {
        let begun = formatted_by(host(7));
        assert!(says(&begun, formatting("ext4"), host(7), true), "it died on the way");
        assert!(says(&begun, formatting("ext4"), host(9), true), "and lost its lease");
        assert!(!says(&begun, formatting("ext4"), ADMIN, true), "who wrote that, and what?");
        assert!(!says(&begun, fs("ext4"), host(9), true), "it made none");
        assert!(says(&begun, fs("ext4"), ADMIN, true));

        let mut own = begun.clone();
        own.note_write(Epoch(7));
        assert_eq!(own, begun);
        for other in [0, 9] {
            let mut foreign = begun.clone();
            foreign.note_write(Epoch(other));
            assert_eq!(foreign.content, Content::Raw);
            for by in [ADMIN, host(7), host(9), host(11)] {
                assert!(!says(&foreign, formatting("ext4"), by, true), "it holds data");
                assert!(!says(&foreign, fs("ext4"), by, true));
            }
        }

        let mut without = formatted_by(ADMIN);
        without.note_write(Epoch(0));
        assert!(says(&without, fs("ext4"), ADMIN, true));
        for by in [ADMIN, host(7)] {
            assert!(!says(&without, formatting("ext4"), by, true), "anybody may have written");
        }
        without.note_write(Epoch(7));
        assert_eq!(without.content, Content::Raw);
    }

    /// What earlier programs have in the log is decided as they do.
    #[test]
    fn formatting_of_an_earlier_program_is_bound_to_nobody() {
        let mut begun = formatted_by(Speaker::Earlier(Epoch(7)));
        begun.note_write(Epoch(9));
        assert_eq!(begun.content, formatting("ext4"));
        assert!(says(&begun, formatting("xfs"), Speaker::Earlier(Epoch(0)), true));
        assert!(says(&begun, fs("ext4"), Speaker::Earlier(Epoch(9)), true));
        assert!(!says(&begun, formatting("ext4"), host(9), true), "who wrote that?");
        assert!(says(&begun, fs("ext4"), host(9), true));
    }

    #[test]
    fn kinds_go_there_and_back() {
        let all = ["ext4", "xfs"].map(|fs| [2, 3].map(|kind| Content::from_kind(kind, fs)));
        for content in
            all.into_iter().flatten().chain([1, 4].map(|kind| Content::from_kind(kind, "")))
        {
            let record = ContentRecord { content: content.expect("known"), formatter: None };
            assert_eq!(ContentRecord::from_state(&record.to_state()), Some(record));
        }
        for by in [ADMIN, host(7)] {
            let record = formatted_by(by);
            assert_eq!(ContentRecord::from_state(&record.to_state()), Some(record));
        }
        assert_eq!(Content::from_kind(5, ""), None);
    }
}
