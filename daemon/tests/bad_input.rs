//! What `ballastd` must refuse: a clear message, the right exit code, and nothing written.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::signal::Signal;
use support::{Running, Scratch, assert_refused, ballastd, until};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// Where the copies of the superblock lie.
fn superblocks(pool: &Path) -> Vec<u64> {
    let bytes = fs::read(pool).unwrap();
    let blocks = bytes.chunks_exact(BLOCK).enumerate();
    let found = blocks.filter(|(_, block)| block.starts_with(b"BLST"));
    found.map(|(number, _)| (number * BLOCK) as u64).collect()
}

fn patch(pool: &Path, offset: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(pool).unwrap().write_all_at(bytes, offset).unwrap();
}

fn checksum(path: &Path) -> (usize, u32) {
    let bytes = fs::read(path).unwrap();
    (bytes.len(), ballast_block::checksum::crc32(&bytes))
}

#[test]
fn configurations_that_are_wrong_exit_with_2() {
    let scratch = Scratch::new("bad-config");
    let good = scratch.config("good.toml", 1, 1);
    let file = scratch.file("config.toml");
    for (text, says) in [
        ("no_such_key = 1\n".to_owned(), "no_such_key"),
        ("= = =\n".to_owned(), "config.toml"),
        (fs::read_to_string(&good).unwrap().replace("peer = \"127.0.0.1:9\"", ""), "peer"),
    ] {
        fs::write(&file, text).unwrap();
        assert_refused(&ballastd(&["run", "--config", &file]), 2, says);
        assert_refused(&ballastd(&["format", "--config", &file]), 2, says);
    }
    let missing = scratch.file("missing.toml");
    assert_refused(&ballastd(&["run", "--config", &missing]), 2, "missing.toml");
    assert_refused(&ballastd(&["run", "--config", &good, "--node", "7"]), 2, "node");
    assert_refused(&ballastd(&["run", "--config", &good, "--log-level", "loud"]), 2, "loud");
    assert_refused(&ballastd(&["format", "--config", &good, "--create", "much"]), 2, "much");
    assert!(!scratch.0.join("pool").exists(), "nothing was written");
}

#[test]
fn dev_refuses_before_it_writes() {
    let scratch = Scratch::new("bad-dev");
    let data = scratch.file("data");
    for (arguments, says) in [
        (&["--nodes", "2"][..], "nodes"),
        (&["--volume", "x"], "size"),
        (&["--volume", "x=12parsecs"], "12parsecs"),
        (&["--volume", "a/b=1GiB"], "a/b"),
        (&["--volume", "x=4097KB"], "4097KB"),
        (&["--pools", "0"], "--pools 0"),
        (&["--pools", "17"], "--pools 17"),
        (&["--pool-size", "1MiB"], "--pool-size"),
        (&["--log-level", "loud"], "loud"),
    ] {
        assert_refused(&ballastd(&[&["dev", "--data", &data], arguments].concat()), 2, says);
    }
    assert!(!Path::new(&data).exists(), "nothing was written");
    assert_refused(&ballastd(&["dev-node", "--data", &data, "--id", "1"]), 1, "no cluster");
    fs::create_dir(&data).unwrap();
    fs::write(scratch.0.join("data/letter"), "dear").unwrap();
    assert_refused(&ballastd(&["dev", "--data", &data]), 1, "letter");
    assert_eq!(fs::read_dir(&data).unwrap().count(), 1, "nothing was written");
}

#[test]
fn only_an_empty_disk_is_formatted() {
    let scratch = Scratch::new("bad-format");
    let config = scratch.config("config.toml", 1, 1);
    let pool = scratch.0.join("pool");
    let format = |more: &[&str]| ballastd(&[&["format", "--config", &config], more].concat());
    assert_refused(&format(&[]), 1, "pool");
    assert!(!pool.exists(), "a missing disk is not made by implication");
    assert_refused(&format(&["--create", "1MiB"]), 1, "too few");
    assert!(!pool.exists(), "a pool that is too small leaves nothing");

    let mut foreign = vec![0; 128 * MIB];
    foreign[1080] = 0x53;
    fs::write(&pool, &foreign).unwrap();
    assert_refused(&format(&[]), 1, "not empty");
    assert_refused(&format(&["--create", "128MiB"]), 1, "exists");
    assert!(fs::read(&pool).unwrap() == foreign, "it was not touched");
    let made = format(&["--overwrite-foreign"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let id = String::from_utf8(made.stdout).unwrap();
    assert_eq!(id.trim().len(), 36, "the pool's id is printed: {id:?}");

    // What was a pool is never formatted again, not even when half of it is gone.
    let before = checksum(&pool);
    assert_refused(&format(&["--overwrite-foreign"]), 1, "never formatted again");
    assert_eq!(checksum(&pool), before);
    let copies = superblocks(&pool);
    assert_eq!(copies.len(), 2);
    patch(&pool, copies[0], &[0; BLOCK]);
    assert_refused(&format(&["--overwrite-foreign"]), 1, "never formatted again");
}

#[test]
fn several_pools_are_made_all_or_none() {
    let scratch = Scratch::new("bad-pools");
    let config = scratch.config("config.toml", 1, 1);
    let text = fs::read_to_string(&config).unwrap();
    let several = "pools = [\"a\", \"./b\", \"c\"]";
    fs::write(&config, text.replace("pool = \"pool\"", several)).unwrap();
    let exists = || ["a", "b", "c"].map(|name| scratch.0.join(name).exists());
    let format = |more: &[&str]| ballastd(&[&["format", "--config", &config], more].concat());
    let create = ["--create", "128MiB"];
    let create_and = |more: [&str; 2]| format(&[&create[..], &more].concat());

    assert_refused(&format(&[]), 1, "No such file");
    assert_refused(&create_and(["--shard", "3"]), 2, "--shard 3");
    let both = [&create[..], &["--shard", "1", "--replacement", "9"]].concat();
    assert_refused(&format(&both), 2, "--replacement");
    fs::write(scratch.0.join("c"), "dear").unwrap();
    assert_refused(&format(&create), 1, "exists");
    assert_eq!(exists(), [false, false, true], "nothing was made");
    fs::remove_file(scratch.0.join("c")).unwrap();

    let made = format(&create);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let ids = String::from_utf8(made.stdout).unwrap();
    assert_eq!((ids.lines().count(), exists()), (3, [true; 3]), "{ids:?}");
    // Files that are there already: the last one is no empty one.
    fs::write(scratch.0.join("a"), vec![0; 128 * MIB]).unwrap();
    let before = checksum(&scratch.0.join("a"));
    assert_refused(&format(&[]), 1, "never formatted again");
    assert_eq!(checksum(&scratch.0.join("a")), before, "it was not touched");
    fs::remove_file(scratch.0.join("b")).unwrap();
    let made = create_and(["--shard", "1"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(made.stdout.len(), 37, "one id");
}

#[test]
fn disks_that_are_not_this_nodes_pool_are_refused_and_not_touched() {
    let scratch = Scratch::new("bad-disks");
    let config = scratch.config("config.toml", 1, 1);
    let other_cluster = scratch.config("other-cluster.toml", 2, 1);
    let other_node = scratch.config("other-node.toml", 1, 2);
    let pool = scratch.0.join("pool");
    assert_refused(&ballastd(&["run", "--config", &config]), 1, "pool");
    assert!(!pool.exists(), "a missing disk is not made");
    let made = ballastd(&["format", "--config", &config, "--create", "128MiB"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let copies = superblocks(&pool);
    let good = scratch.0.join("good");
    fs::copy(&pool, &good).unwrap();
    let refused = |config: &str, says: &str| {
        let before = checksum(&pool);
        assert_refused(&ballastd(&["run", "--config", config]), 1, says);
        assert_eq!(checksum(&pool), before, "{says}: the disk was written to");
        fs::copy(&good, &pool).unwrap();
    };
    refused(&other_cluster, "cluster");
    refused(&other_node, "node-1");

    fs::write(&pool, vec![0; 128 * MIB]).unwrap();
    refused(&config, "no Ballast superblock");

    for &copy in &copies {
        patch(&pool, copy, b"NOPE");
    }
    refused(&config, "no Ballast superblock");

    for &copy in &copies {
        patch(&pool, copy + 64, &[0xa5; BLOCK - 64]);
    }
    refused(&config, "superblocks are damaged");

    // A newer program's: the version, and the checksum over it, as it would write them.
    for &copy in &copies {
        let mut block = fs::read(&pool).unwrap()[copy as usize..][..BLOCK].to_vec();
        block[8..12].copy_from_slice(&99_u32.to_le_bytes());
        block[4..8].fill(0);
        let crc = ballast_block::checksum::crc32(&block);
        block[4..8].copy_from_slice(&crc.to_le_bytes());
        patch(&pool, copy, &block);
    }
    refused(&config, "newer program");

    fs::File::options().write(true).open(&pool).unwrap().set_len(100 * MIB as u64).unwrap();
    refused(&config, "part of the disk is missing");
}

#[test]
fn a_pool_in_use_is_refused() {
    let scratch = Scratch::new("bad-in-use");
    let config = scratch.config("config.toml", 1, 1);
    let made = ballastd(&["format", "--config", &config, "--create", "128MiB"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut first = Running::start(&scratch.0.join("log"), &["run", "--config", &config]);
    first.wait_printed("node serves");
    assert_refused(&ballastd(&["run", "--config", &config]), 1, "in use");
    first.signal(Signal::SIGTERM);
    assert!(first.wait().success(), "{}", first.printed());
    until("the end of both", || scratch.processes().is_empty().then_some(()));
}
