//! Log lines on standard error that never harm the program that writes them.
//!
//! A log line that cannot be written is dropped: a full disk, a closed pipe and a reader that stopped reading neither end
//! the process nor block the thread that logs (invariant 9). After a gap, one line says how many bytes were dropped.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Bytes written at once. A pipe that poll(2) calls writable takes this many without blocking (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4_096;
/// How long a slow reader may delay a line, in milliseconds; nothing while it is behind already.
const WAIT_MS_MAX: libc::c_int = 50;

/// Bytes that were dropped since the last line that was written.
static DROPPED_BYTES: AtomicU64 = AtomicU64::new(0);

/// Standard error. Writing always succeeds; what cannot be written at once is dropped.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One line at a time, also because two threads could otherwise both find room for one chunk.
        let mut stderr = io::stderr().lock();
        let behind = DROPPED_BYTES.load(Ordering::Relaxed);
        let mut rest = bytes;
        if behind > 0 && is_writable(0) {
            let note = format!("({behind} bytes of log were dropped: standard error was full or slow)\n");
            if stderr.write_all(note.as_bytes()).is_ok() {
                DROPPED_BYTES.store(0, Ordering::Relaxed);
            }
        }
        while let Some(chunk) = rest.get(..CHUNK_BYTES.min(rest.len())).filter(|chunk| !chunk.is_empty()) {
            let behind = DROPPED_BYTES.load(Ordering::Relaxed) > 0;
            if !is_writable(if behind { 0 } else { WAIT_MS_MAX }) || stderr.write_all(chunk).is_err() {
                DROPPED_BYTES.fetch_add(rest.len() as u64, Ordering::Relaxed);
                break;
            }
            rest = rest.get(chunk.len()..).unwrap_or_default();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Self;

    fn make_writer(&'a self) -> Self::Writer {
        Self
    }
}

/// Whether standard error takes a chunk without blocking, by the time that `wait_ms` has passed.
fn is_writable(wait_ms: libc::c_int) -> bool {
    let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, wait_ms) > 0 && poll.revents & libc::POLLOUT != 0 }
}

/// Sends the program's log to standard error. Only the first call has an effect.
pub fn start(filter: EnvFilter) {
    // An error says that there is a log already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(Stderr)
        // The subscriber would otherwise report its own errors with `eprintln!`, which panics.
        .log_internal_errors(false)
        .try_init();
}

/// Writes one line to standard error, beside the log: for what is said before there is one.
pub fn line(text: &str) {
    // It cannot fail.
    let _ = Stderr.write(format!("{text}\n").as_bytes());
}
