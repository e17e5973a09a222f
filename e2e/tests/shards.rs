//! Nodes with several pools, each with a shard of its own: volumes of all shards are served through
//! every node, and a further shard's pool comes, fails and goes without the others.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use ballast_e2e::cluster::{Cluster, Options};
use ballast_e2e::disk::FailingDisk;
use ballast_e2e::machine::Machine;
use ballast_e2e::process::{self, output, run};
use ballast_e2e::scratch;
use ballast_e2e::verify::{Verify, unix_ms};
use ballast_e2e::wait;
use nix::sys::signal::Signal;
use serde_json::Value;

const POOL_SIZE: &str = "512MiB";

/// What volumes of other shards may wait when a pool fails, in milliseconds: nothing, but that this
/// machine does all at once.
const UNTOUCHED_STALL_MS_MAX: u64 = 500;

/// What a volume may wait whose leader's pool fails, in milliseconds: as when its node dies.
const FAILOVER_STALL_MS_MAX: u64 = 5000;

/// Nodes with several pools, and volumes until every shard has one.
fn start(test: &str, nodes: u32, pools: u32) -> (Cluster, BTreeMap<u64, String>) {
    let pools_text = pools.to_string();
    let more = ["--pools", &pools_text, "--pool-size", POOL_SIZE];
    let more = more.iter().map(|word| word.to_string()).collect();
    let cluster = Cluster::with(test, &Options { nodes, volume_mib: 128, more });
    let replicas = nodes.to_string();
    for number in 0..2 * pools {
        if volumes(&cluster, 1).len() as u32 == pools {
            break;
        }
        let name = format!("more-{number}");
        let create = ["volume", "create", &name, "--size", "128MiB", "--replicas", &replicas];
        cluster.ballastctl(1, &[&create[..], &["--wait"]].concat());
        cluster.wait_in_sync(&name);
    }
    let volumes = volumes(&cluster, 1);
    assert_eq!(volumes.len() as u32, pools, "every shard has a volume: {volumes:?}");
    (cluster, volumes)
}

fn json(cluster: &Cluster, node: u32, arguments: &[&str]) -> Value {
    let text = cluster.ballastctl(node, &[arguments, &["-o", "json"]].concat());
    serde_json::from_str(&text).expect("JSON")
}

/// A volume of each shard that has any.
fn volumes(cluster: &Cluster, node: u32) -> BTreeMap<u64, String> {
    let list = json(cluster, node, &["volume", "list"]);
    let volumes = list["volumes"].as_array().expect("a list").iter();
    let one = |it: &Value| (it["shard"].as_u64().unwrap(), it["name"].as_str().unwrap().into());
    volumes.map(one).collect()
}

/// The pools of a node, by their shards.
fn pools(cluster: &Cluster, asked: u32, node: u32) -> BTreeMap<u64, Value> {
    let list = json(cluster, asked, &["pool", "list", "--node", &node.to_string()]);
    let pools = list["pools"].as_array().expect("a list").iter();
    pools.map(|pool| (pool["shard"].as_u64().unwrap(), pool.clone())).collect()
}

fn uri(cluster: &Cluster, node: u32, volume: &str) -> String {
    cluster.uri(node).replace("/demo", &format!("/{volume}"))
}

fn qemu_io(uri: &str, command: &str) {
    let printed = run("qemu-io", &["-f", "raw", "-c", command, uri]);
    assert!(!printed.contains("verification failed"), "{uri}: {printed}");
}

/// A load on one volume; the client takes the nodes in turn, beginning with the first.
fn load(cluster: &Cluster, volume: &str, nodes: [u32; 3]) -> Verify {
    let uris = nodes.map(|node| uri(cluster, node, volume));
    let uris: Vec<&str> = uris.iter().map(String::as_str).collect();
    Verify::start(&cluster.scratch, &uris, &["--expect-zeroes", "--span-mib", "32"])
}

/// The value of a metric of one shard.
fn of_shard(cluster: &Cluster, node: u32, name: &str, shard: u32) -> Option<f64> {
    let page = cluster.try_metrics(node)?;
    let label = format!("shard=\"{shard}\"");
    let mut lines = page.lines();
    let line = lines.find(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with('{') && rest.contains(&label))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

fn pool_file(cluster: &Cluster, node: u32, shard: u32) -> PathBuf {
    let name = if shard == 0 { "pool".to_owned() } else { format!("pool-{shard}") };
    cluster.data().join(format!("node-{node}/{name}"))
}

fn config_file(cluster: &Cluster, node: u32) -> PathBuf {
    cluster.data().join(format!("node-{node}/config.toml"))
}

/// Ends a node in order.
fn stop(cluster: &mut Cluster, id: u32) {
    let pid = cluster.node(id).pid;
    cluster.signal(id, Signal::SIGTERM);
    wait::until_true("the node ends", 60, || !process::is_alive(pid));
    cluster.kill(id);
}

#[test]
fn volumes_of_both_shards_are_served_through_every_node() {
    let (mut cluster, volumes) = start("shards", 3, 2);
    for node in 1..=3 {
        let pools = pools(&cluster, 1, node);
        assert_eq!(pools.keys().copied().collect::<Vec<_>>(), [0, 1], "{pools:?}");
        assert!(pools.values().all(|pool| pool["state"] == "ok"), "{pools:?}");
    }
    for (shard, volume) in &volumes {
        let shown = json(&cluster, 2, &["volume", "show", volume]);
        assert_eq!(shown["volume"]["shard"], *shard);
        assert_eq!(shown["volume"]["health"], "ok", "{shown}");
        let ours = |node| pools(&cluster, 1, node)[shard]["id"].clone();
        let replicas = shown["replicas"].as_array().unwrap();
        for replica in replicas {
            assert_eq!(replica["pool_id"], ours(replica["node"].as_u64().unwrap() as u32));
        }
        for node in 1..=3 {
            qemu_io(&uri(&cluster, node, volume), &format!("write -P {node} {}M 1M", 64 + node));
            qemu_io(
                &uri(&cluster, node % 3 + 1, volume),
                &format!("read -P {node} {}M 1M", 64 + node),
            );
        }
    }
    let mut loads =
        [load(&cluster, &volumes[&0], [1, 2, 3]), load(&cluster, &volumes[&1], [2, 1, 3])];
    let progress = |loads: &mut [Verify; 2]| loads.iter_mut().for_each(|one| one.progress(200, 60));
    progress(&mut loads);
    // A node that serves no client dies: hosts notice nothing.
    cluster.kill(3);
    progress(&mut loads);
    assert!(loads.iter().all(|one| one.lost.is_empty()), "a client's connection broke");
    cluster.restart(3);
    volumes.values().for_each(|volume| cluster.wait_in_sync(volume));
    cluster.kill_all();
    (1..=3).for_each(|id| cluster.start_node(id));
    (1..=3).for_each(|id| cluster.wait_node(id));
    progress(&mut loads);
    for one in loads {
        one.finish().assert_ok();
    }
    for (shard, volume) in &volumes {
        cluster.wait_in_sync(volume);
        for node in 1..=3 {
            qemu_io(&uri(&cluster, 1, volume), &format!("read -P {node} {}M 1M", 64 + node));
            assert_eq!(of_shard(&cluster, node, "ballast_shard_up", *shard as u32), Some(1.0));
            cluster.move_leader(volume, node);
        }
    }
    // The lead was moved a moment ago: who has heard of it counts as in sync.
    let mut status = Value::Null;
    let is_well = wait::within(60, || {
        status = json(&cluster, 3, &["status"]);
        let well = (&6.into(), &Value::Array(vec![]));
        ((&status["counts"]["pools_ok"], &status["reasons"]) == well).then_some(())
    });
    assert!(is_well.is_some(), "{status}");
}

#[test]
fn a_further_pool_that_is_lost_ends_alone_and_is_replaced() {
    let (mut cluster, volumes) = start("shard-lost", 3, 2);
    let mut loads =
        [load(&cluster, &volumes[&0], [1, 3, 2]), load(&cluster, &volumes[&1], [1, 3, 2])];
    let progress = |loads: &mut [Verify; 2]| loads.iter_mut().for_each(|one| one.progress(200, 60));
    progress(&mut loads);
    let lost = pools(&cluster, 1, 2)[&1]["id"].as_str().unwrap().to_owned();
    stop(&mut cluster, 2);
    let pool = pool_file(&cluster, 2, 1);
    let file = std::fs::File::options().write(true).open(&pool).expect("the pool file is there");
    file.write_all_at(&[0; 1 << 20], 0).expect("writable");
    drop(file);

    // Its node takes part, says what is wrong, and serves what the other shard has.
    cluster.restart(2);
    wait::until_true("the shard's end is seen", 60, || {
        of_shard(&cluster, 2, "ballast_pool_failed", 1) == Some(1.0)
    });
    assert_eq!(of_shard(&cluster, 2, "ballast_shard_up", 1), Some(0.0));
    assert_eq!(of_shard(&cluster, 2, "ballast_shard_up", 0), Some(1.0));
    for (asked, code) in [(2, "shard-ended"), (1, "pool-failed"), (2, "pool-failed")] {
        wait::until_true(code, 60, || cluster.ballastctl(asked, &["status"]).contains(code));
        let pools = pools(&cluster, asked, 2);
        assert_eq!((&pools[&0]["state"], &pools[&1]["state"]), (&"ok".into(), &"failed".into()));
    }
    // The only writer is the load, on node 1.
    let read = |shard| {
        let reader = format!("{}@ro", uri(&cluster, 2, &volumes[&shard]));
        output("qemu-io", &["-r", "-f", "raw", "-c", "read 64M 1M", &reader])
    };
    let served = read(0);
    assert!(served.status.success(), "{}", String::from_utf8_lossy(&served.stderr));
    let refused = read(1);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains("no pool for shard-1"), "{text}");
    progress(&mut loads);
    cluster.wait_in_sync(&volumes[&0]);

    // The other pools hold what they hold: only the one that is asked for is made.
    std::fs::remove_file(&pool).expect("the pool file is there");
    let program = scratch::program("ballastd").display().to_string();
    let config = config_file(&cluster, 2).display().to_string();
    let format = ["format", "--config", &config, "--create", POOL_SIZE];
    let refused = output(&program, &format);
    assert!(!refused.status.success() && !pool.exists(), "{refused:?}");
    let told = json(&cluster, 1, &["pool", "replace", "--node", "2", "--pool", &lost, "--yes"]);
    assert_eq!((&told["shard"], &told["without_number"]), (&1.into(), &true.into()), "{told}");
    run(&program, &[&format[..], &["--shard", "1"]].concat());
    stop(&mut cluster, 2);
    cluster.restart(2);
    for volume in volumes.values() {
        cluster.wait_in_sync(volume);
    }
    // The replacement counts: without it there would be no majority now.
    cluster.kill(3);
    progress(&mut loads);
    for one in loads {
        one.finish().assert_ok();
    }
}

/// Has node 2 use its pool of shard 1 through a disk that can fail.
fn on_failing_disk(cluster: &mut Cluster) -> FailingDisk {
    stop(cluster, 2);
    let pool = pool_file(cluster, 2, 1);
    let behind = pool.with_extension("behind");
    std::fs::rename(&pool, &behind).expect("a file can be renamed");
    let disk = FailingDisk::over(&cluster.scratch, &behind);
    put_pool_1_at(cluster, "pool-1", &disk.path.display().to_string());
    cluster.restart(2);
    disk
}

/// Changes where node 2's configuration has its pool of shard 1.
fn put_pool_1_at(cluster: &Cluster, from: &str, to: &str) {
    let config = config_file(cluster, 2);
    let text = std::fs::read_to_string(&config).expect("a file can be read");
    let (from, to) = (format!("\"{from}\""), format!("\"{to}\""));
    assert!(text.contains(&from), "{from} is not in {text}");
    std::fs::write(&config, text.replace(&from, &to)).expect("a file can be written");
}

#[test]
fn a_further_pool_that_fails_while_it_serves_ends_alone_and_is_replaced() {
    let (mut cluster, volumes) = start("shard-fails", 3, 2);
    let disk = on_failing_disk(&mut cluster);
    volumes.values().for_each(|volume| cluster.wait_in_sync(volume));
    let mut loads =
        [load(&cluster, &volumes[&0], [1, 3, 2]), load(&cluster, &volumes[&1], [1, 3, 2])];
    let progress = |loads: &mut [Verify; 2]| loads.iter_mut().for_each(|one| one.progress(200, 60));
    progress(&mut loads);
    // The worst case: what fails is what the others wait for.
    cluster.move_leader(&volumes[&1], 2);
    progress(&mut loads);
    let node = cluster.node(2);
    let machine = Machine::watch();
    let from = unix_ms();
    disk.fail();
    wait::until_true("the shard's end is seen", 60, || {
        of_shard(&cluster, 2, "ballast_pool_failed", 1) == Some(1.0)
    });
    progress(&mut loads);
    for (asked, code) in [(2, "shard-ended"), (1, "pool-failed"), (2, "pool-failed")] {
        wait::until_true(code, 60, || cluster.ballastctl(asked, &["status"]).contains(code));
    }
    progress(&mut loads);
    let to = unix_ms();
    assert_ne!(cluster.leader(&volumes[&1]), 2);
    assert!(process::is_alive(node.pid) && cluster.node(2).pid == node.pid, "the node stays");
    assert!(cluster.is_ready(2));
    assert_eq!(of_shard(&cluster, 2, "ballast_shard_up", 1), Some(0.0));
    assert_eq!(of_shard(&cluster, 2, "ballast_shard_up", 0), Some(1.0));
    let failed = pools(&cluster, 1, 2);
    assert_eq!((&failed[&0]["state"], &failed[&1]["state"]), (&"ok".into(), &"failed".into()));
    cluster.wait_in_sync(&volumes[&0]);
    cluster.move_leader(&volumes[&0], 2);

    let lost = failed[&1]["id"].as_str().expect("an id");
    let told = json(&cluster, 1, &["pool", "replace", "--node", "2", "--pool", lost, "--yes"]);
    assert_eq!((&told["shard"], &told["without_number"]), (&1.into(), &true.into()), "{told}");
    put_pool_1_at(&cluster, &disk.path.display().to_string(), "pool-1");
    let config = config_file(&cluster, 2).display().to_string();
    let program = scratch::program("ballastd").display().to_string();
    run(&program, &["format", "--config", &config, "--create", POOL_SIZE, "--shard", "1"]);
    stop(&mut cluster, 2);
    cluster.restart(2);
    drop(disk);
    volumes.values().for_each(|volume| cluster.wait_in_sync(volume));
    assert!(loads.iter().all(|one| one.lost.is_empty()), "a client's connection broke");
    // The replacement counts: without it there would be no majority now.
    cluster.kill(3);
    progress(&mut loads);
    let reports = loads.map(Verify::finish);
    reports.iter().for_each(|report| report.assert_ok());
    let stalls = reports.map(|report| report.longest_stall_on(&machine, from, to));
    println!("stalls in ms of volumes on shards 0 and 1 (0: under 100): {stalls:?}");
    assert!(
        stalls[0] <= UNTOUCHED_STALL_MS_MAX && stalls[1] <= FAILOVER_STALL_MS_MAX,
        "{stalls:?}"
    );
}

#[test]
fn pools_in_another_order_are_refused_and_nothing_is_lost() {
    let (mut cluster, volumes) = start("shard-order", 1, 3);
    for (shard, volume) in &volumes {
        qemu_io(&uri(&cluster, 1, volume), &format!("write -P {} 1M 1M", shard + 7));
    }
    let config = config_file(&cluster, 1);
    let right = std::fs::read_to_string(&config).expect("a file can be read");
    let order = |pools: &str| {
        let line = right.lines().find(|line| line.starts_with("pools = ")).expect("several");
        std::fs::write(&config, right.replace(line, pools)).expect("a file can be written");
    };
    stop(&mut cluster, 1);
    // Only a first pool can be the first.
    order("pools = [\"pool-1\", \"pool\", \"pool-2\"]");
    let program = scratch::program("ballastd").display().to_string();
    let run_it = ["20", &program, "run", "--config", &config.display().to_string()];
    let refused = output("timeout", &run_it);
    let text = [&refused.stdout[..], &refused.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("in their order"), "{text}");
    // Of further ones the cluster knows which is which.
    order("pools = [\"pool\", \"pool-2\", \"pool-1\"]");
    cluster.restart(1);
    wait::until_true("both are refused", 60, || {
        let status = json(&cluster, 1, &["status"]);
        let reasons = status["reasons"].as_array().expect("a list").iter();
        let refused = reasons.filter(|reason| reason["code"] == "shard-refused");
        let told: BTreeSet<String> =
            refused.map(|reason| reason["message"].as_str().unwrap_or("").to_owned()).collect();
        told.len() == 2 && told.iter().all(|message| message.contains("order"))
    });
    qemu_io(&uri(&cluster, 1, &volumes[&0]), "read -P 7 1M 1M");

    stop(&mut cluster, 1);
    order(right.lines().find(|line| line.starts_with("pools = ")).expect("several"));
    cluster.restart(1);
    for (shard, volume) in &volumes {
        cluster.wait_in_sync(volume);
        qemu_io(&uri(&cluster, 1, volume), &format!("read -P {} 1M 1M", shard + 7));
    }
}
