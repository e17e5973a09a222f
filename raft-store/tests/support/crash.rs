//! Power loss: the images that it may leave.

use super::pool::path;
use super::{Event, Image, MemoryEnv, SECTOR, WriteRecord, splitmix};

/// What becomes of writes that were in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// Not there.
    Lost,
    /// There whole.
    Whole,
    /// A prefix of its sectors.
    Prefix,
    /// Any of its sectors.
    Torn,
}

pub const IN_FLIGHT: [InFlight; 4] =
    [InFlight::Lost, InFlight::Whole, InFlight::Prefix, InFlight::Torn];

/// A source of random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        let (state, output) = splitmix(self.0);
        self.0 = state;
        output
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// The image after a power loss when the first `events` events of `env` had happened since
/// `base`.
pub fn crash(
    base: &Image,
    env: &MemoryEnv,
    events: usize,
    mode: InFlight,
    random: &mut Random,
) -> Image {
    let disk = env.disk.borrow();
    let mut image = base.clone();
    let mut in_flight = Vec::new();
    for event in &disk.events[..events] {
        match *event {
            Event::Nothing => {}
            Event::Issued(number) => in_flight.push(number),
            Event::Completed(number) => {
                in_flight.retain(|other| *other != number);
                let write = &disk.writes[number];
                image.write(write.offset, &write.bytes);
            }
        }
    }
    leave_in_flight(&mut image, in_flight.iter().map(|&nth| &disk.writes[nth]), mode, random);
    image
}

/// Puts into an image what a power loss leaves of writes that were in flight.
pub fn leave_in_flight<'a>(
    image: &mut Image,
    in_flight: impl Iterator<Item = &'a WriteRecord>,
    mode: InFlight,
    random: &mut Random,
) {
    for write in in_flight {
        let sectors = write.bytes.len() / SECTOR;
        match mode {
            InFlight::Lost => {}
            InFlight::Whole => image.write(write.offset, &write.bytes),
            InFlight::Prefix => {
                let mut left = random.below(sectors as u64 + 1);
                image.write_torn(write.offset, &write.bytes, || {
                    left = left.saturating_sub(1);
                    left > 0
                });
            }
            InFlight::Torn => {
                // Mostly there or mostly not: so that whole batches survive behind torn ones.
                let chance = random.pick(&[2, 50, 98, 99]);
                image.write_torn(write.offset, &write.bytes, || random.below(100) < chance);
            }
        }
    }
}

/// An environment on an image.
pub fn env_of(image: &Image) -> MemoryEnv {
    MemoryEnv::with_image(&path(), image.clone())
}
