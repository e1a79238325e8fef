//! The HTTP API: one file for each area, all refusals through [`error::Failure`].
//!
//! Every controller serves every path: reads from its own replica once that has caught up, writes by a proposal that the
//! store takes to the leader. No request is proxied as HTTP.

pub mod args;
mod backends;
mod cluster;
mod connect;
mod drones;
pub mod error;
mod keys;
pub mod members;
pub mod metrics;
pub mod ready;
mod snapshot;
mod sse;

use crate::app::App;
use crate::session;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post};
use error::Failure;
use holdfast_wire::ApiErrorKind;
use holdfast_wire::http::{LEADER_HEADER, MEMBERS_HEADER, REPLAYED_HEADER};

/// All paths.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/pub/health", get(cluster::health))
        .route("/pub/b/{backend}/status", get(backends::status))
        .route("/pub/b/{backend}/status-stream", get(sse::status_stream))
        .route("/ctrl/status", get(cluster::status))
        .route("/ctrl/ready", get(ready::ready))
        .route("/metrics", get(metrics::metrics))
        .route("/ctrl/cluster", get(cluster::cluster))
        .route("/ctrl/cluster/init", post(members::init))
        .route("/ctrl/cluster/members", post(members::set))
        .route("/ctrl/cluster/members/{id}", delete(members::remove))
        .route("/ctrl/cluster/checksum", post(cluster::accept_checksum))
        .route("/ctrl/cluster/transfer-leader", post(cluster::transfer_leader))
        .route("/ctrl/snapshot", get(snapshot::snapshot))
        .route("/ctrl/connect", post(connect::connect))
        .route("/ctrl/backends", get(backends::list))
        .route("/ctrl/b/{backend}/soft-terminate", post(backends::soft_terminate))
        .route("/ctrl/b/{backend}/hard-terminate", post(backends::hard_terminate))
        .route("/ctrl/b/revoke", post(backends::revoke))
        .route("/ctrl/revoke", post(backends::revoke))
        .route("/ctrl/keys", get(keys::list))
        .route("/ctrl/key", get(keys::show))
        .route("/ctrl/key", delete(keys::revoke))
        .route("/ctrl/key/prevent-renewal", post(keys::prevent_renewal))
        .route("/ctrl/key/allow-renewal", post(keys::allow_renewal))
        .route("/ctrl/drones", get(drones::list))
        .route("/ctrl/c/{cluster}/state", get(drones::cluster_state))
        .route("/ctrl/c/{cluster}/d/{drone}/drain", post(drones::drain))
        .route("/ctrl/c/{cluster}/drone-socket", any(session::open))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), name_leader))
        .with_state(app)
}

async fn unknown_path(uri: Uri) -> Failure {
    Failure::not_found(format!("there is no path {:?}", args::shortened(uri.path())))
}

async fn wrong_method(request: Request) -> Failure {
    Failure {
        kind: ApiErrorKind::InvalidRequest,
        status: Some(StatusCode::METHOD_NOT_ALLOWED),
        message: format!(
            "method {} does not go with {:?}",
            args::shortened(request.method().as_str()),
            args::shortened(request.uri().path())
        ),
        retry_after_s: None,
    }
}

/// Every response says who leads, as far as this replica knows.
async fn name_leader(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let url = app.store.leader().borrow().as_ref().and_then(|leader| leader.url.clone());
    if let Some(value) = url.and_then(|url| HeaderValue::from_str(&url).ok()) {
        response.headers_mut().insert(HeaderName::from_static(LEADER_HEADER), value);
        let members = HeaderValue::from(app.store.membership_index());
        response.headers_mut().insert(HeaderName::from_static(MEMBERS_HEADER), members);
    }
    response
}

/// An answer, marked if it is a recorded one.
pub struct Replayable<T> {
    body: T,
    replayed: bool,
}

impl<T: IntoResponse> IntoResponse for Replayable<T> {
    fn into_response(self) -> Response {
        let mut response = self.body.into_response();
        if self.replayed {
            response
                .headers_mut()
                .insert(HeaderName::from_static(REPLAYED_HEADER), HeaderValue::from_static("true"));
        }
        response
    }
}

/// Runs a scan of the state away from the tasks that must not wait for a disk.
async fn scan<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::new(ApiErrorKind::Other, format!("a scan failed: {error}"))),
    }
}
