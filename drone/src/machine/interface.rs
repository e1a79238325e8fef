//! What goes into the machine and what comes out.

use crate::activity::{Place, Seen};
use crate::backend_state::{Desired, Observation};
use crate::guard::Update;
use crate::journal::{EndNote, Judged};
use holdfast_wire::drone::{ControllerHandshake, MessageFromDrone, MessageToDrone};
use holdfast_wire::http::Executable;
use holdfast_wire::{Deadlines, KeyConfig, TerminationKind};
use std::net::SocketAddr;

/// What the machine learns.
#[derive(Debug)]
pub enum Input {
    /// Nothing but the time.
    Tick,
    /// A controller has answered the handshake. Sessions are numbered in the order of their handshakes.
    Connected {
        /// The session.
        session: u64,
        /// The controller's handshake.
        handshake: ControllerHandshake,
    },
    /// A controller has sent something.
    Message {
        /// The session that it came in.
        session: u64,
        /// What was sent.
        message: Box<MessageToDrone>,
    },
    /// A session is over.
    Lost {
        /// The session.
        session: u64,
    },
    /// [`Effect::Create`] is done.
    Created {
        /// The backend.
        backend: String,
        /// Its address, or why it is not durable.
        result: Result<SocketAddr, CreateFailure>,
    },
    /// [`Effect::NoteEnd`] is done.
    EndNoted {
        /// The backend.
        backend: String,
        /// What is durable now; nothing if the disk failed.
        kind: Option<TerminationKind>,
    },
    /// [`Effect::Look`] is done. Nothing if the look failed.
    Looked {
        /// The backend.
        backend: String,
        /// What its directory says.
        judged: Option<Box<Judged>>,
    },
    /// The guard of an earlier drone's backend has greeted, and waits for [`Effect::Adopt`].
    Greeted {
        /// The backend.
        backend: String,
        /// What the guard was told last.
        told: Update,
    },
    /// The guard of an earlier drone's backend has ended before it greeted.
    GuardEnded {
        /// The backend.
        backend: String,
    },
    /// [`Effect::EndLeft`] is done: nothing of the backend is left.
    LeftEnded {
        /// The backend.
        backend: String,
    },
    /// The watch over a backend has found something out.
    Observed {
        /// The backend.
        backend: String,
        /// What was found out.
        observation: Observation,
    },
    /// Connections were looked at: of which backends with which tokens, and what was seen; nothing if the look failed.
    Connections(Vec<(String, u64, Option<Seen>)>),
    /// [`Effect::KeepClusterId`] is done.
    ClusterIdKept {
        /// Whether it is durable.
        durable: bool,
    },
    /// The drone is to stop; the second time, at once.
    Stop,
    /// The drone is to exit and end nothing: guards hold the deadlines until the next drone adopts them.
    Leave,
}

/// Why a backend was not made durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateFailure {
    /// Its directory exists, so it was taken on before.
    Exists,
    /// No port was free, or the disk failed.
    Failed(String),
}

/// A backend that is to be made durable and then started.
#[derive(Debug, Clone, PartialEq)]
pub struct Spawn {
    /// Its id.
    pub backend: String,
    /// What to run.
    pub executable: Executable,
    /// The key it holds.
    pub key: KeyConfig,
    /// The fencing token.
    pub token: u64,
    /// One token for all connections.
    pub static_token: Option<String>,
    /// The deadlines, in drone time.
    pub deadlines: Deadlines,
}

/// What the loop has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send this to the controller of the newest session.
    Send(Box<MessageFromDrone>),
    /// Find a port for a backend and make its record durable.
    Create(Box<Spawn>),
    /// Start a backend that is durable.
    Start {
        /// The backend.
        spawn: Box<Spawn>,
        /// Where it has to listen.
        address: SocketAddr,
        /// What is wanted of it.
        desired: Desired,
    },
    /// Pass on what is wanted of a backend by now.
    Want {
        /// The backend.
        backend: String,
        /// What is wanted.
        desired: Desired,
    },
    /// Make an end durable.
    NoteEnd {
        /// The backend.
        backend: String,
        /// The end.
        note: EndNote,
    },
    /// Remove what is durable of a backend, which is over.
    Forget {
        /// The backend.
        backend: String,
    },
    /// Read a backend's directory.
    Look {
        /// The backend.
        backend: String,
    },
    /// Connect to the guard of an earlier drone's backend, for as long as it takes.
    Connect {
        /// The backend.
        backend: String,
        /// Where it listens.
        address: SocketAddr,
    },
    /// Watch over a backend whose guard has greeted.
    Adopt {
        /// The backend.
        backend: String,
        /// What its guard was told last.
        desired: Desired,
        /// Where it listens.
        address: SocketAddr,
    },
    /// End whatever is left of a backend, its guard first, for as long as that takes.
    EndLeft {
        /// The backend.
        backend: String,
    },
    /// Nothing of a backend is left: it is watched no more, and its port is free again.
    Release {
        /// The backend.
        backend: String,
        /// Its address, if it has one.
        address: Option<SocketAddr>,
    },
    /// Look for connections to this backend from now on.
    WatchConnections {
        /// The backend.
        backend: String,
        /// Its token.
        token: u64,
        /// Where its connections are seen.
        place: Place,
    },
    /// Make the cluster's id durable.
    KeepClusterId(String),
}
