//! `--join`: a new member asks a running cluster for admission.
//!
//! ```text
//!   in a membership already? ──yes──▶ nothing to do (it restarted)
//!        │ no
//!        ▼
//!   ask who they are: cluster id, lease ──differs from ours──▶ give up
//!        ▼
//!   POST /ctrl/cluster/members ──id used──▶ give up
//!        │          └─unreachable, no leader, busy, unknown──▶ again, with jitter, until the deadline
//!        ▼
//!   learner; the leader sends the log or a snapshot and makes it a voter when it has caught up
//! ```
//!
//! Every step can be done twice, so a crash in between costs nothing: the next start asks again, and is told that it is a
//! member. The peer listener runs before any of it, because the leader checks that this member answers there.

use crate::config::Settings;
use holdfast_client::wire::ApiErrorKind;
use holdfast_client::wire::http::{AddMember, ClusterInfo, MemberChangeResult};
use holdfast_client::{Client, ClientError, RequestOptions};
use raft_store::Store;
use std::time::Duration;
use tokio::time::Instant;

/// How long a cluster that does not answer, has no leader or is busy is asked again.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);
/// Shortest pause between two questions, in milliseconds; it doubles.
const PAUSE_MS_MIN: u64 = 200;
/// Longest pause between two questions, in milliseconds.
const PAUSE_MS_MAX: u64 = 5_000;
/// How long one question may be carried around, in milliseconds.
const QUESTION_MS: u64 = 12_000;
/// Refusals in a row that might pass (this member could not be reached, say) after which it gives up.
const REFUSALS_MAX: u32 = 8;

/// Why this member was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// It would be refused for ever.
    #[error("--join: the cluster refuses this member: {0}")]
    Refused(String),
    /// It does not go with the cluster.
    #[error("--join: {0}")]
    Mismatch(String),
    /// Nobody could admit it in time.
    #[error("--join: not admitted within {within_s} s: {why}")]
    Hopeless {
        /// How long it asked, in seconds.
        within_s: u64,
        /// What came last.
        why: String,
    },
}

/// Whether to ask again.
enum Answer {
    Admitted(MemberChangeResult),
    Again(String),
    Never(JoinError),
}

/// Asks until this member is one, or there is no hope.
pub async fn join(store: &Store, settings: &Settings) -> Result<(), JoinError> {
    if settings.join.is_empty() || !store.must_join() {
        return Ok(());
    }
    let client = Client::new(settings.join.clone())
        .map_err(|error| JoinError::Mismatch(error.to_string()))?
        .with_options(RequestOptions {
            deadline_ms: QUESTION_MS,
            all_unreachable_ms: 0,
            attempt_ms: QUESTION_MS,
            ..RequestOptions::default()
        });
    let until = Instant::now() + JOIN_DEADLINE;
    let (mut pause_ms, mut refusals) = (PAUSE_MS_MIN, 0);
    loop {
        let why = match ask(&client, store, settings, &mut refusals).await {
            Answer::Admitted(result) => {
                tracing::info!(id = result.id, role = result.role, "the cluster has admitted this member");
                return Ok(());
            }
            Answer::Never(error) => return Err(error),
            Answer::Again(why) => why,
        };
        // Another start, or an operator, may have asked for us.
        if !store.must_join() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(JoinError::Hopeless { within_s: JOIN_DEADLINE.as_secs(), why });
        }
        tracing::warn!(%why, "not admitted yet; asking again");
        let jitter = rand::random_range(0.5..=1.0);
        tokio::time::sleep(Duration::from_millis(pause_ms).mul_f64(jitter)).await;
        pause_ms = (pause_ms * 2).min(PAUSE_MS_MAX);
    }
}

async fn ask(client: &Client, store: &Store, settings: &Settings, refusals: &mut u32) -> Answer {
    let info = match client.cluster_info().await {
        Ok(info) => info,
        Err(error) => return after(&error, refusals),
    };
    let cluster_id = match fits(&info, settings) {
        Ok(Some(cluster_id)) => cluster_id,
        Ok(None) => return Answer::Again("the cluster is not formed yet".to_owned()),
        Err(error) => return Answer::Never(error),
    };
    if let Err(error) = store.prepare_to_join(&cluster_id) {
        return Answer::Again(format!("marking the data directory failed: {error}"));
    }
    let request = AddMember {
        id: settings.store.id,
        peer_addr: settings.advertise_peer.clone(),
        joining: store.is_blank(),
        protocol: Store::protocol(),
    };
    match client.set_member(&request).await {
        Ok(result) => Answer::Admitted(result),
        Err(error) => after(&error, refusals),
    }
}

/// The cluster's id, if it is formed and this controller goes with it.
fn fits(info: &ClusterInfo, settings: &Settings) -> Result<Option<String>, JoinError> {
    if let (Some(given), Some(formed)) = (settings.store.lease, info.lease)
        && given != formed
    {
        return Err(JoinError::Mismatch(format!(
            "this controller was started with --lease {given}, but the cluster was formed with {formed}"
        )));
    }
    Ok(info.cluster_id.clone())
}

fn after(error: &ClientError, refusals: &mut u32) -> Answer {
    let ClientError::Refused(refusal, _) = error else { return Answer::Again(error.to_string()) };
    match refusal.kind {
        ApiErrorKind::NoLeader | ApiErrorKind::ChangeInProgress | ApiErrorKind::OutcomeUnknown => {
            Answer::Again(refusal.message.clone())
        }
        ApiErrorKind::MemberIdUsed => Answer::Never(JoinError::Refused(refusal.message.clone())),
        _ => {
            *refusals += 1;
            if *refusals >= REFUSALS_MAX {
                Answer::Never(JoinError::Refused(refusal.message.clone()))
            } else {
                Answer::Again(refusal.message.clone())
            }
        }
    }
}
