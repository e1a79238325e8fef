//! What a refused request gets.

use serde::{Deserialize, Serialize};

/// A field of a request that breaks a rule. Becomes a 400 [`ApiErrorKind::InvalidRequest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct FieldError {
    /// The field, as the caller wrote it (`key.name`).
    pub field: &'static str,
    /// What is wrong with it; reads on from the field's name.
    pub problem: String,
}

impl FieldError {
    /// An error on `field`.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

/// Why a request was refused; clients tell errors apart by this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApiErrorKind {
    /// 409: the key is held with another tag, or its backend is going away and did not release it in time.
    KeyHeld,
    /// 409: the key is free and the request has no `spawn_config`.
    KeyUnheldNoSpawnConfig,
    /// 400: no cluster in the request and no default cluster.
    NoClusterProvided,
    /// 503: no drone of that cluster and pool can take a backend now. Try again.
    NoDroneAvailable,
    /// 404: no such backend, key, drone or path.
    NotFound,
    /// 400: the message names the field.
    InvalidRequest,
    /// 409: the supplied backend id was used before.
    BackendIdUsed,
    /// 503 with `Retry-After`: no leader now; nothing was done. Try again.
    NoLeader,
    /// 504: the request may or may not have taken effect. A `connect` with a key, or any request with an
    /// `Idempotency-Key`, may simply be sent again.
    OutcomeUnknown,
    /// 409: the key's expiry has not passed, so it can't be revoked.
    KeyNotExpired,
    /// 503: a stated bound is reached; nothing was done.
    Overloaded,
    /// 409: the id or the process belongs to a member already, or to one that was removed.
    MemberIdUsed,
    /// 409: the controller that was asked to form a cluster is a member of one.
    AlreadyInitialised,
    /// 409 with `Retry-After`: another change of the membership is under way; nothing was done.
    ChangeInProgress,
    /// 409: after that change of the membership the cluster could not continue, or a member that it needs does not answer or
    /// is bound to something else; nothing was done.
    ChangeUnsafe,
    /// 500: a fault of this controller.
    #[serde(other)]
    Other,
}

impl ApiErrorKind {
    /// The HTTP status that goes with this kind.
    pub fn http_status(self) -> u16 {
        match self {
            Self::KeyHeld | Self::KeyUnheldNoSpawnConfig | Self::BackendIdUsed | Self::KeyNotExpired => 409,
            Self::MemberIdUsed | Self::AlreadyInitialised | Self::ChangeInProgress | Self::ChangeUnsafe => {
                409
            }
            Self::NoClusterProvided | Self::InvalidRequest => 400,
            Self::NoDroneAvailable | Self::NoLeader | Self::Overloaded => 503,
            Self::NotFound => 404,
            Self::OutcomeUnknown => 504,
            Self::Other => 500,
        }
    }
}

/// The body of every refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Random; the same id stands in the controller's log.
    pub id: String,
    /// Why.
    pub kind: ApiErrorKind,
    /// For people.
    pub message: String,
}
