//! Leases: each rule by itself, and random sequences against a dumb model.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use ballast_block::Epoch;
use ballast_cluster::{
    AcquireLease, ClusterState, Command, Lease, LeaseMode, Refusal, RefusalCode, Reply, Volume,
    VolumePhase,
};
use common::{
    CREATED_AT_MS, acquire, cluster_of, create, created, forced, of_volume, ready_volume, refused,
    release, seen, volume_id,
};
use proptest::prelude::*;

use LeaseMode::*;

const MODES: [LeaseMode; 5] =
    [SingleNodeWriter, SingleNodeMultiWriter, SingleNodePublisher, Readers, Writers];

/// One volume, number 1, called "db".
fn leasable() -> ClusterState {
    let mut state = cluster_of(3);
    ready_volume(&mut state, "db", 1, 3);
    state
}

fn take(state: &mut ClusterState, lease: AcquireLease) -> Reply {
    state.apply(Command::AcquireLease(lease))
}

fn hosts(volume: &Volume) -> Vec<(&str, u64)> {
    volume.leases.iter().map(|lease| (lease.host.as_str(), lease.epoch.0)).collect()
}

#[test]
fn acquire_repeat_release() {
    let mut state = leasable();
    let volume = created(take(&mut state, acquire(1, "n1", SingleNodeWriter)));
    let first = state.revision();
    let lease = Lease {
        host: "n1".to_owned(),
        mode: SingleNodeWriter,
        read_only: false,
        epoch: Epoch(first),
        acquired_at_ms: CREATED_AT_MS,
        reason: String::new(),
    };
    assert_eq!(volume.leases, [lease]);
    assert_eq!((volume.last_epoch, volume.lease_revision), (Epoch(first), 1));

    let later = AcquireLease { at_ms: CREATED_AT_MS + 9, ..acquire(1, "n1", SingleNodeWriter) };
    assert_eq!(created(take(&mut state, later)), volume, "the same lease");
    let by_force = forced(acquire(1, "n1", SingleNodeWriter), "again");
    assert_eq!(created(take(&mut state, by_force)), volume, "its own, by force");
    assert_eq!(created(state.apply(release(1, "n2", 0))), volume, "not there");
    assert_eq!(created(state.apply(release(1, "n1", first + 1))), volume, "another one");
    assert_eq!(state.revision(), first);

    let volume = created(state.apply(release(1, "n1", first)));
    let ended = (volume.leases.len(), volume.last_epoch, volume.lease_revision);
    assert_eq!(ended, (0, Epoch(first), 2));
    let volume = created(take(&mut state, acquire(1, "n1", SingleNodeWriter)));
    assert_eq!(hosts(&volume), [("n1", state.revision())]);
    assert!(volume.last_epoch > Epoch(first), "an epoch is not used twice");
    let late = created(state.apply(release(1, "n1", first)));
    assert_eq!(late, volume, "a late release of the earlier lease");
    assert_eq!(created(state.apply(release(1, "n1", 0))).leases, []);
}

#[test]
fn a_second_host_is_refused_and_told_what_to_do() {
    let mut state = leasable();
    take(&mut state, acquire(1, "n1", SingleNodePublisher));
    let refusal = refused(take(&mut state, acquire(1, "n2", SingleNodePublisher)));
    assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    assert_eq!(
        refusal.to_string(),
        "volume \"db\" is leased to host \"n1\" (single-node-publisher): release it there first \
         (unpublish it), or, if that host is gone or cut off, take it over by force, with a reason"
    );
    let other = AcquireLease { read_only: true, ..acquire(1, "n1", SingleNodePublisher) };
    for other in [other, forced(acquire(1, "n1", Readers), "for tests")] {
        let refusal = refused(take(&mut state, other));
        assert_eq!(refusal.code(), RefusalCode::AlreadyExists);
        assert_eq!(
            refusal.to_string(),
            "host \"n1\" has a lease of volume \"db\" already, and a different one \
             (single-node-publisher): release it first"
        );
    }
}

#[test]
fn only_their_like_stand_beside_readers_and_writers() {
    for (first, second) in MODES.into_iter().flat_map(|it| MODES.map(|other| (it, other))) {
        let mut state = leasable();
        take(&mut state, acquire(1, "n1", first));
        let reply = take(&mut state, acquire(1, "n2", second));
        if first == second && matches!(first, Readers | Writers) {
            let last = state.revision();
            assert_eq!(hosts(&created(reply)), [("n1", last - 1), ("n2", last)]);
        } else {
            let refusal = refused(reply);
            assert!(matches!(refusal, Refusal::VolumeLeased { .. }), "{first} {second}");
        }
    }
    let mut state = leasable();
    let volume = created(take(&mut state, acquire(1, "n1", Readers)));
    assert!(volume.leases[0].read_only, "readers read, whatever was asked");
    let asked_so = AcquireLease { read_only: true, ..acquire(1, "n1", Readers) };
    assert_eq!(created(take(&mut state, asked_so)), volume);
}

#[test]
fn force_takes_what_is_in_the_way_and_wants_a_reason() {
    let mut state = leasable();
    for host in ["n1", "n2", "n3"] {
        take(&mut state, acquire(1, host, Writers));
    }
    let reasonless = AcquireLease { force: true, ..acquire(1, "n4", SingleNodeWriter) };
    let refusal = refused(take(&mut state, reasonless));
    assert_eq!(refusal, Refusal::LeaseReasonInvalid { name: "db".to_owned() });
    assert_eq!(refusal.code(), RefusalCode::InvalidArgument);

    let beside = created(take(&mut state, forced(acquire(1, "n4", Writers), "not needed")));
    let last = state.revision();
    let expected = [("n1", last - 3), ("n2", last - 2), ("n3", last - 1), ("n4", last)];
    assert_eq!(hosts(&beside), expected);
    let volume = created(take(&mut state, forced(acquire(1, "n5", SingleNodeWriter), "cut off")));
    assert_eq!(hosts(&volume), [("n5", last + 1)]);
    assert_eq!((volume.leases[0].reason.as_str(), volume.lease_revision), ("cut off", 5));
    let unforced = AcquireLease { reason: "idle".to_owned(), ..acquire(1, "n5", SingleNodeWriter) };
    assert_eq!(created(take(&mut state, unforced)), volume);
}

#[test]
fn what_can_not_be_leased() {
    let mut state = leasable();
    let refusal = refused(take(&mut state, acquire(1, "a b", Writers)));
    assert_eq!(refusal.code(), RefusalCode::InvalidArgument, "{refusal}");
    let refusal = refused(take(&mut state, acquire(7, "n1", Writers)));
    assert_eq!(refusal.code(), RefusalCode::NotFound, "{refusal}");
    assert_eq!(refused(state.apply(release(7, "n1", 0))).code(), RefusalCode::NotFound);
    state.apply(create("creating", 2, 1));
    let refusal = refused(take(&mut state, acquire(2, "n1", Writers)));
    assert_eq!(refusal, Refusal::VolumeNotReady { name: "creating".to_owned() });
    ready_volume(&mut state, "deleting", 3, 1);
    state.apply(Command::DeleteVolume { volume: volume_id(3) });
    let refusal = refused(take(&mut state, acquire(3, "n1", Writers)));
    assert_eq!(refusal, Refusal::VolumeBeingDeleted { name: "deleting".to_owned() });
}

#[test]
fn a_leased_volume_is_not_deleted() {
    let mut state = leasable();
    take(&mut state, acquire(1, "n1", SingleNodeWriter));
    let delete = Command::DeleteVolume { volume: volume_id(1) };
    let before = state.clone();
    let refusal = refused(state.apply(delete.clone()));
    assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    assert_eq!(
        refusal.to_string(),
        "volume \"db\" is leased to host \"n1\" (single-node-writer): a volume in use is not \
         deleted; release its leases first (see `ballastctl lease list`)"
    );
    assert_eq!(state, before);
    state.apply(release(1, "n1", 0));
    assert_eq!(state.apply(delete), Reply::Done);
    assert_eq!(state.volume(volume_id(1)).map(|it| it.phase), Some(VolumePhase::Deleting));
    assert_eq!(state.check(), Ok(()));
}

#[test]
fn leases_have_a_limit() {
    let mut state = leasable();
    for host in 0..64 {
        created(take(&mut state, acquire(1, &format!("n{host}"), Readers)));
    }
    let refusal = refused(take(&mut state, forced(acquire(1, "m", Readers), "one more")));
    assert_eq!(refusal.code(), RefusalCode::ResourceExhausted, "{refusal}");
    let volume = created(take(&mut state, forced(acquire(1, "m", Writers), "all gone")));
    assert_eq!(hosts(&volume), [("m", state.revision())]);
    assert_eq!(state.check(), Ok(()));
}

/// A deleted volume's successor has its name, and none of its epochs (guarantee **fenced**): a host
/// that comes back names a volume and an epoch.
#[test]
fn no_epoch_of_a_deleted_volume_is_one_of_its_successor() {
    let mut state = leasable();
    let mut given = BTreeSet::new();
    for id in 1..6 {
        for host in ["n1", "n2"] {
            let granted = created(take(&mut state, acquire(id, host, SingleNodeWriter)));
            assert!(given.insert(granted.last_epoch), "again: {:?}", granted.last_epoch);
            assert_eq!(given.last(), Some(&granted.last_epoch), "they only grow");
            let epoch = granted.last_epoch.0;
            let released = release(id, host, epoch);
            assert_eq!(created(state.apply(released)).leases, []);
        }
        state.apply(Command::DeleteVolume { volume: volume_id(id) });
        state = ClusterState::decode(&state.encode()).expect("it is sound");
        ready_volume(&mut state, "db", id + 1, 3);
    }
}

/// What an earlier program proposed is applied as it applies it, between what this one proposes.
#[test]
fn entries_of_earlier_programs_count_the_leases_of_their_volume() {
    let mut state = leasable();
    let of_earlier = |host| of_volume(acquire(1, host, Writers));
    for (host, epoch) in [("n1", 1), ("n2", 2)] {
        assert_eq!(created(take(&mut state, of_earlier(host))).last_epoch, Epoch(epoch));
    }
    let unique = created(take(&mut state, acquire(1, "n3", Writers))).last_epoch;
    assert_eq!(unique, Epoch(state.revision()));
    let next = created(take(&mut state, of_earlier("n4"))).last_epoch;
    assert_eq!(next, Epoch(unique.0 + 1));
    assert_eq!(state.check(), Ok(()));
    let last = created(take(&mut state, acquire(1, "n5", Writers))).last_epoch;
    assert!(last > next);
}

/// What is asked of leases that have changed meanwhile does nothing, however late it comes.
#[test]
fn what_comes_late_is_refused() {
    let mut state = leasable();
    let ask = |host| Command::AcquireLease(acquire(1, host, SingleNodeWriter));
    let by_force = Command::AcquireLease(forced(acquire(1, "n2", SingleNodeWriter), "cut off"));
    let moved_on = |seen, now| {
        let name = "db".to_owned();
        Reply::Refused(Refusal::LeasesMovedOn { name, seen, now })
    };
    let first = created(state.apply(seen(0, ask("n1"))));
    assert_eq!(created(state.apply(seen(0, ask("n1")))), first, "its own, however late");
    assert_eq!(created(state.apply(seen(1, release(1, "n1", first.last_epoch.0)))).leases, []);
    let before = state.clone();
    for late in [seen(0, ask("n1")), seen(1, ask("n1")), seen(0, release(1, "n1", 0))] {
        let reply = state.apply(late);
        let Reply::Refused(refusal) = reply else { panic!("{reply:?}") };
        assert_eq!(refusal.code(), RefusalCode::Aborted, "{refusal}");
    }
    assert_eq!(state.apply(seen(1, by_force.clone())), moved_on(1, 2));
    assert_eq!(state, before);

    // A release with nothing to end: of what was asked before it, nothing is granted after it.
    assert_eq!(created(state.apply(seen(2, release(1, "n1", 0)))).lease_revision, 3);
    assert_eq!(state.apply(seen(2, ask("n1"))), moved_on(2, 3));
    assert_eq!(state.apply(seen(2, release(1, "n1", 0))), moved_on(2, 3), "done already");

    // A late release by a host's name, a late force.
    let again = created(state.apply(seen(3, ask("n1"))));
    assert_eq!(state.apply(seen(3, release(1, "n1", 0))), moved_on(3, 4));
    assert_eq!(state.apply(seen(3, by_force.clone())), moved_on(3, 4));
    assert_eq!(state.volume(volume_id(1)), Some(&again));
    assert_eq!(hosts(&created(state.apply(seen(4, by_force))))[0].0, "n2");
    assert_eq!(state.check(), Ok(()));
}

#[derive(Clone, Debug)]
enum Ask {
    Acquire {
        host: u8,
        mode: LeaseMode,
        read_only: bool,
        force: bool,
    },
    /// Of the lease that was granted so many grants after the first; 0 = whichever there is.
    Release {
        host: u8,
        grant: usize,
    },
    Delete,
}

fn ask() -> impl Strategy<Value = Ask> {
    let mode = prop::sample::select(MODES.to_vec());
    prop_oneof![
        12 => (0..4_u8, mode, any::<bool>(), any::<bool>()).prop_map(
            |(host, mode, read_only, force)| Ask::Acquire { host, mode, read_only, force }
        ),
        6 => (0..4_u8, 0..6_usize).prop_map(|(host, grant)| Ask::Release { host, grant }),
        1 => Just(Ask::Delete),
    ]
}

/// Who holds what, the dumb way: host to (mode, read-only, epoch).
#[derive(Default)]
struct Model {
    held: BTreeMap<u8, (LeaseMode, bool, u64)>,
    given: Vec<u64>,
    deleted: bool,
}

impl Model {
    fn epoch_of(&self, grant: usize) -> u64 {
        match grant {
            0 => 0,
            nth => self.given.get(nth - 1).copied().unwrap_or(u64::MAX),
        }
    }

    /// Whether it is carried out (also when nothing changes), or refused. `next`: the epoch that a
    /// new lease would get.
    fn carries_out(&mut self, ask: &Ask, next: u64) -> bool {
        match *ask {
            Ask::Delete if self.held.is_empty() => {
                self.deleted = true;
                true
            }
            Ask::Delete => false,
            Ask::Release { host, grant } => {
                let epoch = self.epoch_of(grant);
                let meant = self.held.get(&host).is_some_and(|it| epoch == 0 || epoch == it.2);
                if meant {
                    self.held.remove(&host);
                }
                true
            }
            Ask::Acquire { .. } if self.deleted => false,
            Ask::Acquire { host, mode, read_only, force } => {
                let read_only = read_only || mode == Readers;
                if let Some(own) = self.held.get(&host) {
                    return (own.0, own.1) == (mode, read_only);
                }
                let shared = mode == Readers || mode == Writers;
                let fits = |held: &LeaseMode| shared && *held == mode;
                if !self.held.values().all(|it| fits(&it.0)) {
                    if !force {
                        return false;
                    }
                    self.held.clear();
                }
                self.given.push(next);
                self.held.insert(host, (mode, read_only, next));
                true
            }
        }
    }
}

fn command(ask: &Ask, model: &Model) -> Command {
    match *ask {
        Ask::Acquire { host, mode, read_only, force } => {
            let lease = AcquireLease { read_only, ..acquire(1, &format!("n{host}"), mode) };
            Command::AcquireLease(if force { forced(lease, "in the way") } else { lease })
        }
        Ask::Release { host, grant } => release(1, &format!("n{host}"), model.epoch_of(grant)),
        Ask::Delete => Command::DeleteVolume { volume: volume_id(1) },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn leases_are_those_of_the_model(asks in prop::collection::vec(ask(), 1..60)) {
        let mut state = leasable();
        let mut model = Model::default();
        let mut owners = BTreeMap::new();
        for ask in asks {
            let before = state.volume(volume_id(1)).expect("never confirmed as gone").clone();
            let (command, next) = (command(&ask, &model), state.revision() + 1);
            let reply = state.apply(command.clone());
            let carried_out = model.carries_out(&ask, next);
            prop_assert_eq!(!matches!(reply, Reply::Refused(_)), carried_out, "{:?}", ask);
            let volume = state.volume(volume_id(1)).expect("never confirmed as gone").clone();
            let held: BTreeMap<u8, _> = volume.leases.iter().map(|it| {
                let host: u8 = it.host[1..].parse().expect("a number");
                (host, (it.mode, it.read_only, it.epoch.0))
            }).collect();
            prop_assert_eq!(&held, &model.held);
            let last = model.given.last().copied().unwrap_or(0);
            prop_assert_eq!(volume.last_epoch, Epoch(last));

            let changed = u64::from(volume.leases != before.leases);
            prop_assert_eq!(volume.lease_revision, before.lease_revision + changed);
            let modes: BTreeSet<LeaseMode> = held.values().map(|it| it.0).collect();
            let exclusive = modes.iter().any(|mode| !matches!(mode, Readers | Writers));
            prop_assert!(modes.len() <= 1 && (!exclusive || held.len() <= 1), "one-writer");
            for (host, (.., epoch)) in held {
                prop_assert_eq!(*owners.entry(epoch).or_insert(host), host, "an epoch of two hosts");
            }
            let once = state.clone();
            prop_assert_eq!(state.apply(command), reply, "another answer to a repetition");
            prop_assert_eq!(&state, &once, "a repetition changed something");
            prop_assert_eq!(state.check(), Ok(()));
            let decoded = ClusterState::decode(&state.encode());
            prop_assert_eq!(decoded.as_ref(), Ok(&state));
        }
    }
}
