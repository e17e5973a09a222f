//! Random numbers of the kernel.

use super::LinuxEnv;
use crate::entropy::Entropy;

impl Entropy for LinuxEnv {
    fn random_u64(&self) -> u64 {
        let mut bytes = [0_u8; 8];
        loop {
            // SAFETY: `bytes` is valid for the write of its length.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            // Up to 256 bytes come whole, or not at all when a signal interrupts the wait for the
            // kernel's pool early in the boot.
            if got == bytes.len() as isize {
                return u64::from_le_bytes(bytes);
            }
            let error = std::io::Error::last_os_error();
            assert_eq!(error.kind(), std::io::ErrorKind::Interrupted, "getrandom: {error}");
        }
    }
}
