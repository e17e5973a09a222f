//! kill -9 between any two steps of the driver's calls: of the driver, and of the nodes that serve it.
//!
//! The driver stops itself at the step (`ballast_csi_shim::steps`), so that each is met exactly.

mod csi_driver;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ballast_csi_shim::steps::{Call, OF_KERNEL, Step};
use ballast_csi_shim::v1::volume_capability::AccessType;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::{NodePublishVolumeRequest, Volume, VolumeCapability};
use ballast_e2e::process::{self, run};
use ballast_e2e::scratch;
use ballast_e2e::wait::until;
use csi_driver::{Csi, HOST, MIB, Used, block, bytes_of, is_mounted, may_grow_ext4, mounted};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

const LIFE: [Call; 8] = [
    Call::Create,
    Call::ControllerPublish,
    Call::Stage,
    Call::Publish,
    Call::Unpublish,
    Call::Unstage,
    Call::ControllerUnpublish,
    Call::Delete,
];

/// How a volume that is published grows.
const GROWTH: [Call; 2] = [Call::ControllerExpand, Call::NodeExpand];

/// A volume and what its calls tell.
struct Life {
    name: String,
    mib: i64,
    read_only: bool,
    used: Used,
}

impl Life {
    /// One with an ext4 that pods only read: two mounts in the kernel's eyes, a bind and its change.
    fn new(csi: &Csi, name: String) -> Life {
        let capability = mounted(Mode::SingleNodeMultiWriter, "ext4");
        Life { read_only: true, ..Life::with(csi, name, 32, capability) }
    }

    fn with(csi: &Csi, name: String, mib: i64, capability: VolumeCapability) -> Life {
        let staging = csi.file(&format!("{name}.staging"));
        std::fs::create_dir_all(&staging).expect("a folder can be made");
        let used =
            Used { volume: Volume::default(), capability, context: BTreeMap::new(), staging };
        Life { name, mib, read_only: false, used }
    }

    /// Where the pod sees it.
    fn pod(&self, csi: &Csi) -> String {
        csi.file(&format!("{}.pod", self.name))
    }

    fn publish(&self, csi: &Csi) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: self.used.volume.volume_id.clone(),
            publish_context: self.used.context.clone(),
            staging_target_path: self.used.staging.clone(),
            target_path: self.pod(csi),
            volume_capability: Some(self.used.capability.clone()),
            readonly: self.read_only,
            ..Default::default()
        };
        csi.node(async |mut it| it.node_publish_volume(request).await).map(drop)
    }

    /// What a pod would see after these calls: what was written is there, and can't be written.
    #[track_caller]
    fn assert_looks_like(&self, csi: &Csi, call: Call, round: usize) {
        let (staged, pod) = (&self.used.staging, self.pod(csi));
        let text = round.to_string();
        match call {
            Call::Stage => fs::write(format!("{staged}/file"), &text).expect("it can be written"),
            Call::Publish => {
                let kept = fs::read_to_string(format!("{pod}/file")).expect("the file is there");
                assert_eq!(kept, text);
                let refused = fs::write(format!("{pod}/file"), "").expect_err("it is read-only");
                assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            }
            Call::Unpublish => {
                assert!(!Path::new(&pod).exists());
                let kept = fs::read_to_string(format!("{staged}/file")).expect("the file is there");
                assert_eq!(kept, text);
            }
            Call::Unstage => assert!(!is_mounted(staged)),
            _ => {}
        }
    }

    fn call(&mut self, csi: &Csi, call: Call) -> Result<(), Status> {
        let (pod, mib) = (self.pod(csi), self.mib);
        let used = &mut self.used;
        match call {
            Call::Publish => self.publish(csi),
            Call::Create => {
                csi.ask_for(&self.name, mib, &used.capability).map(|it| used.volume = it)
            }
            Call::ControllerPublish => csi.attach(used).map(|context| used.context = context),
            Call::Stage => csi.stage(used),
            Call::ControllerExpand => {
                csi.try_expand_volume(used, mib).map(|size| assert_eq!(size, mib * MIB))
            }
            Call::NodeExpand => {
                csi.try_expand_here(used, mib, &pod).map(|size| assert_eq!(size, mib * MIB))
            }
            Call::Unpublish => csi.unpublish_at(used, &pod),
            Call::Unstage => csi.unstage(used),
            Call::ControllerUnpublish => csi.release(used),
            Call::Delete => csi.delete(used),
        }
    }
}

/// The steps of calls here, where links attach, in their order. The kernel's are the guest's (`vm.rs`).
fn steps() -> impl Iterator<Item = (Call, Step)> {
    Step::ALL.iter().copied().filter(|(_, step)| !OF_KERNEL.contains(step))
}

/// Those of a call.
fn steps_of(call: Call) -> Vec<Step> {
    steps().filter(|(of, _)| *of == call).map(|(_, step)| step).collect()
}

/// One step of each call per round, until all had their turn: with the shorter calls, none later.
fn rounds() -> Vec<BTreeMap<usize, Step>> {
    let longest = LIFE.iter().map(|call| steps_of(*call).len()).max().unwrap_or(0);
    let of_round = |round: usize| {
        let steps = LIFE.iter().enumerate();
        steps.filter_map(|(at, call)| Some((at, *steps_of(*call).get(round)?))).collect()
    };
    (0..longest).map(of_round).collect()
}

/// Makes a call, waits until the driver has stopped in it, does something, and returns the call's end.
#[track_caller]
fn stopped(
    csi: &mut Csi,
    life: &mut Life,
    call: Call,
    act: impl FnOnce(&Csi, u32),
) -> Result<(), Status> {
    let pid = csi.driver().pid();
    let csi = &*csi;
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| life.call(csi, call));
        until("the step", 60, || {
            assert!(!caller.is_finished(), "{call:?} ended without it: {:?}", caller.is_finished());
            process::is_stopped(pid).then_some(())
        });
        act(csi, pid);
        caller.join().expect("a call does not panic")
    })
}

#[test]
fn a_driver_killed_at_any_step_goes_on_where_it_was() {
    let mut csi = Csi::start("csi-killed");
    let mut killed = 0;
    for (round, steps) in rounds().into_iter().enumerate() {
        let mut life = Life::new(&csi, format!("data-{round}"));
        for (at, call) in LIFE.into_iter().enumerate() {
            if let Some(step) = steps.get(&at) {
                // Only here: what a call does on its way from half-done work passes points of others.
                csi.start_driver_stopping_at(Some(*step));
                // Whether the caller heard anything is of no interest.
                let _ =
                    stopped(&mut csi, &mut life, call, |_, driver| process::kill_and_wait(driver));
                csi.start_driver_stopping_at(None);
                life.call(&csi, call).unwrap_or_else(|status| panic!("after {step:?}: {status:?}"));
                killed += 1;
            }
            life.call(&csi, call).unwrap_or_else(|status| panic!("{call:?} again: {status:?}"));
            life.assert_looks_like(&csi, call, round);
        }
        csi.assert_nothing_left();
    }
    let of_life = steps().filter(|(call, _)| LIFE.contains(call));
    assert_eq!(killed, of_life.count());
}

#[test]
fn nodes_killed_at_any_step_are_done_without() {
    let mut csi = Csi::start("csi-nodes-killed");
    for (round, steps) in rounds().into_iter().enumerate() {
        let mut life = Life::new(&csi, format!("data-{round}"));
        for (at, call) in LIFE.into_iter().enumerate() {
            let Some(step) = steps.get(&at) else {
                life.call(&csi, call).unwrap_or_else(|status| panic!("{call:?}: {status:?}"));
                continue;
            };
            // In turns the node that serves the host, and the one that leads the volume elsewhere.
            let serving = 1;
            let victim = if (round + at) % 2 == 0 { serving } else { 2 };
            csi.start_driver_stopping_at(Some(*step));
            let name = life.name.clone();
            let ended = stopped(&mut csi, &mut life, call, |csi, driver| {
                // Only here: it follows who attaches.
                if victim != serving && call != Call::Delete {
                    csi.cluster.move_leader(&name, victim);
                }
                process::kill_and_wait(csi.cluster.node(victim).pid);
                process::send(driver, Signal::SIGCONT);
            });
            println!("{step:?} without node {victim}: {ended:?}");
            life.call(&csi, call).unwrap_or_else(|status| panic!("after {step:?}: {status:?}"));
            life.assert_looks_like(&csi, call, round);
            csi.cluster.restart(victim);
        }
        csi.assert_nothing_left();
    }
}

/// kubelet stages again whatever it finds when it starts. Servers that are silent then may be back in
/// time for who uses the volume.
#[test]
fn a_volume_in_use_is_left_alone_while_its_servers_are_silent() {
    let csi = Csi::start("csi-silent");
    let mode = Mode::SingleNodeMultiWriter;
    for (name, capability) in [("files", mounted(mode, "ext4")), ("device", block(mode))] {
        let used = csi.create(name, 32, capability);
        csi.stage(&used).expect("it is staged");
        let target = csi.publish(&used, "pod").expect("it is published");
        (1..=3).for_each(|node| csi.cluster.signal(node, Signal::SIGSTOP));
        let again = csi.stage(&used);
        (1..=3).for_each(|node| csi.cluster.signal(node, Signal::SIGCONT));
        again.expect("it is staged");
        let file = if name == "files" { format!("{target}/file") } else { target };
        run(
            "dd",
            &["if=/dev/zero", &format!("of={file}"), "bs=64k", "count=1", "conv=notrunc,fsync"],
        );
        csi.unpublish(&used, "pod").expect("it is unpublished");
        csi.finish(&used);
    }
    csi.assert_nothing_left();
}

/// The lease is taken away under a call that stages: the caller is told so, whatever failed of it.
#[test]
fn a_host_that_loses_its_lease_while_it_stages_is_told_so() {
    let mut csi = Csi::start("csi-lost");
    for step in [Step::RecordWritten, Step::Attached, Step::FormattingNoted, Step::Made] {
        let mut life = Life::new(&csi, format!("data-{}", step as usize));
        for call in [Call::Create, Call::ControllerPublish] {
            life.call(&csi, call).unwrap_or_else(|status| panic!("{call:?}: {status:?}"));
        }
        csi.start_driver_stopping_at(Some(step));
        let (program, grpc) = (scratch::program("ballastctl"), csi.cluster.node(1).grpc);
        let program = program.display().to_string();
        let detach = ["--endpoint", &grpc, "volume", "detach", &life.name.clone(), "--host", HOST];
        let staged = stopped(&mut csi, &mut life, Call::Stage, |_, driver| {
            run(&program, &detach);
            process::send(driver, Signal::SIGCONT);
        });
        let refused = staged.expect_err("the lease has ended");
        assert_eq!(refused.code(), Code::FailedPrecondition, "{step:?}: {refused:?}");
        for call in [Call::Unstage, Call::ControllerUnpublish, Call::Delete] {
            life.call(&csi, call).unwrap_or_else(|status| panic!("{call:?}: {status:?}"));
        }
        csi.assert_nothing_left();
    }
}

/// A published volume with something in it, that is to grow while it is used.
struct Growing {
    life: Life,
    /// Of what was written first.
    sum: String,
}

impl Growing {
    /// By how much a volume grows each time, in MiB.
    const BY: i64 = 16;

    fn kinds() -> Vec<(&'static str, i64, VolumeCapability)> {
        let mode = Mode::SingleNodeMultiWriter;
        let mut kinds = vec![("raw", 32, block(mode)), ("xfs", 320, mounted(mode, "xfs"))];
        if may_grow_ext4() {
            kinds.push(("ext4", 64, mounted(mode, "ext4")));
        } else {
            println!("ext4 is not grown: this machine gives root no CAP_SYS_RESOURCE");
        }
        kinds
    }

    #[track_caller]
    fn new(csi: &Csi, (name, mib, capability): (&str, i64, VolumeCapability)) -> Growing {
        let life = Life::with(csi, name.to_owned(), mib, capability);
        let mut it = Growing { life, sum: String::new() };
        it.call(csi, &[Call::Create, Call::ControllerPublish, Call::Stage, Call::Publish]);
        let to = format!("of={}", it.file(csi));
        run("dd", &["if=/dev/urandom", &to, "bs=1M", "count=4", "conv=notrunc,fsync"]);
        it.sum = it.look(csi);
        it
    }

    fn is_raw(&self) -> bool {
        matches!(self.life.used.capability.access_type, Some(AccessType::Block(_)))
    }

    fn file(&self, csi: &Csi) -> String {
        let pod = self.life.pod(csi);
        if self.is_raw() { pod } else { format!("{pod}/file") }
    }

    fn look(&self, csi: &Csi) -> String {
        run("bash", &["-c", &format!("head -c 4M '{}' | sha256sum", self.file(csi))])
    }

    /// Where its growth can break off.
    fn steps(&self) -> Vec<(Call, Step)> {
        let of_files = |step| matches!(step, Step::GrowthStarted | Step::FileSystemGrown);
        let all = steps().filter(|(call, _)| GROWTH.contains(call));
        all.filter(|(_, step)| !(self.is_raw() && of_files(*step))).collect()
    }

    #[track_caller]
    fn call(&mut self, csi: &Csi, calls: &[Call]) {
        for call in calls {
            let ended = self.life.call(csi, *call);
            ended.unwrap_or_else(|status| panic!("{}: {call:?}: {status:?}", self.life.name));
        }
    }

    /// Bytes that the pod sees.
    fn size(&self, csi: &Csi) -> i64 {
        bytes_of(&csi.stats(&self.life.used, &self.life.pod(csi)))
    }

    /// Grows until the driver has stopped at a step.
    #[track_caller]
    fn grow_to(&mut self, csi: &mut Csi, (call, step): (Call, Step), act: impl FnOnce(&Csi, u32)) {
        self.life.mib += Growing::BY;
        if call == Call::NodeExpand {
            self.call(csi, &[Call::ControllerExpand]);
        }
        csi.start_driver_stopping_at(Some(step));
        // The caller may have heard anything: the call is made again.
        let _ = stopped(csi, &mut self.life, call, act);
    }

    /// All of the new size is there for the pod, and what was written before.
    #[track_caller]
    fn assert_grown(&self, csi: &Csi, before: i64) {
        let grown = self.size(csi) - before;
        // What lies beyond: a file system keeps a little of it for itself.
        assert!(((Growing::BY - 2) * MIB..=Growing::BY * MIB).contains(&grown), "{grown}");
        assert_eq!(self.look(csi), self.sum);
        let (to, place) = (format!("of={}", self.file(csi)), self.life.mib - 1);
        // The last part of a device; of a file system what a file takes there.
        let seek = format!("seek={}", if self.is_raw() { place } else { 8 });
        let direct = ["conv=notrunc,fsync", "oflag=direct", "bs=1M", "count=1", &seek];
        run("dd", &[&["if=/dev/zero", &to], &direct[..]].concat());
    }

    #[track_caller]
    fn end(mut self, csi: &Csi) {
        let calls = [Call::Unpublish, Call::Unstage, Call::ControllerUnpublish, Call::Delete];
        self.call(csi, &calls);
    }
}

#[test]
fn a_driver_killed_while_a_volume_grows_goes_on_where_it_was() {
    let mut csi = Csi::start("csi-growth-killed");
    for kind in Growing::kinds() {
        let mut it = Growing::new(&csi, kind);
        for (call, step) in it.steps() {
            // Once the same call is made again; once the pod goes first, and comes back.
            for goes in [false, true] {
                let before = it.size(&csi);
                it.grow_to(&mut csi, (call, step), |_, driver| process::kill_and_wait(driver));
                csi.start_driver_stopping_at(None);
                if goes {
                    it.call(&csi, &[Call::Unpublish, Call::Unstage, Call::ControllerUnpublish]);
                    it.call(&csi, &[Call::ControllerPublish, Call::Stage, Call::Publish]);
                }
                it.call(&csi, &GROWTH);
                it.assert_grown(&csi, before);
                it.call(&csi, &GROWTH);
            }
        }
        it.end(&csi);
    }
    csi.assert_nothing_left();
}

/// The node that serves the host, which leads the volume as a rule, and one that leads it elsewhere.
#[test]
fn nodes_killed_while_a_volume_grows_are_done_without() {
    let mut csi = Csi::start("csi-growth-nodes-killed");
    for kind in Growing::kinds() {
        let mut it = Growing::new(&csi, kind);
        for (call, step) in it.steps() {
            for leads_elsewhere in [false, true] {
                let (before, name) = (it.size(&csi), it.life.name.clone());
                let mut victim = 0;
                it.grow_to(&mut csi, (call, step), |csi, driver| {
                    let serves = |node: &u32| csi.cluster.metric(*node, "ballast_attachments") == 1;
                    let serving = until("a node that serves", 20, || (1..=3).find(serves));
                    victim = serving;
                    if leads_elsewhere {
                        victim = serving % 3 + 1;
                        csi.cluster.move_leader(&name, victim);
                    }
                    process::kill_and_wait(csi.cluster.node(victim).pid);
                    process::send(driver, Signal::SIGCONT);
                });
                it.call(&csi, &GROWTH);
                it.assert_grown(&csi, before);
                csi.cluster.restart(victim);
                csi.cluster.wait_in_sync(&name);
            }
        }
        it.end(&csi);
    }
    csi.assert_nothing_left();
}
