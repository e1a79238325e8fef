//! What the guard hears from drones and tells them: the one that started it through its standard input and output, later
//! ones through a Unix socket in the backend's directory.
//!
//! ```text
//!   drone that started it ──stdin──▶ ┌───────┐ ◀──guard.sock── a later drone: Update…
//!                         ◀─stdout── │ guard │ ──▶ Hello, all reports so far, then each new one
//!                                    └───┬───┘
//!                                        └──▶ outcome: all reports, once nothing is left
//! ```
//!
//! Whoever has connected last commands; all before count no more. A later drone is told everything that was ever
//! reported, so that it learns of the backend's life as the first one did, also from the outcome of a guard that has ended.
//! No drone can hold up the guard: it never waits for one, and drops one that does not read. What connects must run as the
//! guard's user or root, in the guard's PID namespace, and not below the guard: so a backend cannot move its own deadline.
//! And no drone can move a deadline further ahead than a lease reaches.

use super::contain::log_line;
use super::{Arm, Hello, LINE_BYTES_MAX, PROTOCOL_VERSION, Report, Update};
use crate::clock::boot_ms;
use crate::processes;
use holdfast_wire::lease::EXPIRY_MS_MAX;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Name of the socket in the backend's directory.
pub const SOCKET: &str = "guard.sock";
/// Name of the file that says how the backend ended, in its directory.
pub const OUTCOME: &str = "outcome";
/// Reports that are kept for later drones; a life has fewer.
pub const REPORTS_MAX: usize = 32;

/// What was reported, and to whom. One for the process, which guards one backend.
struct Told {
    /// Lines.
    reports: Vec<String>,
    /// The later drone that commands now.
    drone: Option<UnixStream>,
    /// The backend's directory.
    dir: Option<PathBuf>,
}

static TOLD: Mutex<Told> = Mutex::new(Told { reports: Vec::new(), drone: None, dir: None });

fn told() -> MutexGuard<'static, Told> {
    TOLD.lock().unwrap_or_else(PoisonError::into_inner)
}

fn line(message: &impl serde::Serialize) -> Option<String> {
    let mut line = serde_json::to_string(message).ok()?;
    line.push('\n');
    Some(line)
}

/// Tells the drones, and whoever asks later. If none is there, nobody is told now.
pub(super) fn report(report: &Report) {
    let Some(line) = line(report) else { return };
    let mut told = told();
    if told.reports.len() < REPORTS_MAX {
        told.reports.push(line.clone());
    }
    if matches!(report, Report::Gone)
        && let Some(dir) = &told.dir
        && let Err(e) = write_outcome(dir, &told.reports)
    {
        log_line(&format!("the outcome is not written: {e}"));
    }
    let mut stdout = io::stdout();
    let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
    if let Some(drone) = &mut told.drone
        && drone.write_all(line.as_bytes()).is_err()
    {
        // It is gone, or does not read: its successor is told everything.
        told.drone = None;
    }
}

/// Written aside, so that it is there as a whole. Not synced: after a loss of power nothing of the backend is left.
fn write_outcome(dir: &Path, reports: &[String]) -> io::Result<()> {
    let aside = dir.join("outcome.new");
    fs::write(&aside, reports.concat())?;
    fs::rename(aside, dir.join(OUTCOME))
}

/// A path to the socket that is short enough, however long the directory's is: through a descriptor of the directory,
/// which has to stay open meanwhile.
pub(crate) fn socket_path(dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// Bytes, of which lines are taken.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn take(&mut self) -> Option<Vec<u8>> {
        let end = self.0.iter().position(|b| *b == b'\n')?;
        let mut line: Vec<u8> = self.0.drain(..=end).collect();
        line.pop();
        Some(line)
    }

    /// Adds what was read; an error if that is no line.
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(bytes);
        if self.0.len() > LINE_BYTES_MAX {
            return Err(io::Error::other("a line from the drone is too long"));
        }
        Ok(())
    }
}

/// What comes from drones.
pub(super) struct Input {
    /// Readable when anything below is.
    epoll: Epoll,
    stdin: Lines,
    /// The drone that started it is gone, has sent what is no line, or has a successor.
    stdin_ended: bool,
    listener: Option<UnixListener>,
    later: Option<(UnixStream, Lines)>,
    /// As a later drone is told; what is wanted by now.
    hello: Option<Hello>,
    /// The lease's expiry, as a drone has said it last.
    expiry_ms: u64,
    /// [`Report::Ready`] was reported.
    is_ready: bool,
}

impl Input {
    /// From the drone that started it.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // SAFETY: descriptor 0 stays open for the life of the guard.
        let stdin = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
        epoll.add(stdin, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(Self {
            epoll,
            stdin: Lines::default(),
            stdin_ended: false,
            listener: None,
            later: None,
            hello: None,
            expiry_ms: EXPIRY_MS_MAX,
            is_ready: false,
        })
    }

    /// An update as far as it counts.
    pub(super) fn checked(&mut self, update: Update) -> Update {
        self.expiry_ms = update.expiry_ms.unwrap_or(self.expiry_ms).min(EXPIRY_MS_MAX);
        update.within(self.expiry_ms, boot_ms())
    }

    /// Waits for the first line; none if the drone goes away before it.
    pub(super) fn first_line(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(line) = self.stdin.take() {
                return Some(line);
            }
            if self.stdin_ended {
                return None;
            }
            self.read_stdin();
        }
    }

    /// Lets later drones connect. Without that the guard works all the same; a later drone then ends the backend.
    pub(super) fn listen(&mut self, backend: &str, arm: &Arm) {
        let Some(dir) = arm.log.parent() else { return };
        told().dir = Some(dir.to_owned());
        self.hello = Some(Hello {
            version: PROTOCOL_VERSION,
            backend: backend.to_owned(),
            update: arm.update,
            container: arm.container.clone(),
        });
        let listen = || -> io::Result<UnixListener> {
            let dir = File::open(dir)?;
            let path = socket_path(&dir);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            self.epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
            Ok(listener)
        };
        match listen() {
            Ok(listener) => self.listener = Some(listener),
            Err(e) => log_line(&format!("no socket for later drones: {e}")),
        }
    }

    /// What drones have said since, without waiting.
    pub(super) fn updates(&mut self) -> Vec<Update> {
        let mut lines = Vec::new();
        while !self.stdin_ended && readable_now(libc::STDIN_FILENO) {
            self.read_stdin();
        }
        lines.extend(std::iter::from_fn(|| self.stdin.take()));
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            if let Err(e) = self.take_on(stream) {
                log_line(&format!("a later drone could not be greeted: {e}"));
            }
        }
        if let Some((stream, unread)) = &mut self.later {
            let open = read_all(stream, unread);
            lines.extend(std::iter::from_fn(|| unread.take()));
            if !open {
                self.leave();
            }
        }
        let read = |line: Vec<u8>| match serde_json::from_slice::<Update>(&line) {
            Ok(update) => Some(update),
            Err(e) => {
                log_line(&format!("unreadable line from the drone: {e}"));
                None
            }
        };
        let read: Vec<Update> = lines.into_iter().filter_map(read).collect();
        let updates: Vec<Update> = read.into_iter().map(|update| self.checked(update)).collect();
        if !self.is_ready && updates.iter().any(|update| update.ready) {
            self.is_ready = true;
            report(&Report::Ready);
        }
        if let (Some(hello), Some(latest)) = (&mut self.hello, updates.last()) {
            hello.update = *latest;
        }
        updates
    }

    /// What to wait for.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }

    /// A later drone commands from now on.
    fn take_on(&mut self, stream: UnixStream) -> io::Result<()> {
        check_peer(&stream)?;
        stream.set_nonblocking(true)?;
        let mut writer = stream.try_clone()?;
        let Some(hello) = self.hello.as_ref().and_then(line) else { return Ok(()) };
        let mut told = told();
        writer.write_all(format!("{hello}{}", told.reports.concat()).as_bytes())?;
        self.epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 2))?;
        told.drone = Some(writer);
        drop(told);
        self.end_stdin();
        if let Some((older, _)) = self.later.replace((stream, Lines::default())) {
            let _ = self.epoll.delete(older.as_fd());
        }
        log_line("a later drone has connected");
        Ok(())
    }

    fn leave(&mut self) {
        if let Some((stream, _)) = self.later.take() {
            let _ = self.epoll.delete(stream.as_fd());
            told().drone = None;
        }
    }

    fn end_stdin(&mut self) {
        if !self.stdin_ended {
            self.stdin_ended = true;
            // SAFETY: descriptor 0 stays open for the life of the guard.
            let _ = self.epoll.delete(unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) });
        }
    }

    fn read_stdin(&mut self) {
        let mut chunk = [0u8; 16 * 1024];
        // SAFETY: descriptor 0 stays open for the life of the guard.
        let stdin = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
        match nix::unistd::read(stdin, &mut chunk) {
            Ok(0) => self.end_stdin(),
            Ok(n) => {
                if let Err(e) = self.stdin.add(&chunk[..n]) {
                    log_line(&e.to_string());
                    self.end_stdin();
                }
            }
            Err(Errno::EINTR) => {}
            Err(_) => self.end_stdin(),
        }
    }
}

/// Refuses what may not command this guard.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let refuse = |problem: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    let (pid, uid) = peer_credentials(stream)?;
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        return refuse(format!("process {pid} runs as another user, {uid}"));
    }
    // 0 is a process that cannot be seen from here.
    let namespace = |process: String| fs::read_link(format!("/proc/{process}/ns/pid"));
    if pid <= 0 || namespace(pid.to_string())? != namespace("self".to_owned())? {
        return refuse(format!("process {pid} is in another PID namespace, as backends are"));
    }
    let own = nix::unistd::Pid::this().as_raw();
    let mut ancestor = pid;
    while ancestor > 1 {
        if ancestor == own {
            return refuse(format!("process {pid} was started by the backend"));
        }
        ancestor = processes::one(ancestor)?.map_or(0, |process| process.parent);
    }
    Ok(())
}

/// Process number, as seen from here, and user of the process that has connected.
fn peer_credentials(stream: &UnixStream) -> io::Result<(i32, u32)> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: an open socket, and a struct of that length to write to.
    let rc = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if rc == 0 { Ok((credentials.pid, credentials.uid)) } else { Err(io::Error::last_os_error()) }
}

/// Reads what is there; whether more may come.
fn read_all(stream: &mut UnixStream, lines: &mut Lines) -> bool {
    let mut chunk = [0u8; 16 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return false,
            Ok(n) => {
                if let Err(e) = lines.add(&chunk[..n]) {
                    log_line(&e.to_string());
                    return false;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

fn readable_now(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}
