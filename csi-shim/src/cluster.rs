//! Questions to the cluster, within the deadline of the call that asks them.
//!
//! Any daemon will do: the client asks the next when one does not answer. When none can (an
//! election, a restart) the round is repeated until the deadline is near: the orchestrator would
//! only call again, later.

use std::future::Future;
use std::time::Duration;

use ballast_api::{Client, EndpointError, timeout_of, v1 as api};
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use crate::error::Refusal;
use crate::names;

/// For callers that set no deadline: longer than any sidecar's own by default.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);

/// Kept of the deadline, so that the caller hears our answer and not only that time ran out.
const MARGIN: Duration = Duration::from_millis(300);

/// Between two rounds: about how long an election takes.
const PAUSE: Duration = Duration::from_millis(250);

/// Between two looks at a volume that is being created.
const LOOK: Duration = Duration::from_millis(100);

/// How much later than another daemon one may hear what was decided.
const LAG: Duration = Duration::from_secs(2);

/// The daemons of a cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

/// The daemons, for one call.
#[derive(Clone)]
pub struct Asking {
    client: Client,
    deadline: Instant,
}

impl Cluster {
    /// Connects when first used.
    ///
    /// # Errors
    /// [`EndpointError`] when there is no address, or one can't be used.
    pub fn new<S: AsRef<str>>(urls: &[S]) -> Result<Cluster, EndpointError> {
        Ok(Cluster { client: Client::new(urls)? })
    }

    /// To be asked on behalf of this call.
    pub fn asked_by<T>(&self, request: &Request<T>) -> Asking {
        self.within(timeout_of(request).unwrap_or(DEFAULT_DEADLINE))
    }

    /// To be asked for so long.
    pub fn within(&self, time: Duration) -> Asking {
        let time = time.checked_sub(MARGIN).unwrap_or(time / 2);
        Asking { client: self.client.clone(), deadline: Instant::now() + time }
    }
}

impl Asking {
    /// Asks until there is an answer or no time is left.
    ///
    /// # Errors
    /// The cluster's refusal; UNAVAILABLE when no daemon could answer in time.
    pub async fn ask<A, F>(&self, call: impl Fn(Client) -> F) -> Result<A, Refusal>
    where
        F: Future<Output = Result<A, Status>>,
    {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let end = Instant::now() + left.max(PAUSE);
            match call(self.client.clone().with_deadline(end.into_std())).await {
                Err(status) if status.code() == Code::Unavailable && left > 2 * PAUSE => {
                    tracing::debug!(message = status.message(), "no daemon can answer yet");
                    tokio::time::sleep(PAUSE).await;
                }
                answer => return answer.map_err(Refusal::from),
            }
        }
    }

    /// Lets others come to rest before something is looked at again, if there is time for that.
    pub async fn pause(&self) -> bool {
        let is_time = self.deadline.saturating_duration_since(Instant::now()) > 2 * PAUSE;
        if is_time {
            tokio::time::sleep(PAUSE).await;
        }
        is_time
    }

    /// A volume by its id, with its replicas.
    ///
    /// # Errors
    /// NOT_FOUND also for what is being deleted, and for names: an id is what CreateVolume gave.
    pub async fn volume(&self, id: &str) -> Result<(api::Volume, Vec<api::Replica>), Refusal> {
        if !names::is_volume_id(id) {
            return Err(Refusal::VolumeUnknown(id.to_owned()));
        }
        let found = self.find(id).await?;
        found.ok_or_else(|| Refusal::VolumeUnknown(id.to_owned()))
    }

    /// As [`Asking::volume`], with all that was decided before: for who decides by it.
    ///
    /// # Errors
    /// As [`Asking::volume`].
    pub async fn volume_now(&self, id: &str) -> Result<(api::Volume, Vec<api::Replica>), Refusal> {
        let unknown = || Refusal::VolumeUnknown(id.to_owned());
        if !names::is_volume_id(id) {
            return Err(unknown());
        }
        self.get(id, true).await?.ok_or_else(unknown)
    }

    /// A volume that is to have grown so far. A daemon that has not heard of it is given time: to an
    /// orchestrator "too small" is final.
    ///
    /// # Errors
    /// As [`Asking::volume`].
    pub async fn grown(&self, id: &str, required: u64) -> Result<api::Volume, Refusal> {
        let end = self.deadline.min(Instant::now() + LAG);
        loop {
            let volume = self.volume(id).await?.0;
            if volume.size_bytes >= required || end <= Instant::now() + LOOK {
                return Ok(volume);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A volume by its name or id, if there is one.
    ///
    /// # Errors
    /// When the cluster can't tell.
    pub async fn find(
        &self,
        volume: &str,
    ) -> Result<Option<(api::Volume, Vec<api::Replica>)>, Refusal> {
        self.get(volume, false).await
    }

    async fn get(
        &self,
        volume: &str,
        fresh: bool,
    ) -> Result<Option<(api::Volume, Vec<api::Replica>)>, Refusal> {
        let request = api::GetVolumeRequest { volume: volume.to_owned(), fresh };
        let answer = self.ask(|client| get_volume(client, request.clone())).await;
        let answer = match answer {
            Err(refusal) if refusal.code() == Code::NotFound => return Ok(None),
            answer => answer?,
        };
        let volume = answer.volume.ok_or(Refusal::AnswerIncomplete("volume"))?;
        let there = volume.phase() != api::VolumePhase::Deleting;
        Ok(there.then_some((volume, answer.replicas)))
    }

    /// Waits until a volume can be used.
    ///
    /// # Errors
    /// UNAVAILABLE when it can't yet; NOT_FOUND when it is deleted meanwhile.
    pub async fn ready(&self, volume: api::Volume) -> Result<api::Volume, Refusal> {
        let mut volume = volume;
        while volume.phase() == api::VolumePhase::Creating {
            if self.deadline <= Instant::now() + LOOK {
                return Err(Refusal::VolumeNotReady(volume.name));
            }
            tokio::time::sleep(LOOK).await;
            volume = self.volume(&volume.id).await?.0;
        }
        Ok(volume)
    }
}

async fn get_volume(
    client: Client,
    request: api::GetVolumeRequest,
) -> Result<api::GetVolumeResponse, Status> {
    client.get_volume(request).await
}
