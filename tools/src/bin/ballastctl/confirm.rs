//! Asks before data is destroyed or taken away.

use std::io::{self, BufRead, IsTerminal, Write};

/// What came of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The name was typed.
    Yes,
    /// Something else was.
    No,
    /// There is nobody to ask: the input is not a terminal.
    Nobody,
}

/// Asks whether to delete a volume, by having its name typed.
///
/// # Errors
/// When the terminal can't be read or written.
pub fn confirm_delete(volume: &str) -> io::Result<Answer> {
    if !io::stdin().is_terminal() {
        return Ok(Answer::Nobody);
    }
    ask(volume, &mut io::stdin().lock(), &mut io::stderr())
}

/// Asks whether to give a node's pool up, by having the node's name typed as it was given.
///
/// # Errors
/// When the terminal can't be read or written.
pub fn confirm_replace(node: &str) -> io::Result<Answer> {
    if !io::stdin().is_terminal() {
        return Ok(Answer::Nobody);
    }
    let mut output = io::stderr();
    write!(output, "The pool of {node} will never serve again. Type {node} to give it up: ")?;
    typed(node, &mut io::stdin().lock(), &mut output)
}

/// Asks whether to take a volume from the hosts that have it, by having its name typed.
///
/// # Errors
/// When the terminal can't be read or written.
pub fn confirm_force(volume: &str, host: &str) -> io::Result<Answer> {
    if !io::stdin().is_terminal() {
        return Ok(Answer::Nobody);
    }
    let mut output = io::stderr();
    write!(
        output,
        "Hosts that use volume {volume:?} now lose it at once, with what they had not written yet. \
         Type its name to give it to {host}: "
    )?;
    typed(volume, &mut io::stdin().lock(), &mut output)
}

fn ask(volume: &str, input: &mut dyn BufRead, output: &mut dyn Write) -> io::Result<Answer> {
    write!(output, "All data of volume {volume:?} will be lost. Type its name to delete it: ")?;
    typed(volume, input, output)
}

fn typed(volume: &str, input: &mut dyn BufRead, output: &mut dyn Write) -> io::Result<Answer> {
    output.flush()?;
    let mut line = String::new();
    input.read_line(&mut line)?;
    Ok(if line.trim() == volume { Answer::Yes } else { Answer::No })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_is_a_yes() {
        for (typed, answer) in
            [("db\n", Answer::Yes), ("y\n", Answer::No), ("\n", Answer::No), ("", Answer::No)]
        {
            let mut shown = Vec::new();
            assert_eq!(ask("db", &mut typed.as_bytes(), &mut shown).unwrap(), answer, "{typed:?}");
            assert!(String::from_utf8(shown).unwrap().contains("\"db\""));
        }
    }
}
