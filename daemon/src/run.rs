//! `ballastd run`: one storage node, from its configuration to its end.

use std::net::SocketAddr;
use std::time::Duration;

use ballast_block::{NodeId, ShardId};
use ballast_env::linux::LinuxEnv;
use ballast_node::shards::{Place, places};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::admin::{self, Access};
use crate::cli::RunArguments;
use crate::error::DaemonError;
use crate::prometheus::Metrics;
use crate::settings::Settings;
use crate::shard::{self, Condition, Shard, ShardEnded};
use crate::{http, logging, process};

/// Longest that a node may take to stop in order. Its log has everything: ending it hard loses
/// nothing, the next start reads more.
const STOP_MAX: Duration = Duration::from_secs(15);

/// Longest that shard 0 waits for further ones before it stops: a disk that hangs must not keep it.
const FURTHER_STOP_MAX: Duration = Duration::from_secs(7);

/// Between attempts to tell the cluster of a shard that has ended.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

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
    settings.check_machine(process::machine_memory())?;
    // Before there is another thread.
    process::stay_out_of_reclaim(settings.lock_memory);
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
    let node = settings.first().node;
    let shards = start_shards(settings, &metrics)?;
    let first = shards.first().expect("a node has a shard").clone();
    let (stopping, is_stopping) = watch::channel(false);
    let access = Access { shards: shards.clone().into(), node, stopping: is_stopping };
    metrics.keep_up();
    if let Some(listener) = http {
        tokio::spawn(http::serve(listener, access.clone(), metrics));
    }
    if let Some(listener) = grpc {
        tokio::spawn(admin::serve(listener, access));
    }
    for shard in &shards {
        tokio::spawn(tell(node, shard.clone(), first.clone()));
    }
    tokio::select! {
        biased;
        ended = first.end() => {
            let silent = || DaemonError::NodeEnded("shard 0 ended by itself".into());
            return Err(ended.map_or_else(silent, DaemonError::from));
        }
        name = signals.next() => tracing::info!(%node, signal = name, "stopping"),
    }
    stopping.send_replace(true);
    stop(&shards).await?;
    tracing::info!(%node, "stopped");
    Ok(())
}

/// One thread for each pool. They start side by side; further ones wait for shard 0 by themselves.
fn start_shards(settings: Settings, metrics: &Metrics) -> Result<Vec<Shard>, DaemonError> {
    let cluster = settings.first().cluster;
    let places = places::<LinuxEnv>(cluster, settings.shards.len());
    let start = |(config, place): (_, Place<LinuxEnv>)| {
        let recorder = metrics.of_shard(place.shard());
        shard::start(config, place, recorder)
    };
    settings.shards.into_iter().zip(places).map(start).collect()
}

/// Says in the log what becomes of a shard.
async fn tell(node: NodeId, shard: Shard, first: Shard) {
    let is_first = shard.id() == ShardId(0);
    let id = shard.id();
    match shard.wait_for(|now| !matches!(now, Condition::Starting)).await {
        Some(Condition::Serving) if is_first => tracing::info!(%node, "node serves"),
        Some(Condition::Serving) => tracing::info!(%node, shard = %id, "shard serves"),
        _ => {}
    }
    if let Some(reason) = shard.end().await
        && !is_first
    {
        tracing::error!(%node, shard = %id, %reason, "a shard has ended, and the node's other \
            shards go on: mend what the reason says and restart the node; if its disk is gone for \
            good, give its pool up with `ballastctl pool replace`");
        report_ended(&first, id).await;
    }
}

/// Has shard 0 tell the cluster, as soon as that can be told.
async fn report_ended(first: &Shard, ended: ShardId) {
    loop {
        match first.ask(move |node| async move { node.report_ended(ended).await }).await {
            Ok(true) | Err(ShardEnded::Ended(..) | ShardEnded::Stopping(_)) => return,
            Ok(false) | Err(ShardEnded::Starting(_)) => tokio::time::sleep(REPORT_PAUSE).await,
        }
    }
}

/// Shard 0 last: the others reach the cluster through it.
async fn stop(shards: &[Shard]) -> Result<(), DaemonError> {
    let (first, further) = shards.split_first().expect("a node has a shard");
    let stopped = async {
        further.iter().for_each(Shard::stop);
        let ended = futures_util::future::join_all(further.iter().map(Shard::end));
        if tokio::time::timeout(FURTHER_STOP_MAX, ended).await.is_err() {
            tracing::warn!("a further shard does not stop in time: its disk may hang");
        }
        first.stop();
        first.end().await
    };
    match tokio::time::timeout(STOP_MAX, stopped).await {
        Ok(None) => Ok(()),
        Ok(Some(error)) => Err(error.into()),
        Err(_) => {
            let seconds = STOP_MAX.as_secs();
            Err(DaemonError::NodeEnded(format!(
                "the node did not stop within {seconds} s and was ended; nothing is lost"
            )))
        }
    }
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
