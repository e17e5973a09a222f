//! Every guarantee has a test of its name, and no program but the simulator has planted bugs.

use ballast_tidy::{functions, mask, rust_files};

/// The guarantees that the system keeps so far.
const GUARANTEES: [&str; 11] = [
    "durable_on_majority",
    "linearizable",
    "atomic_write",
    "fenced",
    "checked",
    "bounded",
    "recoverable",
    "never_forgets",
    "nothing_lost_when_full",
    "one_writer",
    "never_format_data",
];

#[test]
fn every_guarantee_has_a_test_of_its_name() {
    let tests: Vec<String> = rust_files()
        .iter()
        .filter(|file| file.path.contains("/tests/"))
        .flat_map(|file| functions(&mask(&file.text)))
        .map(|function| function.name)
        .collect();
    let missing: Vec<_> =
        GUARANTEES.iter().filter(|name| !tests.iter().any(|test| test == *name)).collect();
    assert!(missing.is_empty(), "no test is named after {missing:?}");
}

#[test]
fn only_the_simulator_plants_bugs() {
    let answers = ["env/src/planted.rs", "sim/src/env/mod.rs"];
    let found: Vec<String> = rust_files()
        .iter()
        .filter(|file| functions(&mask(&file.text)).iter().any(|one| one.name == "is_planted"))
        .map(|file| file.path.clone())
        .collect();
    assert_eq!(found, answers, "`is_planted` is answered elsewhere");
}
