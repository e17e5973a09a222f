//! Every bound of Ballast in one place, each with its unit and its reason.
//!
//! A queue, cache or retention that is not bounded by a constant here (or by a setting whose
//! default is here) is a bug: guarantee **bounded**.

use crate::geometry::BLOCK_SIZE;

/// Largest host write that is one log entry, in bytes: applied whole or not at all. 1 MiB is what
/// databases and file systems issue at most; larger requests are split.
pub const TRANSFER_BYTES_MAX: usize = 1 << 20;

/// Largest single NBD request accepted, in bytes: what the NBD protocol lets a client assume that
/// negotiated no block size. Split into entries of [`TRANSFER_BYTES_MAX`].
pub const NBD_REQUEST_BYTES_MAX: usize = 32 << 20;

/// Data of one NBD handshake option, in bytes: the longest export name that the protocol allows
/// (4096) and as much again for queries. More is skipped, and refused as too big.
pub const NBD_OPTION_BYTES_MAX: usize = 8 << 10;

/// Data of an NBD option that is skipped to answer it politely, in bytes; above, the connection
/// ends: no client has a use for it.
pub const NBD_OPTION_SKIP_BYTES_MAX: usize = 1 << 20;

/// Options in one NBD handshake: real clients send under ten, and two per export when listing.
pub const NBD_OPTIONS_MAX: usize = 4096;

/// Metadata queries in one NBD option: only one context exists.
pub const NBD_META_QUERIES_MAX: usize = 64;

/// Answers of an NBD handshake that wait for the client to read them, in bytes: no further option
/// is looked at above. One list of exports may exceed it once.
pub const NBD_HANDSHAKE_REPLY_BYTES_MAX: usize = 64 << 10;

/// Extents in one NBD block status reply: 128 KiB on the wire; clients ask on from its end.
pub const NBD_STATUS_EXTENTS_MAX: usize = 16 << 10;

/// Blocks of the largest entry.
pub const TRANSFER_BLOCKS_MAX: usize = TRANSFER_BYTES_MAX / BLOCK_SIZE;

/// Smallest volume, in bytes.
pub const VOLUME_BYTES_MIN: u64 = 1 << 20;

/// Largest volume, in bytes: 64 TiB. Block numbers of a volume fit 34 bits, ranges of 1 MiB 26.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// Sizes of pooled buffers in bytes: one block, small writes, frames, the largest entry.
pub const BUFFER_SIZE_CLASSES: [usize; 4] = [4 << 10, 16 << 10, 128 << 10, 1 << 20];

/// Idle memory kept by one buffer pool, in bytes, all size classes together: covers the in-flight
/// writes of a busy shard, small against the map cache.
pub const BUFFER_POOL_BYTES_MAX: usize = 64 << 20;

/// Payload of one host connection that may be in flight, in bytes: reading from its socket stops
/// above. Two largest NBD requests, so that a big one does not stop the next from arriving.
pub const CONNECTION_INFLIGHT_BYTES_MAX: usize = 2 * NBD_REQUEST_BYTES_MAX;

/// What one host connection may hold in any case, in bytes: 64 blocks. Beyond it takes part in
/// [`REQUEST_MEMORY_BYTES`], where others may be first. All connections that there may be, with so
/// much each, need 256 MiB.
pub const NBD_CONNECTION_OWN_BYTES: usize = 256 << 10;

/// What all connections of a node together may hold beyond that, in bytes, unless configured:
/// sixty clients with 32 writes of 128 KiB each, and a quarter of a second of a fast network. What
/// two other nodes forward here can be as much each.
pub const REQUEST_MEMORY_BYTES: usize = 256 << 20;

/// The same, the least that may be configured for each pool of a node, in bytes: one largest request
/// must fit.
pub const REQUEST_MEMORY_BYTES_MIN: usize = NBD_REQUEST_BYTES_MAX;

/// The same, the most that may be configured for each pool, in bytes (64 GiB): all connections with as
/// much as each may have in flight. More is never used, so a larger number was not meant.
pub const REQUEST_MEMORY_BYTES_MAX: usize = NBD_CONNECTIONS_MAX * CONNECTION_INFLIGHT_BYTES_MAX;

/// Commands of one host connection in flight: bounds the apply-side window of request numbers.
pub const CONNECTION_INFLIGHT_COMMANDS_MAX: usize = 256;

/// Proposed and not yet applied payload of one family on its leader, in bytes: callers wait above.
pub const FAMILY_INFLIGHT_BYTES_MAX: usize = 32 << 20;

/// Largest write that waits for a round of its family, in bytes. Larger ones have so much to carry
/// that a round's own cost does not count, and go while others are under way.
pub const GATHER_BYTES_MAX: usize = 16 << 10;

/// Writes of a round that wait for no more: a round's own cost, shared by so many, is as much as one of
/// them costs anyway (benches/README.md).
pub const GATHER_WRITES_ENOUGH: usize = 32;

/// How long a round waits for the next host that the one before has answered, in microseconds: what
/// a host on a busy machine takes to see an answer and to send its next request.
pub const GATHER_PAUSE_US_MAX: u64 = 1_000;

/// How long a round waits for all of them, in microseconds: one or two rounds.
pub const GATHER_US_MAX: u64 = 3_000;

/// Writes that go as they come after a round that waited in vain: after the first.
pub const GATHER_FREE_WRITES_MIN: u32 = 32;

/// Writes that go as they come after many rounds that waited in vain: what is waited then is far below
/// a thousandth of their time.
pub const GATHER_FREE_WRITES_MAX: u32 = 4096;

/// Log entries kept for lagging followers, per family, in bytes of payload and headers: what a
/// follower may miss and still catch up from the log. Beyond it, resync by difference.
pub const FAMILY_RETENTION_BYTES_MAX: u64 = 256 << 20;

/// Log entries kept on one pool, all families together, in bytes: at most, on large pools. It is
/// also the age, in bytes of the hot stream, at which an entry goes, whosever it is (hazard F3).
pub const POOL_RETENTION_BYTES_MAX: u64 = 1 << 30;

/// Log entries kept on one pool, as a part of its segments: a lagging follower is no reason to
/// refuse writes, it catches up by difference.
pub const RETENTION_ONE_IN: u32 = 16;

/// What is left of the former while free segments are few. A pool's capacity counts on no more.
pub const RETENTION_PRESSED_ONE_IN: u64 = 4;

/// Payload of recent log entries kept in memory per pool, in bytes: lets followers and reads of
/// fresh data go without the disk.
pub const LOG_CACHE_BYTES_MAX: usize = 64 << 20;

/// Bytes of one AppendEntries message: keeps the receive buffer small and control frames prompt.
pub const APPEND_BYTES_MAX: usize = 1 << 20;

/// Bytes queued to one peer, all families: beyond it the peer is slow, its streams fail and its
/// replicas catch up later.
pub const PEER_QUEUE_BYTES_MAX: usize = 32 << 20;

/// A peer frame, in bytes: one largest entry, or one AppendEntries message, with headers.
pub const PEER_FRAME_BYTES_MAX: usize = 4 << 20;

/// Bytes of one disk write of a stream: bounds how long others wait behind it.
pub const BATCH_WRITE_BYTES_MAX: usize = 4 << 20;

/// Disk operations of one shard in flight at the kernel: more wait their turn. Deep enough for any
/// one device queue, and it keeps the completion queue (twice as long) from ever overflowing.
pub const RING_OPERATIONS_MAX: u32 = 256;

/// Times in a row that the kernel may put off one disk operation (EINTR, EAGAIN) without moving a
/// byte of it before that is reported as its error.
pub const RING_PUT_OFF_MAX: u32 = 1000;

/// Body of one record in a batch header, in bytes: the largest entry header (1536) with room for
/// the fields of a moved one. Longer control data travels as payload.
pub const RECORD_BODY_BYTES_MAX: usize = 1664;

/// Replicas with records in one batch: the next header must list them and still have room for the
/// largest record.
pub const BATCH_REPLICAS_MAX: usize = 96;

/// Parts of one disk write of a stream: IOV_MAX of Linux.
pub const BATCH_WRITE_PARTS_MAX: usize = 1024;

/// A stream that has been idle this long, in milliseconds, writes an empty batch: it proves that
/// the last acknowledged batch was durable, so that damage to it is not taken for a torn write.
pub const STREAM_SEAL_IDLE_MS: u64 = 100;

/// A disk write that has not returned after this many milliseconds fails the pool. Far beyond
/// what a healthy disk takes, below what a host waits before it gives the path up.
pub const DISK_WRITE_OVERDUE_MS: u64 = 20_000;

/// Time in which a write's wait is counted, in milliseconds: what a process that was stopped may
/// lose of [`DISK_WRITE_OVERDUE_MS`] by one stop.
pub const DISK_WRITE_OVERDUE_STEP_MS: u64 = 1_000;

/// Largest segment, in bytes: amortises the seek of a hard disk and keeps the table small.
pub const SEGMENT_BYTES_MAX: u64 = 32 << 20;

/// Smallest segment, in bytes: the largest entry with its headers, and as much again.
pub const SEGMENT_BYTES_MIN: u64 = 2 << 20;

/// Segments that a pool should have at least: cleaning works on a fine enough grain.
pub const POOL_SEGMENTS_WANTED: u64 = 500;

/// Segments that a pool must have: all reserves, the open segments, and something to use.
pub const POOL_SEGMENTS_MIN: u64 = 32;

/// Free segments kept for votes, epochs and other control records.
pub const RESERVE_CONTROL_SEGMENTS: u32 = 2;

/// Free segments kept for a checkpoint (pages and body), as a part of all segments.
pub const RESERVE_CHECKPOINT_ONE_IN: u32 = 32;

/// The same, at least.
pub const RESERVE_CHECKPOINT_SEGMENTS_MIN: u32 = 4;

/// Free segments kept for the cleaner: it fills one while it empties several.
pub const RESERVE_CLEANER_SEGMENTS: u32 = 2;

/// Free segments kept for trim and delete records.
pub const RESERVE_TRIM_SEGMENTS: u32 = 2;

/// Free segments, beyond the reserves, that no new write is admitted into, as a part of all: what
/// was admitted on a word that is a tell interval old is still on its way.
pub const RESERVE_ADMITTED_ONE_IN: u32 = 64;

/// Segments open at any time: hot, the one bespoken to follow it, cold, meta, and the body of the
/// last checkpoint.
pub const OPEN_SEGMENTS: u32 = 5;

/// Free segments that the keeper works hard to have ready for writers, as a part of all: they write
/// while it makes a round.
pub const WORKING_ONE_IN: u32 = 32;

/// The same, at least.
pub const WORKING_SEGMENTS_MIN: u32 = 2;

/// Segments of map pages that may hold mostly dead ones, as a part of all, before they are compacted.
pub const META_ONE_IN: u32 = 64;

/// Live blocks in what can be cleaned, in percent, at which a pool is full: at 85 the cleaner gains
/// a segment from the seven emptiest at worst, and from four when overwrites are random.
pub const CAPACITY_PERCENT: u64 = 85;

/// A difference is put aside, next to what it replaces, only while this part of a pool's capacity stays
/// free: beyond it writers would be refused for data that lives only until the difference is installed.
pub const ASIDE_UNTIL_ONE_IN: u64 = 8;

/// A full pool takes writes again once this part of its capacity is free: writers don't flap.
pub const FULL_UNTIL_ONE_IN: u64 = 64;

/// Replicas on a pool for each of its segments: their records, some kilobytes each, must fit the
/// body of a checkpoint.
pub const REPLICAS_PER_SEGMENT_MAX: usize = 8;

/// How long a write waits for room, in milliseconds, while no write gets any in the pool that it
/// waits for, before it is refused: several rounds of a keeper. While those in front get some it
/// waits on.
pub const ROOM_WAIT_MS_MAX: u64 = 3_000;

/// How long one attempt of a write waits for room, in milliseconds, before its client is told that it
/// was not proposed and is to ask again: less than a client waits for an answer. An attempt that got
/// none may have been proposed, and could not be refused for want of space any more.
pub const ROOM_ATTEMPT_MS_MAX: u64 = 3_500;

/// How long the place of a write is kept that is to ask again, in milliseconds: a few times what the
/// way to its client and back takes.
pub const ROOM_PLACE_MS: u64 = 1_000;

/// How far writers may run ahead of the pace that the room left allows, in milliseconds: shorter
/// waits than a timer's grain of a millisecond would slow down much more than they are meant to.
pub const ROOM_AHEAD_MS: u64 = 20;

/// Writers use what is free no faster than all of it in this time, in milliseconds: as it runs out
/// they slow down to what the keeper frees, instead of stopping. A keeper's round takes a part of it.
pub const ROOM_SPREAD_MS: u64 = 1_000;

/// Bytes of one read of the recovery scan: few enough calls, little memory.
pub const RECOVERY_READ_BYTES: usize = 1 << 20;

/// Body of a vote slot, in bytes: with its header it fits one 512-byte sector, which no disk tears.
pub const VOTE_SLOT_BODY_BYTES_MAX: usize = 448;

/// Changes of the extent map held in memory before they are merged into pages, per pool, in bytes;
/// small pools have [`UNMERGED_ONE_IN`] of their size.
pub const MAP_DELTA_BYTES_MAX: usize = 64 << 20;

/// Map pages that only a checkpoint can release from memory, per pool, in bytes on disk: over it, a
/// checkpoint is due; small pools have [`UNMERGED_ONE_IN`] of their size, half of what is kept free
/// for a checkpoint.
pub const MAP_DIRTY_BYTES_MAX: usize = 64 << 20;

/// Blocks written but not merged, as a part of a pool: what they overwrote still counts as live, and
/// each may need a page of its own at the next checkpoint (the other half of its reserve).
pub const UNMERGED_ONE_IN: u64 = 64;

/// How often a pool's keeper looks for work that nobody rang for, in milliseconds.
pub const KEEPER_PERIOD_MS: u64 = 1000;

/// Live blocks of a segment, in percent, above which it is not cleaned: at 90% a segment costs nine
/// writes to gain one. Only when free segments are few.
pub const CLEANER_VICTIM_LIVE_PERCENT_MAX: u32 = 90;

/// The same while there is no hurry: moving a block may gain at least another.
pub const CLEANER_VICTIM_LIVE_PERCENT_EARLY: u32 = 50;

/// Segments emptied between two checkpoints, as a part of all: what they free is free only after it.
pub const CLEANER_VICTIMS_ONE_IN: u32 = 32;

/// The same, at least.
pub const CLEANER_VICTIMS_MIN: u32 = 4;

/// Bytes of a segment that the cleaner reads at a time to find batch headers.
pub const CLEANER_READ_BYTES: usize = 256 << 10;

/// Pages of the extent map cached in memory, per pool, in bytes.
pub const MAP_CACHE_BYTES_MAX: usize = 256 << 20;

/// Log written since the last checkpoint that triggers the next one, in bytes: bounds recovery
/// (read at start) to well under 2 s on a disk that reads 500 MB/s.
pub const CHECKPOINT_LOG_BYTES: u64 = 256 << 20;

/// The same on small pools, as a part of all segments: nothing of it can be freed or cleaned.
pub const CHECKPOINT_LOG_ONE_IN: u32 = 32;

/// Families with a replica on one pool: slots in the pool's vote table.
pub const POOL_REPLICAS_MAX: usize = 4096;

/// Replicas of one volume.
pub const VOLUME_REPLICAS_MAX: usize = 5;

/// Nodes of a cluster group that bootstraps statically.
pub const CLUSTER_NODES_MAX: usize = 5;

/// NBD clients connected to one node: what its file descriptors and memory allow with room.
pub const NBD_CONNECTIONS_MAX: usize = 1024;

/// Time that an NBD client may take until it has attached, in seconds: a client that opens a
/// connection and says nothing holds one for no longer.
pub const NBD_HANDSHAKE_SECONDS_MAX: u64 = 60;

/// Time that an NBD client which opens an export waits for the volume's leader, in seconds, before it is
/// refused in words: five times what an election takes, or the start of all nodes, with Raft's default
/// times. With longer ones it is [`NBD_OPEN_ELECTIONS`] elections. A client without a retry of its own
/// must get through a failover, and one that has other servers must hear soon.
pub const NBD_OPEN_SECONDS_MAX: u64 = 10;

/// The same, in elections of the longest time that is configured: two that come to nothing, and one.
pub const NBD_OPEN_ELECTIONS: u32 = 3;

/// Time that the other side of a TCP connection may leave everything unacknowledged, probes for a
/// sign of life too, in seconds; then the connection fails. A host that lost its power says nothing
/// for ever: its attachment would keep every other host out. Longer than most cuts heal in.
pub const TCP_SILENCE_SECONDS_MAX: u32 = 30;

/// Length of a volume's name, in bytes: a DNS label, as Kubernetes names are.
pub const NAME_BYTES_MAX: usize = 63;

/// Leases of one volume at a time: hosts that read it, or that write a shared raw block volume. More
/// than any file system for shared blocks takes; each is fenced by an entry of the volume's own log.
pub const LEASES_PER_VOLUME_MAX: usize = 64;

/// Length of a host's name in a lease, in bytes: a DNS name, as Kubernetes nodes have.
pub const HOST_NAME_BYTES_MAX: usize = 253;

/// Length of the reason of a forced lease, in bytes: a sentence or two.
pub const LEASE_REASON_BYTES_MAX: usize = 256;

/// Length of the type of a file system in a volume's record of what it holds, in bytes: `ext4`.
pub const FS_TYPE_BYTES_MAX: usize = 32;

/// Length of a node's name, in bytes: a DNS subdomain, as Kubernetes nodes have.
pub const NODE_NAME_BYTES_MAX: usize = 253;

/// Length of a peer address, in bytes: a DNS name, a colon and a port, with room for brackets.
pub const PEER_ADDRESS_BYTES_MAX: usize = 264;

/// Labels of one node: what topology needs and some more; the whole cluster state stays small.
pub const NODE_LABELS_MAX: usize = 64;

/// Length of a label's key and of its value, in bytes: a Kubernetes label key has at most 317.
pub const LABEL_BYTES_MAX: usize = 317;

/// Pools that one node can ever have registered, lost ones included: the state stays small.
pub const NODE_POOLS_MAX: usize = 64;

/// Pools that one node serves at a time, each by a shard of its own: more disks than a storage node
/// mostly has, and as many threads.
pub const NODE_SHARDS_MAX: usize = 16;

/// Commands of further shards on their way to a node's shard 0, at most: more callers wait in line.
/// Those that shard 0 has taken it proposes side by side, each for ten seconds at most; a shard has
/// one of its own at a time, and one for each peer whose pool went back in time.
pub const SHARD_PROPOSALS_MAX: usize = 64;

/// Connections on their way to one shard of a node, at most: a shard that does not take them in
/// gets no more. As many as open at once when a peer or a host comes back.
pub const SHARD_ARRIVALS_MAX: usize = 256;

/// A request to the administration interface, in bytes: the largest holds a few names.
pub const ADMIN_REQUEST_BYTES_MAX: usize = 64 << 10;

/// Head of an HTTP request for metrics or health, in bytes: scrapers send a few hundred.
pub const HTTP_HEAD_BYTES_MAX: usize = 16 << 10;

/// Connections for metrics and health at a time: a scraper, a kubelet and some people.
pub const HTTP_CONNECTIONS_MAX: usize = 32;

const _: () = assert!(TRANSFER_BYTES_MAX.is_multiple_of(BLOCK_SIZE));
// A connection with nothing in flight can always take the largest request.
const _: () = assert!(NBD_REQUEST_BYTES_MAX <= CONNECTION_INFLIGHT_BYTES_MAX);
// An entry's block count is held in 16 bits on disk.
const _: () = assert!(TRANSFER_BLOCKS_MAX <= u16::MAX as usize);
const _: () = assert!(VOLUME_BYTES_MAX / (BLOCK_SIZE as u64) <= 1 << 34);
// One AppendEntries message holds at least one largest entry, and fits a frame.
const _: () = assert!(TRANSFER_BYTES_MAX <= APPEND_BYTES_MAX);
const _: () = assert!(APPEND_BYTES_MAX + (1 << 20) <= PEER_FRAME_BYTES_MAX);
