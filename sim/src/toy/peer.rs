//! Messages between the toy's nodes.
//!
//! The bytes on the wire only name a message, which lies in memory that all nodes share: the toy has
//! no codec. Delay, cuts, resets and loss are those of the simulated connection all the same.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;

use ballast_env::network::{Listener, Network};
use ballast_env::spawn::Spawn;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::{SnapshotOf, VoteOf};
use openraft::{AsyncRuntime, EmptyNode, RaftNetworkFactory, RaftNetworkV2};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::env::network::SimListener;
use crate::env::{SimEnv, SimStream};
use crate::toy::{ToyConfig, ToyRaft, peer_address};

thread_local! {
    static MAIL: RefCell<BTreeMap<u64, Box<dyn Any>>> = const { RefCell::new(BTreeMap::new()) };
    static POSTED: RefCell<u64> = const { RefCell::new(0) };
}

enum Request {
    Append(AppendEntriesRequest<ToyConfig>),
    Vote(VoteRequest<ToyConfig>),
    PreVote(VoteRequest<ToyConfig>),
}

enum Reply {
    Append(AppendEntriesResponse<ToyConfig>),
    Vote(VoteResponse<ToyConfig>),
}

async fn post(stream: &mut SimStream, message: impl Any) -> io::Result<()> {
    let number = POSTED.with_borrow_mut(|posted| {
        *posted += 1;
        *posted
    });
    MAIL.with_borrow_mut(|mail| mail.insert(number, Box::new(message)));
    stream.write_u64(number).await
}

async fn receive<T: Any>(stream: &mut SimStream) -> io::Result<T> {
    let number = stream.read_u64().await?;
    let message = MAIL.with_borrow_mut(|mail| mail.remove(&number));
    let message = message.expect("every message is received once");
    Ok(*message.downcast::<T>().expect("requests and replies alternate"))
}

/// Answers the other nodes.
pub(crate) async fn serve(env: SimEnv, listener: SimListener, raft: ToyRaft) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let raft = raft.clone();
        env.spawn(async move {
            while let Ok(request) = receive::<Request>(&mut stream).await {
                let reply = match request {
                    Request::Append(request) => {
                        raft.append_entries(request).await.map(Reply::Append).ok()
                    }
                    Request::Vote(request) => raft.vote(request).await.map(Reply::Vote).ok(),
                    Request::PreVote(request) => raft.pre_vote(request).await.map(Reply::Vote).ok(),
                };
                let Some(reply) = reply else { return };
                if post(&mut stream, reply).await.is_err() {
                    return;
                }
            }
        });
    }
}

pub(crate) struct ToyNetwork {
    env: SimEnv,
    target: u64,
    stream: Option<SimStream>,
}

impl ToyNetwork {
    pub(crate) fn new(env: SimEnv) -> Self {
        Self { env, target: 0, stream: None }
    }

    async fn call(
        &mut self,
        request: Request,
        option: RPCOption,
    ) -> Result<Reply, RPCError<ToyConfig>> {
        let mut taken = self.stream.take();
        let (env, target) = (self.env.clone(), self.target);
        let call = async {
            let mut stream = match taken.take() {
                Some(stream) => stream,
                None => env.connect(&peer_address(target)).await?,
            };
            post(&mut stream, request).await?;
            let reply = receive::<Reply>(&mut stream).await?;
            Ok::<_, io::Error>((stream, reply))
        };
        let unreachable = |error: io::Error| RPCError::Unreachable(Unreachable::new(&error));
        let limit = option.hard_ttl();
        match ballast_env::raft_runtime::RaftRuntime::timeout(limit, call).await {
            Ok(Ok((stream, reply))) => {
                self.stream = Some(stream);
                Ok(reply)
            }
            Ok(Err(error)) => Err(unreachable(error)),
            Err(_) => Err(unreachable(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl RaftNetworkFactory<ToyConfig> for ToyNetwork {
    type Network = Self;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Self {
        Self { env: self.env.clone(), target, stream: None }
    }
}

impl RaftNetworkV2<ToyConfig> for ToyNetwork {
    type SnapshotData = ();

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<ToyConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<ToyConfig>, RPCError<ToyConfig>> {
        match self.call(Request::Append(rpc), option).await? {
            Reply::Append(reply) => Ok(reply),
            Reply::Vote(_) => unreachable!("replies fit their requests"),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<ToyConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<ToyConfig>, RPCError<ToyConfig>> {
        match self.call(Request::Vote(rpc), option).await? {
            Reply::Vote(reply) => Ok(reply),
            Reply::Append(_) => unreachable!("replies fit their requests"),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<ToyConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<ToyConfig>, RPCError<ToyConfig>> {
        match self.call(Request::PreVote(rpc), option).await? {
            Reply::Vote(reply) => Ok(reply),
            Reply::Append(_) => unreachable!("replies fit their requests"),
        }
    }

    async fn full_snapshot(
        &mut self,
        _vote: VoteOf<ToyConfig>,
        _snapshot: SnapshotOf<ToyConfig, ()>,
        _cancel: impl Future<Output = ReplicationClosed> + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<ToyConfig>, StreamingError<ToyConfig>> {
        let error = io::Error::new(io::ErrorKind::Unsupported, "the toy keeps its whole log");
        Err(StreamingError::Unreachable(Unreachable::new(&error)))
    }
}
