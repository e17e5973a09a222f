//! What a history may show that must not be. Owns the words only: what is judged is the oracle's.

use thiserror::Error;

use super::WriteId;

/// A guarantee was broken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Violation {
    /// A block's contents come from no write: **checked**.
    #[error("volume {volume} block {block}: a read returned bytes that no write made")]
    Garbage {
        /// The volume.
        volume: u64,
        /// The block.
        block: u64,
    },
    /// A read returned what was written to another volume; to one that had its name before, maybe.
    #[error("volume {volume} block {block}: a read returned {write:?} of volume {of}")]
    Foreign {
        /// The volume.
        volume: u64,
        /// The block.
        block: u64,
        /// What it was written to.
        of: u64,
        /// What was read.
        write: WriteId,
    },
    /// A read returned a write that had not begun, or not there.
    #[error("volume {volume} block {block}: {write:?} was read and never written there by then")]
    Ghost {
        /// The volume.
        volume: u64,
        /// The block.
        block: u64,
        /// What was read.
        write: WriteId,
    },
    /// A read returned a write that the host was told had not happened.
    #[error("volume {volume} block {block}: {write:?} was refused and is there")]
    Refused {
        /// The volume.
        volume: u64,
        /// The block.
        block: u64,
        /// What was read.
        write: WriteId,
    },
    /// A read returned something older than what surely was in effect: **linearizable**.
    #[error(
        "volume {volume} block {block}: {old:?} was seen although {newer:?} was in effect between"
    )]
    Stale {
        /// The volume.
        volume: u64,
        /// The block.
        block: u64,
        /// What was read; `None` for zeroes.
        old: Option<WriteId>,
        /// What should have been, or something later.
        newer: WriteId,
    },
    /// A write succeeded under an attachment that was replaced before it began: **fenced**,
    /// **one-writer**.
    #[error("volume {volume}: {write:?} succeeded although a newer attachment was admitted before")]
    TwoWriters {
        /// The volume.
        volume: u64,
        /// The write.
        write: WriteId,
    },
    /// A write succeeded under a lease although one of a newer epoch was in force before it began:
    /// **one-writer**.
    #[error(
        "volume {volume}: {write:?} succeeded under epoch {epoch} although {newer} was in force"
    )]
    OldEpoch {
        /// The volume.
        volume: u64,
        /// The write.
        write: WriteId,
        /// The epoch of its lease.
        epoch: u64,
        /// The newer one.
        newer: u64,
    },
    /// Somebody was let format what held data before they asked: **never-format-data**.
    #[error("volume {volume}: somebody was let format it after {data:?}, which is data")]
    MayFormat {
        /// The volume.
        volume: u64,
        /// The data.
        data: WriteId,
    },
    /// A file system was made over data: **never-format-data**.
    #[error(
        "volume {volume}: {made:?} of making a file system began after {data:?}, which is data"
    )]
    Formatted {
        /// The volume.
        volume: u64,
        /// The data.
        data: WriteId,
        /// What came over it.
        made: WriteId,
    },
    /// Somebody was let format a volume as one that was never written, and it was:
    /// **never-format-data**.
    #[error("volume {volume}: somebody was told that it was never written, after {write:?}")]
    NotBlank {
        /// The volume.
        volume: u64,
        /// What was written.
        write: WriteId,
    },
    /// A read saw a part of a write only: **atomic-write**.
    #[error("volume {volume}: a read saw {write:?} in one block and older data in block {block}")]
    Torn {
        /// The volume.
        volume: u64,
        /// The block that was older.
        block: u64,
        /// The write that was seen in part.
        write: WriteId,
    },
}
