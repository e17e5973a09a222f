//! The administration service: gRPC in, questions to the node, gRPC out.
//!
//! Owns the translation only: what is allowed and what happens is decided by `node` and the
//! cluster group.

mod leases;
mod picture;
mod pools;
mod service;
mod status;
mod volumes;

use std::sync::Arc;
use std::time::Duration;

use ballast_api::v1::admin_server::AdminServer;
use ballast_block::NodeId;
use ballast_block::limits::ADMIN_REQUEST_BYTES_MAX;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::server::TcpIncoming;

use crate::shard::Shard;
use service::Service;

/// Requests of one connection that are worked on at a time.
const REQUESTS_MAX: usize = 32;
/// Longest that a request may take: above all waits that the node itself bounds.
const REQUEST_MAX: Duration = Duration::from_secs(45);

/// How the listeners reach the node.
#[derive(Clone)]
pub struct Access {
    /// The shards of the node, by their numbers.
    pub shards: Arc<[Shard]>,
    /// The node's id.
    pub node: NodeId,
    /// Whether the node was asked to stop.
    pub stopping: watch::Receiver<bool>,
}

impl Access {
    /// Whether the node has started and is not stopping.
    pub fn is_serving(&self) -> bool {
        self.first().is_serving() && !*self.stopping.borrow()
    }

    /// Shard 0, which has a part in the cluster group.
    pub fn first(&self) -> &Shard {
        self.shards.first().expect("a node has a shard")
    }

    /// Whether the node takes part in the cluster, which is what its shard 0 does; or why not.
    /// Further shards come and go without it.
    ///
    /// # Errors
    /// Why not.
    pub async fn ready(&self) -> Result<(), String> {
        if !self.is_serving() {
            return Err("the node is starting or stopping".into());
        }
        let ready = self.first().ask(async |node| (node.is_ready(), node.refused())).await;
        match ready {
            Ok((true, _)) => Ok(()),
            Ok((false, Some(reason))) => Err(format!("this node is refused: {reason}")),
            Ok((false, None)) => {
                Err("the cluster has not accepted this node's start yet; check that \
                              most nodes run and see each other"
                    .into())
            }
            Err(ended) => Err(ended.to_string()),
        }
    }
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, access: Access) {
    let service =
        AdminServer::new(Service { access }).max_decoding_message_size(ADMIN_REQUEST_BYTES_MAX);
    // An answer is several small pieces, each of which would wait for the one before to be acknowledged:
    // 40 ms a call.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(REQUESTS_MAX)
        .timeout(REQUEST_MAX)
        .add_service(service)
        .serve_with_incoming(incoming)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "administration is not served any more");
    }
}
