//! From a request on the wire to what is to be done: checks and mapping.
//!
//! Owns which flags, ranges and sizes are right for which command, and with which error number
//! the others are refused. Never touches payloads. Write path, step 2.

use ballast_block::buffer::BufferPool;
use ballast_block::limits::NBD_REQUEST_BYTES_MAX;
use ballast_block::{ByteRange, IoCommand};
use thiserror::Error;

use crate::reply::{ReadRequest, StatusRequest};
use crate::wire::{Errno, Request, command, command_flag};

/// What was negotiated and bears on requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Negotiated {
    /// Size of the export in bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) structured: bool,
    /// Whether `base:allocation` was selected for this export.
    pub(crate) allocation: bool,
}

/// What a good request wants.
#[derive(Debug)]
pub(crate) enum Action {
    /// Run the command.
    Submit(IoCommand, Reply),
    /// Run a write once its payload is there.
    Write(ByteRange, Reply),
    /// Nothing to do: answer.
    Answer(Reply),
    /// The client says good-bye.
    Disconnect,
}

/// How a command is answered when it succeeds, and what its failures map to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reply {
    Read(ReadRequest),
    Status(StatusRequest),
    /// No data; the number for a range that turned out to be outside.
    Done {
        cookie: u64,
        beyond_end: Errno,
    },
}

impl Reply {
    pub(crate) fn cookie(&self) -> u64 {
        match self {
            Reply::Read(read) => read.cookie,
            Reply::Status(ask) => ask.cookie,
            Reply::Done { cookie, .. } => *cookie,
        }
    }
}

/// Why a request is answered with an error at once.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum Refusal {
    #[error("command {0} is not known to this server")]
    UnknownCommand(u16),
    #[error("command {command} does not take the flags {flags:#06x}")]
    BadFlags { command: u16, flags: u16 },
    #[error("range of {length} bytes at {offset} is outside the volume of {size} bytes")]
    Outside { offset: u64, length: u64, size: u64, errno: Errno },
    #[error("volume is open read-only; open it without @ro to write")]
    ReadOnly,
    #[error("read of {length} bytes is larger than the limit of {NBD_REQUEST_BYTES_MAX}; split it")]
    ReadTooLarge { length: u64, one_chunk: bool },
    #[error("block status needs the context base:allocation, selected for this export")]
    NoContext,
    #[error("block status of no bytes")]
    EmptyStatus,
}

impl Refusal {
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Refusal::Outside { errno, .. } => *errno,
            Refusal::ReadOnly => Errno::NotPermitted,
            Refusal::ReadTooLarge { one_chunk: true, .. } => Errno::Overflow,
            Refusal::UnknownCommand(_)
            | Refusal::BadFlags { .. }
            | Refusal::ReadTooLarge { .. }
            | Refusal::NoContext
            | Refusal::EmptyStatus => Errno::Invalid,
        }
    }
}

impl Action {
    /// Bytes of memory that it holds until its reply is sent: whole buffers.
    pub(crate) fn memory_cost(&self) -> usize {
        let range = match self {
            Action::Submit(IoCommand::Read { range }, _) | Action::Write(range, _) => range,
            Action::Submit(..) | Action::Answer(_) | Action::Disconnect => return 0,
        };
        BufferPool::capacity_of(usize::try_from(range.length).expect("within the request limit"))
    }
}

/// What to do about `request`.
///
/// # Errors
/// [`Refusal`] when it must be answered with an error; the payload of a write follows all the same.
pub(crate) fn check(request: &Request, export: &Negotiated) -> Result<Action, Refusal> {
    check_flags(request, export)?;
    match request.command {
        command::DISC => return Ok(Action::Disconnect),
        command::FLUSH => {
            let reply = Reply::Done { cookie: request.cookie, beyond_end: Errno::Invalid };
            return Ok(Action::Submit(IoCommand::Flush, reply));
        }
        _ => {}
    }
    let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && export.read_only {
        return Err(Refusal::ReadOnly);
    }
    let range = ByteRange::new(request.offset, u64::from(request.length));
    let beyond_end = beyond_end(request.command);
    range.check_inside(export.size).map_err(|outside| Refusal::Outside {
        offset: outside.offset,
        length: outside.length,
        size: outside.size,
        errno: beyond_end,
    })?;
    let done = Reply::Done { cookie: request.cookie, beyond_end };
    let action = match request.command {
        command::READ => return read(request, range),
        command::BLOCK_STATUS => return block_status(request, range, export),
        // Reading ahead for a client is of no use here: the answer says that nothing failed.
        command::CACHE => Action::Answer(done),
        _ if range.length == 0 => Action::Answer(done),
        command::WRITE => Action::Write(range, done),
        command::TRIM => Action::Submit(IoCommand::Trim { range }, done),
        command::WRITE_ZEROES => {
            let may_unmap = request.flags & command_flag::NO_HOLE == 0;
            Action::Submit(IoCommand::WriteZeroes { range, may_unmap }, done)
        }
        unknown => return Err(Refusal::UnknownCommand(unknown)),
    };
    Ok(action)
}

fn read(request: &Request, range: ByteRange) -> Result<Action, Refusal> {
    let one_chunk = request.flags & command_flag::DF != 0;
    if range.length > NBD_REQUEST_BYTES_MAX as u64 {
        return Err(Refusal::ReadTooLarge { length: range.length, one_chunk });
    }
    let reply = Reply::Read(ReadRequest { cookie: request.cookie, range, one_chunk });
    if range.length == 0 {
        return Ok(Action::Answer(reply));
    }
    Ok(Action::Submit(IoCommand::Read { range }, reply))
}

fn block_status(
    request: &Request,
    range: ByteRange,
    export: &Negotiated,
) -> Result<Action, Refusal> {
    if !export.allocation {
        return Err(Refusal::NoContext);
    }
    if range.length == 0 {
        return Err(Refusal::EmptyStatus);
    }
    let one_extent = request.flags & command_flag::REQ_ONE != 0;
    let reply = Reply::Status(StatusRequest { cookie: request.cookie, range, one_extent });
    Ok(Action::Submit(IoCommand::BlockStatus { range }, reply))
}

/// FUA is right for every command (clients set it freely), and means nothing new: each completed
/// write is durable.
fn check_flags(request: &Request, export: &Negotiated) -> Result<(), Refusal> {
    let specific = match request.command {
        command::READ if export.structured => command_flag::DF,
        command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
        command::BLOCK_STATUS => command_flag::REQ_ONE,
        command::READ | command::WRITE | command::DISC | command::FLUSH => 0,
        command::TRIM | command::CACHE => 0,
        unknown => return Err(Refusal::UnknownCommand(unknown)),
    };
    let flags = request.flags & !(specific | command_flag::FUA);
    // A good-bye is obeyed whatever its flags.
    if flags != 0 && request.command != command::DISC {
        return Err(Refusal::BadFlags { command: request.command, flags });
    }
    Ok(())
}

/// The protocol wants "no space" for what would write beyond the end.
fn beyond_end(command: u16) -> Errno {
    match command {
        command::WRITE | command::WRITE_ZEROES => Errno::NoSpace,
        _ => Errno::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPORT: Negotiated =
        Negotiated { size: 1 << 20, read_only: false, structured: true, allocation: true };

    fn request(command: u16, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, command, cookie: 1, offset, length }
    }

    fn refusal(request: Request, export: &Negotiated) -> Errno {
        check(&request, export).expect_err("refused").errno()
    }

    #[test]
    fn ranges() {
        let outside = |command| refusal(request(command, 0, 1 << 20, 1), &EXPORT);
        assert_eq!(outside(command::READ), Errno::Invalid);
        assert_eq!(outside(command::WRITE), Errno::NoSpace);
        assert_eq!(outside(command::WRITE_ZEROES), Errno::NoSpace);
        assert_eq!(outside(command::TRIM), Errno::Invalid);
        assert_eq!(outside(command::CACHE), Errno::Invalid);
        assert_eq!(outside(command::BLOCK_STATUS), Errno::Invalid);
        let wraps = request(command::READ, 0, u64::MAX, u32::MAX);
        assert_eq!(refusal(wraps, &EXPORT), Errno::Invalid);
        assert!(check(&request(command::READ, 0, (1 << 20) - 1, 1), &EXPORT).is_ok());
    }

    #[test]
    fn read_only_exports() {
        let export = Negotiated { read_only: true, ..EXPORT };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(refusal(request(command, 0, 0, 512), &export), Errno::NotPermitted);
        }
        assert!(check(&request(command::READ, 0, 0, 512), &export).is_ok());
        assert!(check(&request(command::FLUSH, 0, 0, 0), &export).is_ok());
    }

    #[test]
    fn flags() {
        let allowed = [
            (command::READ, command_flag::FUA | command_flag::DF),
            (command::WRITE, command_flag::FUA),
            (command::FLUSH, command_flag::FUA),
            (command::TRIM, command_flag::FUA),
            (command::CACHE, command_flag::FUA),
            (
                command::WRITE_ZEROES,
                command_flag::FUA | command_flag::NO_HOLE | command_flag::FAST_ZERO,
            ),
            (command::BLOCK_STATUS, command_flag::FUA | command_flag::REQ_ONE),
        ];
        for (command, mask) in allowed {
            for bit in 0..16 {
                let checked = check(&request(command, 1 << bit, 0, 512), &EXPORT);
                assert_eq!(checked.is_ok(), mask & (1 << bit) != 0, "{command} bit {bit}");
            }
        }
        let export = Negotiated { structured: false, ..EXPORT };
        let unfragmented = request(command::READ, command_flag::DF, 0, 512);
        assert_eq!(refusal(unfragmented, &export), Errno::Invalid);
    }

    #[test]
    fn mapping() {
        let range = ByteRange::new(3, 5);
        let ok = |command, flags| check(&request(command, flags, 3, 5), &EXPORT).expect("good");
        let Action::Submit(IoCommand::WriteZeroes { range: found, may_unmap: false }, _) =
            ok(command::WRITE_ZEROES, command_flag::NO_HOLE)
        else {
            panic!("write zeroes without holes");
        };
        assert_eq!(found, range);
        let zeroes = ok(command::WRITE_ZEROES, command_flag::FAST_ZERO);
        assert!(matches!(
            zeroes,
            Action::Submit(IoCommand::WriteZeroes { may_unmap: true, .. }, _)
        ));
        assert!(matches!(ok(command::WRITE, 0), Action::Write(found, _) if found == range));
        assert!(matches!(ok(command::CACHE, 0), Action::Answer(_)));
        assert!(matches!(ok(command::DISC, 0xffff), Action::Disconnect));
        assert_eq!(refusal(request(9, 0, 0, 0), &EXPORT), Errno::Invalid);
    }

    #[test]
    fn sizes() {
        let export = Negotiated { size: 1 << 40, ..EXPORT };
        let large = NBD_REQUEST_BYTES_MAX as u32;
        assert!(check(&request(command::READ, 0, 0, large), &export).is_ok());
        assert_eq!(refusal(request(command::READ, 0, 0, large + 1), &export), Errno::Invalid);
        let unfragmented = request(command::READ, command_flag::DF, 0, large + 1);
        assert_eq!(refusal(unfragmented, &export), Errno::Overflow);
        assert!(check(&request(command::TRIM, 0, 0, u32::MAX), &export).is_ok());
        assert_eq!(refusal(request(command::BLOCK_STATUS, 0, 0, 0), &export), Errno::Invalid);
        let export = Negotiated { allocation: false, ..EXPORT };
        assert_eq!(refusal(request(command::BLOCK_STATUS, 0, 0, 1), &export), Errno::Invalid);
        for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let empty = check(&request(command, 0, 0, 0), &EXPORT);
            assert!(matches!(empty, Ok(Action::Answer(_))), "{command}");
        }
    }
}
