//! Received bytes that were not looked at yet.
//!
//! Owns a small fixed buffer. Never grows: whoever decodes from it has checked the size before.

use ballast_block::limits::NBD_OPTION_BYTES_MAX;

use crate::wire::OPTION_HEADER_BYTES;

/// Room for many small requests.
pub(crate) const INPUT_BYTES: usize = 64 << 10;

/// One option's header and data: more is not read ahead of the answers during the handshake.
pub(crate) const HANDSHAKE_INPUT_BYTES: usize = OPTION_HEADER_BYTES + NBD_OPTION_BYTES_MAX;

const _: () = assert!(INPUT_BYTES >= HANDSHAKE_INPUT_BYTES);

pub(crate) struct Input {
    memory: Box<[u8]>,
    /// `memory[start..end]` is received and not taken.
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self { memory: vec![0; INPUT_BYTES].into(), start: 0, end: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Takes `N` bytes; `None` when there are fewer.
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.memory[self.start..self.end].first_chunk()?;
        self.start += N;
        Some(bytes)
    }

    /// Takes `length` bytes; `None` when there are fewer.
    pub(crate) fn take_slice(&mut self, length: usize) -> Option<&[u8]> {
        let bytes = self.memory[self.start..self.end].get(..length)?;
        self.start += length;
        Some(bytes)
    }

    /// Takes what fits into `target`, returns how much that was.
    pub(crate) fn take_into(&mut self, target: &mut [u8]) -> usize {
        let length = target.len().min(self.len());
        let bytes = self.take_slice(length).expect("at most what is there");
        target[..length].copy_from_slice(bytes);
        length
    }

    /// Throws up to `length` bytes away, returns how many.
    pub(crate) fn skip(&mut self, length: usize) -> usize {
        let length = length.min(self.len());
        self.start += length;
        length
    }

    /// Where to receive into, so that at most `limit` bytes wait.
    pub(crate) fn space(&mut self, limit: usize) -> &mut [u8] {
        let room = limit.min(INPUT_BYTES).saturating_sub(self.len());
        if self.start > 0 && self.end + room > INPUT_BYTES {
            self.memory.copy_within(self.start..self.end, 0);
        } else if self.start < self.end {
            return &mut self.memory[self.end..self.end + room];
        }
        self.end -= self.start;
        self.start = 0;
        &mut self.memory[self.end..self.end + room]
    }

    /// `count` bytes were received into [`Input::space`].
    pub(crate) fn received(&mut self, count: usize) {
        assert!(self.end + count <= INPUT_BYTES, "more was received than there is space");
        self.end += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_found_at_the_front_again() {
        let mut input = Input::new();
        assert_eq!(input.space(usize::MAX).len(), INPUT_BYTES);
        input.space(usize::MAX).fill(7);
        input.received(INPUT_BYTES);
        assert_eq!(input.skip(INPUT_BYTES - 3), INPUT_BYTES - 3);
        assert_eq!(input.space(28).len(), 25);
        assert_eq!(input.take::<3>(), Some([7; 3]));
        assert_eq!(input.take::<1>(), None);
        assert_eq!(input.space(usize::MAX).len(), INPUT_BYTES);
    }

    #[test]
    fn waiting_bytes_stay_where_they_are_while_there_is_room() {
        let mut input = Input::new();
        input.space(4).copy_from_slice(b"abcd");
        input.received(4);
        assert_eq!(input.take(), Some(*b"a"));
        input.space(5).copy_from_slice(b"ef");
        input.received(2);
        assert_eq!(input.take_slice(5), Some(&b"bcdef"[..]));
    }
}
