//! The oracle of **never-format-data** and **one-writer** against histories made by hand: what must pass,
//! and what must be found.

use ballast_block::BlockRange;
use ballast_sim::oracle::Outcome::{Done, Unknown};
use ballast_sim::oracle::{Author, Oracle, Outcome, Value, Violation, WriteId, stamp};

const VOLUME: u64 = 2000;
const BLOCK: BlockRange = BlockRange { start: 3, count: 1 };
const OTHER: BlockRange = BlockRange { start: 5, count: 1 };

fn begin(oracle: &Oracle, epoch: u64, formats: bool, range: BlockRange) -> WriteId {
    let author = Author { attachment: u64::MAX, epoch, formats };
    oracle.write_begins_by(author, VOLUME, range, false)
}

fn write(oracle: &Oracle, epoch: u64, formats: bool, outcome: Outcome) -> WriteId {
    let id = begin(oracle, epoch, formats, BLOCK);
    oracle.write_ends(id, outcome).unwrap();
    id
}

fn ask(oracle: &Oracle, blank: bool) -> Result<(), Violation> {
    let asked = oracle.formatting_asked();
    oracle.formatting_granted(VOLUME, asked, blank)
}

fn read(oracle: &Oracle, range: BlockRange, saw: Option<WriteId>) -> Result<(), Violation> {
    let token = oracle.read_begins(VOLUME, range);
    oracle.read_ends_with(token, &[saw.map_or(Value::Zero, Value::Written)])
}

#[test]
fn a_volume_that_is_formatted_and_then_used_passes() {
    let oracle = Oracle::default();
    ask(&oracle, true).unwrap();
    write(&oracle, 7, true, Done);
    // It broke off, and the next host begins again.
    ask(&oracle, false).unwrap();
    let late = begin(&oracle, 9, true, OTHER);
    write(&oracle, 9, true, Done);
    write(&oracle, 9, false, Done);
    oracle.write_ends(late, Done).unwrap();
    oracle.check_all().unwrap();
}

#[test]
fn leave_to_format_data_is_found() {
    let oracle = Oracle::default();
    let early = oracle.formatting_asked();
    let data = write(&oracle, 0, false, Done);
    oracle.formatting_granted(VOLUME, early, true).unwrap();
    assert_eq!(ask(&oracle, false), Err(Violation::MayFormat { volume: VOLUME, data }));
}

/// That it was there before shows only afterwards: whoever wrote it was fenced before.
#[test]
fn leave_to_format_data_that_nobody_acknowledged_is_found() {
    let oracle = Oracle::default();
    let data = write(&oracle, 7, false, Unknown);
    oracle.epoch_in_force(VOLUME, 9);
    ask(&oracle, true).unwrap();
    let found = read(&oracle, BLOCK, Some(data));
    assert_eq!(found, Err(Violation::MayFormat { volume: VOLUME, data }));
}

#[test]
fn leave_to_take_a_written_volume_for_zeroes_is_found() {
    let oracle = Oracle::default();
    let write = write(&oracle, 7, true, Done);
    assert_eq!(ask(&oracle, true), Err(Violation::NotBlank { volume: VOLUME, write }));
}

#[test]
fn a_file_system_made_over_data_is_found() {
    for is_told in [true, false] {
        let oracle = Oracle::default();
        ask(&oracle, true).unwrap();
        let data = write(&oracle, 0, false, Done);
        let made = begin(&oracle, 0, true, OTHER);
        let found = if is_told {
            oracle.write_ends(made, Done)
        } else {
            oracle.write_ends(made, Unknown).unwrap();
            read(&oracle, OTHER, Some(made))
        };
        assert_eq!(found, Err(Violation::Formatted { volume: VOLUME, data, made }));
    }
}

#[test]
fn a_write_under_an_older_epoch_is_found() {
    let oracle = Oracle::default();
    let floating = begin(&oracle, 7, false, BLOCK);
    // Nobody said that the lease is in force: that it writes says so.
    let newer = begin(&oracle, 9, false, OTHER);
    oracle.write_ends(newer, Done).unwrap();
    let late = begin(&oracle, 7, false, OTHER);
    let found = oracle.write_ends(late, Done);
    let expected = Violation::OldEpoch { volume: VOLUME, write: late, epoch: 7, newer: 9 };
    assert_eq!(found, Err(expected));
    read(&oracle, BLOCK, None).unwrap();
    let found = read(&oracle, BLOCK, Some(floating));
    let expected =
        Violation::Stale { volume: VOLUME, block: BLOCK.start, old: None, newer: floating };
    assert_eq!(found, Err(expected), "it landed after the newer epoch was in force");
}

#[test]
fn what_was_written_to_the_volume_before_is_found() {
    let oracle = Oracle::default();
    let token = oracle.read_begins(VOLUME, BLOCK);
    let found = oracle.read_ends(token, &stamp::stamp(1999, BLOCK.start, WriteId(4)));
    let (volume, block, of, write) = (VOLUME, BLOCK.start, 1999, WriteId(4));
    assert_eq!(found, Err(Violation::Foreign { volume, block, of, write }));
}
