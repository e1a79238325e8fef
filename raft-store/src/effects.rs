//! Tells one listener what applied entries did.
//!
//! It is called by the thread that applies, not through a channel: to wake a task that then looks whether anybody is
//! concerned costs two context switches for every entry on every replica, and on followers nearly always for nothing.

use holdfast_core::outcome::Effect;
use std::fmt;
use std::sync::OnceLock;

type Listener = Box<dyn Fn(&[Effect]) + Send + Sync>;

/// See the module.
#[derive(Default)]
pub struct Effects(OnceLock<Listener>);

impl fmt::Debug for Effects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Effects").field(&self.0.get().is_some()).finish()
    }
}

impl Effects {
    /// Sets the listener. It holds up the entries behind those that it is told of, so it must neither block nor wait.
    ///
    /// # Panics
    ///
    /// If there is one: whoever came first would never hear anything again.
    pub fn listen(&self, listener: impl Fn(&[Effect]) + Send + Sync + 'static) {
        assert!(self.0.set(Box::new(listener)).is_ok(), "a replica's effects have one listener");
    }

    /// Tells it.
    pub fn tell(&self, effects: &[Effect]) {
        if let Some(listener) = self.0.get()
            && !effects.is_empty()
        {
            listener(effects);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn the_listener_hears_everything_after_it_came_and_nothing_empty() {
        let effects = Effects::default();
        effects.tell(&[Effect::Formed]);
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&heard);
        effects.listen(move |effects| hears.lock().unwrap().push(effects.to_vec()));
        effects.tell(&[]);
        effects.tell(&[Effect::Actions { drone_id: 1 }, Effect::Everything]);
        assert_eq!(*heard.lock().unwrap(), [[Effect::Actions { drone_id: 1 }, Effect::Everything]]);
    }

    #[test]
    #[should_panic(expected = "one listener")]
    fn a_second_listener_is_refused() {
        let effects = Effects::default();
        effects.listen(|_| {});
        effects.listen(|_| {});
    }
}
