//! Exports: how clients name them, and what the caller answers about them.
//!
//! Owns the syntax of export names. Never knows which volumes exist.

use ballast_block::limits::NAME_BYTES_MAX;
use thiserror::Error;

/// What an export name asks for: `NAME`, `NAME@ro`, or nothing for the only volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportName {
    /// The volume's name; `None` means the only volume there is.
    pub volume: Option<String>,
    /// How it is to be used.
    pub access: Access,
}

/// How an export is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes: one attachment at a time.
    ReadWrite,
    /// Reads only: always allowed.
    ReadOnly,
}

/// Bytes that name no export.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ExportNameError {
    /// The protocol asks for UTF-8.
    #[error("export name is not UTF-8")]
    NotUtf8,
    /// Longer than a volume's name can be.
    #[error(
        "volume name in the export name has {length} bytes; no volume has more than {NAME_BYTES_MAX}"
    )]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// A character that no volume's name has.
    #[error("volume name in the export name may hold only a-z, 0-9, '-' and '.'")]
    BadCharacter,
    /// What follows the `@` is not known.
    #[error("export name ends in an unknown \"@\" part; use NAME, or NAME@ro to open it read-only")]
    UnknownSuffix,
}

impl ExportName {
    /// Parses a name as the client sent it.
    ///
    /// # Errors
    /// [`ExportNameError`] for anything but `NAME`, `NAME@ro`, `@ro` and the empty name.
    pub fn parse(bytes: &[u8]) -> Result<Self, ExportNameError> {
        let text = std::str::from_utf8(bytes).map_err(|_| ExportNameError::NotUtf8)?;
        let (volume, access) = match text.split_once('@') {
            None => (text, Access::ReadWrite),
            Some((volume, "ro")) => (volume, Access::ReadOnly),
            Some(_) => return Err(ExportNameError::UnknownSuffix),
        };
        if volume.len() > NAME_BYTES_MAX {
            return Err(ExportNameError::TooLong { length: volume.len() });
        }
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        if !volume.chars().all(known) {
            return Err(ExportNameError::BadCharacter);
        }
        let volume = (!volume.is_empty()).then(|| volume.to_owned());
        Ok(Self { volume, access })
    }
}

/// A question to the caller: may this export be used, and what is it?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenExport {
    /// Which one.
    pub name: ExportName,
    /// What for.
    pub purpose: Purpose,
}

/// Why a client names an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To learn about it: nothing is attached, and one that is attached elsewhere is described.
    Describe,
    /// To use it: the caller attaches before it answers, and detaches when the session ends.
    Attach,
}

/// What a client is told of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The volume's name.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size in bytes. The session refuses what lies outside; it does not change while it lasts.
    pub size: u64,
    /// Whether writes are refused; always so for [`Access::ReadOnly`].
    pub read_only: bool,
    /// Whether several connections of one client may share the attachment: a write completed on
    /// one is seen by all.
    pub multi_connection: bool,
}

/// Why an export can't be used now.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OpenExportError {
    /// No such volume.
    #[error("no volume of this name; list the exports to see which there are")]
    Unknown,
    /// The empty name, and not exactly one volume.
    #[error("an empty export name stands for the only volume, but there are {volumes}; name one")]
    NotTheOnlyVolume {
        /// How many there are.
        volumes: usize,
    },
    /// Somebody else holds it for writing.
    #[error(
        "volume is attached for writing by {holder}; detach it there first, or add @ro to the name \
         to read it"
    )]
    AlreadyAttached {
        /// Who holds it, in words an administrator can act on.
        holder: String,
    },
    /// Its lease does not let this node have it.
    #[error("volume is leased to {holder}; publish it to this node first")]
    LeasedElsewhere {
        /// Who holds the lease.
        holder: String,
    },
    /// No leader or no quorum within the time limit.
    #[error("volume has no quorum of replicas at the moment; try again when its nodes are back")]
    NoQuorum,
    /// This node can't serve the volume; others may.
    #[error("{why}; use another node")]
    NotServedHere {
        /// Why not, in words an administrator can act on.
        why: String,
    },
    /// The node holds too many connections.
    #[error("node is at its limit of {limit} connections; close some or use another node")]
    TooManyConnections {
        /// The limit.
        limit: usize,
    },
    /// The node stops.
    #[error("node is shutting down; use another node")]
    ShuttingDown,
}

/// Why exports can't be listed now.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ListExportsError {
    /// Listing is switched off.
    #[error("listing exports is switched off on this node; name the export")]
    Forbidden,
    /// The node stops.
    #[error("node is shutting down; use another node")]
    ShuttingDown,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(volume: Option<&str>, access: Access) -> Result<ExportName, ExportNameError> {
        Ok(ExportName { volume: volume.map(str::to_owned), access })
    }

    #[test]
    fn names() {
        assert_eq!(ExportName::parse(b"db-0"), name(Some("db-0"), Access::ReadWrite));
        assert_eq!(ExportName::parse(b"db-0@ro"), name(Some("db-0"), Access::ReadOnly));
        assert_eq!(ExportName::parse(b""), name(None, Access::ReadWrite));
        assert_eq!(ExportName::parse(b"@ro"), name(None, Access::ReadOnly));
    }

    #[test]
    fn refused_names() {
        for suffix in ["db@", "db@rw", "db@token=abc", "db@ro@ro", "db@RO"] {
            let parsed = ExportName::parse(suffix.as_bytes());
            assert_eq!(parsed, Err(ExportNameError::UnknownSuffix), "{suffix}");
        }
        assert_eq!(ExportName::parse(&[0xff]), Err(ExportNameError::NotUtf8));
        assert_eq!(ExportName::parse(b"a/b"), Err(ExportNameError::BadCharacter));
        assert_eq!(ExportName::parse(b"a\0"), Err(ExportNameError::BadCharacter));
        assert!(ExportName::parse(&[b'a'; NAME_BYTES_MAX]).is_ok());
        let long = ExportName::parse(&[b'a'; NAME_BYTES_MAX + 1]);
        assert_eq!(long, Err(ExportNameError::TooLong { length: NAME_BYTES_MAX + 1 }));
    }
}
