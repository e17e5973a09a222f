//! Answers as tables for people. Programs read the JSON: these may change at any time.

use serde::Serialize;

use crate::leases::lease_table;
use crate::size::show_size;
use crate::table::{fields, table};
use crate::time::show_time;
use crate::view::{
    Deleted, LeaderMoved, NodeDetail, Nodes, OneVolume, Pool, PoolReplaced, Pools, Replica, Status,
    Volume, VolumeDetail, Volumes, Writer,
};

/// An answer: `Serialize` is its form for programs.
pub trait Answer: Serialize {
    /// Its form for people.
    fn text(&self) -> String;

    /// Its form for programs.
    fn json(&self) -> String {
        let mut json = serde_json::to_string_pretty(self).expect("keys are strings");
        json.push('\n');
        json
    }
}

impl Answer for OneVolume {
    fn text(&self) -> String {
        volume_fields(&self.volume)
    }
}

impl Answer for VolumeDetail {
    fn text(&self) -> String {
        let mut text =
            format!("{}\n{}", volume_fields(&self.volume), replica_table(&self.replicas));
        if !self.volume.leases.is_empty() {
            text.push('\n');
            text.push_str(&lease_table(&self.volume.leases));
        }
        if !self.writers.is_empty() {
            text.push('\n');
            text.push_str(&writer_table(&self.writers));
        }
        text
    }
}

impl Answer for Volumes {
    fn text(&self) -> String {
        let row = |it: &Volume| {
            [
                it.name.clone(),
                show_size(it.size_bytes),
                it.replicas.to_string(),
                it.phase.to_owned(),
                it.health.to_owned(),
                or_dash(it.leader_node),
                it.id.clone(),
            ]
        };
        let header = ["NAME", "SIZE", "REPLICAS", "PHASE", "HEALTH", "LEADER", "ID"];
        table(header, &self.volumes.iter().map(row).collect::<Vec<_>>())
    }
}

impl Answer for Deleted {
    fn text(&self) -> String {
        let text = if self.deleted { "deleted" } else { "not there: nothing to delete" };
        format!("{text}\n")
    }
}

impl Answer for LeaderMoved {
    fn text(&self) -> String {
        format!("node {} leads\n", self.leader_node)
    }
}

impl Answer for PoolReplaced {
    fn text(&self) -> String {
        let PoolReplaced { pool, node, shard, replacement, without_number } = self;
        let number = match replacement {
            0 if *without_number => format!(" --shard {shard}"),
            0 => return format!("pool {pool} was replaced already\n"),
            _ => format!(" --replacement {replacement}"),
        };
        format!(
            "pool {pool} is given up. On node {node}, with the disk that is to take its place:\n  \
             ballastd format --config FILE{number}\n\
             then restart the node; its replicas are brought back from the other nodes.\n"
        )
    }
}

impl Answer for Nodes {
    fn text(&self) -> String {
        let row = |it: &crate::view::Node| {
            [
                it.id.to_string(),
                it.name.clone(),
                it.liveness.to_owned(),
                it.state.to_owned(),
                it.peer_address.clone(),
                it.pools.to_string(),
                it.replicas.to_string(),
                it.leaders.to_string(),
                show_size(it.used_bytes),
                show_size(it.capacity_bytes),
            ]
        };
        let header = [
            "NODE", "NAME", "LIVENESS", "STATE", "ADDRESS", "POOLS", "REPLICAS", "LEADERS", "USED",
            "CAPACITY",
        ];
        table(header, &self.nodes.iter().map(row).collect::<Vec<_>>())
    }
}

impl Answer for NodeDetail {
    fn text(&self) -> String {
        let node = &self.node;
        let labels: Vec<String> =
            node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let head = fields(&[
            ("Node", node.id.to_string()),
            ("Name", node.name.clone()),
            ("Liveness", node.liveness.to_owned()),
            ("State", node.state.to_owned()),
            ("Address", node.peer_address.clone()),
            ("Labels", labels.join(", ")),
            ("Version", node.version.clone().unwrap_or_else(|| "-".to_owned())),
            ("Replicas", format!("{}, {} of them leaders", node.replicas, node.leaders)),
            ("Used", use_of(node.used_bytes, node.capacity_bytes)),
        ]);
        format!("{head}\n{}", pool_table(&self.pools))
    }
}

impl Answer for Pools {
    fn text(&self) -> String {
        pool_table(&self.pools)
    }
}

impl Answer for Status {
    fn text(&self) -> String {
        let counts = &self.counts;
        let mut text = fields(&[
            ("Health", self.health.to_owned()),
            ("Cluster", self.cluster_id.clone()),
            ("Leader", self.leader_node.map_or("-".to_owned(), |node| format!("node {node}"))),
            ("Answered by", format!("node {}", self.answering_node)),
            ("Nodes", format!("{} of {} up", counts.nodes_up, counts.nodes)),
            ("Pools", format!("{} of {} ok", counts.pools_ok, counts.pools)),
            ("Volumes", volume_counts(self)),
            ("Replicas", counts.replicas.to_string()),
            ("Used", use_of(counts.used_bytes, counts.capacity_bytes)),
        ]);
        if !self.reasons.is_empty() {
            let row = |it: &crate::view::Reason| {
                [
                    it.severity.to_owned(),
                    it.code.clone(),
                    if it.object.is_empty() { "-".to_owned() } else { it.object.clone() },
                    it.message.clone(),
                ]
            };
            let rows: Vec<_> = self.reasons.iter().map(row).collect();
            text.push('\n');
            text.push_str(&table(["SEVERITY", "REASON", "OBJECT", "WHAT TO DO"], &rows));
        }
        text
    }
}

fn volume_fields(volume: &Volume) -> String {
    fields(&[
        ("Name", volume.name.clone()),
        ("Id", volume.id.clone()),
        ("Size", format!("{} ({} bytes)", show_size(volume.size_bytes), volume.size_bytes)),
        ("Replicas", volume.replicas.to_string()),
        ("Phase", volume.phase.to_owned()),
        ("Health", volume.health.to_owned()),
        ("Leader", volume.leader_node.map_or("-".to_owned(), |node| format!("node {node}"))),
        ("Family", volume.family.to_string()),
        ("Shard", volume.shard.to_string()),
        ("Created", show_time(volume.created_at_ms)),
    ])
}

fn replica_table(replicas: &[Replica]) -> String {
    let row = |it: &Replica| {
        [
            it.id.to_string(),
            it.node.to_string(),
            it.state.to_owned(),
            it.role.to_owned(),
            or_dash(it.term),
            or_dash(it.last_log_index),
            or_dash(it.applied_index),
            it.lag_bytes.map_or("-".to_owned(), show_size),
            it.in_sync.map_or("-", |yes| if yes { "yes" } else { "no" }).to_owned(),
            it.pool_id.clone(),
        ]
    };
    let header =
        ["REPLICA", "NODE", "STATE", "ROLE", "TERM", "LOG", "APPLIED", "LAG", "IN SYNC", "POOL"];
    table(header, &replicas.iter().map(row).collect::<Vec<_>>())
}

fn writer_table(writers: &[Writer]) -> String {
    let row = |it: &Writer| {
        let lease = it.epoch.map_or("none".to_owned(), |epoch| epoch.to_string());
        [format!("node {}", it.node), lease, or_dash(it.host.as_ref())]
    };
    let header = ["WRITTEN THROUGH", "UNDER LEASE", "HOST"];
    table(header, &writers.iter().map(row).collect::<Vec<_>>())
}

fn pool_table(pools: &[Pool]) -> String {
    let row = |it: &Pool| {
        [
            it.id.clone(),
            it.node.to_string(),
            it.shard.to_string(),
            it.state.to_owned(),
            show_size(it.used_bytes),
            show_size(it.capacity_bytes),
            percent(it.used_bytes, it.capacity_bytes),
            it.replicas.to_string(),
            it.boot_counter.to_string(),
        ]
    };
    let header =
        ["POOL", "NODE", "SHARD", "STATE", "USED", "CAPACITY", "USE", "REPLICAS", "STARTS"];
    table(header, &pools.iter().map(row).collect::<Vec<_>>())
}

fn volume_counts(status: &Status) -> String {
    let counts = &status.counts;
    let mut text = format!("{}, {} ok", counts.volumes, counts.volumes_ok);
    for (count, what) in [
        (counts.volumes_degraded, "degraded"),
        (counts.volumes_unavailable, "unavailable"),
        (counts.volumes_deleting, "being deleted"),
    ] {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    text
}

fn use_of(used: u64, capacity: u64) -> String {
    format!("{} of {} ({})", show_size(used), show_size(capacity), percent(used, capacity))
}

fn percent(used: u64, capacity: u64) -> String {
    match u128::from(used) * 100 {
        _ if capacity == 0 => "-".to_owned(),
        hundredfold => format!("{}%", hundredfold / u128::from(capacity)),
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_up_pool_says_how_its_successor_is_made() {
        let text = |shard, replacement, without_number| {
            let pool = "p".to_owned();
            PoolReplaced { pool, node: 2, shard, replacement, without_number }.text()
        };
        assert!(text(0, 1007, false).contains("--config FILE --replacement 1007\n"));
        assert!(text(3, 0, true).contains("--config FILE --shard 3\n"));
        assert_eq!(text(0, 0, false), "pool p was replaced already\n");
    }
}
