//! A StatefulSet's life without Kubernetes: what its sidecars and kubelets would call, with two hosts
//! of which the first dies, or is cut off and lives on.
//!
//! Both hosts share this machine's kernel. So a dead host's mounts and loop devices are still there,
//! as they are where only its processes died; and each host is a control group whose network can be cut.

mod csi_driver;

use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

use ballast_csi_shim::v1::VolumeCapability;
use ballast_csi_shim::v1::volume_capability::AccessType;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::commits::Commits;
use ballast_e2e::postgres::{Postgres, forget_server};
use ballast_e2e::process::{self, Running, output, run};
use ballast_e2e::scratch::{self, Scratch};
use ballast_e2e::wait::until_true;
use csi_driver::{Driver, MIB, Used, block, bytes_of, left, may_grow_ext4, mounted};
use nix::sys::signal::Signal;

const FIRST: &str = "node-1";
const SECOND: &str = "node-2";
const DATABASE_MIB: i64 = 512;
const RAW_MIB: i64 = 64;
/// What each host writes over the whole first block of the raw device.
const PATTERNS: (u8, u8) = (0x11, 0x22);

/// From the forced move to the new holder's first durable write: attached, checked and mounted on
/// the way. Most of it is an election, or the five seconds until the controller leaves a daemon that
/// it asked last and that is cut off.
const MOVE_TIME: Duration = Duration::from_secs(10);

/// How the first host goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// All of its processes at once.
    Killed,
    /// Nothing crosses its border any more. It does not know, and writes on.
    CutOff,
}

/// A volume in use on a host.
struct Placed {
    used: Used,
    target: String,
}

/// The hosts go first, with their mounts, the cluster last.
struct Life {
    first: Driver,
    second: Driver,
    controller: Driver,
    home: Scratch,
    cluster: Cluster,
}

impl Life {
    fn start(test: &str) -> Life {
        let options = Options { volume_mib: 16, ..Options::default() };
        let mut cluster = Cluster::with(test, &options);
        cluster.move_to_island(1);
        let new = |folder, mode, host| Driver::new(&cluster.scratch, folder, mode, host);
        let first = new("host-1", "node", FIRST);
        let second = new("host-2", "node", SECOND);
        let controller = new("controller", "controller", "node-3");
        let home = Scratch::public(test);
        let mut life = Life { first, second, controller, home, cluster };
        life.start_first();
        let mut nodes = life.cluster.nodes();
        life.controller.start(&nodes, None);
        // Its own node first, as the controller would have it with a port for all.
        nodes.rotate_left(1);
        life.second.start(&nodes, None);
        life
    }

    fn start_first(&mut self) {
        self.first.start(&self.cluster.nodes(), Some(self.cluster.island(1)));
    }

    /// What an orchestrator does when a pod comes to a host: publish, stage, publish there.
    #[track_caller]
    fn bring(&self, host: &Driver, used: &Used) -> Placed {
        let mut used = used.clone();
        used.context = self.controller.attach_to(&used, host.host()).expect("it is published");
        let name = &used.context["volume"];
        let target = self.home.file(&format!("{}/{name}", host.host()));
        used.staging = host.file(&format!("{name}.staging"));
        fs::create_dir_all(&used.staging).expect("a folder can be made");
        host.stage(&used).expect("it is staged");
        host.publish_at(&used, &target).expect("it is published on the host");
        Placed { used, target }
    }

    /// What it does when a host is out of service: the lease is taken away unasked, and the pod
    /// comes to the other host. Back when that one has written something.
    #[track_caller]
    fn move_by_force(&self, used: &Used, first_write: impl Fn(&str)) -> Placed {
        let start = Instant::now();
        self.controller.release_from(used, FIRST).expect("the lease is taken away");
        let placed = self.bring(&self.second, used);
        first_write(&placed.target);
        let took = start.elapsed();
        println!("{}: first write of the new holder after {took:?}", placed.used.context["volume"]);
        assert!(took <= MOVE_TIME, "{took:?}");
        placed
    }

    /// The processes of the first host, all at once: its storage node, its driver, its links.
    fn kill_first(&mut self, database: Postgres) {
        let mut pids = self.first.links();
        assert_eq!(pids.len(), 2, "a link for each volume");
        pids.extend([self.cluster.node(1).pid, self.first.process().pid()]);
        for pid in &pids {
            process::send(*pid, Signal::SIGKILL);
        }
        database.kill();
        for pid in pids {
            process::kill_and_wait(pid);
        }
        self.cluster.kill(1);
    }

    fn cut_first(&self) {
        let node = self.cluster.node(1);
        let port = |url: &str| {
            let port = url.trim_end_matches('/').rsplit(':').next().map(str::parse);
            port.expect("an address has a port").expect("a port is a number")
        };
        self.cluster.island(1).cut_around(&[port(&node.nbd), port(&node.grpc)]);
    }

    /// No server opens an export of the first host's lease, and a link that tries says why.
    fn assert_refused(&self, old: &Placed) {
        let (volume, epoch) = (&old.used.context["volume"], &old.used.context["epoch"]);
        let export = format!("{volume}@lease={epoch}");
        let program = scratch::program("ballast-csi").display().to_string();
        let file = self.cluster.scratch.file("old-link");
        fs::write(&file, "").expect("a file can be made");
        for node in self.cluster.nodes() {
            let server = node.nbd.trim_start_matches("nbd://").trim_end_matches('/');
            let opened = output("nbdinfo", &["--size", &format!("nbd://{server}/{export}")]);
            assert!(!opened.status.success(), "node {} opens {export}", node.id);
            let link = ["fuse-link", "--file", &file, "--export", &export, "--address", server];
            let link = output(&program, &link);
            let said = String::from_utf8_lossy(&link.stderr).into_owned();
            assert!(!link.status.success() && said.contains("is not in force"), "{said}");
        }
    }

    /// What an orchestrator does on a host whose pod is gone.
    #[track_caller]
    fn leave(&self, host: &Driver, placed: &Placed) {
        for _ in 0..2 {
            host.unpublish_at(&placed.used, &placed.target).expect("it is unpublished");
            host.unstage(&placed.used).expect("it is unstaged");
        }
        assert!(!fs::exists(&placed.target).expect("the folder can be read"), "the target stays");
    }

    /// No lease, volume, replica, mount, loop device, link, record, NBD session.
    #[track_caller]
    fn assert_nothing_left(&self) {
        self.first.assert_nothing_left();
        self.second.assert_nothing_left();
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the table is there");
        assert!(!mounts.contains(&self.home.file("")), "{mounts}");
        left::assert_cluster_is_empty(&self.cluster);
        for node in self.cluster.nodes() {
            let port = node.nbd.trim_end_matches('/').rsplit(':').next().unwrap_or_default();
            let of_server = ["-Htn", "state", "established", "sport", "=", &format!(":{port}")];
            until_true("the end of all NBD connections", 30, || run("ss", &of_server).is_empty());
        }
    }
}

/// The first block of a raw device, all of one byte, past every cache.
fn write_command(target: &str, pattern: u8) -> [String; 3] {
    let fill = format!("head -c 4096 /dev/zero | tr '\\0' '\\{pattern:03o}'");
    let write = format!("{fill} | dd of='{target}' bs=4096 count=1 iflag=fullblock oflag=direct");
    ["bash".to_owned(), "-c".to_owned(), format!("{write} status=none")]
}

fn writes(target: &str, pattern: u8) -> bool {
    let [program, first, second] = write_command(target, pattern);
    output(&program, &[&first, &second]).status.success()
}

fn first_block(target: &str) -> Vec<u8> {
    let read = ["if=".to_owned() + target, "of=/dev/stdout".to_owned()];
    let read = [&read[0], &read[1], "bs=4096", "count=1", "iflag=direct", "status=none"];
    output("dd", &read).stdout
}

fn create_durable(path: &str) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(path.as_bytes())?;
    file.sync_all()
}

fn database_volume(fs_type: &str) -> VolumeCapability {
    let mut capability = mounted(Mode::SingleNodeWriter, fs_type);
    if let Some(AccessType::Mount(mount)) = &mut capability.access_type
        && fs_type == "xfs"
    {
        // Both hosts' mounts are of one kernel here, which refuses the same file system twice.
        mount.mount_flags.push("nouuid".to_owned());
    }
    capability
}

/// What the first host had.
struct Old {
    db: Placed,
    raw: Placed,
    load: Commits,
    /// Where it lives on: its database, and a write to the raw device.
    living: Option<(Postgres, Running)>,
}

fn live(test: &str, death: Death, fs_type: &str) {
    let mut life = Life::start(test);
    let logs = life.cluster.scratch.path().to_owned();
    let db = life.controller.create_volume("db", DATABASE_MIB, database_volume(fs_type));
    let raw = life.controller.create_volume("raw", RAW_MIB, block(Mode::SingleNodeWriter));
    let mut old = begin_and_go(&mut life, death, &db, &raw);

    let new_db = life.move_by_force(&db, |target| {
        create_durable(&format!("{target}/first-write")).expect("the new holder writes");
    });
    let new_raw = life.move_by_force(&raw, |target| assert!(writes(target, PATTERNS.1)));
    forget_server(new_db.target.as_ref());
    let server = Postgres::start(new_db.target.as_ref(), &logs.join("postgres-2.log"));
    old.load.assert_there(&server);
    let mut load = Commits::start(&server, &logs, "load-2", 100, 20);
    until_true("commits on the second host", 60, || load.returned() > 200);
    // With the second host writing.
    come_back(&mut life, &mut old);

    grow_twice(&life, &new_db, fs_type);
    assert_eq!(load.wait(60), 0, "pgbench: {}", load.said());
    assert_eq!(first_block(&new_raw.target), vec![PATTERNS.1; 4096], "the new holder's block");
    grow_raw_twice(&life, &new_raw);
    old.load.assert_there(&server);
    load.assert_there(&server);
    server.stop();
    for placed in [&new_db, &new_raw] {
        life.leave(&life.second, placed);
        for _ in 0..2 {
            life.controller.release_from(&placed.used, SECOND).expect("the lease is given back");
            life.controller.delete(&placed.used).expect("it is deleted");
        }
    }
    life.assert_nothing_left();
}

/// A database and a writer of raw blocks on the first host, which then goes. Where it lives on, so
/// do they.
fn begin_and_go(life: &mut Life, death: Death, db: &Used, raw: &Used) -> Old {
    let logs = life.cluster.scratch.path().to_owned();
    let (db, raw) = (life.bring(&life.first, db), life.bring(&life.first, raw));
    assert!(writes(&raw.target, PATTERNS.0));
    let server = Postgres::start(db.target.as_ref(), &logs.join("postgres-1.log"));
    Commits::prepare(&server, &[0, 100]);
    let mut load = Commits::start(&server, &logs, "load-1", 0, 600);
    until_true("commits", 60, || load.returned() > 200);
    let living = match death {
        Death::Killed => {
            life.kill_first(server);
            assert_ne!(load.wait(60), 0, "pgbench without its server");
            None
        }
        Death::CutOff => {
            life.cut_first();
            let write = write_command(&raw.target, PATTERNS.0);
            let write: Vec<&str> = write.iter().map(String::as_str).collect();
            Some((server, Running::start(&logs.join("writer.log"), &write, false)))
        }
    };
    Old { db, raw, load, living }
}

/// The first host finds that it may write no more, and is cleaned up although it has no lease.
fn come_back(life: &mut Life, old: &mut Old) {
    match old.living.take() {
        None => {
            life.cluster.restart(1);
            life.start_first();
        }
        Some((server, mut writer)) => {
            assert!(writer.is_running(), "a write without a quorum: {}", writer.log());
            life.cluster.island(1).heal();
            assert_ne!(writer.wait(60), 0, "a write of the old holder");
            assert_ne!(old.load.wait(60), 0, "commits of the old holder");
            server.kill();
            for pid in life.first.links() {
                let file = process::word_after(pid, "--file").expect("a link has a file");
                let log = fs::read_to_string(file.replace("/volume", "/link.log"));
                let log = log.expect("a link has a log");
                assert!(log.contains("the lease is over"), "{log}");
            }
        }
    }
    let late = create_durable(&format!("{}/late", old.db.target));
    println!("the old mount says {late:?}");
    assert!(late.is_err(), "the old mount can be written");
    assert!(!writes(&old.raw.target, PATTERNS.0), "the old device can be written");
    for placed in [&old.db, &old.raw] {
        life.assert_refused(placed);
        life.leave(&life.first, placed);
    }
    life.first.assert_nothing_left();
}

/// Under the load of the database.
#[track_caller]
fn grow_twice(life: &Life, placed: &Placed, fs_type: &str) {
    if fs_type == "ext4" && !may_grow_ext4() {
        println!("ext4 is not grown: this machine gives root no CAP_SYS_RESOURCE");
        return;
    }
    let Placed { used, target } = placed;
    let mut before = bytes_of(&life.second.stats(used, target));
    for mib in [DATABASE_MIB + 64, DATABASE_MIB + 128] {
        life.controller.expand_volume(used, mib);
        assert_eq!(life.second.expand_here(used, mib, target), mib * MIB);
        let after = bytes_of(&life.second.stats(used, target));
        assert!(after >= before + 50 * MIB, "{before} {after}");
        before = after;
    }
}

#[track_caller]
fn grow_raw_twice(life: &Life, placed: &Placed) {
    let Placed { used, target } = placed;
    for mib in [RAW_MIB + 32, RAW_MIB + 64] {
        life.controller.expand_volume(used, mib);
        assert_eq!(life.second.expand_here(used, mib, target), mib * MIB);
        let size = run("blockdev", &["--getsize64", target]);
        assert_eq!(size.trim(), (mib * MIB).to_string());
    }
}

#[test]
fn a_database_lives_on_elsewhere_when_all_processes_of_its_host_are_killed() {
    live("life-killed", Death::Killed, "ext4");
}

#[test]
fn a_database_lives_on_elsewhere_when_its_host_is_cut_off_and_writes_on() {
    live("life-cut-off", Death::CutOff, "xfs");
}
