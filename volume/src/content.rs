//! What a volume holds, by its own record: guarantee **never-format-data**.
//!
//! Pure, part of the replicated state. Whoever formats asks here first and never goes by a probe:
//! a probe that fails or finds nothing says nothing about what was written.

use prost::Message;

use crate::command::SetContentV1;

/// What a volume holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// Nobody has said what it is for.
    #[default]
    Blank,
    /// A file system is being made, by its type. Nobody has used it before this ends: it may be
    /// made again.
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

    /// Becomes what is asked, where that can't destroy anything. Answers whether it is so now.
    /// `written`: whether anything was ever written to the volume.
    pub(crate) fn become_content(&mut self, asked: Content, written: bool) -> bool {
        let allowed = match (&*self, &asked) {
            (now, asked) if now == asked => true,
            (Content::Blank, Content::Formatting(_)) => !written,
            (Content::Formatting(_), Content::Formatting(_)) => true,
            (Content::Formatting(now), Content::Filesystem(made)) => now == made,
            (Content::Blank | Content::Formatting(_), Content::Raw) => true,
            _ => false,
        };
        if allowed {
            *self = asked;
        }
        allowed
    }

    pub(crate) fn to_state(&self) -> ContentV1 {
        ContentV1 { kind: self.kind(), fs_type: self.fs_type().to_owned() }
    }

    pub(crate) fn from_state(state: &ContentV1) -> Option<Self> {
        Self::from_kind(state.kind, &state.fs_type)
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

    #[test]
    fn what_holds_data_is_never_formatted() {
        let fs = |name: &str| Content::Filesystem(name.to_owned());
        let formatting = |name: &str| Content::Formatting(name.to_owned());
        let become_content = |from: &Content, to: Content, written| {
            let mut content = from.clone();
            let done = content.become_content(to.clone(), written);
            assert_eq!(content, if done { to } else { from.clone() });
            done
        };
        assert!(become_content(&Content::Blank, formatting("ext4"), false));
        assert!(!become_content(&Content::Blank, formatting("ext4"), true));
        assert!(!become_content(&Content::Blank, fs("ext4"), false), "nobody has made it");
        assert!(become_content(&formatting("ext4"), formatting("xfs"), true), "nobody has used it");
        assert!(become_content(&formatting("ext4"), fs("ext4"), true));
        assert!(!become_content(&formatting("ext4"), fs("xfs"), true));
        for from in [fs("ext4"), Content::Raw] {
            assert!(!become_content(&from, formatting("ext4"), true));
            assert!(!become_content(&from, Content::Blank, true));
        }
        assert!(become_content(&fs("ext4"), fs("ext4"), true), "a retry");
        assert!(!become_content(&fs("ext4"), Content::Raw, true));
        assert!(become_content(&Content::Blank, Content::Raw, true));
        assert!(become_content(&formatting("ext4"), Content::Raw, true));
    }

    #[test]
    fn kinds_go_there_and_back() {
        let all = ["ext4", "xfs"].map(|fs| [2, 3].map(|kind| Content::from_kind(kind, fs)));
        for content in
            all.into_iter().flatten().chain([1, 4].map(|kind| Content::from_kind(kind, "")))
        {
            let content = content.expect("known");
            assert_eq!(Content::from_state(&content.to_state()), Some(content));
        }
        assert_eq!(Content::from_kind(5, ""), None);
    }
}
