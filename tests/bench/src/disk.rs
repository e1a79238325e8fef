//! Bytes that reach the disk, counted where they do: at the block device.
//!
//! `/proc/PID/io` would tell processes apart, but since Linux writes pages in large folios its `write_bytes` counts the
//! whole folio that a write makes dirty: 2 MiB for each 8 KiB that PostgreSQL writes into a WAL segment.

use crate::problem::{During, Result};
use nix::sys::stat::{major, minor, stat};
use std::fs::File;
use std::path::Path;

/// Linux counts in these, whatever the device's are.
const SECTOR_BYTES: u64 = 512;

/// The block device below a directory. Whatever writes to it is counted.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    major: u64,
    minor: u64,
}

/// Sectors written, from `/proc/diskstats`.
fn sectors(text: &str, disk: Disk) -> Option<u64> {
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        (number(0)? == disk.major && number(1)? == disk.minor).then(|| number(9))?
    })
}

impl Disk {
    /// Of `dir`; an error if it does not lie on a block device's own file system, as in some containers.
    pub fn below(dir: &Path) -> Result<Self> {
        let device = stat(dir).during(dir.display())?.st_dev;
        let disk = Self { major: major(device), minor: minor(device) };
        disk.written_bytes()?;
        Ok(disk)
    }

    /// Written so far.
    pub fn written_bytes(self) -> Result<u64> {
        let text = std::fs::read_to_string("/proc/diskstats").during("/proc/diskstats")?;
        let sectors = sectors(&text, self).during("the device is not in /proc/diskstats")?;
        Ok(sectors * SECTOR_BYTES)
    }
}

/// Has everything written that was not yet, on the file system of `dir`.
pub fn sync(dir: &Path) -> Result<()> {
    let file = File::open(dir).during(dir.display())?;
    nix::unistd::syncfs(&file).during("syncfs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_line_is_found_by_its_numbers() {
        let text = " 254       0 vda 1 2 3 4 5 6 700 8\n 254       1 vda1 1 2 3 4 5 6 9 8\n";
        assert_eq!(sectors(text, Disk { major: 254, minor: 0 }), Some(700));
        assert_eq!(sectors(text, Disk { major: 254, minor: 2 }), None);
    }

    #[test]
    fn what_is_synced_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        // A temporary directory may be in memory.
        let Ok(disk) = Disk::below(dir.path()) else { return };
        let before = disk.written_bytes().unwrap();
        let mut file = File::create(dir.path().join("f")).unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        sync(dir.path()).unwrap();
        assert!(disk.written_bytes().unwrap() >= before + 100_000);
    }
}
