//! A controller that is newer than the drone says what the drone does not know.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Drone, Fake, lease};
use holdfast_wire::drone::{Action, MessageFromDrone};
use holdfast_wire::{TerminationKind, TerminationReason};

#[tokio::test]
async fn what_a_newer_controller_says_is_ignored_and_the_session_goes_on() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    for unknown in [
        r#"{"FromTheFuture":{"x":1}}"#,
        r#""Tomorrow""#,
        // A kind that is known, with content that is not.
        r#"{"Action":{"action_id":"ak-1-1","backend_id":"ba-x","drone_id":1,"action":{"Hibernate":{}}}}"#,
        r#"{"RenewKeysResponse":{"keys":[{"backend":"ba-x","refused":"of_a_new_kind"}]}}"#,
        // Known, with more in it.
        r#"{"AckEvent":{"event_id":7,"new":1},"#,
        r#"{"AckEvent":{"event_id":7,"new":1}}"#,
        r#"{"AckDraining":{"new":1}}"#,
        r#"{"AckActivity":{"activity_id":7,"new":1}}"#,
        r#"{"AckBackends":{"new":1}}"#,
    ] {
        conn.send_raw(unknown);
    }
    let terminate = Action::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External };
    conn.act("marker", "ba-unknown", terminate);
    let first = conn
        .until("an acknowledgement on the same session", |message| match message {
            MessageFromDrone::AckAction { action_id } => Some(action_id),
            _ => None,
        })
        .await;
    assert_eq!(first, "marker", "what is not understood is not acknowledged");
}
