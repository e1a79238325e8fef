//! Drone sockets: `WS /ctrl/c/{cluster}/drone-socket?pool=P`.
//!
//! ```text
//!            ┌── handshake, registration (an entry) ──┐
//!   drone ═══╡ frames ─▶ session loop ──▶ proposals, batched over all sessions: renewals,
//!   socket   │              │    │                    reports, acknowledgements, lists, words
//!            │              │    │                    on itself and on connections; heartbeats
//!            ╘◀═ writer ◀───┘    └─◀─ applied state: due actions, newer sessions
//! ```
//!
//! Invariants:
//!
//! 1. A session acts only on what its own replica has applied since the registration: the replica waits for that entry
//!    before the drone gets the handshake, so an older session in the state never looks like a newer one, and the lease
//!    durations it reads are never older than the keys the drone holds.
//! 2. Deadlines that answer a renewal start at that request's own `local_time`, and are never sent once the soft one of
//!    them has passed.
//! 3. State reports are proposed one batch at a time, in the order they came, and acknowledged after they are applied.
//! 4. Every queue is bounded; what does not fit is left unanswered and the drone sends it again.
//! 5. A spawn goes only to the incarnation for which it was made, or, to a drone of Plane's, once to the session.
//! 6. One of our drones gets no action before its list of backends has taken effect (`holdfast_core::listing`).

pub mod actions;
pub mod drift;
pub mod frames;
pub mod heartbeats;
mod jobs;
mod lists;
mod outbox;
pub mod registry;
pub mod renewals;
mod run;
mod start;
pub mod together;
mod word;

use crate::app::App;
use crate::http::args::{PathArgs, QueryArgs};
use crate::http::error::Failure;
use axum::Extension;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
use axum::response::Response;
use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt};
use holdfast_wire::ApiErrorKind;
use holdfast_wire::limits::BODY_BYTES_MAX;
use holdfast_wire::names::{check_cluster, check_name_or_empty};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::Instrument;

/// Largest message that a drone takes, in bytes (the drone's own bound). No message comes near it: see the tests of
/// `connect` (spawns) and `renewals` (answers).
pub const DRONE_FRAME_BYTES_MAX: usize = 2 * BODY_BYTES_MAX;
/// Messages on the way to a drone's writer; more wait in the session's outbox.
const OUT_QUEUE_MAX: usize = 128;
/// How long one message may take to be sent before the drone counts as gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a drone may take to answer a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Room for a message that is over the bound, so that it is refused with a reason rather than with a broken connection.
const OVERSIZE_ROOM_BYTES: usize = 1024 * 1024;
/// Bytes that one read of a socket asks for. The library fills as much with zeroes before each read, and keeps as much for
/// each drone: its own 128 KiB cost more than all else that is done with a frame.
const READ_BUFFER_BYTES: usize = 8 * 1024;
/// Longest reason in a close frame, in bytes (a control frame holds 125, two of them for the code).
const CLOSE_REASON_BYTES_MAX: usize = 123;

/// Why and how a session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// The connection is gone, or the drone closed it: nothing is sent.
    #[error("the connection ended")]
    Gone,
    /// A close frame is sent.
    #[error("closed with {code}: {reason}")]
    Close {
        /// Close code.
        code: u16,
        /// For people.
        reason: String,
    },
}

impl End {
    /// With a close code of `holdfast_wire::drone`.
    pub fn close(code: u16, reason: impl Into<String>) -> Self {
        Self::Close { code, reason: reason.into() }
    }
}

/// Opens a session.
pub async fn open(
    State(app): State<App>,
    PathArgs(cluster): PathArgs<String>,
    query: QueryArgs,
    connection: Option<Extension<ConnectInfo<SocketAddr>>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Failure> {
    check_cluster("cluster", &cluster)?;
    let pool = query.text("pool")?.unwrap_or_default().to_owned();
    check_name_or_empty("pool", &pool)?;
    let upgrade = upgrade.map_err(|rejection| Failure {
        kind: ApiErrorKind::InvalidRequest,
        status: Some(StatusCode::UPGRADE_REQUIRED).filter(|_| rejection.status().is_client_error()),
        message: format!("this path is a WebSocket: {}", rejection.body_text()),
        retry_after_s: None,
    })?;
    if app.stopping.is_cancelled() {
        return Err(Failure::stopping());
    }
    let place = app.open_socket()?;
    let address = connection.map(|Extension(ConnectInfo(from))| from.ip().to_canonical().to_string());
    let address = address.unwrap_or_default();
    let size = BODY_BYTES_MAX + OVERSIZE_ROOM_BYTES;
    let upgrade = upgrade.max_message_size(size).max_frame_size(size).read_buffer_size(READ_BUFFER_BYTES);
    Ok(upgrade.on_upgrade(move |socket| async move {
        // Counted, so that the process does not end before the drone was told to go elsewhere.
        let span = tracing::info_span!("drone", cluster, name = tracing::field::Empty);
        let session = app.tasks.track_future(serve(app.clone(), cluster, pool, address, socket));
        session.instrument(span).await;
        drop(place);
    }))
}

async fn serve(app: App, cluster: String, pool: String, address: String, socket: WebSocket) {
    let (sink, mut stream) = socket.split();
    let (out, queue) = mpsc::channel(OUT_QUEUE_MAX);
    let mut writer = app.tasks.spawn(write(sink, queue));
    let end = match start::start(&app, cluster, pool, address, &mut stream, &out).await {
        Ok((session, early)) => session.run(early, &mut stream).await,
        Err(end) => end,
    };
    tracing::info!(%end, "drone session ended");
    let told = if let End::Close { code, reason } = &end {
        let reason = frames::truncated(reason, CLOSE_REASON_BYTES_MAX);
        let frame = Message::Close(Some(CloseFrame { code: *code, reason: reason.into() }));
        // Full for so long means that the drone does not read.
        out.send_timeout(frame, SEND_TIMEOUT).await.is_ok()
    } else {
        false
    };
    drop(out);
    // It ends by itself: the queue is closed, and every send is bounded. But a drone that takes one message now and then
    // is not waited for.
    if tokio::time::timeout(SEND_TIMEOUT, &mut writer).await.is_err() {
        writer.abort();
    }
    if told {
        // Closing a connection with unread frames would reset it, and the drone might never see the reason.
        let rest = async { while let Some(Ok(_)) = stream.next().await {} };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
    }
}

/// Sends what the session queues. Ends with the queue, after a close frame, or when the drone does not take a message in
/// time.
async fn write(mut sink: SplitSink<WebSocket, Message>, mut queue: mpsc::Receiver<Message>) {
    while let Some(message) = queue.recv().await {
        let mut next = Some(message);
        let mut closing = false;
        // One flush for all that is queued. Each message has its own time: many in a row are no standstill.
        while let Some(message) = next.take() {
            closing = matches!(message, Message::Close(_));
            if !in_time(sink.feed(message)).await {
                return;
            }
            if !closing {
                next = queue.try_recv().ok();
            }
        }
        if !in_time(sink.flush()).await || closing {
            break;
        }
    }
    in_time(sink.close()).await;
}

async fn in_time(sending: impl Future<Output = Result<(), axum::Error>>) -> bool {
    matches!(tokio::time::timeout(SEND_TIMEOUT, sending).await, Ok(Ok(())))
}
