//! The loop of one session.

use super::actions::{self, ACTIONS_AT_ONCE_MAX, Tracker};
use super::drift::Measured;
use super::frames::{self, Frame};
use super::jobs::{self, Done};
use super::outbox::Outbox;
use super::registry::{Place, Probe};
use super::word::{Next, Word};
use super::{DRONE_FRAME_BYTES_MAX, End, renewals};
use crate::app::App;
use crate::hub::Watch;
use axum::extract::ws::{Message, WebSocket};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, SplitStream};
use futures::{FutureExt, StreamExt};
use holdfast_core::command::HeartbeatItem;
use holdfast_core::kv::StateError;
use holdfast_core::limits::{ACKS_PER_ENTRY_MAX, REPORTS_PER_ENTRY_MAX};
use holdfast_core::listing::Listing;
use holdfast_core::outcome::Outcome;
use holdfast_core::view::DueAction;
use holdfast_wire::drone::{
    Action, ActionMessage, AskAgain, BackendEvent, BackendsPage, CLOSE_BAD_MESSAGE, CLOSE_GO_ELSEWHERE,
    CLOSE_NAME_TAKEN, MessageFromDrone, MessageToDrone,
};
use holdfast_wire::{BackendStatus, LeaseConfig, TerminationKind, TerminationReason};
use raft_store::ProposeError;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// How often a drone is pinged and unacknowledged actions are looked at.
const TICK: Duration = Duration::from_secs(1);
/// A drone that says nothing for so long, not even to a ping, is gone.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// How long proposals may fail for want of a leader before the drone is sent elsewhere. Each of them has looked for one
/// for a while itself.
const FAILING_MAX: Duration = Duration::from_secs(1);
/// How long this replica may lag behind what the leader has said was applied, before the drone is sent elsewhere: its
/// actions come from the state here.
const BEHIND_MAX: Duration = Duration::from_secs(2);
/// Renewal entries of one session under way.
pub const RENEWALS_UNDER_WAY_MAX: usize = 4;
/// State reports that wait for an entry. What does not fit is not acknowledged, and the drone sends it again.
const REPORTS_QUEUED_MAX: usize = 8192;
/// Acknowledgements that wait for an entry.
const ACKS_QUEUED_MAX: usize = 8192;
/// Backends that wait to be told to end.
const ENDS_QUEUED_MAX: usize = renewals::QUEUED_KEYS_MAX;
/// Frames read in one turn before what they ask for is begun.
const FRAMES_PER_TURN_MAX: usize = 256;
/// Ids of actions that are not in the state begin so; log indexes are never 0.
const UNRECORDED_ACTION: &str = "ak-0-";

/// See the module.
pub struct Session {
    app: App,
    outbox: Outbox,
    pub(super) drone_id: i32,
    session: String,
    /// Of the process at the other end.
    incarnation: String,
    /// Of its data directory; `None`: a drone of Plane's.
    data_id: Option<String>,
    place: Place,
    /// On this drone's actions and sessions.
    watch: Watch,
    /// When the drone last said anything.
    heard: Instant,
    began: Instant,
    /// How fast its clock runs.
    measured: Measured,
    probes: Vec<Probe>,
    renewals: renewals::Queue,
    renewing: usize,
    reports: VecDeque<BackendEvent>,
    reporting: bool,
    acks: Vec<String>,
    acknowledging: bool,
    word: Word,
    actions: Tracker,
    /// There may be actions that found no room yet.
    pub(super) more_actions: bool,
    /// Pages of the drone's list of backends that were not looked at yet.
    pub(super) pages: VecDeque<BackendsPage>,
    /// What the pages before say. It is with the page that is in flight.
    pub(super) listing: Option<Listing>,
    paging: bool,
    /// The list has taken effect; a drone of Plane's sends none. No action is sent before.
    pub(super) is_listed: bool,
    /// Backends listed so far.
    pub(super) listed: usize,
    /// The last page has come. A drone of Plane's sends none.
    pub(super) list_ended: bool,
    /// Backends whose keys are not theirs.
    pub(super) ends: VecDeque<String>,
    ends_sent: u64,
    jobs: FuturesUnordered<BoxFuture<'static, Done>>,
}

/// The acknowledgement of a notice with the backends that the drone has to look at again.
fn asking_again(message: MessageToDrone, idle: Vec<(String, u64)>) -> MessageToDrone {
    match message {
        MessageToDrone::AckActivity { activity_id, .. } => {
            let again = idle.into_iter().map(|(backend, in_ms)| AskAgain { backend, in_ms }).collect();
            MessageToDrone::AckActivity { activity_id, again }
        }
        other => other,
    }
}

pub(super) fn damaged(error: StateError) -> End {
    tracing::error!(%error, "reading the state failed");
    End::close(CLOSE_GO_ELSEWHERE, "reading the state failed")
}

impl Session {
    /// A session that was registered. `watch` began before anything of its drone was looked at.
    pub fn new(
        app: App,
        outbox: Outbox,
        drone_id: i32,
        session: String,
        (incarnation, data_id): (String, Option<String>),
        place: Place,
        watch: Watch,
    ) -> Self {
        let name = app.store.local().view.drone(drone_id).ok().flatten().map(|drone| drone.name);
        let name = name.unwrap_or_else(|| drone_id.to_string());
        let measured = app.drifts.enter(&session, &name);
        Self {
            app,
            outbox,
            drone_id,
            session,
            incarnation,
            is_listed: data_id.is_none(),
            list_ended: data_id.is_none(),
            data_id,
            place,
            watch,
            heard: Instant::now(),
            began: Instant::now(),
            measured,
            probes: Vec::new(),
            renewals: renewals::Queue::default(),
            renewing: 0,
            reports: VecDeque::new(),
            reporting: false,
            acks: Vec::new(),
            acknowledging: false,
            word: Word::default(),
            actions: Tracker::default(),
            more_actions: false,
            pages: VecDeque::new(),
            listing: None,
            paging: false,
            listed: 0,
            ends: VecDeque::new(),
            ends_sent: 0,
            jobs: FuturesUnordered::new(),
        }
    }

    /// Runs until the session ends. `early` are frames that came before it began.
    pub async fn run(mut self, early: Vec<Message>, stream: &mut SplitStream<WebSocket>) -> End {
        for frame in early {
            if let Err(end) = self.frame(Some(Ok(frame))) {
                return end;
            }
        }
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stopping = self.app.stopping.clone();
        loop {
            let turn = tokio::select! {
                () = stopping.cancelled() => {
                    return End::close(CLOSE_GO_ELSEWHERE, "this controller is stopping");
                }
                frame = stream.next() => self.frames(frame, stream),
                Some(done) = self.jobs.next(), if !self.jobs.is_empty() => self.finish(done),
                () = self.watch.changed() => self.look(),
                Some(probe) = self.place.probes.recv() => self.probe(probe),
                // The first tick comes at once: the first look at what is due.
                _ = tick.tick() => self.tick(),
                room = self.outbox.room(), if !self.outbox.is_empty() => {
                    room.and_then(|()| self.outbox.flush(Instant::now()))
                }
            };
            if let Err(end) = turn.and_then(|()| self.go_on()) {
                return end;
            }
        }
    }

    /// A frame and those that have come with it.
    fn frames(
        &mut self,
        first: Option<Result<Message, axum::Error>>,
        stream: &mut SplitStream<WebSocket>,
    ) -> Result<(), End> {
        self.frame(first)?;
        for _ in 1..FRAMES_PER_TURN_MAX {
            let Some(frame) = stream.next().now_or_never() else { break };
            self.frame(frame)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: Option<Result<Message, axum::Error>>) -> Result<(), End> {
        // A half frame or a broken connection is the end of a session and nothing more.
        let Some(Ok(frame)) = frame else { return Err(End::Gone) };
        self.heard = Instant::now();
        for probe in self.probes.drain(..) {
            // Whoever asked may have given up.
            let _ = probe.send(());
        }
        match frame {
            Message::Text(text) => match frames::read(&text) {
                Frame::Message(message) => self.message(message)?,
                Frame::Unknown(kind) => {
                    tracing::warn!(drone_id = self.drone_id, kind, "message of an unknown kind ignored");
                }
                Frame::Bad(reason) => return Err(End::close(CLOSE_BAD_MESSAGE, reason)),
            },
            Message::Binary(_) => {
                return Err(End::close(CLOSE_BAD_MESSAGE, "binary frames are not understood"));
            }
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Close(_) => return Err(End::Gone),
        }
        Ok(())
    }

    fn message(&mut self, message: MessageFromDrone) -> Result<(), End> {
        match message {
            MessageFromDrone::Heartbeat(heartbeat) => {
                let mine_ms = i64::try_from(self.heard.duration_since(self.began).as_millis());
                self.measured.heartbeat(heartbeat.local_time, mine_ms.unwrap_or(i64::MAX));
                let item = HeartbeatItem {
                    drone_id: self.drone_id,
                    session: self.session.clone(),
                    local_time_ms: heartbeat.local_time,
                };
                if self.app.heartbeats.try_send(item).is_err() {
                    tracing::warn!(drone_id = self.drone_id, "heartbeat dropped: too many are under way");
                }
            }
            MessageFromDrone::RenewKey(renew) => {
                self.queue_renewal(renewals::Request::single(renew, self.heard));
            }
            MessageFromDrone::RenewKeys(renew) => {
                self.queue_renewal(renewals::Request::batch(renew, self.heard));
            }
            MessageFromDrone::BackendEvent(event) => {
                if self.reports.len() < REPORTS_QUEUED_MAX {
                    self.reports.push_back(event);
                }
            }
            MessageFromDrone::AckAction { action_id } => {
                if !action_id.starts_with(UNRECORDED_ACTION) && self.acks.len() < ACKS_QUEUED_MAX {
                    self.acks.push(action_id);
                }
            }
            MessageFromDrone::BackendMetrics(_) => {}
            MessageFromDrone::Draining {} => self.word.leaving(),
            MessageFromDrone::BackendActivity(activity) => self.word.activity(activity),
            MessageFromDrone::Backends(page) => return self.page(page),
        }
        Ok(())
    }

    fn queue_renewal(&mut self, request: renewals::Request) {
        let dropped = self.renewals.push(request);
        if dropped > 0 {
            tracing::warn!(drone_id = self.drone_id, dropped, "renewals left unanswered: too many wait");
        }
    }

    /// Begins and says what can be begun and said now.
    fn go_on(&mut self) -> Result<(), End> {
        loop {
            self.begin()?;
            let was_busy = self.outbox.is_busy();
            self.outbox.flush(Instant::now())?;
            // What was left because of it can go on; nothing else might wake this session for that.
            if !was_busy || self.outbox.is_busy() {
                return Ok(());
            }
        }
    }

    /// Begins what is queued and may begin. Nothing that brings more messages is begun while many wait.
    fn begin(&mut self) -> Result<(), End> {
        while self.renewing < RENEWALS_UNDER_WAY_MAX && !self.renewals.is_empty() && !self.outbox.is_busy() {
            let requests = self.renewals.take();
            let lease = self.lease()?;
            if renewals::count(&requests) == 0 {
                self.answer_renewals(&requests, &[], &lease)?;
                continue;
            }
            self.renewing += 1;
            self.jobs.push(jobs::renew(self.app.clone(), self.drone_id, requests, lease));
        }
        if !self.reporting && !self.reports.is_empty() && !self.outbox.is_busy() {
            let count = self.reports.len().min(REPORTS_PER_ENTRY_MAX);
            let events = self.reports.drain(..count).collect();
            self.reporting = true;
            self.jobs.push(jobs::report(self.app.clone(), self.drone_id, self.data_id.clone(), events));
        }
        if !self.acknowledging && !self.acks.is_empty() {
            let count = self.acks.len().min(ACKS_PER_ENTRY_MAX);
            let action_ids = self.acks.drain(..count).collect();
            self.acknowledging = true;
            self.jobs.push(jobs::acknowledge(self.app.clone(), self.drone_id, action_ids));
        }
        if !self.paging
            && let Some(page) = self.pages.pop_front()
        {
            self.paging = true;
            let (session, listing) = (self.session.clone(), self.listing.take());
            self.jobs.push(jobs::page(self.app.clone(), self.drone_id, session, listing, page));
        }
        while self.word.waits() && !self.outbox.is_busy() {
            let (view, _, drone_id) = self.view();
            let from = (self.session.as_str(), self.incarnation.as_str());
            match self.word.next(drone_id, from, &view).map_err(damaged)? {
                Some(Next::Answer(message)) => self.send(&message)?,
                Some(Next::Record { command, answer }) => {
                    self.jobs.push(jobs::record(self.app.clone(), command, answer));
                }
                None => break,
            }
        }
        while self.more_actions && !self.outbox.is_busy() {
            self.look()?;
        }
        self.send_ends()
    }

    fn finish(&mut self, done: Done) -> Result<(), End> {
        match done {
            Done::Renewed { requests, answer } => {
                self.renewing -= 1;
                match answer {
                    Ok(Outcome::Renewed(outcomes)) => {
                        let lease = self.lease()?;
                        self.answer_renewals(&requests, &outcomes, &lease)
                    }
                    Ok(other) => Err(self.unexpected(&other)),
                    // It was held as long as there was sense in it. The drone may still ask again.
                    Err(error) => self.failed("a renewal", &error),
                }
            }
            Done::Reported { events, answer } => {
                self.reporting = false;
                self.reported(&events, answer)
            }
            Done::Acknowledged(answer) => {
                self.acknowledging = false;
                // Unacknowledged actions are sent again, so nothing is lost.
                answer.map(|_| ()).or_else(|error| self.failed("an acknowledgement", &error))
            }
            Done::Recorded { message, answer } => {
                self.word.recorded();
                match answer {
                    Ok(Outcome::Done) => self.send(&message),
                    Ok(Outcome::Idle(idle)) => self.send(&asking_again(*message, idle)),
                    Ok(other) => Err(self.unexpected(&other)),
                    // Without an answer the drone says it again.
                    Err(error) => self.failed("a word of the drone", &error),
                }
            }
            Done::Paged(paged) => {
                self.paging = false;
                self.paged(paged)
            }
        }
    }

    fn failed(&self, what: &str, error: &ProposeError) -> Result<(), End> {
        tracing::warn!(drone_id = self.drone_id, %error, "{what} failed");
        match error {
            ProposeError::Stopped(_) => Err(End::close(CLOSE_GO_ELSEWHERE, "this controller has stopped")),
            _ => Ok(()),
        }
    }

    pub(super) fn unexpected(&self, outcome: &Outcome) -> End {
        tracing::error!(drone_id = self.drone_id, ?outcome, "unexpected outcome");
        End::close(CLOSE_GO_ELSEWHERE, "unexpected outcome")
    }

    fn reported(
        &mut self,
        events: &[BackendEvent],
        answer: Result<Outcome, ProposeError>,
    ) -> Result<(), End> {
        let outcomes = match answer {
            Ok(Outcome::Reported(outcomes)) => outcomes,
            Ok(other) => return Err(self.unexpected(&other)),
            Err(error) => return self.failed("a report", &error),
        };
        for (event, outcome) in events.iter().zip(outcomes) {
            if outcome.must_end() {
                if event.state.status() != BackendStatus::Terminated && self.ends.len() < ENDS_QUEUED_MAX {
                    self.ends.push_back(event.backend_id.clone());
                }
                tracing::warn!(
                    drone_id = self.drone_id,
                    backend = %event.backend_id,
                    state = %event.state.status(),
                    ?outcome,
                    "a report of a backend that must not run"
                );
            }
            self.send(&MessageToDrone::AckEvent { event_id: event.event_id })?;
        }
        Ok(())
    }

    fn answer_renewals(
        &mut self,
        requests: &[renewals::Request],
        outcomes: &[holdfast_core::outcome::RenewOutcome],
        lease: &LeaseConfig,
    ) -> Result<(), End> {
        let answers = renewals::answers(requests, outcomes, lease, Instant::now());
        for message in &answers.messages {
            self.send(message)?;
        }
        let room = ENDS_QUEUED_MAX.saturating_sub(self.ends.len());
        self.ends.extend(answers.end.into_iter().take(room));
        Ok(())
    }

    /// The durations as of this replica's state, which is never older than the drone's keys (invariant 1).
    fn lease(&self) -> Result<LeaseConfig, End> {
        match self.app.store.local().view.cluster() {
            Ok(Some(cluster)) => Ok(cluster.lease),
            Ok(None) => Err(End::close(CLOSE_GO_ELSEWHERE, "the cluster is not formed here")),
            Err(error) => Err(damaged(error)),
        }
    }

    /// Tells the drone to end backends that hold no key. These actions are not in the state: the drone's next renewal, list
    /// or report of the backend is answered in the same way.
    fn send_ends(&mut self) -> Result<(), End> {
        while self.is_listed && !self.outbox.is_busy() {
            let Some(backend_id) = self.ends.pop_front() else { break };
            self.ends_sent += 1;
            self.send(&MessageToDrone::Action(ActionMessage {
                action_id: format!("{UNRECORDED_ACTION}{}", self.ends_sent),
                backend_id,
                drone_id: self.drone_id,
                action: Action::Terminate {
                    kind: TerminationKind::Hard,
                    reason: TerminationReason::KeyExpired,
                },
            }))?;
        }
        Ok(())
    }

    fn probe(&mut self, probe: Probe) -> Result<(), End> {
        self.probes.retain(|probe| !probe.is_closed());
        self.probes.push(probe);
        self.ping()
    }

    /// While many messages wait a ping would only wait behind them.
    fn ping(&mut self) -> Result<(), End> {
        if self.outbox.is_busy() {
            return Ok(());
        }
        self.outbox.push(Message::Ping(Vec::new().into()), Instant::now())
    }

    fn tick(&mut self) -> Result<(), End> {
        if self.heard.elapsed() > SILENCE_MAX {
            return Err(End::close(CLOSE_GO_ELSEWHERE, "the drone was silent for too long"));
        }
        if self.app.store.removed().is_some() {
            return Err(End::close(CLOSE_GO_ELSEWHERE, "this controller was removed from the cluster"));
        }
        if self.app.failing_for() > FAILING_MAX {
            return Err(End::close(CLOSE_GO_ELSEWHERE, "this controller reaches no leader"));
        }
        if self.app.behind_for() > BEHIND_MAX {
            return Err(End::close(CLOSE_GO_ELSEWHERE, "this controller lags behind the cluster"));
        }
        if self.outbox.is_stalled(Instant::now()) {
            tracing::warn!(drone_id = self.drone_id, "the drone takes nothing of what is sent to it");
            return Err(End::Gone);
        }
        self.ping()?;
        self.look()?;
        let (view, now_ms, drone_id) = self.view();
        let room = self.room();
        let again = self
            .actions
            .again(Instant::now(), room, |after, limit| {
                view.due_actions(drone_id, &self.session, after, now_ms, limit)
            })
            .map_err(damaged)?;
        self.send_actions(again)
    }

    /// Looks at what the state says of this drone.
    fn look(&mut self) -> Result<(), End> {
        let (view, now_ms, drone_id) = self.view();
        let drone = view.drone(drone_id).map_err(damaged)?;
        if drone.is_none_or(|drone| drone.session != self.session) {
            return Err(End::close(CLOSE_NAME_TAKEN, "a newer session of this drone has taken over"));
        }
        let room = self.room();
        let fresh = self
            .actions
            .fresh(Instant::now(), room, |after, limit| {
                view.due_actions(drone_id, &self.session, after, now_ms, limit)
            })
            .map_err(damaged)?;
        self.more_actions = fresh.len() >= room;
        self.send_actions(fresh)
    }

    fn view(&self) -> (holdfast_core::view::View<raft_store::state_db::StateHandle>, u64, i32) {
        let local = self.app.store.local();
        (local.view, local.now_ms, self.drone_id)
    }

    /// How many actions may be queued now.
    fn room(&self) -> usize {
        if self.outbox.is_busy() { 0 } else { ACTIONS_AT_ONCE_MAX }
    }

    fn send_actions(&mut self, due: Vec<DueAction>) -> Result<(), End> {
        for action in due {
            match actions::message(self.drone_id, action) {
                Ok(message) => self.send(&MessageToDrone::Action(message))?,
                Err(error) => {
                    tracing::error!(drone_id = self.drone_id, %error, "an executable in the state is not JSON");
                }
            }
        }
        Ok(())
    }

    pub(super) fn send(&mut self, message: &MessageToDrone) -> Result<(), End> {
        match serde_json::to_string(message) {
            // It would end every session that sent it, and each next one would send it again.
            Ok(text) if text.len() > DRONE_FRAME_BYTES_MAX => {
                tracing::error!(
                    drone_id = self.drone_id,
                    bytes = text.len(),
                    "a message is too large to be sent"
                );
                Ok(())
            }
            Ok(text) => self.outbox.push(Message::Text(text.into()), Instant::now()),
            Err(error) => {
                tracing::error!(drone_id = self.drone_id, %error, "a message can't be written as JSON");
                Ok(())
            }
        }
    }
}
