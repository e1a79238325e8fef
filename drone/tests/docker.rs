//! A real drone that runs containers on this machine's engine, and a controller that the test plays.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;
mod docker_support;

use common::*;
use docker_support::*;
use holdfast_wire::drone::{Action, MessageFromDrone};
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};
use serde_json::{Value, json};
use std::time::Instant;

fn terminate(kind: TerminationKind) -> Action {
    Action::Terminate { kind, reason: TerminationReason::External }
}

#[tokio::test]
async fn a_container_from_spawn_to_terminated() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-whole-life";
    let env = json!({"ON_TERM": "3", "PORT": "1", "SESSION_BACKEND_ID": "mine", "MINE": "yes"});
    let address = waiting(&mut conn, backend, ground.executable(env, json!({}))).await;
    assert_eq!(conn.expect(backend, BackendStatus::Ready).await.address(), Some(address));
    let env = page(address).await;
    for expected in [
        "PORT=8080".to_owned(),
        format!("SESSION_BACKEND_ID={backend}"),
        "SESSION_BACKEND_KEY=room".to_owned(),
        format!("SESSION_BACKEND_FENCING_TOKEN={TOKEN}"),
        "MINE=yes".to_owned(),
    ] {
        assert!(env.lines().any(|line| line == expected), "{expected} in {env}");
    }
    let inspected = ground.inspect(backend);
    let labels = &inspected["Config"]["Labels"];
    for (label, value) in [
        ("io.holdfast.cluster", ground.cluster.as_str()),
        ("io.holdfast.drone", "dr-test"),
        ("io.holdfast.backend", backend),
        ("io.holdfast.key.name", "room"),
        ("io.holdfast.key.namespace", ""),
        ("io.holdfast.token", "42"),
    ] {
        assert_eq!(labels[label], value, "{label}");
    }
    assert_eq!(inspected["HostConfig"]["RestartPolicy"]["Name"], "no");
    let binding = &inspected["HostConfig"]["PortBindings"]["8080/tcp"][0];
    assert_eq!(binding["HostIp"], "127.0.0.1", "no other address is open");

    // So that it has used some CPU between the two measurements.
    let visitor = tokio::spawn(async move {
        loop {
            page(address).await;
        }
    });
    let metrics = conn
        .until("metrics", |message| match message {
            MessageFromDrone::BackendMetrics(metrics) => Some(metrics),
            _ => None,
        })
        .await;
    assert_eq!(metrics["backend_id"], backend);
    for figure in ["mem_used", "mem_total", "mem_active", "mem_limit", "cpu_used", "sys_cpu"] {
        assert!(metrics[figure].as_u64().is_some_and(|n| n > 0), "{figure} in {metrics}");
    }

    visitor.abort();

    conn.act("end", backend, terminate(TerminationKind::Soft));
    conn.expect(backend, BackendStatus::Terminating).await;
    let ended = conn.expect(backend, BackendStatus::Terminated).await;
    let expected = BackendState::Terminated {
        last_status: BackendStatus::Ready,
        termination: Some(TerminationKind::Soft),
        reason: Some(TerminationReason::External),
        exit_code: Some(3),
    };
    assert_eq!(ended, expected);
    assert_eq!(alive(backend), 0);
    // It is kept for its output, and nobody can start it again.
    assert!(ground.docker(&["logs", &ground.container(backend)]).contains("listens"));
    assert!(!ground.docker_can(&["start", &ground.container(backend)]));
}

#[tokio::test]
async fn the_exit_code_passes_through() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    waiting(&mut conn, "ba-ends", ground.executable(json!({"EXIT_CODE": "7"}), json!({}))).await;
    let ended = conn.expect("ba-ends", BackendStatus::Terminated).await;
    let last_status = BackendStatus::Waiting;
    let expected =
        BackendState::Terminated { last_status, termination: None, reason: None, exit_code: Some(7) };
    assert_eq!(ended, expected);
}

#[tokio::test]
async fn a_container_that_ignores_sigterm_is_killed_when_grace_is_over() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-stubborn";
    ready(&mut conn, backend, ground.executable(json!({"ON_TERM": "ignore"}), json!({}))).await;
    conn.act("end", backend, terminate(TerminationKind::Soft));
    conn.expect(backend, BackendStatus::Terminating).await;
    // Grace is cut short by the hard deadline, at least so far away: renewals come every second.
    let begun = Instant::now();
    conn.expect(backend, BackendStatus::HardTerminating).await;
    assert!(begun.elapsed().as_millis() > 4_000, "{:?}", begun.elapsed());
    let ended = conn.expect(backend, BackendStatus::Terminated).await;
    assert!(matches!(ended, BackendState::Terminated { exit_code: None | Some(137), .. }), "{ended:?}");
    assert_eq!(alive(backend), 0);
}

#[tokio::test]
async fn a_hard_end_kills_at_once_also_a_paused_container() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let backend = "ba-paused";
    ready(&mut conn, backend, ground.executable(json!({}), json!({}))).await;
    ground.docker(&["pause", &ground.container(backend)]);
    conn.act("end", backend, terminate(TerminationKind::Hard));
    conn.expect(backend, BackendStatus::HardTerminating).await;
    conn.expect(backend, BackendStatus::Terminated).await;
    assert_eq!(alive(backend), 0);
}

#[tokio::test]
async fn limits_and_network_are_the_engines() {
    let Some(ground) = Ground::new() else { return };
    let network = format!("{}-net", ground.name);
    ground.docker(&["network", "create", &network]);
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let limits = json!({"cpu_period": 50_000, "cpu_period_percent": 150, "cpu_time_limit": 60,
        "memory_limit_bytes": 100_000_000});
    let with = json!({"resource_limits": limits, "network_name": network});
    let address = ready(&mut conn, "ba-limited", ground.executable(json!({}), with)).await;
    assert!(page(address).await.contains("SESSION_BACKEND_ID=ba-limited"));
    let inspected = ground.inspect("ba-limited");
    let host = &inspected["HostConfig"];
    assert_eq!((&host["CpuPeriod"], &host["CpuQuota"]), (&json!(50_000), &json!(75_000)));
    assert_eq!(host["Memory"], 100_000_000);
    assert_eq!(host["Ulimits"], json!([{"Name": "cpu", "Hard": 60, "Soft": 60}]));
    assert!(inspected["NetworkSettings"]["Networks"].get(&network).is_some());
}

#[tokio::test]
async fn what_is_not_possible_is_refused_and_the_field_named() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    std::os::unix::fs::symlink("/etc", ground.mount_base().join("out")).unwrap();
    let missing = format!("{}-missing:1", ground.name);
    for (at, (executable, names)) in [
        (json!({"image": missing, "pull_policy": "Never"}), "executable.image names"),
        // Port 1 of this machine is no registry.
        (json!({"image": "127.0.0.1:1/app:1"}), "cannot pull image 127.0.0.1:1/app:1"),
        (json!({"image": ground.image, "pull_policy": "Maybe"}), "executable.pull_policy"),
        (json!({"image": ground.image, "network_name": "nowhere-at-all"}), "executable.network_name names"),
        (json!({"image": ground.image, "mount": "../x"}), "executable.mount"),
        (json!({"image": ground.image, "mount": "out/ssl"}), "executable.mount leads over"),
        (json!({"image": ground.image, "resource_limits": {"cpu_period": 1}}), "resource_limits.cpu_period"),
        (json!({"image": ground.image, "resource_limits": {"memory_limit_bytes": 1}}), "emory limit"),
        (json!({"command": ["true"]}), "executable.command"),
    ]
    .into_iter()
    .enumerate()
    {
        let backend = format!("ba-refused-{at}");
        spawn(&mut conn, &backend, executable.clone(), key("room", "")).await;
        let ended = conn
            .until("its end", |message| match message {
                MessageFromDrone::BackendEvent(event)
                    if event.state.status() == BackendStatus::Terminated =>
                {
                    assert_eq!(event.backend_id, backend);
                    Some(event.state)
                }
                _ => None,
            })
            .await;
        let reason = Some(TerminationReason::InternalError);
        assert!(matches!(ended, BackendState::Terminated { reason: r, .. } if r == reason), "{ended:?}");
        let log = ground.log();
        let told = log.lines().any(|line| line.contains(&backend) && line.contains(names));
        assert!(told, "{executable}: {names} in {log}");
        assert!(!ground.exists(&backend));
    }
}

#[tokio::test]
async fn each_namespace_has_its_own_directory_for_a_key() {
    let Some(ground) = Ground::new() else { return };
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let mounted = |with: Value| ground.executable(json!({"EXIT_CODE": "0"}), with);
    for (backend, namespace, with, place) in [
        ("ba-a", "a", json!({"mount": true}), "@a/room"),
        ("ba-b", "b", json!({"mount": true}), "@b/room"),
        ("ba-none", "", json!({"mount": true}), "room"),
        ("ba-path", "a", json!({"mount": "x/y"}), "@a/x/y"),
        ("ba-no-mount", "", json!({"mount": false}), "none"),
    ] {
        spawn(&mut conn, backend, mounted(with), key("room", namespace)).await;
        for status in [
            BackendStatus::Loading,
            BackendStatus::Starting,
            BackendStatus::Waiting,
            BackendStatus::Terminated,
        ] {
            conn.expect(backend, status).await;
        }
        let place = ground.mount_base().join(place);
        let marks: Vec<String> = std::fs::read_dir(&place)
            .map(|entries| entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect())
            .unwrap_or_default();
        let expected = if backend == "ba-no-mount" { vec![] } else { vec![format!("started-{backend}")] };
        assert_eq!(marks, expected, "{}", place.display());
    }
}

#[tokio::test]
async fn only_the_drones_own_containers_are_ended_at_its_start() {
    let Some(ground) = Ground::new() else { return };
    let cluster = format!("io.holdfast.cluster={}", ground.cluster);
    let make = |name: &str, labels: &[&str]| {
        let name = format!("{}-{name}", ground.name);
        let mut arguments = vec!["create", "--name", &name];
        for label in labels {
            arguments.extend(["--label", label]);
        }
        arguments.extend(["-e", "SESSION_BACKEND_ID=x", "-e", "PORT=8080", &ground.image]);
        ground.docker(&arguments);
        name
    };
    let backend = "io.holdfast.backend=ba-x";
    let created = make("created", &[&cluster, "io.holdfast.drone=dr-test", backend]);
    let running = make("running", &[&cluster, "io.holdfast.drone=dr-test", backend]);
    let others = make("others", &[&cluster, "io.holdfast.drone=dr-test2", backend]);
    let nobodys = make("nobodys", &[]);
    let elsewhere = make("elsewhere", &["io.holdfast.cluster=other", "io.holdfast.drone=dr-test", backend]);
    for container in [&running, &others, &nobodys] {
        ground.docker(&["start", container]);
    }
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    // Once it is there, that is done.
    fake.conn().await;
    for container in [&created, &running] {
        assert!(!ground.docker_can(&["inspect", container]), "{container} is left");
    }
    for container in [&others, &nobodys, &elsewhere] {
        let state = ground.docker(&["inspect", "-f", "{{.State.Status}}", container]);
        assert_eq!(state, if container == &elsewhere { "created" } else { "running" }, "{container}");
    }
    // And later on.
    let later = make("later", &[&cluster, "io.holdfast.drone=dr-test", backend]);
    ground.docker(&["start", &later]);
    until("it is ended", || !ground.docker_can(&["inspect", &later])).await;
    assert!(ground.docker_can(&["inspect", &others]));
}
