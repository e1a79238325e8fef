//! Connections to the guards that earlier drones have started.

use crate::data_dir::BackendsDir;
use crate::guard::peer::socket_path;
use crate::guard::{Hello, LINE_BYTES_MAX};
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tracing::debug;

/// Time between two attempts to reach a guard that lives and does not listen: at first, and at most. It doubles.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);

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
        // SAFETY: the descriptor is new and owned by no one else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects to a backend's guard, which takes commands from the latest connection.
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

/// Reaches a backend's guard, for as long as that takes: one that is stopped or slow holds the deadline meanwhile. `None`
/// once the guard has ended.
pub async fn reach(dirs: &BackendsDir, backend: &str) -> Option<Link> {
    let mut pause = RETRY_MIN;
    loop {
        match connect(dirs, backend).await {
            Ok(link) => return Some(link),
            Err(e) => debug!(backend, "its guard does not greet: {e}"),
        }
        let (looked_at, id) = (dirs.clone(), backend.to_owned());
        // A look that failed has not found the guard gone.
        let lives = tokio::task::spawn_blocking(move || looked_at.is_guarded(&id)).await.unwrap_or(true);
        if !lives {
            return None;
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(RETRY_MAX);
    }
}
