//! The calls that an orchestrator makes in a volume's life.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use ballast_csi_shim::v1::controller_client::ControllerClient;
use ballast_csi_shim::v1::node_client::NodeClient;
use ballast_csi_shim::v1::volume_capability::access_mode::Mode;
use ballast_csi_shim::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use ballast_csi_shim::v1::*;
use tonic::transport::{Channel, Endpoint};

use crate::HOST;

/// A step in a volume's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// CreateVolume.
    CreateVolume,
    /// ControllerPublishVolume.
    ControllerPublish,
    /// NodeStageVolume, of a blank volume: with the making of the file system.
    NodeStageBlank,
    /// NodePublishVolume.
    NodePublish,
    /// A file is made and synced: no call.
    WriteFile,
    /// NodeUnpublishVolume.
    NodeUnpublish,
    /// NodeUnstageVolume.
    NodeUnstage,
    /// NodeStageVolume, of a volume with a file system.
    NodeStageAgain,
    /// NodeUnstageVolume.
    NodeUnstageAgain,
    /// ControllerUnpublishVolume.
    ControllerUnpublish,
    /// DeleteVolume.
    DeleteVolume,
}

/// In their order.
pub const CALLS: [Call; 11] = [
    Call::CreateVolume,
    Call::ControllerPublish,
    Call::NodeStageBlank,
    Call::NodePublish,
    Call::WriteFile,
    Call::NodeUnpublish,
    Call::NodeUnstage,
    Call::NodeStageAgain,
    Call::NodeUnstageAgain,
    Call::ControllerUnpublish,
    Call::DeleteVolume,
];

/// One volume, and what the calls so far told of it.
#[derive(Debug)]
pub struct Volume {
    name: String,
    bytes: i64,
    capability: VolumeCapability,
    id: OnceLock<String>,
    context: OnceLock<BTreeMap<String, String>>,
    staging: PathBuf,
    target: PathBuf,
}

impl Volume {
    /// That is not there yet.
    pub fn new(folder: &Path, name: &str, mib: u64, fs_type: &str) -> Volume {
        let mount = MountVolume { fs_type: fs_type.to_owned(), ..Default::default() };
        let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter as i32 });
        let access_type = Some(AccessType::Mount(mount));
        let staging = folder.join("staging").join(name);
        std::fs::create_dir_all(&staging).expect("a folder can be made");
        Volume {
            name: name.to_owned(),
            bytes: (mib << 20) as i64,
            capability: VolumeCapability { access_type, access_mode },
            id: OnceLock::new(),
            context: OnceLock::new(),
            staging,
            target: folder.join("pods").join(name),
        }
    }

    fn id(&self) -> String {
        self.id.get().expect("the volume was created").clone()
    }
}

/// The driver, by one connection, as a sidecar has it.
#[derive(Clone)]
pub struct Driver {
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
}

impl Driver {
    /// At this socket.
    pub async fn connect(socket: &Path) -> Driver {
        let address = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(address).expect("a good address");
        let endpoint = endpoint.timeout(Duration::from_secs(300));
        let channel = endpoint.connect().await.expect("the driver answers");
        Driver {
            controller: ControllerClient::new(channel.clone()),
            node: NodeClient::new(channel),
        }
    }

    /// Takes a volume through one step.
    ///
    /// # Panics
    /// When it fails.
    pub async fn call(&self, call: Call, volume: &Volume) {
        let done = match call {
            Call::CreateVolume => self.create(volume).await,
            Call::ControllerPublish => self.lease(volume).await,
            Call::NodeStageBlank | Call::NodeStageAgain => self.stage(volume).await,
            Call::NodePublish => self.publish(volume).await,
            Call::WriteFile => {
                write_file(volume).await;
                Ok(())
            }
            Call::NodeUnpublish => self.unpublish(volume).await,
            Call::NodeUnstage | Call::NodeUnstageAgain => self.unstage(volume).await,
            Call::ControllerUnpublish => self.give_back(volume).await,
            Call::DeleteVolume => self.delete(volume).await,
        };
        done.unwrap_or_else(|status| panic!("{call:?} of {}: {status:?}", volume.name));
    }

    async fn create(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let range = CapacityRange { required_bytes: volume.bytes, limit_bytes: 0 };
        let request = CreateVolumeRequest {
            name: volume.name.clone(),
            capacity_range: Some(range),
            volume_capabilities: vec![volume.capability.clone()],
            ..Default::default()
        };
        let answer = self.controller.clone().create_volume(request).await?.into_inner();
        let id = answer.volume.expect("a volume").volume_id;
        volume.id.set(id).expect("it is created once");
        Ok(())
    }

    async fn lease(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: volume.id(),
            node_id: HOST.to_owned(),
            volume_capability: Some(volume.capability.clone()),
            ..Default::default()
        };
        let answer = self.controller.clone().controller_publish_volume(request).await?;
        volume.context.set(answer.into_inner().publish_context).expect("it is published once");
        Ok(())
    }

    async fn stage(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let request = NodeStageVolumeRequest {
            volume_id: volume.id(),
            publish_context: volume.context.get().expect("it is published").clone(),
            staging_target_path: volume.staging.display().to_string(),
            volume_capability: Some(volume.capability.clone()),
            ..Default::default()
        };
        self.node.clone().node_stage_volume(request).await.map(drop)
    }

    async fn publish(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let request = NodePublishVolumeRequest {
            volume_id: volume.id(),
            publish_context: volume.context.get().expect("it is published").clone(),
            staging_target_path: volume.staging.display().to_string(),
            target_path: volume.target.display().to_string(),
            volume_capability: Some(volume.capability.clone()),
            ..Default::default()
        };
        self.node.clone().node_publish_volume(request).await.map(drop)
    }

    async fn unpublish(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let target_path = volume.target.display().to_string();
        let request = NodeUnpublishVolumeRequest { volume_id: volume.id(), target_path };
        self.node.clone().node_unpublish_volume(request).await.map(drop)
    }

    async fn unstage(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let staging_target_path = volume.staging.display().to_string();
        let request = NodeUnstageVolumeRequest { volume_id: volume.id(), staging_target_path };
        self.node.clone().node_unstage_volume(request).await.map(drop)
    }

    async fn give_back(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: volume.id(),
            node_id: HOST.to_owned(),
            ..Default::default()
        };
        self.controller.clone().controller_unpublish_volume(request).await.map(drop)
    }

    async fn delete(&self, volume: &Volume) -> Result<(), tonic::Status> {
        let request = DeleteVolumeRequest { volume_id: volume.id(), ..Default::default() };
        self.controller.clone().delete_volume(request).await.map(drop)
    }
}

/// As a pod's first write: the volume is mounted, and writable.
async fn write_file(volume: &Volume) {
    let path = volume.target.join("file");
    let write = tokio::task::spawn_blocking(move || {
        use std::io::Write;
        let mut file = std::fs::File::create(path)?;
        file.write_all(b"written by a pod")?;
        file.sync_all()
    });
    write.await.expect("no panic").expect("the pod writes");
}
