//! The drone sockets of this controller, and whether they live.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long a drone may take to answer a ping before another one gets its name.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Probes of one session that can be under way.
const PROBES_MAX: usize = 16;

/// Answered when the drone says something.
pub type Probe = oneshot::Sender<()>;
type Live = Arc<Mutex<HashMap<String, mpsc::Sender<Probe>>>>;

fn lock(live: &Live) -> MutexGuard<'_, HashMap<String, mpsc::Sender<Probe>>> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
#[derive(Debug, Default)]
pub struct Registry {
    live: Live,
}

/// A session's place; it leaves when this is dropped.
#[derive(Debug)]
pub struct Place {
    live: Live,
    session: String,
    /// Probes to answer.
    pub probes: mpsc::Receiver<Probe>,
}

impl Registry {
    /// Enters a session.
    pub fn enter(&self, session: &str) -> Place {
        let (sender, probes) = mpsc::channel(PROBES_MAX);
        lock(&self.live).insert(session.to_owned(), sender);
        Place { live: Arc::clone(&self.live), session: session.to_owned(), probes }
    }

    /// Whether that session is a socket of this controller whose drone answers a ping in time.
    pub async fn answers(&self, session: &str) -> bool {
        let Some(sender) = lock(&self.live).get(session).cloned() else { return false };
        let (probe, answer) = oneshot::channel();
        if sender.try_send(probe).is_err() {
            return false;
        }
        matches!(tokio::time::timeout(PROBE_TIMEOUT, answer).await, Ok(Ok(())))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.live).remove(&self.session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_answers_a_probe_or_counts_as_dead() {
        let registry = Registry::default();
        assert!(!registry.answers("s").await, "unknown");
        let mut place = registry.enter("s");
        let answering = async {
            if let Some(probe) = place.probes.recv().await {
                let _ = probe.send(());
            }
        };
        assert!(tokio::join!(registry.answers("s"), answering).0);
        assert!(!registry.answers("s").await, "silent");
        drop(place);
        assert!(lock(&registry.live).is_empty());
    }
}
