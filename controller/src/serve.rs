//! The life of the process: open, serve, stop.

use crate::app::App;
use crate::config::Settings;
use crate::http;
use crate::join::{JoinError, join};
use axum::serve::ListenerExt;
use raft_store::disk::is_out_of_space;
use raft_store::{OpenError, Store};
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;

/// How long a controller that starts may take to find a leader and catch up before it listens all the same.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(1);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long a stopping leader waits for its successor.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(2);
/// How long requests under way may take to finish once this controller stops.
const FINISH_DEADLINE: Duration = Duration::from_secs(10);

/// Why a controller ended other than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The replica can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The address can't be bound.
    #[error("can't listen on {addr}: {error}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The cause.
        error: std::io::Error,
    },
    /// The HTTP server failed.
    #[error("the HTTP server failed: {0}")]
    Http(std::io::Error),
    /// The cluster to join does not take this member.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The replica failed for good.
    #[error("this replica has failed: {0}")]
    Failed(String),
}

impl ServeError {
    /// Whether it was for want of disk space: then waiting helps (see [`crate::room`]).
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::Failed(why) => is_out_of_space(why),
            Self::Open(OpenError::Storage { error, .. }) => is_out_of_space(error),
            _ => false,
        }
    }
}

/// Serves until `stop` resolves; then hands leadership over, lets requests finish, sends drones elsewhere and closes the
/// store.
pub async fn serve(settings: Settings, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    // Bound first: nothing is opened that could not be served. Listening comes when there is something to serve: until then
    // a client is turned away at once and asks another controller, rather than wait here.
    let listen = settings.listen;
    let cannot_listen = |error| ServeError::Listen { addr: listen, error };
    let socket = bound(listen).map_err(cannot_listen)?;
    let store = Store::open(settings.store.clone()).await?;
    let mut stop = std::pin::pin!(stop);
    if !store.must_join() {
        tokio::select! {
            // Without a leader it serves what it can.
            _ = store.linearizable(CATCH_UP_DEADLINE) => {}
            () = &mut stop => {
                store.stop().await;
                return Ok(());
            }
        }
    }
    let listener = match socket.listen(BACKLOG) {
        Ok(listener) => listener,
        Err(error) => {
            store.stop().await;
            return Err(cannot_listen(error));
        }
    };
    tracing::info!(id = settings.store.id, %listen, url = %settings.advertise_url, "serving");
    let served = serve_on(listener, store.clone(), settings, stop).await;
    store.stop().await;
    served
}

/// Takes the address without listening on it.
fn bound(addr: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As `TcpListener::bind` does: connections of an earlier process don't keep the address.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(socket)
}

/// As [`serve`], on a bound listener and an open store, which the caller closes.
pub async fn serve_on(
    listener: TcpListener,
    store: Store,
    settings: Settings,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let stopping = CancellationToken::new();
    // Whatever way this function ends, or is dropped, everything that it started ends too.
    let _end_all = stopping.clone().drop_guard();
    let app = App::start(store.clone(), settings, stopping.clone());
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY can't be set");
        }
    });
    let server =
        axum::serve(listener, http::router(app.clone()).into_make_service_with_connect_info::<SocketAddr>())
            .with_graceful_shutdown(stopping.clone().cancelled_owned())
            .into_future();
    tokio::pin!(server);
    let ended = tokio::select! {
        served = &mut server => return served.map_err(ServeError::Http),
        () = stop => Ok(()),
        reason = store.failed() => Err(ServeError::Failed(reason)),
        error = not_admitted(&app) => Err(ServeError::Join(error)),
    };
    if ended.is_ok() {
        tracing::info!("stopping");
        // Requests are still served meanwhile, so that nobody waits for an election.
        tokio::select! {
            moved = store.transfer_leadership(TRANSFER_DEADLINE) => {
                if !moved {
                    tracing::warn!("leadership was not handed over in time");
                }
            }
            _ = &mut server => {}
        }
    }
    stopping.cancel();
    app.tasks.close();
    let finish = async {
        if let Err(error) = server.await {
            tracing::warn!(%error, "the HTTP server failed while stopping");
        }
        app.tasks.wait().await;
    };
    if tokio::time::timeout(FINISH_DEADLINE, finish).await.is_err() {
        tracing::warn!("some requests did not finish in time");
    }
    ended
}

/// Asks for admission if that is needed. Resolves only if it is refused.
async fn not_admitted(app: &App) -> JoinError {
    match join(&app.store, &app.settings).await {
        Err(error) => error,
        Ok(()) => std::future::pending().await,
    }
}
