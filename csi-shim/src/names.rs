//! From a CSI name (any text of up to 128 bytes) to a Ballast name (a DNS label of up to 63).
//!
//! Deterministic, so that a repeated CreateVolume finds its volume. A name that can be kept is
//! kept; any other becomes what can be read of it, and a hash of the whole. Names that look like
//! the outcome of a mapping are mapped too, so that no kept name meets a mapped one.

use ballast_block::limits::NAME_BYTES_MAX;
use uuid::Uuid;

/// Before the hash.
const MARK: &str = "-x";
/// Hexadecimal digits of 128 bits.
const HASH_DIGITS: usize = 32;

/// The Ballast name for a CSI name.
pub fn volume_name(csi: &str) -> String {
    if is_label(csi) && !is_mapped(csi) && Uuid::try_parse(csi).is_err() {
        return csi.to_owned();
    }
    let readable: String = csi
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .take(NAME_BYTES_MAX - MARK.len() - HASH_DIGITS)
        .collect();
    let readable = readable.trim_matches('-');
    let readable = if readable.is_empty() { "volume" } else { readable };
    format!("{readable}{MARK}{:032x}", fnv(csi.as_bytes()))
}

/// Whether a text is a volume's id: that is a UUID in its usual form, and nothing else.
pub fn is_volume_id(text: &str) -> bool {
    Uuid::try_parse(text).is_ok_and(|id| id.hyphenated().to_string() == text)
}

/// Whether a text is a DNS label.
pub fn is_label(name: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let edge = |c: Option<&u8>| c.is_some_and(|c| inner(*c) && *c != b'-');
    let bytes = name.as_bytes();
    bytes.len() <= NAME_BYTES_MAX
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|c| inner(*c))
}

fn is_mapped(name: &str) -> bool {
    let hash = name.rfind(MARK).map(|at| &name[at + MARK.len()..]);
    hash.is_some_and(|hash| {
        hash.len() == HASH_DIGITS && hash.bytes().all(|c| c.is_ascii_hexdigit())
    })
}

/// FNV-1a with 128 bits: enough against chance. Names come from the orchestrator's provisioner, who
/// has no reason to look for collisions.
fn fnv(bytes: &[u8]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_can_be_kept_is_kept() {
        for name in ["pvc-7e0ec0a1-47d5-4f0e-9a4b-7b4b1d1f8a55", "a", "0", "db-0"] {
            assert_eq!(volume_name(name), name);
        }
    }

    #[test]
    fn other_names_become_different_labels_and_always_the_same_ones() {
        let long = "n".repeat(128);
        let other = format!("{}m", "n".repeat(127));
        let names = [
            "A",
            "a_",
            "a.",
            "-a",
            "a-",
            "Größe",
            "",
            "...",
            "PVC_1",
            "pvc_1",
            "pvc.1",
            &long,
            &other,
            "7e0ec0a1-47d5-4f0e-9a4b-7b4b1d1f8a55",
            "7e0ec0a147d54f0e9a4b7b4b1d1f8a55",
        ];
        let mapped: BTreeSet<String> = names.iter().map(|name| volume_name(name)).collect();
        assert_eq!(mapped.len(), names.len(), "{mapped:?}");
        for name in &mapped {
            assert!(is_label(name) && Uuid::try_parse(name).is_err(), "{name}");
            assert_ne!(&volume_name(name), name, "a name that looks mapped is mapped again");
        }
        assert_eq!(volume_name("PVC_1"), volume_name("PVC_1"));
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // The published value of an empty input and of "a".
        assert_eq!(fnv(b""), 0x6c62272e07bb014262b821756295c58d);
        assert_eq!(fnv(b"a"), 0xd228cb696f1a8caf78912b704e4a8964);
    }

    #[test]
    fn only_the_usual_form_of_a_uuid_is_an_id() {
        assert!(is_volume_id("7e0ec0a1-47d5-4f0e-9a4b-7b4b1d1f8a55"));
        for text in ["", "demo", "7E0EC0A1-47d5-4f0e-9a4b-7b4b1d1f8a55", "fake-vol-id"] {
            assert!(!is_volume_id(text), "{text}");
        }
        assert!(!is_volume_id("7e0ec0a147d54f0e9a4b7b4b1d1f8a55"));
    }
}
