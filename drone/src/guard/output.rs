//! The backend's output: read through a pipe, kept in two files of bounded size.
//!
//! ```text
//!   backend ──pipe──▶ guard's loop ──bounded buffer──▶ writer thread ──▶ output.log ──full──▶ output.log.1
//! ```
//!
//! The loop always empties the pipe and never touches the disk; the thread alone does. So a disk that is slow, full or
//! stuck blocks neither the backend nor the guard: what has no room in the buffer is dropped, the oldest first, and a line
//! says how much. Of what was written the last [`FILE_BYTES_MAX`] bytes at least are kept, and twice that at most.

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Largest file of a backend's output, in bytes. There are two: the current one and the one before.
pub const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Output that waits for the disk, in bytes.
const BUFFER_BYTES_MAX: usize = 256 * 1024;
/// Bytes read from the pipe at once.
const CHUNK_BYTES: usize = 16 * 1024;
/// Bytes read from the pipe between two looks at the clock.
const READ_BYTES_MAX: usize = 256 * 1024;
/// How long the end of a backend waits for its last output to be written.
const FLUSH_MAX: Duration = Duration::from_secs(1);
/// Stack of the writer thread, in bytes.
const STACK_BYTES: usize = 128 * 1024;

/// The reading end of a backend's output.
#[derive(Debug)]
pub(super) struct Output {
    pipe: io::PipeReader,
    /// All writers have gone.
    ended: bool,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// Bytes that had no room since the writer was here last.
    dropped: u64,
    /// The writer is at work on what it has taken.
    is_writing: bool,
    /// There is no writer: everything is dropped.
    has_no_writer: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// Adds output; the oldest makes room.
    fn push(&mut self, bytes: &[u8]) {
        if self.has_no_writer {
            return;
        }
        let surplus = (self.bytes.len() + bytes.len()).saturating_sub(BUFFER_BYTES_MAX);
        let old = surplus.min(self.bytes.len());
        self.bytes.drain(..old);
        let new = surplus - old;
        self.bytes.extend_from_slice(bytes.get(new..).unwrap_or_default());
        self.dropped += surplus as u64;
    }
}

impl Output {
    /// A pipe, and its writing end, for the backend.
    pub(super) fn new() -> io::Result<(Self, io::PipeWriter)> {
        let (pipe, writer) = io::pipe()?;
        // Only this end: a backend expects its own to block.
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { pipe, ended: false, shared: Arc::default() }, writer))
    }

    /// Starts the thread that writes to `log`. This process must have forked all that it has to fork before, and must
    /// not have a PID namespace waiting for its children, with which there are no threads.
    pub(super) fn write_to(&self, log: &Path) {
        let (shared, log) = (Arc::clone(&self.shared), Log::new(log.to_owned()));
        let write = move || write_all(&shared, log);
        if let Err(e) = thread::Builder::new().stack_size(STACK_BYTES).spawn(write) {
            super::contain::log_line(&format!(
                "no thread to write the backend's output, which is dropped: {e}"
            ));
            self.shared.lock().has_no_writer = true;
        }
    }

    /// What to poll for reading; negative, which poll(2) leaves out, once all writers have gone.
    pub(super) fn poll_fd(&self) -> RawFd {
        if self.ended { -1 } else { self.pipe.as_raw_fd() }
    }

    /// Takes what is there, up to a bound, without waiting.
    pub(super) fn take(&mut self) {
        let (mut taken, mut chunk) = (0, [0u8; CHUNK_BYTES]);
        while !self.ended && taken < READ_BYTES_MAX {
            match self.pipe.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(read) => {
                    taken += read;
                    self.shared.lock().push(chunk.get(..read).unwrap_or_default());
                    self.shared.changed.notify_all();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    super::contain::log_line(&format!("cannot read the backend's output: {e}"));
                    self.ended = true;
                }
            }
        }
    }

    /// Takes what is left, once nothing of the backend is, and waits for it to be written, but not for long.
    pub(super) fn finish(mut self) {
        let until = Instant::now() + FLUSH_MAX;
        // Something outside of the backend may hold the pipe, and even write to it.
        self.take();
        let mut buffer = self.shared.lock();
        while (buffer.is_writing || !buffer.bytes.is_empty()) && !buffer.has_no_writer {
            let Some(wait) = until.checked_duration_since(Instant::now()) else { return };
            buffer = self.shared.changed.wait_timeout(buffer, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The writer thread: writes for as long as the process lives.
fn write_all(shared: &Shared, mut log: Log) {
    loop {
        let mut buffer = shared.lock();
        buffer.is_writing = false;
        shared.changed.notify_all();
        while buffer.bytes.is_empty() {
            buffer = shared.changed.wait(buffer).unwrap_or_else(PoisonError::into_inner);
        }
        buffer.is_writing = true;
        let (bytes, dropped) = (std::mem::take(&mut buffer.bytes), std::mem::take(&mut buffer.dropped));
        drop(buffer);
        log.append(&bytes, dropped);
    }
}

/// The files.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: Option<File>,
    /// Bytes of output that were not written since the last that were.
    lost: u64,
}

/// Where the file before the current one is.
pub fn older(log: &Path) -> PathBuf {
    log.with_extension("log.1")
}

impl Log {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, lost: 0 }
    }

    fn append(&mut self, bytes: &[u8], dropped: u64) {
        self.lost += dropped;
        let mut written = 0;
        let result = self.try_append(bytes, &mut written);
        if result.is_err() {
            self.lost += (bytes.len() - written) as u64;
            // It may have been removed, or be on a file system that is back.
            self.file = None;
        }
    }

    fn try_append(&mut self, bytes: &[u8], written: &mut usize) -> io::Result<()> {
        if self.lost > 0 {
            let note = format!(
                "[holdfast: {} bytes of output were lost here: the disk was slow or full]\n",
                self.lost
            );
            self.write(note.as_bytes())?;
            self.lost = 0;
        }
        while let Some(rest) = bytes.get(*written..).filter(|rest| !rest.is_empty()) {
            *written += self.write(rest)?;
        }
        Ok(())
    }

    /// Writes the first part of this, as much as the current file takes, at the end of a line if possible.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => open(OpenOptions::new().create(true).append(true), &self.path)?,
        };
        // The drone may have cut it meanwhile.
        let room = FILE_BYTES_MAX.saturating_sub(file.metadata()?.len());
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let mut part = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        if part.len() < bytes.len() {
            if let Some(line_end) = part.iter().rposition(|byte| *byte == b'\n') {
                part = part.get(..=line_end).unwrap_or_default();
            }
            file.write_all(part)?;
            self.file = Some(self.rotate(file)?);
            return Ok(part.len());
        }
        file.write_all(part)?;
        self.file = Some(file);
        Ok(part.len())
    }

    /// Begins a new file. The path leads to a file at all times, so that a reader can follow.
    fn rotate(&self, full: File) -> io::Result<File> {
        let (older, new) = (older(&self.path), self.path.with_extension("log.new"));
        let rotated = || -> io::Result<File> {
            match fs::remove_file(&older) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let file = open(OpenOptions::new().create(true).append(true).truncate(false), &new)?;
            if fs::hard_link(&self.path, &older).is_err() {
                // A file system without links: the path is missing for a moment.
                fs::rename(&self.path, &older)?;
            }
            fs::rename(&new, &self.path)?;
            Ok(file)
        };
        rotated().or_else(|_| {
            // Bounded all the same.
            full.set_len(0)?;
            Ok(full)
        })
    }
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// For the backend, twice: its standard output and error.
pub(super) fn both(writer: io::PipeWriter) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok((OwnedFd::from(writer.try_clone()?), OwnedFd::from(writer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_bounded_whole_lines_and_hold_the_last_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut log = Log::new(path.clone());
        let line = |n: usize| format!("{n:0>1023}\n").into_bytes();
        let lines = 3 * usize::try_from(FILE_BYTES_MAX).unwrap() / 1_024 + 17;
        for n in 0..lines {
            log.append(&line(n), 0);
        }
        let text = [fs::read(older(&path)).unwrap(), fs::read(&path).unwrap()].concat();
        assert!(text.len() as u64 >= FILE_BYTES_MAX && text.len() as u64 <= 2 * FILE_BYTES_MAX);
        assert_eq!(text.len() % 1_024, 0, "whole lines");
        for (at, found) in text.chunks(1_024).rev().enumerate() {
            assert_eq!(found, line(lines - 1 - at));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_has_no_room_is_dropped_the_oldest_first_and_that_is_said() {
        let mut buffer = Buffer::default();
        buffer.push(b"old");
        buffer.push(&vec![b'x'; BUFFER_BYTES_MAX - 1]);
        assert_eq!((buffer.bytes.len(), buffer.dropped, buffer.bytes[0]), (BUFFER_BYTES_MAX, 2, b'd'));
        buffer.push(&vec![b'y'; BUFFER_BYTES_MAX + 5]);
        assert_eq!((buffer.bytes.len(), buffer.dropped), (BUFFER_BYTES_MAX, 2 + BUFFER_BYTES_MAX as u64 + 5));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut log = Log::new(path.clone());
        log.append(b"last words\n", buffer.dropped);
        let text = fs::read_to_string(path).unwrap();
        assert!(text.starts_with("[holdfast: 262151 bytes of output were lost here"), "{text}");
        assert!(text.ends_with("]\nlast words\n"), "{text}");
    }

    #[test]
    fn a_log_that_cannot_be_written_loses_output_and_goes_on_when_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/output.log");
        let mut log = Log::new(path.clone());
        log.append(b"lost\n", 0);
        fs::create_dir(path.parent().unwrap()).unwrap();
        log.append(b"kept\n", 0);
        let text = fs::read_to_string(path).unwrap();
        assert!(text.starts_with("[holdfast: 5 bytes") && text.ends_with("kept\n"), "{text}");
    }
}
