//! What a node reads from a connection that claims to be a peer.
#![no_main]

use ballast_fuzz::peer::{read_all, seal};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    read_all(bytes);
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    read_all(&sealed);
});
