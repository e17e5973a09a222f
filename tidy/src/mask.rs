//! Blanks comments and literals in Rust source, so that a search for a word finds code only.
//!
//! Never parses: it knows just enough of the language to tell where a literal or comment ends.

/// The source with every comment, string and character literal replaced by blanks.
///
/// The result has the same number of lines, and of characters in each line; all that is left is code.
pub fn mask(source: &str) -> String {
    let text: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < text.len() {
        let end = literal_end(&text, at);
        if end > at {
            out.extend(text[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

/// Where the comment or literal that starts here ends; the same place when none does.
fn literal_end(text: &[char], at: usize) -> usize {
    match (text[at], text.get(at + 1)) {
        ('/', Some('/')) => line_end(text, at),
        ('/', Some('*')) => block_comment_end(text, at),
        ('"', _) => string_end(text, at + 1),
        ('\'', _) => char_end(text, at),
        ('r', Some('"' | '#')) if !inside_word(text, at) => raw_string_end(text, at),
        _ => at,
    }
}

fn line_end(text: &[char], at: usize) -> usize {
    text[at..].iter().position(|c| *c == '\n').map_or(text.len(), |n| at + n)
}

fn block_comment_end(text: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut i = at;
    while i + 1 < text.len() {
        match (text[i], text[i + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                i += 1;
                continue;
            }
        }
        i += 2;
        if depth == 0 {
            return i;
        }
    }
    text.len()
}

fn string_end(text: &[char], inside: usize) -> usize {
    let mut i = inside;
    while i < text.len() {
        match text[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    text.len()
}

/// A character literal, told from a lifetime by its closing quote.
fn char_end(text: &[char], at: usize) -> usize {
    if text.get(at + 1) == Some(&'\\') {
        let close = text.iter().skip(at + 3).position(|c| *c == '\'');
        return close.map_or(text.len(), |n| at + 3 + n + 1);
    }
    if text.get(at + 2) == Some(&'\'') { at + 3 } else { at }
}

fn raw_string_end(text: &[char], at: usize) -> usize {
    let hashes = text[at + 1..].iter().take_while(|c| **c == '#').count();
    let open = at + 1 + hashes;
    if text.get(open) != Some(&'"') {
        return at; // a raw identifier
    }
    let mut i = open + 1;
    while i < text.len() {
        let closes = text[i] == '"'
            && text[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
        if closes {
            return i + 1 + hashes;
        }
        i += 1;
    }
    text.len()
}

/// Whether this letter continues a word (`br"` starts a literal, `for"` cannot).
fn inside_word(text: &[char], at: usize) -> bool {
    let letter = |i: usize| text[i].is_alphanumeric() || text[i] == '_';
    match at {
        0 => false,
        1 => letter(0) && text[0] != 'b',
        _ => letter(at - 1) && (text[at - 1] != 'b' || letter(at - 2)),
    }
}

#[cfg(test)]
mod tests {
    use super::mask;

    #[test]
    fn comments_go() {
        assert_eq!(mask("a // b\nc"), "a     \nc");
        assert_eq!(mask("a /* b /* c */ */ d"), "a                 d");
    }

    #[test]
    fn strings_go() {
        assert_eq!(mask(r#"f("a\"{", '{', '\'', b'}')"#), "f(      ,    ,     , b   )");
        assert_eq!(mask("r#\"a\"b\"# + r\"\\\" + br\"x\""), "         +      + b    ");
    }

    #[test]
    fn lifetimes_and_raw_identifiers_stay() {
        let text = "fn f<'a>(r#in: &'a str) -> &'a str { x }";
        assert_eq!(mask(text), text);
    }

    #[test]
    fn lines_are_kept() {
        let text = "\"a\nb\" /* c\nd */ e\n";
        assert_eq!(mask(text).matches('\n').count(), 3);
    }
}
