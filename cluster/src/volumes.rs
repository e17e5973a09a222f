//! Commands about volumes and their replicas.

use ballast_block::{Epoch, FamilyId, ReplicaId, VolumeId};

use crate::command::CreateVolume;
use crate::error::{Leased, Refusal};
use crate::placement;
use crate::state::{ClusterState, Outcome, Reply};
use crate::validate::{check_create_volume, check_volume_size};
use crate::view::{Replica, ReplicaState, Volume, VolumePhase};

impl ClusterState {
    pub(crate) fn create_volume(&mut self, command: CreateVolume) -> Result<Outcome, Refusal> {
        check_create_volume(&command)?;
        if let Some(volume) = self.volume_by_name(&command.name) {
            return existing_volume(volume, &command);
        }
        if let Some(volume) = self.volumes.get(&command.volume) {
            let name = volume.name.clone();
            return Err(Refusal::VolumeIdTaken { volume: command.volume, name });
        }
        let (shard, places) = placement::choose(self, &command)?;
        let family = FamilyId(self.next_family);
        self.next_family += 1;
        let mut replicas = Vec::with_capacity(places.len());
        for (node, pool) in places {
            let id = ReplicaId(self.next_replica);
            self.next_replica += 1;
            let state = ReplicaState::Creating;
            self.replicas.insert(id, Replica { id, family, node, pool, state });
            replicas.push(id);
        }
        let volume = Volume {
            id: command.volume,
            name: command.name,
            size_bytes: command.size_bytes,
            founded_bytes: command.size_bytes,
            family,
            shard,
            replica_count: command.replicas,
            replicas,
            created_at_ms: command.created_at_ms,
            phase: VolumePhase::Creating,
            leases: Vec::new(),
            last_epoch: Epoch(0),
            lease_revision: 0,
        };
        self.names.insert(volume.name.clone(), volume.id);
        self.families.insert(family, volume.id);
        self.volumes.insert(volume.id, volume.clone());
        Ok(Outcome { reply: Reply::Volume(volume), changed: true })
    }

    pub(crate) fn replica_ready(&mut self, id: ReplicaId) -> Result<Outcome, Refusal> {
        let replica = self.replicas.get_mut(&id).ok_or(Refusal::UnknownReplica { replica: id })?;
        match replica.state {
            ReplicaState::Creating => {
                replica.state = ReplicaState::Ready;
                Ok(Outcome::done(true))
            }
            ReplicaState::Ready => Ok(Outcome::done(false)),
            ReplicaState::Lost => Err(Refusal::ReplicaLost { replica: id }),
            ReplicaState::Removing | ReplicaState::Removed => {
                Err(Refusal::ReplicaBeingRemoved { replica: id })
            }
        }
    }

    /// The report of a fact: accepted whatever became of the replicas meanwhile.
    pub(crate) fn family_formed(&mut self, family: FamilyId) -> Result<Outcome, Refusal> {
        let id = *self.families.get(&family).ok_or(Refusal::UnknownFamily { family })?;
        let volume = self.volumes.get_mut(&id).expect("families and volumes agree");
        let changed = volume.phase == VolumePhase::Creating;
        if changed {
            volume.phase = VolumePhase::Ready;
        }
        Ok(Outcome::done(changed))
    }

    pub(crate) fn resize_volume(&mut self, id: VolumeId, size: u64) -> Result<Outcome, Refusal> {
        let volume = self.volumes.get_mut(&id).ok_or(Refusal::UnknownVolume { volume: id })?;
        let name = || volume.name.clone();
        match volume.phase {
            VolumePhase::Creating => return Err(Refusal::VolumeNotReady { name: name() }),
            VolumePhase::Deleting => return Err(Refusal::VolumeBeingDeleted { name: name() }),
            VolumePhase::Ready => {}
        }
        check_volume_size(&volume.name, size)?;
        if size < volume.size_bytes {
            let (size_bytes, asked_bytes) = (volume.size_bytes, size);
            return Err(Refusal::ShrinkRefused { name: name(), size_bytes, asked_bytes });
        }
        let changed = size != volume.size_bytes;
        volume.size_bytes = size;
        Ok(Outcome { reply: Reply::Volume(volume.clone()), changed })
    }

    pub(crate) fn delete_volume(&mut self, id: VolumeId) -> Result<Outcome, Refusal> {
        let Some(volume) = self.volumes.get_mut(&id) else { return Ok(Outcome::done(false)) };
        if volume.phase == VolumePhase::Deleting {
            return Ok(Outcome::done(false));
        }
        if let Some(lease) = volume.leases.first() {
            let (name, host) = (volume.name.clone(), lease.host.clone());
            let asked = Leased::Delete;
            return Err(Refusal::VolumeLeased { name, host, mode: lease.mode, asked });
        }
        volume.phase = VolumePhase::Deleting;
        self.names.remove(&volume.name);
        for replica in &volume.replicas {
            let replica = self.replicas.get_mut(replica).expect("volumes and replicas agree");
            replica.state = match replica.state {
                ReplicaState::Creating | ReplicaState::Ready => ReplicaState::Removing,
                ReplicaState::Lost => ReplicaState::Removed,
                ReplicaState::Removing | ReplicaState::Removed => replica.state,
            };
        }
        let family = volume.family;
        self.drop_if_removed(family);
        Ok(Outcome::done(true))
    }

    pub(crate) fn replica_removed(&mut self, id: ReplicaId) -> Result<Outcome, Refusal> {
        let Some(replica) = self.replicas.get_mut(&id) else { return Ok(Outcome::done(false)) };
        match replica.state {
            ReplicaState::Removed => Ok(Outcome::done(false)),
            ReplicaState::Removing => {
                replica.state = ReplicaState::Removed;
                let family = replica.family;
                self.drop_if_removed(family);
                Ok(Outcome::done(true))
            }
            ReplicaState::Creating | ReplicaState::Ready | ReplicaState::Lost => {
                Err(Refusal::ReplicaNotRemoving { replica: id })
            }
        }
    }

    /// Forgets a deleted volume once all its pools have confirmed.
    pub(crate) fn drop_if_removed(&mut self, family: FamilyId) {
        let removed = |replica: &Replica| replica.state == ReplicaState::Removed;
        let Some(volume) = self.volume_of_family(family) else { return };
        if volume.phase != VolumePhase::Deleting || !self.replicas_of(family).all(removed) {
            return;
        }
        let (id, replicas) = (volume.id, volume.replicas.clone());
        self.volumes.remove(&id);
        self.families.remove(&family);
        for replica in replicas {
            self.replicas.remove(&replica);
        }
    }
}

fn existing_volume(volume: &Volume, command: &CreateVolume) -> Result<Outcome, Refusal> {
    if volume.size_bytes == command.size_bytes && volume.replica_count == command.replicas {
        return Ok(Outcome { reply: Reply::Volume(volume.clone()), changed: false });
    }
    Err(Refusal::VolumeDiffers {
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        asked_bytes: command.size_bytes,
        replicas: volume.replica_count,
        asked_replicas: command.replicas,
    })
}
