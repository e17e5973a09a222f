//! Why a call is refused, and the one place that gives each reason its gRPC code.
//!
//! The codes are those that the CSI specification names for the situation. What the cluster itself
//! refuses passes through with its own code and words.

use std::path::PathBuf;

use thiserror::Error;
use tonic::{Code, Status};

use crate::host::HostError;

/// Why a call is refused.
#[derive(Debug, Error)]
pub enum Refusal {
    /// A required field is empty.
    #[error("{0} is missing: the call must name it")]
    FieldMissing(&'static str),
    /// A field is longer than the specification allows.
    #[error("{field} has {bytes} bytes: at most {max} are allowed")]
    FieldTooLong {
        /// Its name.
        field: &'static str,
        /// What it has.
        bytes: usize,
        /// What it may have.
        max: usize,
    },
    /// A StorageClass parameter that this driver does not have.
    #[error("parameter {0:?} is unknown: use replicas, placement or fsType")]
    ParameterUnknown(String),
    /// A parameter with a value that it can't have.
    #[error("parameter {name} can't be {value:?}: use {allowed}")]
    ParameterInvalid {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// VolumeAttributesClass is not supported.
    #[error("parameter {0:?} can't be changed: this driver has no mutable parameters")]
    ParameterMutable(String),
    /// A way of using a volume that there is not.
    #[error("{0}")]
    CapabilityUnsupported(String),
    /// The publish context is not one that the controller gave.
    #[error("publish_context is not valid: {0}")]
    ContextInvalid(String),
    /// A page of no possible length.
    #[error("max_entries can't be {0}: use 0 for all")]
    EntriesInvalid(i32),
    /// A path that is not absolute, or leads upwards.
    #[error("{field} can't be {path:?}: use an absolute path")]
    PathInvalid {
        /// Which.
        field: &'static str,
        /// Its value.
        path: String,
    },
    /// A mount option that is several, or none.
    #[error("mount flag {0:?} is not valid: give one option per flag")]
    FlagInvalid(String),
    /// Nobody said where volumes are served.
    #[error(
        "no NBD address is known: the cluster's nodes tell none, so give this node --nbd-address"
    )]
    AddressMissing,
    /// The volume is staged in another way.
    #[error("volume {0:?} is staged on this node in another way: unstage it first")]
    StagedDiffers(String),
    /// A publish context that was overtaken.
    #[error("volume {volume:?} was staged under a newer lease than {epoch}: publish it again")]
    LeaseOld {
        /// The volume.
        volume: String,
        /// The older lease.
        epoch: u64,
    },
    /// Stage comes before publish.
    #[error("volume {0:?} is not staged on this node: stage it first")]
    NotStaged(String),
    /// What is in memory of it is not all written, or somebody uses it.
    #[error(
        "volume {volume:?} is still held by the kernel of this node as {devices}: what was written \
         to it is on its way to its servers, or it is mounted elsewhere on this node; try again"
    )]
    DeviceHeld {
        /// The volume.
        volume: String,
        /// Where.
        devices: String,
    },
    /// Unpublish comes before unstage.
    #[error("volume {volume:?} is still published at {target:?}: unpublish it first")]
    PublishedStill {
        /// The volume.
        volume: String,
        /// Where.
        target: PathBuf,
    },
    /// The same target in another way.
    #[error("volume {volume:?} is published at {target:?} in another way: unpublish it first")]
    PublishedDiffers {
        /// The volume.
        volume: String,
        /// Where.
        target: PathBuf,
    },
    /// RWOP.
    #[error("volume {volume:?} has a single publisher, and is published at {target:?}")]
    PublishedOnce {
        /// The volume.
        volume: String,
        /// Where.
        target: PathBuf,
    },
    /// A device that can be written can't be published for reading only.
    #[error(
        "volume {0:?} is a raw device that this node may write: for reading only it must be          published so by the controller"
    )]
    DeviceWritable(String),
    /// Not where the caller says.
    #[error("volume {volume:?} is not at {path:?}")]
    NotAt {
        /// The volume.
        volume: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// never-format-data.
    #[error("volume {volume:?} can't be mounted: {problem}")]
    ContentUnusable {
        /// The volume.
        volume: String,
        /// Why.
        problem: String,
    },
    /// The host did not do it.
    #[error(transparent)]
    Host(Box<HostError>),
    /// A bug of ours.
    #[error("{0} ended without an answer: report this bug; try again")]
    CallBroken(&'static str),
    /// Snapshots and clones as sources of new volumes.
    #[error("a volume from a {0} is not supported yet: create it without a content source")]
    ContentSourceUnsupported(&'static str),
    /// A call of the specification that is not served.
    #[error("{0} is not supported yet: the driver does not advertise it")]
    CallUnsupported(&'static str),
    /// A size that no volume can have.
    #[error("{0}")]
    CapacityInvalid(String),
    /// A size range without a possible size.
    #[error("{0}")]
    CapacityOutOfRange(String),
    /// It exists, and is different.
    #[error("volume {name:?} exists and is different: {difference}; use another name")]
    VolumeDiffers {
        /// Its name.
        name: String,
        /// What differs.
        difference: String,
    },
    /// No such volume.
    #[error("there is no volume {0:?}: see `ballastctl volume list`")]
    VolumeUnknown(String),
    /// No such host.
    #[error(
        "there is no node {0:?} in the cluster: see `ballastctl node list`, or let hosts without \
         storage use volumes with --hosts any"
    )]
    HostUnknown(String),
    /// It is being made.
    #[error("volume {0:?} is still being created: try again")]
    VolumeNotReady(String),
    /// A page token that this driver did not give.
    #[error("starting_token {0:?} is none of this driver: list again from the beginning")]
    TokenInvalid(String),
    /// Another call for the same volume runs.
    #[error("another call for volume {0:?} is running: try again when it has ended")]
    CallRunning(String),
    /// The host was granted a lease while this call was to see to it that it has none.
    #[error(
        "the leases of volume {0:?} changed while this call ran: call again if it is still wanted"
    )]
    LeasesChanged(String),
    /// The cluster's answer lacks what it must have.
    #[error(
        "the cluster's answer has no {0}: ballast-csi and ballastd do not fit; use one version"
    )]
    AnswerIncomplete(&'static str),
    /// The cluster refused, or could not be asked.
    #[error("{}", .0.message())]
    Cluster(Box<Status>),
}

impl Refusal {
    /// The code that the specification names.
    pub fn code(&self) -> Code {
        match self {
            Refusal::FieldMissing(_)
            | Refusal::FieldTooLong { .. }
            | Refusal::ParameterUnknown(_)
            | Refusal::ParameterInvalid { .. }
            | Refusal::ParameterMutable(_)
            | Refusal::CapabilityUnsupported(_)
            | Refusal::ContentSourceUnsupported(_)
            | Refusal::ContextInvalid(_)
            | Refusal::EntriesInvalid(_)
            | Refusal::PathInvalid { .. }
            | Refusal::FlagInvalid(_)
            | Refusal::CapacityInvalid(_) => Code::InvalidArgument,
            Refusal::CallUnsupported(_) => Code::Unimplemented,
            Refusal::CapacityOutOfRange(_) => Code::OutOfRange,
            Refusal::VolumeDiffers { .. }
            | Refusal::StagedDiffers(_)
            | Refusal::PublishedDiffers { .. } => Code::AlreadyExists,
            Refusal::VolumeUnknown(_) | Refusal::HostUnknown(_) | Refusal::NotAt { .. } => {
                Code::NotFound
            }
            Refusal::AddressMissing
            | Refusal::LeaseOld { .. }
            | Refusal::NotStaged(_)
            | Refusal::PublishedStill { .. }
            | Refusal::PublishedOnce { .. }
            | Refusal::DeviceWritable(_)
            | Refusal::ContentUnusable { .. } => Code::FailedPrecondition,
            Refusal::VolumeNotReady(_) | Refusal::DeviceHeld { .. } => Code::Unavailable,
            Refusal::TokenInvalid(_) | Refusal::CallRunning(_) | Refusal::LeasesChanged(_) => {
                Code::Aborted
            }
            Refusal::AnswerIncomplete(_) | Refusal::CallBroken(_) => Code::Internal,
            Refusal::Host(error) => match **error {
                HostError::Slow { .. } => Code::Unavailable,
                HostError::LeaseOver(_) => Code::FailedPrecondition,
                HostError::VolumeDeleted(_) => Code::NotFound,
                _ => Code::Internal,
            },
            Refusal::Cluster(status) => status.code(),
        }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Refusal::Cluster(Box::new(status))
    }
}

impl From<HostError> for Refusal {
    fn from(error: HostError) -> Self {
        Refusal::Host(Box::new(error))
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Status::new(refusal.code(), refusal.to_string())
    }
}

/// The longest id or name that the specification allows, in bytes.
const FIELD_BYTES_MAX: usize = 128;

/// A required id or name.
///
/// # Errors
/// When it is empty or longer than the specification allows.
pub fn required<'a>(field: &'static str, value: &'a str) -> Result<&'a str, Refusal> {
    let (bytes, max) = (value.len(), FIELD_BYTES_MAX);
    match bytes {
        0 => Err(Refusal::FieldMissing(field)),
        _ if bytes > max => Err(Refusal::FieldTooLong { field, bytes, max }),
        _ => Ok(value),
    }
}
