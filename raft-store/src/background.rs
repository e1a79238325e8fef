//! Threads that look after a replica now and then, and must have let go of its files when it has stopped.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// A running thread. It is told to end when this is dropped; [`Background::end`] waits for that too.
pub(crate) struct Background {
    /// Never sent on: the thread sees its end.
    running: Sender<()>,
    thread: JoinHandle<()>,
}

/// Tells the thread when to end.
pub(crate) struct Ended(Receiver<()>);

impl Ended {
    /// Waits; whether to go on then.
    pub(crate) fn pause(&self, duration: Duration) -> bool {
        self.0.recv_timeout(duration) == Err(RecvTimeoutError::Timeout)
    }
}

impl Background {
    /// Starts a thread.
    pub(crate) fn start(name: &str, run: impl FnOnce(&Ended) + Send + 'static) -> io::Result<Self> {
        let (running, ended) = channel();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&Ended(ended)))?;
        Ok(Self { running, thread })
    }

    /// Waits until the thread has ended. Blocks for as long as it waits for the disk.
    pub(crate) fn end(self) {
        drop(self.running);
        if self.thread.join().is_err() {
            tracing::warn!("a background thread has panicked");
        }
    }
}
