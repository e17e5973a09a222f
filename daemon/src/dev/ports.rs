//! Ports for the nodes: free now, and outside the range that the kernel hands to clients, so that
//! they are still free when a node comes back.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, socket};

use crate::error::DaemonError;

/// Lowest port that is tried: below live well-known services.
const LOWEST: u16 = 20_000;
/// Where the kernel's range for clients starts unless it says otherwise.
const CLIENTS_START: u16 = 32_768;

/// `count` free ports on 127.0.0.1, all different.
///
/// # Errors
/// When there are not as many.
pub fn pick(count: usize) -> Result<Vec<SocketAddr>, DaemonError> {
    let range = LOWEST..clients_start().max(LOWEST + 1000);
    let size = range.end - range.start;
    let seed = super::folder::random_bytes::<2>()?;
    let first = u16::from_le_bytes(seed) % size;
    // Held until all are found, so that none is found twice.
    let mut held = Vec::new();
    for step in 0..size {
        let port = range.start + (first + step) % size;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        if let Ok(socket) = take(address) {
            held.push((socket, SocketAddr::from(address)));
        }
        if held.len() == count {
            return Ok(held.into_iter().map(|(_, address)| address).collect());
        }
    }
    Err(DaemonError::Dev(format!("there are no {count} free ports on 127.0.0.1")))
}

/// Takes a port that nobody has or had a moment ago: servers may share one with connections that are
/// coming to their end (`SO_REUSEADDR`), so those of a node that is away for a moment are free to them.
fn take(address: SocketAddrV4) -> nix::Result<OwnedFd> {
    let kind = SockType::Stream;
    let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(address))?;
    Ok(socket)
}

fn clients_start() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let range = range.unwrap_or_default();
    range.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(CLIENTS_START)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn ports_are_free_and_different() {
        let ports = pick(12).unwrap();
        let distinct: std::collections::BTreeSet<_> = ports.iter().collect();
        assert_eq!(distinct.len(), 12);
        for port in &ports {
            assert!(TcpListener::bind(port).is_ok(), "{port}");
        }
    }

    /// A node that was killed is away, and comes back to its ports.
    #[test]
    fn a_port_whose_server_has_just_gone_is_not_free() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("not IPv4") };
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert!(take(address).is_err(), "it is served");
        drop((server, listener));
        drop(client);
        assert!(take(address).is_err(), "its connections are coming to their end");
        assert!(TcpListener::bind(address).is_ok(), "it may come back");
    }
}
