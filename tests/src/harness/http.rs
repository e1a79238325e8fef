//! HTTP without the client's cleverness: one request to one controller, and all of the answer.

use holdfast_wire::http::{ConnectRequest, LEADER_HEADER, REPLAYED_HEADER};
use holdfast_wire::{ApiError, ApiErrorKind};
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::time::Duration;

/// Longer than the service takes for a definite answer or the default `wait_ms`.
const TIMEOUT: Duration = Duration::from_secs(40);

/// An answer with everything that is of interest.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body, as text.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        self.read()
    }

    /// The body as a type.
    pub fn read<T: DeserializeOwned>(&self) -> T {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    /// The body of a success. Panics if it is none.
    pub fn ok<T: DeserializeOwned>(&self) -> T {
        assert!(self.status.is_success(), "not a success: {self:?}");
        self.read()
    }

    /// The body of a refusal of that kind, under that kind's status. Panics if it is none.
    pub fn refused(&self, kind: ApiErrorKind) -> ApiError {
        let error: ApiError = self.read();
        assert_eq!(error.kind, kind, "{self:?}");
        assert_eq!(self.status.as_u16(), kind.http_status(), "{self:?}");
        assert!(!error.id.is_empty() && !error.message.is_empty(), "{self:?}");
        error
    }

    /// Who leads, says the answer.
    pub fn leader(&self) -> Option<&str> {
        self.headers.get(LEADER_HEADER)?.to_str().ok()
    }

    /// Whether it is a recorded answer.
    pub fn replayed(&self) -> bool {
        self.headers.get(REPLAYED_HEADER).is_some_and(|value| value == "true")
    }
}

/// Sends single requests.
#[derive(Debug, Clone)]
pub struct Http {
    /// For requests of other shapes.
    pub raw: reqwest::Client,
}

impl Http {
    pub(super) fn new() -> Self {
        // Pooled connections would be ones to a killed process.
        let builder = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).timeout(TIMEOUT);
        Self { raw: builder.build().expect("an HTTP client") }
    }

    /// Sends; `Err` only if no answer came.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Result<Answer, reqwest::Error> {
        let mut request = self.raw.request(method, url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        Ok(Answer { status, headers, text: response.text().await? })
    }

    /// GET. Panics if no answer comes.
    pub async fn get(&self, url: &str) -> Answer {
        self.send(Method::GET, url, &[], None).await.unwrap_or_else(|e| panic!("GET {url}: {e}"))
    }

    /// POST of JSON. Panics if no answer comes.
    pub async fn post(&self, url: &str, body: &Value) -> Answer {
        self.post_with(url, body, &[]).await
    }

    /// POST of JSON with headers. Panics if no answer comes.
    pub async fn post_with(&self, url: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        let body = body.to_string().into_bytes();
        self.send(Method::POST, url, headers, Some(body)).await.unwrap_or_else(|e| panic!("POST {url}: {e}"))
    }

    /// POST `/ctrl/connect` at a controller. Panics if no answer comes.
    pub async fn connect(&self, controller: &str, request: &ConnectRequest) -> Answer {
        let body = serde_json::to_value(request).expect("a request as JSON");
        self.post(&format!("{controller}/ctrl/connect"), &body).await
    }
}
