//! Damaged and missing files: the replica refuses to start and names the file, or it does no harm.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_tests::power::clean_tmpfs_dir;
use raft_store::inspect;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Files that are not read back, or whose content says nothing: damage to them is harmless. `LOCK` is only locked; `LOG` and
/// `OPTIONS` are notes of RocksDB's for people; `IDENTITY` is RocksDB's name for a database, which no one asks for.
const HARMLESS: [&str; 4] = ["LOCK", "LOG", "OPTIONS", "IDENTITY"];

fn is_harmless(file: &Path) -> bool {
    let name = file.file_name().unwrap().to_string_lossy();
    HARMLESS.iter().any(|harmless| name.starts_with(harmless))
}

/// The write-ahead log of the *state* is not synced: what is lost of it, the Raft log brings again, and it is not purged
/// before the state is durable without it.
fn is_state_wal(file: &Path) -> bool {
    file.extension().is_some_and(|e| e == "log") && file.components().any(|part| part.as_os_str() == "state")
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(dir).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// What a replica is found to hold: everything that was acknowledged, or why it refuses.
fn outcome(what: &str, dir: &Path, held: &BTreeMap<String, u64>) -> Result<(), String> {
    let replica = inspect::open(dir).map_err(|error| error.to_string())?;
    replica.scrub().map_err(|error| error.to_string())?;
    for (key, token) in held {
        let in_log = || replica.acquisition(*token).unwrap().is_some_and(|(_, found)| found.name == *key);
        let in_state = replica.view().key("", key).unwrap().is_some_and(|found| found.token == *token);
        assert!(
            in_state || in_log(),
            "{what}: {key} of token {token} is lost without a word: {:?}",
            replica.ends()
        );
    }
    Ok(())
}

/// Acquires a key and notes its token.
async fn connect(cluster: &Cluster, n: usize, held: &mut BTreeMap<String, u64>) {
    let request = cluster.backend().request(&format!("key-{n}"));
    let answer = cluster.client().connect(&request).await.unwrap();
    held.insert(answer.key.name, answer.fencing_token);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_or_a_missing_file_is_named_or_does_no_harm() {
    let mut cluster = Cluster::builder()
        .lease("renew=1s,soft=40s,hard=50s,expiry=60s")
        .controller_flag("--snapshot-every", "100")
        .start()
        .await;
    let mut held = BTreeMap::new();
    for n in 0..12 {
        connect(&cluster, n, &mut held).await;
    }
    // Twice: tables, write-ahead logs and a snapshot of some age.
    cluster.controllers[0].kill9();
    cluster.restart_controller(0);
    cluster.wait_controller(0).await;
    wait_until("there is a snapshot", LONG, async || {
        let text = cluster.http.get(&format!("{}/metrics", cluster.url(0))).await.text;
        let index = text.lines().find_map(|line| line.strip_prefix("holdfast_snapshot_index "));
        if index.is_some_and(|index| index != "0") { Ok(()) } else { Err(text) }
    })
    .await;
    for n in 12..16 {
        connect(&cluster, n, &mut held).await;
    }
    let newest = *held.values().max().unwrap();
    wait_until("the first has applied all of it", LONG, async || {
        let text = cluster.http.get(&format!("{}/metrics", cluster.url(0))).await.text;
        let index = text.lines().find_map(|line| line.strip_prefix("holdfast_applied_index ")).unwrap();
        if index.parse::<u64>().unwrap() >= newest { Ok(()) } else { Err(text) }
    })
    .await;
    cluster.controllers.iter_mut().for_each(|controller| controller.kill9());
    let original = cluster.dir().join("controller-1");

    // A replica applies what a quorum holds, which it need not be part of: kill -9 may have been faster than its own log.
    let copy = clean_tmpfs_dir("holdfast-damage-");
    copy_dir(&original, copy.path());
    let (_, last) = inspect::open(copy.path()).unwrap().ends().unwrap().last.unwrap();
    held.retain(|_, token| *token <= last);
    assert!(held.len() >= 12, "the disk to be damaged holds too little: {held:?} up to {last}");

    let attempt = |what: &str, harm: &dyn Fn(&Path)| {
        let copy = clean_tmpfs_dir("holdfast-damage-");
        copy_dir(&original, copy.path());
        harm(copy.path());
        (what.to_owned(), outcome(what, copy.path(), &held))
    };
    let (what, whole) = attempt("untouched", &|_| {});
    assert_eq!(whole, Ok(()), "{what}");
    let (mut named, mut harmless) = (0, Vec::new());
    for file in files(&original) {
        let size = fs::metadata(original.join(&file)).unwrap().len() as usize;
        // A byte near the beginning, in the middle, near the end; and the whole file missing.
        let places: Vec<usize> =
            if size == 0 { Vec::new() } else { vec![size / 5, size / 2, size - 1 - size / 7] };
        let mut results = Vec::new();
        for at in places {
            results.push(attempt(
                &format!("{} with a bit flipped at {at} of {size}", file.display()),
                &|dir| {
                    let mut content = fs::read(dir.join(&file)).unwrap();
                    content[at] ^= 0x10;
                    fs::write(dir.join(&file), content).unwrap();
                },
            ));
        }
        results.push(attempt(&format!("{} missing", file.display()), &|dir| {
            fs::remove_file(dir.join(&file)).unwrap()
        }));
        for (what, result) in results {
            match result {
                // `outcome` has checked that nothing is lost; what that may be is written down.
                Ok(()) => harmless.push(what.clone()),
                Err(error) => {
                    named += 1;
                    let name = file.file_name().unwrap().to_string_lossy();
                    let of_its_kind = file.extension().is_some_and(|e| e == "log") && error.contains("*.log");
                    // A table that CURRENT or a manifest misses may be named by what misses it.
                    let says = error.contains(&*name) || of_its_kind || error.contains("CURRENT");
                    assert!(says, "{what}: the file is not named: {error}");
                }
            }
        }
    }
    println!("{named} refused and named; harmless:\n  {}", harmless.join("\n  "));
    // A table that can be missing is one that nothing refers to any more: RocksDB deletes it at the next start.
    let left_over: Vec<String> =
        harmless.iter().filter_map(|what| Some(what.strip_suffix(" missing")?.to_owned())).collect();
    for what in &harmless {
        let file = PathBuf::from(what.split(' ').next().unwrap());
        let empty = fs::metadata(original.join(&file)).unwrap().len() == 0;
        let is_left_over =
            file.extension().is_some_and(|e| e == "sst") && left_over.contains(&file.display().to_string());
        assert!(is_harmless(&file) || is_state_wal(&file) || empty || is_left_over, "{what} went unnoticed");
    }
    assert!(named >= 20, "this test has tested little: {named}");

    // And the real process says so, and ends.
    let wal = files(&original)
        .into_iter()
        .rfind(|file| file.starts_with("log") && file.extension().is_some_and(|e| e == "log"))
        .unwrap();
    let mut content = fs::read(original.join(&wal)).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(original.join(&wal), content).unwrap();
    cluster.restart_controller(0);
    let status = cluster.controllers[0].wait(LONG).await;
    assert_eq!(status.code(), Some(1));
    let log = cluster.controllers[0].log();
    assert!(log.contains(&*wal.to_string_lossy()) && log.contains("damaged"), "{log}");
}
