//! The typed calls.

use crate::error::ClientError;
use crate::listing::{BackendFilter, DroneFilter, KeyFilter, query, rows};
use crate::policy::RequestOptions;
use crate::stream::follow;
use crate::targets::normal_url;
use crate::transport::{Body, Call, Reply, Transport, random_idempotency_key, with_causes};
use bytes::Bytes;
use futures::Stream;
use holdfast_wire::http::{
    AddMember, BackendInfo, BackendPage, BackendStatusMessage, ClusterInfo, ClusterState, ConnectRequest,
    ConnectResponse, DrainRequest, DrainResult, DroneInfo, DronePage, KeyInfo, KeyName, KeyPage,
    MemberChangeResult, RevokeRequest, StatusResponse, TransferLeader,
};
use holdfast_wire::limits::WAIT_MS_DEFAULT;
use holdfast_wire::{BackendStatus, TerminationKind};
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;

/// Added to what a `connect` asks the service to wait, for the time-out of one attempt, in milliseconds: the service
/// allows itself 5 s for a read and again for an entry in the log.
const CONNECT_EXTRA_MS: u64 = 12_000;

/// A backup of which nothing comes for this long has ended.
pub const SNAPSHOT_SILENCE: Duration = Duration::from_secs(30);

/// A client of a Holdfast cluster. Cheap to clone; clones share connections and what is known of the leader.
#[derive(Debug, Clone)]
pub struct Client {
    transport: Arc<Transport>,
    options: Arc<RequestOptions>,
}

impl Client {
    /// A client of the controllers at `urls` (`http://HOST:PORT`; the scheme may be left out). It connects when first
    /// used.
    pub fn new(urls: Vec<String>) -> Result<Self, ClientError> {
        Ok(Self { transport: Arc::new(Transport::new(urls)?), options: Arc::new(RequestOptions::default()) })
    }

    /// The same client, trying as hard as `options` say.
    pub fn with_options(&self, options: RequestOptions) -> Self {
        Self { transport: Arc::clone(&self.transport), options: Arc::new(options) }
    }

    /// How hard it tries.
    pub fn options(&self) -> &RequestOptions {
        &self.options
    }

    /// The backend that holds a key, started if need be.
    ///
    /// Without a key a repeated attempt would start another backend, so the request carries an `Idempotency-Key`: then, and
    /// under one of the caller's, a repeated attempt gets the first one's recorded answer. With a key, a repeated attempt finds the key held: the backend is the same, but `spawned` is false even
    /// if an earlier attempt started it. One attempt may take `wait_ms` and some seconds more.
    pub async fn connect(&self, request: &ConnectRequest) -> Result<ConnectResponse, ClientError> {
        let mut call = self.post(["ctrl", "connect"], request)?;
        if request.key.is_none() && call.idempotency_key.is_none() {
            call.idempotency_key = Some(random_idempotency_key());
        }
        call.attempt_ms = request.wait_ms.unwrap_or(WAIT_MS_DEFAULT).saturating_add(CONNECT_EXTRA_MS);
        self.run(&call).await?.json()
    }

    /// A backend's latest status.
    pub async fn backend_status(&self, backend: &str) -> Result<BackendStatusMessage, ClientError> {
        self.run(&self.get(["pub", "b", backend, "status"])).await?.json()
    }

    /// A backend's statuses, those it has had and those to come, until it is terminated or the controllers can't be
    /// reached for the deadline of the options. A lost connection is made anew and resumed. Ends after an error.
    pub fn status_stream(
        &self,
        backend: &str,
    ) -> impl Stream<Item = Result<BackendStatusMessage, ClientError>> + Send + use<> {
        follow(self.clone(), backend.to_owned())
    }

    /// Opens the stream after the status that was seen last.
    pub(crate) async fn open_status_stream(
        &self,
        backend: &str,
        last: Option<BackendStatus>,
    ) -> Result<Reply, ClientError> {
        let mut call = self.get(["pub", "b", backend, "status-stream"]);
        call.last_event_id = last.map(|status| status.as_str().to_owned());
        call.stream = true;
        self.run(&call).await
    }

    /// Asks for a backend's end: gracefully, or at once.
    pub async fn terminate(&self, backend: &str, kind: TerminationKind) -> Result<(), ClientError> {
        let verb = match kind {
            TerminationKind::Soft => "soft-terminate",
            TerminationKind::Hard => "hard-terminate",
        };
        self.run(&self.post_without_body(["ctrl", "b", backend, verb])).await.map(drop)
    }

    /// Makes a drone take no new backends.
    pub async fn drain(&self, cluster: &str, drone: &str) -> Result<DrainResult, ClientError> {
        self.run(&self.post_without_body(["ctrl", "c", cluster, "d", drone, "drain"])).await?.json()
    }

    /// As [`Self::drain`], with a deadline for what is left on it, or undone.
    pub async fn drain_with(
        &self,
        cluster: &str,
        drone: &str,
        request: &DrainRequest,
    ) -> Result<DrainResult, ClientError> {
        self.run(&self.post(["ctrl", "c", cluster, "d", drone, "drain"], request)?).await?.json()
    }

    /// Makes the connection tokens void that `user` holds for a backend.
    pub async fn revoke_tokens(&self, backend: &str, user: &str) -> Result<(), ClientError> {
        let body = RevokeRequest { backend_id: backend.to_owned(), user: user.to_owned() };
        self.run(&self.post(["ctrl", "b", "revoke"], &body)?).await.map(drop)
    }

    /// One page of the held keys.
    pub async fn keys_page(
        &self,
        filter: &KeyFilter,
        cursor: Option<String>,
    ) -> Result<KeyPage, ClientError> {
        let fields = [("namespace", filter.namespace.clone()), ("prefix", filter.prefix.clone())];
        self.list(["ctrl", "keys"], query(fields, filter.page_rows, cursor)).await
    }

    /// All held keys, page after page.
    pub fn keys(&self, filter: KeyFilter) -> impl Stream<Item = Result<KeyInfo, ClientError>> + Send + use<> {
        let client = self.clone();
        rows(move |cursor| {
            let (client, filter) = (client.clone(), filter.clone());
            async move {
                let page = client.keys_page(&filter, cursor).await?;
                Ok((page.keys, page.next_cursor))
            }
        })
    }

    /// One held key; refused as `NotFound` if it is free.
    pub async fn key(&self, name: &str, namespace: &str) -> Result<KeyInfo, ClientError> {
        let mut call = self.get(["ctrl", "key"]);
        call.query = key_query(name, namespace);
        self.run(&call).await?.json()
    }

    /// Lets a key run out: its backend ends on the lease timeline.
    pub async fn prevent_renewal(&self, name: &str, namespace: &str) -> Result<(), ClientError> {
        self.set_renewal("prevent-renewal", name, namespace).await
    }

    /// Takes [`Client::prevent_renewal`] back.
    pub async fn allow_renewal(&self, name: &str, namespace: &str) -> Result<(), ClientError> {
        self.set_renewal("allow-renewal", name, namespace).await
    }

    /// Frees an expired key; refused while it is not expired.
    pub async fn revoke_key(&self, name: &str, namespace: &str) -> Result<(), ClientError> {
        let mut call = self.post_without_body(["ctrl", "key"]);
        call.method = Method::DELETE;
        call.query = key_query(name, namespace);
        self.run(&call).await.map(drop)
    }

    /// One page of the backends, those that ended not long ago included.
    pub async fn backends_page(
        &self,
        filter: &BackendFilter,
        cursor: Option<String>,
    ) -> Result<BackendPage, ClientError> {
        let fields = [("prefix", filter.prefix.clone())];
        self.list(["ctrl", "backends"], query(fields, filter.page_rows, cursor)).await
    }

    /// All backends, page after page.
    pub fn backends(
        &self,
        filter: BackendFilter,
    ) -> impl Stream<Item = Result<BackendInfo, ClientError>> + Send + use<> {
        let client = self.clone();
        rows(move |cursor| {
            let (client, filter) = (client.clone(), filter.clone());
            async move {
                let page = client.backends_page(&filter, cursor).await?;
                Ok((page.backends, page.next_cursor))
            }
        })
    }

    /// One backend, if the service knows it.
    pub async fn backend(&self, id: &str) -> Result<Option<BackendInfo>, ClientError> {
        // There is no path for one backend. Listings are in the order of the ids, and an id comes before all that it
        // is a prefix of: if it exists it is the first row.
        let filter = BackendFilter { prefix: Some(id.to_owned()), page_rows: Some(1) };
        let page = self.backends_page(&filter, None).await?;
        Ok(page.backends.into_iter().find(|backend| backend.id == id))
    }

    /// One page of the drones.
    pub async fn drones_page(
        &self,
        filter: &DroneFilter,
        cursor: Option<String>,
    ) -> Result<DronePage, ClientError> {
        let fields = [("cluster", filter.cluster.clone())];
        self.list(["ctrl", "drones"], query(fields, filter.page_rows, cursor)).await
    }

    /// All drones, page after page.
    pub fn drones(
        &self,
        filter: DroneFilter,
    ) -> impl Stream<Item = Result<DroneInfo, ClientError>> + Send + use<> {
        let client = self.clone();
        rows(move |cursor| {
            let (client, filter) = (client.clone(), filter.clone());
            async move {
                let page = client.drones_page(&filter, cursor).await?;
                Ok((page.drones, page.next_cursor))
            }
        })
    }

    /// The controllers and what they agree on, as the leader sees it.
    pub async fn cluster_info(&self) -> Result<ClusterInfo, ClientError> {
        self.run(&self.get(["ctrl", "cluster"])).await?.json()
    }

    /// As [`Client::cluster_info`], but as the controller at `url` sees it, stale or not. One attempt.
    pub async fn cluster_info_at(&self, url: &str) -> Result<ClusterInfo, ClientError> {
        let mut call = self.get(["ctrl", "cluster"]);
        call.query = vec![("consistency", "local".to_owned())];
        self.transport.once(&call, &normal_url(url)?).await?.json()
    }

    /// A backup of the state of one instant, everything acknowledged before included. A stream that ends early lacks its
    /// last part, which whoever reads a backup refuses: it is not resumed here, begin again.
    pub async fn snapshot(&self) -> Result<SnapshotStream, ClientError> {
        let mut call = self.get(["ctrl", "snapshot"]);
        call.stream = true;
        let reply = self.run(&call).await?;
        match reply.body {
            Body::Stream(response) => Ok(SnapshotStream { url: reply.url, response }),
            Body::Whole(_) => {
                Err(ClientError::BadResponse { url: reply.url, detail: "is no stream".to_owned() })
            }
        }
    }

    /// Adds a member, or changes a member's address. Asking twice does nothing the second time.
    pub async fn set_member(&self, member: &AddMember) -> Result<MemberChangeResult, ClientError> {
        self.run(&self.post(["ctrl", "cluster", "members"], member)?).await?.json()
    }

    /// Removes a member for ever. Asking twice does nothing the second time.
    pub async fn remove_member(&self, id: u64) -> Result<MemberChangeResult, ClientError> {
        let mut call = self.post_without_body(["ctrl", "cluster", "members", &id.to_string()]);
        call.method = Method::DELETE;
        self.run(&call).await?.json()
    }

    /// Makes the leader at `url` hand over, to `to` or to whoever is best. Tells whether it did. One attempt.
    pub async fn transfer_leader_at(&self, url: &str, to: Option<u64>) -> Result<bool, ClientError> {
        let call = self.post(["ctrl", "cluster", "transfer-leader"], &TransferLeader { to })?;
        let done: DrainResult = self.transport.once(&call, &normal_url(url)?).await?.json()?;
        Ok(done.updated)
    }

    /// Plane's view of a cluster's drones.
    pub async fn cluster_state(&self, cluster: &str) -> Result<ClusterState, ClientError> {
        self.run(&self.get(["ctrl", "c", cluster, "state"])).await?.json()
    }

    /// The version of whichever controller answers.
    pub async fn status(&self) -> Result<StatusResponse, ClientError> {
        self.run(&self.get(["ctrl", "status"])).await?.json()
    }

    /// Whether the controller at `url` can serve linearizable reads. One attempt; an error if it can't be reached.
    pub async fn ready_at(&self, url: &str) -> Result<bool, ClientError> {
        self.yes_or_no(["ctrl", "ready"], url).await
    }

    /// Whether the controller at `url` lives. One attempt; an error if it can't be reached.
    pub async fn health_at(&self, url: &str) -> Result<bool, ClientError> {
        self.yes_or_no(["pub", "health"], url).await
    }

    async fn yes_or_no(&self, path: [&str; 2], url: &str) -> Result<bool, ClientError> {
        match self.transport.once(&self.get(path), &normal_url(url)?).await {
            Ok(_) => Ok(true),
            Err(ClientError::Refused(..) | ClientError::BadResponse { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn set_renewal(&self, verb: &str, name: &str, namespace: &str) -> Result<(), ClientError> {
        let body = KeyName { name: name.to_owned(), namespace: namespace.to_owned() };
        self.run(&self.post(["ctrl", "key", verb], &body)?).await.map(drop)
    }

    async fn list<T: DeserializeOwned>(
        &self,
        path: [&str; 2],
        query: Vec<(&'static str, String)>,
    ) -> Result<T, ClientError> {
        let mut call = self.get(path);
        call.query = query;
        self.run(&call).await?.json()
    }

    async fn run(&self, call: &Call) -> Result<Reply, ClientError> {
        self.transport.run(call, &self.options).await
    }

    fn get<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Call {
        Call {
            method: Method::GET,
            path: path.into_iter().map(str::to_owned).collect(),
            query: Vec::new(),
            body: None,
            last_event_id: None,
            changes_state: false,
            idempotency_key: None,
            attempt_ms: self.options.attempt_ms,
            stream: false,
        }
    }

    fn post_without_body<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Call {
        let idempotency_key = self.options.idempotency_key.clone();
        Call { method: Method::POST, changes_state: true, idempotency_key, ..self.get(path) }
    }

    fn post<'a>(
        &self,
        path: impl IntoIterator<Item = &'a str>,
        body: &impl Serialize,
    ) -> Result<Call, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::BadResponse {
            url: "this client".to_owned(),
            detail: format!("the request can't be written as JSON: {error}"),
        })?;
        Ok(Call { body: Some(Bytes::from(body)), ..self.post_without_body(path) })
    }
}

fn key_query(name: &str, namespace: &str) -> Vec<(&'static str, String)> {
    vec![("name", name.to_owned()), ("namespace", namespace.to_owned())]
}

/// A backup that is on its way: see [`Client::snapshot`].
#[derive(Debug)]
pub struct SnapshotStream {
    url: String,
    response: reqwest::Response,
}

impl SnapshotStream {
    /// The controller that makes the backup.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The next bytes; `None` at the end. Nothing for [`SNAPSHOT_SILENCE`] is an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        let broken = |detail| ClientError::BadResponse { url: self.url.clone(), detail };
        match tokio::time::timeout(SNAPSHOT_SILENCE, self.response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(broken(format!("the backup broke off: {}", with_causes(&error)))),
            Err(_) => Err(broken(format!("nothing of the backup came for {} s", SNAPSHOT_SILENCE.as_secs()))),
        }
    }
}
