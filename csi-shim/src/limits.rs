//! The bounds of what the driver does with the kernel's NBD client, each with its unit and reason.
//! Those of volumes and of the protocol are the storage nodes' (`ballast_block::limits`).

use std::time::Duration;

/// Seconds without a connection after which requests fail: longer than any repair that a pod should
/// survive, short enough that a host which lost its cluster for good can be emptied.
pub const DEAD_CONNECTION_SECONDS: u64 = 600;

/// Seconds without an answer after which a connection counts as lost, and its requests are asked
/// again elsewhere: longer than a volume takes to go on when a node is lost. Also what a request
/// takes that was under way on a connection that is lost: only then does the kernel ask again.
pub const REQUEST_SECONDS: u64 = 10;

/// How long all servers together may take to open the export of a new device: two handshakes that get
/// no answer, and an election.
pub const OPEN_TIME: Duration = Duration::from_secs(20);

/// How long the kernel may take to take over, grow, or let go of, a device: twice what a request
/// takes that is asked again.
pub const DEVICE_TIME: Duration = Duration::from_secs(20);

/// How long a block may take to be read from a server that is well: an election and some.
pub const ANSWER_TIME: Duration = Duration::from_secs(3);

/// What the kernel takes to notice, on both of its sides, that a connection was hung up.
pub const NOTICE_TIME: Duration = Duration::from_millis(100);

/// How long the watcher waits for a notice, with nothing to do: notices wake it, so only what they
/// can't tell waits so long.
pub const QUIET_TIME: Duration = Duration::from_secs(60);

/// Between two looks for a server, for a device that has none: seconds are what a pause costs its
/// users, and a look costs a server a connection.
pub const RETRY_TIME: Duration = Duration::from_secs(1);

/// For so long nobody may have used a device that is to have several connections again.
pub const UNUSED_TIME: Duration = Duration::from_secs(5);

/// Between two changes of a device's connections, but for repairs: each may be a pause.
pub const CHANGE_TIME: Duration = Duration::from_secs(60);

/// How long one look for a server takes at most, but for servers that do not answer: a connection
/// that the kernel did not take is offered again about twenty times.
pub const REPAIR_TIME: Duration = Duration::from_secs(2);

/// Devices that the watcher looks after at the same time. A node that ends may take the connections
/// of all devices along; each repair waits for the network nearly all of its time, and is an entry in
/// its volume's log: more at once would be a burst on the nodes that are left.
pub const REPAIRS_AT_ONCE: usize = 8;

/// How long the cluster may take to say whether a volume is deleted, when a server does not know it: an
/// election and some. Without an answer the device goes on waiting.
pub const DELETED_TIME: Duration = Duration::from_secs(5);
