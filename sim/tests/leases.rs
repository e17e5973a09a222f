//! Leases that move while the one who had them writes on (hazard F10): what he still sends is refused,
//! wherever he is and whenever it arrives.

use std::cell::Cell;
use std::rc::Rc;

use ballast_block::geometry::BLOCK_SIZE_U64;
use ballast_block::{BlockRange, Epoch, FamilyId, NodeId};
use ballast_cluster::LeaseMode;
use ballast_node::leasing::LeaseAsk;
use ballast_sim::ballast::{Sizes, volume_name};
use ballast_sim::machine::Crash;
use ballast_sim::oracle::Outcome;
use ballast_sim::scene::{Scene, ScriptHost, play};
use ballast_sim::system::{System, VolumeView};

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

const SEEDS: u64 = 4;
const BLOCKS: BlockRange = BlockRange { start: 0, count: 4 };
const OTHERS: BlockRange = BlockRange { start: 8, count: 4 };

/// A new holder writes within so many milliseconds of being forced in.
const FORCED_MS_MAX: u64 = 10_000;
/// Longer than anything takes.
const PATIENCE_MS: u64 = 60_000;

fn holds<F: Future<Output = ()>>(script: impl Fn(Scene) -> F) {
    for seed in 0..SEEDS {
        play(seed, Sizes::default(), None, &script);
    }
}

/// A host that has the lease, writes through node 1, and has node 1 lead.
async fn holder_at_1(scene: &Scene) -> ScriptHost {
    let holder = scene.host();
    assert!(holder.take_lease(N2, LeaseMode::SingleNodeWriter, false, PATIENCE_MS).await);
    holder.attach(N1).await;
    scene.until("the leader follows its writer", || scene.leader() == Some(N1)).await;
    holder.must_write(BLOCKS).await;
    holder
}

/// Forces the lease over to a new host, through node 2, which must write soon.
async fn force(scene: &Scene) -> ScriptHost {
    let began = scene.world.now_ms();
    let next = scene.host();
    let end = began + FORCED_MS_MAX;
    while !next.take_lease(N2, LeaseMode::SingleNodeWriter, true, FORCED_MS_MAX).await {
        assert!(scene.world.now_ms() < end, "the lease can't be forced over");
    }
    next.attach(N2).await;
    next.must_write(BLOCKS).await;
    let took = scene.world.now_ms() - began;
    assert!(took < FORCED_MS_MAX, "the new holder wrote after {took} ms");
    next
}

/// The holder's node is cut off from the others and alive; the holder reaches it and writes on.
async fn holder_is_cut_off(scene: Scene, leader: NodeId) {
    let holder = holder_at_1(&scene).await;
    scene.move_leader(leader).await;
    holder.must_write(BLOCKS).await;
    scene.set_isolated(N1, true);
    let floating = holder.write(BLOCKS);
    let next = force(&scene).await;
    let late = holder.write(OTHERS);
    scene.world.sleep_ms(2_000).await;
    next.must_write(BLOCKS).await;
    scene.set_isolated(N1, false);
    for write in [floating, late] {
        // Its node ends the connection when it hears of the end of the lease.
        assert_ne!(write.within(PATIENCE_MS).await, Some(Outcome::Done));
    }
    assert!(!holder.can_attach(N1).await, "its lease has ended");
    next.must_write(BLOCKS).await;
    scene.end().await;
}

#[test]
fn a_holder_that_is_cut_off_with_the_leader_never_writes_again() {
    holds(|scene| holder_is_cut_off(scene, N1));
}

#[test]
fn a_holder_that_is_cut_off_from_the_leader_never_writes_again() {
    holds(|scene| holder_is_cut_off(scene, N3));
}

/// Nothing is cut: the holder writes all the while, and is out from one entry to the next.
#[test]
fn a_holder_that_writes_all_the_while_is_out_at_once() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        let next = scene.host();
        assert!(
            !next.take_lease(N3, LeaseMode::SingleNodeWriter, false, PATIENCE_MS).await,
            "it is held"
        );
        holder.must_write(BLOCKS).await;
        let writes: Vec<_> = (0..32).map(|_| holder.write(BLOCKS)).collect();
        let next = force(&scene).await;
        for write in writes {
            assert!(write.within(PATIENCE_MS).await.is_some(), "it ends one way or the other");
        }
        let late = holder.write(OTHERS);
        assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
        next.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// The one who forces the lease over dies with the node that he asked, half-way.
#[test]
fn a_forced_move_that_breaks_off_is_whole_or_can_be_made_again() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        let other = scene.host();
        let pause = 1 + scene.world.seed() * 7;
        let crash = async {
            scene.world.sleep_ms(pause).await;
            scene.machine(N3).crash(Crash::Kill);
        };
        let take = other.take_lease(N3, LeaseMode::SingleNodeWriter, true, 2_000);
        let (_, taken) = tokio::join!(crash, take);
        // Whoever has it now: the others have to agree on one.
        let write = holder.write(OTHERS).within(PATIENCE_MS).await;
        assert!(!(taken && write == Some(Outcome::Done)), "both have it");
        scene.start_node(N3);
        let next = force(&scene).await;
        let late = holder.write(OTHERS);
        assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
        next.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// Whether a host that forces the lease over is told that it has it, asked once.
async fn is_forced_in(host: &ScriptHost, through: NodeId) -> bool {
    host.take_lease(through, LeaseMode::SingleNodeWriter, true, FORCED_MS_MAX).await
}

/// The newest lease of the volume that a node has heard of, and its holder.
fn newest(scene: &Scene, at: NodeId) -> Option<(Epoch, String)> {
    let node = scene.node(at);
    let state = node.cluster_state();
    let volume = state.volume_by_name(&volume_name(scene.volume()))?;
    volume.leases.iter().map(|lease| (lease.epoch, lease.host.clone())).max()
}

/// The node that leads the cluster group.
async fn cluster_leader(scene: &Scene) -> NodeId {
    let reports = scene.ask(N1, |node| async move { node.reports().await }).await;
    let leads = |one: &&NodeId| {
        let mut replicas = reports[*one].replicas.iter();
        replicas.any(|it| it.family == FamilyId::CLUSTER.0 && it.role == "leader")
    };
    reports.keys().find(leads).copied().expect("the cluster group has a leader")
}

/// Two force the lease over at the same moment: the one whom the cluster group lets in first has lost
/// it again when the volume's group hears of either, and is not told that he has it.
async fn two_force_at_once(scene: Scene, first_asks: NodeId, second_asks: NodeId) {
    let holder = holder_at_1(&scene).await;
    let (first, second) = (scene.host(), scene.host());
    // Nobody is let in before the volume has another leader, and the cluster group decides meanwhile.
    scene.move_leader(N3).await;
    scene.set_isolated(N3, true);
    let began = newest(&scene, first_asks).expect("the holder has it").0;
    let is_told = Cell::new(false);
    let first_force = async {
        let granted = is_forced_in(&first, first_asks).await;
        is_told.set(true);
        granted
    };
    let second_force = async {
        let decided = || newest(&scene, first_asks).is_some_and(|(epoch, _)| epoch > began);
        scene.until("the first is let in", decided).await;
        assert!(!is_told.get(), "the second comes too late for this test");
        let lost = newest(&scene, first_asks).expect("it is leased").0;
        (is_forced_in(&second, second_asks).await, lost)
    };
    let (first_granted, (second_granted, lost)) = tokio::join!(first_force, second_force);
    assert!(!first_granted, "told that he has what another one has");
    assert!(second_granted, "the last one has it");
    let (last, of) = newest(&scene, second_asks).expect("it is leased");
    assert!(last > lost && of == format!("host-{}", second.id().0), "{of} has it under {last:?}");
    for node in [N1, N2] {
        assert!(!first.can_attach_under(node, lost).await, "{node} lets the first in");
    }
    scene.set_isolated(N3, false);
    second.attach(second_asks).await;
    second.must_write(BLOCKS).await;
    assert!(!first.can_attach_under(N3, lost).await);
    let late = holder.write(OTHERS);
    assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
    scene.end().await;
}

#[test]
fn of_two_that_force_a_lease_at_once_the_last_one_has_it() {
    for (first_asks, second_asks) in [(N1, N2), (N2, N1), (N1, N1), (N2, N2)] {
        holds(|scene| two_force_at_once(scene, first_asks, second_asks));
    }
}

/// The same, where the first one's node has heard of his lease and not of its end.
#[test]
fn a_node_that_is_behind_does_not_tell_a_host_that_it_has_a_lease() {
    holds(|scene| async move {
        drop(holder_at_1(&scene).await);
        let decides = cluster_leader(&scene).await;
        let mut others = scene.nodes().into_iter().filter(|node| *node != decides);
        let (asked, leader) = (others.next().expect("a node"), others.next().expect("another"));
        scene.move_leader(leader).await;
        let began = newest(&scene, asked).expect("the holder has it").0;
        let (first, second) = (scene.host(), scene.host());
        let net = scene.world.net();
        let cut = |a, b, cut| net.set_cut(&scene.world, a, b, cut);
        // Decided, and not taken over by the volume's group yet.
        cut(asked, leader, true);
        let first_force = is_forced_in(&first, asked);
        let script = async {
            let decided = || newest(&scene, asked).is_some_and(|(epoch, _)| epoch > began);
            scene.until("the first is let in", decided).await;
            let lost = newest(&scene, asked);
            cut(asked, decides, true);
            assert!(is_forced_in(&second, decides).await);
            assert_eq!(newest(&scene, asked), lost, "it is not behind");
            cut(asked, leader, false);
            lost.expect("it is leased").0
        };
        let (granted, lost) = tokio::join!(first_force, script);
        assert!(!granted, "told that he has what another one has");
        cut(asked, decides, false);
        second.attach(asked).await;
        second.must_write(BLOCKS).await;
        assert!(!first.can_attach_under(leader, lost).await);
        scene.end().await;
    });
}

/// The holder's link is cut, and when it is back its volume is gone and another one has the name: what
/// the holder still has to write does not land there.
#[test]
fn the_holder_of_a_deleted_volume_never_writes_into_its_successor() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        scene.world.net().set_cut(&scene.world, holder.id(), N1, true);
        let floating = holder.write(BLOCKS);
        let (name, host) = (volume_name(scene.volume()), format!("host-{}", holder.id().0));
        let volume = name.clone();
        let released = scene.ask(N2, |node| async move {
            let released = node.release_lease(&volume, &host, Epoch(0), None).await;
            (released, node.delete_volume(&volume).await)
        });
        assert_eq!(released.await, (Ok(true), Ok(true)));
        let VolumeView { blocks, replicas, .. } = scene.ballast.volumes()[scene.volume()];
        let bytes = blocks * BLOCK_SIZE_U64;
        let made =
            scene.ask(N2, |node| async move { node.create_volume(&name, bytes, replicas).await });
        made.await.expect("the name is free");
        let next = scene.host();
        assert!(next.take_lease(N2, LeaseMode::SingleNodeWriter, false, PATIENCE_MS).await);
        next.attach(N2).await;
        next.must_write(BLOCKS).await;
        scene.world.net().set_cut(&scene.world, holder.id(), N1, false);
        let let_in = holder.reconnect(N1).await;
        if let_in {
            holder.write(BLOCKS).within(PATIENCE_MS).await;
            scene.check();
        }
        assert!(!let_in, "its volume is gone");
        assert_ne!(floating.within(PATIENCE_MS).await, Some(Outcome::Done));
        next.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// What a caller gives up, and asks of another node.
#[derive(Clone, Copy, Debug, PartialEq)]
enum GivenUp {
    Acquire,
    Force,
    Release,
}

fn revision(scene: &Scene, node: NodeId) -> u64 {
    let node = scene.node(node);
    let state = node.cluster_state();
    let volume = state.volume_by_name(&volume_name(scene.volume()));
    volume.expect("it is there").lease_revision
}

async fn acquire(
    scene: &Scene,
    through: NodeId,
    host: &str,
    force: bool,
    seen: Option<u64>,
) -> bool {
    let (name, host) = (volume_name(scene.volume()), host.to_owned());
    let (mode, by_force) = (LeaseMode::SingleNodeWriter, force.then(|| "it moves".to_owned()));
    let ask = LeaseAsk { host, mode, read_only: false, by_force, seen_revision: seen };
    let asked = scene.ask(through, |node| async move { node.acquire_lease(&name, ask).await });
    asked.await.is_ok()
}

async fn release(scene: &Scene, through: NodeId, seen: Option<u64>) -> bool {
    let name = volume_name(scene.volume());
    let asked = scene
        .ask(through, |node| async move { node.release_lease(&name, "h1", Epoch(0), seen).await });
    asked.await.is_ok()
}

/// Whether what was asked of a node that was cut off is carried out when it is back, after the caller
/// had asked another node, and was answered. `named`: it says which leases it goes by.
async fn is_done_late(scene: Scene, what: GivenUp, named: bool) -> bool {
    if what != GivenUp::Acquire {
        assert!(acquire(&scene, N1, "h1", false, None).await);
    }
    let now = revision(&scene, N1);
    scene.until("node 2 has heard of it", || revision(&scene, N2) == now).await;
    let seen = named.then_some(now);
    scene.set_isolated(N2, true);
    let given_up = async {
        match what {
            GivenUp::Acquire => acquire(&scene, N2, "h1", false, seen).await,
            GivenUp::Force => acquire(&scene, N2, "h2", true, seen).await,
            GivenUp::Release => release(&scene, N2, seen).await,
        }
    };
    let meanwhile = async {
        scene.world.sleep_ms(500).await;
        if what == GivenUp::Acquire {
            assert!(acquire(&scene, N1, "h1", false, seen).await);
            assert!(release(&scene, N1, named.then(|| revision(&scene, N1))).await);
        } else {
            assert!(release(&scene, N1, seen).await);
            assert!(acquire(&scene, N1, "h1", false, named.then(|| revision(&scene, N1))).await);
        }
        let now = revision(&scene, N1);
        scene.set_isolated(N2, false);
        now
    };
    let (_, now) = tokio::join!(given_up, meanwhile);
    scene.world.sleep_ms(10_000).await;
    let done = revision(&scene, N1) != now;
    scene.end().await;
    done
}

/// A node goes on with what it was asked for seconds after its caller has gone.
#[test]
fn what_a_caller_gave_up_is_not_done_when_others_were_there_since() {
    for what in [GivenUp::Acquire, GivenUp::Force, GivenUp::Release] {
        for named in [true, false] {
            let late = Rc::new(Cell::new(0));
            holds(|scene| {
                let late = late.clone();
                async move {
                    let done = is_done_late(scene, what, named).await;
                    late.set(late.get() + u64::from(done));
                }
            });
            // Without the revision it is: the proof that the script can fail.
            assert_eq!(late.get() > 0, !named, "{what:?}, {named}: {}", late.get());
        }
    }
}

/// Many writers, for raw devices: none is in another's way, and one that leaves is out alone.
#[test]
fn holders_of_a_shared_lease_come_and_go_alone() {
    holds(|scene| async move {
        let (first, second) = (scene.host(), scene.host());
        for (host, node) in [(&first, N1), (&second, N2)] {
            assert!(host.take_lease(N3, LeaseMode::Writers, false, PATIENCE_MS).await);
            host.attach(node).await;
        }
        for _ in 0..5 {
            first.must_write(BLOCKS).await;
            second.must_write(BLOCKS).await;
        }
        first.release_lease(&scene, N3).await;
        let late = first.write(OTHERS);
        assert_ne!(late.within(PATIENCE_MS).await, Some(Outcome::Done));
        second.must_write(BLOCKS).await;
        scene.end().await;
    });
}

/// A volume grows while its holder writes: what lies beyond the old end can be written when the
/// administrator has his answer, on the connection that was there before.
#[test]
fn a_volume_grows_under_its_writer() {
    holds(|scene| async move {
        let holder = holder_at_1(&scene).await;
        let old = scene.ballast.volumes()[scene.volume()].blocks;
        let beyond = BlockRange::new(old, 4);
        let refused = holder.write(beyond).within(PATIENCE_MS).await;
        assert_eq!(refused, Some(Outcome::Refused), "it lies outside");
        let bytes = (old + 1_024) * BLOCK_SIZE_U64;
        let name = volume_name(scene.volume());
        let grown = scene.ask(N3, |node| async move { node.resize_volume(&name, bytes).await });
        assert_eq!(grown.await.map(|volume| volume.size_bytes), Ok(bytes));
        scene.world.sleep_ms(100).await;
        holder.must_write(beyond).await;
        scene.end().await;
    });
}

/// A leader that does not hear the cluster group, although its own group hears it, as behind a single
/// link that is down: it can't take over what was decided, and makes room for one that can.
#[test]
fn a_leader_that_does_not_hear_the_cluster_group_makes_room() {
    let nodes = [N1, N2, N3];
    let roles = nodes.iter().flat_map(|leader| nodes.map(|other| (*leader, other)));
    for (seed, (leader, cut_off)) in roles.filter(|(leader, other)| leader != other).enumerate() {
        play(seed as u64, Sizes::default(), None, |scene| async move {
            let is_third = |node: &NodeId| *node != leader && *node != cut_off;
            let third = nodes.into_iter().find(is_third).expect("there are three");
            scene.move_leader(leader).await;
            let link = (leader.0, cut_off.0);
            scene.set_cut(&[link, (link.1, link.0)], true);
            let holder = scene.host();
            let began = scene.world.now_ms();
            let taken =
                holder.take_lease(third, LeaseMode::SingleNodeWriter, true, FORCED_MS_MAX).await;
            let took = scene.world.now_ms() - began;
            assert!(taken, "{leader} leads without {cut_off}: no lease after {took} ms");
            holder.attach(third).await;
            holder.must_write(BLOCKS).await;
            scene.set_cut(&[link, (link.1, link.0)], false);
            scene.end().await;
        });
    }
}
