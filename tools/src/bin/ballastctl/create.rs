//! `ballastctl volume create`: the request, and the wait until the volume can be used.
//!
//! Never decides that a volume is ready: its phase does. What it still waits for is put into words
//! from what the nodes said last.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ballast_api::{Client, v1};
use tonic::{Code, Status};

use crate::cli::CreateVolume;
use crate::run::Failure;

/// Time between two looks at a volume that is being created.
const WAIT_STEP: Duration = Duration::from_millis(200);

/// Has the volume made; with `--wait` it can be used then. `timeout` ends at the deadline.
pub async fn volume(
    client: &Client,
    create: &CreateVolume,
    timeout: Duration,
    deadline: Instant,
) -> Result<v1::Volume, Failure> {
    let CreateVolume { name, size, replicas, prefer, wait } = create;
    if *replicas == 0 {
        // On the wire 0 asks for the default, and who wrote 0 did not.
        let message = format!("0 replicas for volume {name:?} are not valid: use 1, 3 or 5");
        return Err(Status::invalid_argument(message).into());
    }
    let request = v1::CreateVolumeRequest {
        name: name.clone(),
        size_bytes: *size,
        replicas: *replicas,
        preferred_nodes: prefer.clone(),
    };
    let created = client.create_volume(request).await?.volume;
    let created = created.ok_or(Failure::AnswerIncomplete("volume"))?;
    if !wait || created.phase() != v1::VolumePhase::Creating {
        return Ok(created);
    }
    let mut seen = Seen::default();
    let ready = watch(client, &created.id, &mut seen);
    let ready = tokio::time::timeout_at(deadline.into(), ready).await;
    ready.unwrap_or_else(|_| {
        let (name, missing) = (name.clone(), seen.missing());
        Err(Failure::NotReadyInTime { name, waited: timeout, missing })
    })
}

/// Looks at a volume until it is made. A look without an answer is no reason to end the wait.
async fn watch(client: &Client, volume: &str, seen: &mut Seen) -> Result<v1::Volume, Failure> {
    loop {
        let request = v1::GetVolumeRequest { volume: volume.to_owned(), fresh: false };
        match client.get_volume(request).await {
            Ok(answer) => {
                let volume = answer.volume.ok_or(Failure::AnswerIncomplete("volume"))?;
                if volume.phase() != v1::VolumePhase::Creating {
                    return Ok(volume);
                }
                seen.replicas = Some(answer.replicas);
            }
            Err(status) if status.code() == Code::Unavailable => {
                seen.trouble = status.message().to_owned();
            }
            Err(status) => return Err(status.into()),
        }
        if let Ok(answer) = client.list_nodes(v1::ListNodesRequest {}).await {
            seen.nodes = answer.nodes.into_iter().map(|node| (node.id, node)).collect();
        }
        tokio::time::sleep(WAIT_STEP).await;
    }
}

/// What was last heard of a volume that is not ready.
#[derive(Default)]
struct Seen {
    /// None: nothing was.
    replicas: Option<Vec<v1::Replica>>,
    nodes: BTreeMap<u32, v1::Node>,
    /// Why there was no answer, when there was none.
    trouble: String,
}

impl Seen {
    /// What the volume waits for.
    fn missing(&self) -> String {
        let Some(replicas) = &self.replicas else {
            let trouble = if self.trouble.is_empty() { "no answer" } else { &self.trouble };
            return format!("what nobody could say ({trouble})");
        };
        let to_be_made = replicas.iter().filter(|it| it.state() == v1::ReplicaState::Creating);
        let places: Vec<String> = to_be_made.map(|it| self.place(it.node)).collect();
        match places.as_slice() {
            [] => "its replicas, which are made, to elect a leader".to_owned(),
            [one] => format!("its replica on {one}"),
            [first @ .., last] => format!("its replicas on {} and {last}", first.join(", ")),
        }
    }

    fn place(&self, id: u32) -> String {
        let Some(node) = self.nodes.get(&id) else { return format!("node {id}") };
        let down = node.liveness() == v1::NodeLiveness::Down;
        let state = if down { ", which does not answer" } else { "" };
        format!("node {id} ({}{state})", node.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(node: u32, state: v1::ReplicaState) -> v1::Replica {
        v1::Replica { node, state: state.into(), ..Default::default() }
    }

    #[test]
    fn what_is_missing_is_named() {
        use v1::ReplicaState::{Creating, Ready};
        let mut seen = Seen { trouble: "no node answered".to_owned(), ..Seen::default() };
        assert_eq!(seen.missing(), "what nobody could say (no node answered)");
        seen.replicas = Some(vec![replica(1, Ready), replica(2, Creating), replica(3, Creating)]);
        assert_eq!(seen.missing(), "its replicas on node 2 and node 3");
        let (name, liveness) = ("gamma".to_owned(), v1::NodeLiveness::Down.into());
        seen.nodes.insert(3, v1::Node { id: 3, name, liveness, ..Default::default() });
        seen.replicas = Some(vec![replica(1, Ready), replica(3, Creating)]);
        assert_eq!(seen.missing(), "its replica on node 3 (gamma, which does not answer)");
        seen.replicas = Some(vec![replica(1, Ready)]);
        assert_eq!(seen.missing(), "its replicas, which are made, to elect a leader");
    }
}
