//! Registration, starts, rolled-back and lost pools.

mod common;

use ballast_block::{ClusterId, NodeId, ReplicaId};
use ballast_cluster::{
    ClusterState, Command, NodeBooted, NodeProblem, NodeState, PoolSpace, PoolState, Refusal,
    RefusalCode, ReplicaState, Reply,
};
use common::{
    alive, booted, booted_with, cluster_of, create, created, pool_id, ready_volume, refused,
    register, report,
};

#[test]
fn a_node_is_registered_once_and_may_move() {
    let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
    assert_eq!(state.apply(register(1)), Reply::Done);
    assert_eq!(state.apply(register(1)), Reply::Done);
    assert_eq!((state.nodes().count(), state.revision()), (1, 1));
    assert_eq!(state.node(NodeId(1)).unwrap().state, NodeState::Registered);

    let Command::RegisterNode(mut moved) = register(1) else { unreachable!() };
    moved.peer_address = "[fd00::7]:7100".to_owned();
    assert_eq!(state.apply(Command::RegisterNode(moved.clone())), Reply::Done);
    assert_eq!(state.node(NodeId(1)).unwrap().peer_address, "[fd00::7]:7100");

    moved.name = "other".to_owned();
    let refusal = refused(state.apply(Command::RegisterNode(moved.clone())));
    assert!(matches!(refusal, Refusal::NodeDiffers { .. }), "{refusal}");
    (moved.node, moved.name) = (NodeId(2), "n1".to_owned());
    let refusal = refused(state.apply(Command::RegisterNode(moved)));
    assert_eq!(refusal.code(), RefusalCode::AlreadyExists);
    assert_eq!(refusal.to_string(), "node name \"n1\" belongs to node-1: give node-2 another name");
}

#[test]
fn bad_registrations_are_refused() {
    let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
    let Command::RegisterNode(good) = register(1) else { unreachable!() };
    let mut problem = |change: &dyn Fn(&mut ballast_cluster::RegisterNode)| {
        let mut bad = good.clone();
        change(&mut bad);
        match refused(state.apply(Command::RegisterNode(bad))) {
            Refusal::NodeInvalid { problem, .. } => problem,
            other => panic!("{other}"),
        }
    };
    assert_eq!(problem(&|it| it.node = NodeId(0)), NodeProblem::IdZero);
    assert_eq!(problem(&|it| it.name = "a/b".to_owned()), NodeProblem::Name);
    assert_eq!(problem(&|it| it.name = "a..b".to_owned()), NodeProblem::Name);
    assert_eq!(problem(&|it| it.peer_address = "host".to_owned()), NodeProblem::PeerAddress);
    let long = "x".repeat(318);
    let labels = |it: &mut ballast_cluster::RegisterNode| {
        it.labels.insert("zone".to_owned(), long.clone());
    };
    assert_eq!(problem(&labels), NodeProblem::Labels);
    assert_eq!(state.revision(), 0);

    for node in 1..=5 {
        assert_eq!(state.apply(register(node)), Reply::Done);
    }
    let refusal = refused(state.apply(register(6)));
    assert_eq!(refusal.code(), RefusalCode::ResourceExhausted);
}

#[test]
fn a_newer_start_is_accepted_and_heals_a_failed_pool() {
    let mut state = cluster_of(1);
    assert_eq!(state.node(NodeId(1)).unwrap().state, NodeState::Active);
    assert_eq!(state.apply(report(1, PoolState::Failed, 100, 0)), Reply::Done);
    assert_eq!(state.apply(booted(1, 2, 77, 1 << 30)), Reply::Done);
    let pool = state.pool(pool_id(1)).unwrap();
    assert_eq!((pool.boot_counter, pool.incarnation, pool.state), (2, 77, PoolState::Ok));
    let unregistered = refused(state.apply(booted(2, 1, 1, 0)));
    assert_eq!(unregistered, Refusal::UnknownNode { node: NodeId(2) });
    let zero = refused(state.apply(booted(1, 0, 1, 0)));
    assert_eq!(zero.code(), RefusalCode::InvalidArgument);
}

#[test]
fn a_repeated_report_of_one_start_is_not_a_roll_back() {
    let mut state = cluster_of(1);
    assert_eq!(state.apply(booted(1, 2, 77, 1 << 30)), Reply::Done);
    assert_eq!(state.apply(booted(1, 2, 77, 1 << 30)), Reply::Done);
    assert_eq!(state.pool(pool_id(1)).unwrap().state, PoolState::Ok);
}

#[test]
fn a_counter_that_is_not_newer_loses_the_pool_and_its_replicas() {
    for (counter, incarnation) in [(3, 78), (2, 78), (1, 77)] {
        let mut state = cluster_of(3);
        let volume = ready_volume(&mut state, "a", 1, 3);
        assert_eq!(state.apply(booted(2, 3, 77, 1 << 30)), Reply::Done);
        let rolled_back = Reply::PoolRolledBack {
            pool: pool_id(2),
            known: 3,
            reported: counter,
            lost: vec![ReplicaId(1001)],
        };
        assert_eq!(alive(&mut state, booted(2, counter, incarnation, 1 << 30)), rolled_back);
        let states: Vec<_> = state.replicas_of(volume.family).map(|it| it.state).collect();
        assert_eq!(states, [ReplicaState::Ready, ReplicaState::Lost, ReplicaState::Ready]);
        assert_eq!(state.pool(pool_id(2)).unwrap().state, PoolState::Lost);

        // It never comes back: not by a newer start, a report, or its replica's word.
        let lost = Refusal::PoolLost { pool: pool_id(2) };
        assert_eq!(refused(state.apply(booted(2, 9, 99, 1 << 30))), lost);
        assert_eq!(refused(state.apply(report(2, PoolState::Ok, 100, 0))), lost);
        let ready = Command::ReplicaReady { replica: ReplicaId(1001) };
        let lost = Refusal::ReplicaLost { replica: ReplicaId(1001) };
        assert_eq!(refused(state.apply(ready)), lost);
    }
}

#[test]
fn a_report_that_arrives_late_loses_no_pool() {
    let mut state = cluster_of(3);
    let late = booted(2, 2, 77, 1 << 30);
    assert_eq!(state.apply(booted(2, 3, 78, 1 << 30)), Reply::Done);
    let before = state.clone();
    let Reply::PoolOlder { known } = state.apply(late.clone()) else { panic!("believed at once") };
    assert_eq!((known.boot_counter, known.incarnation), (3, 78));
    // What it was told is no proof once a later start is known.
    assert_eq!(state, before);
    assert_eq!(state.apply(booted(2, 4, 79, 1 << 30)), Reply::Done);
    let Command::NodeBooted(late) = late else { unreachable!() };
    let repeated = Command::NodeBooted(NodeBooted { told: Some(known), ..late });
    assert!(matches!(state.apply(repeated), Reply::PoolOlder { known } if known.boot_counter == 4));
    assert_eq!(state.pool(pool_id(2)).unwrap().state, PoolState::Ok);
}

/// A start as this version reports it.
fn marked(node: u32, pool: u8, boot: u64, settled: (u64, u64), offered: u64) -> Command {
    let Command::NodeBooted(mut it) = booted_with(node, pool, boot, boot * 100, 1 << 30) else {
        unreachable!()
    };
    (it.settled, it.settled_boot) = settled;
    it.offered = offered;
    it.member = Some(ReplicaId(u64::from(node)));
    Command::NodeBooted(it)
}

#[test]
fn an_older_copy_is_refused_however_often_it_starts() {
    let known = || {
        let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
        state.apply(register(1));
        assert_eq!(state.apply(marked(1, 1, 1, (0, 0), 11)), Reply::Done);
        assert_eq!(state.apply(marked(1, 1, 2, (11, 1), 12)), Reply::Done);
        state
    };
    // Copied after start 1, put back after start 2: 3, 4 ... are newer counters, and no help.
    for boot in 3..9 {
        let reply = alive(&mut known(), marked(1, 1, boot, (11, 1), 77));
        assert!(matches!(reply, Reply::PoolRolledBack { .. }), "start {boot}: {reply:?}");
    }
    // An answer that was lost is no roll back: the same mark is offered again.
    let mut state = known();
    assert_eq!(state.apply(marked(1, 1, 3, (11, 1), 12)), Reply::Done);
    assert_eq!(state.apply(marked(1, 1, 5, (12, 3), 15)), Reply::Done);
    assert_eq!(state.apply(marked(1, 1, 7, (12, 3), 15)), Reply::Done);
    // A pool from before marks were kept.
    let reply = alive(&mut state, marked(1, 1, 9, (0, 0), 99));
    assert!(matches!(reply, Reply::PoolRolledBack { .. }), "{reply:?}");
    // A cluster group that went back in time does not take its pools for lost.
    let refusal = refused(known().apply(marked(1, 1, 9, (15, 7), 19)));
    assert!(matches!(refusal, Refusal::PoolAhead { .. }), "{refusal}");
    assert_eq!(ClusterState::decode(&known().encode()), Ok(known()));
}

#[test]
fn a_fresh_pool_takes_the_place_of_a_lost_one() {
    let mut state = cluster_of(3);
    let many = ready_volume(&mut state, "many", 1, 3);
    let single = loop {
        // Volumes with one replica go around the nodes.
        let name = format!("single-{}", state.volumes().count());
        let id = 10 + state.volumes().count() as u8;
        let volume = ready_volume(&mut state, &name, id, 1);
        let replica = *state.replica(volume.replicas[0]).unwrap();
        if replica.node == NodeId(2) {
            break replica;
        }
    };
    let fresh = |member: u64| {
        let Command::NodeBooted(mut it) = booted_with(2, 22, 1, 5, 1 << 30) else { unreachable!() };
        (it.offered, it.member) = (9, Some(ReplicaId(member)));
        Command::NodeBooted(it)
    };
    // Without an administrator's word no other pool comes in.
    assert!(matches!(refused(state.apply(fresh(2))), Refusal::PoolNotExpected { .. }));
    let replace = |guarded| Command::ReplacePool { node: NodeId(2), pool: pool_id(2), guarded };
    let refusal = refused(state.apply(replace(true)));
    let name = state.volume_of_family(single.family).unwrap().name.clone();
    let pool = pool_id(2);
    assert_eq!(refusal, Refusal::PoolHoldsMajority { pool, name, left: 0, replicas: 1 });
    let replace = replace(false);
    let Reply::Replacing { member } = state.apply(replace.clone()) else { panic!() };
    assert_eq!(state.apply(replace.clone()), Reply::Replacing { member });
    assert_eq!(state.pool(pool_id(2)).unwrap().state, PoolState::Lost);
    assert!(matches!(refused(state.apply(fresh(2))), Refusal::PoolNotExpected { .. }));
    assert_eq!(state.apply(fresh(member.0)), Reply::Done);
    assert_eq!(state.node(NodeId(2)).unwrap().cluster_member(), member);
    let replicas: Vec<_> = state.replicas_of(many.family).copied().collect();
    let [.., last] = replicas.as_slice() else { panic!() };
    assert!(last.id > member && last.pool == pool_id(22) && last.node == NodeId(2));
    assert_eq!(last.state, ReplicaState::Creating);
    assert!(state.replica(many.replicas[1]).is_none(), "the old id is gone for good");
    // Nobody has what the only replica held.
    assert_eq!(state.replica(single.id).unwrap().state, ReplicaState::Lost);
    assert_eq!(state.apply(replace), Reply::Done);
    assert_eq!(ClusterState::decode(&state.encode()), Ok(state.clone()));
    // A damaged replica on a good pool gets a new id too, while the others are a majority.
    state.apply(Command::ReplicaReady { replica: last.id });
    let damaged = Command::ReplaceReplica { replica: many.replicas[0] };
    assert_eq!(state.apply(damaged.clone()), Reply::Done);
    assert_eq!(state.apply(damaged), Reply::Done);
    let second = Command::ReplaceReplica { replica: many.replicas[2] };
    assert!(matches!(refused(state.apply(second)), Refusal::ReplicaNotReplaceable { .. }));
    state.check().unwrap();
}

#[test]
fn a_pool_that_a_majority_needs_is_given_up_by_force_only() {
    let mut state = cluster_of(3);
    let replace = |node: u32, guarded| {
        let pool = pool_id(node as u8);
        Command::ReplacePool { node: NodeId(node), pool, guarded }
    };
    assert!(matches!(state.clone().apply(replace(1, true)), Reply::Replacing { .. }));
    ready_volume(&mut state, "db", 1, 3);
    assert!(matches!(state.apply(replace(1, true)), Reply::Replacing { .. }));
    assert!(matches!(state.apply(replace(1, true)), Reply::Replacing { .. }), "asked again");
    let refusal = refused(state.apply(replace(2, true)));
    let (pool, name) = (pool_id(2), "db".to_owned());
    assert_eq!(refusal, Refusal::PoolHoldsMajority { pool, name, left: 1, replicas: 3 });
    assert_eq!(refusal.code(), RefusalCode::FailedPrecondition);
    assert!(matches!(state.clone().apply(replace(2, false)), Reply::Replacing { .. }));

    let mut state = cluster_of(3);
    state.apply(replace(1, true));
    let refusal = refused(state.apply(replace(2, true)));
    assert_eq!(refusal, Refusal::PoolHoldsClusterMajority { pool: pool_id(2), left: 1, nodes: 3 });
    assert!(matches!(state.apply(replace(2, false)), Reply::Replacing { .. }));
}

#[test]
fn a_pool_stays_on_its_node() {
    let mut state = cluster_of(2);
    let Command::NodeBooted(mut moved) = booted(1, 5, 5, 0) else { unreachable!() };
    moved.node = NodeId(2);
    let refusal = refused(state.apply(Command::NodeBooted(moved)));
    assert!(matches!(refusal, Refusal::PoolOnOtherNode { .. }), "{refusal}");
    assert_eq!(state.pool(pool_id(1)).unwrap().boot_counter, 1);
}

#[test]
fn a_pool_declared_lost_confirms_what_was_to_be_removed_there() {
    let mut state = cluster_of(3);
    let volume = created(state.apply(create("a", 1, 3)));
    state.apply(Command::DeleteVolume { volume: volume.id });
    for replica in [1000, 1002] {
        let removed = Command::ReplicaRemoved { replica: ReplicaId(replica) };
        assert_eq!(state.apply(removed), Reply::Done);
    }
    assert!(state.volume(volume.id).is_some(), "one pool has not confirmed");
    assert_eq!(state.apply(report(2, PoolState::Lost, 100, 0)), Reply::Done);
    assert!(state.volume(volume.id).is_none());
    assert_eq!(state.replicas().count(), 0);
}

#[test]
fn only_a_real_change_of_space_is_worth_a_report() {
    let known = PoolSpace { capacity_bytes: 6400, used_bytes: 1000 };
    let worth = |capacity_bytes, used_bytes| {
        known.worth_reporting(&PoolSpace { capacity_bytes, used_bytes })
    };
    assert!(!worth(6400, 1099));
    assert!(worth(6400, 1100));
    assert!(worth(6400, 900));
    assert!(worth(6401, 1000));
    let nearly_full = PoolSpace { capacity_bytes: 6400, used_bytes: 6390 };
    assert!(nearly_full.worth_reporting(&PoolSpace { capacity_bytes: 6400, used_bytes: 6400 }));
}
