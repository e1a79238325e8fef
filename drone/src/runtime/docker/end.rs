//! Ends containers without their guards: one that has died, or was never there.

use crate::cgroup;
use bollard::Docker;
use bollard::errors::Error as EngineError;
use bollard::query_parameters::{InspectContainerOptions, RemoveContainerOptionsBuilder};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tracing::warn;

/// Time between two looks at the machine's processes: at first, and at most. It doubles.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(20);
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Nothing is left when nothing was seen so often in a row: what was being forked during one look is seen by the next.
const EMPTY_LOOKS: u32 = 2;
/// Longest time that the engine is waited for to say whether a container runs.
const INSPECT_MAX: Duration = Duration::from_secs(2);
/// Longest time that the engine is waited for at once.
const REMOVE_MAX: Duration = Duration::from_secs(10);
/// Time between two requests to the engine.
const REMOVE_INTERVAL: Duration = Duration::from_millis(500);

/// Why a container may be left.
#[derive(Debug, thiserror::Error)]
pub enum EndError {
    /// The engine failed.
    #[error("the engine: {0}")]
    Engine(#[from] EngineError),
    /// The engine took too long.
    #[error("the engine does not answer")]
    TooLong,
}

/// Kills a container by its processes, and by its engine where that answers, until nothing of it runs and, since its
/// permit is gone, nothing ever will. It does not wait for the engine.
pub(super) async fn end(docker: &Docker, id: &str, permit: &Path) {
    let by_engine = async {
        while let Err(e) = remove(docker, id).await {
            warn!(container = id, "cannot remove it: {e}");
            sleep(REMOVE_INTERVAL).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = kill(docker, id, Some(permit)) => {}
        () = by_engine => {}
    }
}

/// The same, and removes it. Fails if the engine does not: then it is at least killed, if it is seen on this machine.
pub(super) async fn end_and_remove(docker: &Docker, id: &str, permit: Option<&Path>) -> Result<(), EndError> {
    // Before its end is waited for: the engine knows containers that this process may not kill.
    let (removed, ()) = tokio::join!(remove(docker, id), async {
        if timeout(REMOVE_MAX, kill(docker, id, permit)).await.is_err() {
            warn!(container = id, "its processes do not end");
        }
    });
    removed
}

/// Removes a container, running or not, with its anonymous volumes.
pub(super) async fn remove(docker: &Docker, id: &str) -> Result<(), EndError> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    match timeout(REMOVE_MAX, docker.remove_container(id, Some(options))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(EngineError::DockerResponseServerError { status_code: 404, .. })) => Ok(()),
        Ok(Err(e)) => Err(e.into()),
        Err(_) => Err(EndError::TooLong),
    }
}

/// From now on nobody can start the container. It may have been removed before.
pub(super) fn remove_permit(permit: &Path) -> io::Result<()> {
    match std::fs::remove_file(permit) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Whether the engine says that a container runs. One that does not answer says nothing.
async fn says_running(docker: &Docker, id: &str) -> bool {
    match timeout(INSPECT_MAX, docker.inspect_container(id, None::<InspectContainerOptions>)).await {
        Ok(Ok(container)) => container.state.and_then(|state| state.running).unwrap_or(false),
        _ => false,
    }
}

/// Kills the processes of a container until there are none and, if there is a permit, it is gone. If none was ever seen
/// here, the engine's word that it runs counts more.
async fn kill(docker: &Docker, id: &str, permit: Option<&Path>) {
    let (mut interval, mut empty_looks, mut seen) = (LOOK_INTERVAL_MIN, 0, false);
    loop {
        // First: what is started after this look cannot mount it any more.
        let permit_gone = match permit.map_or(Ok(()), remove_permit) {
            Ok(()) => true,
            Err(e) => {
                warn!(container = id, "cannot remove its permit: {e}");
                false
            }
        };
        let container = id.to_owned();
        let looked = tokio::task::spawn_blocking(move || cgroup::kill_all(&container)).await;
        match looked.unwrap_or_else(|e| Err(io::Error::other(e))) {
            Ok(0) if permit_gone => {
                empty_looks += 1;
                if empty_looks >= EMPTY_LOOKS && (seen || !says_running(docker, id).await) {
                    return;
                }
            }
            Ok(found) => {
                empty_looks = 0;
                if found > 0 {
                    seen = true;
                    interval = LOOK_INTERVAL_MIN;
                }
            }
            Err(e) => {
                warn!(container = id, "cannot look for its processes: {e}");
                empty_looks = 0;
            }
        }
        sleep(interval).await;
        interval = (interval * 2).min(LOOK_INTERVAL_MAX);
    }
}
