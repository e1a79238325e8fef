//! `holdfast backends logs`: the output of a backend, a file on its drone's machine.

use crate::args::LogsArgs;
use crate::error::CliError;
use crate::format::clean;
use crate::output::Out;
use futures::TryStreamExt;
use holdfast_client::wire::BackendStatus;
use holdfast_client::wire::names::check_name;
use holdfast_client::{Client, RequestOptions};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// How long to ask the service on which drone a backend is whose output is not here, in milliseconds.
const ASK_MS_MAX: u64 = 2_000;

pub(crate) async fn run(client: &Client, args: LogsArgs, out: &Out) -> Result<(), CliError> {
    // The id becomes part of a path.
    check_name("ID", &args.id)?;
    let Some(path) = find(&args.data_dir, &args.id) else {
        return Err(not_here(client, &args).await);
    };
    let mut file = print_older(&path, out)?;
    if args.follow {
        return follow(client, &args.id, &path, file, out).await;
    }
    copy(&mut file, out).map_err(|error| with_path(error, &path))
}

/// The file that the output is in, with the output before it printed: a full file is renamed and a new one begun.
fn print_older(path: &Path, out: &Out) -> Result<File, CliError> {
    let open = |path: &Path| {
        File::open(path).map_err(|error| CliError::io(format!("reading {}", path.display()), error))
    };
    let older_path = path.with_extension("log.1");
    loop {
        let file = open(path)?;
        let older = match File::open(&older_path) {
            Ok(older) => Some(older),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(CliError::io(format!("reading {}", older_path.display()), error)),
        };
        // Otherwise it was renamed between the two.
        if is_at(&file, path) {
            if let Some(mut older) = older {
                copy(&mut older, out).map_err(|error| with_path(error, &older_path))?;
            }
            return Ok(file);
        }
    }
}

/// Whether the path still leads to this file; if that cannot be told, it does.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => true,
    }
}

/// The output's file under one of `data_dirs`: a drone's own, or one that holds several drones' (`holdfast dev`).
fn find(data_dirs: &[PathBuf], id: &str) -> Option<PathBuf> {
    let within = |dir: &Path| dir.join("backends").join(id).join("output.log");
    for dir in data_dirs {
        let direct = within(dir);
        if direct.is_file() {
            return Some(direct);
        }
        let Ok(entries) = std::fs::read_dir(dir) else { continue };
        let nested = entries.flatten().map(|entry| within(&entry.path())).find(|path| path.is_file());
        if nested.is_some() {
            return nested;
        }
    }
    None
}

async fn not_here(client: &Client, args: &LogsArgs) -> CliError {
    let id = &args.id;
    let quick = client.with_options(RequestOptions {
        deadline_ms: ASK_MS_MAX,
        all_unreachable_ms: 0,
        attempt_ms: ASK_MS_MAX,
        ..client.options().clone()
    });
    let hint = match quick.backend(id).await {
        Ok(Some(info)) => format!(" It runs, or ran, on drone {}.", clean(&info.drone)),
        Ok(None) => " The controllers know no such backend.".to_owned(),
        Err(_) => String::new(),
    };
    let places: Vec<String> = args.data_dir.iter().map(|dir| dir.display().to_string()).collect();
    CliError::Failed(format!(
        "the output of {id} is not under {}.{hint} It is the file backends/{id}/output.log in the data directory of \
         its drone, on that drone's machine, and readable only for the drone's user",
        places.join(" or ")
    ))
}

fn with_path(error: CliError, path: &Path) -> CliError {
    match error {
        CliError::Io { doing, error } if doing.is_empty() => {
            CliError::io(format!("reading {}", path.display()), error)
        }
        error => error,
    }
}

/// Copies from where `file` stands to its present end.
fn copy(file: &mut File, out: &Out) -> Result<(), CliError> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => out.bytes(chunk.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CliError::io("", error)),
        }
    }
}

/// An inotify instance that tokio can wait for.
struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

fn watch_file(path: &Path) -> Result<AsyncFd<Watch>, CliError> {
    let doing = || format!("watching {}", path.display());
    let changed = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_MOVE_SELF;
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .and_then(|inotify| inotify.add_watch(path, changed).map(|_| inotify))
        .map_err(|error| CliError::io(doing(), error.into()))?;
    // SAFETY: `Watch` owns its descriptor, and nothing replaces or closes it while `AsyncFd` has it.
    unsafe { AsyncFd::register_with_interest(Watch(watch), Interest::READABLE) }
        .map_err(|error| CliError::io(doing(), error.into()))
}

/// Copies until the backend has ended or its file is removed.
async fn follow(client: &Client, id: &str, path: &Path, mut file: File, out: &Out) -> Result<(), CliError> {
    let doing = || format!("watching {}", path.display());
    let mut watch = watch_file(path)?;
    let mut ended = pin!(ended(client, id));
    loop {
        let length = file.metadata().map_err(|error| CliError::io(doing(), error))?.len();
        let at = file.stream_position().map_err(|error| CliError::io(doing(), error))?;
        if length < at {
            // Cut off and begun anew.
            file.seek(SeekFrom::Start(0)).map_err(|error| CliError::io(doing(), error))?;
        }
        copy(&mut file, out).map_err(|error| with_path(error, path))?;
        if !path.exists() {
            return Ok(());
        }
        if !is_at(&file, path) {
            // A full file is not written to any more when it is renamed: this is its last part.
            copy(&mut file, out).map_err(|error| with_path(error, path))?;
            file = File::open(path).map_err(|error| CliError::io(doing(), error))?;
            // If it is renamed before it is watched, the next look finds that out.
            watch = watch_file(path)?;
            continue;
        }
        tokio::select! {
            ready = watch.readable() => {
                let mut guard = ready.map_err(|error| CliError::io(doing(), error))?;
                // What happened does not matter: the file is looked at anew. Reading makes room for the next event.
                while guard.get_inner().0.read_events().is_ok() {}
                guard.clear_ready();
            }
            () = &mut ended => return copy(&mut file, out).map_err(|error| with_path(error, path)),
        }
    }
}

/// Returns once the service says that the backend has ended, or never heard of it. Where the service can't be asked,
/// never: then the file is followed until somebody stops this command.
async fn ended(client: &Client, id: &str) {
    let mut stream = pin!(client.status_stream(id));
    loop {
        match stream.try_next().await {
            Ok(Some(message)) if message.status == BackendStatus::Terminated => return,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_found_in_a_drones_directory_and_in_devs() {
        let dir = tempfile::tempdir().unwrap();
        let (own, devs) = (dir.path().join("own"), dir.path().join("dev"));
        let direct = own.join("backends/ba-1/output.log");
        let nested = devs.join("drone-2/backends/ba-2/output.log");
        for path in [&direct, &nested] {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        let dirs = [dir.path().join("none"), own, devs];
        assert_eq!(find(&dirs, "ba-1"), Some(direct));
        assert_eq!(find(&dirs, "ba-2"), Some(nested));
        assert_eq!(find(&dirs, "ba-3"), None);
    }
}
