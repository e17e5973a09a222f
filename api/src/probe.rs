//! What answers at an address that gives no gRPC answer: for the words of an error only.
//!
//! The ports of a node are next to each other in its configuration, and each is mistaken for another
//! one soon. Never decides whether a node is asked.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long one look may take: who has something to say says so at once.
const PROBE_MAX: Duration = Duration::from_secs(1);

/// What every HTTP/2 client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What speaks at `HOST:PORT`, if it is known and something else than gRPC.
pub(crate) async fn stranger(address: &str) -> Option<&'static str> {
    let first = tokio::time::timeout(PROBE_MAX, first_bytes(address)).await.ok()?.ok()?;
    match &first {
        b"NBDMAGIC" => Some(
            "an NBD server answers there, not the administration interface: give the address of \
             listen.grpc",
        ),
        first if first.starts_with(b"HTTP/1.") => Some(
            "a web server answers there (a node's metrics?), not the administration interface: give \
             the address of listen.grpc",
        ),
        _ => None,
    }
}

async fn first_bytes(address: &str) -> std::io::Result<[u8; 8]> {
    let mut stream = TcpStream::connect(address).await?;
    // One that speaks first may have closed already; what it said is there all the same.
    let _ = stream.write_all(PREFACE).await;
    let mut first = [0; 8];
    stream.read_exact(&mut first).await?;
    Ok(first)
}
