//! ListVolumes and ControllerGetVolume.
//!
//! Every volume of the cluster is listed, whoever made it. A token is the cluster's own: it stays
//! good when volumes come and go between pages.

use ballast_api::{Client, v1 as api};
use tonic::Code;

use super::ControllerService;
use super::create::to_csi;
use crate::cluster::Asking;
use crate::error::{Refusal, required};
use crate::v1::{
    ControllerGetVolumeResponse, ListVolumesRequest, ListVolumesResponse,
    controller_get_volume_response, list_volumes_response,
};

impl ControllerService {
    /// One page; all volumes when no length is given.
    pub(super) async fn list(
        &self,
        asking: &Asking,
        request: &ListVolumesRequest,
    ) -> Result<ListVolumesResponse, Refusal> {
        let wanted = usize::try_from(request.max_entries)
            .map_err(|_| Refusal::EntriesInvalid(request.max_entries))?;
        let mut entries = Vec::new();
        let mut token = request.starting_token.clone();
        loop {
            let left = wanted.saturating_sub(entries.len());
            let page = api::ListVolumesRequest {
                page_size: u32::try_from(left).unwrap_or(0),
                page_token: token.clone(),
            };
            let list = |client: Client| {
                let page = page.clone();
                async move { client.list_volumes(page).await }
            };
            let page = match asking.ask(list).await {
                Err(refusal) if refusal.code() == Code::InvalidArgument => {
                    return Err(Refusal::TokenInvalid(token));
                }
                page => page?,
            };
            let there = page.volumes.iter().filter(|it| it.phase() != api::VolumePhase::Deleting);
            entries.extend(there.map(entry));
            let full = wanted != 0 && entries.len() >= wanted;
            if full || page.next_page_token.is_empty() || page.next_page_token == token {
                return Ok(ListVolumesResponse { entries, next_token: page.next_page_token });
            }
            token = page.next_page_token;
        }
    }

    /// One volume.
    pub(super) async fn get(
        &self,
        asking: &Asking,
        id: &str,
    ) -> Result<ControllerGetVolumeResponse, Refusal> {
        let (volume, _) = asking.volume(required("volume_id", id)?).await?;
        let status = controller_get_volume_response::VolumeStatus {
            published_node_ids: holders(&volume),
            volume_condition: None,
        };
        Ok(ControllerGetVolumeResponse { volume: Some(to_csi(&volume)), status: Some(status) })
    }
}

fn entry(volume: &api::Volume) -> list_volumes_response::Entry {
    let status = list_volumes_response::VolumeStatus {
        published_node_ids: holders(volume),
        volume_condition: None,
    };
    list_volumes_response::Entry { volume: Some(to_csi(volume)), status: Some(status) }
}

fn holders(volume: &api::Volume) -> Vec<String> {
    volume.leases.iter().map(|lease| lease.host.clone()).collect()
}
