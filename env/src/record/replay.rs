//! From a prefix of a record to the file that a power loss at that moment may have left.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;

use super::{Event, Log};

/// What a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Ok was returned: all of it is there.
    Durable,
    /// Failed, or had not returned yet.
    Open,
}

impl Log {
    /// Writes to `image` what file number `file` may hold after a power loss right behind the
    /// first `events` events. Every write that had returned `Ok` is there. Of the others nothing
    /// is there (`torn` is `None`), or a subset of their sectors that the seed chooses, each
    /// before or after the writes that were in flight with it. (Of two writes of one place that
    /// both returned `Ok`, the one that returned last counts.)
    ///
    /// `image` is created anew, unless the file was not new when it was first opened: then
    /// `image` must be a copy of it from before.
    ///
    /// # Errors
    /// From writing `image`. `InvalidInput` when no such file was opened within the prefix.
    pub fn replay_prefix(
        &self,
        file: usize,
        events: usize,
        torn: Option<u64>,
        image: &Path,
    ) -> io::Result<()> {
        let prefix = &self.events[..events.min(self.events.len())];
        let opened = prefix.iter().find_map(|event| match event {
            Event::Opened { file: number, size, new } if *number == file => Some((*size, *new)),
            _ => None,
        });
        let Some((size, new)) = opened else {
            let problem = format!("file {file} is not opened in the first {events} events");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        };
        let target = OpenOptions::new().write(true).create(new).truncate(new).open(image)?;
        target.set_len(size)?;
        let fates = self.fates(prefix);
        let writes = self.writes_of(file, prefix);
        let mut dice = torn.map(Dice);
        // Those that land late: behind everything that finished while they were under way.
        let mut late = Vec::new();
        for event in prefix {
            match event {
                Event::Started { write, file: number, offset, parts } if *number == file => {
                    if let Some(dice) = dice.as_mut()
                        && fates[*write] == Fate::Open
                    {
                        let sectors = survivors(*offset, parts, dice);
                        if dice.choose() {
                            put(&target, &sectors)?;
                        } else {
                            late.push(sectors);
                        }
                    }
                }
                Event::Finished { write, durable: true } => {
                    if let Some((offset, parts)) = writes.get(write) {
                        put(&target, &[(*offset, parts.concat().into())])?;
                    }
                }
                Event::Discarded { file: number, offset, length } if *number == file => {
                    if let Some(dice) = dice.as_mut()
                        && dice.choose()
                    {
                        let zeroes = Bytes::from(vec![0; *length as usize]);
                        put(&target, &[(*offset, zeroes)])?;
                    }
                }
                _ => {}
            }
        }
        for sectors in late {
            put(&target, &sectors)?;
        }
        // A write past the end was refused, and has no place.
        target.set_len(size)?;
        target.sync_all()
    }

    fn fates(&self, prefix: &[Event]) -> Vec<Fate> {
        let mut fates = vec![Fate::Open; self.writes];
        for event in prefix {
            if let Event::Finished { write, durable: true } = event {
                fates[*write] = Fate::Durable;
            }
        }
        fates
    }

    /// Place and contents of the writes of one file, by number.
    fn writes_of<'a>(
        &self,
        file: usize,
        prefix: &'a [Event],
    ) -> BTreeMap<usize, (u64, &'a [Bytes])> {
        let of_file = |event: &'a Event| match event {
            Event::Started { write, file: of, offset, parts } if *of == file => {
                Some((*write, (*offset, &parts[..])))
            }
            _ => None,
        };
        prefix.iter().filter_map(of_file).collect()
    }
}

/// The sectors of a write that reached the disk.
fn survivors(offset: u64, parts: &[Bytes], dice: &mut Dice) -> Vec<(u64, Bytes)> {
    let bytes: Bytes = parts.concat().into();
    // Some writes hardly start, some nearly end: the chance of a sector is the write's own.
    let chance = dice.roll() % 257;
    let sectors = (0..bytes.len()).step_by(SECTOR);
    sectors
        .filter(|_| dice.roll() % 256 < chance)
        .map(|at| (offset + at as u64, bytes.slice(at..bytes.len().min(at + SECTOR))))
        .collect()
}

fn put(target: &std::fs::File, pieces: &[(u64, Bytes)]) -> io::Result<()> {
    pieces.iter().try_for_each(|(offset, bytes)| target.write_all_at(bytes, *offset))
}

/// Numbers from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn choose(&mut self) -> bool {
        self.roll() >> 63 == 1
    }
}
