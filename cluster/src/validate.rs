//! Checks of what comes in commands, for the state machine and for whoever wants to refuse early.

use std::collections::BTreeMap;

use ballast_block::limits::{
    LABEL_BYTES_MAX, NAME_BYTES_MAX, NODE_LABELS_MAX, NODE_NAME_BYTES_MAX, NODE_SHARDS_MAX,
    PEER_ADDRESS_BYTES_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN,
};
use ballast_block::{BLOCK_SIZE, NodeId, ShardId};
use uuid::Uuid;

use crate::command::{CreateVolume, NodeBooted, RegisterNode};
use crate::error::{NodeProblem, Refusal, SizeProblem};

/// Checks a volume's name: a DNS label (RFC 1123) that is not a UUID, because a volume may be named
/// by its id wherever it may be named by its name.
///
/// # Errors
/// [`Refusal::VolumeNameInvalid`].
pub fn check_volume_name(name: &str) -> Result<(), Refusal> {
    let valid =
        name.len() <= NAME_BYTES_MAX && is_dns_label(name) && Uuid::try_parse(name).is_err();
    if valid { Ok(()) } else { Err(Refusal::VolumeNameInvalid { name: shortened(name) }) }
}

/// Checks a volume's size in bytes.
///
/// # Errors
/// [`Refusal::VolumeSizeInvalid`].
pub fn check_volume_size(name: &str, size_bytes: u64) -> Result<(), Refusal> {
    let problem = if size_bytes == 0 {
        SizeProblem::Zero
    } else if !size_bytes.is_multiple_of(BLOCK_SIZE as u64) {
        SizeProblem::NotWholeBlocks
    } else if size_bytes < VOLUME_BYTES_MIN {
        SizeProblem::TooSmall
    } else if size_bytes > VOLUME_BYTES_MAX {
        SizeProblem::TooLarge
    } else {
        return Ok(());
    };
    Err(Refusal::VolumeSizeInvalid { name: name.to_owned(), size_bytes, problem })
}

pub(crate) fn check_create_volume(command: &CreateVolume) -> Result<(), Refusal> {
    check_volume_name(&command.name)?;
    check_volume_size(&command.name, command.size_bytes)?;
    if !matches!(command.replicas, 1 | 3 | 5) {
        let (name, replicas) = (command.name.clone(), command.replicas);
        return Err(Refusal::ReplicaCountInvalid { name, replicas });
    }
    Ok(())
}

pub(crate) fn check_register_node(command: &RegisterNode) -> Result<(), Refusal> {
    let problem = if command.node == NodeId(0) {
        NodeProblem::IdZero
    } else if !is_dns_subdomain(&command.name) {
        NodeProblem::Name
    } else if !is_host_and_port(&command.peer_address) {
        NodeProblem::PeerAddress
    } else if !are_labels_in_bounds(&command.labels) {
        NodeProblem::Labels
    } else {
        return Ok(());
    };
    Err(Refusal::NodeInvalid { node: command.node, problem })
}

pub(crate) fn check_node_booted(command: &NodeBooted) -> Result<(), Refusal> {
    let NodeBooted { node, pool, shard, boot_counter, member, .. } = *command;
    if boot_counter == 0 {
        return Err(Refusal::BootCounterInvalid { pool });
    }
    if shard.0 as usize >= NODE_SHARDS_MAX {
        return Err(Refusal::ShardInvalid { node, pool, shard });
    }
    match member {
        Some(member) if shard != ShardId(0) => {
            Err(Refusal::MemberOnOtherShard { node, pool, shard, member })
        }
        _ => Ok(()),
    }
}

fn is_dns_label(label: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    !label.is_empty()
        && label.bytes().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= NODE_NAME_BYTES_MAX && name.split('.').all(is_dns_label)
}

fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    address.len() <= PEER_ADDRESS_BYTES_MAX
        && !host.is_empty()
        && !host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/')
        && port.bytes().all(|digit| digit.is_ascii_digit())
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}

fn are_labels_in_bounds(labels: &BTreeMap<String, String>) -> bool {
    labels.len() <= NODE_LABELS_MAX
        && labels.iter().all(|(key, value)| {
            !key.is_empty() && key.len() <= LABEL_BYTES_MAX && value.len() <= LABEL_BYTES_MAX
        })
}

/// A hostile name must not make a hostile message.
fn shortened(name: &str) -> String {
    name.chars().take(NAME_BYTES_MAX + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_names() {
        for good in ["a", "data-1", "pvc-7f1e0a3c-0000-4000-8000-000000000000", &"x".repeat(63)] {
            assert_eq!(check_volume_name(good), Ok(()), "{good}");
        }
        let long = "x".repeat(64);
        let uuid = "7f1e0a3c-0000-4000-8000-000000000000";
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "../a", "a.b", "a b", "ä", &long, uuid] {
            assert!(check_volume_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn volume_sizes() {
        let problem = |size| match check_volume_size("v", size) {
            Err(Refusal::VolumeSizeInvalid { problem, .. }) => Some(problem),
            Ok(()) => None,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(problem(0), Some(SizeProblem::Zero));
        assert_eq!(problem((1 << 20) + 1), Some(SizeProblem::NotWholeBlocks));
        assert_eq!(problem(4096), Some(SizeProblem::TooSmall));
        assert_eq!(problem(VOLUME_BYTES_MAX + 4096), Some(SizeProblem::TooLarge));
        assert_eq!(problem(u64::MAX), Some(SizeProblem::NotWholeBlocks));
        assert_eq!(problem(VOLUME_BYTES_MIN), None);
        assert_eq!(problem(VOLUME_BYTES_MAX), None);
    }

    #[test]
    fn peer_addresses() {
        for good in ["10.0.0.1:7100", "[fd00::1]:7100", "node-1.storage.svc:1"] {
            assert!(is_host_and_port(good), "{good}");
        }
        for bad in ["", "10.0.0.1", ":7100", "h:0", "h:65536", "h:+1", "a b:1", "http://h:1", "h:"]
        {
            assert!(!is_host_and_port(bad), "{bad}");
        }
    }
}
