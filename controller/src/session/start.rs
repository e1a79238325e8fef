//! How a session begins: the drone says who it is, and an entry gives it its number.

use super::outbox::{self, Outbox};
use super::run::Session;
use super::{End, frames};
use crate::app::App;
use crate::hub::Topic;
use crate::ids;
use axum::extract::ws::{Message, WebSocket};
use futures::stream::SplitStream;
use futures::{Stream, StreamExt};
use holdfast_core::command::{Command, Proposal, RegisterDrone};
use holdfast_core::outcome::{Outcome, Refusal};
use holdfast_core::records::DroneRecord;
use holdfast_wire::FieldError;
use holdfast_wire::drone::{
    CLOSE_BAD_MESSAGE, CLOSE_GO_ELSEWHERE, CLOSE_NAME_TAKEN, ControllerHandshake, DroneHandshake, VersionInfo,
};
use holdfast_wire::names::{check_drone_name, check_text};
use raft_store::ProposeError;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long a drone may take to say who it is.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long everything between a drone's handshake and the answer may take. Shorter than the 2 s for which a drone waits
/// (its `CONNECT_TIMEOUT`): what is registered after the drone has gone to another controller would take over from there.
const REGISTER_DEADLINE: Duration = Duration::from_millis(1800);
/// Frames of a drone that does not wait for the answer to its handshake. More are left unread meanwhile.
const EARLY_FRAMES_MAX: usize = 64;
/// Bytes of the handshake, and bytes of the frames that are kept before the drone is registered: no more frames are read
/// once they have so many, and one that would exceed it ends the connection.
const EARLY_BYTES_MAX: usize = 64 * 1024;
/// Longest incarnation, version or git hash, in bytes.
const HANDSHAKE_TEXT_BYTES_MAX: usize = 128;

fn elsewhere(reason: impl std::fmt::Display) -> End {
    End::close(CLOSE_GO_ELSEWHERE, reason.to_string())
}

/// Reads the first frame.
fn read(text: &str) -> Result<DroneHandshake, String> {
    if text.len() > EARLY_BYTES_MAX {
        return Err(format!("the handshake is {} bytes, at most {EARLY_BYTES_MAX} are allowed", text.len()));
    }
    let handshake: DroneHandshake =
        serde_json::from_str(text).map_err(|error| format!("not a handshake: {error}"))?;
    check(&handshake).map_err(|error| error.to_string())?;
    Ok(handshake)
}

fn check(handshake: &DroneHandshake) -> Result<(), FieldError> {
    check_drone_name("name", &handshake.name)?;
    check_text("version.version", &handshake.version.version, HANDSHAKE_TEXT_BYTES_MAX)?;
    check_text("version.git_hash", &handshake.version.git_hash, HANDSHAKE_TEXT_BYTES_MAX)?;
    for (field, value) in [("incarnation", &handshake.incarnation), ("data_id", &handshake.data_id)] {
        match value {
            Some(value) if value.is_empty() => return Err(FieldError::new(field, "must not be empty")),
            Some(value) => check_text(field, value, HANDSHAKE_TEXT_BYTES_MAX)?,
            None => {}
        }
    }
    match (&handshake.incarnation, &handshake.data_id) {
        (Some(_), None) => {
            Err(FieldError::new("data_id", "is missing: a drone that gives an incarnation gives both"))
        }
        (None, Some(_)) => {
            Err(FieldError::new("incarnation", "is missing: a drone that gives a data_id gives both"))
        }
        _ => Ok(()),
    }
}

async fn handshake(stream: &mut SplitStream<WebSocket>) -> Result<DroneHandshake, End> {
    let bad = |reason: &str| End::close(CLOSE_BAD_MESSAGE, reason);
    loop {
        match stream.next().await {
            Some(Ok(Message::Text(text))) => return read(&text).map_err(|reason| bad(&reason)),
            Some(Ok(Message::Binary(_))) => return Err(bad("binary frames are not understood")),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(End::Gone),
        }
    }
}

/// What the state says of the name's earlier session, seen from the controller that registers a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Earlier {
    /// No such drone yet, or the same incarnation, which reconnects. Or both are drones of Plane's, which give none: one of
    /// those reconnects while its old socket is open and answers pings, and closes that only when it has the new one.
    Own,
    /// Another incarnation's session, here.
    Here,
    /// Another incarnation's session, at another controller: its drone's heartbeats say whether it lives.
    Elsewhere,
}

fn earlier(drone: Option<&DroneRecord>, incarnation: &str, controller: u64) -> Earlier {
    match drone {
        None => Earlier::Own,
        Some(drone) if drone.incarnation == incarnation => Earlier::Own,
        Some(drone) if ids::is_session(&drone.incarnation) && ids::is_session(incarnation) => Earlier::Own,
        Some(drone) if drone.controller == controller => Earlier::Here,
        Some(_) => Earlier::Elsewhere,
    }
}

/// Waits for `work`, but drops it as soon as the drone is gone. Frames that come meanwhile are put into `early`.
async fn while_open<T>(
    stream: &mut (impl Stream<Item = Result<Message, axum::Error>> + Unpin),
    early: &mut Vec<Message>,
    work: impl Future<Output = Result<T, End>>,
) -> Result<T, End> {
    tokio::pin!(work);
    let mut bytes = 0;
    loop {
        tokio::select! {
            // What has ended is not begun.
            biased;
            frame = stream.next(), if early.len() < EARLY_FRAMES_MAX => match frame {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(End::Gone),
                Some(Ok(frame)) => {
                    bytes += outbox::bytes_of(&frame);
                    if bytes > EARLY_BYTES_MAX {
                        let reason = format!("more than {EARLY_BYTES_MAX} bytes came before the registration");
                        return Err(End::close(CLOSE_BAD_MESSAGE, reason));
                    }
                    early.push(frame);
                }
            },
            done = &mut work => return done,
        }
    }
}

/// The part of [`REGISTER_DEADLINE`] that is left before `end`.
fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}

/// See the module. Gives the session and the frames that it has to read first.
pub async fn start(
    app: &App,
    cluster: String,
    pool: String,
    address: String,
    stream: &mut SplitStream<WebSocket>,
    out: &mpsc::Sender<Message>,
) -> Result<(Session, Vec<Message>), End> {
    let handshake = tokio::select! {
        done = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(stream)) => {
            done.map_err(|_| End::close(CLOSE_BAD_MESSAGE, "no handshake came in time"))??
        }
        () = app.stopping.cancelled() => return Err(elsewhere("this controller is stopping")),
    };
    let end = Instant::now() + REGISTER_DEADLINE;
    tracing::Span::current().record("name", &handshake.name);
    let incarnation = handshake.incarnation.clone().unwrap_or_else(ids::session);
    let data_id = handshake.data_id.clone();
    let session = ids::session();
    // Entered before it is registered, so that nobody takes it for dead in between.
    let place = app.sessions.enter(&session);
    let mut early = Vec::new();
    let registered = async {
        let (drone_id, index) =
            register(app, (cluster, pool, address), handshake, incarnation.clone(), &session, end).await?;
        // Invariant 1 of the session.
        app.store.wait_applied(index, left(end)).await.map_err(elsewhere)?;
        Ok(drone_id)
    };
    let drone_id = while_open(stream, &mut early, registered).await?;
    // Before the first look at what is due.
    let watch = app.hub.watch(Topic::Drone(drone_id));
    let local = app.store.local();
    let formed = local.view.cluster().map_err(|error| {
        tracing::error!(%error, "reading the state failed");
        elsewhere("reading the state failed")
    })?;
    let answer = ControllerHandshake {
        version: VersionInfo::current(),
        name: App::controller_name(app.settings.store.id),
        cluster_id: formed.as_ref().map(|formed| formed.cluster_id.clone()),
        lease: formed.map(|formed| formed.lease),
    };
    let text = serde_json::to_string(&answer).map_err(elsewhere)?;
    out.try_send(Message::Text(text.into())).map_err(|_| End::Gone)?;
    tracing::info!(drone_id, session, "drone session started");
    let outbox = Outbox::new(out.clone());
    let process = (incarnation, data_id);
    Ok((Session::new(app.clone(), outbox, drone_id, session, process, place, watch), early))
}

/// Registers the session before `end` and returns the drone's number and the entry's index.
///
/// What remains: a proposal that was handed to a leader can't be called back. If that leader is cut off just then, its
/// entry may be committed after the drone has given up here and registered elsewhere, and then takes over from that newer
/// session. The drone is closed with `CLOSE_NAME_TAKEN` there and registers once more, after a pause of up
/// to a second (its `BACKOFF_MAX`). Nothing is lost by it: renewals, reports and actions are repeated.
async fn register(
    app: &App,
    (cluster, pool, address): (String, String, String),
    handshake: DroneHandshake,
    incarnation: String,
    session: &str,
    end: Instant,
) -> Result<(i32, u64), End> {
    // Not the local state: an older record must not make us take a live drone's name.
    let point = app.store.linearizable(left(end)).await.map_err(elsewhere)?;
    let found = point.view.drone_by_name(&cluster, &handshake.name).map_err(|error| {
        tracing::error!(%error, "reading the state failed");
        elsewhere("reading the state failed")
    })?;
    let old = found.map(|(_, drone)| drone);
    let take_over = match earlier(old.as_ref(), &incarnation, app.settings.store.id) {
        // Of a new name nobody is known to be dead.
        Earlier::Own => old.is_some(),
        Earlier::Elsewhere => false,
        Earlier::Here => match &old {
            Some(old) => !app.sessions.answers(&old.session).await,
            None => true,
        },
    };
    let command = Command::RegisterDrone(RegisterDrone {
        cluster,
        name: handshake.name,
        pool,
        incarnation,
        data_id: handshake.data_id,
        address,
        session: session.to_owned(),
        controller: app.settings.store.id,
        take_over,
        version: handshake.version.version,
        git_hash: frames::truncated(&handshake.version.git_hash, HANDSHAKE_TEXT_BYTES_MAX).to_owned(),
    });
    loop {
        let proposal = Proposal { command: command.clone(), idempotency: None };
        let answer = match app.propose_within(proposal, left(end)).await {
            Ok(answer) => answer,
            // The same session may be registered twice.
            Err(ProposeError::OutcomeUnknown(_)) if Instant::now() < end => continue,
            Err(error) => return Err(elsewhere(error)),
        };
        return match answer.outcome {
            Outcome::Registered { drone_id } => Ok((drone_id, answer.index)),
            Outcome::Refused(refusal @ Refusal::NameTaken) => {
                Err(End::close(CLOSE_NAME_TAKEN, refusal.to_string()))
            }
            Outcome::Refused(refusal) => Err(elsewhere(refusal)),
            other => {
                tracing::error!(?other, "unexpected outcome of a registration");
                Err(elsewhere("the registration failed"))
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ping() -> Result<Message, axum::Error> {
        Ok(Message::Ping(Vec::new().into()))
    }

    #[tokio::test]
    async fn nothing_is_proposed_for_a_drone_that_is_gone() {
        let close = Ok(Message::Close(None));
        for frames in [vec![], vec![ping(), close], vec![Err(axum::Error::new("broken"))]] {
            let mut proposed = false;
            let work = async {
                proposed = true;
                Ok(())
            };
            let ended = while_open(&mut futures::stream::iter(frames), &mut Vec::new(), work).await;
            assert_eq!((ended, proposed), (Err(End::Gone), false));
        }
        // Gone while the registration looks for a leader.
        let mut stream = Box::pin(futures::stream::once(async {
            tokio::task::yield_now().await;
            Ok(Message::Close(None))
        }));
        let work = std::future::pending::<Result<(), End>>();
        assert_eq!(while_open(&mut stream, &mut Vec::new(), work).await, Err(End::Gone));
    }

    #[tokio::test]
    async fn frames_that_come_early_are_kept_up_to_a_bound() {
        let mut early = Vec::new();
        let mut stream = futures::stream::repeat_with(ping);
        assert_eq!(while_open(&mut stream, &mut early, async { Ok(5) }).await, Ok(5));
        assert_eq!(early.len(), EARLY_FRAMES_MAX);
        // Nor do they hold more bytes than a handshake may.
        let large = |bytes: usize| Ok(Message::Binary(vec![0; bytes].into()));
        let mut stream = futures::stream::iter([large(EARLY_BYTES_MAX), large(1)]);
        let ended = while_open(&mut stream, &mut Vec::new(), std::future::pending::<Result<(), End>>()).await;
        assert!(matches!(&ended, Err(End::Close { code: CLOSE_BAD_MESSAGE, .. })), "{ended:?}");
    }

    fn text(change: serde_json::Value) -> String {
        let mut handshake = json!({"version": {"version": "1", "git_hash": "a"}, "name": "dr-a"});
        for (key, value) in change.as_object().unwrap() {
            handshake[key] = value.clone();
        }
        handshake.to_string()
    }

    #[test]
    fn a_plane_drones_handshake_is_read_and_each_wrong_field_named() {
        assert_eq!(read(&text(json!({"other": 1}))).unwrap().incarnation, None);
        for (change, named) in [
            (json!({"name": "a"}), "name"),
            (json!({"name": "dr-A"}), "name"),
            (json!({"incarnation": ""}), "incarnation"),
            (json!({"incarnation": "x".repeat(129), "data_id": "m"}), "incarnation"),
            (json!({"incarnation": "i"}), "data_id"),
            (json!({"data_id": "m"}), "incarnation"),
            (json!({"incarnation": "i", "data_id": ""}), "data_id"),
            (json!({"name": format!("dr-{}", "a".repeat(EARLY_BYTES_MAX))}), "the handshake is"),
            (json!({"version": {"version": "\n", "git_hash": ""}}), "version.version"),
            (json!({"version": 5}), "not a handshake"),
        ] {
            let reason = read(&text(change)).unwrap_err();
            assert!(reason.starts_with(named), "{reason}");
        }
        assert!(read("{").unwrap_err().starts_with("not a handshake"));
    }

    fn drone(incarnation: &str) -> DroneRecord {
        DroneRecord {
            cluster: "c".into(),
            name: "dr-a".into(),
            pool: String::new(),
            incarnation: incarnation.into(),
            data_id: Some("m".into()),
            session: "s".into(),
            address: String::new(),
            registered_index: 1,
            is_listed: true,
            controller: 1,
            version: String::new(),
            git_hash: String::new(),
            draining: false,
            backend_count: 0,
            registered_at_ms: 0,
            heartbeat: None,
            drain_deadline_ms: None,
            leaving: false,
            heard_filed_at_ms: None,
        }
    }

    #[test]
    fn only_another_incarnation_elsewhere_is_left_to_its_heartbeats() {
        let drone = drone("one");
        assert_eq!(earlier(None, "one", 1), Earlier::Own);
        assert_eq!(earlier(Some(&drone), "one", 2), Earlier::Own);
        assert_eq!(earlier(Some(&drone), "two", 1), Earlier::Here);
        assert_eq!(earlier(Some(&drone), "two", 2), Earlier::Elsewhere);
    }

    #[test]
    fn a_drone_of_planes_takes_over_from_another_of_planes_and_from_no_other() {
        let (old, new) = (ids::session(), ids::session());
        for controller in [1, 2] {
            assert_eq!(earlier(Some(&drone(&old)), &new, controller), Earlier::Own);
            assert_ne!(earlier(Some(&drone("one")), &new, controller), Earlier::Own);
            assert_ne!(earlier(Some(&drone(&old)), "two", controller), Earlier::Own);
        }
    }
}
