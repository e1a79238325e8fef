//! GET `/ctrl/ready`.

use super::error::Failure;
use crate::app::App;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;

/// How long a readiness check waits for a linearizable read.
const READY_DEADLINE: Duration = Duration::from_secs(1);

/// 200 only when this replica can serve linearizable reads of a formed cluster and its disk is well; else 503 with the
/// reason.
pub async fn ready(State(app): State<App>) -> Response {
    match look(&app).await {
        Ok(()) => Json(json!({"ready": true})).into_response(),
        Err(reason) => not_ready(&reason),
    }
}

async fn look(app: &App) -> Result<(), String> {
    if let Some(reason) = app.store.not_ready() {
        return Err(reason);
    }
    let point = app
        .store
        .linearizable(READY_DEADLINE)
        .await
        .map_err(|error| app.store.no_majority().unwrap_or_else(|| error.to_string()))?;
    match point.view.cluster() {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err("the cluster is not formed yet".to_owned()),
        Err(error) => Err(Failure::from(error).message),
    }
}

/// The refusal, in the form of all refusals too.
pub fn not_ready(reason: &str) -> Response {
    let body: Value = json!({
        "ready": false,
        "reason": reason,
        "id": crate::ids::error_id(),
        "kind": "NoLeader",
        "message": reason,
    });
    let mut response = (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}
