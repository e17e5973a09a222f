//! Every call of the driver repeated, out of its turn, cancelled, and many at a time: real driver,
//! real mounts, three nodes.

mod csi_calls_table;
mod csi_driver;

use std::time::Duration;

use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use csi_calls_table::{Abused, Call, GETTERS, LADDER};
use csi_driver::{Csi, block, code, mounted};
use tonic::Code;

/// A volume with a file system and one without.
fn kinds() -> [(&'static str, ballast_csi_shim::v1::VolumeCapability); 2] {
    let mode = Mode::SingleNodeMultiWriter;
    [("files", mounted(mode, "ext4")), ("device", block(mode))]
}

/// What a call out of its turn is answered, by how far the volume's life has got: nothing, created,
/// published to the host, staged, published to a pod. `None`: its turn, or not asked.
const OUT_OF_TURN: [(Call, [Option<Code>; 5]); 12] = {
    const OK: Option<Code> = Some(Code::Ok);
    const EARLY: Option<Code> = Some(Code::FailedPrecondition);
    const GONE: Option<Code> = Some(Code::NotFound);
    const TURN: Option<Code> = None;
    [
        (Call::Create, [OK, OK, OK, OK, OK]),
        (Call::Attach, [GONE, OK, OK, OK, OK]),
        (Call::Stage, [GONE, EARLY, OK, OK, OK]),
        (Call::Publish, [EARLY, EARLY, EARLY, OK, OK]),
        (Call::Unpublish, [OK, OK, OK, OK, TURN]),
        (Call::Unstage, [OK, OK, OK, TURN, EARLY]),
        (Call::Release, [OK, OK, TURN, TURN, TURN]),
        (Call::Delete, [OK, TURN, EARLY, EARLY, EARLY]),
        (Call::Expand, [GONE, OK, OK, OK, OK]),
        (Call::Grow, [GONE, GONE, GONE, GONE, OK]),
        (Call::Stats, [GONE, GONE, GONE, GONE, OK]),
        (Call::Get, [GONE, OK, OK, OK, OK]),
    ]
};

#[test]
fn every_call_may_be_repeated_and_comes_out_of_turn() {
    let csi = Csi::start("csi-turns");
    for (name, capability) in kinds() {
        let mut it = Abused::new(&csi, name, capability);
        // Something with an id and a context that once were good.
        it.climb(2);
        it.descend(0);
        for level in 0..=LADDER.len() {
            it.climb(level);
            for (call, codes) in OUT_OF_TURN {
                let Some(expected) = codes[level] else { continue };
                let first = it.make(call, None);
                let again = it.make(call, None);
                let told = format!("{name}: {call:?} at {level}: {first:?}, then {again:?}");
                assert_eq!(code(first.as_ref().map_err(Clone::clone)), expected, "{told}");
                assert_eq!(code(again.as_ref().map_err(Clone::clone)), expected, "{told}");
                if let (Ok(first), Ok(again)) = (first, again) {
                    assert_eq!(first, again, "{told}");
                }
                // It did what its answer says, and half of nothing.
                it.descend_to_exactly(level);
            }
        }
        it.descend(0);
        it.assert_nothing_left();
    }
}

/// The host is given up while it uses the volume: what is left there goes away all the same.
#[test]
fn what_was_staged_goes_although_its_lease_or_volume_went_first() {
    let csi = Csi::start("csi-early");
    for (name, capability) in kinds() {
        let mut it = Abused::new(&csi, name, capability);
        for deleted_too in [false, true] {
            it.climb(4);
            it.must(Call::Release);
            let restaged = code(it.make(Call::Stage, None));
            assert!([Code::Ok, Code::FailedPrecondition].contains(&restaged), "{restaged:?}");
            if deleted_too {
                it.must(Call::Delete);
            }
            for call in [Call::Unpublish, Call::Unstage, Call::Release, Call::Delete] {
                it.must(call);
            }
            it.assert_nothing_left();
        }
    }
}

/// Milliseconds that a call is given: from nothing to more than most need.
const DEADLINES: [u64; 6] = [1, 8, 30, 90, 250, 700];

/// What a caller may hear whose time was too short.
const CUT_OFF: [Code; 5] =
    [Code::Ok, Code::Cancelled, Code::DeadlineExceeded, Code::Unavailable, Code::Aborted];

#[test]
fn every_call_may_be_cut_off_by_its_deadline() {
    let csi = Csi::start("csi-deadlines");
    for (name, capability) in kinds() {
        let mut it = Abused::new(&csi, name, capability);
        it.climb(0);
        for milliseconds in DEADLINES {
            let time = Some(Duration::from_millis(milliseconds));
            let cut_off = |it: &mut Abused, call: Call| {
                let answer = it.make(call, time);
                let told = format!("{name}: {call:?} within {milliseconds} ms: {answer:?}");
                assert!(CUT_OFF.contains(&code(answer)), "{told}");
            };
            for (call, _) in LADDER {
                cut_off(&mut it, call);
                it.must(call);
            }
            it.want_more();
            for call in [Call::Expand, Call::Grow].into_iter().chain(GETTERS) {
                cut_off(&mut it, call);
                it.must(call);
            }
            for (call, opposite) in LADDER.into_iter().rev() {
                cut_off(&mut it, opposite);
                // What was cut off is undone like what was done, but for a volume: its id is needed.
                cut_off(&mut it, call);
                if call == Call::Create {
                    it.must(call);
                }
                it.must(opposite);
            }
        }
        it.assert_nothing_left();
    }
}

/// So many of them at a time.
const AT_ONCE: usize = 16;

#[test]
fn sixteen_calls_at_a_time_are_served_or_told_to_wait() {
    let csi = Csi::start("csi-crowd");
    for (name, capability) in kinds() {
        let mut it = Abused::new(&csi, name, capability);
        for (level, (call, opposite)) in LADDER.into_iter().enumerate() {
            it.climb(level);
            it.crowd(&[call; AT_ONCE], &[Code::Ok, Code::Aborted]);
            it.must(call);
            it.crowd(&[opposite; AT_ONCE], &[Code::Ok, Code::Aborted]);
            it.must(opposite);
            let mixture: Vec<Call> = [call, opposite].into_iter().cycle().take(AT_ONCE).collect();
            // A volume may be deleted before it is ready.
            let gone = if call == Call::Create { Code::NotFound } else { Code::Aborted };
            it.crowd(&mixture, &[Code::Ok, Code::Aborted, gone]);
            it.must(call);
        }
        it.want_more();
        for call in [Call::Expand, Call::Grow] {
            it.crowd(&[call; AT_ONCE], &[Code::Ok, Code::Aborted]);
            it.must(call);
        }
        it.crowd(&GETTERS.repeat(3)[..AT_ONCE], &[Code::Ok]);
        let all: Vec<Call> =
            LADDER.into_iter().flat_map(|(call, opposite)| [opposite, call]).collect();
        let known = [Code::Ok, Code::Aborted, Code::NotFound, Code::FailedPrecondition];
        for level in [4, 2, 3] {
            it.climb(level);
            it.crowd(&all.repeat(2), &known);
            it.settle();
        }
        it.assert_nothing_left();
    }
}
