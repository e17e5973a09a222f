//! The toy's NBD server: the production session, pumped over a simulated connection.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use ballast_block::command::ReadPart;
use ballast_block::geometry::{BLOCK_SIZE, BLOCK_SIZE_U64};
use ballast_block::{AlignedBuf, ByteRange, IoCommand, IoError, IoReply};
use ballast_env::network::Listener;
use ballast_env::spawn::Spawn;
use ballast_nbd::{CommandId, Event, ExportInfo, Session, Want};
use bytes::{Buf, Bytes};
use openraft::ReadPolicy;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use crate::env::network::SimListener;
use crate::env::{SimEnv, SimStream};
use crate::toy::machine::Stored;
use crate::toy::{Planted, ToyCommand, ToyRaft, VOLUME, VOLUME_BLOCKS, WRITE_BLOCKS_MAX};

/// Serves hosts.
pub(crate) async fn serve(
    env: SimEnv,
    listener: SimListener,
    raft: ToyRaft,
    stored: Rc<RefCell<Stored>>,
    planted: Planted,
) {
    let volume = Volume { raft, stored, planted };
    while let Ok((stream, _)) = listener.accept().await {
        let (env, volume) = (env.clone(), volume.clone());
        env.clone().spawn(async move {
            let _closed = connection(env, stream, volume).await;
        });
    }
}

#[derive(Clone)]
struct Volume {
    raft: ToyRaft,
    stored: Rc<RefCell<Stored>>,
    planted: Planted,
}

type Completion = (CommandId, Result<IoReply, IoError>);

async fn connection(env: SimEnv, stream: SimStream, volume: Volume) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut session = Session::new();
    let (sender, mut completions) = mpsc::unbounded_channel::<Completion>();
    loop {
        while let Some(event) = session.next_event().map_err(io::Error::other)? {
            match event {
                Event::ListExports => session.exports_listed(Ok(vec![VOLUME.to_owned()])),
                Event::OpenExport(_) => session.export_opened(Ok(export())),
                Event::PayloadBuffer { length } => {
                    session.payload_buffer(AlignedBuf::zeroed(length));
                }
                Event::Command { id, command } => {
                    let (sender, volume) = (sender.clone(), volume.clone());
                    env.spawn(async move {
                        let _ = sender.send((id, volume.run(command).await));
                    });
                }
            }
        }
        send_replies(&mut session, &mut writer).await?;
        if !step(&mut session, &mut reader, &mut completions).await? {
            return Ok(());
        }
    }
}

async fn send_replies(session: &mut Session, writer: &mut WriteHalf<SimStream>) -> io::Result<()> {
    while session.replies().has_remaining() {
        let sent = writer.write(session.replies().chunk()).await?;
        session.replies().advance(sent);
    }
    Ok(())
}

/// Waits for bytes or a completion; false when the connection is to be closed.
async fn step(
    session: &mut Session,
    reader: &mut ReadHalf<SimStream>,
    completions: &mut mpsc::UnboundedReceiver<Completion>,
) -> io::Result<bool> {
    let completed = match session.want() {
        Want::Close => return Ok(false),
        Want::Nothing => completions.recv().await,
        Want::Read { first, .. } => tokio::select! {
            biased;
            completed = completions.recv() => completed,
            read = reader.read(first) => {
                let read = read?;
                session.received(read);
                return Ok(read > 0);
            }
        },
    };
    let (id, result) = completed.expect("the connection holds a sender itself");
    session.complete(id, result);
    Ok(true)
}

fn export() -> ExportInfo {
    ExportInfo {
        name: VOLUME.to_owned(),
        description: String::new(),
        size: VOLUME_BLOCKS * BLOCK_SIZE_U64,
        read_only: false,
        multi_connection: true,
    }
}

impl Volume {
    async fn run(&self, command: IoCommand) -> Result<IoReply, IoError> {
        match command {
            IoCommand::Read { range } => self.read(range).await,
            IoCommand::Write { range, data } => self.propose(range, data.freeze()).await,
            IoCommand::Trim { range } | IoCommand::WriteZeroes { range, .. } => {
                self.propose(range, Bytes::new()).await
            }
            IoCommand::Flush => Ok(IoReply::Done),
            IoCommand::BlockStatus { .. } => Err(IoError::ShuttingDown),
        }
    }

    async fn propose(&self, range: ByteRange, data: Bytes) -> Result<IoReply, IoError> {
        assert!(range.is_block_aligned() && data.len() <= WRITE_BLOCKS_MAX * BLOCK_SIZE);
        let command = ToyCommand { range: range.covering_blocks(), data };
        match self.raft.client_write(command).await {
            Ok(_) => Ok(IoReply::Done),
            Err(_) => Err(IoError::TimedOut),
        }
    }

    async fn read(&self, range: ByteRange) -> Result<IoReply, IoError> {
        if self.planted.unchecked_reads {
            self.raft.as_leader().map_err(|_| IoError::TimedOut)?;
        } else {
            let gate = self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await;
            gate.map_err(|_| IoError::TimedOut)?;
        }
        let bytes = self.stored.borrow().read(range.covering_blocks());
        Ok(IoReply::Data(vec![ReadPart::Data(bytes.into())]))
    }
}
