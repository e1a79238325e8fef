//! Backends: their status, their listing, their end, and their users' tokens.

use super::args::{PathArgs, QueryArgs, Write, backend_in_path, encode_cursor, shortened};
use super::error::Failure;
use super::{Replayable, scan};
use crate::app::App;
use axum::Json;
use axum::extract::State;
use holdfast_core::command::Command;
use holdfast_core::outcome::Outcome;
use holdfast_core::records::BackendRecord;
use holdfast_wire::http::{BackendInfo, BackendPage, BackendStatusMessage, RevokeRequest};
use holdfast_wire::limits::USER_BYTES_MAX;
use holdfast_wire::names::{check_name, check_name_or_empty, check_text};
use holdfast_wire::{BackendState, TerminationKind, TerminationReason};

/// How and why a state says that its backend ends.
fn termination(state: &BackendState) -> (Option<TerminationKind>, Option<TerminationReason>) {
    match state {
        BackendState::Terminating { termination, reason, .. } => (Some(*termination), Some(*reason)),
        BackendState::HardTerminating { reason, .. } => (Some(TerminationKind::Hard), Some(*reason)),
        BackendState::Terminated { termination, reason, .. } => (*termination, *reason),
        _ => (None, None),
    }
}

fn exit_code(state: &BackendState) -> Option<i32> {
    match state {
        BackendState::Terminated { exit_code, .. } => *exit_code,
        _ => None,
    }
}

/// A recorded state as the status paths give it.
pub fn status_message(time_ms: u64, state: &BackendState) -> BackendStatusMessage {
    let (termination_kind, termination_reason) = termination(state);
    BackendStatusMessage {
        status: state.status(),
        termination_reason,
        termination_kind,
        exit_error: exit_code(state).map(|code| code != 0),
        time: time_ms,
    }
}

fn info(id: String, backend: BackendRecord) -> BackendInfo {
    let state = backend.state();
    let (termination_kind, termination_reason) = termination(state);
    BackendInfo {
        id,
        status: state.status(),
        address: state.address(),
        exit_code: exit_code(state),
        termination_reason: termination_reason.or(backend.termination_asked.map(|(_, reason)| reason)),
        termination_kind: termination_kind.or(backend.termination_asked.map(|(kind, _)| kind)),
        fencing_token: backend.token,
        created_at: backend.history.first().map_or(0, |(at_ms, _)| *at_ms),
        status_at: backend.history.last().map_or(0, |(at_ms, _)| *at_ms),
        key: backend.key,
        cluster: backend.cluster,
        drone: backend.drone,
    }
}

/// No backend of that id is known.
pub fn unknown(id: &str) -> Failure {
    Failure::not_found(format!("there is no backend {:?}", shortened(id)))
}

/// GET `/pub/b/{backend}/status`.
pub async fn status(
    State(app): State<App>,
    PathArgs(id): PathArgs<String>,
    query: QueryArgs,
) -> Result<Json<BackendStatusMessage>, Failure> {
    let id = backend_in_path(&id)?;
    let point = app.read(query.consistency()?).await?;
    let backend = point.view.backend(id)?.ok_or_else(|| unknown(id))?;
    let (time_ms, state) = backend.history.last().ok_or_else(|| unknown(id))?;
    Ok(Json(status_message(*time_ms, state)))
}

/// GET `/ctrl/backends?prefix=&limit=&cursor=`.
pub async fn list(State(app): State<App>, query: QueryArgs) -> Result<Json<BackendPage>, Failure> {
    let prefix = query.text("prefix")?.unwrap_or_default().to_owned();
    check_name_or_empty("prefix", &prefix)?;
    let (limit, cursor) = (query.limit()?, query.cursor()?);
    if let Some(cursor) = &cursor {
        check_name("cursor", cursor)?;
    }
    let point = app.read(query.consistency()?).await?;
    let (rows, next) = scan(move || Ok(point.view.backends(&prefix, cursor.as_deref(), limit)?)).await?;
    Ok(Json(BackendPage {
        backends: rows.into_iter().map(|(id, backend)| info(id, backend)).collect(),
        next_cursor: next.as_deref().map(encode_cursor),
    }))
}

async fn terminate(
    app: &App,
    id: &str,
    kind: TerminationKind,
    write: Write,
) -> Result<Replayable<Json<()>>, Failure> {
    let id = backend_in_path(id)?;
    write.ignored_body()?;
    let command = Command::Terminate { backend_id: id.to_owned(), kind, reason: TerminationReason::External };
    let answer = app.propose(command, write.idempotency).await?;
    match answer.outcome {
        // Plane answers `null`.
        Outcome::Updated(_) => Ok(Replayable { body: Json(()), replayed: answer.replayed }),
        other => Err(Failure::unexpected(&other)),
    }
}

/// POST `/ctrl/b/{backend}/soft-terminate`.
pub async fn soft_terminate(
    State(app): State<App>,
    PathArgs(id): PathArgs<String>,
    write: Write,
) -> Result<Replayable<Json<()>>, Failure> {
    terminate(&app, &id, TerminationKind::Soft, write).await
}

/// POST `/ctrl/b/{backend}/hard-terminate`.
pub async fn hard_terminate(
    State(app): State<App>,
    PathArgs(id): PathArgs<String>,
    write: Write,
) -> Result<Replayable<Json<()>>, Failure> {
    terminate(&app, &id, TerminationKind::Hard, write).await
}

/// POST `/ctrl/b/revoke` and `/ctrl/revoke`.
pub async fn revoke(State(app): State<App>, write: Write) -> Result<Replayable<Json<&'static str>>, Failure> {
    let request: RevokeRequest = write.json()?;
    check_name("backend_id", &request.backend_id)?;
    check_text("user", &request.user, USER_BYTES_MAX)?;
    let command = Command::RevokeTokens { backend_id: request.backend_id, user: request.user };
    let answer = app.propose(command, write.idempotency).await?;
    match answer.outcome {
        Outcome::Updated(_) => Ok(Replayable { body: Json("revoked"), replayed: answer.replayed }),
        other => Err(Failure::unexpected(&other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::BackendStatus;
    use serde_json::json;

    fn terminated(exit_code: Option<i32>) -> BackendState {
        BackendState::Terminated {
            last_status: BackendStatus::Ready,
            termination: Some(TerminationKind::Soft),
            reason: Some(TerminationReason::Swept),
            exit_code,
        }
    }

    #[test]
    fn an_exit_error_is_another_exit_code_than_zero() {
        for (code, exit_error) in [(Some(0), Some(false)), (Some(137), Some(true)), (None, None)] {
            assert_eq!(status_message(1, &terminated(code)).exit_error, exit_error);
        }
        assert_eq!(status_message(1, &BackendState::Loading).exit_error, None);
    }

    #[test]
    fn a_status_has_planes_json_shape() {
        assert_eq!(
            serde_json::to_value(status_message(5, &terminated(Some(1)))).unwrap(),
            json!({"status": "terminated", "termination_reason": "swept", "termination_kind": "soft",
                   "exit_error": true, "time": 5})
        );
        assert_eq!(
            serde_json::to_value(status_message(5, &BackendState::Loading)).unwrap(),
            json!({"status": "loading", "time": 5})
        );
    }
}
