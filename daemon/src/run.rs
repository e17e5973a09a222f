//! `ballastd run`: one storage node, from its configuration to its end.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::admin::{self, Access};
use crate::cli::RunArguments;
use crate::error::DaemonError;
use crate::prometheus::Metrics;
use crate::settings::Settings;
use crate::shard::{self, ShardThread};
use crate::{http, logging};

/// Longest that a node may take to stop in order. Its log has everything: ending it hard loses
/// nothing, the next start reads more.
const STOP_MAX: Duration = Duration::from_secs(15);

/// Runs a node until a signal ends it.
///
/// # Errors
/// [`DaemonError`].
pub fn run(arguments: &RunArguments) -> Result<(), DaemonError> {
    let settings = Settings::load(&arguments.config, &arguments.overrides)?;
    logging::start(&settings.log);
    serve(settings)
}

/// Runs a node until a signal ends it; logging is started.
///
/// # Errors
/// [`DaemonError`].
pub fn serve(settings: Settings) -> Result<(), DaemonError> {
    // Before the first handle of a counter is made.
    let metrics = Metrics::install(&settings);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(DaemonError::system("start the runtime"))?;
    runtime.block_on(run_node(settings, metrics))
}

/// SIGTERM and SIGINT.
pub struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    /// Catches them from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn catch() -> Result<Self, DaemonError> {
        let catch = |kind| signal(kind).map_err(DaemonError::system("catch signals"));
        let (terminate, interrupt) =
            (catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt })
    }

    /// The next of them.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

async fn run_node(settings: Settings, metrics: Metrics) -> Result<(), DaemonError> {
    let mut signals = EndSignals::catch()?;
    // Ports first: a node whose port is taken does not even open its pool.
    let grpc = listen("administration (listen.grpc)", settings.grpc).await?;
    let http = listen("metrics (listen.metrics)", settings.metrics).await?;
    let node = settings.node.node;
    let ShardThread { shard, started, mut failed, stop, mut ended, thread } =
        shard::start(settings.node)?;
    let (serving, is_serving) = watch::channel(false);
    let access = Access { shard, node, serving: is_serving };
    metrics.keep_up();
    if let Some(listener) = http {
        tokio::spawn(http::serve(listener, access.clone(), metrics));
    }
    if let Some(listener) = grpc {
        tokio::spawn(admin::serve(listener, access));
    }
    let mut started = std::pin::pin!(started);
    let mut is_starting = true;
    loop {
        tokio::select! {
            biased;
            outcome = &mut started, if is_starting => {
                is_starting = false;
                // No answer: the shard's thread says why in `failed`, or is stopping.
                if let Ok(outcome) = outcome {
                    outcome?;
                    serving.send_replace(true);
                    tracing::info!(%node, "node serves");
                }
            }
            reason = failed.wait_for(Option::is_some) => {
                let reason = reason.ok().and_then(|reason| reason.clone());
                let reason = reason.unwrap_or_else(|| "the shard ended".into());
                return Err(DaemonError::NodeEnded(reason));
            }
            _ = &mut ended => {
                return Err(DaemonError::NodeEnded("the shard's thread ended by itself".into()));
            }
            name = signals.next() => {
                tracing::info!(%node, signal = name, "stopping");
                break;
            }
        }
    }
    serving.send_replace(false);
    stop.send_replace(true);
    tokio::select! {
        biased;
        _ = &mut ended => {}
        () = tokio::time::sleep(STOP_MAX) => {
            let seconds = STOP_MAX.as_secs();
            return Err(DaemonError::NodeEnded(format!(
                "the node did not stop within {seconds} s and was ended; nothing is lost"
            )));
        }
    }
    drop(thread);
    tracing::info!(%node, "stopped");
    Ok(())
}

async fn listen(
    purpose: &'static str,
    address: Option<SocketAddr>,
) -> Result<Option<TcpListener>, DaemonError> {
    let Some(address) = address else { return Ok(None) };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(problem) => Err(DaemonError::Listen { purpose, address: address.to_string(), problem }),
    }
}
