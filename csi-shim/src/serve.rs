//! The process: its socket, its services, its end.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ballast_api::EndpointError;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tracing_subscriber::EnvFilter;

use crate::attach::{self, IsDeleted};
use crate::cli::{Cli, HostRule};
use crate::cluster::Cluster;
use crate::controller::{ControllerService, Hosts};
use crate::host::HostError;
use crate::identity::IdentityService;
use crate::limits::DELETED_TIME;
use crate::node::{Host, NodeService};
use crate::v1::controller_server::ControllerServer;
use crate::v1::identity_server::IdentityServer;
use crate::v1::node_server::NodeServer;

/// How long calls that run at SIGTERM may take to end.
const LAST_CALLS: Duration = Duration::from_secs(15);

/// How long, after that, work may take whose caller has gone. What is cut off then is as after a kill.
const LAST_WORK: Duration = Duration::from_secs(5);

/// Why the process can't run.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Without a name of its own a host holds no leases.
    #[error("--node-id is missing: it is required to serve Node")]
    NodeIdMissing,
    /// A wrong name.
    #[error("--node-id {0:?} is not valid: use 1 to 253 letters, digits, '-', '.' and '_'")]
    NodeIdInvalid(String),
    /// A wrong address.
    #[error("--ballast: {0}")]
    Endpoint(#[from] EndpointError),
    /// The socket can't be made.
    #[error("socket {0:?} can't be served ({1}); check the path and its folder's permissions")]
    Socket(PathBuf, #[source] io::Error),
    /// Another process serves it.
    #[error("socket {0:?} is served by another process: end it first")]
    SocketInUse(PathBuf),
    /// There is something else.
    #[error("{0:?} is not a socket: remove it, or choose another path")]
    NotASocket(PathBuf),
    /// The folder for records.
    #[error("--state-dir {0:?} can't be used ({1})")]
    State(PathBuf, #[source] io::Error),
    /// What the Node service needs of the host.
    #[error("{0}")]
    Host(#[from] HostError),
    /// The process lacks what it needs.
    #[error("runtime can't be started ({0}); free some memory or file descriptors")]
    Runtime(#[source] io::Error),
    /// The server ended by itself.
    #[error("serving failed: {0}")]
    Serving(#[source] tonic::transport::Error),
}

impl ServeError {
    /// 2 for wrong usage, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            ServeError::NodeIdMissing | ServeError::NodeIdInvalid(_) | ServeError::Endpoint(_) => 2,
            _ => 1,
        }
    }
}

/// Starts logging, to standard error. Only the first call of a process has an effect.
pub fn start_logging(level: &str) {
    let filter = EnvFilter::builder().parse_lossy(level);
    // An error means that something logs already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .try_init();
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When the command line is wrong or the socket can't be served.
pub fn run(cli: Cli) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(ServeError::Runtime)?;
    let result = runtime.block_on(serve(cli));
    runtime.shutdown_timeout(LAST_WORK);
    result
}

async fn serve(cli: Cli) -> Result<(), ServeError> {
    let node_id = check_node_id(&cli)?;
    let cluster = Cluster::new(&cli.ballast)?;
    let identity = IdentityService::new(cluster.clone(), cli.mode.controller());
    let controller = cli.mode.controller().then(|| {
        let hosts = match cli.hosts {
            HostRule::Any => Hosts::Any,
            HostRule::Known => Hosts::Known(node_id.iter().cloned().collect::<BTreeSet<_>>()),
        };
        ControllerServer::new(ControllerService::new(cluster.clone(), hosts, cli.nbd_port))
    });
    let node = match node_id {
        Some(node_id) if cli.mode.node() => Some(node_service(&cli, node_id, cluster)?),
        _ => None,
    };
    let listener = listen(&cli.endpoint)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = Server::builder()
        .add_service(IdentityServer::new(identity))
        .add_optional_service(controller)
        .add_optional_service(node.map(NodeServer::new))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            // The sender never goes without a word.
            let _ = stopped.await;
        });
    tracing::info!(endpoint = %cli.endpoint.display(), mode = ?cli.mode, "serving");
    tokio::pin!(server);
    let result = tokio::select! {
        result = &mut server => result,
        () = told_to_stop() => {
            tracing::info!("stopping");
            let _ = stop.send(());
            tokio::time::timeout(LAST_CALLS, &mut server).await.unwrap_or(Ok(()))
        }
    };
    // A successor may have removed it already.
    let _ = std::fs::remove_file(&cli.endpoint);
    result.map_err(ServeError::Serving)
}

fn node_service(cli: &Cli, node_id: String, cluster: Cluster) -> Result<NodeService, ServeError> {
    let state = |error| ServeError::State(cli.state_dir.clone(), error);
    std::fs::create_dir_all(&cli.state_dir).map_err(state)?;
    // Paths are compared with the kernel's, which has no links in them.
    let folder = cli.state_dir.canonicalize().map_err(state)?;
    let program = std::env::current_exe().map_err(state)?;
    let is_deleted = is_deleted(cluster.clone());
    let attacher = attach::choose(cli.nbd, cli.nbd_connections, &folder, &program, is_deleted)?;
    tracing::info!(attacher = attacher.name(), "volumes become block devices");
    let host = Host {
        node_id,
        segments: cli.segments(),
        max_volumes: cli.max_volumes,
        addresses: cli.nbd_address.clone(),
    };
    Ok(NodeService::new(host, cluster, attacher, &folder)?)
}

/// Asks the cluster, from any thread.
fn is_deleted(cluster: Cluster) -> IsDeleted {
    let runtime = tokio::runtime::Handle::current();
    Box::new(move |volume_id| {
        let (asking, volume_id) = (cluster.within(DELETED_TIME), volume_id.to_owned());
        let (answer, answered) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            // Whoever asks waits.
            let _ = answer.send(matches!(asking.find(&volume_id).await, Ok(None)));
        });
        // Dropped without an answer when the process ends.
        answered.recv().unwrap_or(false)
    })
}

fn check_node_id(cli: &Cli) -> Result<Option<String>, ServeError> {
    let Some(id) = &cli.node_id else {
        return if cli.mode.node() { Err(ServeError::NodeIdMissing) } else { Ok(None) };
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    match (1..=253).contains(&id.len()) && id.chars().all(plain) {
        true => Ok(Some(id.clone())),
        false => Err(ServeError::NodeIdInvalid(id.clone())),
    }
}

async fn told_to_stop() {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Binds the socket, for its owner only; one that nobody serves is removed first.
fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |error| ServeError::Socket(path.to_owned(), error);
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(ServeError::SocketInUse(path.to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}
