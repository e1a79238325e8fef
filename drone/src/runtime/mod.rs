//! What can run a backend. One trait, two implementations: processes of this machine, and containers of its engine.

pub mod docker;
mod leftovers;
pub mod process;
pub mod supervised;
mod watcher;

use crate::adopt::Link;
use crate::life::Fact;
use futures::future::BoxFuture;
use holdfast_wire::http::Executable;
use holdfast_wire::{Deadlines, KeyConfig, TerminationKind};
use std::net::SocketAddr;
use tokio::sync::{mpsc, watch};

/// A backend to run.
#[derive(Debug, Clone)]
pub struct BackendSpec {
    /// Its name; safe as a file name.
    pub id: String,
    /// What to run.
    pub executable: Executable,
    /// The key it holds.
    pub key: KeyConfig,
    /// The fencing token.
    pub token: u64,
    /// One token for all connections.
    pub static_token: Option<String>,
    /// Where it has to listen.
    pub address: SocketAddr,
}

impl BackendSpec {
    /// The variables that Holdfast gives to a backend; they override the user's. Only the name of the key is passed.
    pub fn session_env(&self) -> Vec<(String, String)> {
        let mut env = vec![
            ("PORT".to_owned(), self.address.port().to_string()),
            (ENV_BACKEND_ID.to_owned(), self.id.clone()),
            ("SESSION_BACKEND_KEY".to_owned(), self.key.name.clone()),
            ("SESSION_BACKEND_FENCING_TOKEN".to_owned(), self.token.to_string()),
        ];
        if let Some(token) = &self.static_token {
            env.push(("SESSION_BACKEND_STATIC_TOKEN".to_owned(), token.clone()));
        }
        env
    }
}

/// Names a backend in its own environment.
pub const ENV_BACKEND_ID: &str = "SESSION_BACKEND_ID";

/// What the drone wants of a backend by now. Only the latest counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// The deadlines that stand, in drone time.
    pub deadlines: Deadlines,
    /// An end that has begun. It is not taken back.
    pub end: Option<TerminationKind>,
    /// When the grace of a soft end is over, in drone time; never later than the hard deadline.
    pub kill_at: i64,
    /// The lease's expiry, in milliseconds: guards take no deadline further ahead.
    pub expiry_ms: u64,
    /// It has answered HTTP.
    pub ready: bool,
    /// Time allowed for a kill to take effect, in milliseconds: the lease's, counted from the hard deadline.
    pub kill_ms: u64,
}

/// A way to run backends.
///
/// Whatever the implementation, its backends end at the hard deadline of the latest [`Want`] even if the drone dies.
pub trait Runtime: Send + Sync + 'static {
    /// Runs one backend until nothing of it is left. Tells what it finds out on `facts`, [`Fact::Gone`] always and last.
    /// Dropping the future does not end the backend.
    fn run(
        &self,
        spec: BackendSpec,
        want: watch::Receiver<Want>,
        facts: mpsc::Sender<Fact>,
    ) -> BoxFuture<'static, ()>;

    /// Goes on to run a backend of an earlier drone, through its guard, which repeats all that it has reported. Else as
    /// [`Runtime::run`]. What is wanted at first is what the guard was told last.
    fn adopt(
        &self,
        id: String,
        link: Link,
        want: watch::Receiver<Want>,
        facts: mpsc::Sender<Fact>,
    ) -> BoxFuture<'static, ()>;

    /// Ends whatever earlier drones may have left of a backend, its guard first; done when nothing of it is left.
    fn end_left(&self, id: String) -> BoxFuture<'static, ()>;
}
