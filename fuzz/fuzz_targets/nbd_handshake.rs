//! Arbitrary bytes from the first one on.
#![no_main]

use ballast_fuzz::nbd::{Plan, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &[u8])| {
    let (bytes, plan) = input;
    run(&[b"\0\0\0\x03", bytes].concat(), &mut Plan(plan));
    run(bytes, &mut Plan(plan));
});
