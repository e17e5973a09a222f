//! Commands about nodes and pools.

use ballast_block::limits::{CLUSTER_NODES_MAX, NODE_POOLS_MAX};
use ballast_block::{FamilyId, NodeId, PoolId, ReplicaId, ShardId};

use crate::command::{NodeBooted, PoolStart, RegisterNode};
use crate::error::Refusal;
use crate::lineage::{Marks, Past};
use crate::state::{ClusterState, Outcome, Reply};
use crate::validate::{check_node_booted, check_register_node};
use crate::view::{
    Node, NodeState, Pool, PoolSpace, PoolState, Replica, ReplicaState, VolumePhase,
};

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
        let (member, replacing) = (None, false);
        let node = Node { id, name, peer_address, labels, state, member, replacing };
        self.nodes.insert(id, node);
        Ok(Outcome::done(true))
    }

    pub(crate) fn node_booted(&mut self, command: &NodeBooted) -> Result<Outcome, Refusal> {
        check_node_booted(command)?;
        let NodeBooted { node, pool: id, shard, boot_counter, incarnation, space, .. } = *command;
        if !self.nodes.contains_key(&node) {
            return Err(Refusal::UnknownNode { node });
        }
        let Some(known) = self.pools.get_mut(&id) else {
            return self.add_pool(command);
        };
        if known.node != node {
            return Err(Refusal::PoolOnOtherNode { pool: id, owner: known.node, node });
        }
        if known.shard != shard {
            let (known, reported) = (known.shard, shard);
            return Err(Refusal::PoolShardDiffers { pool: id, known, reported });
        }
        if boot_counter == known.boot_counter && incarnation == known.incarnation {
            if known.state == PoolState::Lost {
                return Err(Refusal::PoolLost { pool: id });
            }
            return Ok(Outcome::done(false));
        }
        let marks = Marks::of(command);
        let past = known.past_of(boot_counter, incarnation, marks);
        let start = PoolStart { boot_counter: known.boot_counter, incarnation: known.incarnation };
        if past == Past::RolledBack && known.state != PoolState::Lost && command.told != Some(start)
        {
            return Ok(Outcome { reply: Reply::PoolOlder { known: start }, changed: false });
        }
        if past == Past::RolledBack {
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
        if past == Past::Unknown {
            let (settled_boot, known) = (marks.settled_boot, known.boot_counter);
            return Err(Refusal::PoolAhead { pool: id, settled_boot, known });
        }
        known.boot_counter = boot_counter;
        known.incarnation = incarnation;
        known.mark = marks.offered;
        known.space = space;
        known.state = PoolState::Ok;
        Ok(Outcome::done(true))
    }

    /// A pool that was never seen: the shard's first, or one that was made to replace a lost one.
    fn add_pool(&mut self, command: &NodeBooted) -> Result<Outcome, Refusal> {
        let NodeBooted { node, pool: id, shard, boot_counter, incarnation, space, offered, .. } =
            *command;
        if self.pools_on(node).count() >= NODE_POOLS_MAX {
            return Err(Refusal::TooManyPools { node, pool: id });
        }
        let others: Vec<Pool> = self.pools_of(node, shard).copied().collect();
        let serving = others.iter().find(|pool| pool.state != PoolState::Lost);
        let replaces = if shard == ShardId(0) {
            // A pool with a member of the cluster group is the shard's only one: a second one with
            // the same member would have forgotten what the first one promised (hazard F5).
            let expected = self.nodes.get(&node).is_some_and(|known| {
                known.replacing && known.member.is_some() && known.member == command.member
            });
            if let Some(other) = others.last()
                && command.member.is_some()
                && !expected
            {
                let known = serving.unwrap_or(other).id;
                return Err(Refusal::PoolNotExpected { node, pool: id, known });
            }
            expected
        } else {
            // It must not silently stand in for one that has the shard's replicas.
            if let Some(serving) = serving {
                return Err(Refusal::PoolNotExpected { node, pool: id, known: serving.id });
            }
            !others.is_empty()
        };
        let state = PoolState::Ok;
        let mark = offered;
        self.pools
            .insert(id, Pool { id, node, shard, boot_counter, incarnation, mark, space, state });
        self.nodes.get_mut(&node).expect("the caller found it").state = NodeState::Active;
        if replaces {
            self.replace_replicas(node, shard, id);
        }
        // Of a shard that any new pool may be added to the lost ones are kept: one of them that comes
        // back is known then.
        if shard == ShardId(0) {
            let lost = others.iter().filter(|pool| pool.state == PoolState::Lost);
            lost.for_each(|pool| self.forget_empty(pool.id));
        }
        Ok(Outcome::done(true))
    }

    /// Gives a node's pool up; answers which member of the cluster group its next pool must have, if
    /// any.
    pub(crate) fn replace_pool(
        &mut self,
        node: NodeId,
        id: PoolId,
        guarded: bool,
    ) -> Result<Outcome, Refusal> {
        let known = self.nodes.get(&node).ok_or(Refusal::UnknownNode { node })?;
        let pool = self.pools.get(&id).ok_or(Refusal::UnknownPool { pool: id })?;
        if pool.node != node {
            return Err(Refusal::PoolOnOtherNode { pool: id, owner: pool.node, node });
        }
        if self.nodes.len() < 3 {
            return Err(Refusal::NotReplaceable { pool: id, nodes: self.nodes.len() });
        }
        let serves = |other: &Pool| other.state != PoolState::Lost;
        if !serves(pool) && self.pools_of(node, pool.shard).any(serves) {
            return Ok(Outcome::done(false));
        }
        if guarded && serves(pool) {
            self.check_can_be_given_up(pool)?;
        }
        if pool.shard != ShardId(0) {
            return Ok(Outcome { changed: self.lose_pool(id), reply: Reply::GivenUp });
        }
        // A member that no pool was seen with yet is still to be used.
        if let Some(member) = known.member.filter(|_| known.replacing) {
            return Ok(Outcome { reply: Reply::Replacing { member }, changed: false });
        }
        let member = ReplicaId(self.next_replica);
        self.next_replica += 1;
        let known = self.nodes.get_mut(&node).expect("it was found");
        known.member = Some(member);
        known.replacing = true;
        self.lose_pool(id);
        Ok(Outcome { reply: Reply::Replacing { member }, changed: true })
    }

    /// Replicas with new ids, on the shard's new pool, in the place of those that were lost: of
    /// every family that has a majority of its replicas left. Of the others nobody could say what
    /// they held: they stay lost.
    fn replace_replicas(&mut self, node: NodeId, shard: ShardId, pool: PoolId) {
        if shard == ShardId(0) {
            self.nodes.get_mut(&node).expect("the caller found it").replacing = false;
        }
        let lost: Vec<Replica> = self
            .replicas_on_shard(node, shard)
            .filter(|replica| replica.state == ReplicaState::Lost)
            .copied()
            .collect();
        for old in lost {
            self.give_new_id(&old, pool);
        }
    }

    /// A replica that can't be mended gets a successor in its own pool.
    pub(crate) fn replace_replica(&mut self, id: ReplicaId) -> Result<Outcome, Refusal> {
        let Some(&old) = self.replicas.get(&id) else { return Ok(Outcome::done(false)) };
        match old.state {
            ReplicaState::Ready if self.give_new_id(&old, old.pool) => Ok(Outcome::done(true)),
            ReplicaState::Ready => Err(Refusal::ReplicaNotReplaceable { replica: id }),
            ReplicaState::Lost => Err(Refusal::ReplicaLost { replica: id }),
            ReplicaState::Creating | ReplicaState::Removing | ReplicaState::Removed => {
                Ok(Outcome::done(false))
            }
        }
    }

    /// Puts a replica with a new id in the place of one that has forgotten something, if a majority
    /// of the family's replicas is left without it. Answers whether.
    fn give_new_id(&mut self, old: &Replica, pool: PoolId) -> bool {
        let Some(volume) = self.families.get(&old.family) else { return false };
        let volume = self.volumes.get_mut(volume).expect("families and volumes agree");
        let replicas = &self.replicas;
        let kept = |id: &&ReplicaId| **id != old.id && replicas[id].state == ReplicaState::Ready;
        let kept = volume.replicas.iter().filter(kept).count();
        // While it is being made it is not known who its first members are.
        if volume.phase != VolumePhase::Ready || kept * 2 <= volume.replicas.len() {
            return false;
        }
        let id = ReplicaId(self.next_replica);
        self.next_replica += 1;
        let Replica { family, node, .. } = *old;
        let state = ReplicaState::Creating;
        self.replicas.remove(&old.id);
        self.replicas.insert(id, Replica { id, family, node, pool, state });
        volume.replicas.retain(|&replica| replica != old.id);
        // Ids rise: the new one is the last.
        volume.replicas.push(id);
        true
    }

    /// Forgets a lost pool that no replica refers to any more. One that still comes up is unknown
    /// then, and refused as such.
    fn forget_empty(&mut self, id: PoolId) {
        if !self.replicas.values().any(|replica| replica.pool == id) {
            self.pools.remove(&id);
        }
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

    /// The pools of a node's shard, by id: one that may serve (more on shard 0, if programs reported
    /// them that knew no members), and lost ones that are not forgotten yet.
    pub fn pools_of(&self, node: NodeId, shard: ShardId) -> impl Iterator<Item = &Pool> {
        self.pools_on(node).filter(move |pool| pool.shard == shard)
    }
}
