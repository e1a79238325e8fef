//! What all listings have in common.

use crate::error::CliError;
use crate::output::{Column, Out, table};
use futures::{Stream, StreamExt, TryStreamExt};
use holdfast_client::ClientError;
use holdfast_client::wire::limits::LIST_LIMIT_MAX;
use serde::Serialize;

/// Rows to ask for at once, if `limit` are to be shown and one more tells whether there are more.
pub(crate) fn page_rows(limit: usize) -> Option<usize> {
    Some(limit.saturating_add(1).min(LIST_LIMIT_MAX))
}

/// The first `limit` rows, and a remark if there are more.
pub(crate) async fn collect<T>(
    rows: impl Stream<Item = Result<T, ClientError>>,
    limit: usize,
    out: &Out,
) -> Result<Vec<T>, CliError> {
    let mut rows: Vec<T> = rows.take(limit.saturating_add(1)).try_collect().await?;
    if rows.len() > limit {
        rows.truncate(limit);
        out.note(&format!("only the first {limit} are shown; --limit shows more"));
    }
    Ok(rows)
}

/// Prints rows as JSON or as a table; `none` stands in for an empty table.
pub(crate) fn print<T: Serialize>(
    rows: &[T],
    out: &Out,
    none: &str,
    columns: &[Column],
    cells: impl Fn(&T) -> Vec<String>,
) -> Result<(), CliError> {
    if out.json {
        out.json(&rows)
    } else if rows.is_empty() {
        out.text(none)
    } else {
        out.text(&table(columns, &rows.iter().map(cells).collect::<Vec<_>>()))
    }
}
