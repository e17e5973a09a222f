//! The parameters of a StorageClass.
//!
//! A parameter that this driver does not have is refused by its name: a mistyped one must not be a
//! volume with other properties than its owner believes.

use std::collections::BTreeMap;

use crate::error::Refusal;
use crate::modes;

/// Replicas of a volume unless told otherwise.
pub const DEFAULT_REPLICAS: u32 = 3;

/// The key in a volume's context that carries the class's file system to the node.
pub const FS_TYPE: &str = "fsType";

/// The class's file system as Kubernetes writes it; its provisioner takes it out, others may not.
const KUBERNETES_FS_TYPE: &str = "csi.storage.k8s.io/fstype";

/// What the external-provisioner adds about the claim when told so. Names only: nothing follows.
const ABOUT_THE_CLAIM: [&str; 3] = [
    "csi.storage.k8s.io/pvc/name",
    "csi.storage.k8s.io/pvc/namespace",
    "csi.storage.k8s.io/pv/name",
];

/// Where the first replica goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Where there is room.
    #[default]
    Spread,
    /// Beside the pod that will use it, if there is room.
    Local,
}

/// Checked parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// 1, 3 or 5.
    pub replicas: u32,
    /// Where.
    pub placement: Placement,
    /// For volumes whose capability names no file system; empty = not said.
    pub fs_type: String,
}

impl Parameters {
    /// Checks what a StorageClass says.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, with the name of the parameter.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Parameters, Refusal> {
        let mut parameters = Parameters {
            replicas: DEFAULT_REPLICAS,
            placement: Placement::default(),
            fs_type: String::new(),
        };
        for (name, value) in given {
            let invalid = |name, allowed| {
                let value = value.clone();
                Refusal::ParameterInvalid { name, value, allowed }
            };
            match name.as_str() {
                "replicas" => {
                    parameters.replicas = match value.as_str() {
                        "1" => 1,
                        "3" => 3,
                        "5" => 5,
                        _ => return Err(invalid("replicas", "1, 3 or 5")),
                    }
                }
                "placement" => {
                    parameters.placement = match value.as_str() {
                        "spread" => Placement::Spread,
                        "local" => Placement::Local,
                        _ => return Err(invalid("placement", "spread or local")),
                    }
                }
                FS_TYPE | KUBERNETES_FS_TYPE => {
                    if modes::check_fs_type(value).is_err() {
                        return Err(invalid(FS_TYPE, "ext4 or xfs"));
                    }
                    if !parameters.fs_type.is_empty() && parameters.fs_type != *value {
                        return Err(invalid(FS_TYPE, "one file system"));
                    }
                    parameters.fs_type = value.clone();
                }
                name if ABOUT_THE_CLAIM.contains(&name) => {}
                _ => return Err(Refusal::ParameterUnknown(name.clone())),
            }
        }
        Ok(parameters)
    }

    /// What the node is to know of them.
    pub fn volume_context(&self) -> BTreeMap<String, String> {
        let said = !self.fs_type.is_empty();
        said.then(|| (FS_TYPE.to_owned(), self.fs_type.clone())).into_iter().collect()
    }
}

/// Refuses what a VolumeAttributesClass would set.
///
/// # Errors
/// INVALID_ARGUMENT, with the name of the first.
pub fn refuse_mutable(given: &BTreeMap<String, String>) -> Result<(), Refusal> {
    match given.keys().next() {
        None => Ok(()),
        Some(name) => Err(Refusal::ParameterMutable(name.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(given: &[(&str, &str)]) -> Result<Parameters, String> {
        let given = given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Parameters::parse(&given).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn known_parameters_are_read() {
        let none = parse(&[]).unwrap();
        assert_eq!((none.replicas, none.placement), (3, Placement::Spread));
        assert!(none.volume_context().is_empty());
        let all = [
            ("replicas", "1"),
            ("placement", "local"),
            ("csi.storage.k8s.io/fstype", "xfs"),
            ("csi.storage.k8s.io/pvc/name", "data-db-0"),
            ("csi.storage.k8s.io/pvc/namespace", "default"),
            ("csi.storage.k8s.io/pv/name", "pvc-1"),
        ];
        let all = parse(&all).unwrap();
        assert_eq!((all.replicas, all.placement), (1, Placement::Local));
        assert_eq!(all.volume_context()[FS_TYPE], "xfs");
    }

    #[test]
    fn others_are_refused_by_their_names() {
        for (name, value) in [
            ("replica", "3"),
            ("csi.storage.k8s.io/fsType", "ext4"),
            ("csi.storage.k8s.io/provisioner-secret-name", "s"),
            ("replicas", "2"),
            ("replicas", ""),
            ("placement", "near"),
            ("fsType", "btrfs"),
        ] {
            let text = parse(&[(name, value)]).unwrap_err();
            assert!(text.contains(name), "{text}");
        }
        assert!(parse(&[("fsType", "xfs"), ("csi.storage.k8s.io/fstype", "ext4")]).is_err());
        assert!(refuse_mutable(&[("iops".to_owned(), "1".to_owned())].into()).is_err());
    }
}
