//! One node's disk: what is sure, and what may be lost.

use super::journal::{Op, Record};
use rand::Rng;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Size of a page: what of a page reaches the disk is its content at some moment, never a mixture.
const PAGE: usize = 4096;

type DirId = usize;
type FileId = usize;
const ROOT: DirId = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Dir(DirId),
    File(FileId),
}

/// Sets names of directories, all or none of them.
#[derive(Debug, Clone)]
struct NameOp {
    sets: Vec<(DirId, String, Option<Entry>)>,
    /// Directories that were not synced since.
    unsynced: Vec<DirId>,
    at: usize,
}

#[derive(Debug, Clone)]
enum FileOp {
    Write { offset: usize, data: Range<usize> },
    Truncate { size: usize },
}

#[derive(Debug, Clone, Default)]
struct FileModel {
    /// As of the last sync.
    sure: Vec<u8>,
    /// Since then, with the position in the journal.
    unsynced: Vec<(usize, FileOp)>,
}

type Names = HashMap<DirId, BTreeMap<String, Entry>>;

/// What happens to that which was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// All of it is lost.
    Everything,
    /// Nothing is: the disk was about to be synced, or this was a `kill -9`.
    Nothing,
    /// Of each file some prefix of the writes survives, the last one torn; of the names a prefix.
    Torn,
    /// Each page and each name by itself.
    Scattered,
    /// One of the above for each file and for the names.
    Mixed,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Disk {
    bytes: Arc<Vec<u8>>,
    files: Vec<FileModel>,
    by_ino: HashMap<u64, FileId>,
    dirs: usize,
    live: Names,
    sure: Names,
    pending: Vec<NameOp>,
    syncs: HashMap<u64, usize>,
    at: usize,
    /// Syncs of files that have ended well.
    pub file_syncs: u64,
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl Disk {
    /// An empty disk; `bytes` are the journal's.
    pub fn new(bytes: Arc<Vec<u8>>) -> Self {
        let root: Names = HashMap::from([(ROOT, BTreeMap::new())]);
        Self {
            bytes,
            files: Vec::new(),
            by_ino: HashMap::new(),
            dirs: 1,
            live: root.clone(),
            sure: root,
            pending: Vec::new(),
            syncs: HashMap::new(),
            at: 0,
            file_syncs: 0,
        }
    }

    fn dir(&self, path: &str) -> DirId {
        path.split('/').filter(|part| !part.is_empty()).fold(ROOT, |dir, part| {
            match self.live[&dir].get(part) {
                Some(Entry::Dir(dir)) => *dir,
                other => panic!("{path:?}: {part:?} is {other:?}, not a directory"),
            }
        })
    }

    fn place(&self, path: &str) -> (DirId, String) {
        let (dir, name) = split(path);
        (self.dir(dir), name.to_owned())
    }

    fn entry(&self, path: &str) -> Option<Entry> {
        let (dir, name) = self.place(path);
        self.live[&dir].get(&name).copied()
    }

    fn change_names(&mut self, sets: Vec<(DirId, String, Option<Entry>)>) {
        set_names(&mut self.live, &sets);
        let mut unsynced: Vec<DirId> = sets.iter().map(|(dir, ..)| *dir).collect();
        unsynced.dedup();
        self.pending.push(NameOp { sets, unsynced, at: self.at });
    }

    fn set_name(&mut self, path: &str, entry: Option<Entry>) {
        let (dir, name) = self.place(path);
        self.change_names(vec![(dir, name, entry)]);
    }

    fn file(&mut self, ino: u64) -> &mut FileModel {
        let id = *self.by_ino.get(&ino).unwrap_or_else(|| panic!("inode {ino} was never created"));
        &mut self.files[id]
    }

    /// Takes a record of this node's.
    pub fn take(&mut self, record: &Record) {
        self.at += 1;
        let at = self.at;
        match &record.op {
            Op::Create { ino, path } => {
                let id = self.files.len();
                self.files.push(FileModel::default());
                self.by_ino.insert(*ino, id);
                self.set_name(path, Some(Entry::File(id)));
            }
            Op::Truncate { ino, size } => {
                let size = usize::try_from(*size).expect("a size");
                self.file(*ino).unsynced.push((at, FileOp::Truncate { size }));
            }
            Op::Write { ino, offset, data } => {
                let offset = usize::try_from(*offset).expect("an offset");
                self.file(*ino).unsynced.push((at, FileOp::Write { offset, data: data.clone() }));
            }
            Op::SyncBegin { id, .. } | Op::DirSyncBegin { id, .. } => {
                self.syncs.insert(*id, at);
            }
            Op::SyncEnd { ino, id } => {
                self.file_syncs += 1;
                let began = self.syncs.remove(id).expect("a sync that began");
                let bytes = Arc::clone(&self.bytes);
                let file = self.file(*ino);
                let sure = file.unsynced.iter().take_while(|(at, _)| *at < began).count();
                for (_, op) in file.unsynced.drain(..sure) {
                    apply(&mut file.sure, &op, &bytes, usize::MAX);
                }
            }
            Op::DirSyncEnd { path, id } => {
                let began = self.syncs.remove(id).expect("a sync that began");
                let dir = self.dir(path);
                for op in self.pending.iter_mut().filter(|op| op.at < began) {
                    op.unsynced.retain(|unsynced| *unsynced != dir);
                }
                for op in self.pending.extract_if(.., |op| op.unsynced.is_empty()) {
                    set_names(&mut self.sure, &op.sets);
                }
            }
            Op::Rename { from, to } => {
                let (from, to) = (self.place(from), self.place(to));
                let entry = self.live[&from.0].get(&from.1).copied();
                assert!(entry.is_some(), "{from:?} is renamed and is not there");
                self.change_names(vec![(from.0, from.1, None), (to.0, to.1, entry)]);
            }
            Op::Link { from, to } => {
                let entry = self.entry(from);
                assert!(entry.is_some(), "{from} is linked and is not there");
                self.set_name(to, entry);
            }
            Op::Unlink { path } | Op::RemoveDir { path } => self.set_name(path, None),
            Op::MakeDir { path } => {
                let id = self.dirs;
                self.dirs += 1;
                self.live.insert(id, BTreeMap::new());
                self.sure.insert(id, BTreeMap::new());
                self.set_name(path, Some(Entry::Dir(id)));
            }
            Op::Mark(_) => {}
        }
    }

    /// Writes what is left after a power loss to `to`, an empty directory.
    pub fn rebuild(&self, to: &Path, loss: Loss, rng: &mut impl Rng) {
        let mut names = self.sure.clone();
        match pick(loss, rng) {
            Loss::Everything => {}
            Loss::Torn => {
                let survive = rng.random_range(0..=self.pending.len());
                self.pending[..survive].iter().for_each(|op| set_names(&mut names, &op.sets));
            }
            Loss::Scattered => {
                for op in &self.pending {
                    if rng.random() {
                        set_names(&mut names, &op.sets);
                    }
                }
            }
            Loss::Nothing | Loss::Mixed => {
                self.pending.iter().for_each(|op| set_names(&mut names, &op.sets));
            }
        }
        self.write_dir(&names, ROOT, to, loss, rng);
    }

    fn write_dir(&self, names: &Names, dir: DirId, to: &Path, loss: Loss, rng: &mut impl Rng) {
        fs::create_dir_all(to).expect("a directory");
        for (name, entry) in &names[&dir] {
            match entry {
                Entry::Dir(dir) => self.write_dir(names, *dir, &to.join(name), loss, rng),
                Entry::File(file) => {
                    let content = self.content(&self.files[*file], pick(loss, rng), rng);
                    fs::write(to.join(name), content).expect("a file");
                }
            }
        }
    }

    fn content(&self, file: &FileModel, loss: Loss, rng: &mut impl Rng) -> Vec<u8> {
        let mut content = file.sure.clone();
        let count = file.unsynced.len();
        let ops = || file.unsynced.iter().map(|(_, op)| op);
        match loss {
            Loss::Everything => {}
            Loss::Torn if count > 0 => {
                let whole = rng.random_range(0..count);
                ops().take(whole).for_each(|op| apply(&mut content, op, &self.bytes, usize::MAX));
                let torn = &file.unsynced[whole].1;
                if let FileOp::Write { data, .. } = torn {
                    apply(&mut content, torn, &self.bytes, rng.random_range(0..=data.len()));
                }
            }
            Loss::Scattered => {
                // Each page holds what it held after some number of the changes, and so does the length.
                let mut size = content.len();
                let size_after = rng.random_range(0..=count);
                let mut scratch = content.clone();
                let mut until: HashMap<usize, usize> = HashMap::new();
                for (at, op) in ops().enumerate() {
                    apply(&mut scratch, op, &self.bytes, usize::MAX);
                    if at < size_after {
                        size = scratch.len();
                    }
                    let touched = match op {
                        FileOp::Write { offset, data } => *offset..offset + data.len(),
                        FileOp::Truncate { size } => *size..(*size).max(content.len()),
                    };
                    if content.len() < scratch.len() {
                        content.resize(scratch.len(), 0);
                    }
                    for page in touched.start / PAGE..touched.end.div_ceil(PAGE) {
                        let until = *until.entry(page).or_insert_with(|| rng.random_range(0..=count));
                        if at < until {
                            let range = page * PAGE..((page + 1) * PAGE).min(scratch.len());
                            if range.start < range.end {
                                content[range.clone()].copy_from_slice(&scratch[range]);
                            }
                        }
                    }
                }
                content.resize(size, 0);
            }
            Loss::Torn | Loss::Nothing | Loss::Mixed => {
                ops().for_each(|op| apply(&mut content, op, &self.bytes, usize::MAX));
            }
        }
        content
    }
}

fn pick(loss: Loss, rng: &mut impl Rng) -> Loss {
    match loss {
        Loss::Mixed => [Loss::Everything, Loss::Nothing, Loss::Torn, Loss::Scattered][rng.random_range(0..4)],
        other => other,
    }
}

fn set_names(names: &mut Names, sets: &[(DirId, String, Option<Entry>)]) {
    for (dir, name, entry) in sets {
        let Some(dir) = names.get_mut(dir) else { continue };
        match entry {
            Some(entry) => dir.insert(name.clone(), *entry),
            None => dir.remove(name),
        };
    }
}

/// Makes a change, of a write only the first `bytes_max` bytes.
fn apply(content: &mut Vec<u8>, op: &FileOp, bytes: &[u8], bytes_max: usize) {
    match op {
        FileOp::Truncate { size } => content.resize(*size, 0),
        FileOp::Write { offset, data } => {
            let len = data.len().min(bytes_max);
            let end = offset + len;
            if content.len() < end {
                content.resize(end, 0);
            }
            content[*offset..end].copy_from_slice(&bytes[data.start..data.start + len]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn run(ops: Vec<Op>, loss: Loss, seed: u64) -> BTreeMap<String, Vec<u8>> {
        let bytes = Arc::new(b"abcdefgh".to_vec());
        let mut disk = Disk::new(bytes);
        ops.into_iter().for_each(|op| disk.take(&Record { node: 1, op }));
        let dir = tempfile::tempdir().unwrap();
        disk.rebuild(dir.path(), loss, &mut StdRng::seed_from_u64(seed));
        fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
            .collect()
    }

    fn create(ino: u64, path: &str) -> Op {
        Op::Create { ino, path: path.into() }
    }

    fn write(ino: u64, offset: u64, data: Range<usize>) -> Op {
        Op::Write { ino, offset, data }
    }

    fn sync(ino: u64) -> [Op; 2] {
        [Op::SyncBegin { ino, id: 1 }, Op::SyncEnd { ino, id: 1 }]
    }

    fn sync_dir() -> [Op; 2] {
        [Op::DirSyncBegin { path: String::new(), id: 2 }, Op::DirSyncEnd { path: String::new(), id: 2 }]
    }

    #[test]
    fn only_what_was_synced_before_the_sync_began_is_sure() {
        let mut ops = vec![create(1, "f"), write(1, 0, 0..4)];
        let [begin, end] = sync(1);
        ops.extend([begin, write(1, 4, 4..8), end]);
        assert!(run(ops.clone(), Loss::Everything, 0).is_empty(), "its name was not synced");
        assert_eq!(run(ops.clone(), Loss::Nothing, 0)["f"], b"abcdefgh");
        ops.extend(sync_dir());
        assert_eq!(run(ops, Loss::Everything, 0)["f"], b"abcd");
    }

    #[test]
    fn a_rename_is_there_or_not_and_never_half() {
        let mut ops = vec![create(1, "new"), write(1, 0, 0..4)];
        ops.extend(sync(1));
        ops.extend(sync_dir());
        ops.push(Op::Rename { from: "new".into(), to: "f".into() });
        let seen: std::collections::BTreeSet<Vec<String>> =
            (0..32).map(|seed| run(ops.clone(), Loss::Scattered, seed).into_keys().collect()).collect();
        assert_eq!(seen, [vec!["f".to_owned()], vec!["new".to_owned()]].into());
    }

    #[test]
    fn a_torn_write_ends_anywhere_and_scattered_pages_leave_holes() {
        let mut ops = vec![create(1, "f")];
        ops.extend(sync_dir());
        ops.extend([write(1, 0, 0..4), write(1, PAGE as u64, 4..8)]);
        let lengths: std::collections::BTreeSet<usize> =
            (0..200).map(|seed| run(ops.clone(), Loss::Torn, seed)["f"].len()).collect();
        assert!(lengths.contains(&0) && lengths.contains(&3) && lengths.contains(&(PAGE + 2)), "{lengths:?}");
        let hole = (0..200).any(|seed| {
            let content = &run(ops.clone(), Loss::Scattered, seed)["f"];
            content.len() == PAGE + 4 && content[..4] == [0; 4] && content[PAGE..] == *b"efgh"
        });
        assert!(hole, "the second page never survived without the first");
    }
}
