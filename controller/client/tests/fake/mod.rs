//! A controller that answers as the test says, and remembers what it was asked.

#![allow(dead_code, missing_docs, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use holdfast_client::wire::{ApiError, ApiErrorKind};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What was asked.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `GET /path?query`.
    pub line: String,
    pub idempotency_key: Option<String>,
    pub last_event_id: Option<String>,
    pub body: String,
}

pub struct Fake {
    pub url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    server: JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Fake {
    /// `answer` gets the number of the request, from 0, and the request.
    pub async fn start(answer: impl Fn(usize, &Asked) -> Response + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(answer);
        let log = Arc::clone(&asked);
        let app = Router::new().fallback(move |request: Request| {
            let (answer, log) = (Arc::clone(&answer), Arc::clone(&log));
            async move {
                let (head, body) = request.into_parts();
                let text = |name: &str| head.headers.get(name).map(|v| v.to_str().unwrap().to_owned());
                let line = format!("{} {}", head.method, head.uri);
                let (idempotency_key, last_event_id) = (text("idempotency-key"), text("last-event-id"));
                let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
                let body = String::from_utf8(body.to_vec()).unwrap();
                let asked = Asked { line, idempotency_key, last_event_id, body };
                let number = {
                    let mut log = log.lock().unwrap();
                    log.push(asked.clone());
                    log.len() - 1
                };
                answer(number, &asked)
            }
        });
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, asked, server }
    }

    /// Takes each request in and then breaks the connection, after `bytes` if there are any.
    pub async fn breaking(bytes: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let server = tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut head = vec![0; 8192];
                let count = socket.read(&mut head).await.unwrap_or(0);
                let head = String::from_utf8_lossy(&head[..count]).into_owned();
                let header = |name: &str| {
                    head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).map(str::to_owned)
                };
                log.lock().unwrap().push(Asked {
                    line: head.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1").to_owned(),
                    idempotency_key: header("idempotency-key"),
                    last_event_id: header("last-event-id"),
                    body: String::new(),
                });
                let _ = socket.write_all(bytes.as_bytes()).await;
                // Linger 0: the end is a reset, not an orderly close.
                socket.set_zero_linger().ok();
            }
        });
        Self { url, asked, server }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub fn lines(&self) -> Vec<String> {
        self.asked().into_iter().map(|asked| asked.line).collect()
    }
}

/// A URL at which nobody listens.
pub async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

pub fn json(body: &str) -> Response {
    Response::builder().header("content-type", "application/json").body(Body::from(body.to_owned())).unwrap()
}

pub fn led_by(mut response: Response, leader: &str) -> Response {
    response.headers_mut().insert("x-holdfast-leader", leader.parse().unwrap());
    response
}

pub fn refusal(kind: ApiErrorKind) -> Response {
    let error = ApiError { id: "er-1".into(), kind, message: format!("this is {kind:?}") };
    let mut response = json(&serde_json::to_string(&error).unwrap());
    *response.status_mut() = axum::http::StatusCode::from_u16(kind.http_status()).unwrap();
    response
}

pub fn retry_after(mut response: Response, seconds: u64) -> Response {
    response.headers_mut().insert("retry-after", seconds.into());
    response
}

pub fn sse(body: &str) -> Response {
    Response::builder().header("content-type", "text/event-stream").body(Body::from(body.to_owned())).unwrap()
}

pub const CONNECTED: &str = r#"{"backend_id":"ba-1","spawned":true,"status":"scheduled","token":"to-1",
    "url":"http://localhost/ba-1/","subdomain":null,"secret_token":null,
    "status_url":"http://localhost/pub/b/ba-1/status","drone":"dr-a",
    "key":{"name":"k","namespace":"","tag":""},"fencing_token":7}"#;
