//! What a host asks of a volume, and what it gets: the same for every protocol.

use bytes::Bytes;
use thiserror::Error;

use crate::{AlignedBuf, ByteRange, Payload};

/// One command of a host. A protocol session decodes it, the volume answers it.
#[derive(Debug)]
pub enum IoCommand {
    /// Read bytes.
    Read {
        /// What to read.
        range: ByteRange,
    },
    /// Write bytes: durable on a majority when answered.
    Write {
        /// Where; its length is that of `data`.
        range: ByteRange,
        /// What; block-aligned memory, exactly `range.length` bytes.
        data: AlignedBuf,
    },
    /// Read as zeroes from now on; the space is freed.
    Trim {
        /// What; parts of blocks are zeroed, whole blocks unmapped.
        range: ByteRange,
    },
    /// Zeroes.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// Whether the space may be freed. Ballast keeps no reservation either way.
        may_unmap: bool,
    },
    /// Durability of what was completed: nothing to do, every completed write is durable.
    Flush,
    /// Which parts hold data.
    BlockStatus {
        /// What to look at.
        range: ByteRange,
    },
}

/// The answer to an [`IoCommand`].
#[derive(Debug)]
pub enum IoReply {
    /// Data of a read, in order; the parts add up to the length asked for.
    Data(Vec<ReadPart>),
    /// Done.
    Done,
    /// Extents that cover the range asked for, from its start, in order.
    Status(Vec<StatusExtent>),
}

/// A part of a read.
#[derive(Clone, Debug)]
pub enum ReadPart {
    /// Bytes of the volume.
    Data(Bytes),
    /// A hole: that many zero bytes.
    Hole(u64),
}

impl ReadPart {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            ReadPart::Data(bytes) => bytes.len() as u64,
            ReadPart::Hole(length) => *length,
        }
    }

    /// Whether it holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A run of bytes with one allocation state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes.
    pub length: u64,
    /// Whether the run is allocated; else it is a hole that reads as zeroes.
    pub allocated: bool,
}

/// Why a command failed. Protocols map each to the code their specification names.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum IoError {
    /// The range is not in the volume.
    #[error("range is outside the volume")]
    RangeOutside,
    /// The command is larger than the transfer limit.
    #[error("command is larger than the limit of {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// A write on a read-only attachment.
    #[error("attachment is read-only")]
    ReadOnly,
    /// The pool has no space for it; nothing was proposed.
    #[error("no space left in a pool of this volume")]
    NoSpace,
    /// The attachment was replaced by a newer one: fenced.
    #[error("attachment was replaced by a newer one")]
    Fenced,
    /// No replica could give valid bytes.
    #[error("data is damaged and no replica could repair it")]
    Damaged,
    /// The volume is being deleted or the node stops.
    #[error("volume is shutting down")]
    ShuttingDown,
    /// No answer within the limit: the outcome of a write is unknown.
    #[error("no quorum within the time limit; the outcome is unknown")]
    TimedOut,
}

impl IoError {
    /// Whether it speaks of the attachment and not of the command: the host's session has ended, its
    /// connection is to be closed and the command not answered. The host asks again where it may.
    pub fn ends_session(&self) -> bool {
        matches!(self, IoError::Fenced | IoError::ShuttingDown)
    }
}

/// The payload of a write as it travels to the log: whole blocks, shared.
pub type BlockPayload = Payload;
