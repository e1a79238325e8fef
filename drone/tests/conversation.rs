//! A real drone, its guards and backends, and a controller that the test plays: what is said on the socket.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::*;
use holdfast_drone::open_files::{OpenFiles, WANTED};
use holdfast_drone::processes;
use holdfast_wire::drone::{
    Action, MessageFromDrone, MessageToDrone, RenewKeysResponse, RenewRefusal, RenewedKey,
};
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const FOREVER: &str = "exec sleep 300";
/// Ends within 20 ms of SIGTERM.
const GRACEFUL: &str = "trap 'exit 3' TERM; echo up; while :; do sleep 0.02; done";
const STUBBORN: &str = "trap '' TERM; echo up; while :; do sleep 300; done";

fn terminate(kind: TerminationKind) -> Action {
    Action::Terminate { kind, reason: TerminationReason::External }
}

fn refusal(backend: &str, refused: RenewRefusal) -> MessageToDrone {
    let key = RenewedKey { backend: backend.to_owned(), deadlines: None, refused: Some(refused) };
    MessageToDrone::RenewKeysResponse(RenewKeysResponse { keys: vec![key] })
}

#[tokio::test]
async fn from_handshake_to_terminated() {
    let mut fake = Fake::start(short_lease()).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    assert_eq!(conn.handshake.name, "dr-test");
    assert!(conn.handshake.incarnation.as_ref().is_some_and(|i| i.len() == 32));
    assert_eq!((conn.path_cluster.as_str(), conn.pool.as_str()), ("c.example:1", "p"));
    // A heartbeat first, and then often enough for the lease.
    let MessageFromDrone::Heartbeat(first) = conn.any().await else { panic!("a heartbeat comes first") };
    let second = conn.heartbeat().await;
    assert!(second >= first.local_time && second - first.local_time < 600);

    let backend = "ba-whole-life";
    let script = "env; trap 'exit 3' TERM; echo up; while :; do sleep 0.02; done";
    conn.spawn(backend, script).await;
    let acknowledged = conn
        .until("an acknowledgement", |message| match message {
            MessageFromDrone::AckAction { action_id } => Some(action_id),
            MessageFromDrone::BackendEvent(event) => panic!("{event:?} before the acknowledgement"),
            _ => None,
        })
        .await;
    assert_eq!(acknowledged, "spawn-ba-whole-life");
    conn.expect(backend, BackendStatus::Loading).await;
    conn.expect(backend, BackendStatus::Starting).await;
    let address = conn.expect(backend, BackendStatus::Waiting).await.address().unwrap();
    drone.wrote(backend, "up\n").await;
    // Not ready before something answers at its port.
    let server = answer_http(address).await;
    assert_eq!(conn.expect(backend, BackendStatus::Ready).await.address(), Some(address));
    server.abort();

    let env = drone.output(backend);
    for expected in [
        format!("PORT={}", address.port()),
        format!("SESSION_BACKEND_ID={backend}"),
        "SESSION_BACKEND_KEY=room".to_owned(),
        format!("SESSION_BACKEND_FENCING_TOKEN={TOKEN}"),
        "SESSION_BACKEND_STATIC_TOKEN=st".to_owned(),
        "MINE=yes".to_owned(),
    ] {
        assert!(env.lines().any(|line| line == expected), "{expected} in {env}");
    }
    assert!(!env.contains("RUST_LOG"), "the drone's own environment is not passed on");

    // Renewed until well past the first hard deadline; a repeated spawn changes nothing.
    let first_hard_at = conn.lease.deadlines(first.local_time).hard_terminate_at;
    loop {
        let renewal = conn.renewal().await;
        assert_eq!((renewal.keys[0].backend.as_str(), renewal.keys[0].token), (backend, TOKEN));
        if renewal.local_time > first_hard_at + 500 {
            break;
        }
    }
    conn.act("again", backend, conn.spawn_action(script, conn.latest_heartbeat));
    conn.until("an acknowledgement", |message| match message {
        MessageFromDrone::AckAction { action_id } if action_id == "again" => Some(()),
        MessageFromDrone::BackendEvent(event) => panic!("{event:?}"),
        _ => None,
    })
    .await;

    conn.act("end", backend, terminate(TerminationKind::Soft));
    let (last_status, reason) = (BackendStatus::Ready, TerminationReason::External);
    assert_eq!(
        conn.expect(backend, BackendStatus::Terminating).await,
        BackendState::Terminating { last_status, termination: TerminationKind::Soft, reason }
    );
    let termination = Some(TerminationKind::Soft);
    assert_eq!(
        conn.expect(backend, BackendStatus::Terminated).await,
        BackendState::Terminated { last_status, termination, reason: Some(reason), exit_code: Some(3) }
    );
    assert_eq!(alive(backend), 0);
}

#[tokio::test]
async fn events_are_repeated_until_acknowledged_also_over_a_new_session() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.acknowledge = false;
    conn.spawn("ba-repeat", FOREVER).await;
    let mut sent = Vec::new();
    for status in [BackendStatus::Loading, BackendStatus::Starting, BackendStatus::Waiting] {
        let event = conn.event().await;
        assert_eq!(event.state.status(), status);
        sent.push(event);
    }
    // Nothing is acknowledged: all again, in order, the same.
    for event in &sent {
        assert_eq!(conn.event().await, *event);
    }
    // The second is: then only the others over a new session.
    conn.send(MessageToDrone::AckEvent { event_id: sent[1].event_id });
    conn.send_raw("not json");
    conn.send_raw(r#"{"FromTheFuture":{}}"#);
    conn.act("marker", "ba-unknown", terminate(TerminationKind::Soft));
    conn.until("the marker", |message| {
        matches!(message, MessageFromDrone::AckAction { action_id } if action_id == "marker").then_some(())
    })
    .await;
    let incarnation = conn.handshake.incarnation.clone();
    conn.drop_it();
    let mut conn = fake.conn().await;
    assert_eq!(conn.handshake.incarnation, incarnation, "one for each process, not for each session");
    assert_eq!(conn.event().await, sent[0]);
    assert_eq!(conn.event().await, sent[2]);
}

#[tokio::test]
async fn a_spawn_that_comes_too_late_or_from_another_time_is_not_started() {
    let mut fake = Fake::start(lease(100, 300, 10_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let now = conn.heartbeat().await;
    let hour_ms = 3_600_000;
    let script = format!("touch {}/started", dir.path().display());
    // Of a process whose clock was ahead; of ones that ended before this one started. They may have started it, and
    // their guards may run it still: nothing is reported, or its key would be free.
    for (backend, local_time) in
        [("ba-future", now + hour_ms), ("ba-past", now - 30_000), ("ba-old", now - hour_ms)]
    {
        conn.act(backend, backend, conn.spawn_action(&script, local_time));
        conn.until("an acknowledgement", |message| match message {
            MessageFromDrone::AckAction { action_id } if action_id == backend => Some(()),
            MessageFromDrone::BackendEvent(event) => panic!("{event:?}"),
            _ => None,
        })
        .await;
    }
    // Past the soft deadline of its own time: reported. (So nothing was reported for the others before.)
    while conn.heartbeat().await < now + 300 {}
    conn.act("a", "ba-late", conn.spawn_action(&script, now));
    assert_eq!(
        conn.expect("ba-late", BackendStatus::Terminated).await,
        BackendState::Terminated {
            last_status: BackendStatus::Scheduled,
            termination: None,
            reason: Some(TerminationReason::KeyExpired),
            exit_code: None,
        }
    );
    assert!(!dir.path().join("started").exists());
}

#[tokio::test]
async fn what_cannot_be_run_is_terminated_with_a_reason() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let now = conn.heartbeat().await;
    for (backend, executable) in [
        ("ba-container", serde_json::json!({"image": "x"})),
        ("ba-nothing", serde_json::json!({})),
        ("ba-missing", serde_json::json!({"command": ["/nonexistent"]})),
        ("../escape", serde_json::json!({"command": ["true"]})),
    ] {
        let Action::Spawn { key, .. } = conn.spawn_action("", now) else { unreachable!() };
        conn.act("a", backend, Action::Spawn { executable, key, static_token: None, incarnation: None });
        let terminated = loop {
            let event = conn.event().await;
            assert_eq!(event.backend_id, backend);
            if let BackendState::Terminated { termination, reason, .. } = event.state {
                break (termination, reason);
            }
        };
        assert_eq!(terminated, (None, Some(TerminationReason::InternalError)), "{backend}");
    }
}

#[tokio::test]
async fn a_backend_that_is_not_the_holder_is_killed_at_once() {
    let mut fake = Fake::start(short_lease()).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-not-holder", STUBBORN).await;
    drone.wrote("ba-not-holder", "up").await;
    conn.renew = false;
    let asked = conn.renewal().await;
    conn.send(refusal("ba-not-holder", RenewRefusal::NotHolder));
    conn.expect("ba-not-holder", BackendStatus::HardTerminating).await;
    let event = conn.event().await;
    assert_eq!(event.state.status(), BackendStatus::Terminated);
    assert_eq!(alive("ba-not-holder"), 0);
    assert!(event.timestamp < conn.lease.deadlines(asked.local_time).renew_at + 1_500);
}

#[tokio::test]
async fn a_backend_whose_renewal_is_prevented_ends_on_the_timeline() {
    let mut fake = Fake::start(short_lease()).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-prevented", STUBBORN).await;
    drone.wrote("ba-prevented", "up").await;
    let granted = conn.renewal().await.local_time;
    conn.renew = false;
    conn.renewal().await;
    conn.send(refusal("ba-prevented", RenewRefusal::RenewalPrevented));
    let deadlines = conn.lease.deadlines(granted);
    // Requests that were on the way when the refusal came may follow; then none.
    let soft = conn.event().await;
    assert!(matches!(
        soft.state,
        BackendState::Terminating {
            reason: TerminationReason::KeyExpired,
            last_status: BackendStatus::Waiting,
            ..
        }
    ));
    assert!(soft.timestamp >= deadlines.soft_terminate_at && soft.timestamp < deadlines.hard_terminate_at);
    let hard = conn.event().await;
    assert_eq!(hard.state.status(), BackendStatus::HardTerminating);
    assert!(hard.timestamp >= deadlines.hard_terminate_at);
    let over = conn.event().await;
    assert!(matches!(
        over.state,
        BackendState::Terminated {
            termination: Some(TerminationKind::Hard),
            reason: Some(TerminationReason::KeyExpired),
            ..
        }
    ));
    assert!(over.timestamp < deadlines.hard_terminate_at + 1_500);
    assert_eq!(alive("ba-prevented"), 0);
}

#[tokio::test]
async fn an_unanswered_renewal_is_repeated_and_asked_again_over_a_new_session() {
    let mut fake = Fake::start(short_lease()).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.renew = false;
    conn.waiting("ba-renewed", GRACEFUL).await;
    let first = conn.renewal().await;
    let repeated = conn.renewal().await;
    assert_eq!(first.keys, repeated.keys);
    assert!(repeated.local_time > first.local_time);
    conn.drop_it();
    let mut conn = fake.conn().await;
    conn.renew = false;
    let again = conn.renewal().await;
    assert!(again.local_time > repeated.local_time);
    conn.grant(&again);
    // It counted: the next one comes when it is due.
    let next = conn.renewal().await;
    let renew_at = conn.lease.deadlines(again.local_time).renew_at;
    assert!(next.local_time >= renew_at - 20, "{} before {renew_at}", next.local_time);
}

#[tokio::test]
async fn without_a_controller_and_without_a_drone_a_backend_ends_at_its_deadlines() {
    let mut fake = Fake::start(lease(500, 1_500, 2_500)).await;
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let backend = "ba-orphan";
    conn.renew = false;
    conn.waiting(backend, "trap '' TERM; setsid sleep 300 & echo up; while :; do sleep 300; done").await;
    drone.wrote(backend, "up").await;
    soon("all of it runs", async {
        while alive(backend) < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let heard = Instant::now();
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
    // The drone's death alone does not end it.
    populated(backend, 3).await;
    // By this a later drone knows that the directory is in use.
    let guard_log = std::fs::File::open(dir.path().join("backends").join(backend).join("guard.log")).unwrap();
    assert!(guard_log.try_lock().is_err());
    vanished(backend).await;
    soon("the guard ends", async {
        while guard_log.try_lock().is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(heard.elapsed() < Duration::from_millis(2_500 + 1_500));
    // Its data directory is free for the next one.
    let _next = Drone::start(&fake.url, dir.path());
    let again = fake.conn().await;
    assert_ne!(again.handshake.incarnation, conn.handshake.incarnation);
}

#[tokio::test]
async fn a_stopping_drone_ends_and_reports_its_backends_and_exits_with_0() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-stop", GRACEFUL).await;
    drone.wrote("ba-stop", "up").await;
    drone.signal(Signal::SIGTERM);
    conn.expect("ba-stop", BackendStatus::Terminating).await;
    let terminated = conn.expect("ba-stop", BackendStatus::Terminated).await;
    assert!(matches!(
        terminated,
        BackendState::Terminated { reason: Some(TerminationReason::Swept), exit_code: Some(3), .. }
    ));
    assert_eq!(drone.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_stopping_drone_does_not_report_a_running_backend_as_ended_when_its_spawn_is_repeated() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let backend = "ba-repeated";
    conn.waiting(backend, STUBBORN).await;
    drone.wrote(backend, "up").await;
    drone.signal(Signal::SIGTERM);
    conn.expect(backend, BackendStatus::Terminating).await;
    // All events so far are acknowledged by then.
    conn.heartbeat().await;
    for (action_id, script) in [("the same", STUBBORN), ("no program", "")] {
        let mut spawn = conn.spawn_action(script, conn.latest_heartbeat);
        if let (Action::Spawn { executable, .. }, true) = (&mut spawn, script.is_empty()) {
            *executable = serde_json::json!({});
        }
        conn.act(action_id, backend, spawn);
        conn.until("an acknowledgement", |message| match message {
            MessageFromDrone::AckAction { action_id: id } if id == action_id => Some(()),
            MessageFromDrone::BackendEvent(event) => panic!("{event:?}"),
            _ => None,
        })
        .await;
    }
    // What it has not started is refused, and reported.
    conn.act("new", "ba-new", conn.spawn_action(FOREVER, conn.latest_heartbeat));
    let refused = conn.expect("ba-new", BackendStatus::Terminated).await;
    assert!(matches!(refused, BackendState::Terminated { reason: Some(TerminationReason::Swept), .. }));
    assert!(alive(backend) > 0);
    drone.signal(Signal::SIGTERM);
    conn.expect(backend, BackendStatus::HardTerminating).await;
    conn.expect(backend, BackendStatus::Terminated).await;
    assert_eq!(drone.ended().await.code(), Some(0));
    assert_eq!(alive(backend), 0);
}

#[tokio::test]
async fn a_second_signal_kills() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-stop-twice", STUBBORN).await;
    drone.wrote("ba-stop-twice", "up").await;
    drone.signal(Signal::SIGINT);
    conn.expect("ba-stop-twice", BackendStatus::Terminating).await;
    drone.signal(Signal::SIGINT);
    conn.expect("ba-stop-twice", BackendStatus::HardTerminating).await;
    conn.expect("ba-stop-twice", BackendStatus::Terminated).await;
    assert_eq!(drone.ended().await.code(), Some(0));
    assert_eq!(alive("ba-stop-twice"), 0);
}

#[tokio::test]
async fn a_guard_that_is_killed_takes_its_backend_along_and_that_is_reported() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-guardless", "trap '' TERM; setsid sleep 300 & echo up; while :; do sleep 300; done")
        .await;
    drone.wrote("ba-guardless", "up").await;
    let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
    nix::sys::signal::kill(guard, Signal::SIGKILL).unwrap();
    let terminated = conn.expect("ba-guardless", BackendStatus::Terminated).await;
    assert!(matches!(
        terminated,
        BackendState::Terminated { termination: None, reason: Some(TerminationReason::InternalError), .. }
    ));
    assert_eq!(alive("ba-guardless"), 0);
}

#[tokio::test]
async fn a_guard_that_is_killed_before_it_has_reported_the_start_leaves_nothing_either() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let backend = "ba-unreported";
    // Not in the data directory, which backends do not see.
    let programs = tempfile::tempdir().unwrap();
    let program = programs.path().join("program");
    // The guard waits for the exec.
    let _leased = leased_program(&program);
    let now = conn.heartbeat().await;
    let Action::Spawn { key, .. } = conn.spawn_action("", now) else { unreachable!() };
    let executable = serde_json::json!({"command": [program]});
    conn.act("a", backend, Action::Spawn { executable, key, static_token: None, incarnation: None });
    conn.expect(backend, BackendStatus::Loading).await;
    conn.expect(backend, BackendStatus::Starting).await;
    let guard = soon("the guard has forked init and backend", async {
        loop {
            if let [guard] = drone.guards()[..]
                && processes::all().unwrap().iter().filter(|p| p.parent == guard.as_raw()).count() == 2
            {
                return guard;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    nix::sys::signal::kill(guard, Signal::SIGKILL).unwrap();
    let terminated = conn.expect(backend, BackendStatus::Terminated).await;
    assert!(matches!(
        terminated,
        BackendState::Terminated { termination: None, reason: Some(TerminationReason::InternalError), .. }
    ));
    assert_eq!(drone.guards(), [], "no zombies are left either");
}

/// Whether this process has `CAP_SYS_RESOURCE`, and so its children.
fn may_raise_limits() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    u64::from_str_radix(effective, 16).unwrap() & (1 << 24) != 0
}

#[tokio::test]
async fn the_drone_takes_all_open_files_it_may_have_and_its_backends_what_it_was_given() {
    use std::os::unix::process::CommandExt;
    const SOFT: u64 = 256;
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let given = OpenFiles { soft: SOFT, hard: 4_096 };
    let mut command = Drone::command(&fake.url, dir.path());
    // SAFETY: async-signal-safe.
    unsafe { command.pre_exec(move || given.apply()) };
    let drone = Drone { process: command.spawn().unwrap(), data_dir: dir.path().to_owned() };
    let mut conn = fake.conn().await;
    conn.waiting("ba-files", "echo soft=$(ulimit -Sn).; exec sleep 300").await;
    drone.wrote("ba-files", &format!("soft={SOFT}.\n")).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", drone.process.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    // With the right to do so it raises even that, to what 20,000 backends need.
    let hard = if may_raise_limits() { given.hard.max(WANTED) } else { given.hard }.to_string();
    assert_eq!(line.split_ascii_whitespace().skip(3).take(2).collect::<Vec<_>>(), [&hard, &hard]);
}

#[tokio::test]
async fn a_drone_whose_name_is_taken_tries_again() {
    let mut fake = Fake::start(short_lease()).await;
    fake.set(|setting| setting.refuse_with = Some(holdfast_wire::drone::CLOSE_NAME_TAKEN));
    let dir = tempfile::tempdir().unwrap();
    let mut drone = Drone::start(&fake.url, dir.path());
    fake.refusals(2).await;
    assert!(drone.process.try_wait().unwrap().is_none(), "it does not give up");
    fake.set(|setting| setting.refuse_with = None);
    fake.conn().await;
}

#[tokio::test]
async fn another_cluster_ends_the_backends_of_the_old_one_first() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-old", STUBBORN).await;
    drone.wrote("ba-old", "up").await;
    fake.set(|setting| setting.cluster_id = "cluster-2".to_owned());
    conn.drop_it();
    let mut conn = fake.conn().await;
    let now = conn.heartbeat().await;
    // As a controller does: until it is acknowledged.
    let spawn = conn.spawn_action(FOREVER, now);
    let event = soon("the new cluster's backend starts", async {
        loop {
            conn.act("spawn", "ba-new", spawn.clone());
            let message = conn.any().await;
            if let MessageFromDrone::BackendEvent(event) = message
                && event.backend_id == "ba-new"
            {
                return event;
            }
        }
    })
    .await;
    assert_eq!(event.state, BackendState::Loading);
    assert_eq!(alive("ba-old"), 0);
    assert_eq!(std::fs::read_to_string(dir.path().join("cluster_id")).unwrap(), "cluster-2");
}

#[tokio::test]
async fn the_session_follows_the_leader() {
    let (mut a, mut b) = (Fake::start(short_lease()).await, Fake::start(short_lease()).await);
    let (url_a, url_b) = (a.url.clone(), b.url.clone());
    a.set(|setting| setting.leader = Some(url_b.clone()));
    let dir = tempfile::tempdir().unwrap();
    // It knows only the follower, and is sent on.
    let _drone = Drone::start(&a.url, dir.path());
    b.conn().await.heartbeat().await;
    // The leader changes: it moves.
    for fake in [&a, &b] {
        fake.set(|setting| setting.leader = Some(url_a.clone()));
    }
    a.conn().await.heartbeat().await;
}

#[tokio::test]
async fn a_follower_will_do_while_the_leader_cannot_be_reached() {
    let mut fake = Fake::start(short_lease()).await;
    fake.set(|setting| setting.leader = Some("http://127.0.0.1:9".to_owned()));
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    fake.conn().await.heartbeat().await;
}

#[tokio::test]
async fn a_stopped_drone_does_not_keep_its_backends_alive() {
    let mut fake = Fake::start(lease(500, 1_500, 2_500)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-stopped", STUBBORN).await;
    drone.wrote("ba-stopped", "up").await;
    drone.signal(Signal::SIGSTOP);
    vanished("ba-stopped").await;
    drone.signal(Signal::SIGCONT);
    // The old session may be dropped as silent by then.
    let mut states = Vec::new();
    loop {
        let message = tokio::select! {
            message = conn.any_or_never() => message,
            new = fake.conn() => {
                conn = new;
                continue;
            }
        };
        if let MessageFromDrone::BackendEvent(event) = message {
            states.push(event.state.status());
            if let BackendState::Terminated { reason, .. } = event.state {
                assert_eq!(reason, Some(TerminationReason::KeyExpired));
                break;
            }
        }
    }
    assert!(states.contains(&BackendStatus::HardTerminating), "{states:?}");
}

#[tokio::test]
async fn a_backend_that_ended_under_a_stopped_guard_does_not_keep_its_key() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut fake = Fake::start(lease(500, 1_500, 2_500)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let backend = "ba-guard-stopped";
    conn.waiting(backend, STUBBORN).await;
    drone.wrote(backend, "up").await;
    let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
    nix::sys::signal::kill(guard, Signal::SIGSTOP).unwrap();
    // Its key is renewed all the time, but the guard does not hear of it: the namespace's init ends the backend.
    conn.expect(backend, BackendStatus::Terminated).await;
    assert_eq!(alive(backend), 0);
    soon("the key is let go of", async {
        while drone.guards().contains(&guard) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_guard_that_does_not_do_its_work_is_killed() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make PID namespaces");
        return;
    }
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    conn.waiting("ba-stuck-guard", STUBBORN).await;
    drone.wrote("ba-stuck-guard", "up").await;
    let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
    nix::sys::signal::kill(guard, Signal::SIGSTOP).unwrap();
    // Stopped for so long that nothing more can be told to it.
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let pipe = format!("/proc/{guard}/fd/0");
    let mut pipe = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(pipe).unwrap();
    while pipe.write(b"\n").is_ok() {}
    conn.act("end", "ba-stuck-guard", terminate(TerminationKind::Hard));
    conn.expect("ba-stuck-guard", BackendStatus::HardTerminating).await;
    conn.expect("ba-stuck-guard", BackendStatus::Terminated).await;
    assert_eq!(alive("ba-stuck-guard"), 0);
}

#[tokio::test]
async fn without_root_the_drone_ends_what_a_killed_guard_leaves() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_holdfast-drone"));
    let reachable =
        program.ancestors().all(|p| std::fs::metadata(p).is_ok_and(|m| m.permissions().mode() & 0o001 != 0));
    if !nix::unistd::geteuid().is_root() || !reachable {
        eprintln!("skipped: cannot start a drone as another user here");
        return;
    }
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65_534), Some(65_534)).unwrap();
    let process = Drone::command(&fake.url, dir.path()).uid(65_534).gid(65_534).spawn().unwrap();
    let drone = Drone { process, data_dir: dir.path().to_owned() };
    let mut conn = fake.conn().await;
    let backend = "ba-unrooted";
    // One that names the backend, and one whose child names nothing.
    let script = "trap '' TERM; setsid sleep 300 & env -i PATH=$PATH setsid sh -c 'sleep 300 & echo $! >&2; wait' & \
                  while :; do sleep 300; done";
    conn.waiting(backend, script).await;
    drone.wrote(backend, "\n").await;
    let nameless: i32 = drone.output(backend).trim().parse().unwrap();
    assert!(processes::one(nameless).unwrap().is_some());
    let [guard] = drone.guards()[..] else { panic!("one guard: {:?}", drone.guards()) };
    nix::sys::signal::kill(guard, Signal::SIGKILL).unwrap();
    conn.expect(backend, BackendStatus::Terminated).await;
    assert_eq!(alive(backend), 0);
    assert!(processes::one(nameless).unwrap().is_none());
    assert_eq!(drone.guards(), [], "no zombies are left either");
}

/// Every step of the lease on a drone whose clock is wrong in this way (of libfaketime).
async fn lives_and_ends_by_a_wrong_clock(backend: &str, shift: &str) {
    let library = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"]
        .map(|dir| format!("{dir}/faketime/libfaketime.so.1"))
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    let Some(library) = library else {
        eprintln!("skipped: libfaketime is not installed");
        return;
    };
    let mut fake = Fake::start(short_lease()).await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = Drone::command(&fake.url, dir.path());
    let process = command.env("LD_PRELOAD", &library).env("FAKETIME", shift).spawn().unwrap();
    let mut drone = Drone { process, data_dir: dir.path().to_owned() };
    let mut conn = fake.conn().await;
    let (local, real) = (conn.heartbeat().await, holdfast_drone::clock::DroneClock::start().now_ms());
    assert!((local - real).abs() > 300 * 86_400_000, "the wrong clock is in force");
    conn.waiting(backend, STUBBORN).await;
    drone.wrote(backend, "up").await;
    let hard_at = conn.lease.deadlines(local).hard_terminate_at;
    while conn.renewal().await.local_time < hard_at + 500 {}
    populated(backend, 1).await;
    // Without the drone it ends by the guard, whose clock is the same.
    let cut = Instant::now();
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
    vanished(backend).await;
    let lived = cut.elapsed();
    assert!(
        lived > Duration::from_millis(2_000) && lived < Duration::from_millis(4_000 + 1_500),
        "{lived:?}"
    );
}

#[tokio::test]
async fn a_clock_years_ahead_neither_ends_a_backend_nor_keeps_it() {
    lives_and_ends_by_a_wrong_clock("ba-ahead", "+3y").await;
}

#[tokio::test]
async fn a_clock_a_year_behind_neither_ends_a_backend_nor_keeps_it() {
    lives_and_ends_by_a_wrong_clock("ba-behind", "-400d").await;
}

#[tokio::test]
async fn a_clock_that_runs_fast_neither_ends_a_backend_nor_keeps_it() {
    lives_and_ends_by_a_wrong_clock("ba-fast", "+2y x1.04").await;
}

#[tokio::test]
async fn many_backends_are_renewed_in_few_messages() {
    const BACKENDS: usize = 50;
    let mut fake = Fake::start(lease(5_000, 15_000, 20_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let _drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let now = conn.heartbeat().await;
    for n in 0..BACKENDS {
        conn.act(&format!("a{n}"), &format!("ba-many-{n}"), conn.spawn_action(FOREVER, now));
    }
    let mut addresses = std::collections::HashSet::new();
    while addresses.len() < BACKENDS {
        if let Some(address) = conn.event().await.state.address() {
            addresses.insert(address);
        }
    }
    // All were acquired at the same moment, so all are due together.
    assert_eq!(conn.renewal().await.keys.len(), BACKENDS);
    for n in 0..BACKENDS {
        conn.act(&format!("t{n}"), &format!("ba-many-{n}"), terminate(TerminationKind::Hard));
    }
    let mut over = 0;
    while over < BACKENDS {
        let event = conn.event().await;
        if event.state.status() == BackendStatus::Terminated {
            assert_eq!(alive(&event.backend_id), 0);
            over += 1;
        }
    }
}

#[test]
fn wrong_use_exits_with_2_and_names_the_flag() {
    let dir = tempfile::tempdir().unwrap();
    for (extra, flag) in [
        (["--runtime", "podman"], "--runtime"),
        (["--mount-base", "/nowhere/at/all"], "--mount-base"),
        (["--name", "a"], "--name"),
        (["--ip", "nowhere"], "--ip"),
        (["--cluster", "a b"], "--cluster"),
        (["--data-dir", "/proc/nowhere"], "--data-dir"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_holdfast-drone"));
        let mut flags = vec!["--name", "dr-a", "--controller", "http://h:1", "--cluster", "c", "--data-dir"];
        let path = dir.path().to_str().unwrap().to_owned();
        flags.push(&path);
        if flag == "--mount-base" {
            flags.extend(["--runtime", "docker"]);
        }
        match flags.iter().position(|f| *f == extra[0]) {
            Some(at) => flags[at + 1] = extra[1],
            None => flags.extend(extra),
        }
        let output = command.args(&flags).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(flag), "{flag} in {message}");
    }
}
