//! `/pub/b/{backend}/status-stream`: what a backend went through, then what it goes through, until it has terminated.
//!
//! Statuses only rise, so "what comes next" is "every recorded status above the last one sent": nothing is sent twice or
//! left out, however often the state changes between two looks, and `Last-Event-ID` resumes exactly.

use super::args::{PathArgs, QueryArgs, backend_in_path};
use super::backends::{status_message, unknown};
use super::error::Failure;
use crate::app::App;
use crate::hub::{Topic, Watch};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::Stream;
use holdfast_core::records::BackendRecord;
use holdfast_wire::{BackendState, BackendStatus};
use serde::Deserialize;
use serde::de::value::{Error as ValueError, StrDeserializer};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// How often a silent stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The status that `Last-Event-ID` names. One that we never gave is ignored: the stream starts at the beginning.
fn last_event(headers: &HeaderMap) -> Option<BackendStatus> {
    let id = headers.get("last-event-id")?.to_str().ok()?;
    BackendStatus::deserialize(StrDeserializer::<ValueError>::new(id)).ok()
}

/// The recorded states above `last`, oldest first.
fn after(backend: &BackendRecord, last: Option<BackendStatus>) -> VecDeque<(u64, BackendState)> {
    backend
        .history
        .iter()
        .filter(|(_, state)| last.is_none_or(|last| state.status() > last))
        .cloned()
        .collect()
}

struct Follow {
    app: App,
    id: String,
    watch: Watch,
    last: Option<BackendStatus>,
    due: VecDeque<(u64, BackendState)>,
    /// Given back when the stream ends.
    _place: OwnedSemaphorePermit,
}

impl Follow {
    async fn next(&mut self) -> Option<(u64, BackendState)> {
        loop {
            if let Some((time_ms, state)) = self.due.pop_front() {
                self.last = Some(state.status());
                return Some((time_ms, state));
            }
            if self.last == Some(BackendStatus::Terminated) {
                return None;
            }
            tokio::select! {
                () = self.watch.changed() => {}
                () = self.app.stopping.cancelled() => return None,
            }
            // Gone means terminated and swept while this stream was behind: there is nothing more to say.
            match self.app.store.local().view.backend(&self.id) {
                Ok(backend) => self.due = after(&backend?, self.last),
                Err(error) => {
                    tracing::error!(backend = %self.id, %error, "reading the state failed; stream ended");
                    return None;
                }
            }
        }
    }
}

/// See the module.
pub async fn status_stream(
    State(app): State<App>,
    PathArgs(id): PathArgs<String>,
    query: QueryArgs,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    let id = backend_in_path(&id)?.to_owned();
    let place = app.open_stream()?;
    // Before the read, so that no change between the two is missed.
    let watch = app.hub.watch(Topic::Backend(id.clone()));
    let backend = app.read(query.consistency()?).await?.view.backend(&id)?.ok_or_else(|| unknown(&id))?;
    let last = last_event(&headers);
    let due = after(&backend, last);
    let follow = Follow { app, id, watch, last, due, _place: place };
    let stream = futures::stream::unfold(follow, |mut follow| async move {
        let (time_ms, state) = follow.next().await?;
        let message = status_message(time_ms, &state);
        let event = Event::default().id(message.status.as_str());
        let event = match event.json_data(&message) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, "a status can't be written as JSON");
                return None;
            }
        };
        Some((Ok(event), follow))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::records::Presence;
    use holdfast_wire::KeyConfig;

    fn backend(states: Vec<BackendState>) -> BackendRecord {
        BackendRecord {
            key: KeyConfig::default(),
            cluster: String::new(),
            drone_id: 1,
            presence: Presence::Expected,
            drone: String::new(),
            data_id: None,
            spawn_repeated: false,
            id_supplied: false,
            token: 1,
            history: states.into_iter().enumerate().map(|(at, state)| (at as u64, state)).collect(),
            termination_asked: None,
            lifetime_ends_at_ms: None,
            max_idle_seconds: None,
            static_token: None,
            secret_token: String::new(),
            subdomain: None,
            revoked_users: Vec::new(),
            terminate_action: None,
            activity: None,
            end_filed_at_ms: None,
        }
    }

    #[test]
    fn a_stream_resumes_after_the_status_it_last_gave() {
        let backend = backend(vec![BackendState::Scheduled, BackendState::Loading, BackendState::Starting]);
        assert_eq!(after(&backend, None).len(), 3);
        let rest = after(&backend, Some(BackendStatus::Loading));
        assert_eq!(rest, [(2, BackendState::Starting)]);
        assert!(after(&backend, Some(BackendStatus::Ready)).is_empty());
    }

    #[test]
    fn event_ids_are_status_names_and_foreign_ones_are_ignored() {
        let header = |id: &str| {
            let name = axum::http::HeaderName::from_static("last-event-id");
            last_event(&HeaderMap::from_iter([(name, id.parse().unwrap())]))
        };
        assert_eq!(header("hard-terminating"), Some(BackendStatus::HardTerminating));
        assert_eq!(header("17"), None);
        assert_eq!(last_event(&HeaderMap::new()), None);
    }
}
