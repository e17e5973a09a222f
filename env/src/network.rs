//! Connections.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite};

/// Where to listen or connect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Opens and accepts byte streams.
pub trait Network {
    /// A connection: reliable, ordered bytes. TCP has Nagle's algorithm off, and fails with an error
    /// once the other side's machine was silent for [`TCP_SILENCE_SECONDS_MAX`], also while nothing
    /// is sent. Dropping it closes both directions.
    ///
    /// [`TCP_SILENCE_SECONDS_MAX`]: ballast_block::limits::TCP_SILENCE_SECONDS_MAX
    type Stream: AsyncRead + AsyncWrite + Unpin + 'static;
    /// A connection that belongs to no thread, between [`Network::detach`] and [`Network::adopt`].
    /// Where an environment is of one thread, it can be sent to another. Dropping it closes both
    /// directions.
    type Detached: 'static;
    /// A listening socket.
    type Listener: Listener<Stream = Self::Stream>;

    /// Starts to listen. TCP port 0 picks a free one. A stale Unix socket is replaced.
    fn listen(
        &self,
        address: &Address,
    ) -> impl Future<Output = io::Result<Self::Listener>> + 'static;

    /// Connects. No timeout of its own.
    fn connect(
        &self,
        address: &Address,
    ) -> impl Future<Output = io::Result<Self::Stream>> + 'static;

    /// Takes a connection off the calling thread, whose environment this is. The other side sees
    /// nothing of it; bytes under way in both directions, and an end of them, stay under way.
    ///
    /// # Errors
    /// When the system refuses; the connection is closed then.
    fn detach(&self, stream: Self::Stream) -> io::Result<Self::Detached>;

    /// Goes on with a detached connection on the calling thread, whose environment this is.
    ///
    /// # Errors
    /// When the system refuses; the connection is closed then.
    fn adopt(&self, detached: Self::Detached) -> io::Result<Self::Stream>;
}

/// A listening socket.
pub trait Listener: 'static {
    /// The connections it accepts.
    type Stream;

    /// The next connection and a text that names the other side.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, String)>>;

    /// Where it listens: the port picked, where 0 was asked for.
    fn address(&self) -> Address;
}
