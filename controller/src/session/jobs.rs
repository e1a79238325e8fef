//! Proposals of a session. They run beside its loop, which goes on reading meanwhile.

use super::{renewals, together};
use crate::app::App;
use crate::hub::{Hub, Topic};
use futures::FutureExt;
use futures::future::BoxFuture;
use holdfast_core::command::{FromDrone, Renew, ReportStates, StateReport};
use holdfast_core::kv::StateError;
use holdfast_core::listing::Listing;
use holdfast_core::outcome::Outcome;
use holdfast_wire::drone::{BackendEvent, BackendsPage, MessageToDrone};
use holdfast_wire::{BackendState, LeaseConfig};
use raft_store::ProposeError;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Pause before a proposal is repeated that failed at once (too much under way, outcome unknown). There is no event to
/// wait for.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A proposal that has ended.
pub enum Done {
    /// See [`renew`].
    Renewed {
        /// What it was for.
        requests: Vec<renewals::Request>,
        /// What became of it.
        answer: Result<Outcome, ProposeError>,
    },
    /// See [`report`].
    Reported {
        /// What it was for.
        events: Vec<BackendEvent>,
        /// What became of it.
        answer: Result<Outcome, ProposeError>,
    },
    /// See [`acknowledge`].
    Acknowledged(Result<Outcome, ProposeError>),
    /// See [`record`].
    Recorded {
        /// What is said once it is recorded.
        message: Box<MessageToDrone>,
        /// What became of it.
        answer: Result<Outcome, ProposeError>,
    },
    /// See [`page`].
    Paged(Result<Paged, PageError>),
}

/// A page of a drone's list that was taken.
pub enum Paged {
    /// More pages follow.
    More(Box<Listing>),
    /// It was the last one, and the list took effect. These backends hold no key.
    Complete(Vec<String>),
}

/// A page that was not taken.
pub enum PageError {
    /// The state could not be read.
    State(StateError),
    /// The session is not the drone's any more.
    OtherSession,
    /// What follows from the list could not be proposed.
    Propose(ProposeError),
    /// What follows from the list was refused, which no entry of a list is.
    Unexpected(Box<Outcome>),
}

/// One try, of which nobody waits for the end after `until`.
async fn once(
    app: &App,
    command: FromDrone,
    urgent: bool,
    until: Option<Instant>,
) -> Result<Outcome, ProposeError> {
    let ended = || ProposeError::Stopped("this controller is stopping".to_owned());
    let (answer, answered) = oneshot::channel();
    let outcome = async {
        app.together.send(together::Item { command, urgent, answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    };
    match until {
        None => outcome.await,
        Some(until) => tokio::time::timeout_at(until.into(), outcome)
            .await
            .unwrap_or_else(|_| Err(ProposeError::OutcomeUnknown("the lease is nearly over".to_owned()))),
    }
}

/// Proposes what `command` makes until the answer is definite, or `until`. Only for commands that may be applied twice.
/// See [`together::Item`] for `urgent`.
async fn patiently(
    app: &App,
    command: impl Fn() -> FromDrone,
    urgent: bool,
    until: Option<Instant>,
) -> Result<Outcome, ProposeError> {
    loop {
        let outcome = once(app, command(), urgent, until).await;
        match &outcome {
            Err(ProposeError::NoLeader | ProposeError::OutcomeUnknown(_) | ProposeError::Overloaded)
                if until.is_none_or(|until| Instant::now() + RETRY_PAUSE < until) =>
            {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            _ => return outcome,
        }
    }
}

/// Renews. Through a leader change it is held and repeated, as long as the lease leaves sense in it.
pub fn renew(
    app: App,
    drone_id: i32,
    requests: Vec<renewals::Request>,
    lease: LeaseConfig,
) -> BoxFuture<'static, Done> {
    async move {
        let until = renewals::give_up_at(&requests, &lease);
        let pieces = renewals::pieces(&requests, together::ITEMS_PER_ENTRY).into_iter().map(|piece| {
            let (app, requests) = (&app, &requests);
            let renew =
                move || FromDrone::Renew(Renew { drone_id, keys: renewals::keys(requests, piece.clone()) });
            patiently(app, renew, true, until)
        });
        let mut outcomes = Vec::new();
        let mut answer = Ok(());
        for piece in futures::future::join_all(pieces).await {
            match piece {
                Ok(Outcome::Renewed(renewed)) => outcomes.extend(renewed),
                Ok(other) => answer = Err(other),
                Err(error) => return Done::Renewed { requests, answer: Err(error) },
            }
        }
        let answer = answer.map_or_else(Ok, |()| Ok(Outcome::Renewed(outcomes)));
        Done::Renewed { requests, answer }
    }
    .boxed()
}

/// Whether somebody waits for one of these: an end frees a key, and a backend may be watched.
fn is_urgent(hub: &Hub, events: &[BackendEvent]) -> bool {
    events.iter().any(|event| {
        matches!(event.state, BackendState::Terminated { .. })
            || hub.is_watched(&Topic::Backend(event.backend_id.clone()))
    })
}

/// Records states, in order. Repeating is harmless: states only rise.
pub fn report(
    app: App,
    drone_id: i32,
    data_id: Option<String>,
    events: Vec<BackendEvent>,
) -> BoxFuture<'static, Done> {
    async move {
        let reports = || {
            events.iter().map(|event| StateReport {
                backend_id: event.backend_id.clone(),
                state: event.state.clone(),
                token: event.token,
            })
        };
        let report = || {
            let (data_id, reports) = (data_id.clone(), reports().collect());
            FromDrone::ReportStates(ReportStates { drone_id, data_id, reports })
        };
        let urgent = is_urgent(&app.hub, &events);
        let answer = patiently(&app, report, urgent, None).await;
        Done::Reported { events, answer }
    }
    .boxed()
}

/// Records that the drone has its actions.
pub fn acknowledge(app: App, drone_id: i32, action_ids: Vec<String>) -> BoxFuture<'static, Done> {
    async move {
        let acknowledge = || FromDrone::AckActions { drone_id, action_ids: action_ids.clone() };
        Done::Acknowledged(patiently(&app, acknowledge, false, None).await)
    }
    .boxed()
}

/// Records a word of the drone. Repeating is harmless: it is numbered, or the same each time.
pub fn record(app: App, command: FromDrone, message: MessageToDrone) -> BoxFuture<'static, Done> {
    let message = Box::new(message);
    async move { Done::Recorded { message, answer: patiently(&app, || command.clone(), true, None).await } }
        .boxed()
}

/// Compares a page with the state here, and has what follows from the whole list recorded after the last page. Repeating is
/// harmless: each entry says the same again.
pub fn page(
    app: App,
    drone_id: i32,
    session: String,
    listing: Option<Listing>,
    page: BackendsPage,
) -> BoxFuture<'static, Done> {
    async move {
        let view = app.store.local().view;
        let is_last = page.last;
        let compare = move || -> Result<Listing, PageError> {
            let mut listing = match listing {
                Some(listing) => listing,
                None => {
                    let drone = view.drone(drone_id).map_err(PageError::State)?;
                    let drone = drone.filter(|drone| drone.session == session);
                    let drone = drone.ok_or(PageError::OtherSession)?;
                    Listing::begin(&view, drone_id, &drone).map_err(PageError::State)?
                }
            };
            listing.page(&view, &page.backends).map_err(PageError::State)?;
            Ok(listing)
        };
        let compared = tokio::task::spawn_blocking(compare).await;
        let compared = compared
            .unwrap_or_else(|error| Err(PageError::State(StateError::Read(format!("a list: {error}")))));
        let listing = match compared {
            Ok(listing) if is_last => listing,
            other => return Done::Paged(other.map(|listing| Paged::More(Box::new(listing)))),
        };
        let differences = listing.finish();
        for entry in differences.entries {
            match patiently(&app, || FromDrone::Listed(entry.clone()), true, None).await {
                Ok(Outcome::Done) => {}
                Ok(other) => return Done::Paged(Err(PageError::Unexpected(Box::new(other)))),
                Err(error) => return Done::Paged(Err(PageError::Propose(error))),
            }
        }
        Done::Paged(Ok(Paged::Complete(differences.not_held)))
    }
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::BackendStatus;
    use std::sync::Arc;

    #[test]
    fn a_report_is_urgent_if_it_ends_a_backend_or_somebody_watches_one() {
        let hub = Arc::new(Hub::default());
        let event = |backend_id: &str, state| BackendEvent {
            event_id: 1,
            backend_id: backend_id.into(),
            state,
            timestamp: 0,
            token: Some(1),
        };
        let terminated = BackendState::Terminated {
            last_status: BackendStatus::Ready,
            termination: None,
            reason: None,
            exit_code: Some(0),
        };
        let loading = [event("a", BackendState::Loading), event("b", BackendState::Starting)];
        assert!(!is_urgent(&hub, &loading));
        assert!(is_urgent(&hub, &[event("a", BackendState::Loading), event("b", terminated)]));
        let watch = hub.watch(Topic::Backend("b".into()));
        assert!(is_urgent(&hub, &loading));
        assert!(!is_urgent(&hub, &loading[..1]));
        drop(watch);
        assert!(!is_urgent(&hub, &loading));
    }
}
