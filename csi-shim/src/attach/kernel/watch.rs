//! Looks after the kernel's devices: a server for those that have lost theirs, and several
//! connections again for those that went on with one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::super::Attachment;
use super::sysfs::{devices, ours, path_of, queues, quiet_at};
use super::{ANSWER_TIME, INDEX, LINK_DEAD, Shared, can_be_read, sockets};
use crate::host::netlink::{self, Notices};

/// How long the watcher waits for a notice, with nothing to do.
const QUIET_TIME: Duration = Duration::from_secs(60);

/// With a device that has no server.
const RETRY_TIME: Duration = Duration::from_secs(1);

/// With a device that is to have several connections again: for so long nobody may have used it.
const UNUSED_TIME: Duration = Duration::from_secs(5);

/// Between two changes of a device's connections, but for repairs.
const CHANGE_TIME: Duration = Duration::from_secs(60);

/// How long one look for a server takes at most, but for servers that do not answer: others wait.
const REPAIR_TIME: Duration = Duration::from_secs(2);

/// What the watcher knows of a device that goes on with one connection.
struct Narrow {
    /// When its connections may be changed again.
    not_before: Instant,
    /// Its counts when it was looked at last and nothing was under way.
    seen: Option<String>,
}

/// Watches for ever.
pub(super) fn watch(shared: &Shared, notices: &Notices) {
    let all = || devices().into_iter().map(|(index, _)| index).collect::<BTreeSet<u32>>();
    let (mut suspects, mut lost) = (all(), BTreeSet::new());
    let mut narrow = BTreeMap::new();
    loop {
        lost.append(&mut suspects.into_iter().filter(|index| shared.is_lost(*index)).collect());
        lost.retain(|index| !shared.repair(*index, 1));
        for index in all().into_iter().filter(|index| !lost.contains(index)) {
            shared.widen(index, &mut narrow);
        }
        let time = match (lost.is_empty(), narrow.is_empty()) {
            (false, _) => RETRY_TIME,
            (true, false) => UNUSED_TIME,
            (true, true) => QUIET_TIME,
        };
        suspects = match notices.next(time) {
            Ok(notices) => {
                let dead = notices.iter().filter(|(command, _)| *command == LINK_DEAD);
                let index = |attributes| netlink::find(attributes, INDEX)?.try_into().ok();
                dead.filter_map(|(_, it)| index(it)).map(u32::from_le_bytes).collect()
            }
            // Some were lost: look at all.
            Err(Errno::ENOBUFS) => all(),
            Err(_) => BTreeSet::new(),
        };
    }
}

impl Shared {
    /// Whether a device has a connection that does not work any more, or none.
    fn is_lost(&self, index: u32) -> bool {
        let known = |streams: &Vec<_>| streams.iter().any(sockets::is_lost);
        let known = self.sockets().get(&index).is_some_and(known);
        ours(index).is_some() && (known || !can_be_read(&path_of(index), 0, ANSWER_TIME))
    }

    /// Finds a server for a device, and makes so many connections to it if it is written to: all that
    /// it has are replaced. Whether there is no more to do.
    ///
    /// With several the kernel would wake what waits for a server when it has the first, and send it
    /// there; the server would have to end the session. So a device that was lost goes on with one.
    fn repair(&self, index: u32, connections: u16) -> bool {
        let Some((volume_id, export)) = ours(index) else { return true };
        tracing::info!(index, export, connections, "looking for a server");
        let attachment = Attachment {
            read_only: export.contains("@ro"),
            addresses: self.kept(&volume_id).0,
            volume_id,
            export,
        };
        let connections = if attachment.read_only { queues(index) } else { connections };
        let mut sockets = self.sockets();
        let repaired = self.reconnect(&mut sockets, index, &attachment, connections, REPAIR_TIME);
        let export = attachment.export;
        match &repaired {
            Ok(()) => tracing::info!(index, export, "connected again"),
            Err(error) => tracing::error!(index, export, %error, "not connected"),
        }
        repaired.is_ok()
    }

    /// Gives a device that went on with one connection as many as it has queues, when nobody has used
    /// it for a while.
    fn widen(&self, index: u32, narrow: &mut BTreeMap<u32, Narrow>) {
        let Some((volume_id, export)) = ours(index) else { return };
        let known = self.sockets().get(&index).map(Vec::len);
        let has = known.unwrap_or_else(|| self.kept(&volume_id).1.len());
        let wants = queues(index).min(self.connections);
        if has != 1 || wants <= 1 || wants != queues(index) || export.contains("@ro") {
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
            if !self.repair(index, wants) {
                self.repair(index, 1);
            }
        }
    }
}
