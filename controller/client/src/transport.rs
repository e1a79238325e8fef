//! Sends one request as often as [`crate::policy`] says. IO, and nothing that decides.

use crate::error::ClientError;
use crate::policy::{AttemptOutcome, Decision, Plan, RequestOptions};
use crate::targets::Targets;
use bytes::{Bytes, BytesMut};
use holdfast_wire::http::{ClusterInfo, IDEMPOTENCY_HEADER, LEADER_HEADER, MEMBERS_HEADER};
use holdfast_wire::{ApiError, ApiErrorKind};
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{Method, Response, Url};
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Time for a TCP connection to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection over which nothing came for this long is probed, so that a machine that is gone is noticed long before
/// a long attempt's time-out.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(2);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// Probes without an answer after which the connection is given up.
const KEEPALIVE_PROBES: u32 = 3;
/// A connection whose sent bytes are not acknowledged for this long is given up.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a controller may take to name the members.
const MEMBERS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an unused connection is kept.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest answer that is read, in bytes: a full page of the longest keys is about 5 MiB.
const RESPONSE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How much of an answer that is not understood is shown, in bytes.
const EXCERPT_BYTES_MAX: usize = 200;

/// One request, before it is known where it goes.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// Path segments, not yet escaped.
    pub(crate) path: Vec<String>,
    pub(crate) query: Vec<(&'static str, String)>,
    /// JSON.
    pub(crate) body: Option<Bytes>,
    pub(crate) last_event_id: Option<String>,
    /// Whether it can take effect.
    pub(crate) changes_state: bool,
    pub(crate) idempotency_key: Option<String>,
    /// Time-out of one attempt, in milliseconds: of the whole answer, or of the head of a stream.
    pub(crate) attempt_ms: u64,
    /// Hand the body on as it comes.
    pub(crate) stream: bool,
}

/// A successful answer.
#[derive(Debug)]
pub(crate) struct Reply {
    /// Who gave it.
    pub(crate) url: String,
    pub(crate) body: Body,
}

#[derive(Debug)]
pub(crate) enum Body {
    Whole(Bytes),
    Stream(Response),
}

impl Reply {
    /// Reads the body as JSON; an empty one as `null`.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        let Body::Whole(body) = &self.body else {
            return Err(ClientError::BadResponse { url: self.url.clone(), detail: "is a stream".to_owned() });
        };
        let body: &[u8] = if body.is_empty() { b"null" } else { body };
        serde_json::from_slice(body).map_err(|error| ClientError::BadResponse {
            url: self.url.clone(),
            detail: format!("{error} in {:?}", excerpt(body)),
        })
    }
}

/// What one attempt brought.
enum Attempt {
    Answered(Body),
    Refused(ApiError, u16, Option<u64>),
    NotConnected(String),
    Lost(String),
    Garbled(String),
}

impl Attempt {
    fn outcome(&self) -> AttemptOutcome {
        match self {
            Self::Answered(_) => AttemptOutcome::Answered,
            Self::Refused(error, _, retry_after_ms) => {
                AttemptOutcome::Refused { kind: error.kind, retry_after_ms: *retry_after_ms }
            }
            Self::NotConnected(_) => AttemptOutcome::NotConnected,
            Self::Lost(_) => AttemptOutcome::Lost,
            Self::Garbled(_) => AttemptOutcome::Garbled,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Answered(_) => "it was answered".to_owned(),
            Self::Refused(error, ..) => error.message.clone(),
            Self::NotConnected(detail) | Self::Lost(detail) | Self::Garbled(detail) => detail.clone(),
        }
    }
}

/// A random `Idempotency-Key`: 128 bits.
pub fn random_idempotency_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// What all clones of a client share.
#[derive(Debug)]
pub(crate) struct Transport {
    http: reqwest::Client,
    targets: Arc<Mutex<Targets>>,
    epoch: Instant,
}

impl Transport {
    pub(crate) fn new(urls: Vec<String>) -> Result<Self, ClientError> {
        let first_url = urls.first().cloned().unwrap_or_default();
        let targets = Targets::new(urls)?;
        let http = reqwest::Client::builder()
            // Controllers are asked directly: a proxy would turn every connection error into an answer of its own.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .tcp_keepalive(KEEPALIVE_IDLE)
            .tcp_keepalive_interval(KEEPALIVE_INTERVAL)
            .tcp_keepalive_retries(KEEPALIVE_PROBES)
            .tcp_user_timeout(TCP_USER_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .build()
            .map_err(|error| ClientError::BadUrl { url: first_url, problem: with_causes(&error) })?;
        Ok(Self { http, targets: Arc::new(Mutex::new(targets)), epoch: Instant::now() })
    }

    /// Sends `call` until something definite is known or `options` say to give up.
    pub(crate) async fn run(&self, call: &Call, options: &RequestOptions) -> Result<Reply, ClientError> {
        let mut plan = Plan::new(options, call.changes_state, self.now_ms());
        let first = self.lock_targets().order(self.now_ms()).into_iter().next();
        let Some(mut url) = first else {
            return Err(ClientError::Unreachable { detail: "no controller is configured".to_owned() });
        };
        loop {
            let (attempt, leader) = self.attempt(call, &url).await;
            let decision = self.decide(&mut plan, &url, &attempt, leader.as_deref());
            match (decision, attempt) {
                (Decision::Retry { url: next, delay_ms }, attempt) => {
                    tracing::debug!(
                        at = %url, %next, delay_ms, path = %call.path.join("/"), why = %attempt.detail(),
                        "sending the request again"
                    );
                    if delay_ms > 0 {
                        sleep(Duration::from_millis(delay_ms)).await;
                    }
                    url = next;
                }
                (Decision::OutcomeUnknown, attempt) => {
                    return Err(ClientError::OutcomeUnknown {
                        detail: format!("{url}: {}", attempt.detail()),
                    });
                }
                (Decision::Unreachable, attempt) => {
                    return Err(ClientError::Unreachable { detail: format!("{url}: {}", attempt.detail()) });
                }
                (Decision::Done, Attempt::Answered(body)) => return Ok(Reply { url, body }),
                (Decision::Done, Attempt::Refused(error, status, _)) => {
                    return Err(ClientError::Refused(error, status));
                }
                (Decision::Done, attempt) => {
                    return Err(ClientError::BadResponse { url, detail: attempt.detail() });
                }
            }
        }
    }

    /// Sends `call` once, to `url` and nobody else.
    pub(crate) async fn once(&self, call: &Call, url: &str) -> Result<Reply, ClientError> {
        match self.attempt(call, url).await.0 {
            Attempt::Answered(body) => Ok(Reply { url: url.to_owned(), body }),
            Attempt::Refused(error, status, _) => Err(ClientError::Refused(error, status)),
            Attempt::NotConnected(detail) => Err(ClientError::Unreachable { detail }),
            Attempt::Lost(detail) if call.changes_state => Err(ClientError::OutcomeUnknown { detail }),
            Attempt::Lost(detail) => Err(ClientError::Unreachable { detail }),
            Attempt::Garbled(detail) => Err(ClientError::BadResponse { url: url.to_owned(), detail }),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock_targets(&self) -> MutexGuard<'_, Targets> {
        // Nothing in there panics half-way through a change, so a poisoned lock still guards a sound list.
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn decide(&self, plan: &mut Plan, url: &str, attempt: &Attempt, leader: Option<&str>) -> Decision {
        let now_ms = self.now_ms();
        let mut targets = self.lock_targets();
        match attempt {
            Attempt::NotConnected(_) | Attempt::Lost(_) => targets.failed(url, now_ms),
            Attempt::Refused(error, ..) if error.kind == ApiErrorKind::NoLeader => targets.leaderless(url),
            _ => targets.answered(url, leader),
        }
        plan.decide(url, attempt.outcome(), &targets, now_ms, rand::random::<f64>())
    }

    async fn attempt(&self, call: &Call, url: &str) -> (Attempt, Option<String>) {
        let request = match self.request(call, url) {
            Ok(request) => request,
            Err(detail) => return (Attempt::Garbled(detail), None),
        };
        let limit = Duration::from_millis(call.attempt_ms);
        let mut leader = None;
        let exchange = async {
            let response = match self.http.execute(request).await {
                Ok(response) => response,
                Err(error) if error.is_connect() => return Attempt::NotConnected(with_causes(&error)),
                Err(error) => return Attempt::Lost(with_causes(&error)),
            };
            leader = header(&response, LEADER_HEADER);
            if let Some(version) = header(&response, MEMBERS_HEADER).and_then(|text| text.parse().ok()) {
                self.learn_members(url, version);
            }
            read(response, call.stream).await
        };
        let attempt = match timeout(limit, exchange).await {
            Ok(attempt) => attempt,
            Err(_) => Attempt::Lost(format!("no answer within {} ms", call.attempt_ms)),
        };
        (attempt, leader)
    }

    /// The membership of that number may be news: asks the one who said so for it, beside the requests.
    fn learn_members(&self, url: &str, version: u64) {
        if !self.lock_targets().wants_members(version, self.now_ms()) {
            return;
        }
        let (http, targets) = (self.http.clone(), Arc::clone(&self.targets));
        let question = format!("{url}/ctrl/cluster?consistency=local");
        tokio::spawn(async move {
            let answer = timeout(MEMBERS_TIMEOUT, async {
                let body = read_bounded(http.get(question).send().await.ok()?).await.ok()?;
                serde_json::from_slice::<ClusterInfo>(&body).ok()
            });
            // Without an answer the next request asks again.
            let Ok(Some(info)) = answer.await else { return };
            let urls: Vec<String> = info.members.iter().filter_map(|member| member.url.clone()).collect();
            let complete = urls.len() == info.members.len();
            targets.lock().unwrap_or_else(PoisonError::into_inner).set_members(version, &urls, complete);
        });
    }

    fn request(&self, call: &Call, url: &str) -> Result<reqwest::Request, String> {
        let mut full = Url::parse(url).map_err(|error| error.to_string())?;
        match full.path_segments_mut() {
            Ok(mut segments) => {
                segments.pop_if_empty().extend(&call.path);
            }
            Err(()) => return Err("the URL can't have a path".to_owned()),
        }
        if !call.query.is_empty() {
            full.query_pairs_mut().extend_pairs(&call.query);
        }
        let mut request = self.http.request(call.method.clone(), full);
        if let Some(body) = &call.body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.clone());
        }
        if let Some(key) = &call.idempotency_key {
            request = request.header(IDEMPOTENCY_HEADER, key);
        }
        if let Some(id) = &call.last_event_id {
            request = request.header("last-event-id", id);
        }
        request.build().map_err(|error| with_causes(&error))
    }
}

async fn read(response: Response, stream: bool) -> Attempt {
    let status = response.status();
    if status.is_success() && stream {
        return Attempt::Answered(Body::Stream(response));
    }
    // Only whole seconds: the form with a date needs a clock that agrees with the other side's.
    let retry_after_ms = header(&response, RETRY_AFTER.as_str())
        .and_then(|seconds| seconds.trim().parse::<u64>().ok())
        .map(|seconds| seconds.saturating_mul(1_000));
    let body = match read_bounded(response).await {
        Ok(body) => body,
        Err(attempt) => return attempt,
    };
    if status.is_success() {
        return Attempt::Answered(Body::Whole(body));
    }
    match serde_json::from_slice::<ApiError>(&body) {
        Ok(error) => Attempt::Refused(error, status.as_u16(), retry_after_ms),
        Err(_) => {
            let detail = format!("status {}: {:?}", status.as_u16(), excerpt(&body));
            match status.as_u16() {
                // Something between here and the controller lost it.
                502..=504 => Attempt::Lost(detail),
                _ => Attempt::Garbled(detail),
            }
        }
    }
}

async fn read_bounded(mut response: Response) -> Result<Bytes, Attempt> {
    let mut body = BytesMut::new();
    loop {
        match response.chunk().await {
            Ok(None) => return Ok(body.freeze()),
            Ok(Some(chunk)) if body.len() + chunk.len() > RESPONSE_BYTES_MAX => {
                return Err(Attempt::Garbled(format!(
                    "the answer is longer than {RESPONSE_BYTES_MAX} bytes"
                )));
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Err(error) => return Err(Attempt::Lost(with_causes(&error))),
        }
    }
}

fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(body.get(..EXCERPT_BYTES_MAX).unwrap_or(body)).into_owned()
}

/// The last cause is what people need ("connection refused"); reqwest's own words only repeat the URL.
pub(crate) fn with_causes(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
