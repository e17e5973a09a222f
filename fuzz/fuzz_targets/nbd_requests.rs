//! Requests of a client that has chosen an export: well-formed ones, then arbitrary bytes.
#![no_main]

use arbitrary::Arbitrary;
use ballast_fuzz::nbd::{Plan, SIZE, attached_prefix, run};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    requests: Vec<Request>,
    tail: Vec<u8>,
    plan: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
struct Request {
    flags: u8,
    command: u8,
    cookie: u8,
    offset: u32,
    beyond: bool,
    length: Length,
}

#[derive(Arbitrary, Debug)]
enum Length {
    Small(u8),
    Medium(u16),
    Any(u32),
}

impl Request {
    fn encode(&self, out: &mut Vec<u8>) {
        let length = match self.length {
            Length::Small(length) => u32::from(length),
            Length::Medium(length) => u32::from(length),
            Length::Any(length) => length,
        };
        let command = u16::from(self.command % 10);
        let offset = u64::from(self.offset) % SIZE + if self.beyond { SIZE } else { 0 };
        out.extend([0x25, 0x60, 0x95, 0x13, 0, self.flags]);
        out.extend(command.to_be_bytes());
        out.extend(u64::from(self.cookie).to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        if command == 1 && length <= 1 << 13 {
            out.extend((0..length).map(|index| index as u8));
        }
    }
}

fuzz_target!(|input: Input| {
    let mut bytes = attached_prefix();
    input.requests.iter().for_each(|request| request.encode(&mut bytes));
    bytes.extend(&input.tail);
    run(&bytes, &mut Plan(&input.plan));
});
