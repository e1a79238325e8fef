//! What can run a backend. One trait, two implementations: processes of this machine, and containers of its engine.

pub mod docker;
mod leftovers;
pub mod process;
pub mod supervised;
mod watcher;

use crate::adopt::Link;
use crate::backend_state::{Desired, Observation};
use futures::future::BoxFuture;
use holdfast_wire::KeyConfig;
use holdfast_wire::http::Executable;
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

/// A way to run backends.
///
/// Whatever the implementation, its backends end at the hard deadline of the latest [`Desired`] even if the drone dies.
pub trait Runtime: Send + Sync + 'static {
    /// Runs one backend until nothing of it is left. Tells what it finds out on `facts`, [`Observation::Gone`] always and last.
    /// Dropping the future does not end the backend.
    fn run(
        &self,
        spec: BackendSpec,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()>;

    /// Goes on to run a backend of an earlier drone, through its guard, which repeats all that it has reported. Else as
    /// [`Runtime::run`]. What is wanted at first is what the guard was told last.
    fn adopt(
        &self,
        id: String,
        link: Link,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()>;

    /// Ends whatever earlier drones may have left of a backend, its guard first; done when nothing of it is left.
    fn end_left(&self, id: String) -> BoxFuture<'static, ()>;
}
