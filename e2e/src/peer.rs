//! Other projects' NBD servers: what the clients' side of the tests is proven on.

use std::net::TcpListener;

use crate::process::Running;
use crate::scratch::Scratch;
use crate::wait;

/// A running server with one export.
#[derive(Debug)]
pub struct Peer {
    /// Where it serves.
    pub uri: String,
    /// The process.
    pub process: Running,
}

/// A port that was free a moment ago.
///
/// # Panics
/// When the system has none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// nbdkit with a plugin and its parameters, for instance `memory 1G`.
pub fn nbdkit(scratch: &Scratch, port: u16, plugin: &[&str]) -> Peer {
    let port_text = port.to_string();
    let mut command = vec!["nbdkit", "-f", "-i", "127.0.0.1", "-p", &port_text, "-e", "demo"];
    command.extend(plugin);
    serve(scratch, port, &command)
}

/// qemu-nbd on a raw file.
pub fn qemu_nbd(scratch: &Scratch, port: u16, file: &str) -> Peer {
    let port_text = port.to_string();
    let base = ["qemu-nbd", "--persistent", "--shared=8", "--bind=127.0.0.1", "--port", &port_text];
    let rest = ["--export-name=demo", "--format=raw", "--discard=unmap", file];
    serve(scratch, port, &[&base[..], &rest[..]].concat())
}

fn serve(scratch: &Scratch, port: u16, command: &[&str]) -> Peer {
    let log = scratch.path().join("peer.log");
    let mut process = Running::start(&log, command, false);
    let address = format!("127.0.0.1:{port}");
    wait::until_true("the peer", 10, || {
        assert!(process.is_running(), "{command:?} ended: {}", process.log());
        std::net::TcpStream::connect(&address).is_ok()
    });
    Peer { uri: format!("nbd://{address}/demo"), process }
}
