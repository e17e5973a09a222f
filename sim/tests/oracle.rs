//! The oracle against histories made by hand: what must pass, and what must be found.

use ballast_block::BlockRange;
use ballast_sim::oracle::Outcome::{Done, Refused, Unknown};
use ballast_sim::oracle::{Oracle, ReadToken, Value, Violation, WriteId};
use ballast_sim::rng::Rng;

const VOLUME: u64 = 1;
const ZERO: Option<WriteId> = None;

fn begin(oracle: &Oracle, start: u64, count: u32) -> WriteId {
    oracle.write_begins(VOLUME, BlockRange::new(start, count), false)
}

fn write(oracle: &Oracle, start: u64, count: u32) -> WriteId {
    let id = begin(oracle, start, count);
    oracle.write_ends(id, Done).unwrap();
    id
}

fn trim(oracle: &Oracle, start: u64, count: u32) {
    let id = oracle.write_begins(VOLUME, BlockRange::new(start, count), true);
    oracle.write_ends(id, Done).unwrap();
}

fn read_begins(oracle: &Oracle, start: u64, count: u32) -> ReadToken {
    oracle.read_begins(VOLUME, BlockRange::new(start, count))
}

fn read_ends(oracle: &Oracle, read: ReadToken, saw: &[Option<WriteId>]) -> Result<(), Violation> {
    let values: Vec<Value> =
        saw.iter().map(|saw| saw.map_or(Value::Zero, Value::Written)).collect();
    oracle.read_ends_with(read, &values)
}

fn read(oracle: &Oracle, start: u64, saw: &[Option<WriteId>]) -> Result<(), Violation> {
    let token = read_begins(oracle, start, saw.len() as u32);
    read_ends(oracle, token, saw)
}

#[test]
fn a_plain_history_passes() {
    let oracle = Oracle::default();
    read(&oracle, 0, &[ZERO, ZERO]).unwrap();
    let first = write(&oracle, 0, 2);
    read(&oracle, 0, &[Some(first), Some(first)]).unwrap();
    let second = write(&oracle, 1, 1);
    read(&oracle, 0, &[Some(first), Some(second)]).unwrap();
    trim(&oracle, 0, 1);
    read(&oracle, 0, &[ZERO, Some(second)]).unwrap();
    oracle.check_all().unwrap();
}

#[test]
fn a_stale_read_is_found() {
    let oracle = Oracle::default();
    let old = write(&oracle, 5, 1);
    let newer = write(&oracle, 5, 1);
    let found = read(&oracle, 5, &[Some(old)]);
    let expected = Violation::Stale { volume: VOLUME, block: 5, old: Some(old), newer };
    assert_eq!(found, Err(expected));
}

#[test]
fn a_lost_write_is_found() {
    let oracle = Oracle::default();
    let lost = write(&oracle, 5, 1);
    let found = read(&oracle, 5, &[ZERO]);
    let expected = Violation::Stale { volume: VOLUME, block: 5, old: None, newer: lost };
    assert_eq!(found, Err(expected));
}

#[test]
fn an_unknown_write_may_show_late_or_never_but_not_come_back() {
    let oracle = Oracle::default();
    let first = write(&oracle, 5, 1);
    let unknown = begin(&oracle, 5, 1);
    oracle.write_ends(unknown, Unknown).unwrap();
    read(&oracle, 5, &[Some(first)]).unwrap();
    read(&oracle, 5, &[Some(first)]).unwrap();
    read(&oracle, 5, &[Some(unknown)]).unwrap();
    let found = read(&oracle, 5, &[Some(first)]);
    assert!(matches!(found, Err(Violation::Stale { .. })), "once observed it stays: {found:?}");

    let oracle = Oracle::default();
    let never = begin(&oracle, 5, 1);
    oracle.write_ends(never, Unknown).unwrap();
    let second = write(&oracle, 5, 1);
    read(&oracle, 5, &[Some(second)]).unwrap();
    // It may be proposed before and applied after the second: late, but once.
    read(&oracle, 5, &[Some(never)]).unwrap();
    let found = read(&oracle, 5, &[Some(second)]);
    assert!(matches!(found, Err(Violation::Stale { .. })), "resurrected: {found:?}");
}

#[test]
fn a_ghost_is_found() {
    let oracle = Oracle::default();
    let there = write(&oracle, 5, 1);
    let found = read(&oracle, 6, &[Some(there)]);
    assert_eq!(found, Err(Violation::Ghost { volume: VOLUME, block: 6, write: there }));
    let found = read(&oracle, 5, &[Some(WriteId(77))]);
    assert_eq!(found, Err(Violation::Ghost { volume: VOLUME, block: 5, write: WriteId(77) }));
    let refused = begin(&oracle, 5, 1);
    oracle.write_ends(refused, Refused).unwrap();
    let found = read(&oracle, 5, &[Some(refused)]);
    assert_eq!(found, Err(Violation::Refused { volume: VOLUME, block: 5, write: refused }));
    let found = oracle.read_ends(read_begins(&oracle, 5, 1), &[1; 4096]);
    assert_eq!(found, Err(Violation::Garbage { volume: VOLUME, block: 5 }));
}

#[test]
fn a_value_that_comes_back_is_found() {
    let oracle = Oracle::default();
    let first = begin(&oracle, 5, 1);
    let second = begin(&oracle, 5, 1);
    read(&oracle, 5, &[Some(first)]).unwrap();
    read(&oracle, 5, &[Some(second)]).unwrap();
    let found = read(&oracle, 5, &[Some(first)]);
    assert!(matches!(found, Err(Violation::Stale { .. })), "{found:?}");
}

#[test]
fn concurrent_operations_may_take_either_order_but_one() {
    let oracle = Oracle::default();
    let old = write(&oracle, 5, 1);
    let running = begin(&oracle, 5, 1);
    let token = read_begins(&oracle, 5, 1);
    read(&oracle, 5, &[Some(running)]).unwrap();
    // This read began before the other one, so it may have looked before it.
    read_ends(&oracle, token, &[Some(old)]).unwrap();
    let found = read(&oracle, 5, &[Some(old)]);
    assert!(matches!(found, Err(Violation::Stale { .. })), "{found:?}");
}

#[test]
fn a_torn_write_is_found() {
    let oracle = Oracle::default();
    let old = write(&oracle, 0, 4);
    let torn = begin(&oracle, 0, 4);
    oracle.write_ends(torn, Unknown).unwrap();
    let found = read(&oracle, 0, &[Some(torn), Some(old), Some(torn), Some(torn)]);
    assert_eq!(found, Err(Violation::Torn { volume: VOLUME, block: 1, write: torn }));

    let oracle = Oracle::default();
    let torn = begin(&oracle, 0, 2);
    assert!(read(&oracle, 0, &[Some(torn), ZERO]).is_err(), "torn against zeroes");

    let oracle = Oracle::default();
    let old = write(&oracle, 0, 2);
    let torn = begin(&oracle, 0, 2);
    oracle.write_ends(torn, Unknown).unwrap();
    read(&oracle, 0, &[Some(torn)]).unwrap();
    let found = read(&oracle, 1, &[Some(old)]);
    assert!(matches!(found, Err(Violation::Stale { .. })), "torn over two reads: {found:?}");
}

#[test]
fn a_write_overwritten_in_part_is_not_torn() {
    let oracle = Oracle::default();
    let wide = write(&oracle, 0, 4);
    let running = begin(&oracle, 1, 1);
    read(&oracle, 0, &[Some(wide), Some(running), Some(wide), Some(wide)]).unwrap();
    trim(&oracle, 3, 1);
    read(&oracle, 0, &[Some(wide), Some(running), Some(wide), ZERO]).unwrap();
}

#[test]
fn zeroes_must_have_a_source() {
    let oracle = Oracle::default();
    let first = write(&oracle, 5, 1);
    let trimming = oracle.write_begins(VOLUME, BlockRange::new(5, 1), true);
    read(&oracle, 5, &[Some(first)]).unwrap();
    read(&oracle, 5, &[ZERO]).unwrap();
    oracle.write_ends(trimming, Done).unwrap();
    let second = write(&oracle, 5, 1);
    assert!(read(&oracle, 5, &[ZERO]).is_err(), "the trim was over before {second:?}");

    let oracle = Oracle::default();
    let first = write(&oracle, 5, 1);
    trim(&oracle, 5, 1);
    assert!(read(&oracle, 5, &[Some(first)]).is_err(), "trimmed data came back");
}

/// Random linearizable histories of a register with overlapping operations pass.
#[test]
fn true_histories_pass() {
    for seed in 0..300 {
        let rng = Rng::new(seed);
        let oracle = Oracle::default();
        let mut stored = [ZERO; 4];
        let mut writing: Vec<(WriteId, u64, u32, bool)> = Vec::new();
        let mut reading: Vec<(ReadToken, Option<Vec<Option<WriteId>>>)> = Vec::new();
        for _ in 0..200 {
            match rng.below(7) {
                0 | 1 => {
                    let start = rng.below(4);
                    let count = rng.between(1, 4 - start) as u32;
                    writing.push((begin(&oracle, start, count), start, count, false));
                }
                2 => {
                    let start = rng.below(4);
                    let count = rng.between(1, 4 - start) as u32;
                    reading.push((read_begins(&oracle, start, count), None));
                }
                3 | 4 if !writing.is_empty() => {
                    let index = rng.below(writing.len() as u64) as usize;
                    let (id, start, count, happened) = &mut writing[index];
                    if !*happened {
                        *happened = true;
                        let blocks = *start as usize..(*start + u64::from(*count)) as usize;
                        stored[blocks].fill(Some(*id));
                    } else {
                        let id = *id;
                        writing.swap_remove(index);
                        let ended = if rng.chance(300_000) { Unknown } else { Done };
                        oracle.write_ends(id, ended).unwrap();
                    }
                }
                5 | 6 if !reading.is_empty() => {
                    let index = rng.below(reading.len() as u64) as usize;
                    if reading[index].1.is_none() {
                        let range = reading[index].0.range();
                        let blocks = range.start as usize..range.end() as usize;
                        reading[index].1 = Some(stored[blocks].to_vec());
                    } else {
                        let (token, saw) = reading.swap_remove(index);
                        let saw = saw.unwrap();
                        read_ends(&oracle, token, &saw).unwrap_or_else(|e| panic!("{seed}: {e}"));
                    }
                }
                _ => {}
            }
        }
        oracle.check_all().unwrap();
    }
}

#[test]
fn of_two_attachments_at_once_nobody_knows_the_newer() {
    let oracle = Oracle::default();
    let first = oracle.fence(VOLUME);
    let slow = oracle.attach_begins();
    let second = oracle.fence(VOLUME);
    // Admitted before the second, told after it: its host is fenced without knowing it.
    let late = oracle.attached(VOLUME, slow);
    let range = BlockRange::new(0, 1);
    let under_second = oracle.write_begins_under(second, VOLUME, range, false);
    oracle.write_ends(under_second, Done).unwrap();
    let under_late = oracle.write_begins_under(late, VOLUME, range, false);
    oracle.write_ends(under_late, Unknown).unwrap();
    read(&oracle, 0, &[Some(under_second)]).unwrap();
    // Both are newer than the first, for certain.
    let under_first = oracle.write_begins_under(first, VOLUME, range, false);
    assert!(oracle.write_ends(under_first, Done).is_err());
    oracle.check_all().unwrap();
}
