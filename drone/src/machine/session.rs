//! Sessions with controllers: registration, the list of backends, actions, renewals and acknowledgements.

use super::spawns::Request;
use super::{Effect, Machine, Phase};
use crate::lease::{Duty, Renewal};
use holdfast_wire::drone::{
    Action, ActionMessage, BackendsPage, ControllerHandshake, ListedBackend, MessageFromDrone,
    MessageToDrone, RenewKeysResponse, RenewedKey,
};
use holdfast_wire::limits::BACKENDS_PER_PAGE_MAX;
use holdfast_wire::{BackendStatus, TerminationKind, TerminationReason};
use tracing::{debug, warn};

/// Directories that take longer to read are named before it is known what they hold, in milliseconds after the start.
const READ_MS_MAX: i64 = 2_000;
/// After how long a page is sent again that was not acknowledged, in milliseconds; it doubles. Controllers that are older
/// than this message never acknowledge it.
const PAGE_AGAIN_MS_MIN: i64 = 5_000;
/// Longest such time.
const PAGE_AGAIN_MS_MAX: i64 = 60_000;

/// The list of all backends, as far as this session has it.
#[derive(Debug)]
pub(super) struct Listing {
    /// The last backend that was listed and acknowledged.
    after: Option<String>,
    /// The page in flight, and when it is sent again.
    page: Option<Page>,
    pause_ms: i64,
}

#[derive(Debug)]
struct Page {
    /// Its last backend.
    until: Option<String>,
    last: bool,
    again_at: i64,
}

impl Machine {
    /// A controller has answered the handshake.
    pub(super) fn connected(&mut self, session: u64, handshake: ControllerHandshake, now: i64) {
        if session <= self.newest_session {
            return;
        }
        self.session = Some(session);
        self.newest_session = session;
        self.listing = Some(Listing { after: None, page: None, pause_ms: PAGE_AGAIN_MS_MIN });
        self.outbox.session_lost();
        self.activity.connected(now);
        if self.stopping.is_some() {
            self.say_draining_at = Some(now);
        }
        self.lease = handshake.lease;
        self.guard_patience_of_all(now);
        self.keeper.ask_again(now);
        self.cluster.session = handshake.cluster_id;
        self.compare_clusters(now);
    }

    pub(super) fn lost(&mut self) {
        self.session = None;
        self.listing = None;
        self.outbox.session_lost();
    }

    /// Whether the controller's cluster is the one whose keys the backends hold, or the first one.
    fn compare_clusters(&mut self, now: i64) {
        if self.cluster.keeping.is_some() {
            // Compared again once that is durable.
            return;
        }
        match (self.cluster.session.clone(), &self.cluster.known) {
            (Some(id), Some(known)) if id != *known => {
                warn!("this is cluster {id}, not {known}: ending the old cluster's backends first");
                self.cluster.moving_to = Some(id);
                // The new cluster does not know these backends, and their ends concern no one there.
                self.end_all(TerminationKind::Hard, TerminationReason::Lost, now, now);
                self.move_on(now);
            }
            (Some(id), None) => self.keep_cluster_id(id),
            // The known cluster again: a move that was begun is called off; what it has ended stays ended.
            (Some(_), Some(_)) => self.cluster.moving_to = None,
            (None, _) => {}
        }
    }

    fn keep_cluster_id(&mut self, id: String) {
        self.cluster.keeping = Some(id.clone());
        self.effects.push(Effect::KeepClusterId(id));
    }

    pub(super) fn cluster_id_kept(&mut self, durable: bool, now: i64) {
        if durable {
            self.cluster.known = self.cluster.keeping.take();
            self.compare_clusters(now);
        } else {
            warn!("the cluster's id is not durable: nothing is started before it is");
            self.cluster.keep_again_at = Some(now.saturating_add(super::RETRY_MS));
        }
    }

    /// Completes a move to another cluster when nothing of the old one is left.
    pub(super) fn move_on(&mut self, now: i64) {
        if self.alive > 0 {
            return;
        }
        let Some(id) = self.cluster.moving_to.take() else { return };
        let over = self.backends.iter().filter(|(_, backend)| matches!(backend.phase, Phase::Over));
        let over: Vec<String> = over.map(|(id, _)| id.clone()).collect();
        for id in over {
            self.outbox.forget(&id);
            self.forget(&id);
        }
        self.admission.tidy(now);
        self.keep_cluster_id(id);
    }

    /// A backend that is over does not matter any more.
    fn forget(&mut self, id: &str) {
        self.admission.finished(id);
        if self.backends.remove(id).is_some_and(|backend| backend.on_disk) {
            self.effects.push(Effect::Forget { backend: id.to_owned() });
        }
    }

    /// Whether actions are taken: not while the cluster changes, and not without room for what has to be reported. The
    /// controllers repeat them.
    pub(super) fn takes_actions(&self) -> bool {
        self.cluster.moving_to.is_none() && self.cluster.keeping.is_none() && !self.outbox.is_full()
    }

    pub(super) fn message(&mut self, message: MessageToDrone, now: i64) {
        match message {
            MessageToDrone::Action(_) if !self.takes_actions() => {}
            MessageToDrone::Action(action) => self.action(action, now),
            MessageToDrone::AckEvent { event_id } => {
                if let Some(event) = self.outbox.acknowledged(event_id)
                    && event.state.status() == BackendStatus::Terminated
                {
                    // What it was before does not matter any more.
                    self.outbox.forget(&event.backend_id);
                    self.forget(&event.backend_id);
                }
            }
            MessageToDrone::RenewKeysResponse(response) => self.renewed(response, now),
            MessageToDrone::RenewKeyResponse(response) => {
                let key =
                    RenewedKey { backend: response.backend, deadlines: response.deadlines, refused: None };
                self.renewed(RenewKeysResponse { keys: vec![key] }, now);
            }
            MessageToDrone::AckDraining {} => self.say_draining_at = None,
            MessageToDrone::AckActivity { activity_id, again } => {
                self.activity.acknowledged(activity_id, &again, now);
            }
            MessageToDrone::AckBackends {} => self.page_acknowledged(),
        }
    }

    fn action(&mut self, message: ActionMessage, now: i64) {
        let ActionMessage { action_id, backend_id, action, .. } = message;
        match action {
            Action::Spawn { executable, key, static_token, incarnation } => {
                let request = Request { executable, key, static_token, incarnation };
                self.spawn(action_id, &backend_id, request, now);
            }
            Action::Terminate { kind, reason } => self.terminate(action_id, &backend_id, kind, reason, now),
        }
    }

    fn renewed(&mut self, response: RenewKeysResponse, now: i64) {
        let (kill_ms, expiry_ms) = (self.kill_ms(), self.expiry_ms());
        for RenewedKey { backend: id, deadlines, refused } in response.keys {
            self.confirmed(&id);
            if let Some(deadlines) = deadlines {
                match self.keeper.renewed(&id, deadlines, now) {
                    Renewal::Extended => {
                        let backend = self.backends.get_mut(&id);
                        if let Some(desired) = backend.and_then(|backend| backend.desired.as_mut()) {
                            desired.deadlines = deadlines;
                            desired.kill_ms = kill_ms;
                            desired.expiry_ms = expiry_ms;
                            let desired = *desired;
                            self.want(&id, desired);
                        }
                    }
                    Renewal::Malformed => warn!(backend = id, "renewed with deadlines that cannot be ours"),
                    other => debug!(backend = id, ?other, "the answer to a renewal does not count"),
                }
            } else if let Some(refusal) = refused {
                warn!(backend = id, ?refusal, "its key is not renewed");
                if let Some(Duty::HardTerminate { backend, reason }) = self.keeper.refused(&id, refusal) {
                    let end = super::End { kind: TerminationKind::Hard, reason, kill_at: now };
                    self.end(&backend, end, now);
                }
            }
        }
    }

    /// Sends the next page of the list, or one again that was not acknowledged. It is not sent before it is known what the
    /// directories hold, unless that takes too long; and to another cluster only once nothing of the old one is left.
    pub(super) fn list(&mut self, now: i64) {
        let ready = self.unread == 0 || now >= self.started_at.saturating_add(READ_MS_MAX);
        if !ready || self.cluster.moving_to.is_some() || self.cluster.keeping.is_some() {
            return;
        }
        let Some(listing) = &mut self.listing else { return };
        if listing.page.as_ref().is_some_and(|page| now < page.again_at) {
            return;
        }
        if listing.page.is_some() {
            listing.pause_ms = (2 * listing.pause_ms).min(PAGE_AGAIN_MS_MAX);
        }
        let mut rest = self.backends.after(listing.after.as_deref());
        let backends: Vec<ListedBackend> = rest
            .by_ref()
            .take(BACKENDS_PER_PAGE_MAX)
            .map(|(id, backend)| ListedBackend {
                backend: id.clone(),
                token: backend.token,
                state: backend.latest.clone(),
            })
            .collect();
        let last = rest.next().is_none();
        drop(rest);
        let until = backends.last().map(|listed| listed.backend.clone());
        listing.page = Some(Page { until, last, again_at: now.saturating_add(listing.pause_ms) });
        self.send(MessageFromDrone::Backends(BackendsPage { backends, last }));
    }

    fn page_acknowledged(&mut self) {
        let Some(listing) = &mut self.listing else { return };
        match listing.page.take() {
            Some(page) if page.last => self.listing = None,
            Some(page) => listing.after = page.until,
            None => {}
        }
    }

    /// When [`Machine::list`] next has something to do.
    pub(super) fn listing_wake(&self) -> Option<i64> {
        let listing = self.listing.as_ref()?;
        if self.cluster.moving_to.is_some() || self.cluster.keeping.is_some() {
            return None;
        }
        match &listing.page {
            Some(page) => Some(page.again_at),
            None => Some(self.started_at.saturating_add(READ_MS_MAX)),
        }
    }
}
