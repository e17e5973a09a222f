//! A development cluster from its first start to its last, with real processes and clients.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Output};

use ballast_api::v1 as api;
use ballast_api::v1::admin_client::AdminClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::{Running, Scratch, assert_refused, ballastd, until};

const UP: &str = "Any NBD client";

struct Cluster {
    scratch: Scratch,
    data: String,
    supervisor: Running,
}

impl Cluster {
    fn start(test: &str, more: &[&str]) -> Self {
        let scratch = Scratch::new(test);
        let data = scratch.file("data");
        let supervisor = Self::dev(&scratch, &data, more);
        Self { scratch, data, supervisor }
    }

    fn dev(scratch: &Scratch, data: &str, more: &[&str]) -> Running {
        let arguments = [&["dev", "--data", data, "--pool-size", "512MiB"], more].concat();
        let mut running = Running::start(&scratch.0.join("dev.log"), &arguments);
        running.wait_printed(UP);
        running
    }

    fn json(&self) -> Value {
        let text = fs::read_to_string(format!("{}/dev.json", self.data)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn node(&self, id: usize, key: &str) -> String {
        self.json()["nodes"][id - 1][key].as_str().unwrap().to_owned()
    }

    fn pid(&self, id: usize) -> i32 {
        self.json()["nodes"][id - 1]["pid"].as_i64().unwrap().try_into().unwrap()
    }

    fn nbd(&self, id: usize, volume: &str) -> String {
        format!("{}/{volume}", self.node(id, "nbd"))
    }

    #[track_caller]
    fn stop(&mut self, signal: Signal) {
        self.supervisor.signal(signal);
        let ended = self.supervisor.wait();
        assert!(ended.success(), "{ended}: {}", self.supervisor.printed());
        assert_eq!(self.scratch.processes(), [0; 0], "nothing runs on");
        assert!(self.json()["nodes"][0]["pid"].is_null());
    }
}

fn ask<T>(
    grpc: String,
    question: impl AsyncFnOnce(AdminClient<tonic::transport::Channel>) -> T,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { question(AdminClient::connect(grpc).await.unwrap()).await })
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&stdout).into_owned();
    assert!(
        status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&stderr)
    );
    text
}

fn qemu_io(command: &str, uri: &str) {
    run("timeout", &["60", "qemu-io", "-f", "raw", "-c", command, uri]);
}

/// Status and body of a page; an error while nobody listens.
fn get(url: &str) -> std::io::Result<(u16, String)> {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = std::net::TcpStream::connect(host)?;
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {host}\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    Ok((status.unwrap_or(0), body.unwrap_or_default()))
}

fn http(url: &str) -> (u16, String) {
    get(url).unwrap()
}

#[test]
fn a_cluster_lives_dies_and_comes_back_with_its_data() {
    let mut cluster = Cluster::start("dev-life", &["--volume", "demo=64MiB"]);
    let uri = cluster.nbd(1, "demo");
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "67108864");
    qemu_io("write -P 0x5a 1M 1M", &uri);

    // A second one on the same folder is refused; so is a node that runs.
    assert_refused(&ballastd(&["dev", "--data", &cluster.data]), 1, "in use");
    let one = ["dev-node", "--data", &cluster.data, "--id", "2"];
    assert_refused(&ballastd(&one), 1, "in use");

    // More volumes, by any node; asked twice, it is the same one.
    let create = || {
        ask(cluster.node(2, "grpc"), async |mut admin| {
            let name = "more".to_owned();
            let request = api::CreateVolumeRequest {
                name,
                size_bytes: 1 << 20,
                replicas: 3,
                ..Default::default()
            };
            admin.create_volume(request).await.unwrap().into_inner().volume.unwrap()
        })
    };
    assert_eq!(create().id, create().id);
    // Another node hears of it a moment later.
    let listed = || run("nbdinfo", &["--list", &cluster.node(3, "nbd")]);
    until("the volume at node 3", || listed().contains("more").then_some(()));

    // A node that is killed stays away until it is started by hand; its pid is then true again.
    let before = cluster.pid(2);
    kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
    cluster.supervisor.wait_printed("node 2 ended");
    qemu_io("write -P 0x6b 2M 1M", &uri);
    let mut by_hand = Running::start(&cluster.scratch.0.join("node.log"), &one);
    by_hand.wait_printed("node serves");
    assert_ne!(cluster.pid(2), before);
    qemu_io("read -P 0x6b 2M 1M", &cluster.nbd(2, "demo"));

    // Ctrl-C ends all of it, the one started by hand too.
    cluster.stop(Signal::SIGINT);
    assert!(by_hand.wait().success(), "{}", by_hand.printed());

    cluster.supervisor = Cluster::dev(&cluster.scratch, &cluster.data, &[]);
    assert_eq!(cluster.nbd(1, "demo"), uri, "ports are kept");
    qemu_io("read -P 0x5a 1M 1M", &cluster.nbd(3, "demo"));
    qemu_io("read -P 0x6b 2M 1M", &cluster.nbd(2, "demo"));
    assert_eq!(cluster.json()["volumes"].as_array().unwrap().len(), 2);
    cluster.stop(Signal::SIGTERM);
}

#[test]
fn one_node_is_a_cluster_with_pages_for_prometheus_and_probes() {
    let mut cluster = Cluster::start("dev-one", &["--nodes", "1", "--respawn"]);
    qemu_io("write -P 0x11 0 1M", &cluster.nbd(1, "demo"));
    qemu_io("read -P 0x11 0 1M", &cluster.nbd(1, "demo"));
    let url = cluster.node(1, "metrics");
    let base = url.strip_suffix("/metrics").unwrap().to_owned();
    let (status, page) = http(&url);
    assert_eq!(status, 200);
    let file = cluster.scratch.file("metrics.txt");
    fs::write(&file, &page).unwrap();
    run("bash", &["-c", &format!("promtool check metrics <'{file}'")]);
    let documented = include_str!("../../docs/metrics.md");
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = line.split(' ').next().unwrap();
        assert!(documented.contains(&format!("`{name}`")), "{name} is not in docs/metrics.md");
    }
    for wanted in [
        "ballast_volume_bytes_total{volume=\"demo\",operation=\"write\",shard=\"0\"} 1048576",
        "ballast_raft_leader{volume=\"demo\",shard=\"0\"} 1",
        "ballast_stage_seconds_count{stage=\"commit\",shard=\"0\"}",
        "ballast_pool_writable{shard=\"0\"} 1",
        "ballast_shard_up{shard=\"0\"} 1",
    ] {
        assert!(page.contains(wanted), "no {wanted} in\n{page}");
    }
    assert_eq!(http(&format!("{base}/readyz")).0, 200);
    assert_eq!(http(&format!("{base}/healthz")).0, 200);
    assert_eq!(http(&format!("{base}/else")).0, 404);

    // With --respawn a node that died comes back by itself.
    let before = cluster.pid(1);
    kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
    until("the node", || (cluster.pid(1) != before).then_some(()));
    qemu_io_when_back(&cluster);
    cluster.stop(Signal::SIGINT);
}

fn qemu_io_when_back(cluster: &Cluster) {
    let url = cluster.node(1, "metrics").replace("/metrics", "/readyz");
    until("the node's readiness", || matches!(get(&url), Ok((200, _))).then_some(()));
    qemu_io("read -P 0x11 0 1M", &cluster.nbd(1, "demo"));
}

#[test]
fn the_cluster_ends_with_its_supervisor() {
    let mut cluster = Cluster::start("dev-orphans", &[]);
    cluster.supervisor.signal(Signal::SIGKILL);
    cluster.supervisor.wait();
    until("the end of the nodes", || cluster.scratch.processes().is_empty().then_some(()));
}

#[test]
fn alert_rules_are_valid_and_name_documented_metrics() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let rules = format!("{root}/deploy/prometheus/ballast-alerts.yaml");
    run("promtool", &["check", "rules", &rules]);
    let documented = include_str!("../../docs/metrics.md");
    let text = fs::read_to_string(&rules).unwrap();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for word in text.split(|c| !is_name(c)).filter(|word| word.starts_with("ballast_")) {
        let name = word.strip_suffix("_bucket").unwrap_or(word);
        assert!(documented.contains(&format!("`{name}`")), "{name} is not in docs/metrics.md");
    }
}
