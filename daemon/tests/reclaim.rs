//! A running node is kept out of the kernel's search for free memory as far as that is permitted,
//! serves also where it is not, and says so.

mod support;

use std::fs;
use std::path::Path;

use support::{Running, Scratch, ballastd};

/// `CAP_IPC_LOCK` and `CAP_SYS_RESOURCE` of capability(7), as bits.
const IPC_LOCK: u64 = 1 << 14;
const SYS_RESOURCE: u64 = 1 << 24;
/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` of the kernel: what an I/O flusher has.
const FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
/// Where /proc/PID/stat has the flags: ninth, and the name, which is second, may hold blanks.
const FLAGS_BEHIND_NAME: usize = 6;

/// A field of /proc/PID/status.
fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
    line.unwrap().split_whitespace().next().unwrap().to_owned()
}

fn capabilities(pid: u32) -> u64 {
    u64::from_str_radix(&status(pid, "CapEff"), 16).unwrap()
}

/// Whether a process may lock memory under no limit, as capability(7) and getrlimit(2) have it.
fn may_lock(pid: u32) -> bool {
    capabilities(pid) & (SYS_RESOURCE | IPC_LOCK) != 0 || lock_limit(pid).contains("unlimited")
}

/// The line of /proc/PID/limits.
fn lock_limit(pid: u32) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap().to_owned()
}

fn locked_kib(pid: u32) -> u64 {
    status(pid, "VmLck").parse().unwrap()
}

/// The kernel's flags of every thread, by name.
fn thread_flags(pid: u32) -> Vec<(String, u64)> {
    let of = |task: &Path| {
        let stat = fs::read_to_string(task.join("stat")).ok()?;
        let (head, rest) = stat.rsplit_once(") ")?;
        let flags = rest.split_whitespace().nth(FLAGS_BEHIND_NAME)?.parse().ok()?;
        Some((head.split_once('(')?.1.to_owned(), flags))
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks.filter_map(|task| of(&task.path())).collect()
}

/// A node that serves; it writes to the file `log` of the folder.
fn node(scratch: &Scratch, by: &[&str], more: &str) -> Running {
    let config = scratch.config("node.toml", 7, 1);
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("[listen]", &format!("{more}\n[listen]"))).unwrap();
    let made = ballastd(&["format", "--config", &config, "--create", "256MiB"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut node = Running::start_by(&scratch.0.join("log"), by, &["run", "--config", &config]);
    node.wait_printed("node serves");
    node
}

#[test]
fn a_node_is_locked_in_memory_and_an_io_flusher_as_far_as_permitted() {
    let scratch = Scratch::new("reclaim-on");
    let node = node(&scratch, &[], "");
    let (printed, has) = (node.printed(), capabilities(node.pid()));
    let threads = thread_flags(node.pid());
    assert!(threads.len() > 1, "a shard has a thread of its own: {threads:?}");
    // Not every place that runs tests hands these out: then the log must say what is missing.
    if has & SYS_RESOURCE != 0 {
        let marked = |(_, flags): &(String, u64)| flags & FLUSHER == FLUSHER;
        assert!(threads.iter().all(marked), "not all threads: {threads:x?}");
        assert!(!printed.contains("can't be made an I/O flusher"), "{printed}");
    } else {
        assert!(printed.contains("can't be made an I/O flusher"), "{printed}");
        assert!(printed.contains("CAP_SYS_RESOURCE"), "{printed}");
    }
    if may_lock(node.pid()) {
        assert!(!printed.contains("memory can't be locked"), "{printed}");
        let resident: u64 = status(node.pid(), "VmRSS").parse().unwrap();
        assert!(locked_kib(node.pid()) >= resident, "{}", locked_kib(node.pid()));
    } else {
        assert!(printed.contains("memory can't be locked"), "{printed}");
    }
}

#[test]
fn a_node_without_the_right_serves_and_says_what_is_missing() {
    let scratch = Scratch::new("reclaim-refused");
    let by = ["prlimit", "--memlock=65536:65536", "setpriv", "--bounding-set"];
    let node = node(&scratch, &[&by[..], &["-sys_resource,-ipc_lock", "--"]].concat(), "");
    assert_eq!(capabilities(node.pid()) & (SYS_RESOURCE | IPC_LOCK), 0);
    let printed = node.printed();
    for says in ["can't be made an I/O flusher", "memory can't be locked", "CAP_SYS_RESOURCE"] {
        assert!(printed.contains(says), "not {says:?}:\n{printed}");
    }
    assert_eq!(locked_kib(node.pid()), 0);
    let limit = lock_limit(node.pid());
    assert!(limit.contains("65536"), "the limit was changed and not put back: {limit}");
}

#[test]
fn a_node_that_is_told_not_to_locks_nothing() {
    let scratch = Scratch::new("reclaim-off");
    let node = node(&scratch, &[], "[memory]\nlock = false");
    assert_eq!(locked_kib(node.pid()), 0);
    assert!(!node.printed().contains("memory can't be locked"), "{}", node.printed());
}
