//! A process whose disk has no name: it belongs to no cluster, neither votes nor stands for election, and accepts nothing.
//!
//! It does three things: it says who it is, takes a name once, and coordinates an init if an operator asks it to
//! ([`super::init`]). A process that began an init that not everybody has answered waits here too, so that the init can be
//! repeated.

use super::init::{InitError, InitRequest, Initialised, init};
use super::naming::{DiskIdentity, Naming};
use crate::api::{OpenError, StoreConfig};
use crate::checksums::Checksums;
use crate::log_store::LogStore;
use crate::store::{Store, lock_dir, storage};
use crate::transport::server::{receive_opening, reply};
use crate::transport::wire::{Bind, Opening, OpeningReply, Refusal};
use crate::types::Stamper;
use std::fs::File;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// Connections of other processes at once.
const CONNECTIONS_MAX: usize = 64;

/// What an opened data directory is.
pub enum Opened {
    /// A member, running.
    Member(Store),
    /// A process that waits to be named.
    Waiting(Waiting),
}

/// A waiting process. Each clone keeps the data directory open; [`Waiting::close`] waits for all of them.
#[derive(Clone)]
pub struct Waiting {
    shared: Arc<Shared>,
}

/// A handle of a waiting process that does not keep the data directory open.
#[derive(Clone)]
pub struct WeakWaiting {
    shared: Weak<Shared>,
}

impl WeakWaiting {
    /// The process, while it waits.
    pub fn upgrade(&self) -> Option<Waiting> {
        self.shared.upgrade().map(|shared| Waiting { shared })
    }
}

pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    pub(crate) log: LogStore,
    /// The name of this disk, once it has one.
    naming: watch::Sender<Option<Naming>>,
    /// Held while an init is coordinated here.
    pub(crate) initiating: tokio::sync::Mutex<()>,
    cancel: CancellationToken,
    tasks: TaskTracker,
    _lock: File,
    /// Cancelled when everything above is dropped. Fields are dropped in this order, so it is the last one.
    closed: DropGuard,
}

impl Waiting {
    /// Opens the data directory as far as to know whether it is a member's. `None` if it is.
    pub(crate) async fn open(config: &StoreConfig) -> Result<Option<Self>, OpenError> {
        let (dir, log_dir) = (config.data_dir.clone(), config.data_dir.join("log"));
        let lock = lock_dir(&dir)?;
        if dir.join(crate::restore::MARK).exists() {
            let unfinished = "a restore into it was not finished; run it again".to_owned();
            return Err(storage("opening the data directory", &dir)(unfinished));
        }
        // A replica that was stopped for good is refused before it can be given another name.
        Checksums::open(&dir)?;
        let opening = {
            let log_dir = log_dir.clone();
            move || {
                let log = LogStore::open(&log_dir, Arc::new(Stamper::default()), Box::new(|| Ok(())))?;
                log.count_start()?;
                Ok::<_, io::Error>(log)
            }
        };
        let opened = tokio::task::spawn_blocking(opening).await.map_err(io::Error::other);
        let log =
            opened.and_then(|log| log).map_err(|e| storage("opening the log", &log_dir)(e.to_string()))?;
        let naming = log.naming();
        if naming.as_ref().is_some_and(|naming| !(naming.is_unfinished_init() && log.is_pristine())) {
            log.stop();
            return Ok(None);
        }
        if naming.is_none() && dir.join("state").exists() {
            return Err(storage("opening the log", &log_dir)(
                "it is new, but the state is not: this member has lost its log, and with it its vote and its identity; \
                 remove the member and give it an empty data directory"
                    .to_owned(),
            ));
        }
        let listener = TcpListener::bind(config.peer_listen)
            .await
            .map_err(|error| OpenError::Listen { addr: config.peer_listen, error })?;
        let shared = Arc::new(Shared {
            config: config.clone(),
            log,
            naming: watch::Sender::new(naming),
            initiating: tokio::sync::Mutex::default(),
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
            _lock: lock,
            closed: CancellationToken::new().drop_guard(),
        });
        tracing::warn!(disk = %shared.log.disk().identity, "{}", shared.reason());
        shared.tasks.spawn(run(shared.clone(), listener));
        Ok(Some(Self { shared }))
    }

    /// A handle for those who may outlive the waiting, such as requests.
    pub fn downgrade(&self) -> WeakWaiting {
        WeakWaiting { shared: Arc::downgrade(&self.shared) }
    }

    /// Identity of this process's disk.
    pub fn identity(&self) -> DiskIdentity {
        self.shared.log.disk().identity
    }

    /// What it waits for, and what to do.
    pub fn reason(&self) -> String {
        self.shared.reason()
    }

    /// Forms a cluster of these members, of which this process must be one. See [`super::init`].
    pub async fn init(&self, request: &InitRequest) -> Result<Initialised, InitError> {
        init(&self.shared, request).await
    }

    /// Resolves when this process has a name and can run as that member.
    pub async fn named(&self) {
        self.shared.named().await;
    }

    /// Stops waiting and closes the data directory, so that it can be opened as the member that it is now. Waits until the
    /// last clone is dropped: an init that is in progress ends first, which takes a few seconds at most.
    pub async fn close(self) {
        let Shared { cancel, tasks, log, closed, .. } = &*self.shared;
        let closed = closed.token().clone();
        cancel.cancel();
        tasks.close();
        tasks.wait().await;
        let log = log.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || log.stop()).await {
            tracing::warn!(%error, "closing the log failed");
        }
        drop(self);
        closed.cancelled().await;
    }
}

impl Shared {
    async fn named(&self) {
        let mut naming = self.naming.subscribe();
        let named =
            |naming: &Option<Naming>| naming.as_ref().is_some_and(|naming| !naming.is_unfinished_init());
        if naming.wait_for(named).await.is_err() {
            // The sender lives as long as this.
            std::future::pending::<()>().await;
        }
    }

    fn reason(&self) -> String {
        match &*self.naming.borrow() {
            None => "waiting for \"holdfast cluster init\" or \"holdfast cluster add\"".to_owned(),
            Some(Naming { founding: Some(founding), .. }) => format!(
                "an init of {} began here and was not finished: repeat \"holdfast cluster init\" with the same members at \
                 this controller, or empty the data directories of all of them (nothing was served yet)",
                founding.members.join(",")
            ),
            Some(Naming { member_id, .. }) => format!("starting as member {member_id}"),
        }
    }

    /// Names this disk, unless it has another name, and gives the one that it has.
    pub(crate) async fn name(&self, naming: Naming) -> io::Result<Naming> {
        let log = self.log.clone();
        let held =
            tokio::task::spawn_blocking(move || log.name(&naming)).await.map_err(io::Error::other)??;
        self.naming.send_replace(Some(held.clone()));
        Ok(held)
    }
}

async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // It waits no longer: a leader that was told so would name it again and again.
            () = shared.named() => return,
            () = shared.cancel.cancelled() => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection can't be accepted");
                // Out of descriptors, say: wait for some to be freed rather than spin.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%from, "too many connections; refused one");
            continue;
        };
        let serving = shared.clone();
        // Not cancelled: the one that gave this process its name waits for the answer.
        shared.tasks.spawn(async move {
            if let Err(error) = serve(&serving, stream).await {
                tracing::debug!(%from, %error, "a connection ended");
            }
            drop(place);
        });
    }
}

async fn serve(shared: &Shared, stream: TcpStream) -> io::Result<()> {
    let (mut frames, opening) = receive_opening(stream).await?;
    let identity = shared.log.disk().identity;
    let answer = match opening {
        Opening::Hello(_) => OpeningReply::Refused(Refusal::Waiting(identity)),
        Opening::Bind(Bind { identity: meant, naming }) if meant == identity && naming.is_plausible() => {
            let held = shared.name(naming).await?;
            tracing::info!(cluster = %held.cluster_id, member = held.member_id, "this process has a name");
            OpeningReply::Identified { identity, naming: Some(held) }
        }
        Opening::Identify | Opening::Bind(_) => {
            OpeningReply::Identified { identity, naming: shared.naming.borrow().clone() }
        }
    };
    reply(&mut frames, &answer).await
}
