//! The network between the machines: listeners, links and their faults.
//!
//! Fault model:
//! - Bytes of one direction of a connection arrive in order, each piece after a random delay of its
//!   link; a link may be slow (bytes per millisecond). What is sent and not yet read is bounded by
//!   the window, beyond it the writer waits. Connections do not order each other.
//! - A link is one direction between two machines and may be cut. Bytes wait on a cut link; a
//!   connection over it is, by the seed, reset after a while, or stays silent until the link is
//!   back, or is forgotten by the network and stays silent for ever. A kernel that hears nothing
//!   for `TCP_SILENCE_SECONDS_MAX`, not even answers to its probes, fails the connection.
//! - Connections are reset at random while they carry bytes.
//! - kill -9: the kernel resets the connections of the process and refuses new ones. Power loss:
//!   silence, until the machine is back and answers old connections with a reset.
//! - A connect over a cut link or to a dead machine hangs, then times out.
//!
//! Byte streams never lose, repeat or alter bytes: TCP does not, and what lies on top has checksums
//! against hardware that does.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::task::{Poll, Waker};

use ballast_block::NodeId;
use ballast_env::network::{Address, Listener};
use tokio::sync::oneshot;

use crate::env::SimEnv;
use crate::env::stream::{Connection, SimStream};
use crate::machine::{Crash, ip_of};
use crate::rng::Rng;
use crate::world::World;

/// Connections that a listener holds for its process to accept.
const BACKLOG: usize = 128;

/// First port that is given out where 0 was asked for.
const EPHEMERAL_PORT: u16 = 32768;

/// How one direction between two machines behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Shortest delay in milliseconds.
    pub delay_min_ms: u64,
    /// Longest delay in milliseconds.
    pub delay_max_ms: u64,
    /// Bytes that it carries per millisecond and connection; 0 for no limit.
    pub bytes_per_ms: u64,
    /// Whether nothing passes.
    pub cut: bool,
    /// Chance in a million, per piece sent, that its connection is reset.
    pub reset_rate: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self { delay_min_ms: 0, delay_max_ms: 1, bytes_per_ms: 0, cut: false, reset_rate: 0 }
    }
}

/// The network.
pub struct NetState {
    pub(crate) rng: Rng,
    links: RefCell<BTreeMap<(NodeId, NodeId), Link>>,
    listeners: RefCell<BTreeMap<(NodeId, Port), Rc<Listening>>>,
    connections: RefCell<BTreeMap<u64, Rc<Connection>>>,
    numbered: Cell<u64>,
    next_port: Cell<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Port {
    Tcp(u16),
    Unix(PathBuf),
}

struct Listening {
    process: u64,
    waiting: RefCell<VecDeque<(SimStreamEnd, String)>>,
    accepting: RefCell<Option<Waker>>,
}

/// A server side that nobody accepted yet.
struct SimStreamEnd(Rc<Connection>);

impl NetState {
    pub(crate) fn new(rng: Rng) -> Self {
        Self {
            rng,
            links: RefCell::default(),
            listeners: RefCell::default(),
            connections: RefCell::default(),
            numbered: Cell::new(0),
            next_port: Cell::new(EPHEMERAL_PORT),
        }
    }

    /// How `from` reaches `to` now.
    pub fn link(&self, from: NodeId, to: NodeId) -> Link {
        self.links.borrow().get(&(from, to)).copied().unwrap_or_default()
    }

    /// Sets how `from` reaches `to` from now on; a cut link that is mended delivers what waited.
    pub fn set_link(&self, world: &World, from: NodeId, to: NodeId, link: Link) {
        let before = self.links.borrow_mut().insert((from, to), link).unwrap_or_default();
        if before.cut == link.cut {
            return;
        }
        world.note(format!("link {from} to {to} {}", if link.cut { "cut" } else { "mended" }));
        let over: Vec<_> = self.connections.borrow().values().cloned().collect();
        for connection in over.into_iter().filter(|connection| connection.uses(from, to)) {
            if link.cut {
                self.choose_fate(world, &connection);
            } else {
                connection.link_mended(world, from);
            }
        }
    }

    /// Cuts or mends both directions between `a` and `b`.
    pub fn set_cut(&self, world: &World, a: NodeId, b: NodeId, cut: bool) {
        self.set_link(world, a, b, Link { cut, ..self.link(a, b) });
        self.set_link(world, b, a, Link { cut, ..self.link(b, a) });
    }

    /// What becomes of a connection whose link was cut.
    fn choose_fate(&self, world: &World, connection: &Rc<Connection>) {
        match self.rng.below(4) {
            0 => {
                let after = self.rng.between(50, 5_000);
                let connection = connection.clone();
                world.after_ms(after, move |world| connection.reset_both(world));
            }
            1 => connection.forget(world),
            _ => connection.watch_silence(world),
        }
    }

    /// Resets every connection between `a` and `b`.
    pub fn reset_between(&self, world: &World, a: NodeId, b: NodeId) {
        let all: Vec<_> = self.connections.borrow().values().cloned().collect();
        for connection in all.into_iter().filter(|connection| connection.uses(a, b)) {
            connection.reset_both(world);
        }
    }

    /// Open connections.
    pub fn connections(&self) -> usize {
        self.connections.borrow().len()
    }

    pub(crate) fn forget_connection(&self, number: u64) {
        self.connections.borrow_mut().remove(&number);
    }

    pub(crate) fn crash(&self, world: &World, node: NodeId, process: u64, crash: Crash) {
        self.listeners
            .borrow_mut()
            .retain(|(at, _), listening| *at != node || listening.process != process);
        let all: Vec<_> = self.connections.borrow().values().cloned().collect();
        for connection in all {
            connection.end_died(world, node, process, crash);
        }
    }

    fn delay_ms(&self, from: NodeId, to: NodeId) -> u64 {
        let link = self.link(from, to);
        self.rng.between(link.delay_min_ms, link.delay_max_ms)
    }

    fn listening(&self, node: NodeId, port: &Port) -> Option<Rc<Listening>> {
        self.listeners.borrow().get(&(node, port.clone())).cloned()
    }
}

pub(crate) async fn listen(env: SimEnv, address: Address) -> io::Result<SimListener> {
    let net = env.world().net();
    let (port, address) = match address {
        Address::Tcp(mut address) => {
            if address.port() == 0 {
                let port = net.next_port.get();
                net.next_port.set(port.checked_add(1).unwrap_or(EPHEMERAL_PORT));
                address.set_port(port);
            }
            let own = address.ip().is_loopback()
                || address.ip().is_unspecified()
                || address.ip() == ip_of(env.node());
            if !own {
                let text = format!("{address} is not an address of {}", env.node());
                return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, text));
            }
            (Port::Tcp(address.port()), Address::Tcp(address))
        }
        Address::Unix(path) => (Port::Unix(path.clone()), Address::Unix(path)),
    };
    let key = (env.node(), port);
    if matches!(key.1, Port::Tcp(_)) && net.listeners.borrow().contains_key(&key) {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{address} is in use")));
    }
    let listening = Rc::new(Listening {
        process: env.process().number(),
        waiting: RefCell::default(),
        accepting: RefCell::default(),
    });
    net.listeners.borrow_mut().insert(key.clone(), listening.clone());
    Ok(SimListener { env, address, key, listening })
}

pub(crate) async fn connect(env: SimEnv, address: Address) -> io::Result<SimStream> {
    let world = env.world().clone();
    let from = env.node();
    let (to, port) = match &address {
        Address::Unix(path) => (from, Port::Unix(path.clone())),
        Address::Tcp(address) => (machine_at(from, *address), Port::Tcp(address.port())),
    };
    // A Unix socket and the own address never leave the machine.
    let (there, back) = if from == to {
        (0, 0)
    } else {
        (world.net().delay_ms(from, to), world.net().delay_ms(to, from))
    };
    let (sender, receiver) = oneshot::channel();
    let knock = Knock { env: env.clone(), to, port, back, sender };
    if env.process().is_alive() {
        world.after_ms(there, move |world| knock.arrive(world));
    }
    match receiver.await {
        Ok(outcome) => outcome,
        Err(_) => std::future::pending().await,
    }
}

fn machine_at(from: NodeId, address: SocketAddr) -> NodeId {
    match address.ip() {
        ip if ip.is_loopback() || ip.is_unspecified() => from,
        IpAddr::V4(ip) => {
            let [_, a, b, c] = ip.octets();
            NodeId(u32::from_be_bytes([0, a, b, c]))
        }
        // No machine has a version 6 address: nobody answers there.
        IpAddr::V6(_) => NodeId(u32::MAX),
    }
}

/// A request to connect, on its way.
struct Knock {
    env: SimEnv,
    to: NodeId,
    port: Port,
    back: u64,
    sender: oneshot::Sender<io::Result<SimStream>>,
}

impl Knock {
    fn arrive(self, world: &World) {
        let from = self.env.node();
        if !self.env.process().is_alive() {
            return;
        }
        let net = world.net();
        let reachable = from == self.to
            || !net.link(from, self.to).cut
                && !net.link(self.to, from).cut
                && world.machine(self.to).is_some_and(|machine| machine.is_powered());
        if !reachable {
            // The kernel knocks again and gives up after a while; a few seconds here.
            let after = net.rng.between(1_000, 20_000);
            let sender = self.sender;
            world.after_ms(after, move |_| {
                let _ = sender.send(Err(io::ErrorKind::TimedOut.into()));
            });
            return;
        }
        let listening = net.listening(self.to, &self.port);
        let outcome = match listening {
            Some(listening) if listening.waiting.borrow().len() < BACKLOG => {
                Ok(self.establish(world, &listening))
            }
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let sender = self.sender;
        world.after_ms(self.back, move |_| {
            let _ = sender.send(outcome);
        });
    }

    fn establish(&self, world: &World, listening: &Listening) -> SimStream {
        let net = world.net();
        let number = net.numbered.replace(net.numbered.get() + 1);
        let from = self.env.node();
        world.note(format!("connection {number} from {from} to {} {:?}", self.to, self.port));
        let ends = [(from, self.env.process().number()), (self.to, listening.process)];
        let connection = Connection::new(number, ends);
        net.connections.borrow_mut().insert(number, connection.clone());
        let name = match &self.port {
            Port::Tcp(_) => format!("{}", SocketAddr::new(ip_of(from), 0)),
            Port::Unix(_) => "unix".to_owned(),
        };
        listening.waiting.borrow_mut().push_back((SimStreamEnd(connection.clone()), name));
        if let Some(waker) = listening.accepting.borrow_mut().take() {
            waker.wake();
        }
        SimStream::new(self.env.clone(), connection, 0)
    }
}

/// A listening socket.
pub struct SimListener {
    env: SimEnv,
    address: Address,
    key: (NodeId, Port),
    listening: Rc<Listening>,
}

impl Listener for SimListener {
    type Stream = SimStream;

    async fn accept(&self) -> io::Result<(SimStream, String)> {
        let (end, name) = std::future::poll_fn(|cx| {
            if let Some(next) = self.listening.waiting.borrow_mut().pop_front() {
                return Poll::Ready(next);
            }
            self.listening.accepting.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
        Ok((SimStream::new(self.env.clone(), end.0, 1), name))
    }

    fn address(&self) -> Address {
        self.address.clone()
    }
}

impl Drop for SimListener {
    fn drop(&mut self) {
        if !self.env.process().is_alive() {
            return;
        }
        let net = self.env.world().net();
        let mut listeners = net.listeners.borrow_mut();
        // A Unix socket may have been replaced by a newer one of the same path.
        if listeners.get(&self.key).is_some_and(|there| Rc::ptr_eq(there, &self.listening)) {
            listeners.remove(&self.key);
        }
        drop(listeners);
        for (end, _) in self.listening.waiting.take() {
            end.0.reset_both(self.env.world());
        }
    }
}
