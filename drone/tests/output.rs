//! A backend's output: bounded at all times, and in nobody's way when the disk is.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]

mod common;

use common::{Drone, Fake, alive, lease, soon};
use holdfast_wire::drone::Action;
use holdfast_wire::{BackendState, BackendStatus, TerminationKind, TerminationReason};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Two files.
const OUTPUT_BYTES_MAX: u64 = 2 * 8 * 1024 * 1024;

fn files(dir: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("output"))
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.metadata().ok()?.len())))
        .collect()
}

#[tokio::test]
async fn output_is_bounded_while_it_is_written_and_the_last_lines_are_kept() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let drone = Drone::start(&fake.url, dir.path());
    let mut conn = fake.conn().await;
    let backend = "ba-talks";
    // 300 MB, and then it ends.
    conn.waiting(backend, "yes 'a line of output' | head -c 300000000; echo; echo the last line; exit 5")
        .await;
    let own = dir.path().join("backends").join(backend);
    let mut most = 0;
    let state = soon("its end", async {
        let mut looks = tokio::time::interval(Duration::from_millis(5));
        loop {
            tokio::select! {
                event = conn.event() => {
                    if event.state.status() == BackendStatus::Terminated {
                        return event.state;
                    }
                }
                _ = looks.tick() => {
                    most = most.max(files(&own).iter().map(|(_, bytes)| bytes).sum::<u64>());
                }
            }
        }
    })
    .await;
    assert!(matches!(state, BackendState::Terminated { exit_code: Some(5), .. }), "{state:?}");
    assert!(most <= OUTPUT_BYTES_MAX, "{most} bytes");
    let kept: u64 = files(&own).iter().map(|(_, bytes)| bytes).sum();
    assert!((OUTPUT_BYTES_MAX / 2..=OUTPUT_BYTES_MAX).contains(&kept), "{:?}", files(&own));
    assert!(drone.output(backend).ends_with("\nthe last line\n"));
}

/// A small file system at `path`, gone when this is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: &Path) -> Self {
        mount(Some("small"), path, Some("tmpfs"), MsFlags::empty(), Some("size=256k")).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_drops_output_and_holds_up_neither_backend_nor_hand_over() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can mount a small file system");
        return;
    }
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let outer = tempfile::tempdir().unwrap();
    let data_dir = outer.path().join("data");
    std::fs::create_dir(&data_dir).unwrap();
    let _small = Small::mount(&data_dir);
    let mut drone = Drone::start(&fake.url, &data_dir);
    let mut conn = fake.conn().await;
    let backend = "ba-full";
    let go = outer.path().join("go");
    let script = format!(
        "echo up; yes | head -c 2000000; touch {0}.full; until [ -e {0} ]; do sleep 0.02; done; echo there is room; \
         trap 'echo last words; exit 6' TERM; while :; do sleep 0.02; done",
        go.display()
    );
    conn.waiting(backend, &script).await;
    let full = outer.path().join("go.full");
    soon("the backend is not held up", async {
        while !full.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // A hand-over works meanwhile.
    drone.process.kill().unwrap();
    drone.process.wait().unwrap();
    drone = Drone::start(&fake.url, &data_dir);
    let mut conn = fake.conn().await;
    assert_eq!(conn.renewal().await.keys.len(), 1);
    assert!(alive(backend) > 0);
    // Once there is room, output is kept again.
    mount(Some("small"), &data_dir, None::<&str>, MsFlags::MS_REMOUNT, Some("size=32m")).unwrap();
    std::fs::write(&go, "").unwrap();
    drone.wrote(backend, "bytes of output were lost here").await;
    drone.wrote(backend, "there is room\n").await;
    assert!(drone.output(backend).starts_with("up\n"));
    let end = Action::Terminate { kind: TerminationKind::Soft, reason: TerminationReason::External };
    conn.act("end", backend, end);
    loop {
        if let BackendState::Terminated { exit_code, .. } = conn.event().await.state {
            assert_eq!(exit_code, Some(6));
            break;
        }
    }
    assert!(drone.output(backend).ends_with("last words\n"));
}
