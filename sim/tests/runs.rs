//! Whole runs through the `simulate` program: they replay, they pass, and planted bugs are found.

use std::process::{Command, Output};

fn simulate(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_simulate"));
    command.args(arguments).output().expect("the program was built for this test")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn passes(arguments: &[&str]) -> String {
    let output = simulate(arguments);
    let said = text(&output);
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

#[test]
fn a_seed_replays_exactly() {
    for system in ["--system=toy", "--system=node"] {
        let once = passes(&["--seed=1", system]);
        let again = passes(&["--seed=1", system]);
        assert!(once.contains("hash"), "{once}");
        assert_eq!(once, again, "two runs of one seed differ");
    }
}

#[test]
fn the_toy_passes_under_faults() {
    passes(&["--seeds=0..6", "--system=toy", "--steps=600"]);
}

/// Another seed in each commit: what no other run has tried yet.
#[test]
fn the_seed_of_this_commit_passes() {
    let seed = std::env::var("BALLAST_SIM_SEED").unwrap_or_else(|_| "7".to_owned());
    passes(&["--seed", &seed, "--system=toy", "--steps=600"]);
}

/// The canary: a harness that can't find this finds nothing (hazard F1).
#[test]
fn a_leader_that_resumes_its_term_is_found() {
    let output = simulate(&["--seeds=0..4", "--system=toy", "--plant=leader-restore"]);
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("was seen although") || said.contains("differ"), "{said}");
    assert!(said.contains("replay: simulate --seed"), "{said}");
}
