//! TCP and Unix sockets. Write path: steps 1 and 8 (bytes in, response out).

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use ballast_block::limits::TCP_SILENCE_SECONDS_MAX;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::LinuxEnv;
use crate::network::{Address, Listener, Network};

impl Network for LinuxEnv {
    type Stream = LinuxStream;
    type Detached = LinuxDetached;
    type Listener = LinuxListener;

    fn listen(
        &self,
        address: &Address,
    ) -> impl Future<Output = io::Result<LinuxListener>> + 'static {
        let address = address.clone();
        async move {
            match &address {
                Address::Tcp(socket) => Ok(LinuxListener::Tcp(TcpListener::bind(socket).await?)),
                Address::Unix(path) => {
                    Ok(LinuxListener::Unix(listen_unix(path).await?, path.clone()))
                }
            }
        }
    }

    fn connect(
        &self,
        address: &Address,
    ) -> impl Future<Output = io::Result<LinuxStream>> + 'static {
        let address = address.clone();
        async move {
            match &address {
                Address::Tcp(socket) => LinuxStream::tcp(TcpStream::connect(socket).await?),
                Address::Unix(path) => Ok(LinuxStream::Unix(UnixStream::connect(path).await?)),
            }
        }
    }

    fn detach(&self, stream: LinuxStream) -> io::Result<LinuxDetached> {
        Ok(match stream {
            LinuxStream::Tcp(stream) => LinuxDetached::Tcp(stream.into_std()?),
            LinuxStream::Unix(stream) => LinuxDetached::Unix(stream.into_std()?),
        })
    }

    fn adopt(&self, detached: LinuxDetached) -> io::Result<LinuxStream> {
        Ok(match detached {
            LinuxDetached::Tcp(socket) => LinuxStream::Tcp(TcpStream::from_std(socket)?),
            LinuxDetached::Unix(socket) => LinuxStream::Unix(UnixStream::from_std(socket)?),
        })
    }
}

/// Listens at `path`; a socket there that nobody listens on any more is replaced.
async fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let first = UnixListener::bind(path);
    let Err(error) = first else { return first };
    let is_socket =
        || std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if error.kind() != io::ErrorKind::AddrInUse || !is_socket() {
        return Err(error);
    }
    match UnixStream::connect(path).await {
        Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        _ => Err(error),
    }
}

/// A connection.
#[derive(Debug)]
pub enum LinuxStream {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
}

impl LinuxStream {
    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        fail_when_silent(&stream)?;
        Ok(Self::Tcp(stream))
    }
}

/// A connection outside of any runtime: the socket with its options, still non-blocking.
#[derive(Debug)]
pub enum LinuxDetached {
    /// TCP.
    Tcp(std::net::TcpStream),
    /// A Unix socket.
    Unix(std::os::unix::net::UnixStream),
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<LinuxDetached>();
};

/// Makes the kernel probe an idle connection, and give up one that acknowledges nothing. Its own
/// defaults are two hours for an idle one and a quarter of an hour for one that is not.
fn fail_when_silent(stream: &TcpStream) -> io::Result<()> {
    const PROBE_SECONDS: u32 = 5;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &PROBE_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &PROBE_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepCount, &(TCP_SILENCE_SECONDS_MAX / PROBE_SECONDS))?;
    setsockopt(stream, sockopt::TcpUserTimeout, &(TCP_SILENCE_SECONDS_MAX * 1000))?;
    Ok(())
}

/// Calls the same method of the stream inside.
macro_rules! inner {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            LinuxStream::Tcp(inner) => {
                let $stream = Pin::new(inner);
                $call
            }
            LinuxStream::Unix(inner) => {
                let $stream = Pin::new(inner);
                $call
            }
        }
    };
}

impl AsyncRead for LinuxStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        inner!(self, stream => stream.poll_read(cx, buffer))
    }
}

impl AsyncWrite for LinuxStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        inner!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        inner!(self, stream => stream.poll_write_vectored(cx, parts))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner!(self, stream => stream.poll_shutdown(cx))
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum LinuxListener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket and its path.
    Unix(UnixListener, PathBuf),
}

impl Listener for LinuxListener {
    type Stream = LinuxStream;

    async fn accept(&self) -> io::Result<(LinuxStream, String)> {
        match self {
            LinuxListener::Tcp(listener) => loop {
                match listener.accept().await {
                    Ok((stream, peer)) => return Ok((LinuxStream::tcp(stream)?, peer.to_string())),
                    // That one went away before its turn; the next may be there.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => return Err(error),
                }
            },
            LinuxListener::Unix(listener, path) => {
                let (stream, _) = listener.accept().await?;
                let process = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let peer = match process {
                    Some(process) => format!("unix:{} (process {process})", path.display()),
                    None => format!("unix:{}", path.display()),
                };
                Ok((LinuxStream::Unix(stream), peer))
            }
        }
    }

    fn address(&self) -> Address {
        match self {
            LinuxListener::Tcp(listener) => {
                Address::Tcp(listener.local_addr().expect("a bound socket has an address"))
            }
            LinuxListener::Unix(_, path) => Address::Unix(path.clone()),
        }
    }
}
