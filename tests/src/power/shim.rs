//! Building the LD_PRELOAD library and telling a process to use it.

use crate::harness::target_tmp;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/shim/faultfs.c");

/// The library, compiled when it is first asked for. The C compiler is there: RocksDB needs it to be built.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let dir = target_tmp();
        let path = dir.join("libfaultfs.so");
        let newer = |a: &Path, b: &Path| {
            let time = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified());
            matches!((time(a), time(b)), (Ok(a), Ok(b)) if a > b)
        };
        if !newer(&path, Path::new(SOURCE)) {
            // Aside and renamed: tests of other processes may be at the same point.
            let aside = dir.join(format!("libfaultfs-{}.so", std::process::id()));
            let done = Command::new("cc")
                .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
                .args([&aside, Path::new(SOURCE)])
                .args(["-lpthread", "-ldl"])
                .output()
                .expect("the C compiler, which RocksDB needs too");
            assert!(done.status.success(), "faultfs.c: {}", String::from_utf8_lossy(&done.stderr));
            fs::rename(&aside, &path).expect("the library's place");
        }
        path
    })
}

/// Settings of the shim for one process.
#[derive(Debug, Clone)]
pub struct Shim {
    root: PathBuf,
    control: PathBuf,
    journal: Option<(PathBuf, u8)>,
}

impl Shim {
    /// Watches the files below `root`; `control` (made here) is where control files go.
    pub fn new(root: &Path, control: &Path) -> Self {
        fs::create_dir_all(control).expect("the directory of control files");
        Self { root: root.to_owned(), control: control.to_owned(), journal: None }
    }

    /// Records everything as done by `node`.
    #[must_use]
    pub fn journal(mut self, path: &Path, node: u8) -> Self {
        self.journal = Some((path.to_owned(), node));
        self
    }

    /// The environment that a process needs.
    pub fn env(&self) -> Vec<(String, String)> {
        let mut env = vec![
            ("LD_PRELOAD".to_owned(), library().display().to_string()),
            ("FAULTFS_ROOT".to_owned(), self.root.display().to_string()),
            ("FAULTFS_CONTROL".to_owned(), self.control.display().to_string()),
        ];
        if let Some((path, node)) = &self.journal {
            env.push(("FAULTFS_JOURNAL".to_owned(), path.display().to_string()));
            env.push(("FAULTFS_NODE".to_owned(), node.to_string()));
        }
        env
    }

    fn set(&self, name: &str, value: impl ToString) {
        let aside = self.control.join(format!("{name}.new"));
        fs::write(&aside, value.to_string()).expect("a control file");
        fs::rename(&aside, self.control.join(name)).expect("a control file");
    }

    /// Every sync from now on takes this long.
    pub fn delay_syncs_ms(&self, ms: u64) {
        self.set("delay_ms", ms);
    }

    /// Every sync from now on fails.
    pub fn fail_syncs(&self, errno: i32) {
        self.set("sync_errno", errno);
    }

    /// Every write from now on fails.
    pub fn fail_writes(&self, errno: i32) {
        self.set("write_errno", errno);
    }

    /// All is well again; syncs that wait end at once.
    pub fn heal(&self) {
        for name in ["delay_ms", "sync_errno", "write_errno"] {
            // It may never have been set.
            let _ = fs::remove_file(self.control.join(name));
        }
    }
}

/// A directory in memory, where hundreds of rebuilt disks cost nothing, or an ordinary one where there is none.
pub fn clean_tmpfs_dir(prefix: &str) -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = |dir: &Path| tempfile::Builder::new().prefix(prefix).tempdir_in(dir);
    builder(memory).or_else(|_| builder(&target_tmp())).expect("a directory")
}
