//! Labels: how containers of this drone are recognised, by it and by people.

use crate::runtime::BackendSpec;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const CLUSTER: &str = "io.holdfast.cluster";
const DRONE: &str = "io.holdfast.drone";
pub(super) const BACKEND: &str = "io.holdfast.backend";
const KEY_NAME: &str = "io.holdfast.key.name";
const KEY_NAMESPACE: &str = "io.holdfast.key.namespace";
const TOKEN: &str = "io.holdfast.token";
/// The boot of the machine in which it was made: no guard survives it.
const BOOT_ID: &str = "io.holdfast.boot-id";
/// The backend's directory, where its guard holds a lock and its permit is.
const DIR: &str = "io.holdfast.dir";

/// Whose containers: one drone's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The cluster that the drone serves.
    pub cluster: String,
    /// The drone's name, unique in the cluster.
    pub drone: String,
}

impl Owner {
    /// The labels of a backend's container.
    pub(super) fn labels(&self, spec: &BackendSpec, dir: &Path) -> HashMap<String, String> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        [
            (CLUSTER, self.cluster.clone()),
            (DRONE, self.drone.clone()),
            (BACKEND, spec.id.clone()),
            (KEY_NAME, spec.key.name.clone()),
            (KEY_NAMESPACE, spec.key.namespace.clone()),
            (TOKEN, spec.token.to_string()),
            (BOOT_ID, boot_id.trim().to_owned()),
            (DIR, dir.to_string_lossy().into_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// What the engine is to look for: all labels of this owner.
    pub(super) fn filter(&self) -> HashMap<String, Vec<String>> {
        let labels = vec![format!("{CLUSTER}={}", self.cluster), format!("{DRONE}={}", self.drone)];
        HashMap::from([("label".to_owned(), labels)])
    }

    /// Whether these are labels of this owner's container: the filter's word is not all that we go by.
    pub(super) fn owns(&self, labels: &HashMap<String, String>) -> bool {
        labels.get(CLUSTER) == Some(&self.cluster) && labels.get(DRONE) == Some(&self.drone)
    }

    /// The name of a backend's container, unique on the engine as long as backends' ids are.
    pub(super) fn container_name(&self, backend: &str) -> String {
        let fits = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
        let cluster: String = self.cluster.chars().map(|c| if fits(c) { c } else { '_' }).collect();
        format!("holdfast_{cluster}_{}_{backend}", self.drone)
    }
}

/// The backend's directory that a container's labels name.
pub(super) fn dir(labels: &HashMap<String, String>) -> Option<PathBuf> {
    labels.get(DIR).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owners_containers_are_its_own() {
        let owner = Owner { cluster: "c.example:1".into(), drone: "dr-a".into() };
        let labels = |cluster: &str, drone: &str| {
            HashMap::from([(CLUSTER.to_owned(), cluster.to_owned()), (DRONE.to_owned(), drone.to_owned())])
        };
        assert!(owner.owns(&labels("c.example:1", "dr-a")));
        assert!(!owner.owns(&labels("c.example:1", "dr-ab")));
        assert!(!owner.owns(&labels("c.example:12", "dr-a")));
        assert!(!owner.owns(&HashMap::new()));
        assert_eq!(owner.container_name("ba-1"), "holdfast_c.example_1_dr-a_ba-1");
    }
}
