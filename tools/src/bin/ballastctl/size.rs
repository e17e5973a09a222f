//! Sizes as people write and read them. Never ambiguous: only units of 1024 are known.

use thiserror::Error;

const UNITS: [(&str, u64); 4] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// A size that can't be read, and how to write it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// `10`
    #[error("it has no unit: write {0}GiB, or {0}B if you mean bytes")]
    NoUnit(String),
    /// `10G`, `10GB`
    #[error("{1:?} may mean a power of 1000 or of 1024: write {0}{2}")]
    AmbiguousUnit(String, String, &'static str),
    /// `10 furlongs`
    #[error("{0:?} is not a unit: use KiB, MiB, GiB or TiB")]
    UnknownUnit(String),
    /// `-1GiB`, `1.5GiB`, `GiB`
    #[error("{0:?} is not a whole number: write such as 512MiB")]
    NotANumber(String),
    /// More than 64 bits.
    #[error("it is larger than any volume")]
    TooLarge,
}

/// Bytes of a size such as `512MiB`, `1TiB`, `10Gi` or `1048576B`.
///
/// # Errors
/// [`SizeError`] for anything that can be misread.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = (text[..unit_at].trim_end(), &text[unit_at..]);
    if number.is_empty() || !number.bytes().all(|c| c.is_ascii_digit()) {
        return Err(SizeError::NotANumber(number.to_owned()));
    }
    let scale = unit_scale(number, unit)?;
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
    number.checked_mul(scale).ok_or(SizeError::TooLarge)
}

fn unit_scale(number: &str, unit: &str) -> Result<u64, SizeError> {
    if unit.is_empty() {
        return Err(SizeError::NoUnit(number.to_owned()));
    }
    if unit.eq_ignore_ascii_case("b") {
        return Ok(1);
    }
    for (name, scale) in UNITS {
        let (letter, without_b) = (&name[..1], &name[..2]);
        if unit.eq_ignore_ascii_case(name) || unit.eq_ignore_ascii_case(without_b) {
            return Ok(scale);
        }
        if unit.eq_ignore_ascii_case(letter) || unit.eq_ignore_ascii_case(&format!("{letter}B")) {
            return Err(SizeError::AmbiguousUnit(number.to_owned(), unit.to_owned(), name));
        }
    }
    Err(SizeError::UnknownUnit(unit.to_owned()))
}

/// A size for people: `16 GiB`, `1.5 TiB`; exact numbers are in the JSON.
pub fn show_size(bytes: u64) -> String {
    let Some((unit, scale)) = UNITS.into_iter().find(|(_, scale)| bytes >= *scale) else {
        return format!("{bytes} B");
    };
    if bytes.is_multiple_of(scale) {
        return format!("{} {unit}", bytes / scale);
    }
    // Rounded down: what is shown as free must be there.
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_mean_one_thing() {
        for (text, bytes) in [
            ("1KiB", 1 << 10),
            ("512MiB", 512 << 20),
            ("1GiB", 1 << 30),
            ("64TiB", 64 << 40),
            ("10Gi", 10 << 30),
            ("10gib", 10 << 30),
            (" 10 GiB ", 10 << 30),
            ("4096B", 4096),
            ("0MiB", 0),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_can_be_misread() {
        use SizeError::*;
        let text = str::to_owned;
        for (given, error) in [
            ("10", NoUnit(text("10"))),
            ("10G", AmbiguousUnit(text("10"), text("G"), "GiB")),
            ("10GB", AmbiguousUnit(text("10"), text("GB"), "GiB")),
            ("5t", AmbiguousUnit(text("5"), text("t"), "TiB")),
            ("1PiB", UnknownUnit(text("PiB"))),
            ("1GiBs", UnknownUnit(text("GiBs"))),
            ("-1GiB", NotANumber(text("-1"))),
            ("+1GiB", NotANumber(text("+1"))),
            ("1.5GiB", NotANumber(text("1.5"))),
            ("1,5GiB", NotANumber(text("1,5"))),
            ("1e3MiB", UnknownUnit(text("e3MiB"))),
            ("0x10MiB", UnknownUnit(text("x10MiB"))),
            ("GiB", NotANumber(text(""))),
            ("", NotANumber(text(""))),
            ("١GiB", NotANumber(text("١"))),
            ("16777216TiB", TooLarge),
            ("99999999999999999999B", TooLarge),
        ] {
            assert_eq!(parse_size(given), Err(error), "{given}");
        }
        assert_eq!(
            parse_size("10G").unwrap_err().to_string(),
            "\"G\" may mean a power of 1000 or of 1024: write 10GiB"
        );
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 20, "1 MiB"),
            ((1 << 30) + (1 << 29), "1.5 GiB"),
            ((1 << 40) - 1, "1023.9 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }
}
