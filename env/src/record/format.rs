//! A record as a file, for a process that ends before its record is looked at.
//!
//! Little-endian; a head (`BALLREC1`), then one tagged record after the other. For tests of one
//! build: not a format that is kept compatible.

use std::io;
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes};
use thiserror::Error;

use super::{Event, Log};

const HEAD: &[u8; 8] = b"BALLREC1";

const FILE: u8 = 0;
const OPENED: u8 = 1;
const STARTED: u8 = 2;
const FINISHED: u8 = 3;
const DISCARDED: u8 = 4;

/// Why a record can't be loaded.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The file can't be read.
    #[error("record {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the file system says.
        source: io::Error,
    },
    /// It isn't a record of this build, or it is cut off.
    #[error("record {path}: not a whole record of this version, at byte {at}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        at: usize,
    },
}

impl Log {
    /// Saves the record.
    ///
    /// # Errors
    /// From writing the file.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut out = HEAD.to_vec();
        for file in &self.files {
            out.put_u8(FILE);
            put_bytes(&mut out, file.as_os_str().as_encoded_bytes());
        }
        for event in &self.events {
            put_event(&mut out, event);
        }
        std::fs::write(path, out)
    }

    /// Loads a saved record.
    ///
    /// # Errors
    /// When the file can't be read or isn't a record.
    pub fn load(path: &Path) -> Result<Self, RecordError> {
        let bytes = std::fs::read(path)
            .map_err(|source| RecordError::Read { path: path.to_owned(), source })?;
        let whole = Bytes::from(bytes);
        let mut rest = whole.clone();
        parse(&mut rest).ok_or_else(|| RecordError::Malformed {
            path: path.to_owned(),
            at: whole.len() - rest.len(),
        })
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u64_le(bytes.len() as u64);
    out.put_slice(bytes);
}

fn put_event(out: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Opened { file, size, new } => {
            out.put_u8(OPENED);
            out.put_u64_le(*file as u64);
            out.put_u64_le(*size);
            out.put_u8(u8::from(*new));
        }
        Event::Started { write, file, offset, parts } => {
            out.put_u8(STARTED);
            out.put_u64_le(*write as u64);
            out.put_u64_le(*file as u64);
            out.put_u64_le(*offset);
            out.put_u64_le(parts.len() as u64);
            parts.iter().for_each(|part| put_bytes(out, part));
        }
        Event::Finished { write, durable } => {
            out.put_u8(FINISHED);
            out.put_u64_le(*write as u64);
            out.put_u8(u8::from(*durable));
        }
        Event::Discarded { file, offset, length } => {
            out.put_u8(DISCARDED);
            out.put_u64_le(*file as u64);
            out.put_u64_le(*offset);
            out.put_u64_le(*length);
        }
    }
}

fn parse(rest: &mut Bytes) -> Option<Log> {
    use std::os::unix::ffi::OsStringExt;
    let mut log = Log::default();
    if !rest.starts_with(HEAD) {
        return None;
    }
    rest.advance(HEAD.len());
    while rest.has_remaining() {
        if rest.first() == Some(&FILE) {
            rest.advance(1);
            let name = take_bytes(rest)?.to_vec();
            log.files.push(PathBuf::from(std::ffi::OsString::from_vec(name)));
            continue;
        }
        let event = take_event(rest)?;
        // Numbers are places: one that points nowhere would mislead the replay.
        match &event {
            Event::Opened { file, .. } | Event::Discarded { file, .. } => log.files.get(*file)?,
            Event::Started { write, file, .. } => {
                (*write == log.writes).then_some(())?;
                log.writes += 1;
                log.files.get(*file)?
            }
            Event::Finished { write, .. } => {
                (*write < log.writes).then_some(())?;
                log.files.first()?
            }
        };
        log.events.push(event);
    }
    Some(log)
}

fn take_event(rest: &mut Bytes) -> Option<Event> {
    Some(match rest.try_get_u8().ok()? {
        OPENED => Event::Opened {
            file: take_number(rest)?,
            size: rest.try_get_u64_le().ok()?,
            new: take_flag(rest)?,
        },
        STARTED => {
            let (write, file) = (take_number(rest)?, take_number(rest)?);
            let offset = rest.try_get_u64_le().ok()?;
            let count = take_number(rest)?;
            let mut parts = Vec::new();
            for _ in 0..count {
                parts.push(take_bytes(rest)?);
            }
            Event::Started { write, file, offset, parts }
        }
        FINISHED => Event::Finished { write: take_number(rest)?, durable: take_flag(rest)? },
        DISCARDED => Event::Discarded {
            file: take_number(rest)?,
            offset: rest.try_get_u64_le().ok()?,
            length: rest.try_get_u64_le().ok()?,
        },
        _ => return None,
    })
}

fn take_number(rest: &mut Bytes) -> Option<usize> {
    usize::try_from(rest.try_get_u64_le().ok()?).ok()
}

fn take_flag(rest: &mut Bytes) -> Option<bool> {
    match rest.try_get_u8().ok()? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn take_bytes(rest: &mut Bytes) -> Option<Bytes> {
    let length = take_number(rest)?;
    (length <= rest.len()).then(|| rest.split_to(length))
}
