//! What becomes of containers that nobody watches: what runs without a guard is ended, what has ended is removed but for
//! the last few. Only this drone's own.

use super::DockerRuntime;
use super::end::{self, EndError};
use super::labels::{self, BACKEND};
use crate::data_dir::has_guard;
use bollard::models::{ContainerSummary, ContainerSummaryStateEnum as State};
use bollard::query_parameters::ListContainersOptionsBuilder;
use futures::stream::{self, StreamExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;
use tracing::{info, warn};

/// Ended containers that are kept, for their output.
pub const ENDED_MAX: usize = 100;
/// How often it is done.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);
/// Longest time for the engine's list.
const LIST_MAX: Duration = Duration::from_secs(30);
/// Containers that are ended at a time.
const AT_A_TIME_MAX: usize = 8;

/// A container of this drone.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    id: String,
    backend: String,
    dir: Option<PathBuf>,
    /// Seconds since 1970.
    created: i64,
    state: State,
    /// A task of this drone watches it.
    watched: bool,
    /// A guard holds it, perhaps an earlier drone's.
    guarded: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nobody holds its deadline.
    End,
    /// It has ended, and there are enough of those.
    Remove,
}

/// Who has to go.
fn plan(seen: &[Seen], ended_max: usize) -> Vec<(&Seen, Fate)> {
    let ours = seen.iter().filter(|container| !container.watched && !container.guarded);
    let (mut ended, alive): (Vec<&Seen>, Vec<&Seen>) =
        ours.partition(|container| matches!(container.state, State::EXITED | State::DEAD));
    // The oldest first.
    ended.sort_by_key(|container| container.created);
    let surplus = ended.len().saturating_sub(ended_max);
    let end = alive.into_iter().map(|container| (container, Fate::End));
    end.chain(ended.into_iter().take(surplus).map(|container| (container, Fate::Remove))).collect()
}

/// Does it once. An error says that something may be left.
pub(super) async fn sweep(runtime: &DockerRuntime) -> Result<(), EndError> {
    let watched_before = runtime.watched();
    let options = ListContainersOptionsBuilder::new().all(true).filters(&runtime.owner.filter()).build();
    let list = timeout(LIST_MAX, runtime.docker.list_containers(Some(options)));
    let list = list.await.map_err(|_| EndError::TooLong)??;
    // Taken on, or let go of, while the engine made its list: either is left to the next time.
    let watched_after = runtime.watched();
    let seen: Vec<Seen> = list
        .into_iter()
        .filter_map(|summary| see(runtime, summary))
        .map(|seen| Seen {
            watched: watched_before.contains(&seen.backend) || watched_after.contains(&seen.backend),
            ..seen
        })
        .collect();
    // Made first, not in the stream: the compiler does not see otherwise that they may go between threads.
    let ends: Vec<_> = plan(&seen, ENDED_MAX)
        .into_iter()
        .map(|(container, fate)| carry_out(runtime, container, fate))
        .collect();
    let done: Vec<Result<(), EndError>> = stream::iter(ends).buffer_unordered(AT_A_TIME_MAX).collect().await;
    done.into_iter().collect()
}

async fn carry_out(runtime: &DockerRuntime, container: &Seen, fate: Fate) -> Result<(), EndError> {
    let (docker, backend, id) = (&runtime.docker, &container.backend, &container.id);
    let done = match fate {
        Fate::End => {
            warn!(backend, container = id, state = %container.state, "nobody guards it: ending it");
            let permit = container.dir.as_deref().map(super::permit_in);
            end::end_and_remove(docker, id, permit.as_deref()).await
        }
        Fate::Remove => {
            info!(backend, container = id, "removing what has ended");
            end::remove(docker, id).await
        }
    };
    if let Err(e) = &done {
        warn!(backend, container = id, "cannot remove it: {e}");
    }
    done
}

/// Ends and removes every container of one backend, whose guard has ended.
pub(super) async fn end_backend(runtime: &DockerRuntime, backend: &str) -> Result<(), EndError> {
    let options = ListContainersOptionsBuilder::new().all(true).filters(&runtime.owner.filter()).build();
    let list = timeout(LIST_MAX, runtime.docker.list_containers(Some(options)));
    let list = list.await.map_err(|_| EndError::TooLong)??;
    let of_it = list.into_iter().filter_map(|summary| see(runtime, summary)).filter(|s| s.backend == backend);
    for container in of_it {
        let permit = container.dir.as_deref().map(super::permit_in);
        end::end_and_remove(&runtime.docker, &container.id, permit.as_deref()).await?;
    }
    Ok(())
}

fn see(runtime: &DockerRuntime, summary: ContainerSummary) -> Option<Seen> {
    let labels = summary.labels.unwrap_or_default();
    if !runtime.owner.owns(&labels) {
        return None;
    }
    let dir = labels::dir(&labels);
    Some(Seen {
        id: summary.id?,
        backend: labels.get(BACKEND)?.clone(),
        guarded: dir.as_deref().is_some_and(is_guarded),
        dir,
        created: summary.created.unwrap_or_default(),
        // What is not known to have ended has not.
        state: summary.state.unwrap_or(State::EMPTY),
        watched: false,
    })
}

fn is_guarded(dir: &Path) -> bool {
    has_guard(&dir.join(crate::data_dir::GUARD_LOG))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: &str, created: i64, state: State) -> Seen {
        let backend = format!("ba-{id}");
        Seen { id: id.to_owned(), backend, dir: None, created, state, watched: false, guarded: false }
    }

    #[test]
    fn what_nobody_holds_is_ended_and_of_the_ended_the_oldest_go() {
        let all = [
            seen("newest", 9, State::EXITED),
            seen("oldest", 1, State::EXITED),
            seen("older", 2, State::DEAD),
            seen("running", 3, State::RUNNING),
            seen("paused", 3, State::PAUSED),
            seen("never-started", 3, State::CREATED),
            seen("odd", 3, State::EMPTY),
            Seen { watched: true, ..seen("watched", 0, State::RUNNING) },
            Seen { watched: true, ..seen("just-ended", 0, State::EXITED) },
            Seen { guarded: true, ..seen("of-an-earlier-drone", 0, State::RUNNING) },
        ];
        let planned: Vec<(&str, Fate)> =
            plan(&all, 1).iter().map(|(c, fate)| (c.id.as_str(), *fate)).collect();
        let expected = [
            ("running", Fate::End),
            ("paused", Fate::End),
            ("never-started", Fate::End),
            ("odd", Fate::End),
            ("oldest", Fate::Remove),
            ("older", Fate::Remove),
        ];
        assert_eq!(planned, expected);
        assert!(plan(&all[..3], 3).is_empty());
    }
}
