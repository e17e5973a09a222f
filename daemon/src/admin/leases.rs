//! Leases and what volumes hold, in the words of the administration interface.

use ballast_api::v1 as api;
use ballast_block::Epoch;
use ballast_block::limits::FS_TYPE_BYTES_MAX;
use ballast_node::cluster::{Lease, LeaseMode, Volume};
use ballast_node::content::Content;
use ballast_node::leases::ContentReply;
use ballast_node::leasing::LeaseAsk;
use tonic::Status;

use super::volumes::status;
use crate::shard::LinuxNode;

/// Lets a host use a volume, on the volume's shard.
///
/// # Errors
/// As `admin.proto` says.
pub async fn acquire(
    node: LinuxNode,
    volume: Volume,
    request: api::AcquireLeaseRequest,
) -> Result<(Volume, api::Lease), Status> {
    let mode = mode(request.mode())?;
    let api::AcquireLeaseRequest { host, read_only, force, reason, .. } = request;
    let (by_force, seen_revision) = (force.then_some(reason), request.seen_lease_revision);
    let ask = LeaseAsk { host, mode, read_only, by_force, seen_revision };
    let (volume, granted) = node.acquire_lease_of(volume.id, ask).await.map_err(status)?;
    let granted = lease(&volume, &granted);
    Ok((volume, granted))
}

/// Ends a host's lease, on the volume's shard.
///
/// # Errors
/// As `admin.proto` says.
pub async fn release(
    node: LinuxNode,
    volume: Volume,
    request: api::ReleaseLeaseRequest,
) -> Result<api::ReleaseLeaseResponse, Status> {
    let api::ReleaseLeaseRequest { host, epoch, seen_lease_revision, .. } = request;
    let released = node.release_lease_of(&volume, &host, Epoch(epoch), seen_lease_revision).await;
    Ok(api::ReleaseLeaseResponse { released: released.map_err(status)? })
}

/// The leases that are asked for, on shard 0.
///
/// # Errors
/// `NOT_FOUND`: no such volume.
pub async fn list(
    node: LinuxNode,
    request: api::ListLeasesRequest,
) -> Result<api::ListLeasesResponse, Status> {
    let mut volumes: Vec<Volume> = match request.volume.as_str() {
        "" => node.cluster_state().volumes().cloned().collect(),
        name => vec![node.find_volume_surely(name).await.map_err(status)?],
    };
    volumes.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    let leases = volumes.iter().flat_map(|volume| {
        let wanted = |lease: &&Lease| request.host.is_empty() || lease.host == request.host;
        volume.leases.iter().filter(wanted).map(|it| lease(volume, it))
    });
    Ok(api::ListLeasesResponse { leases: leases.collect() })
}

/// Asks what a volume holds, or makes it say so, on the volume's shard.
///
/// # Errors
/// As `admin.proto` says.
pub async fn set_content(
    node: LinuxNode,
    volume: Volume,
    request: api::SetVolumeContentRequest,
) -> Result<api::SetVolumeContentResponse, Status> {
    let asked = content(&request)?;
    let epoch = Epoch(request.epoch);
    let reply = node.set_volume_content(&volume, asked, epoch).await.map_err(status)?;
    let ContentReply { refused, content, ever_written } = reply;
    let fs_type = content.fs_type().to_owned();
    let content = match content {
        Content::Blank => api::VolumeContent::Blank,
        Content::Formatting(_) => api::VolumeContent::Formatting,
        Content::Filesystem(_) => api::VolumeContent::Filesystem,
        Content::Raw => api::VolumeContent::Raw,
    };
    Ok(api::SetVolumeContentResponse { refused, content: content.into(), fs_type, ever_written })
}

fn content(request: &api::SetVolumeContentRequest) -> Result<Option<Content>, Status> {
    let typed = |make: fn(String) -> Content| match request.fs_type.as_str() {
        "" => Err(Status::invalid_argument("a file system needs its type: give fs_type")),
        fs_type if fs_type.len() > FS_TYPE_BYTES_MAX => Err(Status::invalid_argument(format!(
            "fs_type has {} bytes, {FS_TYPE_BYTES_MAX} are allowed",
            fs_type.len()
        ))),
        fs_type => Ok(Some(make(fs_type.to_owned()))),
    };
    match api::VolumeContent::try_from(request.content) {
        Ok(api::VolumeContent::Unspecified) => Ok(None),
        Ok(api::VolumeContent::Blank) => Ok(Some(Content::Blank)),
        Ok(api::VolumeContent::Formatting) => typed(Content::Formatting),
        Ok(api::VolumeContent::Filesystem) => typed(Content::Filesystem),
        Ok(api::VolumeContent::Raw) => Ok(Some(Content::Raw)),
        Err(_) => Err(Status::invalid_argument(format!(
            "content {} is not known to this node: upgrade it",
            request.content
        ))),
    }
}

fn mode(mode: api::LeaseMode) -> Result<LeaseMode, Status> {
    Ok(match mode {
        api::LeaseMode::Unspecified => {
            let text = "the lease's mode is not given, or not known to this node: give one";
            return Err(Status::invalid_argument(text));
        }
        api::LeaseMode::SingleNodeWriter => LeaseMode::SingleNodeWriter,
        api::LeaseMode::SingleNodeMultiWriter => LeaseMode::SingleNodeMultiWriter,
        api::LeaseMode::SingleNodePublisher => LeaseMode::SingleNodePublisher,
        api::LeaseMode::Readers => LeaseMode::Readers,
        api::LeaseMode::Writers => LeaseMode::Writers,
    })
}

/// A lease of a volume.
pub fn lease(volume: &Volume, lease: &Lease) -> api::Lease {
    let mode = match lease.mode {
        LeaseMode::SingleNodeWriter => api::LeaseMode::SingleNodeWriter,
        LeaseMode::SingleNodeMultiWriter => api::LeaseMode::SingleNodeMultiWriter,
        LeaseMode::SingleNodePublisher => api::LeaseMode::SingleNodePublisher,
        LeaseMode::Readers => api::LeaseMode::Readers,
        LeaseMode::Writers => api::LeaseMode::Writers,
    };
    api::Lease {
        volume: volume.name.clone(),
        volume_id: volume.id.to_string(),
        host: lease.host.clone(),
        mode: mode.into(),
        read_only: lease.read_only,
        epoch: lease.epoch.0,
        acquired_at_ms: lease.acquired_at_ms,
        reason: lease.reason.clone(),
    }
}
