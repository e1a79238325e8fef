//! Wakes those who wait for something in the applied state.
//!
//! The store tells the effects of every entry. If each of thousands of drone sessions and waiting connects listened to
//! all of them, every entry would wake everybody; the hub wakes only whom it concerns, and so nobody at all for most
//! entries on a follower. The store's thread does that itself: it takes one lock, which nobody holds for long.
//!
//! Invariant: whoever takes a [`Watch`] before it looks at the state misses no change after that look. If the whole
//! state was replaced, everybody is woken.

use holdfast_core::outcome::Effect;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Something that can change.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Topic {
    /// A drone's pending actions or session.
    Drone(i32),
    /// A backend's state.
    Backend(String),
    /// A key that may have become free.
    Key {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
    },
}

impl Topic {
    fn of(effect: &Effect) -> Option<Self> {
        match effect {
            Effect::Actions { drone_id } | Effect::Session { drone_id, .. } => Some(Self::Drone(*drone_id)),
            Effect::Backend { backend_id } => Some(Self::Backend(backend_id.clone())),
            Effect::KeyFreed { namespace, name } => {
                Some(Self::Key { namespace: namespace.clone(), name: name.clone() })
            }
            Effect::Formed | Effect::Everything => None,
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Hub {
    topics: Mutex<HashMap<Topic, watch::Sender<()>>>,
}

impl Hub {
    fn topics(&self) -> MutexGuard<'_, HashMap<Topic, watch::Sender<()>>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to watch. Look at the state after this, not before.
    pub fn watch(self: &Arc<Self>, topic: Topic) -> Watch {
        let receiver =
            self.topics().entry(topic.clone()).or_insert_with(|| watch::Sender::new(())).subscribe();
        Watch { hub: Arc::clone(self), topic, receiver }
    }

    /// Whether anybody watches.
    pub fn is_watched(&self, topic: &Topic) -> bool {
        self.topics().contains_key(topic)
    }

    /// Wakes whom these effects concern.
    pub fn wake(&self, effects: &[Effect]) {
        if effects.contains(&Effect::Everything) {
            return self.wake_all();
        }
        let topics = self.topics();
        if topics.is_empty() {
            return;
        }
        for topic in effects.iter().filter_map(Topic::of) {
            if let Some(sender) = topics.get(&topic) {
                sender.send_replace(());
            }
        }
    }

    fn wake_all(&self) {
        for sender in self.topics().values() {
            sender.send_replace(());
        }
    }
}

/// A running watch on one topic.
#[derive(Debug)]
pub struct Watch {
    hub: Arc<Hub>,
    topic: Topic,
    receiver: watch::Receiver<()>,
}

impl Watch {
    /// Waits for a change since the watch began or since the last one that was seen.
    pub async fn changed(&mut self) {
        if self.receiver.changed().await.is_err() {
            // The sender lives as long as its receivers do; if that were ever wrong, waiting beats spinning.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut topics = self.hub.topics();
        // This receiver still counts. Nobody subscribes meanwhile, because that needs the lock.
        if topics.get(&self.topic).is_some_and(|sender| sender.receiver_count() <= 1) {
            topics.remove(&self.topic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn only_whom_it_concerns_is_woken_and_nothing_is_left_behind() {
        let hub = Arc::new(Hub::default());
        let mut one = hub.watch(Topic::Drone(1));
        let mut two = hub.watch(Topic::Drone(2));
        hub.wake(&[Effect::Actions { drone_id: 1 }]);
        assert!(one.changed().now_or_never().is_some());
        assert!(one.changed().now_or_never().is_none());
        assert!(two.changed().now_or_never().is_none());
        assert!(hub.is_watched(&Topic::Drone(1)) && !hub.is_watched(&Topic::Drone(3)));
        drop((one, two));
        assert!(!hub.is_watched(&Topic::Drone(1)));
        assert!(hub.topics().is_empty());
    }

    #[tokio::test]
    async fn a_second_watch_on_a_topic_outlives_the_first() {
        let hub = Arc::new(Hub::default());
        let first = hub.watch(Topic::Backend("b".into()));
        let mut second = hub.watch(Topic::Backend("b".into()));
        drop(first);
        hub.wake(&[Effect::Backend { backend_id: "b".into() }]);
        assert!(second.changed().now_or_never().is_some());
    }

    #[tokio::test]
    async fn everybody_looks_again_after_a_snapshot_replaced_the_state() {
        let hub = Arc::new(Hub::default());
        let mut key = hub.watch(Topic::Key { namespace: String::new(), name: "k".into() });
        let mut backend = hub.watch(Topic::Backend("b".into()));
        hub.wake(&[Effect::Everything]);
        assert!(key.changed().now_or_never().is_some() && backend.changed().now_or_never().is_some());
    }
}
