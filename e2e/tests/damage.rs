//! Damaged, lost and rolled-back pools: what was acknowledged is there, nobody reads a wrong byte,
//! and a pool that has forgotten something takes no part until it is replaced.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use ballast_e2e::cluster::Cluster;
use ballast_e2e::process::{self, output, run};
use ballast_e2e::scratch;
use ballast_e2e::verify::Verify;
use ballast_e2e::wait;
use nix::sys::signal::Signal;
use serde_json::Value;

fn pool_file(cluster: &Cluster, id: u32) -> PathBuf {
    cluster.data().join(format!("node-{id}/pool"))
}

/// The load of these tests, on the node given first.
fn load(cluster: &Cluster, nodes: &[u32]) -> Verify {
    let uris: Vec<String> = nodes.iter().map(|&id| cluster.uri(id)).collect();
    let uris: Vec<&str> = uris.iter().map(String::as_str).collect();
    Verify::start(&cluster.scratch, &uris, &["--expect-zeroes", "--span-mib", "32"])
}

fn gauge(cluster: &Cluster, id: u32, name: &str) -> Option<f64> {
    let page = cluster.try_metrics(id)?;
    let line = page.lines().find(|line| line.starts_with(name))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[track_caller]
fn wait_refused(cluster: &Cluster, id: u32) {
    wait::until_true("the node says that it is refused", 60, || {
        gauge(cluster, id, "ballast_pool_refused") == Some(1.0)
    });
    assert!(!cluster.is_ready(id), "a refused node is not ready");
}

/// Replaces the pool of a node that does not run by a fresh one, as the administrator is told to.
fn replace_pool(cluster: &mut Cluster, id: u32, asked: u32) {
    let node = id.to_string();
    let told =
        cluster.ballastctl(asked, &["pool", "replace", "--node", &node, "--yes", "-o", "json"]);
    let told: Value = serde_json::from_str(&told).expect("JSON");
    let replacement = told["replacement"].as_u64().expect("a number").to_string();
    assert_ne!(replacement, "0", "{told}");
    std::fs::remove_file(pool_file(cluster, id)).expect("the old pool file is there");
    let config = cluster.data().join(format!("node-{id}/config.toml")).display().to_string();
    let program = scratch::program("ballastd").display().to_string();
    let create = ["format", "--config", &config, "--create", "1536MiB"];
    run(&program, &[&create[..], &["--replacement", &replacement]].concat());
    cluster.restart(id);
    cluster.wait_in_sync("demo");
}

/// What is healthy is not given up by a slip.
fn assert_serving_pool_stays(cluster: &Cluster, id: u32, asked: u32) {
    let program = scratch::program("ballastctl").display().to_string();
    let (endpoint, node) = (cluster.node(asked).grpc.clone(), id.to_string());
    let replace = ["--endpoint", &endpoint, "pool", "replace", "--yes", "--node", &node];
    let refused = output(&program, &replace);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains("stop the node first"), "{text}");
    let pools = cluster.ballastctl(asked, &["pool", "list"]);
    assert!(!pools.contains("lost"), "{pools}");
}

#[test]
fn a_rolled_back_pool_is_refused_for_ever_and_replaced() {
    let mut cluster = Cluster::start("rolled-back");
    let mut verify = load(&cluster, &[1]);
    verify.progress(200, 60);
    assert_serving_pool_stays(&cluster, 2, 1);
    let pool = pool_file(&cluster, 2);
    let copy = pool.with_extension("copy");
    let copied = |from: &PathBuf, to: &PathBuf| {
        run("cp", &["--sparse=always", &from.display().to_string(), &to.display().to_string()]);
    };
    cluster.kill(2);
    copied(&pool, &copy);
    cluster.restart(2);
    verify.progress(200, 60);
    cluster.kill(2);
    copied(&copy, &pool);
    // However often it starts: its boot counter passes the one that the cluster knows.
    for _ in 0..4 {
        cluster.start_node(2);
        wait_refused(&cluster, 2);
        cluster.kill(2);
    }
    let pools = cluster.ballastctl(1, &["pool", "list"]);
    assert!(pools.contains("lost"), "{pools}");
    let status = cluster.ballastctl(1, &["status"]);
    assert!(status.contains("pool replace"), "{status}");
    verify.progress(200, 60);

    replace_pool(&mut cluster, 2, 1);
    // The replacement counts: without it there would be no majority now.
    cluster.move_leader("demo", 1);
    cluster.kill(3);
    verify.progress(200, 60);
    cluster.restart(3);
    verify.finish().assert_ok();
    cluster.assert_replicas_are_equal();
}

/// What `ballast-inspect` says of the pool of a node that does not run: its exit code and all.
fn inspect(cluster: &Cluster, id: u32, more: &[&str]) -> (i32, Value) {
    let program = scratch::program("ballast-inspect").display().to_string();
    let pool = pool_file(cluster, id);
    let file = std::fs::File::open(&pool).expect("the pool file is there");
    // What a killed process had begun to write may end after it; then the kernel lets go of the file.
    wait::until_true("the end of all writes", 20, || file.try_lock().is_ok());
    drop(file);
    let pool = pool.display().to_string();
    let answer = output(&program, &[&["-o", "json"], more, &[&pool]].concat());
    let text = String::from_utf8_lossy(&answer.stdout);
    let json: Value = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text}{}", String::from_utf8_lossy(&answer.stderr))
    });
    (answer.status.code().expect("it ended by itself"), json)
}

/// The places that it lists.
fn places(inspected: &Value) -> Vec<Value> {
    inspected["places"].as_array().expect("a list").clone()
}

/// Damages the middle of what is given, for good measure in four bytes.
fn damage(cluster: &Cluster, id: u32, place: &Value) {
    let (offset, bytes) = (place["offset"].as_u64().unwrap(), place["bytes"].as_u64().unwrap());
    // Headers are mostly empty at the end.
    let at = offset + if bytes == 4096 { 16 } else { bytes / 2 / 4096 * 4096 + 16 };
    let file = std::fs::File::options().read(true).write(true).open(pool_file(cluster, id));
    let file = file.expect("the pool file is there");
    let mut piece = [0; 4];
    file.read_exact_at(&mut piece, at).expect("within the pool");
    file.write_all_at(&piece.map(|byte| byte ^ 0x5a), at).expect("writable");
    file.sync_all().expect("a file can be synced");
}

/// Ends a node in order: it leaves a checkpoint.
fn stop(cluster: &mut Cluster, id: u32) {
    let pid = cluster.node(id).pid;
    cluster.signal(id, Signal::SIGTERM);
    wait::until_true("the node ends", 60, || !process::is_alive(pid));
    cluster.kill(id);
}

/// Volumes and their families, which count up: one that is written to all the time, and one that
/// nobody overwrites.
const DEMO: (&str, u64) = ("demo", 1);
const STILL: (&str, u64) = ("still", 2);

/// Kills node 2 with some log behind its checkpoint, damages what `pick` chooses of the places
/// found, starts it again, and waits until it is ready. Answers what was damaged, for messages.
fn with_damage(
    cluster: &mut Cluster,
    verify: &mut Verify,
    leads: bool,
    (volume, family): (&str, u64),
    kind: &str,
    pick: impl Fn(&[&Value]) -> usize,
) -> String {
    // However fast the disks are: what is to be damaged must not be behind the next checkpoint.
    verify.hold();
    stop(cluster, 2);
    cluster.restart(2);
    cluster.wait_in_sync(volume);
    // A vote in the log of node 2, whoever leads in the end.
    cluster.move_leader(volume, 3);
    cluster.move_leader(volume, if leads { 2 } else { 1 });
    verify.go_on();
    verify.progress(200, 60);
    cluster.kill(2);
    let (_, before) = inspect(cluster, 2, &["--places", "--payload"]);
    let replicas: Vec<Value> = cluster
        .replicas(volume)
        .iter()
        .filter(|replica| replica.node == 2)
        .map(|replica| Value::from(replica.id))
        .collect();
    let ours = |place: &&Value| {
        place["kind"] == kind && (place["family"] == family || replicas.contains(&place["replica"]))
    };
    let of_pool = |place: &&Value| place["kind"] == kind && kind == "superblock";
    // What lies in the log comes in the log's order. By offset the log's end may be the middle: a
    // node takes free segments from the pool's start on, each time that it starts.
    let places = places(&before);
    let found: Vec<&Value> = places.iter().filter(|place| ours(place) || of_pool(place)).collect();
    assert!(!found.is_empty(), "no {kind} among {} places", places.len());
    let picked = pick(&found).min(found.len() - 1);
    damage(cluster, 2, found[picked]);
    let (_, after) = inspect(cluster, 2, &[]);
    let damaged = format!(
        "{kind}: {picked} of {} places, {}; checkpoint {} with {} records since, then {} with {}; \
         found then: {}",
        found.len(),
        found[picked],
        before["checkpoint"],
        before["records_since"],
        after["checkpoint"],
        after["records_since"],
        after["findings"]
    );
    println!("{damaged}");
    // Else there is nothing to be counted, nor mended.
    let is_lost = after["findings"].to_string().contains("BatchesLost");
    assert!(is_lost || kind != "batch-header" && kind != "vote-batch", "{damaged}");
    cluster.restart(2);
    damaged
}

/// Chooses one of the places.
type Pick = fn(&[&Value]) -> usize;

fn first(_: &[&Value]) -> usize {
    0
}

fn middle(found: &[&Value]) -> usize {
    found.len() / 2
}

/// Waits until node 2 has counted the damage.
#[track_caller]
fn wait_counted(cluster: &Cluster, name: &str, damaged: &str) {
    let found = wait::within(60, || (gauge(cluster, 2, name) > Some(0.0)).then_some(()));
    let runs = process::is_alive(cluster.node(2).pid);
    let lines = cluster.try_metrics(2).map(|page| page.lines().count());
    assert!(
        found.is_some(),
        "{name} is {:?} after 60 s; node 2 runs: {runs}, lines of its page: {lines:?}; {damaged}",
        gauge(cluster, 2, name),
    );
}

/// Waits until node 2 has mended the log entries, too, that refer to damaged bytes: it does so in
/// rounds, and one that ends before forgets them until they are read.
#[track_caller]
fn wait_mended(cluster: &Cluster, damaged: &str) {
    let what = format!("the log entries of node 2 are mended after {damaged}");
    wait::until_true(&what, 60, || gauge(cluster, 2, "ballast_damaged_entries") == Some(0.0));
}

/// Every kind of damage that a node mends with what its peers have, on a node that led the volume
/// when it was killed or that followed.
fn mended(test: &str, leads: bool) {
    let mut cluster = Cluster::start(test);
    // One small write at a time: each leaves a batch of its own, and no checkpoint is due for long.
    let gentle = ["--expect-zeroes", "--span-mib", "32", "--depth", "1", "--max-kib", "4"];
    let mut verify = Verify::start(&cluster.scratch, &[&cluster.uri(1)], &gentle);
    verify.progress(500, 60);
    let create = ["volume", "create", "still", "--size", "32MiB", "--replicas", "3", "--wait"];
    cluster.ballastctl(1, &create);
    let still = cluster.uri(1).replace("/demo", "/still");
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 0 16M", &still]);
    for (kind, pick, counter) in [
        ("superblock", first as Pick, "ballast_damaged_superblocks_total"),
        ("vote-slot", first, "ballast_damaged_votes_total"),
        ("batch-header", middle, "ballast_damaged_headers_total"),
        ("vote-batch", first, "ballast_damaged_headers_total"),
    ] {
        let damaged = with_damage(&mut cluster, &mut verify, leads, DEMO, kind, pick);
        wait_counted(&cluster, counter, &damaged);
        cluster.wait_in_sync("demo");
    }

    let damaged = with_damage(&mut cluster, &mut verify, leads, DEMO, "entry-not-covered", middle);
    wait_counted(&cluster, "ballast_recovery_damaged_entries", &damaged);
    wait_mended(&cluster, &damaged);
    cluster.wait_in_sync("demo");

    let damaged = with_damage(&mut cluster, &mut verify, leads, STILL, "payload", middle);
    cluster.wait_in_sync("still");
    cluster.move_leader("still", 2);
    // At node 2, which a client at another node would take the lead from.
    let still = cluster.uri(2).replace("/demo", "/still");
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x5a 0 16M", &still]);
    wait_counted(&cluster, "ballast_damaged_blocks_total", &damaged);
    wait_counted(&cluster, "ballast_repaired_blocks_total", &damaged);
    wait_mended(&cluster, &damaged);

    // A page that lies under no directory: found when it is wanted.
    let damaged = with_damage(&mut cluster, &mut verify, leads, DEMO, "map-page", |found| {
        let inner = found.iter().position(|place| place["detail"] == "");
        inner.expect("the map has pages")
    });
    cluster.wait_in_sync("demo");
    verify.finish().assert_ok();
    // Everything is read from the replica that was damaged, at its node: a client at another one would
    // take the lead there. One that can't read hands over, while the reader waits, and gets a successor.
    cluster.move_leader("demo", 2);
    run("nbdcopy", &[&cluster.uri(2), "null:"]);
    wait_counted(&cluster, "ballast_damaged_pages_total", &damaged);
    cluster.wait_in_sync("demo");
    cluster.assert_replicas_are_equal();
    wait_mended(&cluster, &damaged);
    stop(&mut cluster, 2);
    let (code, damaged) = inspect(&cluster, 2, &["--payload"]);
    assert_eq!(code, 0, "right on disk afterwards: {damaged:#}");
}

#[test]
fn damage_on_a_follower_is_mended() {
    mended("damage-follower", false);
}

#[test]
fn damage_on_a_leader_is_mended() {
    mended("damage-leader", true);
}

#[test]
fn a_pool_beyond_mending_is_refused_and_replaced() {
    let mut cluster = Cluster::start("damage-pool");
    let mut verify = load(&cluster, &[1]);
    verify.progress(500, 60);
    for kind in ["checkpoint", "superblock"] {
        stop(&mut cluster, 2);
        let (_, inspected) = inspect(&cluster, 2, &["--places"]);
        let places = places(&inspected);
        let found: Vec<&Value> = places.iter().filter(|place| place["kind"] == kind).collect();
        assert!(!found.is_empty(), "no {kind}");
        found.iter().for_each(|place| damage(&cluster, 2, place));
        let program = scratch::program("ballastd").display().to_string();
        let config = cluster.data().join("node-2/config.toml").display().to_string();
        let refused = output(&program, &["run", "--config", &config]);
        let text = [&refused.stdout[..], &refused.stderr[..]].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(!refused.status.success() && !text.contains("panicked"), "{kind}: {text}");
        assert!(text.contains("pool replace"), "{kind}: {text}");
        verify.progress(100, 60);
        replace_pool(&mut cluster, 2, 1);
    }
    verify.finish().assert_ok();
    cluster.assert_replicas_are_equal();
}
