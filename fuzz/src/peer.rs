//! Peer frames: whatever bytes arrive on a connection between nodes.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use ballast_block::buffer::BufferPool;
use ballast_block::checksum::crc32;
use ballast_node::peers::raft_codec as codec;
use ballast_node::peers::wire::{Frame, FrameReader, HEADER_BYTES};

/// Puts right checksums into the first frame of `bytes`, so that what lies behind them is reached.
pub fn seal(bytes: &mut [u8]) {
    if bytes.len() < HEADER_BYTES {
        return;
    }
    bytes[..3].copy_from_slice(&[0x42, 0x4c, 1]);
    let mut length = [0; 4];
    length.copy_from_slice(&bytes[4..8]);
    let body_end = HEADER_BYTES.saturating_add(u32::from_le_bytes(length) as usize);
    if let Some(body) = bytes.get(HEADER_BYTES..body_end) {
        let crc = crc32(body);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

/// Reads frames from memory until they end or are damaged.
pub fn read_all(bytes: &[u8]) {
    let mut reader = FrameReader::new(bytes, BufferPool::default());
    while let Some(frame) = next(&mut reader) {
        decode_as_everything(&frame);
    }
}

fn next(reader: &mut FrameReader<&[u8]>) -> Option<Frame> {
    // Memory never makes a reader wait.
    match pin!(reader.next()).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(frame) => frame.ok(),
        Poll::Pending => unreachable!("memory is always ready"),
    }
}

fn decode_as_everything(frame: &Frame) {
    if let Ok(request) = codec::decode_append(&frame.body, &frame.payload) {
        let (body, payload) = codec::encode_append(&request);
        let payload = bytes::Bytes::from(payload.concat());
        let again = codec::decode_append(&body, &[payload]).expect("we encoded it");
        assert_eq!(again.entries, request.entries);
    }
    let _ = codec::decode_append_reply(&frame.body);
    let _ = codec::decode_vote(&frame.body);
    let _ = codec::decode_vote_reply(&frame.body);
    let _ = codec::decode_transfer(&frame.body);
    let _ = codec::decode_offer(&frame.body);
}
