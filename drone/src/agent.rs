//! The loop around the [machine](crate::machine): it brings inputs, arms the timer and carries out effects. It decides
//! nothing. Every effect that can wait (for a disk, a guard, an engine, a process that does not die) runs in a task of its
//! own, about one backend.

use crate::activity::{LOOK_EVERY, Place, look_at};
use crate::adopt::{Link, reach};
use crate::backend_state::{Desired, Observation};
use crate::backend_store::CreateError;
use crate::clock::{AsyncBootTimer, DroneClock};
use crate::data_dir::{BackendsDir, DataDir, DataDirError};
use crate::journal::{Boot, EndNote, Record, judge};
use crate::machine::{CreateFailure, Effect, Input, Machine, Spawn, Start};
use crate::ports::Ports;
use crate::readiness;
use crate::runtime::{BackendSpec, Runtime};
use crate::session::SessionEvent;
use futures::FutureExt;
use futures::future::BoxFuture;
use holdfast_wire::drone::MessageFromDrone;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tracing::{debug, warn};

/// Events that wait for the loop; the sender of one more waits.
pub const EVENTS_MAX: usize = 1_024;
/// How often the backends' directories are tidied.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);
/// Observations of one backend that wait for being passed on.
const OBSERVATIONS_MAX: usize = 16;

/// What happens around the loop.
#[derive(Debug)]
pub enum Event {
    /// In the session with a controller.
    Session(SessionEvent),
    /// SIGTERM or SIGINT: stop; the second time, at once.
    Stop,
    /// SIGHUP: exit and end nothing.
    Leave,
    /// The guard of an earlier drone's backend has greeted.
    Greeted(String, Box<Link>),
    /// A task about a backend is done, or has found something out.
    Learned(Input),
    /// A backend was not made durable; its port is free again.
    NotCreated(String, SocketAddr, CreateFailure),
}

/// Why a drone gives up.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The timer failed.
    #[error("the deadline timer failed: {0}")]
    Timer(#[from] io::Error),
    /// The data directory failed.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The directories of the backends cannot be listed.
    #[error("cannot list the backends of --data-dir: {0}")]
    List(io::Error),
}

/// The loop's side of the world.
pub struct Agent {
    clock: DroneClock,
    data_dir: Arc<DataDir>,
    dirs: BackendsDir,
    runtime: Arc<dyn Runtime>,
    events: mpsc::Sender<Event>,
    machine: Machine,
    /// The machine's first effects.
    first: Vec<Effect>,
    boot: Boot,
    ports: Ports,
    /// To the controller, while there is a session.
    session: Option<mpsc::Sender<MessageFromDrone>>,
    /// What is wanted of each backend that is watched.
    wants: HashMap<String, watch::Sender<Desired>>,
    /// Guards that are being connected to.
    connecting: HashMap<String, AbortHandle>,
    /// Guards that have greeted.
    links: HashMap<String, Link>,
    /// The backends whose connections are looked for, with their tokens.
    places: BTreeMap<String, (u64, Place)>,
    /// Connections are being looked at.
    looking: bool,
}

impl Agent {
    /// An agent on a data directory. `events` is the other end of what [`Agent::run`] is given.
    pub fn new(
        clock: DroneClock,
        data_dir: DataDir,
        runtime: Arc<dyn Runtime>,
        ip: IpAddr,
        events: mpsc::Sender<Event>,
        incarnation: &str,
        boot: Boot,
    ) -> Result<Self, AgentError> {
        let dirs = data_dir.backends();
        let start = Start {
            clock,
            incarnation: incarnation.to_owned(),
            boot_id: boot.id.clone(),
            cluster_id: data_dir.cluster_id()?,
            found: dirs.names().map_err(AgentError::List)?,
            seed: rand::random(),
        };
        let (machine, first) = Machine::new(start, clock.now_ms());
        Ok(Self {
            clock,
            data_dir: Arc::new(data_dir),
            dirs,
            runtime,
            events,
            machine,
            first,
            boot,
            ports: Ports::new(ip),
            session: None,
            wants: HashMap::new(),
            connecting: HashMap::new(),
            links: HashMap::new(),
            places: BTreeMap::new(),
            looking: false,
        })
    }

    /// Runs until it was told to stop and has ended its backends, or to leave.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) -> Result<(), AgentError> {
        let timer = AsyncBootTimer::new()?;
        let mut tidy = tokio::time::interval(TIDY_INTERVAL);
        tidy.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for effect in std::mem::take(&mut self.first) {
            self.carry_out(effect);
        }
        loop {
            self.step(Input::Tick);
            if self.machine.has_stopped(self.clock.now_ms()) {
                return Ok(());
            }
            timer.arm(self.machine.next_wake().map(|at| self.clock.to_boot_ms(at)))?;
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.take(event),
                    None => return Ok(()),
                },
                fired = timer.fired() => fired?,
                _ = tidy.tick() => self.tidy(),
                _ = looks.tick() => self.look_for_connections(),
            }
        }
    }

    fn step(&mut self, input: Input) {
        for effect in self.machine.step(input, self.clock.now_ms()) {
            self.carry_out(effect);
        }
    }

    fn take(&mut self, event: Event) {
        let input = match event {
            Event::Session(SessionEvent::Connected { session, handshake, sender }) => {
                self.session = Some(sender);
                Input::Connected { session, handshake }
            }
            Event::Session(SessionEvent::Message { session, message }) => {
                Input::Message { session, message: Box::new(message) }
            }
            Event::Session(SessionEvent::Lost { session }) => {
                self.session = None;
                Input::Lost { session }
            }
            Event::Stop => Input::Stop,
            Event::Leave => Input::Leave,
            Event::Greeted(backend, link) => {
                self.connecting.remove(&backend);
                let told = link.hello.update;
                self.links.insert(backend.clone(), *link);
                self.step(Input::Greeted { backend: backend.clone(), told });
                // Unless it was adopted: another connection commands the guard, or none.
                self.links.remove(&backend);
                return;
            }
            Event::NotCreated(backend, address, failure) => {
                self.ports.release(address);
                Input::Created { backend, result: Err(failure) }
            }
            Event::Learned(input) => {
                if let Input::Connections(_) = input {
                    self.looking = false;
                }
                input
            }
        };
        self.step(input);
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Send(message) => self.send(*message),
            Effect::Create(spawn) => self.create(*spawn),
            Effect::Start { spawn, address, desired } => self.start(*spawn, address, desired),
            Effect::Want { backend, desired } => {
                if let Some(want) = self.wants.get(&backend) {
                    want.send_replace(desired);
                }
            }
            Effect::NoteEnd { backend, note } => self.note_end(backend, note),
            Effect::Forget { backend } => self.on_disk(move |dirs| {
                if let Err(e) = dirs.forget_backend(&backend) {
                    warn!(backend, "its journal is not removed, so its end will be reported again: {e}");
                }
            }),
            Effect::Look { backend } => self.look(backend),
            Effect::Connect { backend, address } => {
                self.ports.keep(address);
                self.connect(backend);
            }
            Effect::Adopt { backend, desired, address } => self.adopt(backend, desired, address),
            Effect::EndLeft { backend } => self.end_left(backend),
            Effect::Release { backend, address } => {
                self.wants.remove(&backend);
                self.places.remove(&backend);
                if let Some(address) = address {
                    self.ports.release(address);
                }
            }
            Effect::WatchConnections { backend, token, place } => {
                self.places.insert(backend, (token, place));
            }
            Effect::KeepClusterId(id) => self.keep_cluster_id(id),
        }
    }

    fn send(&mut self, message: MessageFromDrone) {
        let Some(session) = &self.session else { return };
        let may_be_lost = matches!(message, MessageFromDrone::BackendMetrics(_));
        if session.try_send(message).is_err() && !may_be_lost {
            // It ends, and everything is said again in the next one.
            debug!("no room in the session");
            self.session = None;
        }
    }

    /// Does something with the disk, beside everything else.
    fn on_disk(&self, work: impl FnOnce(BackendsDir) + Send + 'static) {
        let dirs = self.dirs.clone();
        tokio::task::spawn_blocking(move || work(dirs));
    }

    /// Does something with the disk, and passes on what became of it; `failed` if it panicked.
    fn ask_disk(&self, work: impl FnOnce(BackendsDir) -> Event + Send + 'static, failed: Event) {
        let (dirs, events) = (self.dirs.clone(), self.events.clone());
        tokio::spawn(async move {
            let done = tokio::task::spawn_blocking(move || work(dirs)).await;
            // Without a listener the drone is ending.
            let _ = events.send(done.unwrap_or(failed)).await;
        });
    }

    fn create(&mut self, spawn: Spawn) {
        let backend = spawn.backend.clone();
        let address = match self.ports.take() {
            Ok(address) => address,
            Err(e) => {
                let result = Err(CreateFailure::Failed(format!("no port: {e}")));
                let event = Event::Learned(Input::Created { backend, result });
                return self.ask_disk(|_| event, Event::Learned(Input::Tick));
            }
        };
        let record = Record {
            boot_id: self.boot.id.clone(),
            backend: spawn.backend,
            key: spawn.key,
            token: spawn.token,
            address,
            soft_boot_ms: self.clock.to_boot_ms(spawn.deadlines.soft_terminate_at),
            hard_boot_ms: self.clock.to_boot_ms(spawn.deadlines.hard_terminate_at),
        };
        let failed = |problem: &str| CreateFailure::Failed(problem.to_owned());
        let panicked = Event::NotCreated(backend.clone(), address, failed("the disk's thread panicked"));
        let work = move |dirs: BackendsDir| match dirs.create_backend(&record) {
            Ok(()) => Event::Learned(Input::Created { backend, result: Ok(address) }),
            Err(CreateError::Exists) => Event::NotCreated(backend, address, CreateFailure::Exists),
            Err(CreateError::Io(e)) => Event::NotCreated(backend, address, failed(&e.to_string())),
        };
        self.ask_disk(work, panicked);
    }

    fn note_end(&self, backend: String, note: EndNote) {
        let failed = Event::Learned(Input::EndNoted { backend: backend.clone(), kind: None });
        let work = move |dirs: BackendsDir| {
            let noted = dirs.note_end(&backend, &note);
            if let Err(e) = &noted {
                warn!(backend, "its end cannot be made durable: {e}");
            }
            Event::Learned(Input::EndNoted { backend, kind: noted.is_ok().then_some(note.kind) })
        };
        self.ask_disk(work, failed);
    }

    fn look(&self, backend: String) {
        let boot = self.boot.clone();
        let failed = Event::Learned(Input::Looked { backend: backend.clone(), judged: None });
        let work = move |dirs: BackendsDir| {
            let judged = match dirs.look(&backend) {
                Ok(found) => Some(Box::new(judge(&backend, &found, &boot))),
                Err(e) => {
                    warn!(backend, "its directory cannot be read: {e}; trying again");
                    None
                }
            };
            Event::Learned(Input::Looked { backend, judged })
        };
        self.ask_disk(work, failed);
    }

    fn keep_cluster_id(&self, id: String) {
        let data_dir = Arc::clone(&self.data_dir);
        let work = move |_| {
            let kept = data_dir.set_cluster_id(&id);
            if let Err(e) = &kept {
                warn!("{e}");
            }
            Event::Learned(Input::ClusterIdKept { durable: kept.is_ok() })
        };
        self.ask_disk(work, Event::Learned(Input::ClusterIdKept { durable: false }));
    }

    fn connect(&mut self, backend: String) {
        let (dirs, events, id) = (self.dirs.clone(), self.events.clone(), backend.clone());
        let task = tokio::spawn(async move {
            let event = match reach(&dirs, &id).await {
                Some(link) => Event::Greeted(id, Box::new(link)),
                None => Event::Learned(Input::GuardEnded { backend: id }),
            };
            let _ = events.send(event).await;
        });
        self.connecting.insert(backend, task.abort_handle());
    }

    fn end_left(&mut self, backend: String) {
        if let Some(connecting) = self.connecting.remove(&backend) {
            connecting.abort();
        }
        let (events, end_left) = (self.events.clone(), self.runtime.end_left(backend.clone()));
        tokio::spawn(async move {
            end_left.await;
            let _ = events.send(Event::Learned(Input::LeftEnded { backend })).await;
        });
    }

    fn start(&mut self, spawn: Spawn, address: SocketAddr, desired: Desired) {
        let backend = spawn.backend.clone();
        let spec = BackendSpec {
            id: spawn.backend,
            executable: spawn.executable,
            key: spawn.key,
            token: spawn.token,
            static_token: spawn.static_token,
            address,
        };
        let (want, wants) = watch::channel(desired);
        let (sender, observations) = mpsc::channel(OBSERVATIONS_MAX);
        let run = self.runtime.run(spec, wants, sender);
        self.wants.insert(backend.clone(), want);
        self.watch_over(backend, address, run, observations);
    }

    fn adopt(&mut self, backend: String, desired: Desired, address: SocketAddr) {
        let Some(link) = self.links.remove(&backend) else { return };
        let (want, wants) = watch::channel(desired);
        let (sender, observations) = mpsc::channel(OBSERVATIONS_MAX);
        let mut run = self.runtime.adopt(backend.clone(), link, wants, sender);
        // What is wanted at first is what the guard was told. The runtime reads it when it begins, so it begins before
        // something else can be wanted.
        let over = (&mut run).now_or_never().is_some();
        self.wants.insert(backend.clone(), want);
        let run = if over { Box::pin(async {}) } else { run };
        self.watch_over(backend, address, run, observations);
    }

    /// Runs the watch over a backend, and passes on what it finds out.
    fn watch_over(
        &self,
        backend: String,
        address: SocketAddr,
        run: BoxFuture<'static, ()>,
        observations: mpsc::Receiver<Observation>,
    ) {
        let passed_on = pass_on(backend, address, observations, self.events.clone());
        tokio::spawn(async move { tokio::join!(run, passed_on) });
    }

    fn tidy(&self) {
        let in_use = self.machine.in_use().cloned().collect();
        self.on_disk(move |dirs| {
            if let Err(e) = dirs.tidy(&in_use) {
                warn!("cannot tidy the backends' directories: {e}");
            }
        });
    }

    /// Looks for connections, beside everything else. One look at a time.
    fn look_for_connections(&mut self) {
        if self.looking || self.places.is_empty() {
            return;
        }
        self.looking = true;
        let places: Vec<(String, u64, Place)> =
            self.places.iter().map(|(id, (token, place))| (id.clone(), *token, *place)).collect();
        let work = move |_| {
            let (seen, errors) = look_at(places.iter().map(|(_, _, place)| *place));
            for error in errors {
                debug!("connections cannot be looked at: {error}");
            }
            let found =
                places.into_iter().map(|(id, token, place)| (id, token, seen.get(&place).copied())).collect();
            Event::Learned(Input::Connections(found))
        };
        self.ask_disk(work, Event::Learned(Input::Connections(Vec::new())));
    }
}

/// Passes on what is found out of a backend, and asks for its first answer from the moment when it runs.
async fn pass_on(
    backend: String,
    address: SocketAddr,
    mut observations: mpsc::Receiver<Observation>,
    events: mpsc::Sender<Event>,
) {
    let ready = readiness::answers(address).fuse();
    tokio::pin!(ready);
    let mut asking = false;
    loop {
        let observation = tokio::select! {
            observation = observations.recv() => match observation {
                Some(observation) => observation,
                None => return,
            },
            answered = &mut ready, if asking => {
                asking = false;
                if answered { Observation::Ready } else { Observation::StartupTimeout }
            }
        };
        match observation {
            Observation::Started => asking = true,
            Observation::Ready | Observation::Exited(_) | Observation::Killing => asking = false,
            _ => {}
        }
        let input = Input::Observed { backend: backend.clone(), observation };
        if events.send(Event::Learned(input)).await.is_err() {
            return;
        }
    }
}
