//! Whether a backend answers HTTP.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// A backend that has not answered within this time is ended.
pub const STARTUP_TIMEOUT: Duration = Duration::from_secs(300);
/// First pause between two attempts; it doubles.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// Longest wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How every HTTP/1 answer begins.
const HTTP: &[u8] = b"HTTP/";

/// Waits until `HEAD /` gets any HTTP answer there; false if none comes in time.
pub async fn answers(address: SocketAddr) -> bool {
    answers_within(address, STARTUP_TIMEOUT).await
}

async fn answers_within(address: SocketAddr, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    let mut pause = PAUSE_MIN;
    while Instant::now() < end {
        if let Ok(Ok(true)) = timeout(ANSWER_TIMEOUT, ask(address)).await {
            return true;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
    false
}

async fn ask(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "HEAD / HTTP/1.1\r\nHost: {address}\r\nUser-Agent: holdfast-drone\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0u8; HTTP.len()];
    stream.read_exact(&mut start).await?;
    Ok(start == HTTP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn any_http_answer_counts_and_other_talk_does_not() {
        for (answer, expected) in [("HTTP/1.1 503 No\r\n\r\n", true), ("SSH-2.0-x\r\n", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tokio::spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    let mut request = [0u8; 6];
                    let _ = stream.read_exact(&mut request).await;
                    assert_eq!(&request, b"HEAD /");
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            });
            assert_eq!(answers_within(address, Duration::from_millis(200)).await, expected);
            server.abort();
        }
    }

    #[tokio::test]
    async fn a_closed_port_does_not_answer() {
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert!(!answers_within(address, Duration::from_millis(100)).await);
    }
}
