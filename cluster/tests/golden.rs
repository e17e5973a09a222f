//! The formats, held by files that were written once. A difference is a new format: keep reading
//! the old one, and add a file.

mod common;

use ballast_block::{FamilyId, NodeId, ReplicaId};
use ballast_cluster::{
    AcquireLease, ClusterState, Command, CommandError, LeaseMode, NodeBooted, PoolStart, PoolState,
    Refusal, RefusalCode, Reply, StateError,
};
use common::{
    acquire, booted, booted_with, cluster_of, cluster_of_shards, create, forced, of_volume,
    on_shard, pool_id, preferring, ready_volume, register, release, report, seen, volume_id,
};

const COMMANDS: &str = include_str!("golden/commands-v1.txt");
const COMMANDS_2: &str = include_str!("golden/commands-v2.txt");
const COMMANDS_3: &str = include_str!("golden/commands-v3.txt");
const COMMANDS_4: &str = include_str!("golden/commands-v4.txt");
const COMMANDS_5: &str = include_str!("golden/commands-v5.txt");
const COMMANDS_6: &str = include_str!("golden/commands-v6.txt");
const REPLIES: &str = include_str!("golden/replies-v1.txt");
const REPLIES_2: &str = include_str!("golden/replies-v2.txt");
const REPLIES_4: &str = include_str!("golden/replies-v4.txt");
const STATE: &str = include_str!("golden/state-v1.txt");
const STATE_3: &str = include_str!("golden/state-v3.txt");
const STATE_4: &str = include_str!("golden/state-v4.txt");
const STATE_6: &str = include_str!("golden/state-v6.txt");

fn one_of_each() -> Vec<Command> {
    vec![
        register(2),
        booted(2, 7, 0x1122_3344_5566_7788, 1 << 40),
        report(2, PoolState::Failed, 1 << 40, 1 << 39),
        create("pvc-1", 3, 3),
        Command::ReplicaReady { replica: ReplicaId(1001) },
        Command::FamilyFormed { family: FamilyId(1) },
        Command::ResizeVolume { volume: volume_id(3), size_bytes: 1 << 30 },
        Command::DeleteVolume { volume: volume_id(3) },
        Command::ReplicaRemoved { replica: ReplicaId(1001) },
    ]
}

/// Nodes, pools and replicas in every state, volumes in every phase.
fn one_of_everything() -> ClusterState {
    let mut state = cluster_of(3);
    state.apply(register(4));
    ready_volume(&mut state, "ready", 1, 3);
    state.apply(create("creating", 2, 1));
    let deleting = ready_volume(&mut state, "deleting", 3, 3);
    state.apply(Command::DeleteVolume { volume: deleting.id });
    state.apply(Command::ReplicaRemoved { replica: deleting.replicas[0] });
    state.apply(report(2, PoolState::Lost, 1 << 30, 1 << 20));
    state.apply(booted_with(3, 33, 1, 9, 1 << 30));
    state.apply(report(33, PoolState::Failed, 1 << 30, 1 << 10));
    state
}

/// What came with reader version 2.
fn one_of_each_2() -> Vec<Command> {
    let Command::NodeBooted(mut booted) = booted(2, 7, 0x1122_3344_5566_7788, 1 << 40) else {
        unreachable!()
    };
    (booted.settled, booted.settled_boot, booted.offered) = (0x0102_0304, 6, 0x0506_0708);
    booted.member = Some(ReplicaId(1007));
    vec![
        Command::NodeBooted(booted),
        Command::ReplacePool { node: NodeId(2), pool: pool_id(2), guarded: false },
        Command::ReplaceReplica { replica: ReplicaId(1001) },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(line: &str) -> Vec<u8> {
    let digit = |at| u8::from_str_radix(&line[at..at + 2], 16).expect("hex digits");
    (0..line.len()).step_by(2).map(digit).collect()
}

fn compare_commands(golden: &str, now: Vec<Command>) {
    // The file as it would be now, for whoever adds a format: printed when a comparison fails.
    let file: String =
        now.iter().map(|it| format!("{} {}\n", it.name(), hex(&it.encode()))).collect();
    assert_eq!(golden, file);
    for (line, command) in golden.lines().zip(now) {
        let (_, bytes) = line.split_once(' ').expect("name and bytes");
        assert_eq!(Command::decode(&unhex(bytes)), Ok(command));
    }
}

#[test]
fn commands_v1() {
    compare_commands(COMMANDS, one_of_each());
}

#[test]
fn commands_v2() {
    compare_commands(COMMANDS_2, one_of_each_2());
}

/// What came with reader version 3: a shard that is not 0.
#[test]
fn commands_v3() {
    let booted = on_shard(1, booted(2, 7, 0x1122_3344_5566_7788, 1 << 40));
    assert_eq!(booted.min_reader(), 3);
    let Command::NodeBooted(older) = booted_with(2, 2, 7, 5, 1 << 40) else { unreachable!() };
    let told = Some(PoolStart { boot_counter: 9, incarnation: 0x1122_3344 });
    let older = Command::NodeBooted(NodeBooted { told, ..older });
    assert_eq!(older.min_reader(), 3);
    compare_commands(COMMANDS_3, vec![booted, older]);
}

/// What came with reader version 4: leases, and nodes that are preferred.
#[test]
fn commands_v4() {
    let reader = AcquireLease { read_only: true, ..acquire(3, "n2", LeaseMode::Readers) };
    let commands = vec![
        preferring(&[3, 1], create("pvc-1", 3, 3)),
        Command::AcquireLease(of_volume(acquire(3, "n1", LeaseMode::SingleNodeWriter))),
        Command::AcquireLease(of_volume(forced(reader, "n1 burnt down"))),
        release(3, "n1", 0),
        release(3, "n1", 7),
    ];
    assert!(commands.iter().all(|command| command.min_reader() == 4));
    compare_commands(COMMANDS_4, commands);
}

/// What came with reader version 5: a pool that is given up only if it can be missed, nodes that did
/// not answer.
#[test]
fn commands_v5() {
    let guarded = Command::ReplacePool { node: NodeId(2), pool: pool_id(2), guarded: true };
    let Command::CreateVolume(mut create) = create("pvc-1", 3, 3) else { unreachable!() };
    create.absent = vec![NodeId(3), NodeId(1)];
    let commands = vec![guarded, Command::CreateVolume(create)];
    assert!(commands.iter().all(|command| command.min_reader() == 5));
    compare_commands(COMMANDS_5, commands);
}

/// What came with reader version 6: epochs that are unique in the cluster, and asking of leases as they
/// were seen.
#[test]
fn commands_v6() {
    let acquire = Command::AcquireLease(acquire(3, "n1", LeaseMode::Writers));
    let commands = vec![
        acquire.clone(),
        seen(0, acquire.clone()),
        seen(7, acquire),
        seen(0, release(3, "n1", 0)),
        seen(7, release(3, "n1", 9)),
    ];
    assert!(commands.iter().all(|command| command.min_reader() == 6));
    compare_commands(COMMANDS_6, commands);
}

#[test]
fn replies_v1() {
    let mut state = cluster_of(3);
    let rolled_back = Reply::PoolRolledBack {
        pool: pool_id(7),
        known: 5,
        reported: 4,
        lost: vec![ReplicaId(1000)],
    };
    let message = "pool is gone".to_owned();
    let refusal = Refusal::Forwarded { code: RefusalCode::NotFound, message };
    let volume = state.apply(create("pvc-1", 3, 3));
    let replies = [Reply::Done, volume, rolled_back, Reply::Refused(refusal)];
    let now: String = replies.iter().map(|reply| hex(&reply.encode()) + "\n").collect();
    assert_eq!(REPLIES, now);
    for (line, reply) in REPLIES.lines().zip(replies) {
        assert_eq!(Reply::decode(&unhex(line)), Ok(reply));
    }
}

#[test]
fn state_v1() {
    let state = one_of_everything();
    let golden: String = STATE.lines().collect();
    assert_eq!(golden, hex(&state.encode()));
    assert_eq!(ClusterState::decode(&unhex(&golden)), Ok(state));
}

#[test]
fn replies_v2() {
    let mut state = cluster_of_shards(3, 2);
    state.apply(create("pvc-1", 3, 3));
    let volume = state.apply(create("pvc-2", 4, 3));
    let known = PoolStart { boot_counter: 9, incarnation: 0x1122_3344 };
    let replies = [Reply::GivenUp, volume, Reply::PoolOlder { known }];
    let now: String = replies.iter().map(|reply| hex(&reply.encode()) + "\n").collect();
    assert_eq!(REPLIES_2, now);
    for (line, reply) in REPLIES_2.lines().zip(replies) {
        assert_eq!(Reply::decode(&unhex(line)), Ok(reply));
    }
}

#[test]
fn state_v3() {
    let mut state = cluster_of_shards(3, 2);
    ready_volume(&mut state, "first", 1, 3);
    ready_volume(&mut state, "second", 2, 3);
    let golden: String = STATE_3.lines().collect();
    assert_eq!(golden, hex(&state.encode()));
    assert_eq!(ClusterState::decode(&unhex(&golden)), Ok(state));
}

/// Leases of every mode, a forced one, and a volume whose only one was released.
fn one_of_each_lease(asked: fn(AcquireLease) -> AcquireLease) -> ClusterState {
    use LeaseMode::*;
    let mut state = cluster_of(3);
    let modes = [SingleNodeWriter, SingleNodeMultiWriter, SingleNodePublisher, Readers, Writers];
    for (id, mode) in (1..).zip(modes) {
        ready_volume(&mut state, &format!("v-{id}"), id, 1);
        for host in ["n2", "n1"] {
            let lease = forced(acquire(id, host, mode), "n2 is cut off");
            state.apply(Command::AcquireLease(asked(lease)));
        }
    }
    ready_volume(&mut state, "released", 6, 1);
    let read_only = AcquireLease { read_only: true, ..acquire(6, "n1", SingleNodeWriter) };
    state.apply(Command::AcquireLease(asked(read_only)));
    state.apply(release(6, "n1", 0));
    state
}

#[test]
fn state_v4() {
    let state = one_of_each_lease(of_volume);
    assert_eq!(state.volumes().map(|it| it.leases.len()).collect::<Vec<_>>(), [1, 1, 1, 2, 2, 0]);
    let golden: String = STATE_4.lines().collect();
    assert_eq!(golden, hex(&state.encode()));
    assert_eq!(ClusterState::decode(&unhex(&golden)), Ok(state));
}

#[test]
fn state_v6() {
    let state = one_of_each_lease(|asked| asked);
    let golden: String = STATE_6.lines().collect();
    assert_eq!(golden, hex(&state.encode()));
    assert_eq!(ClusterState::decode(&unhex(&golden)), Ok(state));
}

#[test]
fn replies_v4() {
    let state = one_of_each_lease(of_volume);
    let leased = state.find_volume("v-4").expect("it was made").clone();
    let reply = Reply::Volume(leased);
    assert_eq!(REPLIES_4, hex(&reply.encode()) + "\n");
    assert_eq!(Reply::decode(&unhex(REPLIES_4.trim())), Ok(reply));
}

#[test]
fn damage_is_found() {
    let bytes = one_of_everything().encode();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(ClusterState::decode(&damaged).is_err(), "byte {at}");
    }
    for length in 0..bytes.len() {
        assert!(ClusterState::decode(&bytes[..length]).is_err(), "length {length}");
    }
    assert_eq!(ClusterState::decode(&[]), Err(StateError::NotAState));
}

#[test]
fn what_is_too_new_is_not_skipped() {
    // min_reader (field 1) = 7, and a kind (field 99) that nobody knows.
    let newer = [0x08, 7, 0x9a, 0x06, 0];
    assert_eq!(Command::decode(&newer), Err(CommandError::TooNew { needs: 7 }));
    let unknown_kind = [0x08, 1, 0x9a, 0x06, 0];
    assert!(matches!(Command::decode(&unknown_kind), Err(CommandError::Malformed(_))));
    assert!(matches!(Command::decode(&[]), Err(CommandError::Malformed(_))));
}
