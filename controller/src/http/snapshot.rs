//! A backup of the running cluster, as a stream.

use super::args::QueryArgs;
use super::error::Failure;
use crate::app::App;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use holdfast_wire::ApiErrorKind;
use raft_store::backup::BackupRefused;
use tokio_stream::wrappers::ReceiverStream;

/// Log index that the backup is of.
const INDEX_HEADER: HeaderName = HeaderName::from_static("x-holdfast-index");

/// GET `/ctrl/snapshot`: the state of one instant, everything acknowledged before the request included (with
/// `consistency=local`, as this replica has it). A body that ends early lacks its last part, and is refused by whoever
/// reads it.
pub async fn snapshot(State(app): State<App>, query: QueryArgs) -> Result<Response, Failure> {
    app.read(query.consistency()?).await?;
    let backup = app.store.backup().await?;
    let name = format!("attachment; filename=\"holdfast-{}.backup\"", backup.header.index);
    let mut response = Body::from_stream(ReceiverStream::new(backup.chunks)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(INDEX_HEADER, HeaderValue::from(backup.header.index));
    if let Ok(name) = HeaderValue::from_str(&name) {
        headers.insert(header::CONTENT_DISPOSITION, name);
    }
    Ok(response)
}

impl From<BackupRefused> for Failure {
    fn from(refused: BackupRefused) -> Self {
        let kind = match &refused {
            BackupRefused::Busy => ApiErrorKind::Overloaded,
            BackupRefused::NotFormed => ApiErrorKind::NoLeader,
            BackupRefused::State(_) => ApiErrorKind::Other,
        };
        Self::new(kind, refused.to_string())
    }
}
