//! Three nodes as `ballastd dev` starts them, and what can be done to them.
//!
//! Knows what users know: the command line, `dev.json`, the administration interface, metrics.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use ballast_api::v1 as api;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::network::Island;
use crate::process::{self, Running};
use crate::scratch::{self, Scratch};
use crate::{http, wait};

/// Seconds within which nodes and volumes must be ready.
const READY: u64 = 60;
/// Bytes per MiB.
pub const MIB: u64 = 1 << 20;

/// Pools are allocated in full: more than most tests write, and no more.
const POOL_SIZE: &str = "1536MiB";

/// How to start.
#[derive(Debug, Clone)]
pub struct Options {
    /// Nodes: 1, 3 or 5.
    pub nodes: u32,
    /// Size of the volume `demo`, in MiB.
    pub volume_mib: u64,
    /// More command line for `ballastd dev`.
    pub more: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options { nodes: 3, volume_mib: 1024, more: Vec::new() }
    }
}

/// One node, as `dev.json` describes it.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its number.
    pub id: u32,
    /// Its process.
    pub pid: u32,
    /// `nbd://HOST:PORT`, to be followed by the name of a volume.
    pub nbd: String,
    /// Address of the administration interface.
    pub grpc: String,
    /// Address of the metrics page.
    pub metrics: String,
}

/// A development cluster with the volume `demo`.
pub struct Cluster {
    /// Its folder and that of the test.
    pub scratch: Scratch,
    supervisor: Running,
    restarted: BTreeMap<u32, Running>,
    islands: BTreeMap<u32, Island>,
    runtime: tokio::runtime::Runtime,
}

impl Cluster {
    /// Starts three nodes with a volume `demo` of 1 GiB and waits until they serve it.
    ///
    /// # Panics
    /// When they do not come up.
    #[track_caller]
    pub fn start(test: &str) -> Cluster {
        Cluster::with(test, &Options::default())
    }

    /// Starts nodes as wanted.
    ///
    /// # Panics
    /// When they do not come up.
    #[track_caller]
    pub fn with(test: &str, options: &Options) -> Cluster {
        let scratch = Scratch::new(test);
        let starting = one_at_a_time();
        let supervisor = start_dev(&scratch, options);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let (restarted, islands) = (BTreeMap::new(), BTreeMap::new());
        let mut cluster = Cluster { scratch, supervisor, restarted, islands, runtime };
        cluster.wait_nodes(options.nodes);
        drop(starting);
        cluster.wait_ready(options.nodes);
        cluster
    }

    #[track_caller]
    fn wait_nodes(&mut self, nodes: u32) {
        wait::until_true("the nodes", READY, || {
            let running = self.supervisor.is_running();
            assert!(running, "ballastd dev ended: {}", self.supervisor.log());
            read_nodes(&self.data()).len() == nodes as usize
        });
        for node in self.nodes() {
            self.wait_node(node.id);
        }
    }

    #[track_caller]
    fn wait_ready(&mut self, nodes: u32) {
        self.wait_nodes(nodes);
        self.wait_in_sync("demo");
        // Nodes may know a volume before the supervisor hears that it is made; one that is killed
        // then takes the supervisor with it.
        wait::until_true("the volume in dev.json", READY, || {
            let volumes = read_dev(&self.data())["volumes"].as_array().cloned();
            volumes.is_some_and(|volumes| volumes.iter().any(|volume| volume["name"] == "demo"))
        });
    }

    /// The folder given as `--data`.
    pub fn data(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    /// All nodes, as `dev.json` has them now.
    pub fn nodes(&self) -> Vec<Node> {
        read_nodes(&self.data())
    }

    /// One node, as `dev.json` has it now.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn node(&self, id: u32) -> Node {
        let node = self.nodes().into_iter().find(|node| node.id == id);
        node.unwrap_or_else(|| panic!("no node {id} in dev.json"))
    }

    /// Where this node serves `demo`.
    pub fn uri(&self, id: u32) -> String {
        format!("{}/demo", self.node(id).nbd.trim_end_matches('/'))
    }

    /// Kills a node's process and waits until it is gone.
    pub fn kill(&mut self, id: u32) {
        process::kill_and_wait(self.node(id).pid);
        self.restarted.remove(&id);
    }

    /// Kills all nodes, none of them later than the others by more than it takes to say so.
    pub fn kill_all(&mut self) {
        let pids: Vec<u32> = self.nodes().iter().map(|node| node.pid).collect();
        for pid in &pids {
            process::send(*pid, Signal::SIGKILL);
        }
        for pid in pids {
            process::kill_and_wait(pid);
        }
        self.restarted.clear();
    }

    /// Starts a node again without waiting for it.
    pub fn start_node(&mut self, id: u32) {
        let program = scratch::program("ballastd").display().to_string();
        let (data, number) = (self.data().display().to_string(), id.to_string());
        let command = [&program, "dev-node", "--data", &data, "--id", &number];
        let command = match self.islands.get(&id) {
            Some(island) => island.command(&command),
            None => command.iter().map(|word| word.to_string()).collect(),
        };
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        let log = self.scratch.path().join(format!("node-{id}.log"));
        self.restarted.insert(id, Running::start(&log, &words, false));
    }

    /// Waits until a node's process answers that it is ready.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait_node(&mut self, id: u32) {
        wait::until_true(&format!("node {id}"), READY, || {
            if let Some(process) = self.restarted.get_mut(&id)
                && !process.is_running()
            {
                panic!("ballastd dev-node {id} ended: {}", process.log());
            }
            self.nodes().iter().any(|node| node.id == id) && self.is_ready(id)
        });
    }

    /// Starts a node again and waits until it is ready.
    #[track_caller]
    pub fn restart(&mut self, id: u32) {
        self.start_node(id);
        self.wait_node(id);
    }

    /// Restarts a node in a control group of its own, so that it can be cut off.
    #[track_caller]
    pub fn move_to_island(&mut self, id: u32) {
        self.kill(id);
        self.islands.insert(id, Island::new(&format!("node{id}")));
        self.restart(id);
        self.wait_in_sync("demo");
    }

    /// The island of a node.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn island(&self, id: u32) -> &Island {
        self.islands.get(&id).expect("the node was moved to an island")
    }

    /// Sends a signal to a node. After SIGSTOP it stands still: it answers nothing that is asked later.
    ///
    /// # Panics
    /// When it does not run, or does not stand still.
    #[track_caller]
    pub fn signal(&self, id: u32, signal: Signal) {
        let pid = self.node(id).pid;
        process::send(pid, signal);
        if signal == Signal::SIGSTOP {
            wait::until_true(&format!("node {id} stands still"), READY, || {
                process::is_stopped(pid)
            });
        }
    }

    /// Ends the cluster as Ctrl-C does and returns the exit code.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn interrupt(&mut self) -> i32 {
        self.supervisor.signal(Signal::SIGINT);
        self.supervisor.wait(30)
    }

    /// Starts a cluster that was ended again, on the same folder.
    #[track_caller]
    pub fn start_again(&mut self, options: &Options) {
        self.supervisor = start_dev(&self.scratch, options);
        self.wait_ready(options.nodes);
    }

    /// What the supervisor printed.
    pub fn log(&self) -> String {
        self.supervisor.log()
    }
}

/// Questions to the administration interface.
impl Cluster {
    /// Asks a node; nothing where it can't be reached.
    pub fn ask<T>(
        &self,
        id: u32,
        call: impl AsyncFnOnce(&mut api::admin_client::AdminClient<tonic::transport::Channel>) -> T,
    ) -> Option<T> {
        let node = self.nodes().into_iter().find(|node| node.id == id)?;
        if !process::is_alive(node.pid) {
            return None;
        }
        let address = tonic::transport::Endpoint::from_shared(node.grpc).ok()?;
        let address = address.timeout(Duration::from_secs(5));
        self.runtime.block_on(async {
            let channel = address.connect().await.ok()?;
            Some(call(&mut api::admin_client::AdminClient::new(channel)).await)
        })
    }

    /// Whether a node says that it is ready.
    pub fn is_ready(&self, id: u32) -> bool {
        let answer = self.ask(id, async |client| client.health(api::HealthRequest {}).await);
        matches!(answer, Some(Ok(health)) if health.get_ref().ready)
    }

    /// The replicas of a volume, as the first node that answers sees them.
    pub fn replicas(&self, volume: &str) -> Vec<api::Replica> {
        self.replicas_seen(volume).unwrap_or_default()
    }

    fn replicas_seen(&self, volume: &str) -> Option<Vec<api::Replica>> {
        let request = || api::ListReplicasRequest { volume: volume.into(), node: String::new() };
        self.nodes().iter().find_map(|node| {
            let answer = self.ask(node.id, async |client| client.list_replicas(request()).await);
            Some(answer?.ok()?.into_inner().replicas)
        })
    }

    /// The node that leads a volume.
    ///
    /// # Panics
    /// When none does for long.
    #[track_caller]
    pub fn leader(&self, volume: &str) -> u32 {
        let leads = |replica: &api::Replica| {
            replica.live && replica.role == api::ReplicaRole::Leader as i32
        };
        wait::until("a leader", READY, || {
            let leaders = self.replicas(volume).into_iter().filter(leads);
            // One that was voted out and has not heard of it yet says that it leads, too.
            leaders.max_by_key(|replica| replica.term).map(|replica| replica.node)
        })
    }

    /// Moves the leader of a volume to a node.
    ///
    /// # Panics
    /// When it does not go there.
    #[track_caller]
    pub fn move_leader(&self, volume: &str, node: u32) {
        wait::until_true(&format!("the leader on node {node}"), READY, || {
            let request =
                || api::MoveLeaderRequest { volume: volume.into(), node: node.to_string() };
            let moved = self.ask(node, async |client| client.move_leader(request()).await);
            matches!(moved, Some(Ok(answer)) if answer.get_ref().leader_node == node)
        });
    }

    /// Waits until every replica of a volume is live, in sync and has applied the same.
    ///
    /// # Panics
    /// When that does not come.
    #[track_caller]
    pub fn wait_in_sync(&self, volume: &str) {
        wait::until_true(&format!("replicas of {volume} in sync"), 2 * READY, || {
            let replicas = self.replicas(volume);
            let leads = |r: &api::Replica| r.role == api::ReplicaRole::Leader as i32;
            !replicas.is_empty()
                && replicas.iter().any(leads)
                && replicas.iter().all(|replica| replica.live && replica.in_sync)
        });
    }

    /// Waits until every node that runs has heard that a volume can be used: who made it was answered
    /// when one of them had, and a client that opens it at another one would be told that there is none.
    ///
    /// # Panics
    /// When one does not hear of it.
    #[track_caller]
    pub fn wait_known(&self, volume: &str) {
        let is_ready =
            |it: &api::Volume| it.name == volume && it.phase == api::VolumePhase::Ready as i32;
        for node in self.nodes().iter().filter(|node| process::is_alive(node.pid)) {
            wait::until_true(&format!("node {} knows {volume}", node.id), READY, || {
                let request = api::ListVolumesRequest::default;
                let answer = self.ask(node.id, async |it| it.list_volumes(request()).await);
                matches!(answer, Some(Ok(list)) if list.get_ref().volumes.iter().any(is_ready))
            });
        }
    }

    /// Reads the whole of `demo` from each node's own replica, by letting each lead in turn, and
    /// compares.
    ///
    /// # Panics
    /// When two replicas differ.
    #[track_caller]
    pub fn assert_replicas_are_equal(&self) {
        let nodes: Vec<u32> = self.replicas("demo").iter().map(|replica| replica.node).collect();
        let mut sums = Vec::new();
        for node in nodes {
            self.wait_in_sync("demo");
            self.move_leader("demo", node);
            let read = format!("nbdcopy '{}' - | sha256sum", self.uri(node));
            sums.push((node, process::run("bash", &["-o", "pipefail", "-c", &read])));
            assert_eq!(self.leader("demo"), node, "the leader moved during the comparison");
        }
        assert!(sums.windows(2).all(|pair| pair[0].1 == pair[1].1), "replicas differ: {sums:?}");
    }

    /// The metrics page of a node.
    ///
    /// # Panics
    /// When it is not served.
    #[track_caller]
    pub fn metrics(&self, id: u32) -> String {
        let url = self.node(id).metrics;
        let (status, body) = http::get(&url).unwrap_or_else(|error| panic!("{url}: {error}"));
        assert_eq!(status, 200, "{url}: {body}");
        body
    }

    /// The metrics page of a node, if it answers.
    pub fn try_metrics(&self, id: u32) -> Option<String> {
        http::get(&self.node(id).metrics).ok().map(|(_, body)| body)
    }

    /// The sum of a metric of a node over all its labels; 0 where it has none.
    ///
    /// # Panics
    /// When the page is not served.
    #[track_caller]
    pub fn metric(&self, id: u32, name: &str) -> u64 {
        let page = self.metrics(id);
        let of = |line: &str| {
            let rest = line.strip_prefix(name)?;
            let labelled = rest.starts_with(' ') || rest.starts_with('{');
            if labelled { rest.rsplit(' ').next()?.parse::<f64>().ok() } else { None }
        };
        page.lines().filter_map(of).sum::<f64>() as u64
    }

    /// Runs `ballastctl` against a node and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ballastctl(&self, id: u32, arguments: &[&str]) -> String {
        let program = scratch::program("ballastctl").display().to_string();
        let grpc = self.node(id).grpc;
        process::run(&program, &[&["--endpoint", &grpc], arguments].concat())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_end("ballastd dev", &self.supervisor);
            self.restarted.iter().for_each(|(id, it)| print_end(&format!("node {id}"), it));
        }
        // First the supervisor, which might start nodes again, then whatever names our folder.
        let _ = process::output("kill", &["-KILL", &self.supervisor.pid().to_string()]);
        self.restarted.clear();
        for pid in process::with_argument_below(&self.data()) {
            process::kill_and_wait(pid);
        }
        // What stays of a failed test are its logs, not gigabytes; unless they are wanted.
        if std::env::var_os("BALLAST_E2E_KEEP").is_none() {
            for node in 1..=5 {
                let folder = self.data().join(format!("node-{node}"));
                for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                    if file.file_name().to_string_lossy().starts_with("pool") {
                        let _ = std::fs::remove_file(file.path());
                    }
                }
            }
        }
    }
}

fn print_end(name: &str, process: &Running) {
    let log = process.log();
    let tail: Vec<&str> = log.lines().rev().take(40).collect();
    eprintln!("the end of {name}'s log, last line first:\n{}", tail.join("\n"));
}

/// Held until the nodes listen: a cluster takes ports that are free, and listens on them a moment later.
/// Tests of two programs run at the same time.
fn one_at_a_time() -> File {
    let path = scratch::root().join("starting");
    let file = File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    file.lock().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    file
}

fn start_dev(scratch: &Scratch, options: &Options) -> Running {
    let program = scratch::program("ballastd").display().to_string();
    let (data, nodes) = (scratch.file("data"), options.nodes.to_string());
    let volume = format!("demo={}MiB", options.volume_mib);
    let mut command = vec![program.as_str(), "dev", "--data", &data, "--nodes", &nodes];
    command.extend(["--volume", &volume]);
    if !options.more.iter().any(|word| word == "--pool-size") {
        command.extend(["--pool-size", POOL_SIZE]);
    }
    command.extend(options.more.iter().map(String::as_str));
    Running::start(&scratch.path().join("dev.log"), &command, false)
}

/// What `dev.json` says; nothing while it is being written.
fn read_dev(data: &std::path::Path) -> Value {
    let text = std::fs::read_to_string(data.join("dev.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

/// The nodes in `dev.json`.
fn read_nodes(data: &std::path::Path) -> Vec<Node> {
    let json = read_dev(data);
    let list = json["nodes"].as_array().or_else(|| json.as_array()).cloned().unwrap_or_default();
    let text = |node: &Value, name: &str| node[name].as_str().map(str::to_string);
    list.iter()
        .filter_map(|node| {
            Some(Node {
                id: u32::try_from(node["id"].as_u64()?).ok()?,
                pid: u32::try_from(node["pid"].as_u64()?).ok()?,
                nbd: text(node, "nbd")?,
                grpc: text(node, "grpc")?,
                metrics: text(node, "metrics")?,
            })
        })
        .collect()
}
