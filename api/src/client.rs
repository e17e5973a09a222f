//! A client that asks the nodes in turn until one answers.
//!
//! Right because every request may be repeated (see the proto): one whose outcome is unknown is
//! asked again at the next node. A node that answers with anything but "unavailable" has answered.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::v1::admin_client::AdminClient;
use crate::{probe, v1};

/// How long one node may take to accept a connection: a node that is up does so in milliseconds,
/// and the next node is waiting to be asked.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one node may take to answer, unless told otherwise: longer than a node itself waits for
/// a new volume to become usable, or for a leader to move.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// While a request is out, its node is asked this often whether it is alive...
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// ...and is left when it has not said so for this long: a process that is stopped or cut off holds
/// a request no longer, one that is only slow is waited for.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// Said of a node that did not answer.
const NO_ANSWER: &str = "no answer in time";

/// Largest answer that is taken in, in bytes: the leases of a hundred thousand volumes. Volumes come
/// in pages.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A list of endpoints that can't be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EndpointError {
    /// Nothing to ask.
    #[error("no endpoint was given: give at least one, such as http://127.0.0.1:7400")]
    None,
    /// Not a URL of a node.
    #[error("endpoint {0:?} is not valid: use http://HOST:PORT")]
    Invalid(String),
    /// Encrypted connections are not supported by this build.
    #[error("endpoint {0:?} asks for TLS, which this build does not support: use http://HOST:PORT")]
    Tls(String),
}

/// Asks the nodes in turn, first the one that answered last. Clones share that memory.
#[derive(Clone)]
pub struct Client {
    nodes: Arc<[Node]>,
    answered_last: Arc<AtomicUsize>,
    call_timeout: Duration,
    deadline: Option<Instant>,
}

struct Node {
    url: String,
    /// `HOST:PORT`.
    address: String,
    admin: AdminClient<Channel>,
}

/// A node that was asked in vain.
struct Failure<'a> {
    node: &'a Node,
    status: Status,
    /// What answers there instead of a node, if that is known.
    stranger: Option<&'static str>,
}

impl Client {
    /// Connects when first used. Each endpoint is `http://HOST:PORT` or `HOST:PORT`.
    ///
    /// # Errors
    /// [`EndpointError`] when there is none, or one can't be used.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new<S: AsRef<str>>(
        endpoints: impl IntoIterator<Item = S>,
    ) -> Result<Self, EndpointError> {
        let nodes: Vec<Node> = endpoints
            .into_iter()
            .map(|endpoint| Node::new(endpoint.as_ref()))
            .collect::<Result<_, _>>()?;
        if nodes.is_empty() {
            return Err(EndpointError::None);
        }
        let answered_last = Arc::new(AtomicUsize::new(0));
        let (call_timeout, deadline) = (CALL_TIMEOUT, None);
        Ok(Self { nodes: nodes.into(), answered_last, call_timeout, deadline })
    }

    /// Changes how long each node may take to answer.
    pub fn with_call_timeout(mut self, call_timeout: Duration) -> Self {
        self.call_timeout = call_timeout;
        self
    }

    /// Sets when every call ends, however many nodes it asks. In place of a time for each: one that is
    /// alive may take all that is left.
    pub fn with_deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Every volume, by name: all pages.
    ///
    /// # Errors
    /// As the other calls.
    pub async fn all_volumes(&self) -> Result<Vec<v1::Volume>, Status> {
        let mut volumes = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListVolumesRequest { page_size: 0, page_token: page_token.clone() };
            let page = self.list_volumes(request).await?;
            volumes.extend(page.volumes);
            if page.next_page_token.is_empty() {
                return Ok(volumes);
            }
            if page.next_page_token == page_token {
                return Err(Status::internal("the list of volumes does not end: report this bug"));
            }
            page_token = page.next_page_token;
        }
    }

    async fn call<Q, A, F>(
        &self,
        request: Q,
        method: impl Fn(AdminClient<Channel>, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let first = self.answered_last.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for turn in 0..self.nodes.len() {
            let index = (first + turn) % self.nodes.len();
            let node = &self.nodes[index];
            let left = self.time_left();
            if left.is_zero() {
                let status = Status::deadline_exceeded("not asked any more");
                failures.push(Failure { node, status, stranger: None });
                continue;
            }
            let mut request = Request::new(request.clone());
            request.set_timeout(left);
            match self.in_time(method(node.admin.clone(), request)).await {
                Err(status) if is_no_answer(&status) => {
                    let stranger = self.stranger(node, &status).await;
                    failures.push(Failure { node, status, stranger });
                }
                answer => {
                    self.answered_last.store(index, Ordering::Relaxed);
                    return answer.map(Response::into_inner);
                }
            }
        }
        Err(no_answer(&failures, self.time_left().is_zero()))
    }

    /// How long the next node may take.
    fn time_left(&self) -> Duration {
        let left = self.deadline.map(|end| end.saturating_duration_since(Instant::now()));
        left.unwrap_or(self.call_timeout)
    }

    /// What answers at a node's address, where a connection was made and came to nothing.
    async fn stranger(&self, node: &Node, status: &Status) -> Option<&'static str> {
        let broke = matches!(status.code(), Code::Cancelled | Code::Unknown | Code::Internal);
        if !broke || self.time_left().is_zero() {
            return None;
        }
        self.in_time(async { Ok(probe::stranger(&node.address).await) }).await.ok().flatten()
    }

    /// The request's own timeout begins when there is a connection: the deadline does not wait for one.
    async fn in_time<A>(
        &self,
        asked: impl Future<Output = Result<A, Status>>,
    ) -> Result<A, Status> {
        let Some(end) = self.deadline else { return asked.await };
        let answer = tokio::time::timeout_at(end.into(), asked).await;
        answer.unwrap_or_else(|_| Err(Status::deadline_exceeded(NO_ANSWER)))
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $response:ident;)*) => {
        /// The calls of the service, each asked of the nodes in turn.
        ///
        /// # Errors
        /// The status a node answered with; `UNAVAILABLE`, with what each node said, when none
        /// answered: then the outcome is unknown, and it is right to try again.
        impl Client {
            $($(#[$doc])*
            pub async fn $name(&self, request: v1::$request) -> Result<v1::$response, Status> {
                let method = |mut admin: AdminClient<Channel>, request| async move {
                    admin.$name(request).await
                };
                self.call(request, method).await
            })*
        }
    };
}

calls! {
    /// Creates a volume, or finds the same one.
    create_volume(CreateVolumeRequest) -> CreateVolumeResponse;
    /// One volume with its replicas.
    get_volume(GetVolumeRequest) -> GetVolumeResponse;
    /// One page of volumes.
    list_volumes(ListVolumesRequest) -> ListVolumesResponse;
    /// Deletes a volume. After a retry, `deleted` may be false although the first try did it.
    delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse;
    /// Grows a volume.
    resize_volume(ResizeVolumeRequest) -> ResizeVolumeResponse;
    /// Lets a host use a volume.
    acquire_lease(AcquireLeaseRequest) -> AcquireLeaseResponse;
    /// Ends a host's lease. After a retry, `released` may be false although the first try did it.
    release_lease(ReleaseLeaseRequest) -> ReleaseLeaseResponse;
    /// Leases of a volume, of a host, or all.
    list_leases(ListLeasesRequest) -> ListLeasesResponse;
    /// What a volume holds, and makes it say so.
    set_volume_content(SetVolumeContentRequest) -> SetVolumeContentResponse;
    /// Moves a volume's leader.
    move_leader(MoveLeaderRequest) -> MoveLeaderResponse;
    /// Replicas of a volume, on a node, or all.
    list_replicas(ListReplicasRequest) -> ListReplicasResponse;
    /// All nodes.
    list_nodes(ListNodesRequest) -> ListNodesResponse;
    /// One node with its pools.
    get_node(GetNodeRequest) -> GetNodeResponse;
    /// Pools of a node, or all.
    list_pools(ListPoolsRequest) -> ListPoolsResponse;
    /// Gives a pool up, for a new one to take its place.
    replace_pool(ReplacePoolRequest) -> ReplacePoolResponse;
    /// How the cluster is.
    get_status(GetStatusRequest) -> GetStatusResponse;
    /// How the first node that answers is.
    health(HealthRequest) -> HealthResponse;
}

impl Node {
    fn new(endpoint: &str) -> Result<Self, EndpointError> {
        let endpoint = endpoint.trim();
        let invalid = || EndpointError::Invalid(endpoint.to_owned());
        if endpoint.starts_with("https://") {
            return Err(EndpointError::Tls(endpoint.to_owned()));
        }
        let url = match endpoint.split_once("://") {
            Some(("http", _)) => endpoint.to_owned(),
            Some(_) => return Err(invalid()),
            None => format!("http://{endpoint}"),
        };
        let endpoint = Endpoint::from_shared(url.clone()).map_err(|_| invalid())?;
        let is_node = endpoint.uri().port_u16().is_some_and(|port| port != 0)
            && endpoint.uri().host().is_some_and(|host| !host.is_empty())
            && endpoint.uri().path_and_query().is_none_or(|path| path == "/");
        if !is_node {
            return Err(invalid());
        }
        let address = endpoint.uri().authority().map(ToString::to_string).unwrap_or_default();
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(ALIVE_INTERVAL)
            .keep_alive_timeout(ALIVE_TIMEOUT)
            .connect_lazy();
        let admin = AdminClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(Self { url, address, admin })
    }
}

/// Whether the request may be asked of another node: this one did not answer, or can't.
fn is_no_answer(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => true,
        // A connection that broke: such a status was made here, from the transport's error.
        Code::Unknown | Code::Internal => std::error::Error::source(status).is_some(),
        _ => false,
    }
}

fn no_answer(failures: &[Failure<'_>], late: bool) -> Status {
    let reasons: Vec<String> = failures.iter().map(Failure::text).collect();
    let answered = failures.iter().any(|it| is_own_word(&it.status));
    let what = if answered { "no node could do what was asked" } else { "no node answered" };
    let remedy = if late {
        "time is up, and it may have been done all the same: look, or ask again with more time"
    } else {
        "check that ballastd runs there and that a majority of the nodes is up, then try again"
    };
    Status::unavailable(format!("{what} ({}); {remedy}", reasons.join("; ")))
}

impl Failure<'_> {
    fn text(&self) -> String {
        let url = &self.node.url;
        match self.stranger {
            Some(stranger) => format!("{url}: {stranger}"),
            None => format!("{url}: {}", reason(&self.status)),
        }
    }
}

/// Whether a node said so itself. What was made here has the transport's error behind it.
fn is_own_word(status: &Status) -> bool {
    status.code() == Code::Unavailable && std::error::Error::source(status).is_none()
}

fn reason(status: &Status) -> String {
    if status.code() == Code::Cancelled {
        return NO_ANSWER.to_owned();
    }
    // The transport hides "connection refused" at the end of the chain of sources.
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        source = error.source();
        if source.is_none() && !text.contains(&error.to_string()) {
            text = error.to_string();
        }
    }
    text
}
