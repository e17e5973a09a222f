//! The server side of one NBD connection: bytes in, commands out; completions in, bytes out.
//!
//! Owns the protocol: the fixed newstyle handshake, requests, replies, and what a client may ask
//! for at most. Does no I/O, knows no volumes, has no clock: its caller reads and writes the
//! socket, answers which exports exist, and runs the commands. `docs/nbd.md` says what is
//! supported and how exports are named.
//!
//! On the write path it is step 2: [`Session`] hands out a `Write` whose payload the socket was
//! read into directly.

mod error;
mod export;
mod handshake;
mod in_flight;
mod input;
mod io_command;
mod lanes;
mod memory;
mod reply;
mod session;
mod wire;

pub use error::SessionError;
pub use export::{
    Access, ExportInfo, ExportName, ExportNameError, ListExportsError, OpenExport, OpenExportError,
    Purpose,
};
pub use in_flight::CommandId;
pub use lanes::{HandleOrders, LANES_MAX, SessionLane};
pub use memory::RequestMemory;
pub use reply::ReplyQueue;
pub use session::{Event, Session, SuspendedHandshake, Want};
