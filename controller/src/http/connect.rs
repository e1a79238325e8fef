//! `POST /ctrl/connect`; the work is in [`crate::connect`].

use super::Replayable;
use super::args::Write;
use super::error::Failure;
use crate::app::App;
use axum::Json;
use axum::extract::State;
use holdfast_wire::http::ConnectResponse;

pub async fn connect(
    State(app): State<App>,
    write: Write,
) -> Result<Replayable<Json<ConnectResponse>>, Failure> {
    let request = write.json()?;
    let connected = crate::connect::connect(&app, request, write.idempotency).await?;
    Ok(Replayable { body: Json(connected.response), replayed: connected.replayed })
}
