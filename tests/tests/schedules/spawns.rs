//! Spawns that are lost, late, or meant for a process that is gone.

use crate::support::{NOT_COMING, SOON, connect, drone, exited, hold, patient, request, start_backend};
use holdfast_tests::harness::{Cluster, EventKind, LONG, wait_until};
use holdfast_tests::sim_drone::{Identity, LocalClock, SimDrone, SimError};
use holdfast_wire::drone::RenewRefusal;
use holdfast_wire::{ApiErrorKind, BackendState, BackendStatus, TerminationReason};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// An hour, in milliseconds.
const HOUR_MS: i64 = 3_600_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spawn_on_its_way_to_a_restarted_drone_gets_the_new_clocks_deadlines() {
    let cluster = Cluster::builder().drones(0).lease("renew=3s,soft=6s,hard=7s,expiry=9s").start().await;
    let first = Identity::new(&cluster.name, "dr-sim", "first");
    let clock = LocalClock::reading(1_700_000_000_000);
    let old = drone(&cluster, &first, &clock).await;
    let answer = connect(&cluster, "k").await;
    assert!(answer.spawned);
    // Nothing of it is on the disk; and the process that it was meant for is gone.
    drop(old);

    // With the old clock's deadlines it would run an hour past its expiry.
    let clock = LocalClock::reading(clock.now_ms() - HOUR_MS);
    let mut new = drone(&cluster, &first.restarted("second"), &clock).await;
    let spawn = new.next_spawn(SOON).await.unwrap();
    assert_eq!((&spawn.backend_id, spawn.key.token), (&answer.backend_id, answer.fencing_token));
    let ahead_ms = spawn.key.deadlines.soft_terminate_at - clock.now_ms();
    assert!((0..=6_000).contains(&ahead_ms), "soft_terminate_at is {ahead_ms} ms ahead of the new clock");
    start_backend(&mut new, &spawn).await;
    let found = connect(&cluster, "k").await;
    assert_eq!((found.spawned, found.fencing_token), (false, answer.fencing_token));
}

/// The old machine may have got the spawn, and what the new one knows nothing of may run there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drone_name_on_another_disk_gets_no_old_spawn_and_frees_no_key() {
    let cluster = Cluster::builder().drones(0).lease("renew=3s,soft=6s,hard=7s,expiry=9s").start().await;
    let first = Identity::new(&cluster.name, "dr-sim", "first");
    let clock = LocalClock::reading(1_700_000_000_000);
    let old = drone(&cluster, &first, &clock).await;
    let answer = connect(&cluster, "k").await;
    let before = cluster.key("k").await.expect("held");
    drop(old);

    let clock = LocalClock::reading(clock.now_ms() - HOUR_MS);
    let mut new = drone(&cluster, &first.on_another_disk("second"), &clock).await;
    new.report_and_wait(&answer.backend_id, Some(answer.fencing_token), exited(), SOON).await.unwrap();
    match new.next_spawn(NOT_COMING).await {
        Err(SimError::Timeout(_)) => {}
        other => panic!("the drone on another disk got {other:?}"),
    }
    let during = cluster.key("k").await.expect("still held");
    assert_eq!((during.token, during.expires_at), (before.token, before.expires_at));
    let mut impatient = request(&cluster, "k");
    impatient.wait_ms = Some(1);
    let refused = cluster.http.connect(&cluster.url(0), &impatient).await.refused(ApiErrorKind::KeyHeld);
    assert!(refused.message.contains(&answer.backend_id), "{refused:?}");

    // Other keys can be had at once, in the new clock.
    let (_, other) = hold(&cluster, &mut new, "other").await;
    let ahead_ms = other.deadlines.renew_at - clock.now_ms();
    assert!(
        (-1_000..=3_000).contains(&ahead_ms),
        "renew_at is {ahead_ms} ms ahead of the new clock: {other:?}"
    );

    // And the key itself once it has expired, not before.
    let again = connect(&cluster, "k").await;
    assert!(again.spawned && again.fencing_token > answer.fencing_token, "{again:?} after {answer:?}");
    let after = cluster.key("k").await.expect("held by the next one");
    assert!(after.acquired_at >= before.expires_at, "{after:?} was acquired before {before:?} expired");
    let spawn = new.next_spawn(SOON).await.unwrap();
    assert_eq!(spawn.backend_id, again.backend_id);
}

/// Plane's drones get an unacknowledged spawn once more, unchanged; from then on their word frees nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_of_planes_that_crosses_the_second_sending_frees_nothing() {
    let cluster = Cluster::builder().drones(0).lease("renew=3s,soft=14s,hard=15s,expiry=20s").start().await;
    let identity = Identity::of_plane(&cluster.name, "dr-plane");
    let clock = LocalClock::reading(77_000);
    let mut plane = drone(&cluster, &identity, &clock).await;
    let answer = connect(&cluster, "k").await;
    let first = plane.next_spawn(SOON).await.unwrap();
    assert!(matches!(plane.next_spawn(NOT_COMING).await, Err(SimError::Timeout(_))), "once in a session");
    let held = cluster.key("k").await.expect("held");
    drop(plane);
    let mut plane = drone(&cluster, &identity, &clock).await;
    let second = plane.next_spawn(SOON).await.unwrap();
    assert_eq!((&second.action_id, &second.key), (&first.action_id, &first.key), "unchanged");
    plane.report_and_wait(&answer.backend_id, None, exited(), SOON).await.unwrap();
    let still = cluster.key("k").await.expect("still held");
    assert_eq!((still.token, still.expires_at), (held.token, held.expires_at));
    let renewed = plane.renew_one(&answer.backend_id, None, clock.now_ms(), SOON).await.unwrap();
    assert_eq!(renewed.deadlines, None, "it is not renewed");
    let again = connect(&cluster, "k").await;
    let after = cluster.key("k").await.expect("held by the next one");
    assert!(again.spawned && after.acquired_at >= held.expires_at, "{after:?} after {held:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spawn_whose_backend_has_already_ended_is_not_delivered_again_though_its_acknowledgement_was_lost()
{
    let cluster = Cluster::builder().drones(0).lease("renew=20s,soft=25s,hard=30s,expiry=40s").start().await;
    let identity = Identity::new(&cluster.name, "dr-sim", "one");
    let clock = LocalClock::reading(5_000_000);
    let mut sim = drone(&cluster, &identity, &clock).await;
    let answer = connect(&cluster, "k").await;
    let spawn = sim.next_spawn(SOON).await.unwrap();
    // No acknowledgement. The backend starts and ends all the same.
    sim.report_and_wait(&spawn.backend_id, Some(spawn.key.token), exited(), SOON).await.unwrap();
    assert_eq!(cluster.key("k").await, None, "terminated frees the key at once");
    drop(sim);

    for url in cluster.urls() {
        // The same process comes back, at each controller in turn: its spawn is over.
        let mut again = SimDrone::connect_any(&[url], &identity, LONG).await.unwrap();
        again.start_heartbeats(clock.clone(), Duration::from_millis(100));
        match again.next_action(NOT_COMING).await {
            Err(SimError::Timeout(_)) => {}
            other => panic!("delivered again: {other:?}"),
        }
    }
    let mut sim = drone(&cluster, &identity, &clock).await;
    let (next, _) = hold(&cluster, &mut sim, "k").await;
    assert!(next.fencing_token > answer.fencing_token);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spawn_is_delivered_until_it_is_acknowledged_and_holds_up_no_other() {
    let cluster = Cluster::builder().drones(0).lease("renew=20s,soft=25s,hard=30s,expiry=40s").start().await;
    let identity = Identity::new(&cluster.name, "dr-sim", "one");
    let clock = LocalClock::reading(5_000_000);
    let sim = drone(&cluster, &identity, &clock).await;
    let lost = connect(&cluster, "lost").await;
    let newer = connect(&cluster, "newer").await;
    // Sent to a session that took nothing of it.
    drop(sim);
    let mut sim = drone(&cluster, &identity, &clock).await;
    let first = sim.next_spawn(SOON).await.unwrap();
    assert_eq!(first.backend_id, lost.backend_id);
    let second = sim.next_spawn(SOON).await.unwrap();
    assert_eq!(second.backend_id, newer.backend_id);
    start_backend(&mut sim, &second).await;
    let again = sim.next_spawn(SOON).await.unwrap();
    assert_eq!((&again.backend_id, &again.action_id), (&lost.backend_id, &first.action_id));
    let later_ms = again.key.deadlines.hard_terminate_at - first.key.deadlines.hard_terminate_at;
    assert!(later_ms.abs() < 1_000, "the deadlines do not move with the delivery: {later_ms} ms");
    start_backend(&mut sim, &again).await;
    sim.forget_received();
    assert!(matches!(sim.next_action(NOT_COMING).await, Err(SimError::Timeout(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spawn_that_arrives_after_its_deadline_is_refused_by_the_drone_and_its_key_revoked() {
    // Well below the three seconds after which a drone gives up a silent session, and what has come with it unread.
    const SOFT: Duration = Duration::from_secs(2);
    let cluster = Cluster::builder().lease("renew=1500ms,soft=2s,hard=3s,expiry=20s").start().await;
    let backend = cluster.backend();
    let mut impatient = backend.request("late");
    impatient.wait_ms = Some(1);
    // Stopped right after a heartbeat, if we are lucky: otherwise there is no drone to choose, and we try again.
    let stop = async || {
        cluster.wait_drone(0).await;
        cluster.drones[0].signal(Signal::SIGSTOP);
        let stopped = Instant::now();
        let answer = cluster.http.connect(&cluster.url(cluster.leader().await), &impatient).await;
        if answer.status.is_success() {
            return Ok((stopped, answer.ok::<holdfast_wire::http::ConnectResponse>()));
        }
        cluster.drones[0].signal(Signal::SIGCONT);
        answer.refused(ApiErrorKind::NoDroneAvailable);
        Err(answer)
    };
    let (stopped, answer) = wait_until("a spawn is on its way to a stopped drone", LONG, stop).await;
    assert!(answer.spawned, "{answer:?}");
    let held = cluster.key("late").await.expect("held");
    tokio::time::sleep((SOFT + Duration::from_millis(300)).saturating_sub(stopped.elapsed())).await;
    assert_eq!(cluster.key("late").await.map(|key| key.token), Some(answer.fencing_token), "not expired yet");
    cluster.drones[0].signal(Signal::SIGCONT);

    let ended = cluster.wait_status(&answer.backend_id, BackendStatus::Terminated).await;
    assert_eq!(ended.termination_reason, Some(TerminationReason::KeyExpired), "{ended:?}");
    assert_eq!(cluster.key("late").await, None, "the refusal revokes the key");
    let now = cluster.info().await.cluster_time;
    assert!(now < held.expires_at, "it must not have been the expiry that freed it: {now}, {held:?}");
    cluster.wait_drone(0).await;
    let next = cluster.connect_ready("late").await;
    assert!(next.spawned && next.fencing_token > answer.fencing_token, "{next:?} after {answer:?}");
    let starts = cluster.journal.of_key("late");
    assert!(starts.iter().all(|event| event.backend == next.backend_id), "the late one ran: {starts:#?}");
    assert_eq!(cluster.journal.kinds("late"), [EventKind::Start]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drone_of_planes_which_knows_neither_incarnations_nor_tokens_is_served() {
    let cluster = Cluster::builder().drones(0).lease("renew=2s,soft=4s,hard=5s,expiry=7s").start().await;
    let identity = Identity::of_plane(&cluster.name, "dr-plane");
    let clock = LocalClock::reading(77_000);
    let mut plane = drone(&cluster, &identity, &clock).await;
    let answer = connect(&cluster, "k").await;
    let spawn = plane.next_spawn(SOON).await.unwrap();
    plane.ack(&spawn.action_id).await.unwrap();
    for state in [BackendState::Loading, BackendState::Starting] {
        plane.report_and_wait(&spawn.backend_id, None, state, SOON).await.unwrap();
    }
    let before = cluster.key("k").await.unwrap();

    let asked_at = clock.now_ms();
    let renewed = plane.renew_one(&spawn.backend_id, None, asked_at, SOON).await.unwrap();
    let deadlines = renewed.deadlines.expect("renewed");
    assert_eq!(
        (deadlines.renew_at, deadlines.soft_terminate_at, deadlines.hard_terminate_at),
        (asked_at + 2_000, asked_at + 4_000, asked_at + 5_000),
        "counted from the request's own time"
    );
    let after = cluster.key("k").await.unwrap();
    assert!(after.expires_at > before.expires_at, "{after:?} after {before:?}");
    assert_eq!(after.token, answer.fencing_token, "renewal keeps the token");

    // Without an incarnation each session counts as a new process; its backends are its own all the same.
    drop(plane);
    let mut plane = drone(&cluster, &identity, &clock).await;
    let renewed = plane.renew_one(&spawn.backend_id, None, clock.now_ms(), SOON).await.unwrap();
    assert!(renewed.deadlines.is_some(), "{renewed:?}");
    let unknown = plane.renew_one("ba-nobody", None, clock.now_ms(), SOON).await.unwrap();
    assert_eq!(unknown.deadlines, None);
    // It knows no `refused`, so it is told to end the backend.
    let end = plane.next_action(SOON).await.unwrap();
    assert_eq!(end.backend_id, "ba-nobody");

    plane.report_and_wait(&spawn.backend_id, None, exited(), SOON).await.unwrap();
    assert_eq!(cluster.key("k").await, None);
    let renewed = plane.renew_one(&spawn.backend_id, None, clock.now_ms(), SOON).await.unwrap();
    assert_eq!(renewed.deadlines, None, "no resurrection");
    assert_eq!(cluster.key("k").await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_needs_the_right_drone_backend_and_token() {
    let cluster = Cluster::builder().drones(0).lease("renew=20s,soft=25s,hard=30s,expiry=40s").start().await;
    let clock = LocalClock::reading(0);
    let mut holder = drone(&cluster, &Identity::new(&cluster.name, "dr-a", "a"), &clock).await;
    let (answer, key) = hold(&cluster, &mut holder, "k").await;
    let held = cluster.key("k").await.unwrap();
    holder.stop_heartbeats();
    let mut other = drone(&cluster, &Identity::new(&cluster.name, "dr-b", "b"), &clock).await;

    let right = [(answer.backend_id.clone(), key.token)];
    let wrong_token = [(answer.backend_id.clone(), key.token + 1)];
    for (drone, keys) in [(&mut other, &right), (&mut holder, &wrong_token)] {
        let answer = drone.renew_many(keys, clock.now_ms(), SOON).await.unwrap();
        assert_eq!(answer.keys.len(), 1);
        assert_eq!(answer.keys[0].refused, Some(RenewRefusal::NotHolder), "{answer:?}");
    }
    assert_eq!(cluster.key("k").await.unwrap().expires_at, held.expires_at, "nothing changed");
    // A report of somebody else's backend frees nothing.
    other.report_and_wait(&answer.backend_id, None, exited(), SOON).await.unwrap();
    holder.report_and_wait(&answer.backend_id, Some(key.token + 1), exited(), SOON).await.unwrap();
    assert_eq!(cluster.key("k").await.unwrap().token, key.token);
    let granted = holder.renew_many(&right, clock.now_ms(), SOON).await.unwrap();
    assert!(granted.keys[0].deadlines.is_some(), "{granted:?}");
    assert!(cluster.key("k").await.unwrap().expires_at > held.expires_at);
    // A connect finds it as ever.
    let found = patient(&cluster).connect(&request(&cluster, "k")).await.unwrap();
    assert_eq!((found.spawned, found.fencing_token), (false, key.token));
}
