//! `--join`: a controller that waits to be named asks a running cluster to add it, until it is named.
//!
//! Asking again does nothing: the cluster knows the process by its disk. A process that has a name does not ask.

use crate::config::Settings;
use holdfast_client::wire::http::SetMember;
use holdfast_client::{Client, RequestOptions};
use std::time::Duration;

/// Shortest pause between two requests, in milliseconds; it doubles.
const PAUSE_MS_MIN: u64 = 200;
/// Longest pause between two requests, in milliseconds.
const PAUSE_MS_MAX: u64 = 5_000;
/// How long one request may take over all controllers, in milliseconds.
const REQUEST_MS: u64 = 12_000;

/// Asks again and again; the caller stops it when this controller has a name. Without `--join` it only waits.
pub async fn ask_until_admitted(settings: &Settings) {
    if settings.join.is_empty() {
        return std::future::pending().await;
    }
    let client = match Client::new(settings.join.clone()) {
        Ok(client) => client.with_options(RequestOptions {
            deadline_ms: REQUEST_MS,
            all_unreachable_ms: 0,
            attempt_ms: REQUEST_MS,
            ..RequestOptions::default()
        }),
        Err(error) => {
            tracing::error!(%error, "--join is not usable; this controller waits for an operator");
            return std::future::pending().await;
        }
    };
    let request = SetMember { id: None, peer_addr: settings.advertise_peer.clone() };
    let mut pause_ms = PAUSE_MS_MIN;
    loop {
        match client.set_member(&request).await {
            Ok(added) => tracing::info!(id = added.id, "the cluster has added this controller"),
            Err(error) => tracing::warn!(%error, "--join: not added yet; asking again"),
        }
        let jitter = rand::random_range(0.5..=1.0);
        tokio::time::sleep(Duration::from_millis(pause_ms).mul_f64(jitter)).await;
        pause_ms = (pause_ms * 2).min(PAUSE_MS_MAX);
    }
}
