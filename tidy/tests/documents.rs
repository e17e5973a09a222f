//! Rules about documents: what they name exists.
//!
//! Looks at paths in backquotes and at links; never judges prose.

use ballast_tidy::{SourceFile, files, functions, mask, root, words};

const DOCUMENTS: [&str; 3] = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"];
const EXTENSIONS: [&str; 8] = ["rs", "md", "sh", "toml", "proto", "json", "py", "svg"];

fn documents() -> Vec<SourceFile> {
    let all = files().into_iter();
    all.filter(|file| {
        DOCUMENTS.contains(&file.path.as_str())
            || (file.path.starts_with("docs/") && file.has_extension("md"))
    })
    .collect()
}

/// What stands between single backquotes, outside code fences.
fn quoted(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            found.extend(line.split('`').skip(1).step_by(2).map(str::to_string));
        }
    }
    found
}

/// `path/file.ext`, with the `::item` that may follow it, if this looks like a file of ours.
fn split_item(name: &str) -> Option<(&str, Option<&str>)> {
    let (path, item) = match name.split_once("::") {
        Some((path, item)) => (path, Some(item)),
        None => (name, None),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let (_, extension) = path.rsplit_once('.')?;
    // `DIR/dev.json` stands for a folder that the reader chooses.
    let placeholder = path.starts_with(|c: char| c.is_ascii_uppercase());
    let ours =
        path.contains('/') && !path.starts_with('/') && !placeholder && path.chars().all(plain);
    (ours && EXTENSIONS.contains(&extension)).then_some((path, item))
}

/// Whether a Rust file defines this function, type, trait or constant (the last part of a path).
fn defines(source: &str, item: &str) -> bool {
    let name = item.rsplit("::").next().unwrap_or(item).trim_end_matches("()");
    let masked = mask(source);
    let kinds = ["struct ", "enum ", "trait ", "const ", "mod ", "type "];
    functions(&masked).iter().any(|function| function.name == name)
        || words(&masked, name)
            .any(|offset| kinds.iter().any(|kind| masked[..offset].ends_with(kind)))
        || words(&masked, name).any(|offset| masked[..offset].ends_with("fn "))
}

#[test]
fn files_and_functions_named_in_documents_exist() {
    let mut missing = Vec::new();
    for document in documents() {
        for name in quoted(&document.text) {
            let Some((path, item)) = split_item(&name) else { continue };
            match std::fs::read_to_string(root().join(path)) {
                Err(_) => missing.push(format!("{}: no file {path}", document.path)),
                Ok(source) => {
                    if item.is_some_and(|item| !defines(&source, item)) {
                        missing.push(format!("{}: nothing named {name}", document.path));
                    }
                }
            }
        }
    }
    assert!(missing.is_empty(), "documents name what is not there:\n  {}", missing.join("\n  "));
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        let folder = root().join(&document.path);
        let folder = folder.parent().expect("a file lies in a folder");
        for (offset, _) in document.text.match_indices("](") {
            let rest = &document.text[offset + 2..];
            let target = rest.split([')', '#', ' ']).next().unwrap_or_default();
            let elsewhere = target.is_empty() || target.contains("://");
            if !elsewhere && !folder.join(target).exists() {
                broken.push(format!("{}: {target}", document.path));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n  {}", broken.join("\n  "));
}

#[test]
fn paths_are_told_from_other_words() {
    assert_eq!(split_item("env/src/disk.rs"), Some(("env/src/disk.rs", None)));
    assert_eq!(
        split_item("env/src/disk.rs::Disk::read"),
        Some(("env/src/disk.rs", Some("Disk::read")))
    );
    assert_eq!(split_item("DIR/dev.json"), None);
    assert_eq!(split_item("tokio::select"), None);
    assert!(defines("pub trait Disk { fn read(&self); }", "Disk::read"));
    assert!(!defines("// fn read() {}", "read"));
}
