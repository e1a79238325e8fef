//! A door in front of a peer: connections wait at it until the test lets them through, one way at a time. What two
//! processes say to each other can so be stopped between any two messages.

use super::host::Host;
use super::net::Network;
use crate::harness::{LONG, wait_until};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::copy;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Port of the door.
const PORT: u16 = 7300;

/// How far connections have come and may go, counted from the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counts {
    /// So many may reach the peer.
    asked: u64,
    /// So many may be answered.
    answered: u64,
}

/// See the module. It lives as long as its host.
#[derive(Debug, Clone)]
pub struct Relay {
    /// Where others reach the peer through it.
    pub addr: SocketAddr,
    allowed: Arc<watch::Sender<Counts>>,
    seen: Arc<watch::Sender<Counts>>,
}

impl Relay {
    /// A closed door before the controller of a host.
    pub async fn start(net: &Network, host: &Host) -> Self {
        let addr = SocketAddr::from((net.addr(host.at), PORT));
        let none = Counts { asked: 0, answered: 0 };
        let relay = Self {
            addr,
            allowed: Arc::new(watch::Sender::new(none)),
            seen: Arc::new(watch::Sender::new(none)),
        };
        let (own, peer) = (relay.clone(), host.peer_addr());
        let handle = host.handle();
        let listening = handle.spawn(async move { TcpListener::bind(addr).await });
        let listener = listening.await.expect("no panic").expect("the relay's port");
        handle.spawn(async move {
            let mut number = 0;
            while let Ok((stream, _)) = listener.accept().await {
                number += 1;
                tokio::spawn(own.clone().pass(number, stream, peer.clone()));
            }
        });
        relay
    }

    async fn pass(self, number: u64, mut stream: TcpStream, peer: String) {
        let mut allowed = self.allowed.subscribe();
        self.seen.send_modify(|seen| seen.asked = seen.asked.max(number));
        let _ = allowed.wait_for(|allowed| allowed.asked >= number).await;
        let Ok(mut onward) = TcpStream::connect(peer).await else { return };
        let (mut from, mut to) = stream.split();
        let (mut back, mut forth) = onward.split();
        let answers = async {
            // The peer has answered, but what it said has not arrived.
            let _ = back.readable().await;
            self.seen.send_modify(|seen| seen.answered = seen.answered.max(number));
            let _ = allowed.wait_for(|allowed| allowed.answered >= number).await;
            copy(&mut back, &mut to).await
        };
        tokio::select! {
            _ = copy(&mut from, &mut forth) => {}
            _ = answers => {}
        }
    }

    /// Lets so many connections, counted from the first, reach the peer, and so many be answered.
    pub fn allow(&self, asked: u64, answered: u64) {
        self.allowed.send_replace(Counts { asked, answered });
    }

    /// Opens the door.
    pub fn open(&self) {
        self.allow(u64::MAX, u64::MAX);
    }

    /// Waits until so many connections have come to the door, and so many answers.
    pub async fn wait(&self, asked: u64, answered: u64) {
        wait_until(&format!("{} is asked {asked} times", self.addr), LONG, async || {
            let seen = *self.seen.borrow();
            if seen.asked >= asked && seen.answered >= answered { Ok(()) } else { Err(seen) }
        })
        .await;
    }
}
