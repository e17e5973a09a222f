//! Records of staged volumes: what a repeated call needs that the kernel can't tell.
//!
//! One small JSON file per volume, written whole before the step that it is about; what is mounted
//! and attached is always looked up, never believed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::attach::Attachment;
use crate::context::{self, Address};
use crate::host::{HostError, files, mounts};
use crate::modes::Access;

/// The version of this layout.
const VERSION: u32 = 1;

/// A staged volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// The volume's id.
    pub volume_id: String,
    /// Its NBD export, which names the lease.
    pub export: String,
    /// The lease's fencing number.
    pub epoch: u64,
    /// Where it is served, separated by commas.
    addresses: String,
    /// Whether the lease lets this host write.
    pub read_only: bool,
    /// Whether a second publish is refused.
    pub single_publisher: bool,
    /// A device or a file system.
    pub block: bool,
    /// The file system; empty for a device.
    pub fs_type: String,
    /// Options of its mount.
    pub flags: Vec<String>,
    /// Where the orchestrator wants it.
    pub staging: PathBuf,
    /// Where it is published, or may be: written before the mount is made.
    pub published: Vec<Published>,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// The path that the pod sees.
    pub target: PathBuf,
    /// Whether it may not write.
    pub read_only: bool,
}

/// What a new record is made of.
#[derive(Debug)]
pub struct Staging<'a> {
    /// The volume's id.
    pub volume_id: &'a str,
    /// What the controller said.
    pub context: &'a context::PublishContext,
    /// Servers, those of this host's command line first.
    pub addresses: Vec<Address>,
    /// How it is used.
    pub access: &'a Access,
    /// The file system, decided.
    pub fs_type: String,
    /// Where.
    pub staging: &'a Path,
}

impl Record {
    /// Of a volume that is to be staged.
    pub fn new(staging: Staging<'_>) -> Record {
        let flags = match staging.access {
            Access::Block => Vec::new(),
            Access::Mount { flags, .. } => flags.clone(),
        };
        let addresses: Vec<&str> = staging.addresses.iter().map(Address::as_str).collect();
        Record {
            version: VERSION,
            volume_id: staging.volume_id.to_owned(),
            export: staging.context.export(),
            epoch: staging.context.epoch,
            addresses: addresses.join(","),
            read_only: staging.context.read_only,
            single_publisher: staging.context.mode
                == ballast_api::v1::LeaseMode::SingleNodePublisher,
            block: staging.access.is_block(),
            fs_type: staging.fs_type,
            flags,
            staging: staging.staging.to_owned(),
            published: Vec::new(),
        }
    }

    /// What the attacher needs.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            volume_id: self.volume_id.clone(),
            export: self.export.clone(),
            addresses: context::parse_addresses(&self.addresses).unwrap_or_default(),
            read_only: self.read_only,
        }
    }

    /// Whether it is about the same use of the volume, whatever the lease.
    pub fn same_use(&self, other: &Record) -> bool {
        (&self.staging, self.block, &self.fs_type, &self.flags, self.read_only)
            == (&other.staging, other.block, &other.fs_type, &other.flags, other.read_only)
    }
}

/// Where records lie.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

impl Records {
    /// Below this folder, which is made.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn open(folder: &Path) -> Result<Records, HostError> {
        let folder = folder.join("volumes");
        files::make_folder(&folder)?;
        Ok(Records { folder })
    }

    /// A volume's record, if it is staged or half staged. `volume_id` is a checked id.
    ///
    /// # Errors
    /// When it can't be read: then a person must look, since guessing could lose data.
    pub fn read(&self, volume_id: &str) -> Result<Option<Record>, HostError> {
        let path = self.path(volume_id);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(HostError::file(&path, "read"))?,
        };
        let record: Result<Record, _> = serde_json::from_slice(&bytes);
        match record {
            Ok(mut record) if record.version == VERSION && record.volume_id == volume_id => {
                // An older version wrote paths as they were given.
                record.staging = mounts::resolve(&record.staging);
                for published in &mut record.published {
                    published.target = mounts::resolve(&published.target);
                }
                Ok(Some(record))
            }
            _ => Err(HostError::Unexpected(format!(
                "{path:?} is no record that this version understands: unmount the volume by hand \
                 and remove the file"
            ))),
        }
    }

    /// Writes a record, durably.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write(&self, record: &Record) -> Result<(), HostError> {
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| {
            HostError::Unexpected(format!("a record can't be written: {error}"))
        })?;
        files::write_atomically(&self.path(&record.volume_id), &bytes)
    }

    /// Removes a record, durably.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove(&self, volume_id: &str) -> Result<(), HostError> {
        files::remove(&self.path(volume_id))
    }

    fn path(&self, volume_id: &str) -> PathBuf {
        self.folder.join(format!("{volume_id}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "7e0ec0a1-47d5-4f0e-9a4b-7b4b1d1f8a55";

    fn record() -> Record {
        let context = context::PublishContext {
            volume: "db-0".to_owned(),
            epoch: 3,
            mode: ballast_api::v1::LeaseMode::SingleNodePublisher,
            read_only: false,
            addresses: context::parse_addresses("127.0.0.1:1").unwrap(),
        };
        let access =
            Access::Mount { fs_type: "ext4".to_owned(), flags: vec!["noatime".to_owned()] };
        Record::new(Staging {
            volume_id: ID,
            context: &context,
            addresses: context.addresses.clone(),
            access: &access,
            fs_type: "ext4".to_owned(),
            staging: Path::new("/staging"),
        })
    }

    #[test]
    fn records_are_kept_replaced_and_removed() {
        let folder = std::env::temp_dir().join(format!("ballast-csi-{}", std::process::id()));
        let records = Records::open(&folder).unwrap();
        assert_eq!(records.read(ID).unwrap(), None);
        let mut record = record();
        assert!(record.single_publisher);
        records.write(&record).unwrap();
        record.published.push(Published { target: PathBuf::from("/t"), read_only: true });
        records.write(&record).unwrap();
        assert_eq!(records.read(ID).unwrap().as_ref(), Some(&record));
        fs::write(records.path(ID), "{").unwrap();
        assert!(records.read(ID).is_err(), "a damaged record is not taken for none");
        // A life that was killed while it wrote.
        fs::write(records.path(ID).with_extension("new"), "{").unwrap();
        records.remove(ID).unwrap();
        records.remove(ID).unwrap();
        assert_eq!(fs::read_dir(&records.folder).unwrap().count(), 0);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn another_lease_is_the_same_use() {
        let (first, mut second) = (record(), record());
        second.epoch = 4;
        assert!(first.same_use(&second));
        second.read_only = true;
        assert!(!first.same_use(&second));
    }
}
