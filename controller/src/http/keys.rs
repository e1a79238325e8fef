//! Keys: listing, showing, and steering their renewal.

use super::args::{QueryArgs, Write, bad_cursor, encode_cursor};
use super::error::Failure;
use super::{Replayable, scan};
use crate::app::App;
use axum::Json;
use axum::extract::State;
use holdfast_core::command::Command;
use holdfast_core::kv::ReadState;
use holdfast_core::outcome::{Outcome, Refusal};
use holdfast_core::view::{NamedKey, View};
use holdfast_wire::http::{DrainResult, KeyInfo, KeyName, KeyPage};
use holdfast_wire::limits::{KEY_NAME_BYTES_MAX, KEY_NAMESPACE_BYTES_MAX};
use holdfast_wire::names::check_text;
use std::collections::HashMap;

/// Between the two parts of a cursor; neither can hold it.
const SEPARATOR: char = '\0';

fn info<R: ReadState>(
    view: &View<R>,
    now_ms: u64,
    drones: &mut HashMap<i32, String>,
    key: NamedKey,
) -> Result<KeyInfo, Failure> {
    let record = key.record;
    let drone = match drones.get(&record.drone_id) {
        Some(name) => name.clone(),
        None => {
            let name = view.drone(record.drone_id)?.map(|drone| drone.name).unwrap_or_default();
            drones.insert(record.drone_id, name.clone());
            name
        }
    };
    Ok(KeyInfo {
        name: key.name,
        namespace: key.namespace,
        tag: record.tag,
        backend: record.backend_id,
        drone,
        token: record.token,
        allow_renew: record.allow_renew,
        acquired_at: record.acquired_at_ms,
        expires_at: record.expires_at_ms,
        expires_in_ms: remaining_ms(record.expires_at_ms, now_ms),
    })
}

/// Negative once past.
fn remaining_ms(until_ms: u64, now_ms: u64) -> i64 {
    let clamp = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    clamp(until_ms.saturating_sub(now_ms)) - clamp(now_ms.saturating_sub(until_ms))
}

/// GET `/ctrl/keys?namespace=&prefix=&limit=&cursor=`. Without a namespace: of all.
pub async fn list(State(app): State<App>, query: QueryArgs) -> Result<Json<KeyPage>, Failure> {
    let namespace = query.text("namespace")?.map(str::to_owned);
    if let Some(namespace) = &namespace {
        check_text("namespace", namespace, KEY_NAMESPACE_BYTES_MAX)?;
    }
    let prefix = query.text("prefix")?.unwrap_or_default().to_owned();
    check_text("prefix", &prefix, KEY_NAME_BYTES_MAX)?;
    let limit = query.limit()?;
    let cursor = match query.cursor()? {
        Some(text) => {
            let (namespace, name) = text.split_once(SEPARATOR).ok_or_else(bad_cursor)?;
            Some((namespace.to_owned(), name.to_owned()))
        }
        None => None,
    };
    let point = app.read(query.consistency()?).await?;
    let page = scan(move || {
        let from = cursor.as_ref().map(|(namespace, name)| (namespace.as_str(), name.as_str()));
        let (rows, next) = point.view.keys(namespace.as_deref(), &prefix, from, limit)?;
        let mut drones = HashMap::new();
        let keys = rows
            .into_iter()
            .map(|key| info(&point.view, point.now_ms, &mut drones, key))
            .collect::<Result<Vec<_>, _>>()?;
        let next_cursor =
            next.map(|(namespace, name)| encode_cursor(&format!("{namespace}{SEPARATOR}{name}")));
        Ok(KeyPage { keys, next_cursor })
    });
    Ok(Json(page.await?))
}

/// `name` and `namespace` of the query.
fn key_in_query(query: &QueryArgs) -> Result<(String, String), Failure> {
    let name = query.text("name")?.ok_or_else(|| Failure::invalid("name", "is missing"))?;
    let namespace = query.text("namespace")?.unwrap_or_default();
    check_key(name, namespace)?;
    Ok((namespace.to_owned(), name.to_owned()))
}

fn check_key(name: &str, namespace: &str) -> Result<(), Failure> {
    if name.is_empty() {
        return Err(Failure::invalid("name", "must not be empty"));
    }
    check_text("name", name, KEY_NAME_BYTES_MAX)?;
    check_text("namespace", namespace, KEY_NAMESPACE_BYTES_MAX)?;
    Ok(())
}

/// GET `/ctrl/key?name=&namespace=`.
pub async fn show(State(app): State<App>, query: QueryArgs) -> Result<Json<KeyInfo>, Failure> {
    let (namespace, name) = key_in_query(&query)?;
    let point = app.read(query.consistency()?).await?;
    let record = point.view.key(&namespace, &name)?.ok_or(Refusal::NoSuchKey)?;
    let key = NamedKey { namespace, name, record };
    Ok(Json(info(&point.view, point.now_ms, &mut HashMap::new(), key)?))
}

/// Proposes a command whose answer is whether anything changed.
pub(super) async fn update(
    app: &App,
    command: Command,
    write: Write,
) -> Result<Replayable<Json<DrainResult>>, Failure> {
    let answer = app.propose(command, write.idempotency).await?;
    match answer.outcome {
        Outcome::Updated(updated) => {
            Ok(Replayable { body: Json(DrainResult { updated, remaining: None }), replayed: answer.replayed })
        }
        Outcome::Drained { updated, remaining } => {
            let body = Json(DrainResult { updated, remaining: Some(remaining) });
            Ok(Replayable { body, replayed: answer.replayed })
        }
        other => Err(Failure::unexpected(&other)),
    }
}

async fn allow(app: &App, write: Write, allow: bool) -> Result<Replayable<Json<DrainResult>>, Failure> {
    let key: KeyName = write.json()?;
    check_key(&key.name, &key.namespace)?;
    update(app, Command::SetAllowRenew { namespace: key.namespace, name: key.name, allow }, write).await
}

/// POST `/ctrl/key/prevent-renewal`.
pub async fn prevent_renewal(
    State(app): State<App>,
    write: Write,
) -> Result<Replayable<Json<DrainResult>>, Failure> {
    allow(&app, write, false).await
}

/// POST `/ctrl/key/allow-renewal`.
pub async fn allow_renewal(
    State(app): State<App>,
    write: Write,
) -> Result<Replayable<Json<DrainResult>>, Failure> {
    allow(&app, write, true).await
}

/// DELETE `/ctrl/key?name=&namespace=`.
pub async fn revoke(
    State(app): State<App>,
    query: QueryArgs,
    write: Write,
) -> Result<Replayable<Json<DrainResult>>, Failure> {
    let (namespace, name) = key_in_query(&query)?;
    write.ignored_body()?;
    update(&app, Command::RevokeKey { namespace, name }, write).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_remains_of_a_lease_is_negative_once_past() {
        assert_eq!(remaining_ms(10, 3), 7);
        assert_eq!(remaining_ms(3, 10), -7);
        assert_eq!(remaining_ms(u64::MAX, 0), i64::MAX);
    }
}
