//! Randomness.

/// Source of random numbers of the node.
pub trait Entropy {
    /// A uniformly random number.
    fn random_u64(&self) -> u64;

    /// 16 random bytes, for ids.
    fn random_16(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.random_u64().to_le_bytes());
        bytes[8..].copy_from_slice(&self.random_u64().to_le_bytes());
        bytes
    }
}
