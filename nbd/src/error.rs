//! What a client can do that ends its connection.
//!
//! Owns the words for it. Everything else that a client does wrong is answered.

use ballast_block::limits::NBD_REQUEST_BYTES_MAX;
use thiserror::Error;

use crate::export::{ExportNameError, OpenExportError};

/// Why a connection must be closed at once.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SessionError {
    /// The protocol demands to close then.
    #[error("client set unknown handshake flags {flags:#010x}")]
    UnknownClientFlags {
        /// All flags it set.
        flags: u32,
    },
    /// Not an option: no NBD client, or out of step.
    #[error("client sent {found:#018x} where the magic number of an option belongs")]
    BadOptionMagic {
        /// What stood there.
        found: u64,
    },
    /// More data than an option can need.
    #[error("client sent option {option} with {length} bytes of data")]
    OptionTooLarge {
        /// The option's number.
        option: u32,
        /// Its length in bytes.
        length: u32,
    },
    /// More options than `limits::NBD_OPTIONS_MAX`.
    #[error("client sent too many options without choosing an export")]
    TooManyOptions,
    /// `NBD_OPT_EXPORT_NAME` has no way to say so to the client.
    #[error("client chose an export by an option that can't be refused: {0}")]
    ExportNameInvalid(#[source] ExportNameError),
    /// `NBD_OPT_EXPORT_NAME` has no way to say so to the client.
    #[error("client chose an export by an option that can't be refused: {0}")]
    ExportRefused(#[source] OpenExportError),
    /// Not a request: out of step.
    #[error("client sent {found:#010x} where the magic number of a request belongs")]
    BadRequestMagic {
        /// What stood there.
        found: u32,
    },
    /// A write larger than any client may send.
    #[error("client sent a write of {length} bytes; the limit is {NBD_REQUEST_BYTES_MAX}")]
    WriteTooLarge {
        /// Its length in bytes.
        length: u32,
    },
}
