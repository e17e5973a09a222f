//! Rules about single files: their size, what they may contain, how they begin.
//!
//! Each test lists everything that breaks its rule, as `path:line what`.

use ballast_tidy::{SourceFile, files, functions, mask, rust_files, words};

/// Lines in one file. Past this, a file holds more than one thing.
const FILE_LINES: usize = 600;
/// Lines in one function, signature and braces included.
const FUNCTION_LINES: usize = 70;
/// Where `unsafe` may stand: aligned buffers, the outside world, and the simulator's replacement of
/// a C function.
const UNSAFE_PLACES: [&str; 3] = ["block/src/buffer.rs", "env/src/", "sim/src/os_entropy.rs"];

fn assert_none(rule: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{rule}:\n  {}\n", findings.join("\n  "));
}

fn at(file: &SourceFile, offset: usize, what: &str) -> String {
    format!("{}:{} {what}", file.path, file.line_of(offset))
}

#[test]
fn rust_files_are_at_most_600_lines() {
    let long = rust_files()
        .iter()
        .map(|file| (file.path.clone(), file.text.lines().count()))
        .filter(|(_, lines)| *lines > FILE_LINES)
        .map(|(path, lines)| format!("{path} has {lines} lines"))
        .collect();
    assert_none("a file has at most 600 lines", long);
}

#[test]
fn functions_are_at_most_70_lines() {
    let mut long = Vec::new();
    let mut seen = 0;
    for file in rust_files() {
        for function in functions(&mask(&file.text)) {
            seen += 1;
            if function.lines > FUNCTION_LINES {
                let (name, lines) = (function.name, function.lines);
                long.push(format!("{}:{} fn {name} has {lines}", file.path, function.first_line));
            }
        }
    }
    assert!(seen > 50, "only {seen} functions found: the counter is broken");
    assert_none("a function has at most 70 lines", long);
}

#[test]
fn unsafe_stays_in_its_places() {
    let mut findings = Vec::new();
    for file in rust_files() {
        if UNSAFE_PLACES.iter().any(|place| file.path.starts_with(place)) {
            continue;
        }
        let masked = mask(&file.text);
        let lines = words(&masked, "unsafe").map(|o| masked[..o].matches('\n').count() + 1);
        findings.extend(lines.map(|line| format!("{}:{line}", file.path)));
    }
    assert_none(
        "unsafe belongs into block/src/buffer.rs, env/src and sim/src/os_entropy.rs",
        findings,
    );
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, so that this file does not contain them.
    let notes = [["TO", "DO"].concat(), ["FIX", "ME"].concat(), "X".repeat(3)];
    let macros = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!"));
    let ignored = "#[ignore";
    let mut findings = Vec::new();
    for file in files().iter().filter(|file| !file.path.ends_with(".lock")) {
        for note in &notes {
            findings.extend(words(&file.text, note).map(|offset| at(file, offset, note)));
        }
        if !file.has_extension("rs") {
            continue;
        }
        let masked = mask(&file.text);
        for (number, line) in masked.lines().enumerate() {
            let left = macros.iter().map(String::as_str).chain([ignored]);
            for what in left.filter(|what| line.contains(what)) {
                findings.push(format!("{}:{} {what}", file.path, number + 1));
            }
        }
    }
    assert_none("what is not done returns an error, what is not tested is not there", findings);
}

#[test]
fn every_rust_file_says_what_it_owns() {
    let mut findings = Vec::new();
    for file in rust_files() {
        let first = file.text.lines().find(|line| {
            let line = line.trim();
            !line.is_empty() && !line.starts_with("#![")
        });
        if !first.is_some_and(|line| line.starts_with("//! ")) {
            findings.push(file.path);
        }
    }
    assert_none("a Rust file begins with a `//!` head", findings);
}

#[test]
fn lines_have_no_tabs_and_no_trailing_blanks() {
    let mut findings = Vec::new();
    for file in files() {
        if file.path == "LICENSE" || file.has_extension("patch") {
            continue;
        }
        // Go has tabs, by its own formatter.
        let go = file.has_extension("go") || file.path.ends_with("/go.mod");
        for (number, line) in file.text.lines().enumerate() {
            if (line.contains('\t') && !go) || line.ends_with(' ') || line.ends_with('\r') {
                findings.push(format!("{}:{}", file.path, number + 1));
            }
        }
        if !file.text.is_empty() && !file.text.ends_with('\n') {
            findings.push(format!("{} has no newline at its end", file.path));
        }
    }
    assert_none("no tabs, no blanks at a line's end", findings);
}

#[test]
fn no_file_names_the_place_where_it_was_made() {
    let banned = [["/wo", "rk/"].concat(), ["farm", "-bench"].concat()];
    let mut findings = Vec::new();
    for file in &files() {
        for word in &banned {
            findings.extend(file.text.match_indices(word).map(|(o, _)| at(file, o, word)));
        }
    }
    assert_none("the project does not know the machine it was written on", findings);
}
