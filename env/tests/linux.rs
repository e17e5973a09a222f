//! The Linux implementation against the conformance suite and its own promises.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "prepares and looks at real files"
)]

use std::io::ErrorKind;
use std::path::PathBuf;
use std::task::Poll;

use ballast_block::AlignedBuf;
use ballast_env::conformance;
use ballast_env::disk::{Disk, File, OpenMode};
use ballast_env::linux::{LinuxEnv, LinuxShard, LinuxStream, SyncBy};
use ballast_env::network::{Address, Listener, Network};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A folder on the disk of the target directory (`/tmp` may be in memory), gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn on_a_shard<Fut: Future<Output = ()>>(main: impl FnOnce(LinuxEnv) -> Fut) {
    LinuxShard::run(main).unwrap();
}

#[test]
fn conformance_over_tcp() {
    let folder = Folder::new("conformance-tcp");
    let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
    on_a_shard(async |env| conformance::all(&env, &folder.0, &address).await);
}

#[test]
fn conformance_of_each_way_to_sync() {
    for sync_by in [SyncBy::Flag, SyncBy::Flush] {
        let folder = Folder::new("conformance-sync");
        on_a_shard(async |env| conformance::disk::all(&env.sync_by(sync_by), &folder.0).await);
    }
}

#[test]
fn conformance_over_unix_sockets() {
    // A short path: they are limited to 108 bytes.
    let address = Address::Unix(PathBuf::from(format!("/tmp/ballast-{}.sock", std::process::id())));
    on_a_shard(async |env| conformance::network::all(&env, &address).await);
    let Address::Unix(path) = address else { unreachable!() };
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_socket_in_use_is_not_replaced() {
    let path = PathBuf::from(format!("/tmp/ballast-used-{}.sock", std::process::id()));
    let address = Address::Unix(path.clone());
    on_a_shard(async |env| {
        let listener = env.listen(&address).await.unwrap();
        let error = env.listen(&address).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        let (one, two) = tokio::join!(env.connect(&address), listener.accept());
        assert!(one.is_ok());
        assert!(two.unwrap().1.contains(&std::process::id().to_string()));
    });
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "not a socket").unwrap();
    on_a_shard(async |env| {
        assert_eq!(env.listen(&address).await.err().unwrap().kind(), ErrorKind::AddrInUse);
    });
    assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    std::fs::remove_file(&path).unwrap();
}

/// Sends back what it reads until the client ends.
async fn echo(mut stream: LinuxStream) {
    if let LinuxStream::Tcp(socket) = &stream {
        assert!(socket.nodelay().unwrap());
        assert!(getsockopt(socket, sockopt::KeepAlive).unwrap());
        assert!(getsockopt(socket, sockopt::TcpUserTimeout).unwrap() > 0);
    }
    let mut bytes = [0; 1000];
    loop {
        match stream.read(&mut bytes).await.unwrap() {
            0 => return,
            count => stream.write_all(&bytes[..count]).await.unwrap(),
        }
    }
}

fn goes_on_at_another_shard(address: &Address) {
    on_a_shard(async |env| {
        let listener = env.listen(address).await.unwrap();
        let (client, server) = tokio::join!(env.connect(&listener.address()), listener.accept());
        let (mut client, mut server) = (client.unwrap(), server.unwrap().0);
        client.write_all(b"one two").await.unwrap();
        server.write_all(b"hello ").await.unwrap();
        let mut first = [0; 3];
        server.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"one");

        let detached = env.detach(server).unwrap();
        client.write_all(b" three").await.unwrap();
        let other = std::thread::spawn(move || {
            on_a_shard(async move |env| echo(env.adopt(detached).unwrap()).await);
        });
        let mut seen = [0; 16];
        client.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"hello  two three");
        client.write_all(b" four").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b" four");
        other.join().unwrap();
    });
}

#[test]
fn a_connection_goes_on_at_another_shard() {
    goes_on_at_another_shard(&Address::Tcp("127.0.0.1:0".parse().unwrap()));
    let path = PathBuf::from(format!("/tmp/ballast-handed-on-{}.sock", std::process::id()));
    goes_on_at_another_shard(&Address::Unix(path.clone()));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn what_can_not_be_a_pool() {
    let folder = Folder::new("no-pool");
    on_a_shard(async |env| {
        let not_a_file = env.open(&folder.0, OpenMode::ReadOnly).await.err().unwrap();
        assert_eq!(not_a_file.kind(), ErrorKind::InvalidInput, "{not_a_file}");
        let terminal = env.open("/dev/null".as_ref(), OpenMode::ReadOnly).await.err().unwrap();
        assert_eq!(terminal.kind(), ErrorKind::InvalidInput, "{terminal}");
        let indirect =
            env.open("/proc/self/stat".as_ref(), OpenMode::ReadOnly).await.err().unwrap();
        assert_eq!(indirect.kind(), ErrorKind::Unsupported, "{indirect}");
        let path = folder.0.join("too-large");
        let large = env.open(&path, OpenMode::CreateNew { size: 1 << 62 }).await.err().unwrap();
        assert!(large.to_string().contains("can't be allocated"), "{large}");
        assert!(!path.exists(), "what could not be allocated is removed");
    });
}

#[test]
fn the_end_of_a_shard_waits_for_its_disk_operations() {
    for sync_by in [SyncBy::Flag, SyncBy::Flush] {
        let folder = Folder::new("end");
        let path = folder.0.join("pool");
        on_a_shard(async |env| {
            let mode = OpenMode::CreateNew { size: 100 * 4096 };
            let file = env.sync_by(sync_by).open(&path, mode).await.unwrap();
            for block in 0..100_u64 {
                let mut buffer = AlignedBuf::zeroed(4096);
                buffer.fill(7);
                let mut write = Box::pin(file.write_at(block * 4096, vec![buffer.freeze()]));
                let polled = std::future::poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx)));
                assert!(polled.await.is_pending(), "begun, and nobody waits for it");
            }
        });
        let written = std::fs::read(&path).unwrap();
        assert!(written.iter().all(|&byte| byte == 7), "what was begun went on to its end");
        on_a_shard(async |env| {
            assert!(env.open(&path, OpenMode::Exclusive).await.is_ok(), "unlocked");
        });
    }
}

#[test]
fn space_of_a_new_file_is_allocated() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new("allocated");
    let path = folder.0.join("pool");
    on_a_shard(async |env| {
        let file = env.open(&path, OpenMode::CreateNew { size: 1 << 20 }).await.unwrap();
        drop(file);
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 20);
    });
}
