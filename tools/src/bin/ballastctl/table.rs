//! Tables and field lists as text.

/// Columns padded to their widest cell, two spaces between them; no line ends in a space.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| std::array::from_fn(|column| printable(&row[column]))).collect();
    let mut widths = header.map(width);
    for row in &rows {
        for (widest, cell) in widths.iter_mut().zip(row) {
            *widest = width(cell).max(*widest);
        }
    }
    let mut text = line(&header.map(str::to_owned), &widths);
    for row in &rows {
        text.push_str(&line(row, &widths));
    }
    text
}

/// One `name: value` per line, the values in one column.
pub fn fields(fields: &[(&str, String)]) -> String {
    let widest = fields.iter().map(|(name, _)| width(name)).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in fields {
        let padding = " ".repeat(widest - width(name));
        let row = format!("{name}:{padding} {}", printable(value));
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

fn line<const N: usize>(cells: &[String; N], widths: &[usize; N]) -> String {
    let mut text = String::new();
    for (cell, widest) in cells.iter().zip(widths) {
        text.push_str(cell);
        text.push_str(&" ".repeat(widest - width(cell) + 2));
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// What comes over the network must not steer a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a".to_owned(), "1 GiB".to_owned()], ["longer".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "SIZE"], &rows), "NAME    SIZE\na       1 GiB\nlonger\n");
        assert_eq!(table(["NAME"], &[]), "NAME\n");
    }

    #[test]
    fn control_characters_are_not_printed() {
        assert_eq!(fields(&[("name", "a\x1b[2Jb\n".to_owned())]), "name: a?[2Jb?\n");
    }
}
