//! The generated service trait, answered.

use std::future::Future;

use ballast_api::timeout_of;
use ballast_api::v1 as api;
use ballast_api::v1::admin_server::Admin;
use ballast_block::NodeId;
use ballast_node::cluster::Volume;
use tonic::{Request, Response, Status};

use super::Access;
use super::leases;
use super::picture::Picture;
use super::pools;
use super::status::status;
use super::volumes::{self, node_unknown, volume_unknown};
use crate::shard::{LinuxNode, Shard, ShardEnded};

/// The administration service of one node.
pub struct Service {
    /// How to reach the node.
    pub access: Access,
}

impl Service {
    async fn ask<T, F, Fut>(&self, question: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce(LinuxNode) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        if !self.access.is_serving() {
            return Err(Status::unavailable("the node is starting or stopping: try again"));
        }
        self.access.first().ask(question).await.map_err(unavailable)
    }

    /// A volume, and the shard of this node that serves its replicas.
    async fn volume_at(&self, volume: &str) -> Result<(Volume, &Shard), Status> {
        let name = volume.to_owned();
        let found = self.ask(async move |node| node.find_volume_surely(&name).await).await?;
        let volume = found.map_err(volumes::status)?;
        let shard = self.access.shards.get(volume.shard.0 as usize).ok_or_else(|| {
            let (node, shard) = (self.access.node, volume.shard);
            Status::unavailable(format!("{node} has no pool for {shard}: ask a node that has"))
        })?;
        Ok((volume, shard))
    }

    async fn picture(&self) -> Result<Picture, Status> {
        if !self.access.is_serving() {
            return Err(Status::unavailable("the node is starting or stopping: try again"));
        }
        Picture::take(&self.access).await.map_err(unavailable)
    }
}

fn unavailable(ended: ShardEnded) -> Status {
    Status::unavailable(format!("{ended}: try another node"))
}

/// The node of that name or number.
pub fn find_node(picture: &Picture, name_or_id: &str) -> Result<NodeId, Status> {
    let node = picture.state.find_node(name_or_id);
    node.map(|node| node.id).ok_or_else(|| node_unknown(name_or_id))
}

fn list_replicas(
    picture: &Picture,
    request: &api::ListReplicasRequest,
) -> Result<api::ListReplicasResponse, Status> {
    let node = match request.node.as_str() {
        "" => None,
        name => Some(find_node(picture, name)?),
    };
    let family = match request.volume.as_str() {
        "" => None,
        name => {
            let volume = picture.state.find_volume(name);
            Some(volume.ok_or_else(|| volume_unknown(name))?.family)
        }
    };
    let wanted = picture.state.replicas().filter(|replica| {
        node.is_none_or(|node| node == replica.node)
            && family.is_none_or(|family| family == replica.family)
    });
    let replicas = wanted.map(|replica| picture.replica(replica)).collect();
    Ok(api::ListReplicasResponse { replicas })
}

#[tonic::async_trait]
impl Admin for Service {
    async fn create_volume(
        &self,
        request: Request<api::CreateVolumeRequest>,
    ) -> Result<Response<api::CreateVolumeResponse>, Status> {
        let timeout = timeout_of(&request);
        let request = request.into_inner();
        let volume = self.ask(move |node| volumes::create(node, request, timeout)).await??;
        let volume = Some(self.picture().await?.volume(&volume));
        Ok(Response::new(api::CreateVolumeResponse { volume }))
    }

    async fn get_volume(
        &self,
        request: Request<api::GetVolumeRequest>,
    ) -> Result<Response<api::GetVolumeResponse>, Status> {
        let api::GetVolumeRequest { volume: name, fresh } = request.into_inner();
        let asked = name.clone();
        let find = async move |node: LinuxNode| {
            if fresh {
                node.hear_all().await?;
            }
            node.find_volume_surely(&asked).await
        };
        let found = self.ask(find).await?;
        found.map_err(volumes::status)?;
        let picture = self.picture().await?;
        let volume = picture.state.find_volume(&name).ok_or_else(|| volume_unknown(&name))?;
        Ok(Response::new(api::GetVolumeResponse {
            volume: Some(picture.volume(volume)),
            replicas: picture.replicas_of(volume),
            writers: picture.writers_of(volume),
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<api::ListVolumesRequest>,
    ) -> Result<Response<api::ListVolumesResponse>, Status> {
        volumes::list(&self.picture().await?, request.get_ref()).map(Response::new)
    }

    async fn delete_volume(
        &self,
        request: Request<api::DeleteVolumeRequest>,
    ) -> Result<Response<api::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        self.ask(|node| volumes::delete(node, request)).await?.map(Response::new)
    }

    async fn resize_volume(
        &self,
        request: Request<api::ResizeVolumeRequest>,
    ) -> Result<Response<api::ResizeVolumeResponse>, Status> {
        let request = request.into_inner();
        let (_, shard) = self.volume_at(&request.volume).await?;
        let grown = shard.ask(|node| volumes::resize(node, request)).await;
        let volume = grown.map_err(unavailable)??;
        let volume = Some(self.picture().await?.volume(&volume));
        Ok(Response::new(api::ResizeVolumeResponse { volume }))
    }

    async fn acquire_lease(
        &self,
        request: Request<api::AcquireLeaseRequest>,
    ) -> Result<Response<api::AcquireLeaseResponse>, Status> {
        let request = request.into_inner();
        let (volume, shard) = self.volume_at(&request.volume).await?;
        let granted = shard.ask(|node| leases::acquire(node, volume, request)).await;
        let (volume, lease) = granted.map_err(unavailable)??;
        let (lease, volume) = (Some(lease), Some(self.picture().await?.volume(&volume)));
        Ok(Response::new(api::AcquireLeaseResponse { lease, volume }))
    }

    async fn release_lease(
        &self,
        request: Request<api::ReleaseLeaseRequest>,
    ) -> Result<Response<api::ReleaseLeaseResponse>, Status> {
        let request = request.into_inner();
        let (volume, shard) = self.volume_at(&request.volume).await?;
        let released = shard.ask(|node| leases::release(node, volume, request)).await;
        released.map_err(unavailable)?.map(Response::new)
    }

    async fn list_leases(
        &self,
        request: Request<api::ListLeasesRequest>,
    ) -> Result<Response<api::ListLeasesResponse>, Status> {
        let request = request.into_inner();
        self.ask(|node| leases::list(node, request)).await?.map(Response::new)
    }

    async fn set_volume_content(
        &self,
        request: Request<api::SetVolumeContentRequest>,
    ) -> Result<Response<api::SetVolumeContentResponse>, Status> {
        let request = request.into_inner();
        let (volume, shard) = self.volume_at(&request.volume).await?;
        let answered = shard.ask(|node| leases::set_content(node, volume, request)).await;
        answered.map_err(unavailable)?.map(Response::new)
    }

    async fn move_leader(
        &self,
        request: Request<api::MoveLeaderRequest>,
    ) -> Result<Response<api::MoveLeaderResponse>, Status> {
        let request = request.into_inner();
        let (_, shard) = self.volume_at(&request.volume).await?;
        let moved = shard.ask(|node| volumes::move_leader(node, request)).await;
        moved.map_err(unavailable)?.map(Response::new)
    }

    async fn list_replicas(
        &self,
        request: Request<api::ListReplicasRequest>,
    ) -> Result<Response<api::ListReplicasResponse>, Status> {
        list_replicas(&self.picture().await?, request.get_ref()).map(Response::new)
    }

    async fn list_nodes(
        &self,
        _request: Request<api::ListNodesRequest>,
    ) -> Result<Response<api::ListNodesResponse>, Status> {
        let picture = self.picture().await?;
        let nodes = picture.state.nodes().map(|node| picture.node(node)).collect();
        Ok(Response::new(api::ListNodesResponse { nodes }))
    }

    async fn get_node(
        &self,
        request: Request<api::GetNodeRequest>,
    ) -> Result<Response<api::GetNodeResponse>, Status> {
        let name = request.into_inner().node;
        let picture = self.picture().await?;
        let node = picture.state.find_node(&name).ok_or_else(|| node_unknown(&name))?;
        let pools = picture.state.pools_on(node.id).map(|pool| picture.pool(pool));
        let mut pools: Vec<api::Pool> = pools.collect();
        pools.sort_by(|a, b| (a.shard, &a.id).cmp(&(b.shard, &b.id)));
        Ok(Response::new(api::GetNodeResponse { node: Some(picture.node(node)), pools }))
    }

    async fn list_pools(
        &self,
        request: Request<api::ListPoolsRequest>,
    ) -> Result<Response<api::ListPoolsResponse>, Status> {
        pools::list(&self.picture().await?, request.get_ref()).map(Response::new)
    }

    async fn replace_pool(
        &self,
        request: Request<api::ReplacePoolRequest>,
    ) -> Result<Response<api::ReplacePoolResponse>, Status> {
        let request = request.into_inner();
        let picture = self.picture().await?;
        let asked = pools::to_replace(&picture, &request)?;
        self.ask(|node| pools::replace(node, asked)).await?.map(Response::new)
    }

    async fn get_status(
        &self,
        _request: Request<api::GetStatusRequest>,
    ) -> Result<Response<api::GetStatusResponse>, Status> {
        Ok(Response::new(status(&self.picture().await?)))
    }

    async fn health(
        &self,
        _request: Request<api::HealthRequest>,
    ) -> Result<Response<api::HealthResponse>, Status> {
        let ready = self.access.ready().await;
        Ok(Response::new(api::HealthResponse {
            ready: ready.is_ok(),
            reason: ready.err().unwrap_or_default(),
            node: self.access.node.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }
}
