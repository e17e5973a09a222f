//! Exports: how clients name them, and what the caller answers about them.
//!
//! Owns the syntax of export names. Never knows which volumes exist.

use ballast_block::Epoch;
use ballast_block::limits::NAME_BYTES_MAX;
use thiserror::Error;

use crate::lanes::{LANES_MAX, SessionLane};

/// What an export name asks for: `NAME`, or nothing for the only volume, then perhaps `@` and words
/// with commas between them: `ro`, `lease=EPOCH`, `session=HEX16,lane=K`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportName {
    /// The volume's name; `None` means the only volume there is.
    pub volume: Option<String>,
    /// How it is to be used.
    pub access: Access,
    /// The lease that it is used under, by its epoch.
    pub lease: Option<Epoch>,
    /// The session that the connection is one of, if it writes and is not the client's only one.
    pub lane: Option<SessionLane>,
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
    #[error(
        "export name ends in an unknown \"@\" part; use NAME, NAME@ro to open it read-only, or \
         NAME@lease=EPOCH or NAME@ro,lease=EPOCH to open it under a lease; further connections of a \
         session that writes add session=16 HEX DIGITS,lane=0 to 15"
    )]
    UnknownSuffix,
}

impl ExportName {
    /// Parses a name as the client sent it.
    ///
    /// # Errors
    /// [`ExportNameError`] for anything else.
    pub fn parse(bytes: &[u8]) -> Result<Self, ExportNameError> {
        let text = std::str::from_utf8(bytes).map_err(|_| ExportNameError::NotUtf8)?;
        let (volume, words) = match text.split_once('@') {
            None => (text, ""),
            Some((_, "")) => return Err(ExportNameError::UnknownSuffix),
            Some(parts) => parts,
        };
        let (access, lease, lane) = parse_words(words).ok_or(ExportNameError::UnknownSuffix)?;
        if volume.len() > NAME_BYTES_MAX {
            return Err(ExportNameError::TooLong { length: volume.len() });
        }
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        if !volume.chars().all(known) {
            return Err(ExportNameError::BadCharacter);
        }
        let volume = (!volume.is_empty()).then(|| volume.to_owned());
        Ok(Self { volume, access, lease, lane })
    }
}

/// What stands behind the `@`: each word at most once and in this order, a session only of a writer.
fn parse_words(words: &str) -> Option<(Access, Option<Epoch>, Option<SessionLane>)> {
    if words.is_empty() {
        return Some((Access::ReadWrite, None, None));
    }
    let mut words = words.split(',').peekable();
    let mut access = Access::ReadWrite;
    if words.next_if_eq(&"ro").is_some() {
        access = Access::ReadOnly;
    }
    let mut value = |name: &str| words.next_if(|word| word.starts_with(name))?.strip_prefix(name);
    let (lease, session, lane) = (value("lease="), value("session="), value("lane="));
    let lease = match lease {
        Some(digits) => Some(Epoch(parse_number(digits).filter(|epoch| *epoch != 0)?)),
        None => None,
    };
    let lane = match (session, lane) {
        (Some(session), Some(lane)) if access == Access::ReadWrite => {
            Some(SessionLane { session: parse_session(session)?, lane: parse_lane(lane)? })
        }
        (None, None) => None,
        _ => return None,
    };
    words.next().is_none().then_some((access, lease, lane))
}

/// Decimal digits as they are printed: there is one way to write a name.
fn parse_number(digits: &str) -> Option<u64> {
    let number: u64 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

fn parse_session(digits: &str) -> Option<u64> {
    let session = u64::from_str_radix(digits, 16).ok()?;
    (format!("{session:016x}") == digits).then_some(session)
}

fn parse_lane(digits: &str) -> Option<u16> {
    let lane = u16::try_from(parse_number(digits)?).ok()?;
    (lane < LANES_MAX).then_some(lane)
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
    /// Size in bytes. The session refuses what lies outside, until it is told that it has grown.
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
    /// It is leased, and the client names no lease.
    #[error("volume is leased to {holder}; open it under a lease: NAME@lease=EPOCH")]
    LeasedElsewhere {
        /// Who holds the lease.
        holder: String,
    },
    /// The lease that the client names is not in force, or does not let it do that.
    #[error(
        "lease {0} of the volume is not in force, or only lets its holder read; acquire one: \
         `ballastctl volume attach`"
    )]
    LeaseNotInForce(Epoch),
    /// This node serves nobody without a lease.
    #[error(
        "node serves volumes under a lease only: acquire one with `ballastctl volume attach` and \
         open NAME@lease=EPOCH"
    )]
    LeaseNeeded,
    /// No leader or no quorum within the time limit.
    #[error(
        "volume has no quorum of replicas that this node reaches{}; try another node, or again when \
         its nodes are back", no_link(.unreachable)
    )]
    NoQuorum {
        /// Nodes with replicas that this one has no link to, for people; empty = it has one to each.
        unreachable: String,
    },
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

fn no_link(unreachable: &str) -> String {
    if unreachable.is_empty() { String::new() } else { format!(" (no link to {unreachable})") }
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
        Ok(ExportName { volume: volume.map(str::to_owned), access, lease: None, lane: None })
    }

    fn leased(name: &[u8]) -> (Access, Option<u64>) {
        let name = ExportName::parse(name).unwrap();
        assert_eq!(name.volume.as_deref(), Some("db-0"));
        (name.access, name.lease.map(|epoch| epoch.0))
    }

    #[test]
    fn names() {
        assert_eq!(ExportName::parse(b"db-0"), name(Some("db-0"), Access::ReadWrite));
        assert_eq!(ExportName::parse(b"db-0@ro"), name(Some("db-0"), Access::ReadOnly));
        assert_eq!(ExportName::parse(b""), name(None, Access::ReadWrite));
        assert_eq!(ExportName::parse(b"@ro"), name(None, Access::ReadOnly));
        assert_eq!(leased(b"db-0@lease=7"), (Access::ReadWrite, Some(7)));
        assert_eq!(leased(b"db-0@ro,lease=71"), (Access::ReadOnly, Some(71)));
    }

    #[test]
    fn lanes() {
        let lane = |name: &str| {
            let name = ExportName::parse(name.as_bytes()).expect("a name");
            name.lane.map(|lane| (name.lease.map(|epoch| epoch.0), lane.session, lane.lane))
        };
        let session = 0x0123_4567_89ab_cdef;
        let name = "db@lease=7,session=0123456789abcdef,lane=15";
        assert_eq!(lane(name), Some((Some(7), session, 15)));
        assert_eq!(lane("db@session=0000000000000000,lane=0"), Some((None, 0, 0)));
        for refused in [
            "session=0123456789abcdef",
            "lane=3",
            "lease=7,lane=3",
            "lane=3,session=0123456789abcdef",
            "session=0123456789abcdef,lane=16",
            "session=0123456789abcdef,lane=03",
            "session=0123456789abcdef,lane=",
            "session=0123456789abcdef,lane=1,",
            "session=0123456789abcdef,lane=1,lane=1",
            "session=0123456789ABCDEF,lane=1",
            "session=123456789abcdef,lane=1",
            "session=+123456789abcdef,lane=1",
            "session=00123456789abcdef,lane=1",
            "session=0123456789abcdef,lease=7,lane=1",
            "ro,session=0123456789abcdef,lane=1",
            "ro,lease=7,session=0123456789abcdef,lane=1",
        ] {
            let parsed = ExportName::parse(format!("db@{refused}").as_bytes());
            assert_eq!(parsed, Err(ExportNameError::UnknownSuffix), "{refused}");
        }
    }

    #[test]
    fn refused_names() {
        let unknown = ["db@", "db@rw", "db@token=abc", "db@ro@ro", "db@RO", "db@ro,", "db@,ro"];
        let leases = ["", "0", "07", "-1", "+1", "x", "1,ro", "18446744073709551616"];
        let leases = leases.map(|epoch| format!("db@lease={epoch}"));
        for suffix in unknown.into_iter().chain(leases.iter().map(|name| &name[..])) {
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
