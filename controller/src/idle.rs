//! What a controller without a replica answers: why it does not serve, on every path.

use crate::http::metrics::Text;
use crate::http::ready::not_ready;
use axum::Router;
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;

/// A router whose every path but `/pub/health` and `/metrics` is refused with the reason of the moment.
pub fn router(
    reason: impl Fn() -> String + Send + Sync + 'static,
    metrics: impl Fn(&mut Text, &str) + Send + Sync + 'static,
) -> Router {
    let reason = Arc::new(reason);
    let (metrics, why) = (Arc::new(metrics), reason.clone());
    let metrics = move || {
        let (metrics, why) = (metrics.clone(), why.clone());
        async move {
            let mut text = Text::default();
            metrics(&mut text, &why());
            text.into_response()
        }
    };
    Router::new()
        .route("/pub/health", get(|| async { r#"{"status":"ok"}"# }))
        .route("/metrics", get(metrics))
        .fallback(move || {
            let reason = reason.clone();
            async move { not_ready(&reason()) }
        })
}
