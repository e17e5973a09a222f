//! The calls of an orchestrator as a table: a ladder of four steps up, each with its opposite.

use std::collections::BTreeMap;
use std::time::Duration;

use ballast_csi_shim::v1::*;
use tonic::{Code, Request, Status};

use crate::csi_driver::{Csi, HOST, MIB, Used};

/// Seconds within which a call that another one holds up gets its turn.
const TURN: u64 = 60;

/// A call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// CreateVolume.
    Create,
    /// ControllerPublishVolume.
    Attach,
    /// NodeStageVolume.
    Stage,
    /// NodePublishVolume.
    Publish,
    /// NodeUnpublishVolume.
    Unpublish,
    /// NodeUnstageVolume.
    Unstage,
    /// ControllerUnpublishVolume.
    Release,
    /// DeleteVolume.
    Delete,
    /// ControllerExpandVolume, to what it has.
    Expand,
    /// NodeExpandVolume, to what it has.
    Grow,
    /// NodeGetVolumeStats.
    Stats,
    /// ControllerGetVolume.
    Get,
    /// ListVolumes.
    List,
    /// ValidateVolumeCapabilities.
    Validate,
    /// GetCapacity.
    Capacity,
    /// NodeGetInfo.
    Info,
}

/// Each step with what undoes it.
pub const LADDER: [(Call, Call); 4] = [
    (Call::Create, Call::Delete),
    (Call::Attach, Call::Release),
    (Call::Stage, Call::Unstage),
    (Call::Publish, Call::Unpublish),
];

/// Those that change nothing.
pub const GETTERS: [Call; 6] =
    [Call::Stats, Call::Get, Call::List, Call::Validate, Call::Capacity, Call::Info];

/// What a call said, as far as the next ones need it.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// CreateVolume.
    Volume(Volume),
    /// ControllerPublishVolume.
    Context(BTreeMap<String, String>),
    /// Any other, as text.
    Text(String),
}

/// A volume and how far its life has got.
pub struct Abused<'a> {
    csi: &'a Csi,
    target: Target,
    level: usize,
}

/// What calls are about.
struct Target {
    name: String,
    used: Used,
    /// What it is to have, after it was expanded.
    mib: i64,
}

/// What every volume begins with.
const MIB_AT_FIRST: i64 = 32;

impl<'a> Abused<'a> {
    /// Not created yet.
    pub fn new(csi: &'a Csi, name: &str, capability: VolumeCapability) -> Abused<'a> {
        let staging = csi.file(&format!("{name}.staging"));
        std::fs::create_dir_all(&staging).expect("a folder can be made");
        let volume = Volume {
            volume_id: "00000000-0000-4000-8000-000000000000".into(),
            ..Default::default()
        };
        let used = Used { volume, capability, context: BTreeMap::new(), staging };
        let target = Target { name: name.to_owned(), used, mib: MIB_AT_FIRST };
        Abused { csi, target, level: 0 }
    }

    /// From now on it is to be larger. A mounted ext4 grows only where the kernel lets us: the tests of
    /// growth are elsewhere, so it stays as it is here.
    pub fn want_more(&mut self) {
        if matches!(
            self.target.used.capability.access_type,
            Some(volume_capability::AccessType::Block(_))
        ) {
            self.target.mib += 4;
        }
    }

    /// Goes up until so many steps are done.
    #[track_caller]
    pub fn climb(&mut self, level: usize) {
        while self.level < level {
            self.must(LADDER[self.level].0);
        }
    }

    /// Goes down until no more steps than these are done.
    #[track_caller]
    pub fn descend(&mut self, level: usize) {
        while self.level > level {
            self.must(LADDER[self.level - 1].1);
        }
    }

    /// After a call out of turn: undoes what it may have done of steps above, and does anew what it
    /// may have undone.
    #[track_caller]
    pub fn descend_to_exactly(&mut self, level: usize) {
        self.level = LADDER.len();
        self.descend(level);
        self.level = 0;
        self.climb(level);
    }

    /// After a crowd nobody knows how far it is, nor its id: all is undone.
    #[track_caller]
    pub fn settle(&mut self) {
        self.descend_to_exactly(0);
        self.climb(1);
        self.descend(0);
    }

    /// One call; what it tells is kept for the next ones.
    pub fn make(&mut self, call: Call, time: Option<Duration>) -> Result<Answer, Status> {
        let answer = make(self.csi, &self.target, call, time);
        match &answer {
            Ok(Answer::Volume(volume)) => self.target.used.volume = volume.clone(),
            Ok(Answer::Context(context)) => self.target.used.context = context.clone(),
            _ => {}
        }
        answer
    }

    /// One call that must end well, after those that are under way.
    #[track_caller]
    pub fn must(&mut self, call: Call) {
        let start = std::time::Instant::now();
        loop {
            match self.make(call, None) {
                Ok(_) => break,
                Err(status)
                    if status.code() == Code::Aborted && start.elapsed().as_secs() < TURN =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(status) => {
                    panic!("{}: {call:?} at {}: {status:?}", self.target.name, self.level)
                }
            }
        }
        if let Some(step) = LADDER.iter().position(|(up, _)| *up == call) {
            self.level = self.level.max(step + 1);
        }
        if let Some(step) = LADDER.iter().position(|(_, down)| *down == call) {
            self.level = self.level.min(step);
        }
    }

    /// All of these at once. Each must be answered by one of these codes, and one of them well.
    #[track_caller]
    pub fn crowd(&mut self, calls: &[Call], codes: &[Code]) {
        let (csi, target) = (self.csi, &self.target);
        let name = &target.name;
        let barrier = std::sync::Barrier::new(calls.len());
        let answers: Vec<(Call, Result<Answer, Status>)> = std::thread::scope(|scope| {
            let one = |call: Call| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    (call, make(csi, target, call, None))
                })
            };
            let running: Vec<_> = calls.iter().map(|call| one(*call)).collect();
            running.into_iter().map(|it| it.join().expect("no call panics")).collect()
        });
        let mut well = 0;
        for (call, answer) in answers {
            well += usize::from(answer.is_ok());
            if let Err(status) = &answer {
                assert!(codes.contains(&status.code()), "{name}: {call:?} in a crowd: {status:?}");
            }
        }
        assert!(well > 0, "{name}: none of {calls:?} was served");
    }

    /// Nothing is left here, nor in the cluster.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.csi.assert_nothing_left();
    }
}

fn make(csi: &Csi, target: &Target, call: Call, time: Option<Duration>) -> Result<Answer, Status> {
    match call {
        Call::Create | Call::Attach | Call::Release | Call::Delete | Call::Expand => {
            change_cluster(csi, target, call, time)
        }
        Call::Stage | Call::Publish | Call::Unpublish | Call::Unstage | Call::Grow => {
            change_host(csi, target, call, time)
        }
        _ => look(csi, target, call, time),
    }
}

fn within<T>(message: T, time: Option<Duration>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(time) = time {
        request.set_timeout(time);
    }
    request
}

fn text(answer: impl std::fmt::Debug) -> Answer {
    Answer::Text(format!("{answer:?}"))
}

fn range(mib: i64) -> Option<CapacityRange> {
    Some(CapacityRange { required_bytes: mib * MIB, limit_bytes: 0 })
}

fn change_cluster(
    csi: &Csi,
    target: &Target,
    call: Call,
    time: Option<Duration>,
) -> Result<Answer, Status> {
    let used = &target.used;
    let volume_id = used.volume.volume_id.clone();
    let capability = used.capability.clone();
    let node_id = HOST.to_owned();
    match call {
        Call::Create => {
            let it = CreateVolumeRequest {
                name: target.name.clone(),
                capacity_range: range(MIB_AT_FIRST),
                volume_capabilities: vec![capability],
                ..Default::default()
            };
            let answer = csi.controller(async |mut c| c.create_volume(within(it, time)).await)?;
            Ok(Answer::Volume(answer.volume.expect("a volume")))
        }
        Call::Attach => {
            let it = ControllerPublishVolumeRequest {
                volume_id,
                node_id,
                volume_capability: Some(capability),
                ..Default::default()
            };
            let answer =
                csi.controller(async |mut c| c.controller_publish_volume(within(it, time)).await)?;
            Ok(Answer::Context(answer.publish_context))
        }
        Call::Release => {
            let it = ControllerUnpublishVolumeRequest { volume_id, node_id, ..Default::default() };
            csi.controller(async |mut c| c.controller_unpublish_volume(within(it, time)).await)
                .map(text)
        }
        Call::Delete => {
            let it = DeleteVolumeRequest { volume_id, ..Default::default() };
            csi.controller(async |mut c| c.delete_volume(within(it, time)).await).map(text)
        }
        _ => {
            let it = ControllerExpandVolumeRequest {
                volume_id,
                capacity_range: range(target.mib),
                volume_capability: Some(capability),
                ..Default::default()
            };
            csi.controller(async |mut c| c.controller_expand_volume(within(it, time)).await)
                .map(text)
        }
    }
}

fn change_host(
    csi: &Csi,
    target: &Target,
    call: Call,
    time: Option<Duration>,
) -> Result<Answer, Status> {
    let used = &target.used;
    let volume_id = used.volume.volume_id.clone();
    let volume_capability = Some(used.capability.clone());
    let staging_target_path = used.staging.clone();
    let target_path = csi.file(&format!("{}.target", target.name));
    match call {
        Call::Stage => {
            let it = crate::csi_driver::stage_request(used);
            csi.node(async |mut c| c.node_stage_volume(within(it, time)).await).map(text)
        }
        Call::Publish => {
            let it = NodePublishVolumeRequest {
                volume_id,
                publish_context: used.context.clone(),
                staging_target_path,
                target_path,
                volume_capability,
                ..Default::default()
            };
            csi.node(async |mut c| c.node_publish_volume(within(it, time)).await).map(text)
        }
        Call::Unpublish => {
            let it = NodeUnpublishVolumeRequest { volume_id, target_path };
            csi.node(async |mut c| c.node_unpublish_volume(within(it, time)).await).map(text)
        }
        Call::Unstage => {
            let it = NodeUnstageVolumeRequest { volume_id, staging_target_path };
            csi.node(async |mut c| c.node_unstage_volume(within(it, time)).await).map(text)
        }
        _ => {
            let it = NodeExpandVolumeRequest {
                volume_id,
                volume_path: target_path,
                capacity_range: range(target.mib),
                staging_target_path,
                volume_capability,
                ..Default::default()
            };
            csi.node(async |mut c| c.node_expand_volume(within(it, time)).await).map(text)
        }
    }
}

fn look(csi: &Csi, target: &Target, call: Call, time: Option<Duration>) -> Result<Answer, Status> {
    let used = &target.used;
    let volume_id = used.volume.volume_id.clone();
    match call {
        Call::Stats => {
            let volume_path = csi.file(&format!("{}.target", target.name));
            let it = NodeGetVolumeStatsRequest { volume_id, volume_path, ..Default::default() };
            csi.node(async |mut c| c.node_get_volume_stats(within(it, time)).await).map(text)
        }
        Call::Get => {
            let it = ControllerGetVolumeRequest { volume_id };
            csi.controller(async |mut c| c.controller_get_volume(within(it, time)).await).map(text)
        }
        Call::List => {
            let it = ListVolumesRequest::default();
            csi.controller(async |mut c| c.list_volumes(within(it, time)).await).map(text)
        }
        Call::Validate => {
            let it = ValidateVolumeCapabilitiesRequest {
                volume_id,
                volume_capabilities: vec![used.capability.clone()],
                ..Default::default()
            };
            csi.controller(async |mut c| c.validate_volume_capabilities(within(it, time)).await)
                .map(text)
        }
        Call::Capacity => {
            let it = GetCapacityRequest::default();
            csi.controller(async |mut c| c.get_capacity(within(it, time)).await).map(text)
        }
        _ => {
            let it = NodeGetInfoRequest::default();
            csi.node(async |mut c| c.node_get_info(within(it, time)).await).map(text)
        }
    }
}
