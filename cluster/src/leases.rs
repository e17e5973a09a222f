//! Commands about leases: who may use a volume, in which mode, under which epoch.
//!
//! Decides who has a lease; never fences. That is the work of the volume's own group, which takes
//! its grants from here by a committed entry of its own log (guarantees **fenced**, **one-writer**).

use ballast_block::limits::{HOST_NAME_BYTES_MAX, LEASE_REASON_BYTES_MAX, LEASES_PER_VOLUME_MAX};
use ballast_block::{Epoch, VolumeId};

use crate::command::AcquireLease;
use crate::error::{Leased, Refusal};
use crate::state::{ClusterState, Outcome, Reply};
use crate::view::{Lease, LeaseMode, Volume, VolumePhase};

/// Checks a host's name: what a node of a cluster is called, in upper case, too.
///
/// # Errors
/// [`Refusal::HostInvalid`].
pub fn check_host(host: &str) -> Result<(), Refusal> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    if (1..=HOST_NAME_BYTES_MAX).contains(&host.len()) && host.bytes().all(allowed) {
        return Ok(());
    }
    let host = host.chars().take(HOST_NAME_BYTES_MAX + 1).collect();
    Err(Refusal::HostInvalid { host })
}

/// Checks the reason of a lease that is taken by force.
///
/// # Errors
/// [`Refusal::LeaseReasonInvalid`].
pub fn check_reason(volume: &str, reason: &str) -> Result<(), Refusal> {
    let fits = (1..=LEASE_REASON_BYTES_MAX).contains(&reason.len());
    if fits && !reason.trim().is_empty() && !reason.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Refusal::LeaseReasonInvalid { name: volume.to_owned() })
}

impl ClusterState {
    pub(crate) fn acquire_lease(&mut self, command: AcquireLease) -> Result<Outcome, Refusal> {
        let AcquireLease { volume: id, host, mode, force, reason, at_ms, .. } = command;
        let revision = self.revision + 1;
        let read_only = command.read_only || mode == LeaseMode::Readers;
        check_host(&host)?;
        let volume = self.volumes.get_mut(&id).ok_or(Refusal::UnknownVolume { volume: id })?;
        let name = || volume.name.clone();
        if force {
            check_reason(&volume.name, &reason)?;
        }
        match volume.phase {
            VolumePhase::Creating => return Err(Refusal::VolumeNotReady { name: name() }),
            VolumePhase::Deleting => return Err(Refusal::VolumeBeingDeleted { name: name() }),
            VolumePhase::Ready => {}
        }
        if let Some(own) = volume.lease(&host) {
            if (own.mode, own.read_only) == (mode, read_only) {
                return Ok(as_it_is(volume));
            }
            let (mode, read_only) = (own.mode, own.read_only);
            return Err(Refusal::LeaseDiffers { name: name(), host, mode, read_only });
        }
        let in_the_way = volume.leases.iter().find(|lease| !lease.mode.goes_with(mode));
        if let Some(other) = in_the_way
            && !force
        {
            let (host, mode, asked) = (other.host.clone(), other.mode, Leased::Acquire);
            return Err(Refusal::VolumeLeased { name: name(), host, mode, asked });
        }
        if in_the_way.is_none() && volume.leases.len() >= LEASES_PER_VOLUME_MAX {
            return Err(Refusal::TooManyLeases { name: name() });
        }
        check_seen(volume, command.seen_revision)?;
        volume.leases.retain(|lease| lease.mode.goes_with(mode));
        // Each grant raises the revision of the whole state: no other grant of the cluster, ever, had
        // or will have its number, and none of an earlier program a higher one.
        let unique = Epoch(revision);
        let epoch = if command.unique_epoch { unique } else { Epoch(volume.last_epoch.0 + 1) };
        let reason = if force { reason } else { String::new() };
        let lease = Lease { host, mode, read_only, epoch, acquired_at_ms: at_ms, reason };
        let place = volume.leases.partition_point(|other| other.host < lease.host);
        volume.leases.insert(place, lease);
        volume.last_epoch = epoch;
        volume.lease_revision += 1;
        Ok(Outcome { reply: Reply::Volume(volume.clone()), changed: true })
    }

    pub(crate) fn release_lease(
        &mut self,
        id: VolumeId,
        host: &str,
        epoch: Epoch,
        seen_revision: Option<u64>,
    ) -> Result<Outcome, Refusal> {
        let volume = self.volumes.get_mut(&id).ok_or(Refusal::UnknownVolume { volume: id })?;
        check_seen(volume, seen_revision)?;
        let meant = |lease: &Lease| epoch == Epoch(0) || epoch == lease.epoch;
        let place = volume.leases.iter().position(|it| it.host == host && meant(it));
        if place.is_none() && seen_revision.is_none() {
            return Ok(as_it_is(volume));
        }
        if let Some(place) = place {
            volume.leases.remove(place);
        }
        // Also with nothing to end: a lease that its asker gave up before it was granted must not be
        // granted after this, for nobody would release it.
        volume.lease_revision += 1;
        Ok(Outcome { reply: Reply::Volume(volume.clone()), changed: true })
    }
}

/// Whether the volume's leases are those that the asker goes by.
fn check_seen(volume: &Volume, seen: Option<u64>) -> Result<(), Refusal> {
    let now = volume.lease_revision;
    match seen {
        Some(seen) if seen != now => {
            Err(Refusal::LeasesMovedOn { name: volume.name.clone(), seen, now })
        }
        _ => Ok(()),
    }
}

fn as_it_is(volume: &Volume) -> Outcome {
    Outcome { reply: Reply::Volume(volume.clone()), changed: false }
}

/// Whether a volume's leases are as the commands leave them.
pub(crate) fn are_sound(volume: &Volume) -> bool {
    let leases = &volume.leases;
    let by_host = leases.is_sorted_by(|a, b| a.host < b.host);
    let beside = leases.windows(2).all(|pair| pair[0].mode.goes_with(pair[1].mode));
    let each = leases.iter().all(|lease| {
        (1..=volume.last_epoch.0).contains(&lease.epoch.0)
            && check_host(&lease.host).is_ok()
            && (lease.read_only || lease.mode != LeaseMode::Readers)
    });
    let mut epochs: Vec<Epoch> = leases.iter().map(|lease| lease.epoch).collect();
    epochs.sort();
    epochs.dedup();
    by_host
        && beside
        && each
        && epochs.len() == leases.len()
        && leases.len() <= LEASES_PER_VOLUME_MAX
        && (leases.is_empty() || volume.phase == VolumePhase::Ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names() {
        for good in ["a", "node-1.storage.svc", "ip-10-0-0-1", "Rack_7", "9", &"h".repeat(253)] {
            assert_eq!(check_host(good), Ok(()), "{good}");
        }
        let long = "h".repeat(254);
        for bad in ["", "a b", "a/b", "a,b", "a=b", "a@b", "ä", "a\n", &long] {
            assert!(check_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reasons() {
        for good in ["node-2 burnt down", "ü", &"r".repeat(256)] {
            assert_eq!(check_reason("v", good), Ok(()), "{good}");
        }
        let long = "r".repeat(257);
        for bad in ["", "  ", "two\nlines", &long] {
            assert!(check_reason("v", bad).is_err(), "{bad}");
        }
    }
}
