//! What a request brings: path, query, headers and body, each refused with an [`ApiError`](holdfast_wire::ApiError) that names what is wrong.

use super::error::Failure;
use axum::body::{Body, HttpBody};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use holdfast_core::command::Idempotency;
use holdfast_wire::http::IDEMPOTENCY_HEADER;
use holdfast_wire::limits::{BODY_BYTES_MAX, IDEMPOTENCY_KEY_BYTES_MAX, LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX};
use holdfast_wire::names::check_name;
use holdfast_wire::{ApiErrorKind, FieldError};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::time::Duration;

/// How much of a body that is too long is read and thrown away, so that the caller is still there to read the answer.
const DRAIN_BYTES_MAX: usize = 64 * 1024 * 1024;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest query parameter, in bytes. Beyond every name's own bound.
const PARAMETER_BYTES_MAX: usize = 4096;

/// Path parameters.
pub struct PathArgs<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for PathArgs<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Path(args) = Path::<T>::from_request_parts(parts, state).await.map_err(|e: PathRejection| {
            Failure::new(ApiErrorKind::InvalidRequest, format!("path: {}", e.body_text()))
        })?;
        Ok(Self(args))
    }
}

/// A backend's name from a path. One that breaks the rules cannot exist.
pub fn backend_in_path(id: &str) -> Result<&str, Failure> {
    match check_name("backend", id) {
        Ok(()) => Ok(id),
        Err(_) => Err(Failure::not_found(format!("there is no backend {:?}", shortened(id)))),
    }
}

/// At most 64 characters of something that a stranger sent.
pub fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Sees everything that was acknowledged before.
    Linearizable,
    /// What this replica has.
    Local,
}

/// Query parameters.
#[derive(Debug, Default)]
pub struct QueryArgs(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for QueryArgs {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Query(args) = Query::<BTreeMap<String, String>>::from_request_parts(parts, state)
            .await
            .map_err(|e| Failure::new(ApiErrorKind::InvalidRequest, format!("query: {}", e.body_text())))?;
        Ok(Self(args))
    }
}

impl QueryArgs {
    /// A parameter, if given and within its bound.
    pub fn text(&self, name: &'static str) -> Result<Option<&str>, Failure> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        holdfast_wire::names::check_text(name, value, PARAMETER_BYTES_MAX)?;
        Ok(Some(value))
    }

    /// `limit`: 1 to [`LIST_LIMIT_MAX`].
    pub fn limit(&self) -> Result<usize, Failure> {
        let Some(text) = self.text("limit")? else { return Ok(LIST_LIMIT_DEFAULT) };
        match text.parse::<usize>() {
            Ok(limit) if (1..=LIST_LIMIT_MAX).contains(&limit) => Ok(limit),
            _ => Err(Failure::invalid("limit", format!("must be a number from 1 to {LIST_LIMIT_MAX}"))),
        }
    }

    /// `cursor`, decoded.
    pub fn cursor(&self) -> Result<Option<String>, Failure> {
        let Some(text) = self.text("cursor")? else { return Ok(None) };
        URL_SAFE_NO_PAD
            .decode(text)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .map(Some)
            .ok_or_else(bad_cursor)
    }

    /// `consistency`: `linearizable` (default) or `local`.
    pub fn consistency(&self) -> Result<Consistency, Failure> {
        match self.text("consistency")? {
            None | Some("linearizable") => Ok(Consistency::Linearizable),
            Some("local") => Ok(Consistency::Local),
            Some(_) => Err(Failure::invalid("consistency", "must be linearizable or local")),
        }
    }
}

/// A cursor that none of ours is.
pub fn bad_cursor() -> Failure {
    Failure::invalid("cursor", "is not one that a listing gave")
}

/// Makes a cursor opaque.
pub fn encode_cursor(position: &str) -> String {
    URL_SAFE_NO_PAD.encode(position)
}

/// The body of a POST or DELETE, with what makes it safe to repeat.
pub struct Write {
    /// The body, at most [`BODY_BYTES_MAX`].
    pub body: Bytes,
    /// From the `Idempotency-Key` header.
    pub idempotency: Option<Idempotency>,
}

impl<S: Send + Sync> FromRequest<S> for Write {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        let key = idempotency_key(&parts.headers)?;
        // With `Expect` the caller waits for our word before it sends a body.
        let waits = parts.headers.contains_key(header::EXPECT);
        let body = tokio::time::timeout(BODY_TIMEOUT, read_body(body, waits))
            .await
            .map_err(|_| Failure::new(ApiErrorKind::InvalidRequest, "the body did not arrive in time"))??;
        let idempotency = key.map(|key| {
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            let body_digest = request_digest(parts.method.as_str(), target, &body);
            Idempotency { key, body_digest }
        });
        Ok(Self { body, idempotency })
    }
}

impl Write {
    /// The body as JSON of the expected shape, whatever its content type says.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        parse_object(&self.body)
    }

    /// For requests without a body: nothing, or any JSON.
    pub fn ignored_body(&self) -> Result<(), Failure> {
        if self.body.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        parse_json::<serde::de::IgnoredAny>(&self.body).map(|_| ())
    }
}

async fn read_body(body: Body, caller_waits: bool) -> Result<Bytes, Failure> {
    let too_large = || Failure::too_large(format!("the body is larger than {BODY_BYTES_MAX} bytes"));
    if caller_waits && body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let mut stream = body.into_data_stream();
    let mut kept = BytesMut::new();
    let mut seen_bytes = 0usize;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| {
            Failure::new(ApiErrorKind::InvalidRequest, format!("the body could not be read: {error}"))
        })?;
        seen_bytes = seen_bytes.saturating_add(chunk.len());
        if seen_bytes > DRAIN_BYTES_MAX {
            break;
        }
        if seen_bytes <= BODY_BYTES_MAX {
            kept.extend_from_slice(&chunk);
        }
    }
    if seen_bytes > BODY_BYTES_MAX { Err(too_large()) } else { Ok(kept.freeze()) }
}

/// Parses a JSON object; the error names the field.
fn parse_object<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    // serde would read the fields of an object from an array too.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(Failure::new(ApiErrorKind::InvalidRequest, "body: an object is expected, not an array"));
    }
    parse_json(body)
}

/// Parses JSON; the error names the field.
fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    let invalid = |message: String| Failure::new(ApiErrorKind::InvalidRequest, message);
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(invalid("body is empty, but JSON is expected".to_owned()));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner();
        match (problem.classify(), path.as_str()) {
            (serde_json::error::Category::Data, "." | "?") => invalid(format!("body: {problem}")),
            (serde_json::error::Category::Data, path) => invalid(format!("{path}: {problem}")),
            _ => invalid(format!("body is not JSON: {problem}")),
        }
    })?;
    json.end().map_err(|problem| invalid(format!("body is not JSON: {problem}")))?;
    Ok(value)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, FieldError> {
    let Some(value) = headers.get(IDEMPOTENCY_HEADER) else { return Ok(None) };
    let bytes = value.as_bytes();
    let valid =
        (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    match value.to_str() {
        Ok(key) if valid => Ok(Some(key.to_owned())),
        _ => Err(FieldError::new(
            "Idempotency-Key",
            format!("must be 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible ASCII characters"),
        )),
    }
}

/// What tells two requests under one `Idempotency-Key` apart. The parts are separated by a byte that none of the first
/// two can hold.
fn request_digest(method: &str, target: &str, body: &[u8]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(method);
    hash.update([0]);
    hash.update(target);
    hash.update([0]);
    hash.update(body);
    let full: [u8; 32] = hash.finalize().into();
    let mut digest = [0; 16];
    digest.copy_from_slice(&full[..16]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::http::ConnectRequest;

    fn args(pairs: &[(&str, &str)]) -> QueryArgs {
        QueryArgs(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn wrong_types_name_the_field() {
        for (body, named) in [
            (r#"{"key":{"name":5}}"#, "key.name"),
            (r#"{"key":{}}"#, "key"),
            (
                r#"{"spawn_config":{"executable":{},"lifetime_limit_seconds":"x"}}"#,
                "spawn_config.lifetime_limit_seconds",
            ),
            (r#"{"wait_ms":-1}"#, "wait_ms"),
            ("[]", "body"),
            ("{", "body is not JSON"),
            ("{} x", "body is not JSON"),
            ("", "body is empty"),
            ("\u{0}", "body is not JSON"),
        ] {
            let failure = parse_object::<ConnectRequest>(body.as_bytes()).unwrap_err();
            assert_eq!(failure.kind, ApiErrorKind::InvalidRequest);
            assert!(failure.message.starts_with(named), "{body}: {}", failure.message);
        }
        assert!(parse_object::<ConnectRequest>(br#"{"unknown":1}"#).is_ok());
    }

    #[test]
    fn bad_listing_parameters_name_themselves() {
        for (name, value) in [
            ("limit", "0"),
            ("limit", "1001"),
            ("limit", "x"),
            ("cursor", "?"),
            ("cursor", "_w"),
            ("consistency", "eventual"),
        ] {
            let given = args(&[(name, value)]);
            let failure = match name {
                "limit" => given.limit().map(|_| ()),
                "cursor" => given.cursor().map(|_| ()),
                _ => given.consistency().map(|_| ()),
            }
            .unwrap_err();
            assert!(failure.message.starts_with(name), "{}", failure.message);
        }
        assert_eq!(args(&[]).limit(), Ok(LIST_LIMIT_DEFAULT));
        assert_eq!(args(&[("consistency", "local")]).consistency(), Ok(Consistency::Local));
        assert_eq!(
            args(&[("cursor", &encode_cursor("ä\0b"))]).cursor(),
            Err(Failure::invalid("x", "")).or(Ok(Some("ä\0b".to_owned())))
        );
    }

    #[test]
    fn idempotency_keys_are_visible_ascii_within_the_bound() {
        let key = |text: &[u8]| {
            let value = axum::http::HeaderValue::from_bytes(text).unwrap();
            idempotency_key(&HeaderMap::from_iter([(
                axum::http::HeaderName::from_static(IDEMPOTENCY_HEADER),
                value,
            )]))
        };
        assert_eq!(key(b"a-1"), Ok(Some("a-1".to_owned())));
        for bad in [&b""[..], b"a b", "ä".as_bytes(), &[b'a'; 129]] {
            assert_eq!(key(bad).map_err(|e| e.field), Err("Idempotency-Key"));
        }
        assert_eq!(idempotency_key(&HeaderMap::new()), Ok(None));
    }

    #[test]
    fn another_method_path_query_or_body_is_another_request() {
        let base = request_digest("POST", "/a", b"{}");
        assert_eq!(base, request_digest("POST", "/a", b"{}"));
        for other in [
            request_digest("DELETE", "/a", b"{}"),
            request_digest("POST", "/a?b", b"{}"),
            request_digest("POST", "/a", b"{ }"),
        ] {
            assert_ne!(base, other);
        }
    }
}
