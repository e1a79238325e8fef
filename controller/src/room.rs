//! Waiting for disk space.
//!
//! A write that failed for want of space ends the replica: nobody knows what is on disk. It starts afresh once there is
//! space, from what was synced, in a new process image under the same process id: whatever RocksDB and the runtime held is
//! gone with the old one (every descriptor is close-on-exec, so the locks go too). Until then this process says on the same
//! address why it does not serve.

use crate::config::Settings;
use crate::http::metrics::Text;
use crate::idle;
use axum::Router;
use raft_store::disk::{free_bytes, has_room};
use std::future::Future;
use std::os::unix::process::CommandExt;
use std::time::Duration;
use tokio::net::TcpListener;

/// How often free space is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Waits until there is space, and returns true; or until `stop` resolves, and returns false.
pub async fn wait(settings: &Settings, reason: &str, stop: impl Future<Output = ()>) -> bool {
    tracing::error!(%reason, dir = %settings.store.data_dir.display(), "waiting for disk space");
    let (dir, reserve) = (settings.store.data_dir.clone(), settings.store.disk_reserve_bytes);
    let room = async {
        loop {
            match has_room(&dir, reserve) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "free space is not known"),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let served = async {
        match TcpListener::bind(settings.listen).await {
            Ok(listener) => {
                if let Err(error) = axum::serve(listener, router(settings, reason)).await {
                    tracing::warn!(%error, "the HTTP server failed");
                }
            }
            Err(error) => tracing::warn!(%error, "nobody can be told why this controller does not serve"),
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = room => true,
        () = stop => false,
        () = served => false,
    }
}

fn router(settings: &Settings, reason: &str) -> Router {
    let (dir, reserve) = (settings.store.data_dir.clone(), settings.store.disk_reserve_bytes);
    let metrics = move |text: &mut Text, reason: &str| {
        let labels = [("reason", reason)];
        text.gauge_with("holdfast_failed", "Whether this replica has failed, and why.", &labels, 1);
        text.gauge("holdfast_disk_full", "Whether less than the reserve is free.", 1);
        if let Ok(free) = free_bytes(&dir) {
            text.gauge("holdfast_disk_free_bytes", "Free bytes of the data directory's file system.", free);
        }
        text.gauge("holdfast_disk_reserve_bytes", "Bytes to keep free.", reserve);
    };
    let reason = reason.to_owned();
    idle::router(move || reason.clone(), metrics)
}

/// Replaces this process by a new start of the same program with the same arguments. Returns only if that fails.
pub fn start_afresh() -> std::io::Error {
    tracing::info!("there is space again; starting afresh");
    match std::env::current_exe() {
        Ok(program) => std::process::Command::new(program).args(std::env::args_os().skip(1)).exec(),
        Err(error) => error,
    }
}
