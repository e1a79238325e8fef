//! A backend's statuses as they come, over as many connections as it takes.

use crate::client::Client;
use crate::error::ClientError;
use crate::policy::backoff_ms;
use crate::sse::Parser;
use crate::transport::{Body, with_causes};
use futures::{Stream, stream};
use holdfast_wire::BackendStatus;
use holdfast_wire::http::BackendStatusMessage;
use reqwest::Response;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// A stream over which nothing comes for this long, not even a comment, is opened anew: the controller at the other
/// end may be cut off from the others.
const SILENCE: Duration = Duration::from_secs(30);

struct Follow {
    client: Client,
    backend: String,
    last: Option<BackendStatus>,
    open: Option<Open>,
    /// Connections since the last new status.
    quiet_rounds: u32,
    ended: bool,
}

struct Open {
    url: String,
    response: Response,
    parser: Parser,
}

/// See [`Client::status_stream`].
pub(crate) fn follow(
    client: Client,
    backend: String,
) -> impl Stream<Item = Result<BackendStatusMessage, ClientError>> {
    let follow = Follow { client, backend, last: None, open: None, quiet_rounds: 0, ended: false };
    stream::unfold(follow, |mut follow| async move {
        if follow.ended {
            return None;
        }
        let next = follow.next().await;
        follow.ended = next.as_ref().map_or(true, |m| m.status == BackendStatus::Terminated);
        Some((next, follow))
    })
}

impl Follow {
    async fn next(&mut self) -> Result<BackendStatusMessage, ClientError> {
        loop {
            let Some(open) = &mut self.open else {
                self.reopen().await?;
                continue;
            };
            while let Some(event) = open.parser.next() {
                let message: BackendStatusMessage = serde_json::from_str(&event.data).map_err(|error| {
                    ClientError::BadResponse { url: open.url.clone(), detail: error.to_string() }
                })?;
                // A controller that ignored `Last-Event-ID` begins again with the history.
                if self.last.is_none_or(|last| message.status > last) {
                    self.last = Some(message.status);
                    self.quiet_rounds = 0;
                    return Ok(message);
                }
            }
            match timeout(SILENCE, open.response.chunk()).await {
                Ok(Ok(Some(bytes))) => open.parser.push(&bytes).map_err(|error| {
                    ClientError::BadResponse { url: open.url.clone(), detail: error.to_string() }
                })?,
                Ok(Ok(None)) => self.open = None,
                Ok(Err(error)) => {
                    tracing::debug!(url = %open.url, error = %with_causes(&error), "status stream broke");
                    self.open = None;
                }
                Err(_) => self.open = None,
            }
        }
    }

    async fn reopen(&mut self) -> Result<(), ClientError> {
        if self.quiet_rounds > 0 {
            sleep(Duration::from_millis(backoff_ms(self.quiet_rounds, rand::random()))).await;
        }
        self.quiet_rounds = self.quiet_rounds.saturating_add(1);
        let reply = self.client.open_status_stream(&self.backend, self.last).await?;
        if let Body::Stream(response) = reply.body {
            self.open = Some(Open { url: reply.url, response, parser: Parser::default() });
        }
        Ok(())
    }
}
