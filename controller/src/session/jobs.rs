//! Proposals of a session. They run beside its loop, which goes on reading meanwhile.

use super::renewals;
use crate::app::App;
use futures::FutureExt;
use futures::future::BoxFuture;
use holdfast_core::command::{Command, Proposal, Renew, StateReport};
use holdfast_wire::LeaseConfig;
use holdfast_wire::drone::BackendEvent;
use raft_store::{Answer, ProposeError};
use std::time::{Duration, Instant};

/// How long one proposal of a session may look for a leader before it is made anew.
const TRY_DEADLINE: Duration = Duration::from_secs(2);
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
        answer: Result<Answer, ProposeError>,
    },
    /// See [`report`].
    Reported {
        /// What it was for.
        events: Vec<BackendEvent>,
        /// What became of it.
        answer: Result<Answer, ProposeError>,
    },
    /// See [`acknowledge`].
    Acknowledged(Result<Answer, ProposeError>),
}

/// Proposes until the answer is definite, or `until`. Only for commands that may be applied twice.
async fn patiently(app: &App, command: Command, until: Option<Instant>) -> Result<Answer, ProposeError> {
    loop {
        let left = until
            .map_or(TRY_DEADLINE, |until| until.saturating_duration_since(Instant::now()).min(TRY_DEADLINE));
        let proposal = Proposal { command: command.clone(), idempotency: None };
        let answer = app.propose_within(proposal, left).await;
        match &answer {
            Err(ProposeError::NoLeader | ProposeError::OutcomeUnknown(_) | ProposeError::Overloaded)
                if until.is_none_or(|until| Instant::now() + RETRY_PAUSE < until) =>
            {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            _ => return answer,
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
        let command = Command::Renew(Renew { drone_id, keys: renewals::keys(&requests) });
        let answer = patiently(&app, command, renewals::give_up_at(&requests, &lease)).await;
        Done::Renewed { requests, answer }
    }
    .boxed()
}

/// Records states, in order. Repeating is harmless: states only rise.
pub fn report(app: App, drone_id: i32, events: Vec<BackendEvent>) -> BoxFuture<'static, Done> {
    async move {
        let reports = events
            .iter()
            .map(|event| StateReport {
                backend_id: event.backend_id.clone(),
                state: event.state.clone(),
                token: event.token,
            })
            .collect();
        let answer = patiently(&app, Command::ReportStates { drone_id, reports }, None).await;
        Done::Reported { events, answer }
    }
    .boxed()
}

/// Records that the drone has its actions.
pub fn acknowledge(app: App, drone_id: i32, action_ids: Vec<String>) -> BoxFuture<'static, Done> {
    async move {
        Done::Acknowledged(patiently(&app, Command::AckActions { drone_id, action_ids }, None).await)
    }
    .boxed()
}
