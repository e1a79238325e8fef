//! What a caller can do about a request that did not succeed.

use holdfast_wire::{ApiError, ApiErrorKind};

/// Why a request did not succeed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClientError {
    /// The service answered no, and will not say otherwise until something changes. The number is the HTTP status.
    #[error("{0}")]
    Refused(ApiError, u16),
    /// The request may or may not have taken effect. Send it again with the same `Idempotency-Key`, or look.
    #[error("the outcome is unknown: {detail}. The request may or may not have taken effect")]
    OutcomeUnknown {
        /// What happened to the last attempt.
        detail: String,
    },
    /// No controller could be reached; nothing was done.
    #[error("no controller could be reached: {detail}")]
    Unreachable {
        /// What happened to the last attempt.
        detail: String,
    },
    /// Something answered that is not a Holdfast controller, or not one this client understands.
    #[error("{url} gave an answer that is not understood: {detail}")]
    BadResponse {
        /// Where it came from.
        url: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The list of controllers can't be used.
    #[error("controller URL {url:?} {problem}")]
    BadUrl {
        /// As it was given.
        url: String,
        /// What is wrong with it; reads on from the URL.
        problem: String,
    },
}

impl ClientError {
    /// Why the service refused, if it did.
    pub fn kind(&self) -> Option<ApiErrorKind> {
        match self {
            Self::Refused(error, _) => Some(error.kind),
            _ => None,
        }
    }
}
