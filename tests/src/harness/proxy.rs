//! A TCP proxy in front of a controller, to cut a drone or a client off from it.
//!
//! Controllers name the leader's URL in their answers, and drones and clients go straight there. A proxy therefore
//! replaces the controllers' addresses by those of its fellow proxies in what controllers send; all have the same length.

use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::ports::PortBlock;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pass,
    /// Connections are closed, and new ones at once.
    Cut,
    /// Connections stay, but nothing gets through in either direction.
    Silent,
}

type Renames = Arc<Vec<(Vec<u8>, Vec<u8>)>>;

/// In front of one controller.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub addr: SocketAddr,
    mode: watch::Sender<Mode>,
    accepting: AbortHandle,
}

impl Proxy {
    async fn start(addr: SocketAddr, target: SocketAddr, renames: Renames) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap_or_else(|e| panic!("a proxy on {addr}: {e}"));
        let (mode, modes) = watch::channel(Mode::Pass);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *modes.borrow() != Mode::Cut {
                    tokio::spawn(serve(client, target, Arc::clone(&renames), modes.clone()));
                }
            }
        });
        Self { addr, mode, accepting: accepting.abort_handle() }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Closes all connections, and new ones at once.
    pub fn cut(&self) {
        self.mode.send_replace(Mode::Cut);
    }

    /// Swallows everything: connections stay open and silent.
    pub fn silence(&self) {
        self.mode.send_replace(Mode::Silent);
    }

    /// Lets everything through again. Silenced connections that lost bytes are closed.
    pub fn heal(&self) {
        self.mode.send_replace(Mode::Pass);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn serve(client: TcpStream, target: SocketAddr, renames: Renames, mut modes: watch::Receiver<Mode>) {
    let begun = async {
        while *modes.borrow_and_update() == Mode::Silent {
            modes.changed().await.ok()?;
        }
        TcpStream::connect(target).await.ok()
    };
    let Some(server) = begun.await else { return };
    // Fails only for a connection that is gone, which is seen anyway.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = copy(client_read, server_write, Arc::default(), modes.clone()) => {}
        () = copy(server_read, client_write, renames, modes) => {}
    }
}

/// Copies until either side ends or the proxy is cut. What comes while it is silent is lost, and so is the connection
/// once it no longer is.
async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    renames: Renames,
    mut modes: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 64 * 1024];
    let mut kept = Vec::new();
    let mut lost = false;
    loop {
        let mode = *modes.borrow_and_update();
        if mode == Mode::Cut || (lost && mode == Mode::Pass) {
            return;
        }
        tokio::select! {
            changed = modes.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer) => {
                let Ok(bytes) = read else { return };
                if *modes.borrow() == Mode::Silent {
                    lost = true;
                    if bytes == 0 {
                        // Not even the end gets through.
                        while *modes.borrow_and_update() == Mode::Silent {
                            if modes.changed().await.is_err() { return }
                        }
                        return;
                    }
                    continue;
                }
                if bytes == 0 {
                    let _ = to.write_all(&kept).await;
                    let _ = to.shutdown().await;
                    return;
                }
                kept.extend_from_slice(&buffer[..bytes]);
                rename(&mut kept, &renames);
                let hold = held_back(&kept, &renames);
                let rest = kept.split_off(kept.len() - hold);
                if to.write_all(&kept).await.is_err() { return }
                kept = rest;
            }
        }
    }
}

fn rename(bytes: &mut [u8], renames: &Renames) {
    for (old, new) in renames.iter() {
        let mut at = 0;
        while let Some(found) = bytes[at..].windows(old.len()).position(|window| window == old.as_slice()) {
            bytes[at + found..at + found + old.len()].copy_from_slice(new);
            at += found + old.len();
        }
    }
}

/// How many bytes at the end may be the beginning of an address.
fn held_back(bytes: &[u8], renames: &Renames) -> usize {
    let longest = renames.iter().map(|(old, _)| old.len() - 1).max().unwrap_or(0).min(bytes.len());
    (1..=longest)
        .rev()
        .find(|n| renames.iter().any(|(old, _)| old.len() > *n && bytes.ends_with(&old[..*n])))
        .unwrap_or(0)
}

/// One proxy in front of each controller.
#[derive(Debug)]
pub struct ProxySet {
    /// In the order of the controllers.
    pub proxies: Vec<Proxy>,
}

impl ProxySet {
    /// Starts them, on ports of the block.
    pub async fn start(ports: &mut PortBlock, controllers: &[SocketAddr]) -> Self {
        let pairs: Vec<_> = controllers.iter().map(|target| (ports.give(), *target)).collect();
        let bytes = |addr: &SocketAddr| addr.to_string().into_bytes();
        let renames: Renames =
            Arc::new(pairs.iter().map(|(addr, target)| (bytes(target), bytes(addr))).collect());
        assert!(renames.iter().all(|(old, new)| old.len() == new.len()), "addresses of one length");
        let mut proxies = Vec::new();
        for (addr, target) in pairs {
            proxies.push(Proxy::start(addr, target, Arc::clone(&renames)).await);
        }
        Self { proxies }
    }

    /// Their URLs.
    pub fn urls(&self) -> Vec<String> {
        self.proxies.iter().map(Proxy::url).collect()
    }

    /// Cuts off from all controllers; see [`Proxy::cut`].
    pub fn cut(&self) {
        self.proxies.iter().for_each(Proxy::cut);
    }

    /// See [`Proxy::silence`].
    pub fn silence(&self) {
        self.proxies.iter().for_each(Proxy::silence);
    }

    /// See [`Proxy::heal`].
    pub fn heal(&self) {
        self.proxies.iter().for_each(Proxy::heal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_replaced_also_across_two_reads() {
        let renames: Renames = Arc::new(vec![(b"a:11".to_vec(), b"b:22".to_vec())]);
        let mut bytes = b"x a:11 a:11 a:1".to_vec();
        rename(&mut bytes, &renames);
        assert_eq!(bytes, b"x b:22 b:22 a:1");
        assert_eq!(held_back(&bytes, &renames), 3);
        assert_eq!(held_back(b"a:", &renames), 2);
        assert_eq!(held_back(b"a:x", &renames), 0);
        assert_eq!(held_back(b"x", &Arc::default()), 0);
    }
}
