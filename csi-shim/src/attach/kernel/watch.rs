//! Looks after the kernel's devices: a server for those that have lost theirs, and several
//! connections again for those that went on with one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::Instant;

use nix::errno::Errno;

use super::super::Attachment;
use super::sysfs::{self, devices, ours, path_of, queues, quiet_at};
use super::{INDEX, LINK_DEAD, Shared, Streams, can_be_read, locked, sockets};
use crate::host::HostError;
use crate::host::netlink::{self, Notices};
use crate::limits::{
    ANSWER_TIME, CHANGE_TIME, QUIET_TIME, REPAIR_TIME, REPAIRS_AT_ONCE, RETRY_TIME, UNUSED_TIME,
};

/// What is to be done about a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ToDo {
    /// It may have lost its connections.
    Look,
    /// It has.
    Repair,
}

/// What the watcher knows of a device that goes on with one connection.
struct Narrow {
    /// When its connections may be changed again.
    not_before: Instant,
    /// Its counts when it was looked at last and nothing was under way.
    seen: Option<String>,
}

/// Watches for ever.
pub(super) fn watch(shared: &Shared, notices: &Notices) {
    let all = || devices().into_iter().collect::<BTreeMap<u32, String>>();
    // With what it is the device of: its number may be another's before its turn comes.
    let look = |(index, backend)| (index, (ToDo::Look, backend));
    let mut to_do: BTreeMap<u32, (ToDo, String)> = all().into_iter().map(look).collect();
    let mut narrow = BTreeMap::new();
    loop {
        let left = at_once(REPAIRS_AT_ONCE, to_do, |(index, (what, backend))| {
            let left = shared.attend(index, what, &backend);
            left.map(|what| (index, (what, backend)))
        });
        to_do = left.into_iter().flatten().collect();
        for index in all().into_keys().filter(|index| !to_do.contains_key(index)) {
            shared.widen(index, &mut narrow);
        }
        let time = match (to_do.is_empty(), narrow.is_empty()) {
            (false, _) => RETRY_TIME,
            (true, false) => UNUSED_TIME,
            (true, true) => QUIET_TIME,
        };
        let suspects = match notices.next(time) {
            Ok(notices) => {
                let dead = notices.iter().filter(|(command, _)| *command == LINK_DEAD);
                let index = |attributes| netlink::find(attributes, INDEX)?.try_into().ok();
                let dead = dead.filter_map(|(_, it)| index(it)).map(u32::from_le_bytes);
                let dead: BTreeSet<u32> = dead.collect();
                all().into_iter().filter(|(index, _)| dead.contains(index)).collect()
            }
            // Some were lost: look at all.
            Err(Errno::ENOBUFS) => all(),
            Err(_) => BTreeMap::new(),
        };
        for (index, what) in suspects.into_iter().map(look) {
            to_do.entry(index).or_insert(what);
        }
    }
}

/// Does the work for each, for so many at a time, and returns what came of it when all is done.
fn at_once<T: Send, R: Send>(
    most: usize,
    all: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let all: Vec<T> = all.into_iter().collect();
    let workers = most.min(all.len());
    let (waiting, done) = (Mutex::new(all), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let Some(next) = locked(&waiting).pop() else { return };
                    let result = work(next);
                    locked(&done).push(result);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Does what is to be done about a device, and returns what is left of that.
    fn attend(&self, index: u32, what: ToDo, backend: &str) -> Option<ToDo> {
        let held = self.device(index);
        let mut streams = match held.try_lock() {
            Ok(streams) => streams,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // It is being changed: afterwards is early enough to look.
            Err(TryLockError::WouldBlock) => return Some(what),
        };
        let (volume_id, _) = ours(index)?;
        let is_another = sysfs::backend_of(index).as_deref() != Some(backend);
        if is_another || self.given_up.has(&volume_id) || self.keeper.has_ended(&volume_id) {
            return None;
        }
        if what == ToDo::Look && !is_lost(index, &streams) {
            return None;
        }
        (!self.repair(&mut streams, index, 1)).then_some(ToDo::Repair)
    }

    /// Finds a server for a device, and makes so many connections to it if it is written to: all that
    /// it has are replaced. Whether there is no more to do.
    ///
    /// With several the kernel would wake what waits for a server when it has the first, and send it
    /// there; the server would have to end the session. So a device that was lost goes on with one.
    fn repair(&self, streams: &mut Streams, index: u32, connections: u16) -> bool {
        let Some((volume_id, export)) = ours(index) else { return true };
        tracing::info!(index, export, connections, "looking for a server");
        let attachment = Attachment {
            read_only: export.contains("@ro"),
            addresses: self.keeper.read(&volume_id).addresses,
            volume_id,
            export,
        };
        let connections = if attachment.read_only { queues(index) } else { connections };
        let repaired = self.reconnect(streams, index, &attachment, connections, REPAIR_TIME);
        let export = attachment.export;
        match repaired {
            Ok(()) => {
                tracing::info!(index, export, "connected again");
                true
            }
            // It was given up: the kernel takes no connection for it any more.
            Err(HostError::LeaseOver(_) | HostError::VolumeDeleted(_)) => true,
            Err(error) => {
                tracing::error!(index, export, %error, "not connected");
                false
            }
        }
    }

    /// Gives a device that went on with one connection as many as it has queues, when nobody has used
    /// it for a while.
    fn widen(&self, index: u32, narrow: &mut BTreeMap<u32, Narrow>) {
        let Some((volume_id, export)) = ours(index) else { return };
        if self.given_up.has(&volume_id) || self.keeper.has_ended(&volume_id) {
            return;
        }
        let held = self.device(index);
        let Ok(mut streams) = held.try_lock() else { return };
        let has = match streams.len() {
            0 => self.keeper.read(&volume_id).ends.len(),
            known => known,
        };
        let wants = queues(index).min(self.connections);
        // An earlier life may have been killed while it changed them, and have kept more than there are.
        let is_narrow = has != 0 && has != usize::from(wants);
        if !is_narrow || wants <= 1 || wants != queues(index) || export.contains("@ro") {
            narrow.remove(&index);
            return;
        }
        let now = Instant::now();
        let fresh = Narrow { not_before: now + CHANGE_TIME, seen: None };
        let device = narrow.entry(index).or_insert(fresh);
        let quiet = quiet_at(index);
        let unused = quiet.is_some() && quiet == std::mem::replace(&mut device.seen, quiet.clone());
        if unused && now >= device.not_before {
            device.not_before = now + CHANGE_TIME;
            if !self.repair(&mut streams, index, wants) {
                self.repair(&mut streams, index, 1);
            }
        }
    }
}

/// Whether a device has a connection that does not work any more, or none.
fn is_lost(index: u32, streams: &Streams) -> bool {
    streams.iter().any(sockets::is_lost) || !can_be_read(&path_of(index), 0, ANSWER_TIME)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn so_many_at_a_time_and_no_more() {
        let (together, at_work, most) = (Barrier::new(3), AtomicUsize::new(0), AtomicUsize::new(0));
        let mut done = at_once(3, 0..9, |it| {
            most.fetch_max(at_work.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Passed only by three that are at work together.
            together.wait();
            at_work.fetch_sub(1, Ordering::SeqCst);
            it * 2
        });
        done.sort_unstable();
        assert_eq!(done, [0, 2, 4, 6, 8, 10, 12, 14, 16]);
        assert_eq!(most.load(Ordering::SeqCst), 3);
        assert!(at_once(3, [], |_: u32| ()).is_empty());
    }
}
