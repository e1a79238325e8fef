//! The drone's one decision maker: a task that owns the leases, the backends' lives and the reports, and is told of
//! everything that happens. What it decides is decided by the pure parts; it carries the results between them.

use crate::activity::{LOOK_EVERY, Place, Seen, Tracker, look_at};
use crate::admission::{Admission, Verdict};
use crate::adopt::Left;
use crate::clock::{AsyncBootTimer, DroneClock, boot_ms};
use crate::data_dir::{BackendsDir, DataDir, DataDirError};
use crate::guard::{EndNow, Update};
use crate::journal::Record;
use crate::lease::{Duty, LeaseKeeper, Renewal};
use crate::life::{Effects, Fact, Life};
use crate::outbox::Outbox;
use crate::ports::Ports;
use crate::readiness;
use crate::runtime::{BackendSpec, Runtime, Want};
use crate::session::SessionEvent;
use futures::future::BoxFuture;
use holdfast_wire::drone::{
    AcquiredKey, Action, ActionMessage, ControllerHandshake, MessageFromDrone, MessageToDrone, RenewItem,
    RenewKeysRequest, RenewKeysResponse,
};
use holdfast_wire::http::Executable;
use holdfast_wire::lease::KILL_MS_MAX;
use holdfast_wire::limits::RENEW_KEYS_MAX;
use holdfast_wire::names::check_name;
use holdfast_wire::{
    BackendState, BackendStatus, Deadlines, LeaseConfig, TerminationKind, TerminationReason,
};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};

/// Time from SIGTERM to SIGKILL of a soft end that was asked for, in milliseconds; the hard deadline may cut it short.
pub const GRACE_MS: i64 = 10_000;
/// Longest time that a stopping drone waits for its backends, in milliseconds.
pub const STOP_MS_MAX: i64 = 30_000;
/// And after killing what is left by then, in milliseconds.
pub const STOP_KILL_MS: i64 = 3_000;
/// Longest time that it waits for the last acknowledgements once its backends are gone, in milliseconds.
pub const STOP_REPORT_MS: i64 = 3_000;
/// Inputs that wait for the agent; whoever has one more waits too.
pub const INPUTS_MAX: usize = 1_024;
/// After how long it is said again that this drone is stopping, in milliseconds.
const DRAINING_AGAIN_MS: i64 = 1_000;
/// How often the backends' directories are tidied.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);
/// Facts of one backend that wait for being passed on.
const FACTS_MAX: usize = 16;

/// What the agent is told.
#[derive(Debug)]
pub enum Input {
    /// By the session with a controller.
    Session(SessionEvent),
    /// By the watch over a backend.
    Backend {
        /// Which.
        id: String,
        /// What.
        fact: Fact,
    },
    /// What was seen of connections to which backends, with their tokens.
    Connections(Vec<(String, u64, Seen)>),
    /// To stop; the second time, at once.
    Stop,
    /// To go and end nothing: guards hold the deadlines until the next drone adopts them.
    Leave,
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
}

struct Backend {
    life: Life,
    token: u64,
    address: SocketAddr,
    want: watch::Sender<Want>,
    /// It has answered HTTP.
    answers: bool,
    /// Where its connections are seen.
    place: Place,
}

impl Backend {
    fn new(token: u64, address: SocketAddr, want: watch::Sender<Want>) -> Self {
        let place = Place { pid: None, port: address.port() };
        Self { life: Life::new(address), token, address, want, answers: false, place }
    }
}

#[derive(Debug, Clone, Copy)]
struct Stopping {
    /// When to kill what is left, in drone time.
    kill_at: i64,
    /// When to go in any case, in drone time.
    leave_at: i64,
    /// When the last backend was gone, in drone time.
    over_at: Option<i64>,
}

/// See the module.
pub struct Agent {
    clock: DroneClock,
    data_dir: DataDir,
    dirs: BackendsDir,
    runtime: Arc<dyn Runtime>,
    inputs: mpsc::Sender<Input>,
    keeper: LeaseKeeper,
    admission: Admission,
    outbox: Outbox,
    ports: Ports,
    backends: BTreeMap<String, Backend>,
    /// To the controller, while there is a session.
    session: Option<mpsc::Sender<MessageFromDrone>>,
    lease: Option<LeaseConfig>,
    cluster_id: Option<String>,
    /// The id of a new cluster, while the old one's backends are being ended.
    moving_to: Option<String>,
    stopping: Option<Stopping>,
    /// Backends of earlier drones whose keys no controller has renewed or refused yet. Nothing is started before.
    unconfirmed: BTreeSet<String>,
    boot_id: String,
    /// It was told to leave.
    left: bool,
    activity: Tracker,
    /// Connections are being looked at.
    looking: bool,
    /// When the controllers are told next that this drone takes no new backends, in drone time; never, once they have it.
    say_draining_at: Option<i64>,
}

impl Agent {
    /// An agent with what earlier drones have left. `inputs` is the other end of what [`Agent::run`] is given.
    pub fn new(
        clock: DroneClock,
        data_dir: DataDir,
        runtime: Arc<dyn Runtime>,
        ip: IpAddr,
        inputs: mpsc::Sender<Input>,
        boot_id: String,
        left: Vec<Left>,
    ) -> Result<Self, AgentError> {
        let mut agent = Self {
            clock,
            cluster_id: data_dir.cluster_id()?,
            dirs: data_dir.backends(),
            data_dir,
            runtime,
            inputs,
            keeper: LeaseKeeper::new(),
            admission: Admission::new(clock.now_ms()),
            outbox: Outbox::new(),
            ports: Ports::new(ip),
            backends: BTreeMap::new(),
            session: None,
            lease: None,
            moving_to: None,
            stopping: None,
            unconfirmed: BTreeSet::new(),
            boot_id,
            left: false,
            activity: Tracker::default(),
            looking: false,
            say_draining_at: None,
        };
        for one in left {
            agent.adopt(one);
        }
        Ok(agent)
    }

    /// Takes on what an earlier drone has left. Its guard, or its outcome, tells what has happened; what was reported before
    /// is reported again, which changes nothing.
    fn adopt(&mut self, left: Left) {
        let now = self.clock.now_ms();
        let Record { backend: id, token, address, soft_boot_ms, hard_boot_ms, .. } = left.record().clone();
        let mut deadlines = Deadlines {
            renew_at: now,
            soft_terminate_at: self.clock.of_boot_ms(soft_boot_ms),
            hard_terminate_at: self.clock.of_boot_ms(hard_boot_ms),
        };
        let mut end = None;
        if let Left::Guarded(_, link) = &left {
            let Update { soft_boot_ms, hard_boot_ms, end: begun } = link.hello.update;
            deadlines.soft_terminate_at = self.clock.of_boot_ms(soft_boot_ms);
            deadlines.hard_terminate_at = self.clock.of_boot_ms(hard_boot_ms);
            end = begun;
        }
        deadlines.renew_at = now.min(deadlines.soft_terminate_at.saturating_sub(1));
        let kind = end.map(|end| match end {
            EndNow::Soft { .. } => TerminationKind::Soft,
            EndNow::Hard => TerminationKind::Hard,
        });
        let kill_at = match end {
            Some(EndNow::Soft { kill_boot_ms }) => self.clock.of_boot_ms(kill_boot_ms),
            _ => deadlines.hard_terminate_at,
        };
        let first = Want { deadlines, end: kind, kill_at, kill_ms: self.kill_ms() };
        let (want, wants) = watch::channel(first);
        self.admission.adopted(&id, deadlines.soft_terminate_at);
        self.ports.keep(address);
        self.backends.insert(id.clone(), Backend::new(token, address, want));
        let runtime = Arc::clone(&self.runtime);
        let (sender, facts) = mpsc::channel(FACTS_MAX);
        let over = async |sender: mpsc::Sender<Fact>, all: Vec<Fact>| {
            for fact in all.into_iter().chain([Fact::Gone]) {
                // Without a listener the drone is ending.
                let _ = sender.send(fact).await;
            }
        };
        let run: BoxFuture<'static, ()> = match left {
            Left::Guarded(_, link) => {
                self.keeper.acquired(&id, token, deadlines);
                self.unconfirmed.insert(id.clone());
                if let Some(kind) = kind {
                    // An end that was begun goes on; who asked for it is not known here any more.
                    if let Some(backend) = self.backends.get_mut(&id) {
                        let states = backend.life.end(kind, TerminationReason::External).states;
                        self.carry_out(&id, Effects { states, end: None }, kill_at);
                    }
                    self.keeper.ending(&id);
                }
                runtime.adopt(id.clone(), *link, wants, sender)
            }
            Left::Ended(_, reports) => Box::pin(over(sender, reports.iter().filter_map(Fact::of).collect())),
            Left::OtherBoot(_) => Box::pin(over(sender, vec![Fact::Lost])),
            Left::Unguarded(_) => {
                let end_left = runtime.end_left(id.clone());
                Box::pin(async move {
                    end_left.await;
                    over(sender, vec![Fact::Lost]).await;
                })
            }
        };
        info!(backend = id, token, "left by an earlier drone");
        let inputs = self.inputs.clone();
        tokio::spawn(async move { tokio::join!(run, pass_on(id, address, facts, inputs)) });
    }

    /// Runs until it was told to stop and has ended its backends.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>) -> Result<(), AgentError> {
        let timer = AsyncBootTimer::new()?;
        let mut tidy = tokio::time::interval(TIDY_INTERVAL);
        tidy.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Deadlines first: an answer that waited in the queue past its deadline is too late.
            self.due()?;
            if self.has_stopped() {
                return Ok(());
            }
            timer.arm(self.next_wake().map(|at| self.clock.to_boot_ms(at)))?;
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(input) => self.take(input)?,
                    None => return Ok(()),
                },
                fired = timer.fired() => fired?,
                _ = tidy.tick() => self.tidy(),
                _ = looks.tick() => self.look(),
            }
        }
    }

    fn take(&mut self, input: Input) -> Result<(), AgentError> {
        match input {
            Input::Session(SessionEvent::Connected { handshake, sender }) => {
                self.connected(handshake, sender)?
            }
            Input::Session(SessionEvent::Message(message)) => self.message(message)?,
            Input::Session(SessionEvent::Lost) => {
                self.session = None;
                self.outbox.session_lost();
            }
            Input::Backend { id, fact } => self.fact(&id, fact)?,
            Input::Connections(found) => self.connections(found),
            Input::Stop => self.stop(),
            Input::Leave => {
                info!(
                    backends = self.backends.len(),
                    "leaving the backends to their guards and the next drone"
                );
                self.left = true;
            }
        }
        Ok(())
    }

    /// Does what is due by now.
    fn due(&mut self) -> Result<(), AgentError> {
        let now = self.clock.now_ms();
        let mut renewals = Vec::new();
        for duty in self.keeper.due(now, || rand::random_range(0.5..=1.0)) {
            match duty {
                Duty::RenewNow { backend, token } => renewals.push(RenewItem { backend, token }),
                Duty::SoftTerminate { backend, reason } => {
                    warn!(backend, "its key was not renewed in time: ending it");
                    self.end(&backend, TerminationKind::Soft, reason, i64::MAX);
                }
                Duty::HardTerminate { backend, reason } => {
                    warn!(backend, "its key was not renewed in time: killing it");
                    self.end(&backend, TerminationKind::Hard, reason, now);
                }
            }
        }
        for keys in renewals.chunks(RENEW_KEYS_MAX) {
            let request = RenewKeysRequest { local_time: now, keys: keys.to_vec() };
            self.send(MessageFromDrone::RenewKeys(request));
        }
        self.say_draining(now);
        if self.session.is_some() {
            let boot_ms = boot_ms().unsigned_abs();
            while let Some(activity) = self.activity.message(boot_ms) {
                self.send(MessageFromDrone::BackendActivity(activity));
            }
        }
        if self.stopping.is_some_and(|stopping| now >= stopping.kill_at) {
            self.end_all(TerminationKind::Hard, TerminationReason::Swept, now);
        }
        if let Some(session) = &self.session {
            self.outbox
                .flush(now, |event| session.try_send(MessageFromDrone::BackendEvent(event.clone())).is_ok());
        }
        self.admission.tidy(now);
        Ok(())
    }

    /// Tells the controllers that this drone takes no new backends, until they have it durably.
    fn say_draining(&mut self, now: i64) {
        if self.session.is_some() && self.say_draining_at.is_some_and(|at| now >= at) {
            self.say_draining_at = Some(now.saturating_add(DRAINING_AGAIN_MS));
            self.send(MessageFromDrone::Draining {});
        }
    }

    /// Looks for connections to the backends that are ready, beside everything else.
    fn look(&mut self) {
        let watched: Vec<(String, u64, Place)> = self
            .backends
            .iter()
            .filter(|(_, backend)| backend.answers && !backend.life.is_over())
            .map(|(id, backend)| (id.clone(), backend.token, backend.place))
            .collect();
        if self.looking || watched.is_empty() {
            return;
        }
        self.looking = true;
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let places: Vec<Place> = watched.iter().map(|(_, _, place)| *place).collect();
            let looked = tokio::task::spawn_blocking(move || look_at(places)).await;
            let (found, problems) = looked.unwrap_or_default();
            if let Some(problem) = problems.first() {
                // A container that has just ended is the common case.
                debug!(problems = problems.len(), "connections are not seen everywhere: {problem}");
            }
            let found = watched
                .into_iter()
                .filter_map(|(id, token, place)| Some((id, token, *found.get(&place)?)))
                .collect();
            // The agent is ending if it does not listen.
            let _ = inputs.send(Input::Connections(found)).await;
        });
    }

    fn connections(&mut self, found: Vec<(String, u64, Seen)>) {
        self.looking = false;
        let boot_ms = boot_ms().unsigned_abs();
        for (id, token, seen) in found {
            if self.backends.get(&id).is_some_and(|backend| !backend.life.is_over()) {
                self.activity.seen(&id, token, seen, boot_ms);
            }
        }
    }

    fn next_wake(&self) -> Option<i64> {
        let reports = self.session.as_ref().and_then(|_| self.outbox.next_wake());
        let now = self.clock.now_ms();
        let stopping =
            self.stopping.map(|s| if now < s.kill_at { s.kill_at.min(s.leave_at) } else { s.leave_at });
        // A full queue to the session leaves reports that are overdue: look again soon, not at once for ever.
        let reports = reports.map(|at| at.max(now + 10));
        let draining = self.session.as_ref().and(self.say_draining_at);
        [self.keeper.next_wake(), reports, stopping, draining].into_iter().flatten().min()
    }

    fn connected(
        &mut self,
        handshake: ControllerHandshake,
        sender: mpsc::Sender<MessageFromDrone>,
    ) -> Result<(), AgentError> {
        let now = self.clock.now_ms();
        self.session = Some(sender);
        self.outbox.session_lost();
        self.activity.connected();
        if self.stopping.is_some() {
            self.say_draining_at = Some(now);
        }
        self.lease = handshake.lease;
        self.keeper.ask_again(now);
        match (handshake.cluster_id, &self.cluster_id) {
            (Some(id), Some(known)) if id != *known => {
                warn!("this is cluster {id}, not {known}: ending the old cluster's backends first");
                self.moving_to = Some(id);
                // The new cluster does not know these backends; nobody is there to be told of their end.
                self.end_all(TerminationKind::Hard, TerminationReason::Lost, now);
                self.move_on()?;
            }
            (Some(id), None) => {
                self.data_dir.set_cluster_id(&id)?;
                self.cluster_id = Some(id);
            }
            // The known cluster again: a move that was begun is called off; what it has ended stays ended.
            (Some(_), Some(_)) => self.moving_to = None,
            (None, _) => {}
        }
        Ok(())
    }

    /// Completes a move to another cluster when nothing of the old one is left.
    fn move_on(&mut self) -> Result<(), AgentError> {
        if self.moving_to.is_some() && self.backends.values().all(|b| b.life.is_over()) {
            if let Some(id) = self.moving_to.take() {
                self.data_dir.set_cluster_id(&id)?;
                self.cluster_id = Some(id);
            }
            for id in std::mem::take(&mut self.backends).into_keys() {
                self.outbox.forget(&id);
                self.admission.finished(&id);
                self.forget_journal(id);
            }
        }
        Ok(())
    }

    fn message(&mut self, message: MessageToDrone) -> Result<(), AgentError> {
        match message {
            // Repeated by the controller until the old cluster's backends are gone, or reports got through.
            MessageToDrone::Action(_) if self.moving_to.is_some() || self.outbox.is_full() => {}
            // Repeated until it is known which of the earlier drones' backends still hold their keys.
            MessageToDrone::Action(ActionMessage { action: Action::Spawn { .. }, .. })
                if !self.unconfirmed.is_empty() => {}
            MessageToDrone::Action(action) => self.action(action),
            MessageToDrone::AckEvent { event_id } => {
                if let Some(event) = self.outbox.acknowledged(event_id)
                    && event.state.status() == BackendStatus::Terminated
                {
                    self.backends.remove(&event.backend_id);
                    self.admission.finished(&event.backend_id);
                    self.forget_journal(event.backend_id);
                }
            }
            MessageToDrone::RenewKeysResponse(response) => self.renewed(response),
            MessageToDrone::RenewKeyResponse(response) => {
                let key = holdfast_wire::drone::RenewedKey {
                    backend: response.backend,
                    deadlines: response.deadlines,
                    refused: None,
                };
                self.renewed(RenewKeysResponse { keys: vec![key] });
            }
            MessageToDrone::AckDraining {} => self.say_draining_at = None,
            MessageToDrone::AckActivity { activity_id, .. } => self.activity.acknowledged(activity_id),
            MessageToDrone::AckBackends {} => {}
        }
        Ok(())
    }

    /// Time allowed for a kill to take effect, in milliseconds.
    fn kill_ms(&self) -> u64 {
        self.lease.map_or(KILL_MS_MAX, |lease| lease.kill_ms())
    }

    fn renewed(&mut self, response: RenewKeysResponse) {
        let now = self.clock.now_ms();
        let kill_ms = self.kill_ms();
        for key in response.keys {
            self.unconfirmed.remove(&key.backend);
            if let Some(deadlines) = key.deadlines {
                match self.keeper.renewed(&key.backend, deadlines, now) {
                    Renewal::Extended => {
                        if let Some(backend) = self.backends.get(&key.backend) {
                            backend.want.send_modify(|want| {
                                want.deadlines = deadlines;
                                want.kill_ms = kill_ms;
                            });
                        }
                    }
                    Renewal::Malformed => {
                        warn!(backend = key.backend, "renewed with deadlines that cannot be ours")
                    }
                    other => debug!(backend = key.backend, ?other, "the answer to a renewal does not count"),
                }
            } else if let Some(refusal) = key.refused {
                warn!(backend = key.backend, ?refusal, "its key is not renewed");
                if let Some(Duty::HardTerminate { backend, reason }) =
                    self.keeper.refused(&key.backend, refusal)
                {
                    self.end(&backend, TerminationKind::Hard, reason, now);
                }
            }
        }
    }

    fn action(&mut self, message: ActionMessage) {
        let ActionMessage { action_id, backend_id, action, .. } = message;
        match action {
            Action::Spawn { executable, key, static_token, .. } => {
                self.spawn(&backend_id, &executable, key, static_token);
            }
            Action::Terminate { kind, reason } => {
                let grace_until = self.clock.now_ms().saturating_add(GRACE_MS);
                if !self.end(&backend_id, kind, reason, grace_until) {
                    debug!(backend = backend_id, "asked to end a backend that is not here, or is over");
                    let now = self.clock.now_ms();
                    // Its spawn may have been put off, and come again. Without room to remember it this comes again too.
                    if !self.backends.contains_key(&backend_id)
                        && !self.admission.end_first(&backend_id, reason, self.lease, now)
                    {
                        return;
                    }
                }
            }
        }
        // Without room the action comes again, and changes nothing then.
        self.send(MessageFromDrone::AckAction { action_id });
    }

    fn spawn(
        &mut self,
        id: &str,
        executable: &serde_json::Value,
        key: AcquiredKey,
        static_token: Option<String>,
    ) {
        let now = self.clock.now_ms();
        let refuse = |agent: &mut Self, reason, problem: &str| {
            warn!(backend = id, "not started: {problem}");
            // Never for a backend that is here: its end is reported when nothing of it is left, not before.
            if !agent.outbox.holds(id) && !agent.backends.contains_key(id) {
                let last_status = BackendStatus::Scheduled;
                let state = BackendState::Terminated {
                    last_status,
                    termination: None,
                    reason: Some(reason),
                    exit_code: None,
                };
                agent.outbox.push(id, state, now, Some(key.token));
            }
        };
        // First of all: what runs here already, or may run under an earlier process's guard, is not reported as ended for
        // any other reason.
        match self.admission.judge(id, key.deadlines, self.lease, now) {
            Verdict::Start => {}
            Verdict::Repeated => return,
            Verdict::TooLate => {
                return refuse(self, TerminationReason::KeyExpired, "its soft deadline has passed");
            }
            Verdict::NotOurTime => {
                warn!(
                    backend = id,
                    "not started and not reported: its deadlines are not of this process's time; its key expires"
                );
                return;
            }
            Verdict::Ended(reason) => return refuse(self, reason, "it was to end before it came"),
            Verdict::Full => return refuse(self, TerminationReason::InternalError, "too many backends"),
        }
        if self.stopping.is_some() {
            self.admission.finished(id);
            return refuse(self, TerminationReason::Swept, "this drone is stopping");
        }
        let executable = match check_name("backend_id", id).and_then(|()| Executable::parse(executable)) {
            Ok(executable) => executable,
            Err(e) => {
                self.admission.finished(id);
                return refuse(self, TerminationReason::InternalError, &e.to_string());
            }
        };
        let address = match self.ports.take() {
            Ok(address) => address,
            Err(e) => {
                self.admission.finished(id);
                return refuse(self, TerminationReason::InternalError, &format!("no port: {e}"));
            }
        };
        info!(backend = id, key = key.key.name, token = key.token, %address, "starting");
        self.keeper.acquired(id, key.token, key.deadlines);
        let first = Want {
            deadlines: key.deadlines,
            end: None,
            kill_at: key.deadlines.hard_terminate_at,
            kill_ms: self.kill_ms(),
        };
        let (want, wants) = watch::channel(first);
        let mut backend = Backend::new(key.token, address, want);
        let effects = backend.life.begin();
        self.backends.insert(id.to_owned(), backend);
        self.carry_out(id, effects, now);
        let record = Record {
            boot_id: self.boot_id.clone(),
            backend: id.to_owned(),
            key: key.key.clone(),
            token: key.token,
            address,
            soft_boot_ms: self.clock.to_boot_ms(key.deadlines.soft_terminate_at),
            hard_boot_ms: self.clock.to_boot_ms(key.deadlines.hard_terminate_at),
        };
        let spec = BackendSpec {
            id: id.to_owned(),
            executable,
            key: key.key,
            token: key.token,
            static_token,
            address,
        };
        let (runtime, dirs, inputs) = (Arc::clone(&self.runtime), self.dirs.clone(), self.inputs.clone());
        tokio::spawn(run_backend(runtime, dirs, record, spec, wants, inputs));
    }

    /// Begins an end; grace ends at `kill_at` or the hard deadline. False if there is nothing to begin.
    fn end(&mut self, id: &str, kind: TerminationKind, reason: TerminationReason, kill_at: i64) -> bool {
        let Some(backend) = self.backends.get_mut(id) else { return false };
        let effects = backend.life.end(kind, reason);
        let begun = effects.end.is_some();
        self.carry_out(id, effects, kill_at);
        begun
    }

    fn end_all(&mut self, kind: TerminationKind, reason: TerminationReason, kill_at: i64) {
        let ids: Vec<String> = self.backends.keys().cloned().collect();
        for id in ids {
            self.end(&id, kind, reason, kill_at);
        }
    }

    fn fact(&mut self, id: &str, fact: Fact) -> Result<(), AgentError> {
        let fact = match fact {
            Fact::Metrics(metrics) => {
                self.send(MessageFromDrone::BackendMetrics(metrics));
                return Ok(());
            }
            Fact::ConnectionsAt(place) => {
                if let Some(backend) = self.backends.get_mut(id) {
                    backend.place = place;
                }
                return Ok(());
            }
            fact => fact,
        };
        let Some(backend) = self.backends.get_mut(id) else { return Ok(()) };
        backend.answers |= fact == Fact::Ready;
        let gone = fact == Fact::Gone;
        let exited = matches!(fact, Fact::Exited(_));
        let effects = backend.life.learn(fact);
        let address = backend.address;
        let grace_until = self.clock.now_ms().saturating_add(GRACE_MS);
        self.carry_out(id, effects, grace_until);
        if exited {
            // Nothing is left to renew the key for.
            self.keeper.ending(id);
        }
        if gone {
            self.keeper.ended(id);
            self.unconfirmed.remove(id);
            self.activity.forget(id);
            self.ports.release(address);
            self.move_on()?;
        }
        Ok(())
    }

    /// Reports the states, and passes the end on to the keeper and the guard.
    fn carry_out(&mut self, id: &str, effects: Effects, kill_at: i64) {
        let now = self.clock.now_ms();
        let Some(backend) = self.backends.get(id) else { return };
        for state in effects.states {
            info!(backend = id, status = %state.status(), "reports");
            self.outbox.push(id, state, now, Some(backend.token));
        }
        if let Some(kind) = effects.end {
            self.keeper.ending(id);
            backend.want.send_modify(|want| {
                want.end = Some(kind);
                want.kill_at = kill_at.min(want.deadlines.hard_terminate_at);
            });
        }
    }

    /// The end of a backend is acknowledged, or is nobody's business any more.
    fn forget_journal(&self, id: String) {
        let dirs = self.dirs.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(e) = dirs.remove_journal(&id) {
                warn!(backend = id, "its journal is not removed, so its end will be reported again: {e}");
            }
        });
    }

    fn stop(&mut self) {
        let now = self.clock.now_ms();
        if self.stopping.is_some() {
            warn!("asked to stop again: killing the backends");
            let leave_at = now.saturating_add(STOP_KILL_MS);
            self.stopping = Some(Stopping { kill_at: now, leave_at, over_at: None });
            return;
        }
        info!(backends = self.backends.len(), "stopping");
        // First of all: what is started now would be ended at once.
        self.say_draining_at = Some(now);
        self.say_draining(now);
        let kill_at = now.saturating_add(STOP_MS_MAX);
        let leave_at = kill_at.saturating_add(STOP_KILL_MS);
        self.stopping = Some(Stopping { kill_at, leave_at, over_at: None });
        self.end_all(TerminationKind::Soft, TerminationReason::Swept, now.saturating_add(GRACE_MS));
    }

    /// Whether it was told to stop and everything is ended and reported, or has taken too long.
    fn has_stopped(&mut self) -> bool {
        if self.left {
            return true;
        }
        let Some(stopping) = &mut self.stopping else { return false };
        let now = self.clock.now_ms();
        if self.backends.values().all(|b| b.life.is_over()) {
            stopping.leave_at =
                stopping.leave_at.min(stopping.over_at.get_or_insert(now).saturating_add(STOP_REPORT_MS));
            if self.outbox.is_empty() {
                return true;
            }
        }
        let late = now >= stopping.leave_at;
        if late {
            error!(
                "leaves without having ended and reported everything; guards that are left keep their deadlines"
            );
        }
        late
    }

    fn tidy(&self) {
        let running: HashSet<String> =
            self.backends.iter().filter(|(_, b)| !b.life.is_over()).map(|(id, _)| id.clone()).collect();
        let dirs = self.dirs.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(e) = dirs.tidy(&running) {
                warn!("cannot tidy the backends' directories: {e}");
            }
        });
    }

    fn send(&self, message: MessageFromDrone) {
        if let Some(session) = &self.session
            && session.try_send(message).is_err()
        {
            debug!("no room in the session: the message is made again later");
        }
    }
}

/// Makes a backend's record durable, runs it, and tells the agent what is found.
async fn run_backend(
    runtime: Arc<dyn Runtime>,
    dirs: BackendsDir,
    record: Record,
    spec: BackendSpec,
    wants: watch::Receiver<Want>,
    inputs: mpsc::Sender<Input>,
) {
    let (id, address) = (spec.id.clone(), spec.address);
    let (sender, facts) = mpsc::channel(FACTS_MAX);
    let run = async {
        let written = tokio::task::spawn_blocking(move || dirs.write_journal(&record)).await;
        if let Err(e) = written.map_err(io::Error::other).flatten() {
            warn!(backend = spec.id, "not started: its journal cannot be written: {e}");
            // Without a listener the drone is ending.
            let _ = sender.send(Fact::Failed).await;
            let _ = sender.send(Fact::Gone).await;
            return;
        }
        runtime.run(spec, wants, sender).await;
    };
    tokio::join!(run, pass_on(id, address, facts, inputs));
}

/// Passes on what is found of a backend, and asks for its first answer from the moment when it runs.
async fn pass_on(
    id: String,
    address: SocketAddr,
    mut facts: mpsc::Receiver<Fact>,
    inputs: mpsc::Sender<Input>,
) {
    let ready = readiness::answers(address);
    tokio::pin!(ready);
    let mut asking = false;
    loop {
        let fact = tokio::select! {
            fact = facts.recv() => match fact {
                Some(fact) => fact,
                None => return,
            },
            answered = &mut ready, if asking => {
                asking = false;
                if answered { Fact::Ready } else { Fact::StartupTimeout }
            }
        };
        match fact {
            Fact::Started => asking = true,
            Fact::Exited(_) | Fact::Killing => asking = false,
            _ => {}
        }
        if inputs.send(Input::Backend { id: id.clone(), fact }).await.is_err() {
            return;
        }
    }
}
