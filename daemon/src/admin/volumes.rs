//! Changes of volumes, with the status of what is refused.

use std::time::Duration;

use ballast_api::v1 as api;
use ballast_block::NodeId;
use ballast_node::admin::{AdminError, READY_MAX};
use ballast_node::cluster::{ClusterState, RefusalCode, Volume};
use ballast_node::leases::LeaseError;
use tonic::{Code, Status};

use super::picture::Picture;
use crate::shard::LinuxNode;

/// Replicas of a volume when the request names no number.
const REPLICAS_DEFAULT: u32 = 3;
/// Volumes in one page of a list, at most, and leases of them: a message stays well under its limit
/// of 4 MiB, which is that of most clients.
const PAGE_MAX: usize = 1000;
const PAGE_LEASES_MAX: usize = 4000;

/// Creates a volume, on shard 0. It is waited for until it can be used, but so that the caller, if it
/// has said how long it waits, hears of one that can't be yet.
///
/// # Errors
/// As `admin.proto` says.
pub async fn create(
    node: LinuxNode,
    request: api::CreateVolumeRequest,
    timeout: Option<Duration>,
) -> Result<Volume, Status> {
    let ready_max = timeout.map_or(READY_MAX, |timeout| READY_MAX.min(timeout / 2));
    let replicas = if request.replicas == 0 { REPLICAS_DEFAULT } else { request.replicas };
    let preferred = preferred_surely(&node, &request.preferred_nodes).await?;
    let (name, size_bytes) = (&request.name, request.size_bytes);
    match node.create_volume_near(name, size_bytes, replicas, preferred, ready_max).await {
        Ok(volume) => Ok(volume),
        // It is placed; that it can't be used yet is what its phase says.
        Err(AdminError::NotReady(name)) => node.find_volume(&name).map_err(status),
        Err(error) => Err(status(error)),
    }
}

/// The nodes of those names or numbers. The cluster group is asked before one is said not to be there:
/// what this node knows may be older.
async fn preferred_surely(node: &LinuxNode, names: &[String]) -> Result<Vec<NodeId>, Status> {
    let known = preferred(&node.cluster_state(), names);
    if known.is_ok() {
        return known;
    }
    node.hear_all().await.map_err(status)?;
    preferred(&node.cluster_state(), names)
}

/// The nodes of those names or numbers, each once. One that has no room is passed by later; one that
/// is not there is a mistake of who asks.
fn preferred(state: &ClusterState, names: &[String]) -> Result<Vec<NodeId>, Status> {
    let mut nodes = Vec::new();
    for name in names {
        let node = state.find_node(name).ok_or_else(|| node_unknown(name))?.id;
        if !nodes.contains(&node) {
            nodes.push(node);
        }
    }
    Ok(nodes)
}

/// Deletes a volume, on shard 0.
///
/// # Errors
/// As `admin.proto` says.
pub async fn delete(
    node: LinuxNode,
    request: api::DeleteVolumeRequest,
) -> Result<api::DeleteVolumeResponse, Status> {
    let deleted = node.delete_volume(&request.volume).await.map_err(status)?;
    Ok(api::DeleteVolumeResponse { deleted })
}

/// Grows a volume, on the volume's shard.
///
/// # Errors
/// As `admin.proto` says.
pub async fn resize(node: LinuxNode, request: api::ResizeVolumeRequest) -> Result<Volume, Status> {
    node.resize_volume(&request.volume, request.size_bytes).await.map_err(status)
}

/// Moves a volume's leader, on the volume's shard.
///
/// # Errors
/// As `admin.proto` says.
pub async fn move_leader(
    node: LinuxNode,
    request: api::MoveLeaderRequest,
) -> Result<api::MoveLeaderResponse, Status> {
    let target = {
        let state = node.cluster_state();
        let found = state.find_node(&request.node).map(|node| node.id);
        found.ok_or_else(|| node_unknown(&request.node))?
    };
    node.move_leader(&request.volume, target).await.map_err(status)?;
    Ok(api::MoveLeaderResponse { leader_node: target.0 })
}

/// One page of the list of volumes.
///
/// # Errors
/// `INVALID_ARGUMENT` for a token that is none.
pub fn list(
    picture: &Picture,
    request: &api::ListVolumesRequest,
) -> Result<api::ListVolumesResponse, Status> {
    let key = |volume: &Volume| (volume.name.clone(), volume.id.to_string());
    let mut volumes: Vec<&Volume> = picture.state.volumes().collect();
    volumes.sort_by_key(|volume| key(volume));
    if !request.page_token.is_empty() {
        let (name, id) = request.page_token.split_once('/').ok_or_else(|| {
            let token = &request.page_token;
            Status::invalid_argument(format!("page token {token:?} is none of this server"))
        })?;
        let after = (name.to_owned(), id.to_owned());
        volumes.retain(|volume| key(volume) > after);
    }
    let wanted = match request.page_size as usize {
        0 => PAGE_MAX,
        size => size.min(PAGE_MAX),
    };
    let mut leases = 0;
    let fits = volumes.iter().take_while(|volume| {
        leases += volume.leases.len();
        leases <= PAGE_LEASES_MAX
    });
    let wanted = wanted.min(fits.count());
    let more = volumes.len() > wanted;
    volumes.truncate(wanted);
    let last = volumes.last().filter(|_| more).map(|volume| key(volume));
    Ok(api::ListVolumesResponse {
        volumes: volumes.into_iter().map(|volume| picture.volume(volume)).collect(),
        next_page_token: last.map(|(name, id)| format!("{name}/{id}")).unwrap_or_default(),
    })
}

/// No node of that name or number.
pub fn node_unknown(node: &str) -> Status {
    Status::not_found(format!("there is no node {node:?}: see `ballastctl node list`"))
}

/// No volume of that name or id.
pub fn volume_unknown(volume: &str) -> Status {
    Status::not_found(format!("there is no volume {volume:?}: see `ballastctl volume list`"))
}

/// The status of a refusal.
pub fn status(error: AdminError) -> Status {
    let code = match &error {
        AdminError::Refused(refusal) => match refusal.code() {
            RefusalCode::InvalidArgument => Code::InvalidArgument,
            RefusalCode::NotFound => Code::NotFound,
            RefusalCode::AlreadyExists => Code::AlreadyExists,
            RefusalCode::FailedPrecondition => Code::FailedPrecondition,
            RefusalCode::ResourceExhausted => Code::ResourceExhausted,
            RefusalCode::Aborted => Code::Aborted,
        },
        AdminError::VolumeUnknown(volume) => return volume_unknown(volume),
        AdminError::NodeUnknown(node) => return node_unknown(&node.to_string()),
        AdminError::NotTaken(LeaseError::VolumeUnknown(volume)) => {
            return volume_unknown(&volume.to_string());
        }
        AdminError::NoQuorum(_)
        | AdminError::NotReady(_)
        | AdminError::NotHeard(_)
        | AdminError::NotTaken(LeaseError::NoQuorum(_)) => Code::Unavailable,
        AdminError::CantMove { .. }
        | AdminError::LeaseGone { .. }
        | AdminError::NotTaken(LeaseError::NotLeased { .. }) => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ballast_block::{ClusterId, PoolId, ShardId, VolumeId};
    use ballast_node::cluster::{
        AcquireLease, Command, CreateVolume, LeaseMode, NodeBooted, PoolSpace, RegisterNode, Reply,
    };

    use super::*;

    /// A volume of every number below, each with as many leases.
    fn leased(volumes: u32, leases: u32) -> ClusterState {
        let mut state = ClusterState::new(ClusterId::from_bytes([1; 16]));
        let node = NodeId(1);
        state.apply(Command::RegisterNode(RegisterNode {
            node,
            name: "n1".to_owned(),
            peer_address: "10.0.0.1:7300".to_owned(),
            labels: BTreeMap::new(),
        }));
        state.apply(Command::NodeBooted(NodeBooted {
            node,
            pool: PoolId::from_bytes([1; 16]),
            shard: ShardId(0),
            boot_counter: 1,
            incarnation: 1,
            space: PoolSpace { capacity_bytes: 1 << 40, used_bytes: 0 },
            settled: 0,
            settled_boot: 0,
            offered: 0,
            member: None,
            told: None,
        }));
        for number in 0..volumes {
            let volume = VolumeId::from_bytes(u128::from(number + 1).to_le_bytes());
            let Reply::Volume(made) = state.apply(Command::CreateVolume(CreateVolume {
                volume,
                name: format!("v-{number:03}"),
                size_bytes: 1 << 20,
                replicas: 1,
                created_at_ms: 0,
                preferred: Vec::new(),
                absent: Vec::new(),
            })) else {
                panic!("not a volume")
            };
            state.apply(Command::FamilyFormed { family: made.family });
            for host in 0..leases {
                let (host, mode) = (format!("host-{host}"), LeaseMode::Readers);
                let (read_only, force, reason, at_ms) = (true, false, String::new(), 0);
                let lease = AcquireLease {
                    volume,
                    host,
                    mode,
                    read_only,
                    force,
                    reason,
                    at_ms,
                    unique_epoch: true,
                    seen_revision: None,
                };
                assert!(matches!(state.apply(Command::AcquireLease(lease)), Reply::Volume(_)));
            }
        }
        state
    }

    fn picture(state: ClusterState) -> Picture {
        Picture {
            own: NodeId(1),
            founders: 1,
            state,
            refused: BTreeMap::new(),
            ended: BTreeMap::new(),
            reports: BTreeMap::new(),
        }
    }

    #[test]
    fn pages_are_bounded_by_volumes_and_by_leases() {
        let picture = picture(leased(130, 64));
        let mut request = api::ListVolumesRequest::default();
        let mut pages = Vec::new();
        let mut seen = Vec::new();
        loop {
            let page = list(&picture, &request).unwrap();
            pages.push(page.volumes.len());
            seen.extend(page.volumes.into_iter().map(|volume| (volume.name, volume.leases.len())));
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                break;
            }
        }
        assert_eq!(pages, [62, 62, 6]);
        assert!(seen.is_sorted() && seen.iter().all(|(_, leases)| *leases == 64));
        request = api::ListVolumesRequest { page_size: 5, ..Default::default() };
        assert_eq!(list(&picture, &request).unwrap().volumes.len(), 5);
    }

    #[test]
    fn preferred_nodes_are_taken_by_name_or_number_and_must_be_there() {
        let state = leased(0, 0);
        let preferred = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            preferred(&state, &names).map_err(|status| (status.code(), status.message().to_owned()))
        };
        assert_eq!(preferred(&[]), Ok(Vec::new()));
        assert_eq!(preferred(&["n1", "1"]), Ok(vec![NodeId(1)]));
        for wrong in ["node-7", "7", "0", "", "N1"] {
            let (code, message) = preferred(&["n1", wrong]).unwrap_err();
            assert_eq!(code, Code::NotFound);
            let named = message.contains(&format!("{wrong:?}")) && message.contains("node list");
            assert!(named, "{message}");
        }
    }
}
