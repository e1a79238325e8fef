//! `holdfast connect`.

use crate::args::ConnectArgs;
use crate::backends::word;
use crate::error::CliError;
use crate::format::{clean, duration, key, yes_no};
use crate::output::{Out, fields};
use futures::{Stream, TryStreamExt};
use holdfast_client::wire::http::{BackendStatusMessage, ConnectRequest, ConnectResponse, SpawnConfig};
use holdfast_client::wire::{BackendStatus, KeyConfig};
use holdfast_client::{Client, ClientError, RequestOptions};
use serde_json::{Map, json};
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;
use tokio::time::{Instant, timeout};

pub(crate) async fn run(client: &Client, args: ConnectArgs, out: &Out) -> Result<(), CliError> {
    let request = request(&args)?;
    let client = client
        .with_options(RequestOptions { retry_no_drone: args.wait_for_drone, ..client.options().clone() });
    let mut response = client.connect(&request).await?;
    if !args.wait {
        return if out.json { out.json(&response) } else { out.text(&shown(&response)) };
    }
    if !out.json {
        out.text(&shown(&ConnectResponse { address: None, ..response.clone() }))?;
    }
    let end = wait(&client, &mut response, Duration::from_millis(args.wait_timeout_ms), out).await;
    match (&end, response.address) {
        // What is known is printed whatever the end.
        _ if out.json => out.json(&response)?,
        (Ok(()), Some(address)) => out.text(&address_line(address))?,
        _ => {}
    }
    end
}

/// The request that the command line describes.
fn request(args: &ConnectArgs) -> Result<ConnectRequest, CliError> {
    let env: Map<_, _> = args.env.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let executable = match &args.image {
        _ if !args.command.is_empty() => Some(json!({ "command": args.command, "env": env })),
        Some(image) => Some(json!({ "image": image, "env": env })),
        None => None,
    };
    let named = !args.namespace.is_empty() || !args.tag.is_empty();
    let key = match &args.key {
        Some(name) => Some(name.clone()),
        // The service makes up a name, but only for a key without namespace and tag.
        None if named => Some(format!("lk-{:032x}", rand::random::<u128>())),
        None => None,
    };
    if executable.is_none() {
        if args.key.is_none() {
            return Err(CliError::Usage("without --key there must be an --image or a -- COMMAND".to_owned()));
        }
        let unused = [
            ("--env", !args.env.is_empty()),
            ("--pool", !args.pool.is_empty()),
            ("--cluster", args.cluster.is_some()),
        ];
        if let Some((flag, _)) = unused.into_iter().find(|(_, given)| *given) {
            return Err(CliError::Usage(format!("{flag} is of no use without an --image or a -- COMMAND")));
        }
    }
    Ok(ConnectRequest {
        key: key.map(|name| KeyConfig { name, namespace: args.namespace.clone(), tag: args.tag.clone() }),
        spawn_config: executable.map(|executable| SpawnConfig {
            id: None,
            cluster: args.cluster.clone(),
            pool: args.pool.clone(),
            executable,
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            use_static_token: false,
            subdomain: None,
        }),
        user: args.user.clone(),
        auth: Map::new(),
        wait_ms: args.wait_for_key_ms,
    })
}

fn shown(response: &ConnectResponse) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let mut rows = vec![
        ("backend", response.backend_id.clone()),
        ("spawned", yes_no(response.spawned)),
        ("status", response.status.to_string()),
        ("key", key(&response.key.namespace, &response.key.name)),
        ("tag", clean(&response.key.tag).into_owned()),
        ("fencing token", response.fencing_token.to_string()),
        ("token", response.token.clone()),
        ("secret token", text(&response.secret_token)),
        ("url", clean(&response.url).into_owned()),
        ("status url", clean(&response.status_url).into_owned()),
        ("drone", text(&response.drone)),
    ];
    if let Some(address) = response.address {
        rows.push(("address", address.to_string()));
    }
    fields(&rows)
}

/// As wide as the fields above it.
fn address_line(address: SocketAddr) -> String {
    format!("{:13}  {address}", "address")
}

/// Follows the backend until it is ready, and fills in its status and address as they become known.
async fn wait(
    client: &Client,
    response: &mut ConnectResponse,
    limit: Duration,
    out: &Out,
) -> Result<(), CliError> {
    if response.status == BackendStatus::Ready && response.address.is_some() {
        return Ok(());
    }
    response.address = None;
    let stream = client.status_stream(&response.backend_id);
    match timeout(limit, follow(client, stream, response, out)).await {
        Ok(end) => end,
        Err(_) => Err(CliError::Failed(format!(
            "{} is not ready after {}; it is {}",
            response.backend_id,
            duration(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            response.status
        ))),
    }
}

async fn follow(
    client: &Client,
    stream: impl Stream<Item = Result<BackendStatusMessage, ClientError>>,
    response: &mut ConnectResponse,
    out: &Out,
) -> Result<(), CliError> {
    let begun = Instant::now();
    let mut stream = pin!(stream);
    while let Some(message) = stream.try_next().await? {
        let waited_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        out.note(&format!("{:>7}  {}", duration(waited_ms), described(&message)));
        response.status = message.status;
        match message.status {
            BackendStatus::Terminated => {
                return Err(CliError::Failed(format!(
                    "{} ended before it was ready: {}",
                    response.backend_id,
                    described(&message)
                )));
            }
            // The stream does not tell the address. A backend that was ready once may be on its way out by now: then
            // it has none, and the stream goes on.
            BackendStatus::Ready => {
                if let Some(info) = client.backend(&response.backend_id).await?
                    && let Some(address) = info.address
                {
                    response.address = Some(address);
                    return Ok(());
                }
            }
            _ => {}
        }
    }
    Err(CliError::Failed(format!("the statuses of {} broke off", response.backend_id)))
}

/// A status with what is known of its cause.
fn described(message: &BackendStatusMessage) -> String {
    let mut text = message.status.to_string();
    let mut causes = Vec::new();
    if let Some(kind) = message.termination_kind {
        causes.push(word(&kind));
    }
    if let Some(reason) = message.termination_reason {
        causes.push(word(&reason));
    }
    if message.exit_error == Some(true) {
        causes.push("exited with an error".to_owned());
    }
    if !causes.is_empty() {
        text.push_str(&format!(" ({})", causes.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;
    use holdfast_client::wire::{TerminationKind, TerminationReason};

    fn parsed(argv: &[&str]) -> Result<ConnectRequest, CliError> {
        match Cli::parse_from(["holdfast", "connect"].iter().chain(argv)).command {
            Command::Connect(args) => request(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_request_is_what_the_command_line_says() {
        let request = parsed(&[
            "--key",
            "k",
            "--tag",
            "t",
            "--pool",
            "p",
            "--env",
            "A=1",
            "--wait-for-key",
            "5s",
            "--",
            "sh",
            "-c",
            "x",
        ])
        .unwrap();
        let spawn = request.spawn_config.unwrap();
        assert_eq!(spawn.executable, json!({"command": ["sh", "-c", "x"], "env": {"A": "1"}}));
        assert_eq!((spawn.pool.as_str(), spawn.cluster, request.wait_ms), ("p", None, Some(5_000)));
        assert_eq!(
            request.key.unwrap(),
            KeyConfig { name: "k".into(), namespace: String::new(), tag: "t".into() }
        );
        let image = parsed(&["--image", "nginx"]).unwrap();
        assert_eq!(image.spawn_config.unwrap().executable, json!({"image": "nginx", "env": {}}));
        assert_eq!(image.key, None);
    }

    #[test]
    fn a_namespace_or_tag_without_a_key_gets_a_random_name() {
        let name = |argv: &[&str]| parsed(argv).unwrap().key.unwrap().name;
        let (a, b) = (name(&["--namespace", "n", "--", "x"]), name(&["--tag", "t", "--", "x"]));
        assert!(a.starts_with("lk-") && b.starts_with("lk-") && a != b);
    }

    #[test]
    fn flags_that_would_do_nothing_are_refused() {
        for bad in [&[][..], &["--key", "k", "--env", "A=1"], &["--key", "k", "--pool", "p"]] {
            assert!(matches!(parsed(bad), Err(CliError::Usage(_))), "{bad:?}");
        }
        assert!(parsed(&["--key", "k"]).unwrap().spawn_config.is_none());
    }

    #[test]
    fn an_end_is_told_with_its_cause() {
        let message = BackendStatusMessage {
            status: BackendStatus::Terminated,
            termination_reason: Some(TerminationReason::KeyExpired),
            termination_kind: Some(TerminationKind::Hard),
            exit_error: Some(true),
            time: 1,
        };
        assert_eq!(described(&message), "terminated (hard, keyexpired, exited with an error)");
    }
}
