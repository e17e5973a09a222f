//! `ballast-csi` beside a development cluster, and calls to it as an orchestrator makes them.

#![allow(dead_code, reason = "each file of tests uses its part")]

pub mod left;

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ballast_csi_shim::steps::{self, Step};
use ballast_csi_shim::v1::controller_client::ControllerClient;
use ballast_csi_shim::v1::node_client::NodeClient;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use ballast_csi_shim::v1::*;
use ballast_e2e::cluster::{Cluster, Node, Options};
use ballast_e2e::network::Island;
use ballast_e2e::process::{self, Running};
use ballast_e2e::scratch::{self, Scratch, unmount_below};
use ballast_e2e::wait::until_true;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// The host that the driver says it is.
pub const HOST: &str = "node-1";
/// Bytes per MiB.
pub const MIB: i64 = 1 << 20;

/// A cluster and a driver.
pub struct Csi {
    driver: Driver,
    /// The cluster.
    pub cluster: Cluster,
}

/// A driver, with calls to it.
pub struct Driver {
    process: Option<Running>,
    mode: &'static str,
    host: &'static str,
    folder: PathBuf,
    stop_at: Option<Step>,
    /// Where another driver serves the node, if this one does not.
    node: Option<String>,
}

impl Deref for Csi {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

/// What ControllerPublishVolume tells.
pub type Context = std::collections::BTreeMap<String, String>;

/// A volume with the ways that an orchestrator gives it.
#[derive(Clone)]
pub struct Used {
    /// As CreateVolume told it.
    pub volume: Volume,
    /// How it is used.
    pub capability: VolumeCapability,
    /// As ControllerPublishVolume told it.
    pub context: Context,
    /// Where it is staged.
    pub staging: String,
}

/// A file system, used in this mode.
pub fn mounted(mode: Mode, fs_type: &str) -> VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.to_owned(), ..Default::default() };
    let access_mode = Some(AccessMode { mode: mode as i32 });
    VolumeCapability { access_type: Some(AccessType::Mount(mount)), access_mode }
}

/// A raw device, used in this mode.
pub fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mounted(mode, "") }
}

impl Csi {
    /// Starts three nodes and the driver.
    #[track_caller]
    pub fn start(test: &str) -> Csi {
        let cluster = Cluster::with(test, &Options { volume_mib: 16, ..Options::default() });
        let driver = Driver::new(&cluster.scratch, "csi", "all", HOST);
        let mut csi = Csi { driver, cluster };
        csi.start_driver();
        csi
    }

    /// Starts the driver and waits until it answers.
    #[track_caller]
    pub fn start_driver(&mut self) {
        self.driver.start(&self.cluster.nodes(), None);
    }

    /// Ends the driver, dead or alive, and starts one that stops itself at this step.
    #[track_caller]
    pub fn start_driver_stopping_at(&mut self, step: Option<Step>) {
        self.driver.process = None;
        self.driver.stop_at = step;
        self.start_driver();
    }

    /// The driver's process.
    pub fn driver(&mut self) -> &mut Running {
        self.driver.process()
    }

    /// Nothing of any volume is left on this host, nor in the cluster.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        self.driver.assert_nothing_left();
        left::assert_cluster_is_empty(&self.cluster);
    }
}

impl Driver {
    /// One that has not been started yet, with a folder of its own.
    pub fn new(scratch: &Scratch, folder: &str, mode: &'static str, host: &'static str) -> Driver {
        let folder = scratch.path().join(folder);
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        Driver { process: None, mode, host, folder, stop_at: None, node: None }
    }

    /// Starts it, cut off with an island if there is one, and waits until it answers. Nodes are
    /// asked, and serve, in this order.
    #[track_caller]
    pub fn start(&mut self, nodes: &[Node], island: Option<&Island>) {
        let join = |texts: Vec<String>| texts.join(",");
        let daemons = join(nodes.iter().map(|node| node.grpc.clone()).collect());
        let nbd = |nbd: &str| nbd.trim_start_matches("nbd://").trim_end_matches('/').to_owned();
        let addresses = join(nodes.iter().map(|node| nbd(&node.nbd)).collect());
        let program = scratch::program("ballast-csi").display().to_string();
        let (endpoint, state) = (self.endpoint(), self.file("state"));
        let stop_at = self.stop_at.map(|step| format!("{}={step:?}", steps::STOP_AT));
        let mut command: Vec<&str> = stop_at.iter().flat_map(|it| ["env", it]).collect();
        command.extend([&*program, "--mode", self.mode, "--endpoint", &endpoint]);
        command.extend(["--ballast", &daemons, "--node-id", self.host, "--state-dir", &state]);
        command.extend(["--nbd", "fuse", "--nbd-address", &addresses]);
        let command = match island {
            Some(island) => island.command(&command),
            None => command.into_iter().map(str::to_owned).collect(),
        };
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        let mut driver = Running::start(&self.folder.join("driver.log"), &words, false);
        let socket = self.folder.join("csi.sock");
        until_true("the driver's socket", 20, || {
            assert!(driver.is_running(), "the driver ended: {}", driver.log());
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        self.process = Some(driver);
    }

    /// From now on calls to the node go to another driver, at this address.
    pub fn send_node_calls_to(&mut self, address: String) {
        self.node = Some(address);
    }

    /// The host that it says it is on.
    pub fn host(&self) -> &'static str {
        self.host
    }

    /// The link processes of its volumes.
    pub fn links(&self) -> Vec<u32> {
        process::with_argument_below(&self.folder.join("state/attach"))
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Running {
        self.process.as_mut().expect("the driver was started")
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.file("csi.sock"))
    }

    /// A path in its folder.
    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    async fn channel(endpoint: &str) -> Result<Channel, Status> {
        let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("a good address");
        let endpoint = endpoint.timeout(Duration::from_secs(120));
        endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))
    }

    /// A call to the controller.
    pub fn controller<T>(
        &self,
        call: impl AsyncFnOnce(ControllerClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, Status> {
        let endpoint = self.endpoint();
        runtime().block_on(async {
            let client = ControllerClient::new(Driver::channel(&endpoint).await?);
            call(client).await.map(tonic::Response::into_inner)
        })
    }

    /// A call to the node.
    pub fn node<T>(
        &self,
        call: impl AsyncFnOnce(NodeClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, Status> {
        let endpoint = self.node.clone().unwrap_or_else(|| self.endpoint());
        runtime().block_on(async {
            let client = NodeClient::new(Driver::channel(&endpoint).await?);
            call(client).await.map(tonic::Response::into_inner)
        })
    }

    /// A call to any service.
    pub fn through<T>(
        &self,
        call: impl AsyncFnOnce(Channel) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let endpoint = self.endpoint();
        runtime().block_on(async { call(Driver::channel(&endpoint).await?).await })
    }

    /// Creates a volume and publishes it to this host.
    #[track_caller]
    pub fn create(&self, name: &str, mib: i64, capability: VolumeCapability) -> Used {
        let mut used = self.create_volume(name, mib, capability);
        used.context = self.attach(&used).expect("it is published");
        used
    }

    /// Creates a volume that is published nowhere yet.
    #[track_caller]
    pub fn create_volume(&self, name: &str, mib: i64, capability: VolumeCapability) -> Used {
        let volume = self.ask_for(name, mib, &capability).expect("the volume is created");
        let staging = self.file(&format!("{name}.staging"));
        std::fs::create_dir_all(&staging).expect("a folder can be made");
        Used { volume, capability, context: Default::default(), staging }
    }

    /// Asks for a volume.
    pub fn ask_for(&self, name: &str, mib: i64, it: &VolumeCapability) -> Result<Volume, Status> {
        let request = CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(CapacityRange { required_bytes: mib * MIB, limit_bytes: 0 }),
            volume_capabilities: vec![it.clone()],
            ..Default::default()
        };
        let created = self.controller(async |mut it| it.create_volume(request).await)?;
        Ok(created.volume.expect("a volume"))
    }

    /// Publishes to this host.
    pub fn attach(&self, used: &Used) -> Result<Context, Status> {
        self.attach_to(used, self.host)
    }

    /// Publishes to a host.
    pub fn attach_to(&self, used: &Used, host: &str) -> Result<Context, Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: used.volume.volume_id.clone(),
            node_id: host.to_owned(),
            volume_capability: Some(used.capability.clone()),
            ..Default::default()
        };
        let answer = self.controller(async |mut it| it.controller_publish_volume(request).await);
        answer.map(|answer| answer.publish_context)
    }

    /// Stages.
    pub fn stage(&self, used: &Used) -> Result<(), Status> {
        let request = stage_request(used);
        self.node(async |mut it| it.node_stage_volume(request).await).map(drop)
    }

    /// Publishes at a path of this name.
    pub fn publish(&self, used: &Used, target: &str) -> Result<String, Status> {
        let target = self.file(target);
        self.publish_at(used, &target).map(|()| target)
    }

    /// Publishes at this path.
    pub fn publish_at(&self, used: &Used, target: &str) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: used.volume.volume_id.clone(),
            publish_context: used.context.clone(),
            staging_target_path: used.staging.clone(),
            target_path: target.to_owned(),
            volume_capability: Some(used.capability.clone()),
            ..Default::default()
        };
        self.node(async |mut it| it.node_publish_volume(request).await).map(drop)
    }

    /// Unpublishes from a path of this name.
    pub fn unpublish(&self, used: &Used, target: &str) -> Result<(), Status> {
        self.unpublish_at(used, &self.file(target))
    }

    /// Unpublishes from this path.
    pub fn unpublish_at(&self, used: &Used, target: &str) -> Result<(), Status> {
        let (volume_id, target_path) = (used.volume.volume_id.clone(), target.to_owned());
        let request = NodeUnpublishVolumeRequest { volume_id, target_path };
        self.node(async |mut it| it.node_unpublish_volume(request).await).map(drop)
    }

    /// Unstages.
    pub fn unstage(&self, used: &Used) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest {
            volume_id: used.volume.volume_id.clone(),
            staging_target_path: used.staging.clone(),
        };
        self.node(async |mut it| it.node_unstage_volume(request).await).map(drop)
    }

    /// Gives this host's lease back.
    pub fn release(&self, used: &Used) -> Result<(), Status> {
        self.release_from(used, self.host)
    }

    /// Gives a host's lease back, as after its death.
    pub fn release_from(&self, used: &Used, host: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: used.volume.volume_id.clone(),
            node_id: host.to_owned(),
            ..Default::default()
        };
        self.controller(async |mut it| it.controller_unpublish_volume(request).await).map(drop)
    }

    /// Deletes.
    pub fn delete(&self, used: &Used) -> Result<(), Status> {
        let volume_id = used.volume.volume_id.clone();
        let request = DeleteVolumeRequest { volume_id, ..Default::default() };
        self.controller(async |mut it| it.delete_volume(request).await).map(drop)
    }

    /// Unstages, gives back and deletes.
    #[track_caller]
    pub fn finish(&self, used: &Used) {
        self.unstage(used).expect("it is unstaged");
        self.release(used).expect("the lease is given back");
        self.delete(used).expect("it is deleted");
    }

    /// Grows a volume in the cluster and on this host, and returns its size.
    #[track_caller]
    pub fn expand(&self, used: &Used, mib: i64, path: &str) -> i64 {
        self.expand_volume(used, mib);
        self.expand_here(used, mib, path)
    }

    /// Grows a volume in the cluster.
    #[track_caller]
    pub fn expand_volume(&self, used: &Used, mib: i64) {
        self.try_expand_volume(used, mib).expect("the volume grows");
    }

    /// Has a volume grow in the cluster.
    pub fn try_expand_volume(&self, used: &Used, mib: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: used.volume.volume_id.clone(),
            capacity_range: Some(CapacityRange { required_bytes: mib * MIB, limit_bytes: 0 }),
            volume_capability: Some(used.capability.clone()),
            ..Default::default()
        };
        let grown = self.controller(async |mut it| it.controller_expand_volume(request).await)?;
        assert!(grown.node_expansion_required);
        Ok(grown.capacity_bytes)
    }

    /// Grows what this host has of a volume that has grown, and returns its size.
    #[track_caller]
    pub fn expand_here(&self, used: &Used, mib: i64, path: &str) -> i64 {
        let grown = self.try_expand_here(used, mib, path);
        grown.expect("the host's device and file system grow")
    }

    /// Has this host grow what it has of a volume.
    pub fn try_expand_here(&self, used: &Used, mib: i64, path: &str) -> Result<i64, Status> {
        let request = NodeExpandVolumeRequest {
            volume_id: used.volume.volume_id.clone(),
            volume_path: path.to_owned(),
            staging_target_path: used.staging.clone(),
            volume_capability: Some(used.capability.clone()),
            capacity_range: Some(CapacityRange { required_bytes: mib * MIB, limit_bytes: 0 }),
            ..Default::default()
        };
        let grown = self.node(async |mut it| it.node_expand_volume(request).await);
        grown.map(|grown| grown.capacity_bytes)
    }

    /// What NodeGetVolumeStats tells.
    #[track_caller]
    pub fn stats(&self, used: &Used, path: &str) -> Vec<VolumeUsage> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: used.volume.volume_id.clone(),
            volume_path: path.to_owned(),
            ..Default::default()
        };
        let answer = self.node(async |mut it| it.node_get_volume_stats(request).await);
        answer.expect("statistics").usage
    }

    /// Nothing of any volume is left on this host: no mount, loop device, process, record.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let folder = self.folder.display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the table is there");
        let mounts: Vec<&str> = mounts.lines().filter(|line| line.contains(&folder)).collect();
        assert!(mounts.is_empty(), "{mounts:?}");
        let loops = process::run("losetup", &["-nO", "NAME,BACK-FILE"]);
        assert!(!loops.contains(&folder), "{loops}");
        let links = self.links();
        assert!(links.is_empty(), "links: {links:?}");
        let files = process::run("find", &[&self.file("state"), "!", "-type", "d"]);
        assert_eq!(files, "", "kept");
        let folders = process::run("find", &[&self.file("state"), "-mindepth", "2"]);
        assert_eq!(folders, "", "kept");
    }
}

/// One per call: its connection ends with it.
fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be made")
}

/// The request that stages.
pub fn stage_request(used: &Used) -> NodeStageVolumeRequest {
    NodeStageVolumeRequest {
        volume_id: used.volume.volume_id.clone(),
        publish_context: used.context.clone(),
        staging_target_path: used.staging.clone(),
        volume_capability: Some(used.capability.clone()),
        volume_context: used.volume.volume_context.clone(),
        ..Default::default()
    }
}

/// Bytes of a file system.
#[track_caller]
pub fn bytes_of(usage: &[VolumeUsage]) -> i64 {
    let found = usage.iter().find(|it| it.unit == volume_usage::Unit::Bytes as i32);
    found.expect("statistics in bytes").total
}

/// The kernel lets only those with CAP_SYS_RESOURCE grow a mounted ext4.
pub fn may_grow_ext4() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process has a status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.expect("a mask") & 1 << 24 != 0
}

/// The code of a refusal, or that there was none.
pub fn code<T>(answer: Result<T, Status>) -> Code {
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

/// Whether a path is mounted.
pub fn is_mounted(path: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(path))
}

impl Drop for Driver {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(driver) = &self.process
        {
            let log = driver.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("the end of {}'s log, last line first:\n{}", self.host, tail.join("\n"));
        }
        self.process = None;
        clear(&self.folder);
    }
}

/// Links first: without them nothing waits for a server.
fn clear(folder: &Path) {
    for pid in process::with_argument_below(folder) {
        process::kill_and_wait(pid);
    }
    unmount_below(folder);
}
