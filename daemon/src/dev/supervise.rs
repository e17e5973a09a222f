//! The processes of a development cluster: started, watched, stopped.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::select_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::folder::{Description, Folder, VolumeDescription};
use super::{WantedVolume, client, guide};
use crate::error::DaemonError;
use crate::run::EndSignals;
use crate::size::Size;

/// Longest that the nodes may take to form the cluster.
const READY_MAX: Duration = Duration::from_secs(60);
/// Longest that the nodes may take to stop: a little more than a node gives itself.
const STOP_MAX: Duration = Duration::from_secs(20);
/// Between two looks at whether nodes are ready.
const POLL: Duration = Duration::from_millis(100);
/// Before a node that died is started again.
const RESPAWN_PAUSE: Duration = Duration::from_secs(1);
/// A log larger than this is put aside when its node starts, in bytes.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// Lines of a log that are shown when its node ends at once.
const LOG_LINES_SHOWN: usize = 10;

/// What to run.
pub struct Plan {
    /// The cluster's folder.
    pub folder: Folder,
    /// Volumes to create.
    pub volumes: Vec<WantedVolume>,
    /// Replicas of each.
    pub replicas: u32,
    /// Whether to start nodes that died again.
    pub respawn: bool,
    /// Level of the nodes' logs.
    pub log_level: String,
    /// Whether this is the cluster's first start.
    pub is_new: bool,
}

enum Event {
    Signal,
    Ended(u32, std::io::Result<ExitStatus>),
    Respawn,
}

impl Plan {
    /// Runs the cluster until a signal ends it.
    ///
    /// # Errors
    /// [`DaemonError`]; every process is gone then.
    pub async fn run(self) -> Result<(), DaemonError> {
        let mut signals = EndSignals::catch()?;
        let description = self.folder.read()?;
        for node in &description.nodes {
            if self.folder.lock_node(node.id)?.is_none() {
                return Err(DaemonError::Dev(format!(
                    "node {} is in use: it runs as process {}; stop that first",
                    node.id,
                    node.pid.unwrap_or(0)
                )));
            }
        }
        let mut children = BTreeMap::new();
        let started = async {
            for node in &description.nodes {
                children.insert(node.id, self.spawn(node.id)?);
            }
            self.bring_up(&description, &mut children).await
        };
        let outcome = tokio::select! {
            biased;
            _ = signals.next() => Ok(false),
            started = started => started.map(|()| true),
        };
        let outcome = match outcome {
            Ok(true) => {
                print!("{}", guide::text(&self.folder, &self.folder.read()?));
                self.watch(&mut children, &mut signals).await
            }
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        eprintln!("ballastd: stopping {} nodes", description.nodes.len());
        let stopped = self.stop(&mut children, &mut signals).await;
        outcome.and(stopped)
    }

    fn spawn(&self, id: u32) -> Result<Child, DaemonError> {
        let program =
            std::env::current_exe().map_err(DaemonError::system("find this program's file"))?;
        let log = open_log(&self.folder.log_path(id))?;
        let more = log.try_clone().map_err(DaemonError::system("share the log"))?;
        let mut command = Command::new(&program);
        command
            .args(["dev-node", "--data"])
            .arg(self.folder.path())
            .args(["--id", &id.to_string()])
            .args(["--log-level", &self.log_level])
            .args(["--supervisor", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::from(more))
            .stderr(Stdio::from(log));
        command.spawn().map_err(DaemonError::file("start", &program))
    }

    /// Waits until the cluster is formed, then makes its volumes.
    async fn bring_up(
        &self,
        description: &Description,
        children: &mut BTreeMap<u32, Child>,
    ) -> Result<(), DaemonError> {
        let end = Instant::now() + READY_MAX;
        let all = description.nodes.len();
        loop {
            let mut ready = 0;
            for node in &description.nodes {
                ready += usize::from(client::is_ready(&node.grpc).await);
            }
            let dead = self.dead(children)?;
            // A cluster that was whole once goes on with most of its nodes, as it would anyway.
            if ready == all || (!dead.is_empty() && ready + dead.len() == all && ready > all / 2) {
                break;
            }
            if dead.len() > (all - 1) / 2 || Instant::now() > end {
                return Err(DaemonError::Dev(format!(
                    "the cluster did not come up: {ready} of {all} nodes are ready; see {}",
                    self.folder.path().join("node-*/log").display()
                )));
            }
            sleep(POLL).await;
        }
        self.make_volumes(description).await
    }

    /// Nodes that ended. Of a new cluster none may.
    fn dead(&self, children: &mut BTreeMap<u32, Child>) -> Result<Vec<u32>, DaemonError> {
        let mut dead = Vec::new();
        for (id, child) in children.iter_mut() {
            let status = child.try_wait().map_err(DaemonError::system("watch a node"))?;
            let Some(status) = status else { continue };
            if self.is_new {
                return Err(DaemonError::Dev(format!(
                    "node {id} ended at its start ({status}):\n{}",
                    self.tail(*id)
                )));
            }
            dead.push(*id);
        }
        Ok(dead)
    }

    fn tail(&self, id: u32) -> String {
        let text = fs::read_to_string(self.folder.log_path(id)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
        lines[from..].iter().map(|line| format!("  {line}\n")).collect()
    }

    async fn make_volumes(&self, description: &Description) -> Result<(), DaemonError> {
        let mut client = None;
        for node in &description.nodes {
            if client::is_ready(&node.grpc).await {
                client = Some(client::connect(&node.grpc).await?);
                break;
            }
        }
        let mut client =
            client.ok_or_else(|| DaemonError::Dev("no node answers any more".into()))?;
        let existing = client::volumes(&mut client).await?;
        let mut wanted = self.volumes.clone();
        if wanted.is_empty() && existing.is_empty() && description.volumes.is_empty() {
            wanted.push(WantedVolume { name: "demo".into(), size: Size(1 << 30) });
        }
        for volume in &wanted {
            match existing.iter().find(|known| known.name == volume.name) {
                None => client::create(&mut client, volume, self.replicas).await?,
                Some(known) if known.size_bytes != volume.size.0 => eprintln!(
                    "ballastd: volume {} exists with {} bytes and is left as it is",
                    volume.name, known.size_bytes
                ),
                Some(_) => {}
            }
        }
        let nbd = description.nodes.first().map(|node| node.nbd.clone()).unwrap_or_default();
        let volumes = client::volumes(&mut client).await?;
        let volumes = volumes.into_iter().map(|volume| VolumeDescription {
            nbd: format!("{nbd}/{}", volume.name),
            name: volume.name,
            size_bytes: volume.size_bytes,
        });
        let volumes: Vec<_> = volumes.collect();
        self.folder.change(|description| description.volumes = volumes)
    }

    async fn watch(
        &self,
        children: &mut BTreeMap<u32, Child>,
        signals: &mut EndSignals,
    ) -> Result<(), DaemonError> {
        let mut missing: Vec<u32> = Vec::new();
        loop {
            match next_event(children, signals, self.respawn && !missing.is_empty()).await {
                Event::Signal => return Ok(()),
                Event::Ended(id, status) => {
                    children.remove(&id);
                    missing.push(id);
                    let status = match status {
                        Ok(status) => status.to_string(),
                        Err(error) => error.to_string(),
                    };
                    eprintln!("ballastd: node {id} ended ({status}):\n{}", self.tail(id));
                }
                Event::Respawn => {
                    for id in std::mem::take(&mut missing) {
                        // Somebody may have started it by hand.
                        if self.folder.lock_node(id)?.is_some() {
                            eprintln!("ballastd: starting node {id} again");
                            children.insert(id, self.spawn(id)?);
                        }
                    }
                }
            }
        }
    }

    /// Asks every node of this folder to stop and waits; nothing of the cluster runs afterwards.
    async fn stop(
        &self,
        children: &mut BTreeMap<u32, Child>,
        signals: &mut EndSignals,
    ) -> Result<(), DaemonError> {
        let ended = tokio::select! {
            biased;
            ended = self.stop_softly(children) => ended,
            _ = signals.next() => false,
            () = sleep(STOP_MAX) => false,
        };
        if !ended {
            eprintln!("ballastd: killing what still runs; nothing is lost");
            for child in children.values_mut() {
                // It may be gone already.
                let _ = child.kill().await;
            }
        }
        self.folder.change(|description| {
            for node in &mut description.nodes {
                node.pid = None;
            }
        })
    }

    async fn stop_softly(&self, children: &mut BTreeMap<u32, Child>) -> bool {
        for child in children.values() {
            if let Some(pid) = child.id() {
                ask_to_stop(pid);
            }
        }
        // Nodes that were started by hand belong to the cluster too.
        let mut by_hand = Vec::new();
        for node in self.folder.read().map(|description| description.nodes).unwrap_or_default() {
            let runs = matches!(self.folder.lock_node(node.id), Ok(None));
            if runs && !children.contains_key(&node.id) {
                by_hand.push(node.id);
                if let Some(pid) = node.pid.filter(|&pid| crate::process::is_alive(pid)) {
                    ask_to_stop(pid);
                }
            }
        }
        for child in children.values_mut() {
            let _ = child.wait().await;
        }
        for id in by_hand {
            while matches!(self.folder.lock_node(id), Ok(None)) {
                sleep(POLL).await;
            }
        }
        true
    }
}

async fn next_event(
    children: &mut BTreeMap<u32, Child>,
    signals: &mut EndSignals,
    respawn: bool,
) -> Event {
    let ends: Vec<_> = children
        .iter_mut()
        .map(|(id, child)| async { Event::Ended(*id, child.wait().await) }.boxed_local())
        .collect();
    let ended = async {
        if ends.is_empty() { std::future::pending().await } else { select_all(ends).await.0 }
    };
    tokio::select! {
        biased;
        _ = signals.next() => Event::Signal,
        event = ended => event,
        () = sleep(RESPAWN_PAUSE), if respawn => Event::Respawn,
    }
}

fn ask_to_stop(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        // It may be gone already.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

fn open_log(path: &Path) -> Result<File, DaemonError> {
    if fs::metadata(path).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
        fs::rename(path, path.with_extension("old")).map_err(DaemonError::file("rename", path))?;
    }
    let opened = File::options().create(true).append(true).open(path);
    opened.map_err(DaemonError::file("open", path))
}
