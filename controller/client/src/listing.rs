//! Listings: what to list, and the walk over their pages.

use crate::error::ClientError;
use futures::{Stream, TryStreamExt, stream};
use std::future::Future;

/// Which keys to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyFilter {
    /// Only of this namespace; `Some("")` is the default namespace.
    pub namespace: Option<String>,
    /// Only names that begin so.
    pub prefix: Option<String>,
    /// Rows of a page; the service's own default if absent.
    pub page_rows: Option<usize>,
}

/// Which backends to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackendFilter {
    /// Only ids that begin so.
    pub prefix: Option<String>,
    /// Rows of a page; the service's own default if absent.
    pub page_rows: Option<usize>,
}

/// Which drones to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DroneFilter {
    /// Only of this cluster.
    pub cluster: Option<String>,
    /// Rows of a page; the service's own default if absent.
    pub page_rows: Option<usize>,
}

/// The query string of a listing.
pub(crate) fn query(
    fields: impl IntoIterator<Item = (&'static str, Option<String>)>,
    page_rows: Option<usize>,
    cursor: Option<String>,
) -> Vec<(&'static str, String)> {
    fields
        .into_iter()
        .chain([("limit", page_rows.map(|n| n.to_string())), ("cursor", cursor)])
        .filter_map(|(name, value)| value.map(|value| (name, value)))
        .collect()
}

/// All rows of a listing. `fetch` gets the page at a cursor and says where the next one begins.
pub(crate) fn rows<T, F, Fut>(fetch: F) -> impl Stream<Item = Result<T, ClientError>>
where
    F: Fn(Option<String>) -> Fut,
    Fut: Future<Output = Result<(Vec<T>, Option<String>), ClientError>>,
{
    // The state is the cursor of the page to come; none after the last page.
    stream::try_unfold((fetch, Some(None::<String>)), |(fetch, at)| async move {
        let Some(cursor) = at else { return Ok(None) };
        let (rows, next) = fetch(cursor.clone()).await?;
        if next.is_some() && next == cursor {
            return Err(ClientError::BadResponse {
                url: "the listing".to_owned(),
                detail: "its next page is the same page again".to_owned(),
            });
        }
        let rows = stream::iter(rows.into_iter().map(Ok));
        Ok(Some((rows, (fetch, next.map(Some)))))
    })
    .try_flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_is_in_the_query() {
        let fields = [("namespace", Some(String::new())), ("prefix", None)];
        assert_eq!(query(fields, Some(5), None), [("namespace", String::new()), ("limit", "5".to_owned())]);
    }

    #[tokio::test]
    async fn pages_are_walked_to_the_last() {
        let fetch = |cursor: Option<String>| async move {
            Ok(match cursor.as_deref() {
                None => (vec![1, 2], Some("x".to_owned())),
                Some("x") => (vec![], Some("y".to_owned())),
                _ => (vec![3], None),
            })
        };
        assert_eq!(rows(fetch).try_collect::<Vec<_>>().await, Ok(vec![1, 2, 3]));
    }

    #[tokio::test]
    async fn a_listing_that_goes_in_a_circle_is_an_error() {
        let fetch = |_| async { Ok((vec![1], Some("x".to_owned()))) };
        let walked = rows(fetch).try_collect::<Vec<_>>().await;
        assert!(matches!(walked, Err(ClientError::BadResponse { .. })), "{walked:?}");
    }
}
