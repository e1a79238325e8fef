//! Adding, moving and removing members.

use super::args::{PathArgs, Write};
use super::error::Failure;
use crate::app::App;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use holdfast_wire::ApiErrorKind;
use holdfast_wire::http::{MemberChangeResult, SetMember};
use raft_store::{InitError, MemberChange, MemberChanged, MemberError, MemberRole};
use std::time::Duration;

/// How long a change may take. It waits for a leader, for the last change to be applied and for two entries.
const CHANGE_DEADLINE: Duration = Duration::from_secs(10);

/// POST `/ctrl/cluster/init` at a member: its cluster is there already.
pub async fn init(State(app): State<App>, write: Write) -> Failure {
    match write.ignored_body() {
        Ok(()) => app.store.refuse_init().into(),
        Err(failure) => failure,
    }
}

/// POST `/ctrl/cluster/members`: adds the process that waits at an address as a learner, which becomes a voter when it has
/// caught up; or changes a member's address.
pub async fn set(State(app): State<App>, write: Write) -> Result<Json<MemberChangeResult>, Failure> {
    let change = match write.json()? {
        SetMember { id: None, peer_addr } => MemberChange::Add { peer_addr },
        SetMember { id: Some(id), peer_addr } => MemberChange::Move { id, peer_addr },
    };
    Ok(Json(result(app.store.change_members(change, CHANGE_DEADLINE).await?)))
}

/// DELETE `/ctrl/cluster/members/{id}`: removes a member forever.
pub async fn remove(
    State(app): State<App>,
    PathArgs(id): PathArgs<u64>,
    write: Write,
) -> Result<Json<MemberChangeResult>, Failure> {
    write.ignored_body()?;
    let change = MemberChange::Remove { id };
    Ok(Json(result(app.store.change_members(change, CHANGE_DEADLINE).await?)))
}

fn result(changed: MemberChanged) -> MemberChangeResult {
    let role = match changed.role {
        MemberRole::Learner => "learner",
        MemberRole::Voter => "voter",
        MemberRole::Removed => "removed",
    };
    MemberChangeResult { id: changed.id, role: role.to_owned(), updated: changed.changed }
}

impl From<MemberError> for Failure {
    fn from(error: MemberError) -> Self {
        let kind = match &error {
            MemberError::NotLeader | MemberError::Stopped(_) => ApiErrorKind::NoLeader,
            MemberError::OutcomeUnknown(_) => ApiErrorKind::OutcomeUnknown,
            MemberError::IdUsed(_) | MemberError::LostDisk(_) | MemberError::Named { .. } => {
                ApiErrorKind::MemberIdUsed
            }
            MemberError::Invalid { .. } => ApiErrorKind::InvalidRequest,
            MemberError::NoSuchMember(_) => ApiErrorKind::NotFound,
            MemberError::Busy(_) => ApiErrorKind::ChangeInProgress,
            MemberError::Unsafe(_) => ApiErrorKind::ChangeUnsafe,
        };
        let status = Some(kind.http_status()).and_then(|status| StatusCode::from_u16(status).ok());
        Self { kind, status, message: error.to_string(), retry_after_s: None }
    }
}

impl From<InitError> for Failure {
    fn from(error: InitError) -> Self {
        let kind = match &error {
            InitError::Invalid { .. } => ApiErrorKind::InvalidRequest,
            InitError::NoAnswer { .. } | InitError::Bound { .. } => ApiErrorKind::ChangeUnsafe,
            InitError::Busy => ApiErrorKind::ChangeInProgress,
            InitError::AlreadyInitialised { .. } => ApiErrorKind::AlreadyInitialised,
            InitError::Storage(_) => ApiErrorKind::Other,
        };
        Self::new(kind, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::header;
    use axum::response::IntoResponse;

    #[test]
    fn every_refused_change_has_its_status() {
        let text = String::new;
        for (error, status) in [
            (MemberError::NotLeader, 503),
            (MemberError::OutcomeUnknown(text()), 504),
            (MemberError::IdUsed(4), 409),
            (MemberError::LostDisk(4), 409),
            (MemberError::Named { peer_addr: text(), member: 4, cluster_id: text() }, 409),
            (MemberError::Invalid { field: "id".into(), problem: text() }, 400),
            (MemberError::NoSuchMember(4), 404),
            (MemberError::Busy(text()), 409),
            (MemberError::Unsafe(text()), 409),
            (MemberError::Stopped(text()), 503),
        ] {
            assert_eq!(Failure::from(error.clone()).status().as_u16(), status, "{error:?}");
        }
        let busy = Failure::from(MemberError::Busy(text())).into_response();
        assert_eq!(busy.headers()[header::RETRY_AFTER], "1");
    }
}
