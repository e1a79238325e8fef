//! The life of a controller before it has a name: it says so, forms a cluster if it is asked to, and asks a running cluster
//! to be added if it was started with `--join`.

use crate::config::Settings;
use crate::http::args::Write;
use crate::http::error::Failure;
use crate::idle;
use crate::join::ask_until_admitted;
use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use holdfast_wire::http::{InitCluster, InitResult, NewMember};
use raft_store::{InitError, InitRequest, Waiting, WeakWaiting};
use std::future::{Future, IntoFuture};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How long requests in flight may take to finish once this controller has a name.
const FINISH_DEADLINE: Duration = Duration::from_secs(2);

/// Waits until this controller has a name, and returns true; or until `stop` resolves, and returns false.
pub async fn wait(
    waiting: &Waiting,
    settings: &Settings,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) -> std::io::Result<bool> {
    let finish = CancellationToken::new();
    let server = axum::serve(listener, router(&waiting.downgrade()))
        .with_graceful_shutdown(finish.clone().cancelled_owned())
        .into_future();
    let mut server = std::pin::pin!(server);
    let named = tokio::select! {
        served = &mut server => return served.map(|()| false),
        () = waiting.named() => true,
        () = stop => false,
        () = ask_until_admitted(settings) => false,
    };
    finish.cancel();
    // The caller of the init waits for the answer.
    if let Ok(served) = tokio::time::timeout(FINISH_DEADLINE, server).await {
        served?;
    }
    Ok(named)
}

/// What requests are told when this controller has just been named.
const NAMED: &str = "starting as the member that this controller has just been named";

/// A request may outlive the waiting (one whose body never comes, say), and must not keep the data directory open then.
fn router(waiting: &WeakWaiting) -> Router {
    let why = waiting.clone();
    let metrics = |text: &mut crate::http::metrics::Text, why: &str| {
        let labels = [("reason", why)];
        text.gauge_with(
            "holdfast_waiting",
            "Whether this controller waits to be named, and for what.",
            &labels,
            1,
        );
    };
    let init = Router::new().route("/ctrl/cluster/init", post(init)).with_state(waiting.clone());
    let reason = move || why.upgrade().map_or_else(|| NAMED.to_owned(), |waiting| waiting.reason());
    init.merge(idle::router(reason, metrics))
}

/// POST `/ctrl/cluster/init`.
async fn init(State(waiting): State<WeakWaiting>, write: Write) -> Result<Json<InitResult>, Failure> {
    let InitCluster { members, lease } = write.json()?;
    let request = InitRequest { members, lease: lease.unwrap_or_default() };
    let waiting = waiting.upgrade().ok_or(InitError::Busy)?;
    // A caller that hangs up must not cut it short between two of its steps.
    let forming = tokio::spawn(async move { waiting.init(&request).await });
    let formed = forming.await.map_err(|error| {
        Failure::new(holdfast_wire::ApiErrorKind::Other, format!("the init failed: {error}"))
    })??;
    let members = formed.members.into_iter().map(|(id, peer_addr)| NewMember { id, peer_addr }).collect();
    Ok(Json(InitResult { cluster_id: formed.cluster_id, members }))
}
