//! Three nodes in one thread on the real disk and real sockets: a volume, a client, a failover.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a test drives real tools")]

use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use ballast_block::buffer::BufferPool;
use ballast_block::{ClusterId, NodeId};
use ballast_env::clock::Clock;
use ballast_env::linux::{LinuxEnv, LinuxShard};
use ballast_env::network::{Address, Network};
use ballast_node::cluster::PoolState;
use ballast_node::config::{Founder, NodeConfig};
use ballast_node::leases::LeasePolicy;
use ballast_node::node::{self, Node};
use ballast_node::peers::identity::{Identity, Refusal};
use ballast_node::peers::wire::{Frame, FrameReader, Kind};
use tokio::io::AsyncWriteExt;

const POOL_BYTES: u64 = 1 << 30;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn free_address() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Address::Tcp(listener.local_addr().unwrap())
}

fn configs(scratch: &Scratch) -> Vec<NodeConfig> {
    let cluster = ClusterId::from_random([7; 16]);
    let founder =
        |id| Founder { node: NodeId(id), name: format!("n{id}"), peer_address: free_address() };
    let founders: Vec<Founder> = (1..=3).map(founder).collect();
    let config = |id| {
        let pool = scratch.0.join(format!("pool-{id}"));
        let mut config = NodeConfig::new(cluster, NodeId(id), pool, founders.clone());
        config.nbd_listen = vec![free_address()];
        config.leases = LeasePolicy::Optional;
        config
    };
    (1..=3).map(config).collect()
}

fn nbd_port(node: &Node<LinuxEnv>) -> SocketAddr {
    match &node.nbd_addresses()[0] {
        Address::Tcp(address) => *address,
        Address::Unix(path) => panic!("{path:?}"),
    }
}

/// Runs a tool beside the shard's thread.
async fn tool(program: &str, args: &[String]) -> String {
    let (done, result) = tokio::sync::oneshot::channel();
    let mut command = Command::new(program);
    command.args(args);
    std::thread::spawn(move || {
        let _ = done.send(command.output());
    });
    let output = result.await.unwrap().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

async fn qemu_io(address: SocketAddr, commands: &[&str]) -> String {
    let uri = format!("nbd://{address}/vol");
    let mut args: Vec<String> = vec!["-f".into(), "raw".into()];
    for command in commands {
        args.extend(["-c".into(), (*command).to_owned()]);
    }
    args.push(uri);
    let text = tool("qemu-io", &args).await;
    assert!(!text.contains("error") && !text.contains("failed"), "{text}");
    text
}

async fn start(env: &LinuxEnv, config: &NodeConfig) -> Node<LinuxEnv> {
    Node::start(env.clone(), config.clone()).await.unwrap()
}

async fn until(env: &LinuxEnv, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if condition().await {
            return;
        }
        env.sleep(Duration::from_millis(20)).await;
    }
    panic!("{what} did not come");
}

#[test]
fn a_volume_survives_the_restart_of_every_node() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .try_init();
    let scratch = Scratch::new("three-nodes");
    let configs = configs(&scratch);
    LinuxShard::run(|env| async move {
        for config in &configs {
            node::format(&env, config, Some(POOL_BYTES), false, None).await.unwrap();
        }
        let mut nodes = Vec::new();
        for config in &configs {
            nodes.push(start(&env, config).await);
        }
        until(&env, "the cluster", async || nodes.iter().all(Node::is_ready)).await;
        let volume = nodes[0].create_volume("vol", 64 << 20, 3).await.unwrap();
        assert_eq!(volume.size_bytes, 64 << 20);

        let commands = ["write -P 1 0 1M", "write -P 2 4k 4k", "write -P 3 8193 700", "flush"];
        qemu_io(nbd_port(&nodes[0]), &commands).await;
        let checks = [
            "read -P 1 0 4k",
            "read -P 2 4k 4k",
            "read -P 3 8193 700",
            "read -P 1 8893 3395",
            "read -P 0 1M 1M",
        ];
        for node in &nodes {
            qemu_io(nbd_port(node), &checks).await;
        }
        for index in 0..3 {
            nodes[index].stop().await;
            nodes.remove(index);
            let other = nbd_port(&nodes[0]);
            qemu_io(other, &checks).await;
            nodes.insert(index, start(&env, &configs[index]).await);
            until(&env, "the node", async || nodes[index].is_ready()).await;
        }
        let seen = Rc::new(RefCell::new(0));
        for node in &nodes {
            qemu_io(nbd_port(node), &checks).await;
            *seen.borrow_mut() += 1;
        }
        assert_eq!(*seen.borrow(), 3);
        for node in &nodes {
            node.stop().await;
        }
    })
    .unwrap();
}

/// What a node answers to a greeting.
async fn greet(env: &LinuxEnv, address: &Address, greeting: &Identity) -> Option<Refusal> {
    let mut stream = env.connect(address).await.unwrap();
    let hello = Frame::plain(Kind::Hello, 0, greeting.encode(None));
    stream.write_all(&hello.encode_head()).await.unwrap();
    let reply = FrameReader::new(stream, BufferPool::default()).next().await.unwrap();
    Identity::decode(reply.body).unwrap().1
}

/// The network may bring what a process said after its end, when the next one is known already.
#[test]
fn a_greeting_that_arrives_late_loses_no_pool() {
    let scratch = Scratch::new("late-greeting");
    let configs = configs(&scratch);
    LinuxShard::run(|env| async move {
        let mut nodes = Vec::new();
        for config in &configs {
            node::format(&env, config, Some(POOL_BYTES), false, None).await.unwrap();
            nodes.push(start(&env, config).await);
        }
        until(&env, "the cluster", async || nodes.iter().all(Node::is_ready)).await;
        let early = nodes[1].identity();
        nodes[1].stop().await;
        nodes.remove(1);
        nodes.insert(1, start(&env, &configs[1]).await);
        let now = nodes[1].identity();
        assert!(early.boot < now.boot);
        let knows = |node: &Node<LinuxEnv>| {
            node.cluster_state().pool(now.pool).is_some_and(|pool| pool.boot_counter == now.boot)
        };
        until(&env, "the later start", async || nodes.iter().all(knows)).await;

        let refusal = greet(&env, &configs[0].founders[0].peer_address, &early).await.unwrap();
        assert!(!refusal.lost, "{refusal:?}");
        // Behind whatever the node may have proposed because of it.
        nodes[0].create_volume("vol", 64 << 20, 3).await.unwrap();
        let state = nodes[0].cluster_state().pool(now.pool).unwrap().state;
        assert_eq!(state, PoolState::Ok);
        assert!(nodes[1].refused().is_none());
        for node in &nodes {
            node.stop().await;
        }
    })
    .unwrap();
}
