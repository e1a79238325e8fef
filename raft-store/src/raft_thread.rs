//! The thread that a replica's Raft runs on: openraft's tasks, the peers' connections and the timers share one
//! single-threaded runtime.
//!
//! What Raft does for one entry is a chain of a dozen short tasks that wake each other. On one thread none of these
//! wakings costs a context switch, and requests that keep the other threads busy can't delay a heartbeat. In return
//! nothing may block here: files and databases belong to other threads (`log-writer`, `state`, the blocking pool).

use std::io;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A running thread. Dropping it ends the thread, and with it every task on it, soon after.
pub struct RaftThread {
    handle: Handle,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl RaftThread {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().thread_name("raft-blocking").build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("raft".into()).spawn(move || {
            // Either way it is over: somebody asked, or nobody is left who could.
            let _ = runtime.block_on(ended);
        })?;
        Ok(Self { handle, end: Some(end), thread: Some(thread) })
    }

    /// To spawn on it.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the thread and waits until everything that ran on it is gone. Blocks; never call it on the thread itself.
    pub fn end(mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the raft thread panicked");
        }
    }
}
