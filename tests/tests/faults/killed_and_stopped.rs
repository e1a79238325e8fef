//! Drones and guards that are killed or stopped, in any order.

use crate::arena::{Arena, signal_guard};
use holdfast_tests::harness::{LONG, boot_ms, wait_until};
use nix::sys::signal::Signal;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_backend_outlives_its_deadline_whatever_of_drone_and_guard_is_killed_in_whatever_order()
{
    let mut arena = Arena::start(3).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    arena.cluster.drones[held.drone].kill9();
    let deadline = arena.hard_deadline(&held).await;
    assert!(deadline.is_some(), "a key outlives its drone");
    arena.taken_over("drone killed; another takes over, then it comes back", &held, deadline, at).await;
    arena.revive(held.drone).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    signal_guard(held.guard(), Signal::SIGKILL);
    // Its death is the backend's.
    arena.taken_over("guard killed", &held, Some(at), at).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    let guard = held.guard();
    arena.cluster.drones[held.drone].kill9();
    signal_guard(guard, Signal::SIGKILL);
    arena.taken_over("drone killed, then the guard", &held, Some(at), at).await;
    arena.revive(held.drone).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    signal_guard(held.guard(), Signal::SIGKILL);
    arena.cluster.drones[held.drone].kill9();
    arena.taken_over("guard killed, then the drone", &held, Some(at), at).await;
    arena.revive(held.drone).await;

    // At the instant of a start.
    let held = arena.settle().await.remove(1);
    arena.client.terminate(&held.backend, holdfast_wire::TerminationKind::Hard).await.unwrap();
    let request = arena.request(&held.key);
    let answer = wait_until("a new acquisition", LONG, async || {
        let answer = arena.client.connect(&request).await.map_err(|e| e.to_string())?;
        if answer.fencing_token > held.token { Ok(answer) } else { Err(format!("{answer:?}")) }
    })
    .await;
    let at = boot_ms();
    let drone: usize = answer.drone.as_deref().unwrap().trim_start_matches("dr-").parse().unwrap();
    arena.cluster.drones[drone].kill9();
    let young = crate::arena::Held {
        key: held.key.clone(),
        backend: answer.backend_id,
        token: answer.fencing_token,
        drone,
    };
    let next = arena.ready(&young.key, young.token).await;
    assert!(next.token > young.token);
    println!("drone killed as it starts a backend: next ready {} ms later", boot_ms() - at);
    arena.checker.assert_clean();
    arena.revive(drone).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    arena.cluster.drones[held.drone].kill9();
    arena.cluster.restart_drone(held.drone);
    arena.cluster.wait_drone(held.drone).await;
    // Ended by the guard, or kept by the new process: in either case one backend.
    wait_until("the key has a ready backend past the old lease", LONG, async || {
        let now = arena.ready(&held.key, 0).await;
        if boot_ms() > at + arena.lease.expiry_ms { Ok(now) } else { Err(now) }
    })
    .await;
    arena.checker.assert_clean();
    arena.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_backend_outlives_its_deadline_when_drone_or_guard_are_stopped() {
    let mut arena = Arena::start(3).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    arena.cluster.drones[held.drone].signal(Signal::SIGSTOP);
    let deadline = arena.hard_deadline(&held).await;
    assert!(deadline.is_some(), "a key outlives its stopped drone");
    arena.taken_over("drone stopped for longer than the lease", &held, deadline, at).await;
    arena.cluster.drones[held.drone].signal(Signal::SIGCONT);
    arena.cluster.wait_drone(held.drone).await;
    let all = arena.settle().await;
    arena.undisturbed("… and continued: what others hold stays theirs", &all).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    signal_guard(held.guard(), Signal::SIGSTOP);
    arena.cluster.drones[held.drone].kill9();
    let deadline = arena.hard_deadline(&held).await;
    arena.taken_over("guard stopped, drone killed", &held, deadline, at).await;
    arena.revive(held.drone).await;

    // The drone goes on renewing, but its guard can't hear of it.
    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    let guard = held.guard();
    signal_guard(guard, Signal::SIGSTOP);
    let deadline = at + arena.lease.hard_terminate_ms;
    let last_ms = arena.checker.processes.gone(&held.backend, LONG).await;
    signal_guard(guard, Signal::SIGCONT);
    assert!(last_ms <= deadline + 1_000, "{last_ms} is late for {deadline}");
    arena.taken_over("guard stopped alone, continued after the deadline", &held, Some(deadline), at).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    let guard = held.guard();
    arena.cluster.drones[held.drone].signal(Signal::SIGSTOP);
    signal_guard(guard, Signal::SIGSTOP);
    let deadline = arena.hard_deadline(&held).await;
    arena.taken_over("drone and guard stopped", &held, deadline, at).await;
    signal_guard(guard, Signal::SIGCONT);
    arena.cluster.drones[held.drone].signal(Signal::SIGCONT);
    arena.cluster.wait_drone(held.drone).await;
    arena.settle().await;
    arena.finish();
}
