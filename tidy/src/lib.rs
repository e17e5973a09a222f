//! The project's own files as the tidy tests see them: what belongs to the repository, Rust source with
//! comments and literals blanked out, and the functions in it.
//!
//! Owns no rule (those are in `tests/`) and never changes a file.

mod mask;

use std::path::{Path, PathBuf};
use std::process::Command;

pub use mask::mask;

/// A file of the repository.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Path from the repository's root, with `/` between its parts.
    pub path: String,
    /// The whole text.
    pub text: String,
}

impl SourceFile {
    /// Whether the name ends in `.` and this extension.
    pub fn has_extension(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|e| e == extension)
    }

    /// Number of the line (from 1) that holds the byte at this offset.
    pub fn line_of(&self, offset: usize) -> usize {
        self.text[..offset].matches('\n').count() + 1
    }
}

/// The repository's root folder.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("the crate lies in the repository").to_path_buf()
}

/// Every text file that belongs to the repository: tracked, or new and not ignored.
///
/// # Panics
/// When git does not answer: a rule that looked at no file must not pass.
pub fn files() -> Vec<SourceFile> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    assert!(listing.status.success(), "{}", String::from_utf8_lossy(&listing.stderr));
    let names = String::from_utf8(listing.stdout).expect("paths are UTF-8");
    let mut files = Vec::new();
    for path in names.split('\0').filter(|name| !name.is_empty()) {
        // Binary files, and deletions that are not committed yet, are not text to check.
        if let Ok(text) = std::fs::read_to_string(root().join(path)) {
            files.push(SourceFile { path: path.to_string(), text });
        }
    }
    assert!(files.len() > 10, "only {} files found", files.len());
    files
}

/// Every Rust file of the repository.
pub fn rust_files() -> Vec<SourceFile> {
    files().into_iter().filter(|file| file.has_extension("rs")).collect()
}

/// A function's name and extent in lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name without path.
    pub name: String,
    /// Line of the `fn` keyword, from 1.
    pub first_line: usize,
    /// Lines from there to the closing brace, both counted.
    pub lines: usize,
}

/// The functions with a body in masked Rust source (see [`mask()`]), in order of their start.
pub fn functions(masked: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for offset in words(masked, "fn") {
        let rest = masked[offset + 2..].trim_start();
        let name: String = rest.chars().take_while(|c| is_word(*c)).collect();
        if name.is_empty() {
            continue; // a function pointer type
        }
        if let Some(end) = body_end(masked, offset) {
            found.push(Function {
                name,
                first_line: masked[..offset].matches('\n').count() + 1,
                lines: masked[offset..end].matches('\n').count() + 1,
            });
        }
    }
    found
}

/// Offsets at which this word stands by itself.
pub fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(offset, _)| offset).filter(move |offset| {
        let before = text[..*offset].chars().next_back();
        let after = text[offset + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Offset just behind the closing brace, or none for a declaration without body.
fn body_end(masked: &str, start: usize) -> Option<usize> {
    let mut round = 0i32;
    let mut depth = 0i32;
    for (offset, c) in masked[start..].char_indices() {
        match c {
            '(' | '[' => round += 1,
            ')' | ']' => round -= 1,
            ';' if round == 0 && depth == 0 => return None,
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                if depth == 0 && round == 0 {
                    return Some(start + offset + 1);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_found_with_their_length() {
        let text = "trait T {\n    fn declared(&self, a: [u8; 4]);\n    fn short() {}\n}\n\
                    async fn long(f: fn(u8) -> u8) -> u8 {\n    if true {\n        1\n    }\n}\n";
        let found = functions(&mask(text));
        let short = Function { name: "short".into(), first_line: 3, lines: 1 };
        let long = Function { name: "long".into(), first_line: 5, lines: 5 };
        assert_eq!(found, [short, long]);
    }

    #[test]
    fn words_stand_by_themselves() {
        assert_eq!(words("fn afn fn_ (fn)", "fn").collect::<Vec<_>>(), [0, 12]);
    }

    #[test]
    fn the_repository_is_seen() {
        let files = files();
        assert!(files.iter().any(|file| file.path == "Cargo.toml"));
        assert!(files.iter().any(|file| file.path == "tidy/src/lib.rs"));
        assert!(!files.iter().any(|file| file.path.starts_with("target/")));
    }
}
