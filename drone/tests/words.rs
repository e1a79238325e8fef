//! What a drone says of itself and of its backends' connections.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Conn, Drone, Fake, TOKEN, answer_http, lease};
use holdfast_wire::BackendStatus;
use holdfast_wire::drone::{ActivityItem, MessageFromDrone, MessageToDrone};
use nix::sys::signal::Signal;

/// The next word about connections; it is acknowledged.
async fn word(conn: &mut Conn) -> ActivityItem {
    let activity = conn
        .until("a word about connections", |message| match message {
            MessageFromDrone::BackendActivity(activity) => Some(activity),
            _ => None,
        })
        .await;
    conn.activity_id = activity.activity_id;
    conn.send(MessageToDrone::AckActivity { activity_id: activity.activity_id, again: Vec::new() });
    let [item] = &activity.backends[..] else { panic!("one backend: {activity:?}") };
    item.clone()
}

#[tokio::test]
async fn a_backends_open_connections_are_told_and_when_the_last_one_is_gone() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let address = conn.waiting("ba-visited", "exec sleep 300").await;
    let server = answer_http(address).await;
    conn.expect("ba-visited", BackendStatus::Ready).await;
    let first = word(&mut conn).await;
    assert_eq!((first.backend.as_str(), first.token, first.connections), ("ba-visited", Some(TOKEN), 0));
    let visitors = [
        tokio::net::TcpStream::connect(address).await.unwrap(),
        tokio::net::TcpStream::connect(address).await.unwrap(),
    ];
    let busy = word(&mut conn).await;
    assert!(busy.connections >= 1, "{busy:?}");
    drop(visitors);
    let idle = word(&mut conn).await;
    assert_eq!(idle.connections, 0);
    assert!(idle.idle_ms >= 1_000, "{idle:?}");
    // A new session is told again, although it was acknowledged, and with a larger number.
    let said = conn.activity_id;
    conn.drop_it();
    let mut conn = fake.conn().await;
    let again = word(&mut conn).await;
    assert_eq!((again.backend.as_str(), again.connections), ("ba-visited", 0));
    assert!(again.idle_ms >= idle.idle_ms, "{again:?} after {idle:?}");
    assert!(conn.activity_id > said, "{} after {said}", conn.activity_id);
    server.abort();
}

#[tokio::test]
async fn a_drone_that_stops_says_so_until_it_is_acknowledged_also_over_a_new_session() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-stays", "trap '' TERM; echo up; while :; do sleep 300; done").await;
    drone.wrote("ba-stays", "up").await;
    drone.signal(Signal::SIGTERM);
    let draining = |message| matches!(message, MessageFromDrone::Draining {}).then_some(());
    conn.until("it says so", draining).await;
    conn.until("it says so again", draining).await;
    conn.drop_it();
    let mut conn = fake.conn().await;
    conn.until("it says so once more", draining).await;
    conn.send(MessageToDrone::AckDraining {});
    // Whatever was on its way by then has arrived after two heartbeats.
    conn.heartbeat().await;
    conn.heartbeat().await;
    drone.signal(Signal::SIGTERM);
    conn.until("the end", |message| match message {
        MessageFromDrone::Draining {} => panic!("it says so although it was acknowledged"),
        MessageFromDrone::BackendEvent(event) if event.state.status() == BackendStatus::Terminated => {
            Some(())
        }
        _ => None,
    })
    .await;
    assert_eq!(drone.ended().await.code(), Some(0));
}
