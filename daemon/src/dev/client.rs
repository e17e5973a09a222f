//! What `ballastd dev` asks of its nodes.

use std::time::Duration;

use ballast_api::v1 as api;
use ballast_api::v1::admin_client::AdminClient;
use tonic::transport::{Channel, Endpoint};

use super::WantedVolume;
use crate::error::DaemonError;

/// Longest that one question may take.
const QUESTION_MAX: Duration = Duration::from_secs(40);
/// Longest that a connection on the same machine may take.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Connects to a node.
///
/// # Errors
/// When it does not listen.
pub async fn connect(grpc: &str) -> Result<AdminClient<Channel>, DaemonError> {
    let failed = |error: tonic::transport::Error| DaemonError::Dev(format!("{grpc}: {error}"));
    let endpoint = Endpoint::from_shared(grpc.to_owned()).map_err(failed)?;
    let endpoint = endpoint.timeout(QUESTION_MAX).connect_timeout(CONNECT_MAX);
    Ok(AdminClient::new(endpoint.connect().await.map_err(failed)?))
}

/// Whether a node says that it is ready.
pub async fn is_ready(grpc: &str) -> bool {
    let Ok(mut client) = connect(grpc).await else { return false };
    let answer = client.health(api::HealthRequest {}).await;
    answer.is_ok_and(|health| health.get_ref().ready)
}

/// All volumes that are not being deleted.
///
/// # Errors
/// [`DaemonError::Dev`].
pub async fn volumes(client: &mut AdminClient<Channel>) -> Result<Vec<api::Volume>, DaemonError> {
    let mut volumes = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = api::ListVolumesRequest { page_size: 0, page_token };
        let page = client.list_volumes(request).await.map_err(refused("list volumes"))?;
        let page = page.into_inner();
        volumes.extend(page.volumes);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    volumes.retain(|volume| volume.phase != i32::from(api::VolumePhase::Deleting));
    Ok(volumes)
}

/// Creates a volume.
///
/// # Errors
/// [`DaemonError::Dev`].
pub async fn create(
    client: &mut AdminClient<Channel>,
    wanted: &WantedVolume,
    replicas: u32,
) -> Result<(), DaemonError> {
    let (name, size_bytes) = (wanted.name.clone(), wanted.size.0);
    let request = api::CreateVolumeRequest { name, size_bytes, replicas, ..Default::default() };
    client.create_volume(request).await.map_err(refused("create a volume"))?;
    Ok(())
}

fn refused(action: &'static str) -> impl FnOnce(tonic::Status) -> DaemonError {
    move |status| DaemonError::Dev(format!("can't {action}: {}", status.message()))
}
