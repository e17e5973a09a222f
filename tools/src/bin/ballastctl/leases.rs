//! `ballastctl lease`, `volume attach` and `volume detach`: requests, and how leases are shown.

use ballast_api::{Client, v1};
use serde::Serialize;

use crate::cli::{AcquireLease, Cli, LeaseCommand, Mode, ReleaseLease};
use crate::confirm;
use crate::render::Answer;
use crate::run::{Failure, all, show};
use crate::table::{fields, table};
use crate::time::show_time;

/// Does what the command line says; returns what to print.
pub async fn lease(cli: &Cli, client: &Client, command: &LeaseCommand) -> Result<String, Failure> {
    match command {
        LeaseCommand::List { volume, host } => {
            let (volume, host) = (volume.clone(), host.clone());
            let request = v1::ListLeasesRequest {
                volume: volume.unwrap_or_default(),
                host: host.unwrap_or_default(),
            };
            let leases = client.list_leases(request).await?.leases;
            Ok(show(cli, &Leases { leases: all(leases) }))
        }
        LeaseCommand::Acquire(it) => acquire(cli, client, it).await,
        LeaseCommand::Release(it) => release(cli, client, it).await,
    }
}

/// Lets a host use a volume; returns what to print.
pub async fn acquire(cli: &Cli, client: &Client, it: &AcquireLease) -> Result<String, Failure> {
    let mut request = v1::AcquireLeaseRequest {
        volume: it.volume.clone(),
        host: it.host.clone(),
        mode: 0,
        read_only: it.read_only,
        force: it.force,
        reason: it.reason.clone().unwrap_or_default(),
        seen_lease_revision: None,
    };
    request.set_mode(match it.mode {
        Mode::SingleNodeWriter => v1::LeaseMode::SingleNodeWriter,
        Mode::SingleNodeMultiWriter => v1::LeaseMode::SingleNodeMultiWriter,
        Mode::SingleNodePublisher => v1::LeaseMode::SingleNodePublisher,
        Mode::Readers => v1::LeaseMode::Readers,
        Mode::Writers => v1::LeaseMode::Writers,
    });
    let lease = client.acquire_lease(request).await?.lease;
    let lease = Lease::from(lease.ok_or(Failure::AnswerIncomplete("lease"))?);
    let access = if lease.read_only { "ro," } else { "" };
    let export = format!("{}@{access}lease={}", lease.volume, lease.epoch);
    Ok(show(cli, &Granted { lease, export }))
}

/// Ends a host's lease; returns what to print.
pub async fn release(cli: &Cli, client: &Client, it: &ReleaseLease) -> Result<String, Failure> {
    let (volume, host, epoch) = (it.volume.clone(), it.host.clone(), it.epoch);
    let request = v1::ReleaseLeaseRequest { volume, host, epoch, seen_lease_revision: None };
    let released = client.release_lease(request).await?.released;
    Ok(show(cli, &Released { released }))
}

/// Asks whether a volume is to be taken from the hosts that have it.
pub fn confirm_force(volume: &str, host: &str) -> Result<(), Failure> {
    match confirm::confirm_force(volume, host).map_err(Failure::Terminal)? {
        confirm::Answer::Yes => Ok(()),
        confirm::Answer::No => Err(Failure::ForceNotConfirmed(volume.to_owned())),
        confirm::Answer::Nobody => Err(Failure::NobodyToAskForForce(volume.to_owned())),
    }
}

/// A lease.
#[derive(Debug, Serialize)]
pub struct Lease {
    pub volume: String,
    pub volume_id: String,
    pub host: String,
    pub mode: &'static str,
    pub read_only: bool,
    pub epoch: u64,
    pub acquired_at_ms: u64,
    /// Why by force; `null` when it was not.
    pub reason: Option<String>,
}

/// `ballastctl lease list`.
#[derive(Debug, Serialize)]
struct Leases {
    leases: Vec<Lease>,
}

/// `ballastctl lease acquire`, `volume attach`.
#[derive(Debug, Serialize)]
struct Granted {
    lease: Lease,
    /// The NBD export to open under it.
    export: String,
}

/// `ballastctl lease release`, `volume detach`.
#[derive(Debug, Serialize)]
struct Released {
    released: bool,
}

impl From<v1::Lease> for Lease {
    fn from(it: v1::Lease) -> Self {
        let mode = match it.mode() {
            v1::LeaseMode::Unspecified => "unknown",
            v1::LeaseMode::SingleNodeWriter => "single-node-writer",
            v1::LeaseMode::SingleNodeMultiWriter => "single-node-multi-writer",
            v1::LeaseMode::SingleNodePublisher => "single-node-publisher",
            v1::LeaseMode::Readers => "readers",
            v1::LeaseMode::Writers => "writers",
        };
        Self {
            mode,
            volume: it.volume,
            volume_id: it.volume_id,
            host: it.host,
            read_only: it.read_only,
            epoch: it.epoch,
            acquired_at_ms: it.acquired_at_ms,
            reason: Some(it.reason).filter(|reason| !reason.is_empty()),
        }
    }
}

impl Lease {
    fn access(&self) -> &'static str {
        if self.read_only { "read-only" } else { "read-write" }
    }
}

impl Answer for Leases {
    fn text(&self) -> String {
        lease_table(&self.leases)
    }
}

impl Answer for Granted {
    fn text(&self) -> String {
        let lease = &self.lease;
        let mut shown = vec![
            ("Volume", lease.volume.clone()),
            ("Host", lease.host.clone()),
            ("Mode", format!("{}, {}", lease.mode, lease.access())),
            ("Epoch", lease.epoch.to_string()),
            ("Acquired", show_time(lease.acquired_at_ms)),
        ];
        shown.extend(lease.reason.iter().map(|reason| ("By force", reason.clone())));
        shown.push(("NBD export", self.export.clone()));
        fields(&shown)
    }
}

impl Answer for Released {
    fn text(&self) -> String {
        let text = if self.released { "released" } else { "not there: nothing to release" };
        format!("{text}\n")
    }
}

/// Leases, one per line.
pub fn lease_table(leases: &[Lease]) -> String {
    let row = |it: &Lease| {
        [
            it.volume.clone(),
            it.host.clone(),
            it.mode.to_owned(),
            it.access().to_owned(),
            it.epoch.to_string(),
            show_time(it.acquired_at_ms),
            it.reason.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    };
    let header = ["VOLUME", "HOST", "MODE", "ACCESS", "EPOCH", "ACQUIRED", "BY FORCE"];
    table(header, &leases.iter().map(row).collect::<Vec<_>>())
}
