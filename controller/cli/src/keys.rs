//! `holdfast keys`.

use crate::args::{KeyArgs, KeysCommand};
use crate::error::CliError;
use crate::format::{clean, duration, key, time, time_left, yes_no};
use crate::listing;
use crate::output::{Column, Out, fields};
use holdfast_client::wire::http::KeyInfo;
use holdfast_client::{Client, KeyFilter};
use serde_json::json;

const COLUMNS: [Column; 8] = [
    Column::Maybe("NAMESPACE"),
    Column::Left("NAME"),
    Column::Maybe("TAG"),
    Column::Left("BACKEND"),
    Column::Left("DRONE"),
    Column::Right("TOKEN"),
    Column::Left("RENEWS"),
    Column::Right("EXPIRES IN"),
];

pub(crate) async fn run(client: &Client, command: KeysCommand, out: &Out) -> Result<(), CliError> {
    match command {
        KeysCommand::List { namespace, prefix, limit } => {
            let filter = KeyFilter { namespace, prefix, page_rows: listing::page_rows(limit.rows) };
            let keys = listing::collect(client.keys(filter), limit.rows, out).await?;
            listing::print(&keys, out, "no keys held", &COLUMNS, row)
        }
        KeysCommand::Show(KeyArgs { name, namespace }) => {
            let info = client.key(&name, &namespace).await?;
            if out.json { out.json(&info) } else { out.text(&shown(&info)) }
        }
        KeysCommand::PreventRenewal(KeyArgs { name, namespace }) => {
            client.prevent_renewal(&name, &namespace).await?;
            done(out, &name, &namespace, "will not be renewed; its backend ends on the lease timeline")
        }
        KeysCommand::AllowRenewal(KeyArgs { name, namespace }) => {
            client.allow_renewal(&name, &namespace).await?;
            done(out, &name, &namespace, "may be renewed")
        }
        KeysCommand::Revoke(KeyArgs { name, namespace }) => {
            client.revoke_key(&name, &namespace).await?;
            done(out, &name, &namespace, "is free")
        }
    }
}

fn done(out: &Out, name: &str, namespace: &str, what: &str) -> Result<(), CliError> {
    if out.json {
        out.json(&json!({ "name": name, "namespace": namespace }))
    } else {
        out.text(&format!("{} {what}", key(namespace, name)))
    }
}

fn row(info: &KeyInfo) -> Vec<String> {
    vec![
        clean(&info.namespace).into_owned(),
        clean(&info.name).into_owned(),
        clean(&info.tag).into_owned(),
        info.backend.clone(),
        info.drone.clone(),
        info.token.to_string(),
        yes_no(info.allow_renew),
        time_left(info.expires_in_ms),
    ]
}

fn shown(info: &KeyInfo) -> String {
    let held_ms = info.expires_at.saturating_add_signed(-info.expires_in_ms).saturating_sub(info.acquired_at);
    fields(&[
        ("name", clean(&info.name).into_owned()),
        ("namespace", clean(&info.namespace).into_owned()),
        ("tag", clean(&info.tag).into_owned()),
        ("backend", info.backend.clone()),
        ("drone", info.drone.clone()),
        ("fencing token", info.token.to_string()),
        ("renews", yes_no(info.allow_renew)),
        ("acquired", format!("{} ({} ago)", time(info.acquired_at), duration(held_ms))),
        (
            "expires",
            match info.expires_in_ms {
                1.. => format!("in {}", time_left(info.expires_in_ms)),
                _ => time_left(info.expires_in_ms),
            },
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_with_its_times() {
        let mut info = KeyInfo {
            name: "room".into(),
            namespace: String::new(),
            tag: "t".into(),
            backend: "ba-1".into(),
            drone: "dr-a".into(),
            token: 7,
            allow_renew: false,
            acquired_at: 1_000,
            expires_at: 61_000,
            expires_in_ms: 42_000,
        };
        assert_eq!(
            shown(&info),
            "name           room\ntag            t\nbackend        ba-1\ndrone          dr-a\nfencing token  7\n\
             renews         no\nacquired       1970-01-01T00:00:01Z (18s ago)\nexpires        in 42s"
        );
        info.expires_in_ms = -1;
        assert!(shown(&info).ends_with("expired"));
    }
}
