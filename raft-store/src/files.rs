//! Files and directories that must survive power loss.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Syncs a directory, so that names made or removed in it are durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces a file: writes aside, syncs, renames, syncs the directory.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    let mut file = File::create(&aside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    match path.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Makes a flat directory whole or not at all: `make` fills one beside it, which gets its name once all of it is durable. What
/// an earlier attempt left is removed.
pub fn make_dir_whole(dir: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let aside = dir.with_extension("new");
    remove_dir_if_there(&aside)?;
    make(&aside)?;
    for entry in fs::read_dir(&aside)? {
        File::open(entry?.path())?.sync_all()?;
    }
    sync_dir(&aside)?;
    fs::rename(&aside, dir)?;
    match dir.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Removes a directory with all that it holds, if it exists.
pub fn remove_dir_if_there(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes `to` a copy of the flat directory `from`. Table files (`.sst`), which are never changed once written, are
/// hard-linked; everything else is copied. All of it is synced.
pub fn copy_or_link_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if !entry.file_type()?.is_file() {
            continue;
        }
        let target = to.join(entry.file_name());
        let is_table = entry.path().extension().is_some_and(|e| e == "sst");
        if !is_table || fs::hard_link(entry.path(), &target).is_err() {
            fs::copy(entry.path(), &target)?;
        }
        File::open(&target)?.sync_all()?;
    }
    sync_dir(to)
}
