//! A cluster and the driver's controller on this host, the node's service in a guest with the kernel's
//! NBD client, and a writer in there.

use std::ops::Deref;

use ballast_csi_shim::steps::{self, Step};
use ballast_csi_shim::v1::NodeGetInfoRequest;
use ballast_e2e::cluster::{Cluster, Node, Options};
use ballast_e2e::process;
use ballast_e2e::vm::{self, Guest, Held};
use ballast_e2e::wait::{until, until_true};

use crate::csi_driver::{Driver, HOST};

/// Seconds that a writer may stand still when its connection is lost: until Linux asks again what was under
/// way (`REQUEST_SECONDS` in csi-shim/src/limits.rs), and for an emulated machine to do so.
const STALL: f64 = 30.0;

/// What a kernel says when a request of a disk or file system failed.
const FAILED: &str = "I/O error|EXT4-fs error|EXT4-fs warning|XFS.*(error|orrupt)";

/// A cluster, and a driver whose node is a guest. Paths mean the same here and there.
pub struct InGuest {
    driver: Driver,
    /// The cluster.
    pub cluster: Cluster,
    guest: Held,
}

impl Deref for InGuest {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl InGuest {
    /// Starts three nodes, the controller, and the node's service in the guest.
    #[track_caller]
    pub fn start(test: &str) -> InGuest {
        let guest = Guest::take();
        let cluster = Cluster::with(test, &Options { volume_mib: 16, ..Options::default() });
        let mut driver = Driver::new(&cluster.scratch, "csi", "controller", HOST);
        driver.start(&cluster.nodes(), None);
        driver.send_node_calls_to(guest.relay());
        let started = InGuest { driver, cluster, guest };
        started.start_node();
        started
    }

    /// Runs a script in the guest, and returns what it printed.
    #[track_caller]
    pub fn run(&self, script: &str) -> String {
        self.guest.run(script)
    }

    /// Starts the node's service and waits until it answers. Its log goes to the guest's console.
    #[track_caller]
    pub fn start_node(&self) {
        self.start_node_stopping_at(None);
    }

    /// As [`InGuest::start_node`], one that stops itself at this step.
    #[track_caller]
    pub fn start_node_stopping_at(&self, step: Option<Step>) {
        let stop_at = step.map(|step| format!("export {}={step:?};", steps::STOP_AT));
        let stop_at = stop_at.unwrap_or_default();
        let list = |address: fn(&Node) -> &str| {
            let addresses = self.cluster.nodes();
            let addresses: Vec<&str> = addresses.iter().map(address).collect();
            addresses.join(",").replace("127.0.0.1", vm::HOST)
        };
        let daemons = list(|node| &node.grpc);
        let nbd = list(|node| node.nbd.trim_start_matches("nbd://").trim_end_matches('/'));
        let (state, pid) = (self.file("state"), self.file("node.pid"));
        self.run(&format!(
            "mkdir -p {state}
            sh -c '{stop_at} echo $$ >{pid}; exec ballast-csi --mode node --endpoint unix:///run/csi.sock \
                --ballast {daemons} --node-id {HOST} --state-dir {state} --nbd kernel \
                --nbd-address {nbd}' 2>&1 | cat >/dev/console &"
        ));
        until_true("the driver in the guest", 60, || {
            let request = NodeGetInfoRequest {};
            self.node(async |mut it| it.node_get_info(request).await).is_ok()
        });
    }

    /// Kills the node's service.
    #[track_caller]
    pub fn kill_node(&self) {
        let pid = self.file("node.pid");
        self.run(&format!(
            "pid=$(cat {pid})
            kill -9 $pid
            while [ -e /proc/$pid/exe ]; do usleep 10000; done"
        ));
    }

    /// Makes a call, kills the node's service where it stops itself in it, and starts another one.
    #[track_caller]
    pub fn killed_at(&self, step: Step, call: impl FnOnce(&Driver) + Send) {
        self.kill_node();
        self.start_node_stopping_at(Some(step));
        let state = format!("grep State: /proc/$(cat {})/status", self.file("node.pid"));
        let driver = &self.driver;
        std::thread::scope(|scope| {
            let caller = scope.spawn(move || call(driver));
            until_true("the step", 60, || {
                assert!(!caller.is_finished(), "the call ended without {step:?}");
                self.run(&state).contains("T (stopped)")
            });
            self.kill_node();
        });
        self.start_node();
    }

    /// What the guest wrote on its console so far: the node's service logs there.
    pub fn console(&self) -> String {
        self.guest.console()
    }

    /// The storage node that the guest's kernel is connected to.
    #[track_caller]
    pub fn serving(&self) -> u32 {
        until("a connection of the guest's kernel", 60, || self.served_by().first().copied())
    }

    /// The storage nodes that the guest's kernel, or driver, has NBD connections to.
    #[track_caller]
    pub fn served_by(&self) -> Vec<u32> {
        let peers: Vec<String> = self.connections().into_iter().map(|(_, peer)| peer).collect();
        let nodes = self.cluster.nodes().into_iter();
        nodes.filter(|node| peers.contains(&nbd_address(node))).map(|node| node.id).collect()
    }

    /// The NBD connections of the guest's kernel, or driver: near ends and far ends.
    #[track_caller]
    pub fn connections(&self) -> Vec<(String, String)> {
        let all = self.run("ss -tnH state established | awk '{ print $3, $4 }'");
        let ours: Vec<String> = self.cluster.nodes().iter().map(nbd_address).collect();
        let ends = all.lines().filter_map(|line| line.split_once(' '));
        let ends = ends.map(|(near, far)| (near.to_owned(), far.to_owned()));
        let mut ends: Vec<_> = ends.filter(|(_, far)| ours.contains(far)).collect();
        ends.sort();
        ends
    }

    /// Nothing of any volume is left, in the guest or the cluster: no mount, device, record, lease. Then the
    /// node's service is ended, too.
    #[track_caller]
    pub fn end(self) {
        let looks = format!(
            "grep -E '/dev/nbd|{}' /proc/self/mounts || true
            ls /sys/block/nbd*/pid 2>/dev/null || true
            find {} ! -type d",
            self.file(""),
            self.file("state")
        );
        assert_eq!(self.run(&looks), "", "left in the guest");
        until_true("no lease on node 1", 20, || {
            let leases = self.cluster.ballastctl(1, &["lease", "list", "-o", "json"]);
            !leases.contains("\"host\"")
        });
        self.kill_node();
    }
}

/// Where a node serves NBD, as the guest has it.
fn nbd_address(node: &Node) -> String {
    let port = node.nbd.trim_end_matches('/').rsplit(':').next();
    format!("{}:{}", vm::HOST, port.expect("an address has a port"))
}

/// Numbered blocks of 4 KiB, each on the disk before the next is written.
pub struct Writer<'a> {
    host: &'a InGuest,
    /// What it writes.
    file: String,
    /// A line after each block, with its number and the time.
    log: String,
    /// A file that ends it.
    stop: String,
}

impl Writer<'_> {
    /// Starts it, for a file in this folder.
    #[track_caller]
    pub fn start<'a>(host: &'a InGuest, folder: &str) -> Writer<'a> {
        let (file, log, stop) =
            (format!("{folder}/blocks"), format!("{folder}.log"), format!("{folder}.stop"));
        host.run(&format!(
            "dmesg -c >/dev/null
            rm -f {file} {log} {stop}
            {{
                i=0
                while [ ! -e {stop} ]; do
                    printf '%4095d\\n' $i |
                        dd of={file} bs=4k seek=$i conv=notrunc,fsync iflag=fullblock status=none ||
                        {{ echo failed >>{log}; exit 1; }}
                    i=$((i + 1))
                    read -r time idle </proc/uptime
                    echo \"$i $time\" >>{log}
                done
                echo stopped >>{log}
            }} >/dev/console 2>&1 &"
        ));
        let writer = Writer { host, file, log, stop };
        writer.goes_on();
        writer
    }

    /// What it noted.
    pub fn log(&self) -> Vec<String> {
        let log = self.host.run(&format!("cat {} 2>/dev/null || true", self.log));
        log.lines().map(str::to_owned).collect()
    }

    #[track_caller]
    fn written(&self) -> usize {
        let log = self.log();
        assert!(!log.iter().any(|line| line == "failed"), "the writer got an error");
        log.len()
    }

    /// Waits for ten blocks more.
    #[track_caller]
    pub fn goes_on(&self) {
        let before = self.written();
        until_true("writes", 60, || self.written() >= before + 10);
    }

    /// Stops it: no request has failed, it never stood still for too long, and what is on the disk is
    /// what was written.
    #[track_caller]
    pub fn stop(&self, what: &str) {
        self.host.run(&format!("touch {}", self.stop));
        until_true("the writer's end", 60, || {
            self.log().last().is_some_and(|line| line == "stopped" || line == "failed")
        });
        let errors = self.host.run(&format!("dmesg | grep -E '{FAILED}' || true"));
        assert_eq!(errors, "", "{what}: the kernel saw errors");
        let blocks = self.written() - 1;
        let read = format!("echo 3 >/proc/sys/vm/drop_caches\nsha256sum <{}", self.file);
        let wanted = format!("for ((i = 0; i < {blocks}; i++)); do printf '%4095d\\n' $i; done");
        let wanted = process::run("bash", &["-c", &format!("({wanted}) | sha256sum")]);
        assert_eq!(self.host.run(&read), wanted, "{what}: {blocks} blocks");
        let stall = longest_stall(&self.log());
        println!("{what}: {blocks} blocks, longest stall {stall:.1} s");
        assert!(stall < STALL, "{what}: a stall of {stall:.1} s");
    }
}

fn longest_stall(log: &[String]) -> f64 {
    let times = log.iter().filter_map(|line| line.split_once(' ')?.1.parse::<f64>().ok());
    let times: Vec<f64> = times.collect();
    times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max)
}
