//! Drones and leaders whose clocks are set while they run, or run too fast or too slowly.
//!
//! libfaketime (0.9.10) fakes `CLOCK_BOOTTIME` and `CLOCK_MONOTONIC` together with the wall clock unless it is told not to;
//! with a rate all three run at it, in the drone and in its guards alike. Backends are not faked, and neither is the test.

use crate::arena::{Arena, CALM};
use holdfast_tests::harness::{Cluster, LONG, boot_ms, libfaketime, wait_until};
use std::path::Path;

/// What leases allow for, in millionths.
const TOLERANCE_PPM: i64 = 50_000;
/// What a measurement may be off by, in millionths.
const MEASURED_PPM: i64 = 20_000;

/// False, and says so, on a machine without libfaketime.
fn faketime() -> bool {
    if libfaketime().is_none() {
        println!("SKIPPED: libfaketime is not installed");
    }
    libfaketime().is_some()
}

/// A sample of `/metrics` at any controller.
async fn metric(cluster: &Cluster, sample: &str) -> Vec<i64> {
    let mut values = Vec::new();
    for url in cluster.urls() {
        let text = cluster.http.get(&format!("{url}/metrics")).await.text;
        let found = text.lines().find_map(|line| line.strip_prefix(sample)?.trim().parse::<i64>().ok());
        values.extend(found);
    }
    values
}

/// Waits until some controller has measured a drone's clock, and gives the error in millionths.
async fn error_of(cluster: &Cluster, drone: usize) -> i64 {
    let sample = format!("holdfast_drone_clock_rate_error_ppm{{drone=\"dr-{drone}\"}}");
    wait_until(&sample, LONG, async || metric(cluster, &sample).await.first().copied().ok_or("none")).await
}

/// Sets what a faked wall clock shows from now on.
fn set(file: &Path, offset: &str) {
    std::fs::write(file, format!("{offset}\n")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drones_wall_clock_that_is_set_by_hours_and_years_while_it_runs_changes_nothing() {
    if !faketime() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("clock");
    set(&file, "+0");
    let mut arena = Arena::of(Cluster::builder().drone_clock_file(0, &file), CALM, 9).await;
    let all = arena.settle().await;
    assert!(all.iter().any(|held| held.drone == 0), "the drone holds a key: {all:?}");
    for (offset, days) in [("+3600", 0), ("-7200", 0), ("+3650d", 3650), ("-3650d", -3650)] {
        set(&file, offset);
        arena.undisturbed(&format!("drone's wall clock set to {offset}"), &all).await;
        // It did see the other clock: its log is dated by it. A lost session makes a line.
        if days != 0 {
            arena.cluster.links[0].cut();
            let shown = format!("{}-", year(days));
            wait_until(&format!("the log shows {shown}"), LONG, async || {
                if arena.cluster.drones[0].log().contains(&shown) { Ok(()) } else { Err(()) }
            })
            .await;
            arena.cluster.links[0].heal();
            arena.cluster.wait_drone(0).await;
        }
    }
    let held = all.into_iter().find(|held| held.drone == 0).unwrap();
    let at = boot_ms();
    set(&file, "-1000d");
    arena.cluster.links[0].silence();
    set(&file, "+1000d");
    let deadline = arena.hard_deadline(&held).await;
    arena.taken_over("wall clock set to and fro, and cut off", &held, deadline, at).await;
    arena.finish();
}

/// The year that a wall clock moved by some days shows.
fn year(days: i64) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    1970 + now.as_secs().saturating_add_signed(days * 86_400) / 31_556_952
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drones_whose_clocks_run_five_percent_fast_or_slow_keep_their_keys_and_end_in_time_when_cut_off() {
    if !faketime() {
        return;
    }
    let mut arena = Arena::of(Cluster::builder().drone_rate(0, "1.05").drone_rate(1, "0.95"), CALM, 6).await;
    let all = arena.settle().await;
    for drone in [0, 1] {
        assert!(all.iter().any(|held| held.drone == drone), "each drone holds a key: {all:?}");
    }
    arena.undisturbed("drones 5 % fast and slow", &all).await;
    let errors = [error_of(&arena.cluster, 0).await, error_of(&arena.cluster, 1).await];
    println!("measured: {errors:?} ppm");
    assert!(errors[0].abs_diff(TOLERANCE_PPM) < MEASURED_PPM.unsigned_abs(), "{errors:?}");
    assert!(errors[1].abs_diff(-TOLERANCE_PPM) < MEASURED_PPM.unsigned_abs(), "{errors:?}");
    arena.undisturbed("… and on", &all).await;
    for drone in [0, 1] {
        let held = all.iter().find(|held| held.drone == drone).unwrap();
        let at = boot_ms();
        arena.cluster.links[drone].silence();
        // By the controllers' clock; 5 % of it are less than what a busy machine is allowed anyway.
        let deadline = arena.hard_deadline(held).await;
        let fault = if drone == 0 { "drone 5 % fast, cut off" } else { "drone 5 % slow, cut off" };
        arena.taken_over(fault, held, deadline, at).await;
        arena.cluster.links[drone].heal();
        arena.cluster.wait_drone(drone).await;
    }
    arena.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clock_rates_beyond_the_tolerance_show_in_the_metrics_and_change_nothing() {
    if !faketime() {
        return;
    }
    let mut arena = Arena::of(Cluster::builder().drone_rate(0, "1.3").drone_rate(1, "0.8"), CALM, 6).await;
    let all = arena.settle().await;
    let errors = [error_of(&arena.cluster, 0).await, error_of(&arena.cluster, 1).await];
    println!("measured: {errors:?} ppm");
    assert!(errors[0] > TOLERANCE_PPM + 150_000 && errors[1] < -TOLERANCE_PPM - 80_000, "{errors:?}");
    let faults: i64 = metric(&arena.cluster, "holdfast_drone_clock_faults_total").await.iter().sum();
    assert!(faults >= 2, "{faults} faults were counted");
    let logs: String = arena.cluster.controllers.iter().map(holdfast_tests::harness::Process::log).collect();
    assert!(logs.contains("beyond what leases allow for"), "a line says so");
    arena.undisturbed("drones 30 % fast and 20 % slow", &all).await;
    arena.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_leaders_whose_clocks_run_five_percent_fast_or_slow_keys_are_kept_and_pass_on_in_time() {
    if !faketime() {
        return;
    }
    let rates = Cluster::builder().controller_rate(0, "1.05").controller_rate(1, "0.95");
    let mut arena = Arena::of(rates, CALM, 3).await;
    for (leader, what) in [(0, "leader 5 % fast"), (1, "leader 5 % slow")] {
        let all = arena.settle().await;
        wait_until("it leads", LONG, async || {
            let now = arena.cluster.leader().await;
            if now == leader {
                return Ok(());
            }
            let url = arena.cluster.url(now);
            Err((now, arena.client.transfer_leader_at(&url, Some(leader as u64 + 1)).await))
        })
        .await;
        arena.undisturbed(what, &all).await;
        let held = &all[0];
        let at = boot_ms();
        arena.cluster.links[held.drone].silence();
        let deadline = arena.hard_deadline(held).await;
        arena.taken_over(&format!("{what}, drone cut off"), held, deadline, at).await;
        arena.cluster.links[held.drone].heal();
        arena.cluster.wait_drone(held.drone).await;
    }
    arena.finish();
}
