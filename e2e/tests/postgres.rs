//! A database on a volume while the leader's node is killed.

use std::collections::BTreeMap;
use std::fs;

use ballast_e2e::cluster::Cluster;
use ballast_e2e::filesystem::{BlockDevice, Mounted};
use ballast_e2e::postgres::Postgres;
use ballast_e2e::process::run;
use ballast_e2e::scratch::Scratch;
use ballast_e2e::wait::until_true;

const CLIENTS: usize = 4;
/// Every client numbers its transactions; pgbench's log says how many returned.
const SCRIPT: &str = "\\set n :n + 1\n\
     begin;\n\
     insert into committed values (:client_id, :n, repeat('x', 200));\n\
     update counters set n = n + 1 where client = :client_id;\n\
     commit;\n";

/// Transactions that returned, by client.
fn returned(log: &str) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    for line in log.lines() {
        let client = line.split(' ').next().and_then(|word| word.parse().ok());
        *counts.entry(client.expect("a client's number")).or_default() += 1;
    }
    counts
}

fn pgbench_log(scratch: &Scratch) -> String {
    let entries = fs::read_dir(scratch.path()).expect("the folder is there").flatten();
    let logs = entries.filter(|e| e.file_name().to_string_lossy().starts_with("transactions."));
    logs.map(|entry| fs::read_to_string(entry.path()).unwrap_or_default()).collect()
}

#[test]
fn every_commit_that_returned_is_there_after_the_leader_was_killed() {
    let mut cluster = Cluster::start("postgres");
    let home = Scratch::public("postgres");
    let device = BlockDevice::attach(&cluster.scratch, &cluster.uri(1));
    run("mkfs.ext4", &["-q", "-F", &device.path]);
    let mounted = Mounted::mount(&device.path, home.path());
    let log = cluster.scratch.path().join("postgres.log");
    let server = Postgres::start(home.path(), &log);
    server.query("create table committed (client int, n int, filler text)");
    server.query("create table counters (client int primary key, n int)");
    server.query("insert into counters select c, 0 from generate_series(0, 3) c");

    let script = cluster.scratch.file("script.sql");
    fs::write(&script, SCRIPT).expect("a file can be written");
    let (prefix, clients) = (cluster.scratch.file("transactions"), CLIENTS.to_string());
    let options = ["-n", "-T", "20", "-c", &clients, "-D", "n=0", "-l", "--log-prefix", &prefix];
    let bench_log = cluster.scratch.path().join("pgbench.log");
    let mut bench = server.pgbench(&bench_log, &[&options[..], &["-f", &script]].concat());
    until_true("transactions", 30, || pgbench_log(&cluster.scratch).lines().count() > 200);
    cluster.move_leader("demo", 2);
    cluster.kill(2);
    let before = pgbench_log(&cluster.scratch).lines().count();
    until_true("transactions after the kill", 15, || {
        pgbench_log(&cluster.scratch).lines().count() > before + 200
    });
    cluster.restart(2);
    assert_eq!(bench.wait(60), 0, "pgbench: {}", bench.log());
    assert!(!bench.log().contains("error"), "pgbench: {}", bench.log());

    // The database goes down without a word, and what it finds then comes from the volume alone.
    server.crash();
    mounted.unmount();
    device.detach();
    let device = BlockDevice::attach(&cluster.scratch, &cluster.uri(3));
    run("e2fsck", &["-f", "-n", &device.path]);
    let mounted = Mounted::mount(&device.path, home.path());
    let server = Postgres::start(home.path(), &log);
    let all = returned(&pgbench_log(&cluster.scratch));
    assert_eq!(all.len(), CLIENTS, "{all:?}");
    for (client, count) in all {
        let there = format!(
            "select count(distinct n) from committed where client = {client} and n <= {count}"
        );
        assert_eq!(server.query(&there), count.to_string(), "commits of client {client}");
        let consistent = format!(
            "select c.n = (select count(*) from committed k where k.client = {client}) \
             from counters c where c.client = {client}"
        );
        assert_eq!(server.query(&consistent), "t", "client {client}: both tables agree");
    }
    server.stop();
    mounted.unmount();
    device.detach();
}
