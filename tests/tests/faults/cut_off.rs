//! Drones that are cut off, and leaders that are gone.

use crate::arena::{Arena, CALM, CALMER};
use holdfast_tests::harness::{Cluster, LONG, boot_ms, wait_until};
use nix::sys::signal::Signal;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_backend_outlives_its_deadline_when_its_drone_is_cut_off() {
    let mut arena = Arena::start(3).await;

    for silent in [false, true] {
        let held = arena.settle().await.remove(0);
        let at = boot_ms();
        let links = &arena.cluster.links[held.drone];
        if silent {
            links.silence()
        } else {
            links.cut()
        }
        let deadline = arena.hard_deadline(&held).await;
        assert!(deadline.is_some(), "a key outlives the cut");
        let fault = if silent { "drone hears only silence" } else { "drone gets its connections refused" };
        arena.taken_over(fault, &held, deadline, at).await;
        arena.cluster.links[held.drone].heal();
        arena.cluster.wait_drone(held.drone).await;
    }
    arena.settle().await;
    arena.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_that_die_cost_no_key_and_with_all_controllers_gone_backends_end_in_time() {
    let mut arena = Arena::of(Cluster::builder(), CALM, 3).await;

    let all = arena.settle().await;
    let leader = arena.cluster.leader().await;
    let drone = all[0].drone;
    arena.cluster.links[drone].proxies[leader].cut();
    arena.undisturbed("drone cut off from the leader alone", &all).await;
    arena.cluster.links[drone].heal();

    let all = arena.settle().await;
    let leader = arena.cluster.leader().await;
    arena.cluster.controllers[leader].kill9();
    arena.undisturbed("leader killed", &all).await;
    arena.cluster.restart_controller(leader);
    arena.cluster.wait_controller(leader).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    let leader = arena.cluster.leader().await;
    arena.cluster.controllers[leader].kill9();
    arena.cluster.drones[held.drone].kill9();
    // The outage lengthens what the controllers allow, not what the guard does.
    let deadline = Some(at + arena.lease.hard_terminate_ms);
    arena.taken_over("leader and drone killed", &held, deadline, at).await;
    arena.cluster.restart_controller(leader);
    arena.cluster.wait_controller(leader).await;
    arena.revive(held.drone).await;

    let held = arena.settle().await.remove(0);
    let at = boot_ms();
    (0..3).for_each(|index| arena.cluster.controllers[index].kill9());
    let deadline = at + arena.lease.hard_terminate_ms;
    let last_ms = arena.checker.processes.gone(&held.backend, LONG).await;
    wait_until("the outage is longer than the lease", LONG, async || {
        if boot_ms() > at + arena.lease.expiry_ms { Ok(()) } else { Err(last_ms) }
    })
    .await;
    for index in 0..3 {
        arena.cluster.restart_controller(index);
    }
    arena.taken_over("all controllers killed for longer than the lease", &held, Some(deadline), at).await;
    arena.settle().await;
    arena.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_stopped_for_longer_than_the_lease_costs_no_key_and_wakes_as_nobody() {
    let mut arena = Arena::of(Cluster::builder(), CALMER, 3).await;
    let all = arena.settle().await;
    let leader = arena.cluster.leader().await;
    arena.cluster.controllers[leader].signal(Signal::SIGSTOP);
    arena.cluster.leader_other_than(leader).await;
    arena.undisturbed("leader stopped for longer than the lease", &all).await;
    arena.cluster.controllers[leader].signal(Signal::SIGCONT);
    arena.cluster.wait_controller(leader).await;
    arena.settle().await;
    arena.finish();
}
