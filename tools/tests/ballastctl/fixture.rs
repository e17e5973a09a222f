//! The Admin service over a `ClusterState` in memory: real requests, real refusals, made-up roles.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use ballast_api::v1;
use ballast_api::v1::admin_server::{Admin, AdminServer};
use ballast_block::{ClusterId, Epoch, FamilyId, NodeId, PoolId, ShardId, VolumeId};
use ballast_cluster::{
    AcquireLease, ClusterState, Command, CreateVolume, LeaseMode, NodeBooted, PoolSpace, PoolState,
    RefusalCode, RegisterNode, ReplicaState, Reply, VolumePhase,
};
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const GIB: u64 = 1 << 30;

/// A node that serves the Admin service on 127.0.0.1 until dropped.
pub struct Node {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    /// A node of a cluster of its own, with three nodes.
    pub fn start() -> Self {
        Self::serve(Fixture::new())
    }

    /// A node that is up and has no quorum.
    pub fn without_quorum() -> Self {
        Self::serve(Fixture { quorum: false, ..Fixture::new() })
    }

    /// A node whose volumes are never ready.
    pub fn never_ready() -> Self {
        Self::serve(Fixture { makes_ready: false, ..Fixture::new() })
    }

    fn serve(fixture: Fixture) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (address_known, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                address_known.send(listener.local_addr().unwrap()).unwrap();
                let server = tonic::transport::Server::builder()
                    .add_service(AdminServer::new(fixture))
                    .serve_with_incoming(TcpListenerStream::new(listener));
                // Not gracefully: connections break, as they do when a process is killed.
                tokio::select! {
                    biased;
                    _ = stopped => {}
                    result = server => result.unwrap(),
                }
            });
        });
        let address = address.recv().unwrap();
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        let result = self.thread.take().unwrap().join();
        assert!(result.is_ok() || std::thread::panicking(), "the fixture failed");
    }
}

struct Fixture {
    state: Arc<Mutex<World>>,
    quorum: bool,
    makes_ready: bool,
}

struct World {
    cluster: ClusterState,
    leaders: BTreeMap<FamilyId, NodeId>,
    volumes_made: u8,
}

impl Fixture {
    fn new() -> Self {
        let mut cluster = ClusterState::new(ClusterId::from_bytes([0xc1; 16]));
        for number in 1..=3_u32 {
            let registered = cluster.apply(Command::RegisterNode(RegisterNode {
                node: NodeId(number),
                name: format!("storage-{number}"),
                peer_address: format!("10.0.0.{number}:7300"),
                labels: BTreeMap::from([("zone".to_owned(), format!("z{number}"))]),
            }));
            assert_eq!(registered, Reply::Done);
            let booted = cluster.apply(Command::NodeBooted(NodeBooted {
                node: NodeId(number),
                pool: PoolId::from_bytes([number as u8; 16]),
                shard: ShardId(0),
                boot_counter: 4,
                incarnation: 1,
                space: PoolSpace { capacity_bytes: 1024 * GIB, used_bytes: 300 * GIB },
                settled: 0,
                settled_boot: 0,
                offered: 0,
                member: None,
                told: None,
            }));
            assert_eq!(booted, Reply::Done);
        }
        let world = World { cluster, leaders: BTreeMap::new(), volumes_made: 0 };
        Self { state: Arc::new(Mutex::new(world)), quorum: true, makes_ready: true }
    }

    fn world(&self) -> Result<MutexGuard<'_, World>, Status> {
        if !self.quorum {
            return Err(Status::unavailable(
                "the cluster group has no leader: wait for a majority",
            ));
        }
        Ok(self.state.lock().unwrap())
    }
}

impl World {
    fn apply(&mut self, command: Command) -> Result<Reply, Status> {
        match self.cluster.apply(command) {
            Reply::Refused(refusal) => {
                let message = refusal.to_string();
                Err(match refusal.code() {
                    RefusalCode::InvalidArgument => Status::invalid_argument(message),
                    RefusalCode::NotFound => Status::not_found(message),
                    RefusalCode::AlreadyExists => Status::already_exists(message),
                    RefusalCode::FailedPrecondition => Status::failed_precondition(message),
                    RefusalCode::ResourceExhausted => Status::resource_exhausted(message),
                    RefusalCode::Aborted => Status::aborted(message),
                })
            }
            reply => Ok(reply),
        }
    }

    fn find(&self, name_or_id: &str) -> Result<ballast_cluster::Volume, Status> {
        self.cluster.find_volume(name_or_id).cloned().ok_or_else(|| {
            Status::not_found(format!(
                "volume {name_or_id:?} does not exist: see `ballastctl volume list`"
            ))
        })
    }

    fn find_node(&self, name_or_id: &str) -> Result<ballast_cluster::Node, Status> {
        self.cluster.find_node(name_or_id).cloned().ok_or_else(|| {
            Status::not_found(format!(
                "node {name_or_id:?} does not exist: see `ballastctl node list`"
            ))
        })
    }

    fn volume(&self, volume: &ballast_cluster::Volume) -> v1::Volume {
        let leader = self.leaders.get(&volume.family).map_or(0, |node| node.0);
        let mut shown = v1::Volume {
            id: volume.id.to_string(),
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            replicas: volume.replica_count,
            family: volume.family.0,
            created_at_ms: volume.created_at_ms,
            leader_node: leader,
            shard: volume.shard.0,
            leases: volume.leases.iter().map(|it| lease(volume, it)).collect(),
            ..Default::default()
        };
        shown.set_phase(match volume.phase {
            VolumePhase::Creating => v1::VolumePhase::Creating,
            VolumePhase::Ready => v1::VolumePhase::Ready,
            VolumePhase::Deleting => v1::VolumePhase::Deleting,
        });
        if leader != 0 {
            shown.set_health(v1::VolumeHealth::Ok);
        }
        shown
    }

    fn replicas(&self, volume: &ballast_cluster::Volume) -> Vec<v1::Replica> {
        let leader = self.leaders.get(&volume.family);
        let replica = |it: &ballast_cluster::Replica| {
            let mut shown = v1::Replica {
                id: it.id.0,
                volume_id: volume.id.to_string(),
                volume: volume.name.clone(),
                node: it.node.0,
                pool_id: it.pool.to_string(),
                ..Default::default()
            };
            shown.set_state(match it.state {
                ReplicaState::Creating => v1::ReplicaState::Creating,
                ReplicaState::Ready => v1::ReplicaState::Ready,
                ReplicaState::Lost => v1::ReplicaState::Lost,
                ReplicaState::Removing => v1::ReplicaState::Removing,
                ReplicaState::Removed => v1::ReplicaState::Removed,
            });
            // Node 3 does not answer, so that its live fields are not known.
            if leader.is_some() && it.node != NodeId(3) {
                shown.live = true;
                shown.in_sync = true;
                (shown.term, shown.last_log_index, shown.applied_index) = (2, 117, 116);
                shown.set_role(match leader == Some(&it.node) {
                    true => v1::ReplicaRole::Leader,
                    false => v1::ReplicaRole::Follower,
                });
            }
            shown
        };
        self.cluster.replicas_of(volume.family).map(replica).collect()
    }

    /// A host that may write does so through node 2; a volume with this name is used without a lease.
    fn writers(&self, volume: &ballast_cluster::Volume) -> Vec<v1::Writer> {
        let may_write = volume.leases.iter().filter(|lease| !lease.read_only);
        let leased = may_write.map(|lease| v1::Writer { node: 2, epoch: lease.epoch.0 });
        let unleased = (volume.name == "open").then_some(v1::Writer { node: 1, epoch: 0 });
        leased.chain(unleased).collect()
    }

    fn node(&self, node: &ballast_cluster::Node) -> v1::Node {
        let pools: Vec<_> = self.cluster.pools_on(node.id).collect();
        let mut shown = v1::Node {
            id: node.id.0,
            name: node.name.clone(),
            peer_address: node.peer_address.clone(),
            labels: node.labels.clone(),
            pools: pools.len() as u32,
            replicas: self.cluster.replicas_on(node.id).count() as u32,
            leaders: self.leaders.values().filter(|leader| **leader == node.id).count() as u32,
            capacity_bytes: pools.iter().map(|pool| pool.space.capacity_bytes).sum(),
            used_bytes: pools.iter().map(|pool| pool.space.used_bytes).sum(),
            ..Default::default()
        };
        shown.set_state(v1::NodeState::Active);
        if node.id == NodeId(3) {
            shown.set_liveness(v1::NodeLiveness::Down);
        } else {
            shown.set_liveness(v1::NodeLiveness::Up);
            shown.version = "0.1.0".to_owned();
        }
        shown
    }

    fn pool(&self, pool: &ballast_cluster::Pool) -> v1::Pool {
        let mut shown = v1::Pool {
            id: pool.id.to_string(),
            node: pool.node.0,
            capacity_bytes: pool.space.capacity_bytes,
            used_bytes: pool.space.used_bytes,
            replicas: self.cluster.replicas().filter(|it| it.pool == pool.id).count() as u32,
            boot_counter: pool.boot_counter,
            shard: pool.shard.0,
            ..Default::default()
        };
        shown.set_state(match pool.state {
            PoolState::Ok => v1::PoolState::Ok,
            PoolState::Failed => v1::PoolState::Failed,
            PoolState::Lost => v1::PoolState::Lost,
        });
        shown
    }

    /// What the nodes would do in the background.
    fn make_ready(&mut self, volume: &ballast_cluster::Volume) -> Result<(), Status> {
        if volume.phase == VolumePhase::Creating {
            for &replica in &volume.replicas {
                self.apply(Command::ReplicaReady { replica })?;
            }
            let former = self.cluster.former(volume.family).expect("it is being created").node;
            self.apply(Command::FamilyFormed { family: volume.family })?;
            self.leaders.insert(volume.family, former);
        }
        Ok(())
    }

    fn status(&self) -> v1::GetStatusResponse {
        let volumes: Vec<_> = self.cluster.volumes().collect();
        let deleting = volumes.iter().filter(|it| it.phase == VolumePhase::Deleting).count();
        let mut reason = v1::HealthReason {
            code: "node-down".to_owned(),
            object: "storage-3".to_owned(),
            message: "node 3 does not answer: start ballastd there".to_owned(),
            ..Default::default()
        };
        reason.set_severity(v1::ClusterHealth::Degraded);
        let mut status = v1::GetStatusResponse {
            reasons: vec![reason],
            cluster_id: self.cluster.cluster().to_string(),
            generation: self.cluster.generation(),
            leader_node: 1,
            revision: self.cluster.revision(),
            answering_node: 1,
            counts: Some(v1::Counts {
                nodes: 3,
                nodes_up: 2,
                pools: 3,
                pools_ok: 3,
                volumes: volumes.len() as u32,
                volumes_ok: self.leaders.len() as u32,
                volumes_deleting: deleting as u32,
                replicas: self.cluster.replicas().count() as u32,
                capacity_bytes: self.cluster.pools().map(|it| it.space.capacity_bytes).sum(),
                used_bytes: self.cluster.pools().map(|it| it.space.used_bytes).sum(),
                ..Default::default()
            }),
            ..Default::default()
        };
        status.set_health(v1::ClusterHealth::Degraded);
        status
    }
}

fn lease(volume: &ballast_cluster::Volume, it: &ballast_cluster::Lease) -> v1::Lease {
    let mut shown = v1::Lease {
        volume: volume.name.clone(),
        volume_id: volume.id.to_string(),
        host: it.host.clone(),
        mode: 0,
        read_only: it.read_only,
        epoch: it.epoch.0,
        acquired_at_ms: it.acquired_at_ms,
        reason: it.reason.clone(),
    };
    shown.set_mode(match it.mode {
        LeaseMode::SingleNodeWriter => v1::LeaseMode::SingleNodeWriter,
        LeaseMode::SingleNodeMultiWriter => v1::LeaseMode::SingleNodeMultiWriter,
        LeaseMode::SingleNodePublisher => v1::LeaseMode::SingleNodePublisher,
        LeaseMode::Readers => v1::LeaseMode::Readers,
        LeaseMode::Writers => v1::LeaseMode::Writers,
    });
    shown
}

fn lease_mode(mode: v1::LeaseMode) -> LeaseMode {
    match mode {
        v1::LeaseMode::Unspecified => panic!("ballastctl always names a mode"),
        v1::LeaseMode::SingleNodeWriter => LeaseMode::SingleNodeWriter,
        v1::LeaseMode::SingleNodeMultiWriter => LeaseMode::SingleNodeMultiWriter,
        v1::LeaseMode::SingleNodePublisher => LeaseMode::SingleNodePublisher,
        v1::LeaseMode::Readers => LeaseMode::Readers,
        v1::LeaseMode::Writers => LeaseMode::Writers,
    }
}

type Answer<A> = Result<Response<A>, Status>;

#[tonic::async_trait]
impl Admin for Fixture {
    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Answer<v1::CreateVolumeResponse> {
        let mut world = self.world()?;
        let request = request.into_inner();
        world.volumes_made += 1;
        let volume = VolumeId::from_bytes([0xa0 + world.volumes_made; 16]);
        let reply = world.apply(Command::CreateVolume(CreateVolume {
            volume,
            name: request.name,
            size_bytes: request.size_bytes,
            replicas: if request.replicas == 0 { 3 } else { request.replicas },
            created_at_ms: 1_700_000_000_000,
            preferred: Vec::new(),
            absent: Vec::new(),
        }))?;
        let Reply::Volume(volume) = reply else { panic!("not a volume") };
        Ok(Response::new(v1::CreateVolumeResponse { volume: Some(world.volume(&volume)) }))
    }

    /// A volume that is being created becomes ready after it was looked at.
    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Answer<v1::GetVolumeResponse> {
        let mut world = self.world()?;
        let volume = world.find(&request.into_inner().volume)?;
        let answer = v1::GetVolumeResponse {
            volume: Some(world.volume(&volume)),
            replicas: world.replicas(&volume),
            writers: world.writers(&volume),
        };
        if self.makes_ready {
            world.make_ready(&volume)?;
        }
        Ok(Response::new(answer))
    }

    /// Two volumes per page; a page's token is the last name on it.
    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Answer<v1::ListVolumesResponse> {
        let world = self.world()?;
        let after = request.into_inner().page_token;
        let mut volumes: Vec<_> = world.cluster.volumes().filter(|it| it.name > after).collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        let page = &volumes[..volumes.len().min(2)];
        let last = page.last().filter(|_| volumes.len() > page.len());
        Ok(Response::new(v1::ListVolumesResponse {
            volumes: page.iter().map(|volume| world.volume(volume)).collect(),
            next_page_token: last.map(|it| it.name.clone()).unwrap_or_default(),
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Answer<v1::DeleteVolumeResponse> {
        let mut world = self.world()?;
        let found = world.find(&request.into_inner().volume).ok();
        let deleted = found.is_some();
        if let Some(volume) = found {
            world.apply(Command::DeleteVolume { volume: volume.id })?;
            world.leaders.remove(&volume.family);
        }
        Ok(Response::new(v1::DeleteVolumeResponse { deleted }))
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Answer<v1::ResizeVolumeResponse> {
        let mut world = self.world()?;
        let request = request.into_inner();
        let volume = world.find(&request.volume)?.id;
        let command = Command::ResizeVolume { volume, size_bytes: request.size_bytes };
        let Reply::Volume(volume) = world.apply(command)? else { panic!("not a volume") };
        Ok(Response::new(v1::ResizeVolumeResponse { volume: Some(world.volume(&volume)) }))
    }

    async fn acquire_lease(
        &self,
        request: Request<v1::AcquireLeaseRequest>,
    ) -> Answer<v1::AcquireLeaseResponse> {
        let mut world = self.world()?;
        let request = request.into_inner();
        let mode = lease_mode(request.mode());
        let v1::AcquireLeaseRequest { volume, host, read_only, force, reason, .. } = request;
        let (volume, at_ms) = (world.find(&volume)?.id, 1_700_000_060_000);
        let asked = AcquireLease {
            volume,
            host: host.clone(),
            mode,
            read_only,
            force,
            reason,
            at_ms,
            unique_epoch: true,
            seen_revision: None,
        };
        let Reply::Volume(volume) = world.apply(Command::AcquireLease(asked))? else {
            panic!("not a volume")
        };
        let granted = volume.lease(&host).map(|it| lease(&volume, it));
        let volume = Some(world.volume(&volume));
        Ok(Response::new(v1::AcquireLeaseResponse { lease: granted, volume }))
    }

    async fn release_lease(
        &self,
        request: Request<v1::ReleaseLeaseRequest>,
    ) -> Answer<v1::ReleaseLeaseResponse> {
        let mut world = self.world()?;
        let v1::ReleaseLeaseRequest { volume, host, epoch, .. } = request.into_inner();
        let before = world.find(&volume)?;
        let (volume, epoch) = (before.id, Epoch(epoch));
        let command = Command::ReleaseLease { volume, host, epoch, seen_revision: None };
        let Reply::Volume(after) = world.apply(command)? else { panic!("not a volume") };
        let released = after.leases.len() < before.leases.len();
        Ok(Response::new(v1::ReleaseLeaseResponse { released }))
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Answer<v1::ListLeasesResponse> {
        let world = self.world()?;
        let v1::ListLeasesRequest { volume, host } = request.into_inner();
        let of = if volume.is_empty() { None } else { Some(world.find(&volume)?.id) };
        let volumes = world.cluster.volumes().filter(|it| of.is_none_or(|of| of == it.id));
        let all = volumes.flat_map(|it| it.leases.iter().map(|held| lease(it, held)));
        let leases = all.filter(|it| host.is_empty() || it.host == host).collect();
        Ok(Response::new(v1::ListLeasesResponse { leases }))
    }

    async fn set_volume_content(
        &self,
        _: Request<v1::SetVolumeContentRequest>,
    ) -> Answer<v1::SetVolumeContentResponse> {
        Err(Status::unimplemented("ballastctl does not ask for that"))
    }

    async fn move_leader(
        &self,
        request: Request<v1::MoveLeaderRequest>,
    ) -> Answer<v1::MoveLeaderResponse> {
        let mut world = self.world()?;
        let request = request.into_inner();
        let (volume, node) = (world.find(&request.volume)?, world.find_node(&request.node)?);
        if !world.cluster.replicas_of(volume.family).any(|replica| replica.node == node.id) {
            return Err(Status::failed_precondition(format!(
                "volume {:?} has no replica on {}: choose one of `ballastctl volume show {}`",
                volume.name, node.id, volume.name
            )));
        }
        world.leaders.insert(volume.family, node.id);
        Ok(Response::new(v1::MoveLeaderResponse { leader_node: node.id.0 }))
    }

    async fn list_replicas(
        &self,
        _: Request<v1::ListReplicasRequest>,
    ) -> Answer<v1::ListReplicasResponse> {
        let world = self.world()?;
        let replicas = world.cluster.volumes().flat_map(|volume| world.replicas(volume)).collect();
        Ok(Response::new(v1::ListReplicasResponse { replicas }))
    }

    async fn list_nodes(&self, _: Request<v1::ListNodesRequest>) -> Answer<v1::ListNodesResponse> {
        let world = self.world()?;
        let nodes = world.cluster.nodes().map(|node| world.node(node)).collect();
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }

    async fn get_node(&self, request: Request<v1::GetNodeRequest>) -> Answer<v1::GetNodeResponse> {
        let world = self.world()?;
        let node = world.find_node(&request.into_inner().node)?;
        let pools = world.cluster.pools_on(node.id).map(|pool| world.pool(pool)).collect();
        Ok(Response::new(v1::GetNodeResponse { node: Some(world.node(&node)), pools }))
    }

    async fn list_pools(
        &self,
        request: Request<v1::ListPoolsRequest>,
    ) -> Answer<v1::ListPoolsResponse> {
        let world = self.world()?;
        let wanted = request.into_inner().node;
        let node = match wanted.is_empty() {
            true => None,
            false => Some(world.find_node(&wanted)?.id),
        };
        let chosen = world.cluster.pools().filter(|pool| node.is_none_or(|it| it == pool.node));
        let pools = chosen.map(|pool| world.pool(pool)).collect();
        Ok(Response::new(v1::ListPoolsResponse { pools }))
    }

    async fn replace_pool(
        &self,
        request: Request<v1::ReplacePoolRequest>,
    ) -> Answer<v1::ReplacePoolResponse> {
        let world = self.world()?;
        let node = world.find_node(&request.into_inner().node)?;
        let pool = world.cluster.pools_on(node.id).next();
        let pool_id = pool.map(|pool| pool.id.to_string()).unwrap_or_default();
        let (node, replacement) = (node.id.0, 1007);
        let (without_number, shard) = (false, 0);
        let answer = v1::ReplacePoolResponse { pool_id, node, replacement, without_number, shard };
        Ok(Response::new(answer))
    }

    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Answer<v1::GetStatusResponse> {
        Ok(Response::new(self.world()?.status()))
    }

    async fn health(&self, _: Request<v1::HealthRequest>) -> Answer<v1::HealthResponse> {
        let (ready, reason, version) = (true, String::new(), "0.1.0".to_owned());
        Ok(Response::new(v1::HealthResponse { ready, reason, node: 1, version }))
    }
}
