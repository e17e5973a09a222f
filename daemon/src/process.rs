//! What the kernel says of processes, and what this one asks of it.

use ballast_env::linux::{lock_memory, mark_io_flusher};
use nix::unistd::{SysconfVar, sysconf};

/// Memory, time and files of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Resident memory, in bytes.
    pub resident_bytes: u64,
    /// Virtual memory, in bytes.
    pub virtual_bytes: u64,
    /// User and system time, in seconds.
    pub cpu_seconds: f64,
    /// When it started, in seconds since 1970.
    pub start_seconds: f64,
    /// Open files and sockets.
    pub open_files: u64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// Of this process, now; zeroes where `/proc` does not tell.
    pub fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The name, in parentheses, may hold blanks.
        let fields: Vec<&str> =
            stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
        let field = |number: usize| -> u64 {
            // Fields are numbered from 1 in proc(5), and the third is the first after the name.
            fields.get(number - 3).and_then(|text| text.parse().ok()).unwrap_or(0)
        };
        let system = |variable| sysconf(variable).ok().flatten().unwrap_or(0);
        let page = u64::try_from(system(SysconfVar::PAGE_SIZE)).unwrap_or(0);
        let ticks = (system(SysconfVar::CLK_TCK) as f64).max(1.0);
        let machine = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let booted = machine.lines().find_map(|line| line.strip_prefix("btime "));
        let booted: f64 = booted.and_then(|text| text.trim().parse().ok()).unwrap_or(0.0);
        let open_files = std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64);
        Self {
            resident_bytes: field(24) * page,
            virtual_bytes: field(23),
            cpu_seconds: (field(14) + field(15)) as f64 / ticks,
            start_seconds: booted + field(22) as f64 / ticks,
            open_files,
            threads: field(20),
        }
    }
}

/// Memory of this machine, in bytes; a container may have less.
pub fn machine_memory() -> u64 {
    let system = |variable| sysconf(variable).ok().flatten().and_then(|it| u64::try_from(it).ok());
    let pages = system(SysconfVar::_PHYS_PAGES);
    pages.zip(system(SysconfVar::PAGE_SIZE)).map_or(u64::MAX, |(pages, size)| pages * size)
}

/// Keeps this process from waiting for its own volumes when memory is short (docs/guide/memory.md).
/// A node serves without that too: what is not permitted is said in the log, with the remedy.
pub fn stay_out_of_reclaim(lock: bool) {
    let flusher = mark_io_flusher();
    if !lock {
        let is_io_flusher = flusher.is_ok();
        tracing::info!(is_io_flusher, "memory is not locked (memory.lock = false)");
        return;
    }
    match flusher {
        Ok(()) => tracing::info!("this process is an I/O flusher"),
        Err(error) => tracing::warn!(%error, "this process can't be made an I/O flusher: when \
            memory is short, it and file systems on volumes that are used on this host may wait \
            for each other for ever; give it CAP_SYS_RESOURCE (Linux 5.6 or newer)"),
    }
    match lock_memory() {
        Ok(()) => tracing::info!("memory is locked"),
        Err(error) => tracing::warn!(%error, "memory can't be locked: when it is short, volumes \
            may stall; give this process CAP_SYS_RESOURCE, or CAP_IPC_LOCK, or no limit of locked \
            memory (LimitMEMLOCK=infinity), or set memory.lock = false"),
    }
}

/// Whether a process runs; one that is dead and not yet reaped does not.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let usage = Usage::now();
        assert!(usage.resident_bytes > 1 << 20 && usage.resident_bytes < usage.virtual_bytes);
        assert!(usage.open_files > 2 && usage.threads >= 1 && usage.start_seconds > 0.0);
        assert!(is_alive(std::process::id()) && !is_alive(u32::MAX));
    }
}
