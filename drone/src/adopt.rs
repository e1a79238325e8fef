//! What earlier drones on the same data directory have left, found before this one takes on anything.
//!
//! ```text
//!   journal, lock, outcome ──judge (pure)──▶ guarded ──connect──▶ adopted: goes on as if nothing had been
//!                                            ended, other boot ─▶ reported
//!                                            unguarded ─────────▶ ended, then reported
//!                                            damaged ───────────▶ ended before anything else; its key expires
//! ```

use crate::data_dir::BackendsDir;
use crate::guard::peer::socket_path;
use crate::guard::{Hello, LINE_BYTES_MAX, Report};
use crate::journal::{Fate, Record, judge};
use crate::runtime::Runtime;
use futures::StreamExt;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tracing::{info, warn};

/// How long a guard may take to say what it guards. One that is stopped, or that is none, does not.
pub const HELLO_WAIT: Duration = Duration::from_secs(2);

/// Guards that are asked at once.
const CONNECTS_MAX: usize = 64;

/// A backend of an earlier drone.
#[derive(Debug)]
pub enum Left {
    /// It runs, or is ending, under a guard that listens.
    Guarded(Record, Box<Link>),
    /// It has ended, and this is what its guard reported.
    Ended(Record, Vec<Report>),
    /// It ended with the machine.
    OtherBoot(Record),
    /// Something of it may be left; it has to be ended.
    Unguarded(Record),
}

/// A connection to a guard of an earlier drone.
#[derive(Debug)]
pub struct Link {
    /// Its reports, from the first on.
    pub reader: BufReader<OwnedReadHalf>,
    /// For updates.
    pub writer: OwnedWriteHalf,
    /// Its process.
    pub process: AdoptedProcess,
    /// What it said first.
    pub hello: Hello,
}

/// A process that is no child of this one, and cannot come to mean another one.
#[derive(Debug)]
pub struct AdoptedProcess {
    /// Readable once it has ended.
    handle: AsyncFd<OwnedFd>,
}

impl Left {
    /// What is durably known of it.
    pub fn record(&self) -> &Record {
        match self {
            Self::Guarded(record, _) | Self::Ended(record, _) => record,
            Self::OtherBoot(record) | Self::Unguarded(record) => record,
        }
    }
}

impl AdoptedProcess {
    fn new(pid: i32) -> io::Result<Self> {
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let handle = unsafe { AsyncFd::register_with_interest(pidfd(pid)?, Interest::READABLE) }?;
        Ok(Self { handle })
    }

    /// SIGKILL; one that has ended already is fine.
    pub fn kill(&self) -> io::Result<()> {
        let (fd, no_info) = (self.handle.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: an open descriptor, a signal, no information, no flags.
        let rc = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0u32) };
        if rc == 0 || Errno::last() == Errno::ESRCH { Ok(()) } else { Err(Errno::last().into()) }
    }

    /// Waits for its end.
    pub async fn ended(&self) -> io::Result<()> {
        self.handle.readable().await.map(drop)
    }
}

/// A handle on a process that cannot come to mean another one.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) };
    match i32::try_from(fd) {
        // SAFETY: the descriptor is new and nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects to a backend's guard and becomes the one who commands it.
async fn connect(dirs: &BackendsDir, backend: &str) -> io::Result<Link> {
    let dir = dirs.open_dir(backend)?;
    let stream = UnixStream::connect(socket_path(&dir)).await?;
    let pid = stream.peer_cred()?.pid().ok_or_else(|| io::Error::other("it has no process number"))?;
    // Before its first word: it lives then, so the number means it.
    let process = AdoptedProcess::new(pid)?;
    let (reader, writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut first = Vec::new();
    (&mut reader).take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut first).await?;
    let hello: Hello = serde_json::from_slice(&first).map_err(io::Error::other)?;
    if hello.backend != backend {
        return Err(io::Error::other(format!("it guards {}", hello.backend)));
    }
    Ok(Link { reader, writer, process, hello })
}

/// Takes a guarded backend on; if its guard cannot be talked to, and has not ended meanwhile, it will have to be ended.
async fn take_on(dirs: &BackendsDir, id: &str, record: Record, boot_id: &str) -> Left {
    let problem = match tokio::time::timeout(HELLO_WAIT, connect(dirs, id)).await {
        Ok(Ok(link)) => {
            info!(backend = id, key = record.key.name, token = record.token, "adopted");
            return Left::Guarded(record, Box::new(link));
        }
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("no answer within {HELLO_WAIT:?}"),
    };
    match dirs.find(id).map(|found| judge(id, &found, boot_id)) {
        Ok(Some(Fate::Ended(record, reports))) => Left::Ended(record, reports),
        _ => {
            warn!(backend = id, "its guard cannot be reached: {problem}; ending it");
            Left::Unguarded(record)
        }
    }
}

/// Finds what is left. What nobody knows is ended before this returns.
pub async fn find(dirs: &BackendsDir, runtime: &dyn Runtime, boot_id: &str) -> io::Result<Vec<Left>> {
    let scanned = dirs.clone();
    let all = tokio::task::spawn_blocking(move || scanned.scan()).await.map_err(io::Error::other)??;
    let (mut left, mut guarded) = (Vec::new(), Vec::new());
    for (id, found) in all {
        match judge(&id, &found, boot_id) {
            None => {}
            Some(Fate::Damaged(damage)) => {
                warn!(backend = id, "its journal cannot be used: {damage}; ending whatever is left of it");
                runtime.end_left(id.clone()).await;
                dirs.remove_journal(&id)?;
            }
            Some(Fate::Guarded(record)) => guarded.push((id, record)),
            Some(Fate::Ended(record, reports)) => left.push(Left::Ended(record, reports)),
            Some(Fate::OtherBoot(record)) => left.push(Left::OtherBoot(record)),
            Some(Fate::Unguarded(record)) => left.push(Left::Unguarded(record)),
        }
    }
    let taken_on =
        guarded.into_iter().map(|(id, record)| async move { take_on(dirs, &id, record, boot_id).await });
    let mut taken_on = futures::stream::iter(taken_on).buffer_unordered(CONNECTS_MAX);
    while let Some(one) = taken_on.next().await {
        left.push(one);
    }
    Ok(left)
}
