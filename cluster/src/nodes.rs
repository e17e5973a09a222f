//! Commands about nodes and pools.

use ballast_block::limits::{CLUSTER_NODES_MAX, NODE_POOLS_MAX};
use ballast_block::{FamilyId, NodeId, PoolId, ReplicaId};

use crate::command::{NodeBooted, RegisterNode};
use crate::error::Refusal;
use crate::state::{ClusterState, Outcome, Reply};
use crate::validate::check_register_node;
use crate::view::{Node, NodeState, Pool, PoolSpace, PoolState, ReplicaState};

impl ClusterState {
    pub(crate) fn register_node(&mut self, command: RegisterNode) -> Result<Outcome, Refusal> {
        check_register_node(&command)?;
        let RegisterNode { node: id, name, peer_address, labels } = command;
        if let Some(owner) = self.nodes.values().find(|node| node.name == name && node.id != id) {
            return Err(Refusal::NodeNameTaken { node: id, name, owner: owner.id });
        }
        if let Some(known) = self.nodes.get_mut(&id) {
            if known.name != name {
                return Err(Refusal::NodeDiffers {
                    node: id,
                    name: known.name.clone(),
                    asked: name,
                });
            }
            let changed = known.peer_address != peer_address || known.labels != labels;
            known.peer_address = peer_address;
            known.labels = labels;
            return Ok(Outcome::done(changed));
        }
        if self.nodes.len() >= CLUSTER_NODES_MAX {
            return Err(Refusal::TooManyNodes { node: id, limit: CLUSTER_NODES_MAX });
        }
        let state = NodeState::Registered;
        self.nodes.insert(id, Node { id, name, peer_address, labels, state });
        Ok(Outcome::done(true))
    }

    pub(crate) fn node_booted(&mut self, command: &NodeBooted) -> Result<Outcome, Refusal> {
        let NodeBooted { node, pool: id, boot_counter, incarnation, space } = *command;
        if boot_counter == 0 {
            return Err(Refusal::BootCounterInvalid { pool: id });
        }
        if !self.nodes.contains_key(&node) {
            return Err(Refusal::UnknownNode { node });
        }
        let Some(known) = self.pools.get_mut(&id) else {
            return self.add_pool(command);
        };
        if known.node != node {
            return Err(Refusal::PoolOnOtherNode { pool: id, owner: known.node, node });
        }
        if boot_counter == known.boot_counter && incarnation == known.incarnation {
            if known.state == PoolState::Lost {
                return Err(Refusal::PoolLost { pool: id });
            }
            return Ok(Outcome::done(false));
        }
        if boot_counter <= known.boot_counter {
            let known_counter = known.boot_counter;
            let changed = self.lose_pool(id);
            let reply = Reply::PoolRolledBack {
                pool: id,
                known: known_counter,
                reported: boot_counter,
                lost: self.lost_replicas_in(id),
            };
            return Ok(Outcome { reply, changed });
        }
        if known.state == PoolState::Lost {
            return Err(Refusal::PoolLost { pool: id });
        }
        known.boot_counter = boot_counter;
        known.incarnation = incarnation;
        known.space = space;
        known.state = PoolState::Ok;
        Ok(Outcome::done(true))
    }

    fn add_pool(&mut self, command: &NodeBooted) -> Result<Outcome, Refusal> {
        let NodeBooted { node, pool: id, boot_counter, incarnation, space } = *command;
        if self.pools.values().filter(|pool| pool.node == node).count() >= NODE_POOLS_MAX {
            return Err(Refusal::TooManyPools { node, pool: id });
        }
        let state = PoolState::Ok;
        self.pools.insert(id, Pool { id, node, boot_counter, incarnation, space, state });
        self.nodes.get_mut(&node).expect("the caller found it").state = NodeState::Active;
        Ok(Outcome::done(true))
    }

    pub(crate) fn report_pool(
        &mut self,
        id: PoolId,
        space: PoolSpace,
        state: PoolState,
    ) -> Result<Outcome, Refusal> {
        let pool = self.pools.get_mut(&id).ok_or(Refusal::UnknownPool { pool: id })?;
        if state == PoolState::Lost {
            let changed = pool.space != space;
            pool.space = space;
            return Ok(Outcome::done(self.lose_pool(id) || changed));
        }
        if pool.state == PoolState::Lost {
            return Err(Refusal::PoolLost { pool: id });
        }
        let changed = (pool.space, pool.state) != (space, state);
        (pool.space, pool.state) = (space, state);
        Ok(Outcome::done(changed))
    }

    /// Marks a pool and its replicas lost. What was to be removed there counts as removed: nothing
    /// of a lost pool ever serves again. Returns whether anything changed.
    fn lose_pool(&mut self, id: PoolId) -> bool {
        let pool = self.pools.get_mut(&id).expect("the caller found it");
        if pool.state == PoolState::Lost {
            return false;
        }
        pool.state = PoolState::Lost;
        let mut removed: Vec<FamilyId> = Vec::new();
        for replica in self.replicas.values_mut().filter(|replica| replica.pool == id) {
            match replica.state {
                ReplicaState::Creating | ReplicaState::Ready => replica.state = ReplicaState::Lost,
                ReplicaState::Removing => {
                    replica.state = ReplicaState::Removed;
                    removed.push(replica.family);
                }
                ReplicaState::Lost | ReplicaState::Removed => {}
            }
        }
        for family in removed {
            self.drop_if_removed(family);
        }
        true
    }

    fn lost_replicas_in(&self, pool: PoolId) -> Vec<ReplicaId> {
        let lost = |state| state == ReplicaState::Lost;
        let replicas = self.replicas.values();
        replicas.filter(|it| it.pool == pool && lost(it.state)).map(|it| it.id).collect()
    }

    /// The pools of a node, by id.
    pub fn pools_on(&self, node: NodeId) -> impl Iterator<Item = &Pool> {
        self.pools.values().filter(move |pool| pool.node == node)
    }
}
