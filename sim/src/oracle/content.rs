//! What hosts were told they may format, against what was written: guarantee **never-format-data**.
//!
//! Once data is in effect, nobody who asks from then on is let format, and no write that makes a file
//! system and begins from then on takes effect. Whoever is told that nothing was ever written goes by
//! that, so it must be true. Data is every write that is not part of making a file system, trims too.
//! Knows nothing of blocks: what their contents may be is judged by the zone test.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::{Violation, WriteId};

/// What is known of each volume.
#[derive(Default)]
pub(super) struct Contents(RefCell<BTreeMap<u64, Content>>);

#[derive(Default)]
struct Content {
    /// The write that was surely in effect first, and by when.
    written: Option<(u64, WriteId)>,
    /// Of those that are data.
    data: Option<(u64, WriteId)>,
    /// When somebody asked last who was let format.
    granted: u64,
    /// Of those, who was told that nothing was ever written.
    blank: u64,
    /// The write that began last of those that made a file system and are in effect, and when it began.
    made: Option<(u64, WriteId)>,
}

impl Contents {
    /// Somebody who asked at `asked` was let format.
    pub(super) fn granted(&self, volume: u64, asked: u64, blank: bool) -> Result<(), Violation> {
        let mut volumes = self.0.borrow_mut();
        let content = volumes.entry(volume).or_default();
        content.granted = content.granted.max(asked);
        if blank {
            content.blank = content.blank.max(asked);
        }
        content.check(volume)
    }

    /// A write is surely in effect, since `at` at the latest. `formats`: when it began, if it is part of
    /// making a file system.
    pub(super) fn in_effect(
        &self,
        volume: u64,
        write: WriteId,
        at: u64,
        formats: Option<u64>,
    ) -> Result<(), Violation> {
        let mut volumes = self.0.borrow_mut();
        let content = volumes.entry(volume).or_default();
        let first = |known: Option<(u64, WriteId)>| {
            Some(known.map_or((at, write), |known| known.min((at, write))))
        };
        content.written = first(content.written);
        match formats {
            None => content.data = first(content.data),
            Some(began) => content.made = content.made.max(Some((began, write))),
        }
        content.check(volume)
    }
}

impl Content {
    fn check(&self, volume: u64) -> Result<(), Violation> {
        let before = |known: Option<(u64, WriteId)>, time: u64| {
            known.filter(|(at, _)| *at < time).map(|(_, write)| write)
        };
        if let Some(data) = before(self.data, self.granted) {
            return Err(Violation::MayFormat { volume, data });
        }
        if let Some((began, made)) = self.made
            && let Some(data) = before(self.data, began)
        {
            return Err(Violation::Formatted { volume, data, made });
        }
        match before(self.written, self.blank) {
            Some(write) => Err(Violation::NotBlank { volume, write }),
            None => Ok(()),
        }
    }
}
