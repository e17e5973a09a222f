//! A database on a volume while the leader's node is killed.

use ballast_e2e::cluster::Cluster;
use ballast_e2e::commits::Commits;
use ballast_e2e::filesystem::{BlockDevice, Mounted};
use ballast_e2e::postgres::Postgres;
use ballast_e2e::process::run;
use ballast_e2e::scratch::Scratch;
use ballast_e2e::wait::until_true;

#[test]
fn every_commit_that_returned_is_there_after_the_leader_was_killed() {
    let mut cluster = Cluster::start("postgres");
    let home = Scratch::public("postgres");
    let device = BlockDevice::attach(&cluster.scratch, &cluster.uri(1));
    run("mkfs.ext4", &["-q", "-F", &device.path]);
    let mounted = Mounted::mount(&device.path, home.path());
    let log = cluster.scratch.path().join("postgres.log");
    let server = Postgres::start(home.path(), &log);
    Commits::prepare(&server, &[0]);
    let mut commits = Commits::start(&server, cluster.scratch.path(), "pgbench", 0, 20);
    until_true("transactions", 30, || commits.returned() > 200);
    cluster.move_leader("demo", 2);
    cluster.kill(2);
    let before = commits.returned();
    until_true("transactions after the kill", 15, || commits.returned() > before + 200);
    cluster.restart(2);
    assert_eq!(commits.wait(60), 0, "pgbench: {}", commits.said());
    assert!(!commits.said().contains("error"), "pgbench: {}", commits.said());

    // The database goes down without a word, and what it finds then comes from the volume alone.
    server.crash();
    mounted.unmount();
    device.detach();
    let device = BlockDevice::attach(&cluster.scratch, &cluster.uri(3));
    run("e2fsck", &["-f", "-n", &device.path]);
    let mounted = Mounted::mount(&device.path, home.path());
    let server = Postgres::start(home.path(), &log);
    commits.assert_there(&server);
    server.stop();
    mounted.unmount();
    device.detach();
}
