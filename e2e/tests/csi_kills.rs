//! kill -9 between any two steps of the driver's calls: of the driver, and of the nodes that serve it.
//!
//! The driver stops itself at the step (`ballast_csi_shim::steps`), so that each is met exactly.

mod csi_driver;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ballast_csi_shim::steps::{Call, Step};
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::{NodePublishVolumeRequest, Volume};
use ballast_e2e::process::{self, run};
use ballast_e2e::scratch;
use ballast_e2e::wait::until;
use csi_driver::{Csi, HOST, Used, block, is_mounted, mounted};
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

/// A volume and what its calls tell.
struct Life {
    name: String,
    used: Used,
}

impl Life {
    fn new(csi: &Csi, name: String) -> Life {
        let staging = csi.file(&format!("{name}.staging"));
        std::fs::create_dir_all(&staging).expect("a folder can be made");
        let capability = mounted(Mode::SingleNodeMultiWriter, "ext4");
        let used =
            Used { volume: Volume::default(), capability, context: BTreeMap::new(), staging };
        Life { name, used }
    }

    /// Two mounts in the kernel's eyes: a bind, and its change to read-only.
    fn publish_read_only(&self, csi: &Csi) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: self.used.volume.volume_id.clone(),
            publish_context: self.used.context.clone(),
            staging_target_path: self.used.staging.clone(),
            target_path: csi.file(&format!("{}.pod", self.name)),
            volume_capability: Some(self.used.capability.clone()),
            readonly: true,
            ..Default::default()
        };
        csi.node(async |mut it| it.node_publish_volume(request).await).map(drop)
    }

    /// What a pod would see after these calls: what was written is there, and can't be written.
    #[track_caller]
    fn assert_looks_like(&self, csi: &Csi, call: Call, round: usize) {
        let (staged, pod) = (&self.used.staging, csi.file(&format!("{}.pod", self.name)));
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
        let used = &mut self.used;
        match call {
            Call::Publish => self.publish_read_only(csi),
            Call::Create => {
                csi.ask_for(&self.name, 32, &used.capability).map(|it| used.volume = it)
            }
            Call::ControllerPublish => csi.attach(used).map(|context| used.context = context),
            Call::Stage => csi.stage(used),
            Call::Unpublish => csi.unpublish(used, &format!("{}.pod", self.name)),
            Call::Unstage => csi.unstage(used),
            Call::ControllerUnpublish => csi.release(used),
            Call::Delete => csi.delete(used),
        }
    }
}

/// The steps of a call, in their order.
fn steps_of(call: Call) -> Vec<Step> {
    Step::ALL.iter().filter(|(of, _)| *of == call).map(|(_, step)| *step).collect()
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
    act: impl FnOnce(u32),
) -> Result<(), Status> {
    let pid = csi.driver().pid();
    let csi = &*csi;
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| life.call(csi, call));
        until("the step", 60, || {
            assert!(!caller.is_finished(), "{call:?} ended without it: {:?}", caller.is_finished());
            process::is_stopped(pid).then_some(())
        });
        act(pid);
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
                let _ = stopped(&mut csi, &mut life, call, process::kill_and_wait);
                csi.start_driver_stopping_at(None);
                life.call(&csi, call).unwrap_or_else(|status| panic!("after {step:?}: {status:?}"));
                killed += 1;
            }
            life.call(&csi, call).unwrap_or_else(|status| panic!("{call:?} again: {status:?}"));
            life.assert_looks_like(&csi, call, round);
        }
        csi.assert_nothing_left();
    }
    assert_eq!(killed, Step::ALL.len());
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
            if victim != serving && at > 0 {
                csi.cluster.move_leader(&life.name, victim);
            }
            csi.start_driver_stopping_at(Some(*step));
            let node = csi.cluster.node(victim).pid;
            let ended = stopped(&mut csi, &mut life, call, |driver| {
                process::kill_and_wait(node);
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
        let staged = stopped(&mut csi, &mut life, Call::Stage, |driver| {
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
