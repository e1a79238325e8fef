//! The engine's socket as the drone and its guards see it: another one, behind which the engine can be made to hang or to
//! be away, as if it were stopped or restarted.

use std::path::{Path, PathBuf};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All goes through.
    Open,
    /// Nothing goes through, either way, until it is open again. What was sent meanwhile arrives then, also if its
    /// sender has hung up.
    Hang,
    /// Requests to start arrive; what they are answered does not.
    HoldStartAnswers,
    /// Requests to start, and everything after them, do not arrive until it is open again.
    HoldStarts,
    /// Every connection is cut.
    Cut,
}

pub struct Proxy {
    pub path: PathBuf,
    mode: watch::Sender<Mode>,
    /// Requests to start that have come.
    starts: watch::Sender<usize>,
}

impl Proxy {
    pub fn start(path: &Path, engine: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let mode = watch::Sender::new(Mode::Open);
        let starts = watch::Sender::new(0);
        let proxy = Self { path: path.to_owned(), mode: mode.clone(), starts: starts.clone() };
        let engine = engine.to_owned();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *mode.borrow() != Mode::Cut {
                    tokio::spawn(connection(client, engine.clone(), mode.subscribe(), starts.clone()));
                }
            }
        });
        proxy
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Waits until a guard has asked for a start.
    pub async fn start_asked(&self) {
        self.starts.subscribe().wait_for(|starts| *starts > 0).await.unwrap();
    }
}

async fn connection(
    mut client: UnixStream,
    engine: PathBuf,
    mode: watch::Receiver<Mode>,
    starts: watch::Sender<usize>,
) {
    // A guard's request, and the head of a drone's, come in one piece.
    let mut first = vec![0u8; 64 * 1024];
    let Ok(length) = client.read(&mut first).await else { return };
    first.truncate(length);
    let line_end = first.iter().position(|b| *b == b'\r').unwrap_or(0);
    let is_start = first[..line_end].windows(7).any(|part| part == b"/start ");
    if is_start {
        starts.send_modify(|starts| *starts += 1);
    }
    let Ok(engine) = UnixStream::connect(&engine).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_engine, mut to_engine) = engine.into_split();
    let (mut cut, mut there_mode, mut back_mode) = (mode.clone(), mode.clone(), mode);
    let there = async {
        let mut bytes = first;
        loop {
            let passes = |mode: &Mode| match mode {
                Mode::Hang => false,
                Mode::HoldStarts => !is_start,
                _ => true,
            };
            there_mode.wait_for(passes).await.ok()?;
            to_engine.write_all(&bytes).await.ok()?;
            bytes.resize(64 * 1024, 0);
            let length = from_client.read(&mut bytes).await.ok()?;
            if length == 0 {
                break;
            }
            bytes.truncate(length);
        }
        // The sender has hung up; the engine does what it was asked all the same.
        Some(())
    };
    let back = async {
        let mut bytes = vec![0u8; 64 * 1024];
        loop {
            let length = from_engine.read(&mut bytes).await.ok()?;
            if length == 0 {
                return Some(());
            }
            let passes = |mode: &Mode| match mode {
                Mode::Hang => false,
                Mode::HoldStartAnswers => !is_start,
                _ => true,
            };
            back_mode.wait_for(passes).await.ok()?;
            // Nobody may be there to hear it.
            let _ = to_client.write_all(&bytes[..length]).await;
        }
    };
    tokio::select! {
        _ = async { tokio::join!(there, back) } => {}
        _ = cut.wait_for(|mode| *mode == Mode::Cut) => {}
    }
}
