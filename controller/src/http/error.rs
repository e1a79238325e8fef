//! One type for everything that a request can be refused with.

use crate::ids;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use holdfast_core::kv::StateError;
use holdfast_core::outcome::{Outcome, Refusal};
use holdfast_wire::{ApiError, ApiErrorKind, FieldError};
use raft_store::{ProposeError, ReadError};

/// When to try again after `NoLeader` and `Overloaded`, in seconds.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// When to try again to acquire a key while the replicas' checksums differ, in seconds.
const CHECKSUMS_RETRY_AFTER_S: u64 = 10;

/// A refused request. Its answer is an [`ApiError`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind:?}: {message}")]
pub struct Failure {
    /// Why.
    pub kind: ApiErrorKind,
    /// HTTP status, where it is not the usual one of the kind (405, 413).
    pub status: Option<StatusCode>,
    /// For people.
    pub message: String,
    /// When to try again, in seconds, where it is known better than usual.
    pub retry_after_s: Option<u64>,
}

impl Failure {
    /// A failure with the usual status of its kind.
    pub fn new(kind: ApiErrorKind, message: impl Into<String>) -> Self {
        Self { kind, status: None, message: message.into(), retry_after_s: None }
    }

    /// A field that breaks a rule.
    pub fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        FieldError::new(field, problem).into()
    }

    /// No such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ApiErrorKind::NotFound, message)
    }

    /// A body or proposal beyond its bound.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self {
            kind: ApiErrorKind::InvalidRequest,
            status: Some(StatusCode::PAYLOAD_TOO_LARGE),
            message: message.into(),
            retry_after_s: None,
        }
    }

    /// This controller is going away.
    pub fn stopping() -> Self {
        Self::new(ApiErrorKind::NoLeader, "this controller is stopping; nothing was done")
    }

    /// A fault of ours: an outcome that the command cannot have.
    pub fn unexpected(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Refused(refusal) => refusal.clone().into(),
            other => Self::new(ApiErrorKind::Other, format!("unexpected outcome {other:?}")),
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status.unwrap_or_else(|| {
            StatusCode::from_u16(self.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
        })
    }
}

impl From<FieldError> for Failure {
    fn from(error: FieldError) -> Self {
        Self::new(ApiErrorKind::InvalidRequest, error.to_string())
    }
}

impl From<ProposeError> for Failure {
    fn from(error: ProposeError) -> Self {
        let kind = match &error {
            ProposeError::NoLeader | ProposeError::Stopped(_) | ProposeError::Unfit(_) => {
                ApiErrorKind::NoLeader
            }
            ProposeError::OutcomeUnknown(_) => ApiErrorKind::OutcomeUnknown,
            ProposeError::Overloaded => ApiErrorKind::Overloaded,
            ProposeError::TooLarge(..) => return Self::too_large(error.to_string()),
        };
        Self::new(kind, error.to_string())
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::new(ApiErrorKind::NoLeader, error.to_string())
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::new(ApiErrorKind::Other, format!("reading the state failed: {error}"))
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal {
            Refusal::NotFormed => ApiErrorKind::NoLeader,
            Refusal::TagMismatch { .. } => ApiErrorKind::KeyHeld,
            Refusal::NoSpawnConfig => ApiErrorKind::KeyUnheldNoSpawnConfig,
            Refusal::NoDrone => ApiErrorKind::NoDroneAvailable,
            Refusal::BackendIdUsed(_) => ApiErrorKind::BackendIdUsed,
            Refusal::NoSuchKey | Refusal::NoSuchBackend(_) | Refusal::NoSuchDrone(_) => {
                ApiErrorKind::NotFound
            }
            Refusal::NotExpired => ApiErrorKind::KeyNotExpired,
            Refusal::IdempotencyMismatch => {
                return Self::invalid("Idempotency-Key", "was used for another request");
            }
            Refusal::Full(_) => ApiErrorKind::Overloaded,
            Refusal::Lease(_) => ApiErrorKind::InvalidRequest,
            Refusal::NameTaken => ApiErrorKind::Other,
            // Certainly not done, and it stays so until an operator decides.
            Refusal::ChecksumsDiffer { .. } => {
                let retry_after_s = Some(CHECKSUMS_RETRY_AFTER_S);
                return Self { retry_after_s, ..Self::new(ApiErrorKind::NoLeader, refusal.to_string()) };
            }
            Refusal::Checksum(_) => ApiErrorKind::ChangeUnsafe,
            // Certainly not done, and nothing that another request would change: as long as without a leader.
            Refusal::Restored { wait_ms } => {
                let retry_after_s = Some(wait_ms.div_ceil(1000));
                return Self { retry_after_s, ..Self::new(ApiErrorKind::NoLeader, refusal.to_string()) };
            }
        };
        Self::new(kind, refusal.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = self.status();
        let body = ApiError { id: ids::error_id(), kind: self.kind, message: self.message };
        if self.kind == ApiErrorKind::Other {
            tracing::error!(id = %body.id, message = %body.message, "request failed");
        } else {
            tracing::debug!(id = %body.id, kind = ?body.kind, message = %body.message, "request refused");
        }
        let mut response = (status, Json(body)).into_response();
        if matches!(
            self.kind,
            ApiErrorKind::NoLeader | ApiErrorKind::Overloaded | ApiErrorKind::ChangeInProgress
        ) {
            let after = self.retry_after_s.map_or(RETRY_AFTER_S, HeaderValue::from);
            response.headers_mut().insert(header::RETRY_AFTER, after);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_the_status_of_the_contract() {
        for (refusal, kind, status) in [
            (Refusal::NotFormed, ApiErrorKind::NoLeader, 503),
            (Refusal::TagMismatch { held: "t".into() }, ApiErrorKind::KeyHeld, 409),
            (Refusal::NoSpawnConfig, ApiErrorKind::KeyUnheldNoSpawnConfig, 409),
            (Refusal::NoDrone, ApiErrorKind::NoDroneAvailable, 503),
            (Refusal::BackendIdUsed("b".into()), ApiErrorKind::BackendIdUsed, 409),
            (Refusal::NoSuchKey, ApiErrorKind::NotFound, 404),
            (Refusal::NotExpired, ApiErrorKind::KeyNotExpired, 409),
            (Refusal::IdempotencyMismatch, ApiErrorKind::InvalidRequest, 400),
            (Refusal::Full("x".into()), ApiErrorKind::Overloaded, 503),
            (Refusal::ChecksumsDiffer { index: 64 }, ApiErrorKind::NoLeader, 503),
            (Refusal::Checksum("x".into()), ApiErrorKind::ChangeUnsafe, 409),
        ] {
            let failure = Failure::from(refusal);
            assert_eq!((failure.kind, failure.status().as_u16()), (kind, status));
        }
    }

    #[test]
    fn a_definite_no_and_an_unknown_outcome_are_told_apart() {
        assert_eq!(Failure::from(ProposeError::NoLeader).status().as_u16(), 503);
        assert_eq!(Failure::from(ProposeError::OutcomeUnknown(String::new())).status().as_u16(), 504);
        assert_eq!(Failure::from(ProposeError::TooLarge(2, 1)).status().as_u16(), 413);
        let response = Failure::from(ProposeError::NoLeader).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn a_restored_cluster_says_when_keys_can_be_acquired() {
        let failure = Failure::from(Refusal::Restored { wait_ms: 41_001 });
        assert!(failure.message.contains("restored from a backup") && failure.message.contains("42 s"));
        let response = failure.into_response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()[header::RETRY_AFTER]),
            (503, &HeaderValue::from(42))
        );
    }
}
