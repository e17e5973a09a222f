//! One test per guarantee that the simulator judges, named after it (docs/testing.md), each
//! under the faults that would break it; and the planted bugs, each found.
//!
//! What decides is in `sim/src/oracle/` and `sim/src/cluster.rs`: every run checks all of them.

use std::process::Command;

/// Whether the seeds pass, and what was said.
fn simulate(arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_simulate"));
    let output = command.args(arguments).output().expect("the program was built for this test");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[track_caller]
fn holds(seeds: &str, faults: &str) {
    let (seeds, faults) = (format!("--seeds={seeds}"), format!("--faults={faults}"));
    let (good, said) = simulate(&[&seeds, &faults, "--steps=600", "--every=700"]);
    assert!(good, "{said}");
}

#[test]
fn durable_on_majority() {
    holds("1000..1002", "power-loss-after-answer,slow-writes");
}

#[test]
fn linearizable() {
    holds("1002..1004", "isolate-from-nodes,cut-one-way,stop");
}

#[test]
fn atomic_write() {
    holds("1004..1006", "kill-soon,power-loss-of-all");
}

#[test]
fn fenced() {
    holds("1006..1008", "isolate,reset-connections,kill");
}

#[test]
fn checked() {
    holds("1008..1010", "rot,read-errors,kill");
}

#[test]
fn bounded() {
    holds("1010..1012", "stop,stall-disk,slow-link");
}

#[test]
fn recoverable() {
    holds("1012..1014", "power-loss-of-all,kill,checkpoint-and-crash");
}

#[test]
fn never_forgets() {
    holds("1014..1016", "fail-writes,power-loss,checkpoint-and-crash");
}

/// With names under which volumes are made, formatted, deleted and made again.
#[track_caller]
fn holds_claimed(seeds: &str, faults: &str) {
    let (seeds, faults) = (format!("--seeds={seeds}"), format!("--faults={faults}"));
    let (good, said) = simulate(&[&seeds, &faults, "--claims=2", "--steps=600", "--every=700"]);
    assert!(good, "{said}");
}

#[test]
fn one_writer() {
    holds_claimed("1016..1018", "isolate,cut-one-way,stop");
}

#[test]
fn never_format_data() {
    holds_claimed("1018..1020", "kill,isolate-from-nodes,power-loss-of-all");
}

/// These seeds have a volume about as large as its pools.
#[test]
fn nothing_lost_when_full() {
    for seed in ["15", "47"] {
        let (good, said) = simulate(&["--seed", seed]);
        assert!(good, "{said}");
    }
}

#[track_caller]
fn is_found(bug: &str, seed: &str) {
    let (good, said) = simulate(&[&format!("--plant={bug}"), &format!("--seed={seed}")]);
    assert!(!good && said.contains("FAILED"), "{bug} was not found: {said}");
}

#[test]
fn acknowledging_before_the_flush_is_found() {
    is_found("early-ack", "15");
}

#[test]
fn a_leader_that_resumes_its_term_is_found() {
    is_found("leader-restore", "14");
}

#[test]
fn a_skipped_read_gate_is_found() {
    is_found("skipped-read-gate", "50");
}

#[test]
fn a_cleaner_that_frees_a_live_block_is_found() {
    is_found("live-block-freed", "11");
}

#[test]
fn formatting_that_is_bound_to_nobody_is_found() {
    is_found("loose-formatting", "9");
}

/// A host of a deleted volume writes into the one that has its name, or reads it.
#[test]
fn epochs_that_begin_anew_with_a_volume_are_found() {
    is_found("epochs-anew", "16");
}

/// A ghost write: a request whose copy on another connection was answered arrives after all.
#[test]
fn a_request_that_moves_unseen_between_connections_is_found() {
    is_found("hidden-moves", "32");
}

/// With these faults only: among all others they meet too seldom.
#[test]
fn a_checkpoint_above_the_durable_watermark_is_found() {
    let faults = ["--faults=checkpoint-and-crash,slow-disk", "--every=400", "--seed=15"];
    let (good, said) = simulate(&faults);
    assert!(good, "{said}");
    let (good, said) = simulate(&[&faults[..], &["--plant=early-checkpoint"]].concat());
    assert!(!good && said.contains("FAILED"), "early-checkpoint was not found: {said}");
}
