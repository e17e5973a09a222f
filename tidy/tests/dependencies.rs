//! The workspace's dependency table: arrows point down only.
//!
//! Compares `cargo metadata` with the table below, dev-dependencies included. A crate that is
//! missing from the table fails: say first what it may use.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use ballast_tidy::root;
use serde_json::Value;

/// Crate folder, and the folders that it may use directly. `*` stands for all.
const MAY_USE: [(&str, &[&str]); 17] = [
    ("block", &[]),
    ("env", &["block"]),
    ("raft-store", &["block", "env"]),
    ("volume", &["block", "env", "raft-store"]),
    ("cluster", &["block"]),
    ("nbd", &["block"]),
    ("nvme-tcp", &["block"]),
    ("node", &["block", "env", "raft-store", "volume", "cluster", "nbd", "nvme-tcp"]),
    ("daemon", &["block", "env", "node", "api"]),
    ("api", &["block"]),
    ("csi-shim", &["block", "api"]),
    ("sim", &["block", "env", "raft-store", "volume", "cluster", "nbd", "nvme-tcp", "node"]),
    ("tools", &["block", "env", "raft-store", "cluster", "api"]),
    ("tidy", &[]),
    ("e2e", &["*"]),
    ("benches", &["*"]),
    ("fuzz", &["*"]),
];

/// Crate name to its folder and the folders of the workspace crates that it uses.
fn workspace() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let folder = |path: &str| {
        let path = path.trim_end_matches("/Cargo.toml");
        path.rsplit('/').next().expect("a path has a last part").to_string()
    };
    let uses = |package: &Value| {
        let all = package["dependencies"].as_array().expect("dependencies");
        all.iter().filter_map(|d| d["path"].as_str()).map(folder).collect()
    };
    packages
        .iter()
        .map(|package| {
            let name = package["name"].as_str().expect("name").to_string();
            let place = folder(package["manifest_path"].as_str().expect("manifest_path"));
            (name, (place, uses(package)))
        })
        .collect()
}

#[test]
fn crates_use_only_what_the_table_allows() {
    let table = BTreeMap::from(MAY_USE);
    let mut findings = Vec::new();
    for (name, (folder, uses)) in workspace() {
        let Some(allowed) = table.get(folder.as_str()) else {
            findings.push(format!("{name} is not in the table"));
            continue;
        };
        let free = allowed.contains(&"*");
        let not_allowed = uses.iter().filter(|u| !free && !allowed.contains(&u.as_str()));
        findings.extend(not_allowed.map(|used| format!("{name} must not use {used}")));
    }
    assert!(findings.is_empty(), "the dependency table is broken:\n  {}", findings.join("\n  "));
}

#[test]
fn the_table_points_down_only() {
    let order: Vec<&str> = MAY_USE.iter().map(|(folder, _)| *folder).collect();
    let rank = |folder: &str| order.iter().position(|f| *f == folder);
    for (folder, uses) in MAY_USE {
        for used in uses.iter().filter(|used| **used != "*") {
            let down = rank(used) < rank(folder) || *used == "api";
            assert!(down, "{folder} uses {used}, which stands below it");
        }
    }
}
