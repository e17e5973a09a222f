//! Reads what the journal has to say something about: after a broken connection the writes that
//! got no answer, in the end everything.
//!
//! One request at a time; never writes.

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::client::{Client, ClientError, Command, Receiver};
use crate::load::Load;
use crate::pattern::{self, BLOCK, Content};

/// Blocks in one read of the final pass: 1 MiB.
const RUN: usize = 256;

/// Looks at every write that got no answer on an earlier connection.
///
/// # Errors
/// When this connection breaks too; what was not looked at stays to be done.
pub fn settle(load: &Load, client: &mut Client) -> Result<(), ClientError> {
    let unsettled = load.state().journal.unsettled();
    let mut reader = Reader::new(load, client)?;
    for write in unsettled {
        let found = reader.read(write.blocks.clone())?;
        load.state().journal.settle(&write, &found);
    }
    Ok(())
}

/// Reads the whole region and compares it with the journal.
///
/// # Errors
/// When the connection breaks.
pub fn everything(load: &Load, client: &mut Client) -> Result<(), ClientError> {
    settle(load, client)?;
    let total = load.state().journal.len();
    let mut reader = Reader::new(load, client)?;
    for first in (0..total).step_by(RUN) {
        let blocks = first..(first + RUN).min(total);
        let found = reader.read(blocks.clone())?;
        let mut state = load.state();
        for (block, content) in blocks.zip(found) {
            if state.journal.is_known(block) {
                state.journal.observed(block, content);
            }
        }
    }
    Ok(())
}

struct Reader<'a> {
    load: &'a Load,
    client: &'a mut Client,
    receiver: Receiver,
    buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(load: &'a Load, client: &'a mut Client) -> Result<Reader<'a>, ClientError> {
        let receiver = client
            .receiver()
            .map_err(|problem| ClientError::Connection { uri: client.uri.to_string(), problem })?;
        Ok(Reader { load, client, receiver, buffer: Vec::new() })
    }

    fn read(&mut self, blocks: Range<usize>) -> Result<Vec<Content>, ClientError> {
        let result = self.try_read(blocks);
        result.map_err(|problem| ClientError::Connection {
            uri: self.client.uri.to_string(),
            problem,
        })
    }

    fn try_read(&mut self, blocks: Range<usize>) -> io::Result<Vec<Content>> {
        let cookie = u64::MAX - blocks.start as u64;
        let length = blocks.len() * BLOCK;
        self.client.send(
            Command::Read,
            cookie,
            (blocks.start * BLOCK) as u64,
            length as u32,
            &[],
        )?;
        let start = Instant::now();
        let patience = self.load.settings.patience;
        let gives_up = move || start.elapsed() > patience;
        let (answered, error) = self.receiver.reply(&gives_up)?;
        if answered != cookie || error != 0 {
            return Err(io::Error::other(format!("read of blocks {blocks:?}: error {error}")));
        }
        self.buffer.resize(length, 0);
        self.receiver.fill(&mut self.buffer, &gives_up)?;
        let seed = self.load.settings.seed;
        let each = blocks.zip(self.buffer.chunks_exact(BLOCK));
        Ok(each.map(|(block, data)| pattern::recognise(data, seed, block as u64)).collect())
    }
}
