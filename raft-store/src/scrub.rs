//! Reads the tables on disk from end to end, slowly, after the start and once a day: a bit that flipped in a table is seen
//! only when it is read, and then it is better found by this than by the entry that needs it, or by a follower that gets a
//! snapshot. What is found stops the replica, as a failed write does: its state can't be trusted any more, while the others
//! have it.

use crate::background::{Background, Ended};
use crate::state_db::scrub_dir;
use crate::store::Inner;
use crate::table_files::check_table;
use rocksdb::{ColumnFamily, DB, IteratorMode, ReadOptions};
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Time from the end of one scrub to the next.
const SCRUB_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes read between two pauses.
const PIECE_BYTES: usize = 1 << 20;
/// A pause: 20 MB/s at most, which no disk notices.
const PAUSE: Duration = Duration::from_millis(50);

/// Reads a whole table past the cache, with checksums. `pause` is called after each piece and says whether to go on.
pub(crate) fn read_through(
    db: &DB,
    cf: &ColumnFamily,
    pause: &mut impl FnMut() -> bool,
) -> Result<(), rocksdb::Error> {
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    options.set_verify_checksums(true);
    let mut bytes = 0;
    for row in db.iterator_cf_opt(cf, options, IteratorMode::Start) {
        let (key, value) = row?;
        bytes += key.len() + value.len();
        if bytes >= PIECE_BYTES {
            bytes = 0;
            if !pause() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Checks the tables that an open database uses, in what reading their rows does not read. See [`check_table`].
pub(crate) fn check_tables(db: &DB, dir: &Path, pause: &mut impl FnMut() -> bool) -> io::Result<()> {
    for table in db.live_files().map_err(io::Error::other)? {
        match check_table(&dir.join(table.name.trim_start_matches('/'))) {
            // It was compacted away meanwhile: a table that is *needed* and missing keeps the database from opening.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            checked => checked?,
        }
        if !pause() {
            break;
        }
    }
    Ok(())
}

/// Starts the thread.
pub(crate) fn start(inner: &Arc<Inner>) -> io::Result<Background> {
    let replica = Arc::downgrade(inner);
    Background::start(
        "scrub",
        move |ended| {
            while scrub(&replica, ended).is_some() && ended.pause(SCRUB_EVERY) {}
        },
    )
}

fn scrub(replica: &Weak<Inner>, ended: &Ended) -> Option<()> {
    let inner = replica.upgrade()?;
    let (state, log, snapshots) = (inner.state.clone(), inner.log.clone(), inner.snapshots.clone());
    drop(inner);
    let mut stopped = false;
    let mut pause = || {
        stopped = stopped || !ended.pause(PAUSE);
        !stopped
    };
    let began = Instant::now();
    let state = state.scrub(&mut pause).map_err(|e| format!("the state is damaged: {e}"));
    let found = state.and_then(|()| log.scrub(&mut pause).map_err(|e| format!("the log is damaged: {e}")));
    let found = found.and_then(|()| match snapshots.current() {
        Some((_, held)) => {
            scrub_dir(&held.path, &mut pause).map_err(|e| format!("the snapshot is damaged: {e}"))
        }
        None => Ok(()),
    });
    if stopped {
        return None;
    }
    let inner = replica.upgrade()?;
    match found {
        Ok(()) => tracing::info!(seconds = began.elapsed().as_secs(), "every checksum on disk is right"),
        Err(why) => inner.fail(why),
    }
    Some(())
}
