//! Sizes as people write them: `4GiB`, `512 MiB`, `1048576`.

use serde::{Deserialize, Deserializer};
use thiserror::Error;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// A text that is no size.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "size {0:?} is not valid: write a whole number of bytes, or one with a unit: KiB, MiB, GiB or \
     TiB, as in 4GiB"
)]
pub struct SizeError(String);

/// Units and the powers of two that they stand for.
const UNITS: [(&str, u32); 9] = [
    ("KiB", 10),
    ("MiB", 20),
    ("GiB", 30),
    ("TiB", 40),
    ("K", 10),
    ("M", 20),
    ("G", 30),
    ("T", 40),
    ("B", 0),
];

impl std::str::FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let wrong = || SizeError(text.to_owned());
        let trimmed = text.trim();
        let found = UNITS.iter().find_map(|(unit, power)| {
            trimmed.strip_suffix(unit).map(|number| (number.trim_end(), *power))
        });
        let (number, power) = found.unwrap_or((trimmed, 0));
        // `parse` would take a sign.
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(wrong());
        }
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << power).map(Size).ok_or_else(wrong)
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fits = |power: &u32| self.0 > 0 && self.0.trailing_zeros() >= *power;
        let unit = UNITS[..4].iter().rev().find(|(_, power)| fits(power));
        match unit {
            Some((unit, power)) => write!(f, "{}{unit}", self.0 >> power),
            None => write!(f, "{}", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Number(bytes) => Ok(Size(bytes)),
            Raw::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("1GiB", 1 << 30), ("64 MiB", 64 << 20), ("2T", 2 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "+1", "1.5GiB", "12parsecs", "1e3", "99999999999TiB", "1 0"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(1 << 30).to_string(), "1GiB");
        assert_eq!(Size(1025 << 20).to_string(), "1025MiB");
        assert_eq!(Size(7).to_string(), "7");
        assert_eq!(Size(0).to_string(), "0");
    }
}
