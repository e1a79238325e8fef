//! The data id: a random number of a drone's data directory, valid on one machine only.
//!
//! ```text
//!   DIR/data_id    {"data_id", "machine_id", "product_uuid", "boot_id"}, written in one step
//! ```
//!
//! The controllers send a spawn again only to the data directory that it was made for: what that directory does not name
//! was certainly never started. A directory that was moved to another machine says nothing about what runs on the old
//! one, so it gets a new data id there. A machine is told by `/etc/machine-id` and the product UUID of its firmware,
//! both of which must be readable, by a drone that does not run in a container. Where it cannot be told for certain, each
//! boot gets a new data id.

use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use tracing::{info, warn};

/// Name of the file in the data directory.
const FILE: &str = "data_id";
/// Largest such file, in bytes.
const FILE_BYTES_MAX: u64 = 4 * 1024;
/// What the kernel calls its first PID namespace (`PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// Files that container engines make in a container.
const CONTAINER_MARKS: [&str; 3] = ["/.dockerenv", "/run/.containerenv", "/run/systemd/container"];

/// What tells this machine and its boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// This boot's id.
    pub boot_id: String,
    /// `/etc/machine-id`, if it is readable.
    pub machine_id: Option<String>,
    /// The firmware's product UUID, if it is readable (which takes root).
    pub product_uuid: Option<String>,
    /// The drone runs in a container, whose files say nothing about the machine.
    pub in_container: bool,
}

impl Machine {
    /// Reads what this machine says of itself.
    pub fn read(boot_id: &str) -> Self {
        let line = |path: &str| {
            let text = fs::read_to_string(path).ok()?;
            Some(text.trim().to_owned()).filter(|text| !text.is_empty())
        };
        let first_namespace = fs::read_link("/proc/self/ns/pid")
            .is_ok_and(|namespace| namespace.as_os_str() == FIRST_PID_NAMESPACE);
        Self {
            boot_id: boot_id.to_owned(),
            machine_id: line("/etc/machine-id"),
            product_uuid: line("/sys/class/dmi/id/product_uuid"),
            in_container: !first_namespace || CONTAINER_MARKS.iter().any(|mark| Path::new(mark).exists()),
        }
    }

    /// Whether the machine can be told for certain.
    pub fn is_certain(&self) -> bool {
        self.machine_id.is_some() && self.product_uuid.is_some() && !self.in_container
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    data_id: String,
    machine_id: Option<String>,
    product_uuid: Option<String>,
    boot_id: String,
}

/// The data id, and what is known of the directory's past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataId {
    /// As the controllers know it.
    pub id: String,
    /// What is in the directory was certainly left by this machine, in whichever boot.
    pub same_machine: bool,
}

/// Whether the stored id is still valid here, and whether the directory was certainly used on this machine.
fn judge(stored: &Stored, machine: &Machine) -> DataId {
    let same_facts = stored.machine_id == machine.machine_id && stored.product_uuid == machine.product_uuid;
    let same_machine = same_facts && machine.is_certain();
    let valid = same_machine || (same_facts && stored.boot_id == machine.boot_id);
    DataId { id: if valid { stored.data_id.clone() } else { String::new() }, same_machine }
}

/// The data id of a directory that this process has locked; a new one if the stored one is not valid here. `new` is drawn
/// by the caller. It is durable before this returns. What is stored already is not written again: a drone whose disk is
/// full is replaced all the same.
pub fn of_directory(dir: &Path, machine: &Machine, new: String) -> io::Result<DataId> {
    let before = read(&dir.join(FILE)).unwrap_or_else(|e| {
        warn!("the data id cannot be read, so this data directory gets a new one: {e}");
        None
    });
    let unknown = || DataId { id: String::new(), same_machine: false };
    let mut found = before.as_ref().map_or_else(unknown, |before| judge(before, machine));
    let is_new = found.id.is_empty();
    if is_new {
        info!(data_id = new, certain = machine.is_certain(), "this data directory gets a new data id");
        found.id = new;
    }
    let stored = Stored {
        data_id: found.id.clone(),
        machine_id: machine.machine_id.clone(),
        product_uuid: machine.product_uuid.clone(),
        boot_id: machine.boot_id.clone(),
    };
    if before.as_ref() == Some(&stored) {
        return Ok(found);
    }
    match write(dir, &stored) {
        // The id is there and stays valid; only the boot is another one.
        Err(e) if !is_new => warn!("this boot is not noted beside the data id: {e}"),
        written => written?,
    }
    Ok(found)
}

fn read(path: &Path) -> io::Result<Option<Stored>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    serde_json::from_str(&text).map(Some).map_err(io::Error::other)
}

fn write(dir: &Path, stored: &Stored) -> io::Result<()> {
    let aside = dir.join("data_id.new");
    let mut file = File::create(&aside)?;
    file.write_all(serde_json::to_string(stored).map_err(io::Error::other)?.as_bytes())?;
    file.sync_all()?;
    fs::rename(&aside, dir.join(FILE))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(machine_id: Option<&str>, product_uuid: Option<&str>, boot_id: &str) -> Machine {
        Machine {
            boot_id: boot_id.into(),
            machine_id: machine_id.map(Into::into),
            product_uuid: product_uuid.map(Into::into),
            in_container: false,
        }
    }

    /// The data id that a directory of `first` has on `second`, where a new one would be `new`.
    fn moved(first: &Machine, second: &Machine) -> DataId {
        let dir = tempfile::tempdir().unwrap();
        let id = of_directory(dir.path(), first, "old".into()).unwrap();
        assert_eq!(id, DataId { id: "old".into(), same_machine: false }, "nothing is known of a fresh one");
        let moved = of_directory(dir.path(), second, "new".into()).unwrap();
        let again = of_directory(dir.path(), second, "newer".into()).unwrap();
        assert_eq!(again.id, moved.id, "it is durable");
        moved
    }

    #[test]
    fn a_certain_machine_keeps_its_data_id_over_boots() {
        let first = machine(Some("m"), Some("u"), "boot-1");
        let second = Machine { boot_id: "boot-2".into(), ..first.clone() };
        assert_eq!(moved(&first, &second), DataId { id: "old".into(), same_machine: true });
    }

    #[test]
    fn a_directory_that_moves_to_another_machine_gets_a_new_data_id() {
        let first = machine(Some("m"), Some("u"), "boot-1");
        for second in [
            machine(Some("m2"), Some("u"), "boot-2"),
            machine(Some("m"), Some("u2"), "boot-2"),
            machine(Some("m"), None, "boot-2"),
            // Two containers of one machine share its boot.
            machine(Some("m2"), Some("u"), "boot-1"),
        ] {
            assert_eq!(
                moved(&first, &second),
                DataId { id: "new".into(), same_machine: false },
                "{second:?}"
            );
        }
    }

    #[test]
    fn where_the_machine_is_uncertain_each_boot_gets_a_new_data_id() {
        let contained = Machine { in_container: true, ..machine(Some("m"), Some("u"), "boot-1") };
        for first in [machine(Some("m"), None, "boot-1"), machine(None, None, "boot-1"), contained] {
            assert!(!first.is_certain());
            assert_eq!(moved(&first, &first), DataId { id: "old".into(), same_machine: false });
            let second = Machine { boot_id: "boot-2".into(), ..first.clone() };
            assert_eq!(moved(&first, &second), DataId { id: "new".into(), same_machine: false });
        }
    }

    #[test]
    fn a_known_directory_that_cannot_be_written_keeps_its_data_id() {
        let dir = tempfile::tempdir().unwrap();
        let here = machine(Some("m"), Some("u"), "boot-1");
        of_directory(dir.path(), &here, "old".into()).unwrap();
        // As on a full disk.
        fs::create_dir(dir.path().join("data_id.new")).unwrap();
        for boot in ["boot-1", "boot-2"] {
            let here = Machine { boot_id: boot.into(), ..here.clone() };
            assert_eq!(of_directory(dir.path(), &here, "new".into()).unwrap().id, "old", "{boot}");
        }
        let elsewhere = machine(Some("m2"), Some("u"), "boot-1");
        of_directory(dir.path(), &elsewhere, "new".into()).unwrap_err();
    }

    #[test]
    fn a_data_id_that_cannot_be_read_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let here = machine(Some("m"), Some("u"), "boot-1");
        fs::write(dir.path().join(FILE), "{torn").unwrap();
        let id = of_directory(dir.path(), &here, "new".into()).unwrap();
        assert_eq!(id, DataId { id: "new".into(), same_machine: false });
    }
}
