//! The connection to a server that is there, found again whenever it is lost.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::nbd::{self, ConnectError, Export, Meaning, REPLY_BYTES};
use crate::context::Address;

/// Between two rounds over all servers.
const PAUSE: Duration = Duration::from_millis(300);

/// How long the first connection may take: the caller waits for it.
const FIRST_TIME: Duration = Duration::from_secs(20);

/// What happened.
pub enum Event {
    /// The export is open; what had no answer must be sent again.
    Opened {
        /// Bytes of the volume, as of now.
        size: u64,
    },
    /// An answer.
    Reply {
        /// Of this request.
        cookie: u64,
        /// NBD's number; 0 = done.
        error: u32,
        /// What was read.
        data: Vec<u8>,
    },
    /// No server will ever open the export again: its lease is over.
    Refused,
}

enum FromTask {
    Opened(Export),
    Reply { cookie: u64, error: u32, data: Vec<u8> },
    Lost(String),
    Refused(String),
}

/// The connection.
pub struct Upstream {
    export: String,
    addresses: VecDeque<Address>,
    /// Tasks of the present connection, or of the search for the next; ended when dropped.
    tasks: JoinSet<()>,
    events: mpsc::UnboundedReceiver<FromTask>,
    requests: Option<mpsc::UnboundedSender<Bytes>>,
    lost_at: Option<Instant>,
    refused: bool,
}

impl Upstream {
    /// Connects nowhere yet.
    pub fn new(export: &str, addresses: &[Address]) -> Upstream {
        Upstream {
            export: export.to_owned(),
            addresses: addresses.iter().cloned().collect(),
            tasks: JoinSet::new(),
            events: mpsc::unbounded_channel().1,
            requests: None,
            lost_at: None,
            refused: false,
        }
    }

    /// Connects for the first time and returns the size.
    ///
    /// # Errors
    /// What the last server said when none opens the export in time, or one refuses for good.
    pub async fn first(&mut self) -> Result<u64, ConnectError> {
        let start = Instant::now();
        loop {
            for address in self.addresses.clone() {
                match nbd::connect(&address, &self.export).await {
                    Ok(export) => {
                        let size = export.size;
                        self.open(export);
                        return Ok(size);
                    }
                    Err(error @ ConnectError::Refused { meaning: Meaning::LeaseOver, .. }) => {
                        return Err(error);
                    }
                    Err(error) if start.elapsed() > FIRST_TIME => return Err(error),
                    Err(error) => tracing::warn!(%error, "trying the next server"),
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Since when there is no connection.
    pub fn lost_at(&self) -> Option<Instant> {
        self.lost_at
    }

    /// Whether there will never be one again.
    pub fn refused_for_good(&self) -> bool {
        self.refused
    }

    /// Sends a request, if there is a connection: else it is sent again when there is one.
    pub fn send(&self, request: Bytes) {
        if let Some(requests) = &self.requests {
            // A writer that is gone is noticed by the reader.
            let _ = requests.send(request);
        }
    }

    /// Opens the export anew.
    pub fn reopen(&mut self) {
        if self.requests.is_some() {
            tracing::info!("opening the export anew");
            self.search();
        }
    }

    /// What happens next. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Event {
        loop {
            let Some(event) = self.events.recv().await else {
                return std::future::pending().await;
            };
            match event {
                FromTask::Reply { cookie, error, data } => {
                    return Event::Reply { cookie, error, data };
                }
                // Also what a server does that stops, or whose attachment has been replaced or has lost
                // its lease: which of them the next handshake says.
                FromTask::Lost(reason) => {
                    tracing::warn!(reason, "connection lost: looking for a server");
                    self.search();
                }
                FromTask::Opened(export) => {
                    let size = export.size;
                    tracing::info!(server = %export.address, size, "connected");
                    self.open(export);
                    return Event::Opened { size };
                }
                FromTask::Refused(reason) => {
                    tracing::error!(reason, "the lease is over: every request fails from now on");
                    self.refused = true;
                    return Event::Refused;
                }
            }
        }
    }

    fn open(&mut self, export: Export) {
        // The server that answered comes first next time.
        while self.addresses.front().is_some_and(|first| *first != export.address) {
            self.addresses.rotate_left(1);
        }
        self.tasks = JoinSet::new();
        let (sender, events) = mpsc::unbounded_channel();
        let (requests, to_send) = mpsc::unbounded_channel();
        let (reader, writer) = export.stream.into_split();
        self.tasks.spawn(write_all(writer, to_send));
        self.tasks.spawn(read_all(reader, sender));
        (self.events, self.requests, self.lost_at) = (events, Some(requests), None);
    }

    fn search(&mut self) {
        self.requests = None;
        self.lost_at = Some(Instant::now());
        self.tasks = JoinSet::new();
        let (sender, events) = mpsc::unbounded_channel();
        self.events = events;
        self.tasks.spawn(find(self.export.clone(), self.addresses.clone(), sender));
    }
}

async fn find(
    export: String,
    addresses: VecDeque<Address>,
    events: mpsc::UnboundedSender<FromTask>,
) {
    loop {
        for address in &addresses {
            let event = match nbd::connect(address, &export).await {
                Ok(export) => FromTask::Opened(export),
                Err(error @ ConnectError::Refused { meaning: Meaning::LeaseOver, .. }) => {
                    FromTask::Refused(error.to_string())
                }
                Err(error) => {
                    tracing::debug!(%error, "not this server");
                    continue;
                }
            };
            // Without a receiver nobody looks any more.
            let _ = events.send(event);
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn write_all(mut writer: OwnedWriteHalf, mut requests: mpsc::UnboundedReceiver<Bytes>) {
    while let Some(request) = requests.recv().await {
        if writer.write_all(&request).await.is_err() {
            return;
        }
    }
}

async fn read_all(mut reader: OwnedReadHalf, events: mpsc::UnboundedSender<FromTask>) {
    loop {
        let event = match read_reply(&mut reader).await {
            Ok(reply) => reply,
            Err(error) => FromTask::Lost(error.to_string()),
        };
        let last = matches!(event, FromTask::Lost(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

async fn read_reply(reader: &mut OwnedReadHalf) -> std::io::Result<FromTask> {
    let mut header = [0; REPLY_BYTES];
    reader.read_exact(&mut header).await?;
    let Some((error, cookie)) = nbd::parse_reply(&header) else {
        return Err(std::io::Error::other("the server's reply can't be read"));
    };
    let length = if error == 0 { cookie as u32 } else { 0 };
    let mut data = vec![0; length as usize];
    reader.read_exact(&mut data).await?;
    Ok(FromTask::Reply { cookie, error, data })
}
