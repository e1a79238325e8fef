//! Whether containers' processes can be seen from here: that nothing of a backend is left is known by looking.

use crate::processes;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Longest time for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Checks that the process at the other end of the engine's socket is visible and readable in this `/proc`. Where it is not
/// (another PID namespace, `hidepid`), neither are its containers, and every look would find nothing.
pub(super) async fn check(socket: &Path) -> io::Result<()> {
    let connected = timeout(CONNECT_MAX, UnixStream::connect(socket)).await;
    let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut)).flatten();
    let credentials = stream.and_then(|stream| stream.peer_cred())?;
    // 0 stands for a process of a PID namespace that is not seen from this one.
    let visible = match credentials.pid().filter(|pid| *pid > 0) {
        None => Err(io::Error::other("it is in a PID namespace that is not seen from here")),
        Some(pid) => is_readable(pid).map_err(|e| io::Error::new(e.kind(), format!("process {pid}: {e}"))),
    };
    visible.map_err(|e| {
        let problem = format!(
            "--runtime docker: the process of the engine at {} cannot be seen ({e}), so neither could containers be seen to \
             end: run the drone in the engine's PID namespace (docker run --pid=host), with /proc mounted without hidepid \
             or with CAP_SYS_PTRACE",
            socket.display()
        );
        io::Error::new(e.kind(), problem)
    })
}

/// Whether all that a look reads of a process can be read.
fn is_readable(pid: i32) -> io::Result<()> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "it is not in /proc");
    if !processes::pids()?.contains(&pid) {
        return Err(missing());
    }
    processes::one(pid)?.ok_or_else(missing)?;
    for file in ["cgroup", "status"] {
        processes::read(pid, file)?.ok_or_else(missing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn an_engine_of_this_namespace_is_seen_and_a_missing_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.sock");
        assert!(check(&socket).await.is_err());
        let _engine = UnixListener::bind(&socket).unwrap();
        check(&socket).await.unwrap();
        assert!(is_readable(i32::MAX).is_err());
    }
}
