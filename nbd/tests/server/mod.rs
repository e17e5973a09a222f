//! A test's NBD server: sessions over real sockets in front of a volume in memory.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ballast_block::buffer::BufferPool;
use ballast_block::command::{ReadPart, StatusExtent};
use ballast_block::{BLOCK_SIZE, ByteRange, IoCommand, IoError, IoReply};
use ballast_nbd::{Access, Event, ExportInfo, OpenExport, OpenExportError, Purpose, Session, Want};
use bytes::{Buf, Bytes};

/// A sparse volume: blocks that were never written are holes.
pub struct MemoryVolume {
    size: u64,
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl MemoryVolume {
    /// All of it, holes as zeroes.
    pub fn contents(&self) -> Vec<u8> {
        let mut all = vec![0; self.size as usize];
        for (number, block) in self.blocks.lock().expect("no panic").iter() {
            let start = *number as usize * BLOCK_SIZE;
            all[start..start + BLOCK_SIZE].copy_from_slice(block);
        }
        all
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut blocks = self.blocks.lock().expect("no panic");
        for (number, at, from, length) in pieces(ByteRange::new(offset, data.len() as u64)) {
            let block = blocks.entry(number).or_insert_with(|| vec![0; BLOCK_SIZE]);
            block[at..at + length].copy_from_slice(&data[from..from + length]);
        }
    }

    fn zero(&self, range: ByteRange) {
        let mut blocks = self.blocks.lock().expect("no panic");
        for (number, at, _, length) in pieces(range) {
            if length == BLOCK_SIZE {
                blocks.remove(&number);
            } else if let Some(block) = blocks.get_mut(&number) {
                block[at..at + length].fill(0);
            }
        }
    }

    fn read(&self, range: ByteRange) -> Vec<ReadPart> {
        let blocks = self.blocks.lock().expect("no panic");
        let part = |(number, at, _, length): (u64, usize, usize, usize)| match blocks.get(&number) {
            Some(block) => ReadPart::Data(Bytes::copy_from_slice(&block[at..at + length])),
            None => ReadPart::Hole(length as u64),
        };
        pieces(range).map(part).collect()
    }

    fn status(&self, range: ByteRange) -> Vec<StatusExtent> {
        let blocks = self.blocks.lock().expect("no panic");
        pieces(range)
            .map(|(number, _, _, length)| StatusExtent {
                length: length as u64,
                allocated: blocks.contains_key(&number),
            })
            .collect()
    }

    fn run(&self, command: IoCommand) -> Result<IoReply, IoError> {
        match command {
            IoCommand::Read { range } => return Ok(IoReply::Data(self.read(range))),
            IoCommand::BlockStatus { range } => return Ok(IoReply::Status(self.status(range))),
            IoCommand::Write { range, data } => self.write(range.offset, &data),
            IoCommand::Trim { range } | IoCommand::WriteZeroes { range, .. } => self.zero(range),
            IoCommand::Flush => {}
        }
        Ok(IoReply::Done)
    }
}

/// Block, place in the block, place in the range, length of each block's part of `range`.
fn pieces(range: ByteRange) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let blocks = range.covering_blocks();
    (blocks.start..blocks.end()).map(move |number| {
        let first = number * BLOCK_SIZE as u64;
        let start = first.max(range.offset);
        let end = (first + BLOCK_SIZE as u64).min(range.end());
        let from = (start - range.offset) as usize;
        (number, (start - first) as usize, from, (end - start) as usize)
    })
}

/// Serves the volume `disk` on a port of 127.0.0.1 until it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    listener: Option<JoinHandle<()>>,
}

struct Shared {
    volume: MemoryVolume,
    stop: AtomicBool,
    attached_for_writing: AtomicBool,
}

impl Server {
    pub fn start(size: u64) -> Self {
        let volume = MemoryVolume { size, blocks: Mutex::default() };
        let shared = Arc::new(Shared {
            volume,
            stop: AtomicBool::new(false),
            attached_for_writing: AtomicBool::new(false),
        });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let accepting = shared.clone();
        let listener = Some(std::thread::spawn(move || accept(&listener, &accepting)));
        Self { shared, address, listener }
    }

    pub fn volume(&self) -> &MemoryVolume {
        &self.shared.volume
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // wakes `accept`
        let woken = TcpStream::connect(self.address);
        if let Some(listener) = self.listener.take()
            && listener.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the server panicked (its socket: {woken:?})");
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut connections = Vec::new();
    loop {
        let (socket, _) = listener.accept().expect("listening");
        if shared.stop.load(Ordering::SeqCst) {
            break;
        }
        let shared = shared.clone();
        connections.push(std::thread::spawn(move || Connection::new(socket, &shared).serve()));
    }
    for connection in connections {
        connection.join().expect("a connection panicked");
    }
}

struct Connection<'a> {
    socket: TcpStream,
    shared: &'a Shared,
    pool: BufferPool,
    attached: bool,
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if self.attached {
            self.shared.attached_for_writing.store(false, Ordering::SeqCst);
        }
    }
}

impl<'a> Connection<'a> {
    fn new(socket: TcpStream, shared: &'a Shared) -> Self {
        socket.set_nodelay(true).expect("a TCP socket");
        Self { socket, shared, pool: BufferPool::default(), attached: false }
    }

    fn serve(mut self) {
        let mut session = Session::new();
        loop {
            if let Err(error) = self.take_events(&mut session) {
                eprintln!("session failed: {error}");
                return;
            }
            if self.send(&mut session).is_err() {
                return;
            }
            match session.want() {
                Want::Close => return,
                Want::Nothing => {}
                Want::Read { first, then } => {
                    let mut into = [IoSliceMut::new(first), IoSliceMut::new(then)];
                    match self.socket.read_vectored(&mut into) {
                        Ok(0) | Err(_) => return,
                        Ok(count) => session.received(count),
                    }
                }
            }
        }
    }

    /// Commands run in the order of arrival (fio has a trim and a write of one block in flight at
    /// once), and are completed last first, so that clients see replies out of order.
    fn take_events(&mut self, session: &mut Session) -> Result<(), ballast_nbd::SessionError> {
        let mut commands = Vec::new();
        while let Some(event) = session.next_event()? {
            match event {
                Event::ListExports => session.exports_listed(Ok(vec!["disk".into()])),
                Event::OpenExport(open) => session.export_opened(self.open(&open)),
                Event::PayloadBuffer { length } => session.payload_buffer(self.pool.get(length)),
                Event::Command { id, command } => commands.push((id, command)),
            }
        }
        let run = |(id, command)| (id, self.shared.volume.run(command));
        let results: Vec<_> = commands.into_iter().map(run).collect();
        for (id, result) in results.into_iter().rev() {
            session.complete(id, result);
        }
        Ok(())
    }

    fn open(&mut self, open: &OpenExport) -> Result<ExportInfo, OpenExportError> {
        if !matches!(open.name.volume.as_deref(), None | Some("disk")) {
            return Err(OpenExportError::Unknown);
        }
        let writes = open.name.access == Access::ReadWrite;
        if writes && open.purpose == Purpose::Attach {
            if self.shared.attached_for_writing.swap(true, Ordering::SeqCst) {
                let holder = "another connection".into();
                return Err(OpenExportError::AlreadyAttached { holder });
            }
            self.attached = true;
        }
        Ok(ExportInfo {
            name: "disk".into(),
            description: "a volume in memory".into(),
            size: self.shared.volume.size,
            read_only: !writes,
            multi_connection: !writes,
        })
    }

    fn send(&mut self, session: &mut Session) -> std::io::Result<()> {
        let replies = session.replies();
        while replies.has_remaining() {
            let mut slices = [IoSlice::new(&[]); 64];
            let count = replies.chunks_vectored(&mut slices);
            let sent = self.socket.write_vectored(&slices[..count])?;
            replies.advance(sent);
        }
        Ok(())
    }
}
