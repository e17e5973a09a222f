//! A cluster in memory, behind the real administration interface: volumes, leases, contents, by the
//! rules that the interface states. It can be told to have no quorum for a while.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use ballast_api::v1 as api;
use ballast_api::v1::admin_server::{Admin, AdminServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Three nodes, each with a pool of this many free bytes.
pub const FREE: u64 = 10 << 30;

#[derive(Default)]
struct State {
    volumes: BTreeMap<String, api::Volume>,
    contents: BTreeMap<String, (api::VolumeContent, String)>,
    epochs: BTreeMap<String, u64>,
    numbers: u64,
    /// Requests still to be answered with UNAVAILABLE.
    no_quorum: u32,
    /// Sizes are decided, and not in force.
    no_growth: bool,
    asked: u64,
    created: Vec<api::CreateVolumeRequest>,
    /// All that was asked about leases, also what was not carried out.
    acquired: Vec<api::AcquireLeaseRequest>,
    released: Vec<api::ReleaseLeaseRequest>,
    /// Requests about leases get no answer in time, and are not carried out yet.
    stuck: bool,
    /// Looks at a volume after which somebody else changes its leases.
    overtaken: u32,
    /// The host whose lease another controller ends, and takes anew, after the next look.
    moved: Option<String>,
}

/// The cluster.
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<State>>);

impl Fake {
    /// Serves on a free port until the runtime ends.
    pub async fn serve(&self) -> String {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await;
        let listener = listener.expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let server =
            tonic::transport::Server::builder().add_service(AdminServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        format!("http://{address}")
    }

    /// The next so many requests find no quorum.
    pub fn lose_quorum(&self, requests: u32) {
        self.state().no_quorum = requests;
    }

    /// Volumes take no new size over until they are let.
    pub fn hold_growth(&self, hold: bool) {
        self.state().no_growth = hold;
    }

    /// Requests so far.
    pub fn asked(&self) -> u64 {
        self.state().asked
    }

    /// What the last new volume was created from.
    pub fn last_created(&self) -> api::CreateVolumeRequest {
        self.state().created.last().cloned().expect("a volume was created")
    }

    /// Requests about leases get no answer in time, until further notice.
    pub fn get_stuck(&self, stuck: bool) {
        self.state().stuck = stuck;
    }

    /// After the next so many looks at a volume somebody else changes its leases.
    pub fn overtake(&self, looks: u32) {
        self.state().overtaken = looks;
    }

    /// After the next look at a volume another controller ends this host's lease, if it has one, and
    /// takes it anew.
    pub fn move_lease(&self, host: &str) {
        self.state().moved = Some(host.to_owned());
    }

    /// All that was ever asked about leases comes again, late: nobody hears the answers.
    pub async fn repeat(&self) {
        let (acquired, released) = {
            let state = self.state();
            (state.acquired.clone(), state.released.clone())
        };
        for it in acquired.clone() {
            let _ = self.acquire_lease(Request::new(it)).await;
        }
        for it in released.clone() {
            let _ = self.release_lease(Request::new(it)).await;
        }
        let mut state = self.state();
        (state.acquired, state.released) = (acquired, released);
    }

    /// The leases of a volume.
    pub fn leases(&self, volume: &str) -> Vec<api::Lease> {
        self.state().find(volume).expect("it is there").leases.clone()
    }

    /// Names of all volumes.
    pub fn names(&self) -> Vec<String> {
        self.state().volumes.values().map(|volume| volume.name.clone()).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds the lock")
    }

    fn ask(&self) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.state();
        state.asked += 1;
        if state.no_quorum > 0 {
            state.no_quorum -= 1;
            return Err(Status::unavailable("the cluster group has no quorum"));
        }
        Ok(state)
    }
}

impl State {
    fn find(&mut self, volume: &str) -> Result<&mut api::Volume, Status> {
        let found = self.volumes.values_mut().find(|it| it.id == volume || it.name == volume);
        found.ok_or_else(|| Status::not_found(format!("there is no volume {volume:?}")))
    }
}

fn node(id: u32) -> api::Node {
    api::Node {
        id,
        name: format!("node-{id}"),
        liveness: api::NodeLiveness::Up as i32,
        peer_address: format!("127.0.0.{id}:7500"),
        ..Default::default()
    }
}

fn check_seen(volume: &api::Volume, seen: Option<u64>) -> Result<(), Status> {
    match seen {
        Some(seen) if volume.lease_revision != Some(seen) => {
            Err(Status::aborted("the leases have changed"))
        }
        _ => Ok(()),
    }
}

fn move_on(volume: &mut api::Volume, changed: bool) {
    volume.lease_revision = volume.lease_revision.map(|now| now + u64::from(changed));
}

fn none<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the driver has no need of this"))
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Admin for Fake {
    async fn create_volume(
        &self,
        request: Request<api::CreateVolumeRequest>,
    ) -> Answer<api::CreateVolumeResponse> {
        let (mut state, request) = (self.ask()?, request.into_inner());
        if let Ok(volume) = state.find(&request.name) {
            let same =
                volume.size_bytes == request.size_bytes && volume.replicas == request.replicas;
            let volume = same.then(|| volume.clone());
            let volume = volume.ok_or_else(|| Status::already_exists("it is different"))?;
            return Ok(Response::new(api::CreateVolumeResponse { volume: Some(volume) }));
        }
        state.numbers += 1;
        let volume = api::Volume {
            id: format!("00000000-0000-4000-8000-{:012x}", state.numbers),
            name: request.name.clone(),
            size_bytes: request.size_bytes,
            replicas: request.replicas,
            phase: api::VolumePhase::Creating as i32,
            lease_revision: Some(0),
            ..Default::default()
        };
        state.created.push(request);
        state.volumes.insert(volume.name.clone(), volume.clone());
        Ok(Response::new(api::CreateVolumeResponse { volume: Some(volume) }))
    }

    /// Whoever looks at a volume finds it ready the next time.
    async fn get_volume(
        &self,
        request: Request<api::GetVolumeRequest>,
    ) -> Answer<api::GetVolumeResponse> {
        let mut state = self.ask()?;
        let overtaken = state.overtaken > 0;
        state.overtaken -= u32::from(overtaken);
        let moved = state.moved.take();
        let name = request.into_inner().volume;
        let volume = state.find(&name)?;
        let answer = volume.clone();
        volume.phase = api::VolumePhase::Ready as i32;
        move_on(volume, overtaken || moved.is_some());
        if let Some(host) = moved {
            let id = volume.id.clone();
            volume.leases.retain(|it| it.host != host);
            let epoch = state.epochs.entry(id).or_default();
            *epoch += 1;
            let lease = api::Lease { host, epoch: *epoch, ..Default::default() };
            state.find(&name)?.leases.push(lease);
        }
        let volume = Some(answer);
        Ok(Response::new(api::GetVolumeResponse { volume, ..Default::default() }))
    }

    async fn list_volumes(
        &self,
        request: Request<api::ListVolumesRequest>,
    ) -> Answer<api::ListVolumesResponse> {
        let (state, request) = (self.ask()?, request.into_inner());
        let after = match request.page_token.as_str() {
            "" => String::new(),
            token => token
                .strip_prefix("after/")
                .ok_or_else(|| Status::invalid_argument("no token of mine"))?
                .to_owned(),
        };
        let size = if request.page_size == 0 { 2 } else { request.page_size as usize };
        let all = state.volumes.values().filter(|volume| volume.name > after);
        let mut volumes: Vec<api::Volume> = all.take(size + 1).cloned().collect();
        let more = volumes.len() > size;
        volumes.truncate(size);
        let last = volumes.last().filter(|_| more).map(|volume| format!("after/{}", volume.name));
        let next_page_token = last.unwrap_or_default();
        Ok(Response::new(api::ListVolumesResponse { volumes, next_page_token }))
    }

    async fn delete_volume(
        &self,
        request: Request<api::DeleteVolumeRequest>,
    ) -> Answer<api::DeleteVolumeResponse> {
        let mut state = self.ask()?;
        let volume = state.find(&request.into_inner().volume)?;
        if !volume.leases.is_empty() {
            return Err(Status::failed_precondition("it is leased"));
        }
        let name = volume.name.clone();
        let deleted = state.volumes.remove(&name).is_some();
        Ok(Response::new(api::DeleteVolumeResponse { deleted }))
    }

    async fn resize_volume(
        &self,
        request: Request<api::ResizeVolumeRequest>,
    ) -> Answer<api::ResizeVolumeResponse> {
        let (mut state, request) = (self.ask()?, request.into_inner());
        let no_growth = state.no_growth;
        let volume = state.find(&request.volume)?;
        volume.size_bytes = volume.size_bytes.max(request.size_bytes);
        if no_growth {
            return Err(Status::unavailable("the volume has no quorum"));
        }
        Ok(Response::new(api::ResizeVolumeResponse { volume: Some(volume.clone()) }))
    }

    async fn list_nodes(
        &self,
        _: Request<api::ListNodesRequest>,
    ) -> Answer<api::ListNodesResponse> {
        drop(self.ask()?);
        Ok(Response::new(api::ListNodesResponse { nodes: (1..=3).map(node).collect() }))
    }

    async fn list_pools(
        &self,
        _: Request<api::ListPoolsRequest>,
    ) -> Answer<api::ListPoolsResponse> {
        drop(self.ask()?);
        let pool = |node| api::Pool {
            node,
            state: api::PoolState::Ok as i32,
            capacity_bytes: FREE + 4096,
            used_bytes: 4096,
            ..Default::default()
        };
        Ok(Response::new(api::ListPoolsResponse { pools: (1..=3).map(pool).collect() }))
    }

    async fn health(&self, _: Request<api::HealthRequest>) -> Answer<api::HealthResponse> {
        drop(self.ask()?);
        Ok(Response::new(api::HealthResponse { ready: true, ..Default::default() }))
    }

    async fn acquire_lease(
        &self,
        request: Request<api::AcquireLeaseRequest>,
    ) -> Answer<api::AcquireLeaseResponse> {
        let (mut state, request) = (self.ask()?, request.into_inner());
        state.acquired.push(request.clone());
        if state.stuck {
            return Err(Status::unavailable("no answer in time"));
        }
        let volume = state.find(&request.volume)?.clone();
        let same = |lease: &&api::Lease| {
            lease.mode == request.mode && lease.read_only == request.read_only
        };
        let own = volume.leases.iter().find(|lease| lease.host == request.host);
        if let Some(own) = own {
            let lease = Some(own).filter(same).cloned();
            let lease = lease.ok_or_else(|| Status::already_exists("the host's lease differs"))?;
            let answer = api::AcquireLeaseResponse { lease: Some(lease), volume: Some(volume) };
            return Ok(Response::new(answer));
        }
        let shared = [api::LeaseMode::Readers, api::LeaseMode::Writers].contains(&request.mode());
        if volume.leases.iter().any(|lease| !shared || lease.mode != request.mode) {
            return Err(Status::failed_precondition("another host holds it"));
        }
        check_seen(&volume, request.seen_lease_revision)?;
        let epoch = state.epochs.entry(volume.id.clone()).or_default();
        *epoch += 1;
        let lease = api::Lease {
            volume: volume.name.clone(),
            volume_id: volume.id,
            mode: request.mode,
            host: request.host,
            read_only: request.read_only,
            epoch: *epoch,
            ..Default::default()
        };
        let volume = state.find(&request.volume)?;
        volume.leases.push(lease.clone());
        move_on(volume, true);
        let answer = api::AcquireLeaseResponse { lease: Some(lease), volume: Some(volume.clone()) };
        Ok(Response::new(answer))
    }

    async fn release_lease(
        &self,
        request: Request<api::ReleaseLeaseRequest>,
    ) -> Answer<api::ReleaseLeaseResponse> {
        let (mut state, request) = (self.ask()?, request.into_inner());
        state.released.push(request.clone());
        if state.stuck {
            return Err(Status::unavailable("no answer in time"));
        }
        let volume = state.find(&request.volume)?;
        check_seen(volume, request.seen_lease_revision)?;
        let before = volume.leases.len();
        let any = request.epoch == 0;
        volume.leases.retain(|it| it.host != request.host || !(any || it.epoch == request.epoch));
        let released = volume.leases.len() < before;
        move_on(volume, released || request.seen_lease_revision.is_some());
        Ok(Response::new(api::ReleaseLeaseResponse { released }))
    }

    async fn list_leases(
        &self,
        _: Request<api::ListLeasesRequest>,
    ) -> Answer<api::ListLeasesResponse> {
        none()
    }

    async fn set_volume_content(
        &self,
        request: Request<api::SetVolumeContentRequest>,
    ) -> Answer<api::SetVolumeContentResponse> {
        use api::VolumeContent::{Blank, Filesystem, Formatting, Raw, Unspecified};
        let (mut state, request) = (self.ask()?, request.into_inner());
        let id = state.find(&request.volume)?.id.clone();
        let now = state.contents.entry(id).or_insert((Blank, String::new()));
        let taken = matches!(
            (now.0, request.content()),
            (Blank | Formatting, Formatting | Raw) | (Formatting | Filesystem, Filesystem)
        );
        let ever_written = now.0 != Blank;
        if taken {
            *now = (request.content(), request.fs_type.clone());
        }
        let refused = !taken && request.content() != Unspecified && now.0 != request.content();
        let (content, fs_type) = (now.0 as i32, now.1.clone());
        let answer = api::SetVolumeContentResponse { refused, content, fs_type, ever_written };
        Ok(Response::new(answer))
    }

    async fn move_leader(
        &self,
        _: Request<api::MoveLeaderRequest>,
    ) -> Answer<api::MoveLeaderResponse> {
        none()
    }

    async fn list_replicas(
        &self,
        _: Request<api::ListReplicasRequest>,
    ) -> Answer<api::ListReplicasResponse> {
        none()
    }

    async fn get_node(&self, _: Request<api::GetNodeRequest>) -> Answer<api::GetNodeResponse> {
        none()
    }

    async fn replace_pool(
        &self,
        _: Request<api::ReplacePoolRequest>,
    ) -> Answer<api::ReplacePoolResponse> {
        none()
    }

    async fn get_status(
        &self,
        _: Request<api::GetStatusRequest>,
    ) -> Answer<api::GetStatusResponse> {
        none()
    }
}
