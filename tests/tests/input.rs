//! Bad input: each has its named error, and nothing is changed by it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use futures::{SinkExt, StreamExt};
use holdfast_tests::harness::{Cluster, EventKind, SHORT};
use holdfast_wire::drone::{
    CLOSE_BAD_MESSAGE, CLOSE_NAME_TAKEN, ControllerHandshake, MessageToDrone, RenewRefusal, RenewedKey,
};
use holdfast_wire::http::{ConnectResponse, KeyInfo};
use holdfast_wire::limits::BODY_BYTES_MAX;
use holdfast_wire::{ApiErrorKind, BackendStatus};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// No renewal comes in between: an unchanged key has the very same expiry.
const STILL: &str = "renew=30s,soft=40s,hard=50s,expiry=60s";

/// What must not change: keys and backends, in full, and drones by name.
#[derive(Debug, PartialEq)]
struct State {
    keys: Vec<KeyInfoExceptAge>,
    backends: Value,
    drones: Vec<(i32, String, bool)>,
}

#[derive(Debug, PartialEq)]
struct KeyInfoExceptAge(KeyInfo);

async fn state(cluster: &Cluster) -> State {
    let client = cluster.client();
    let keys = cluster.keys().await.into_iter();
    let drones = client.drones_page(&Default::default(), None).await.unwrap().drones;
    let url = format!("{}/ctrl/backends?limit=1000", cluster.url(0));
    State {
        keys: keys.map(|key| KeyInfoExceptAge(KeyInfo { expires_in_ms: 0, ..key })).collect(),
        backends: cluster.http.get(&url).await.ok(),
        drones: drones.into_iter().map(|drone| (drone.id, drone.name, drone.draining)).collect(),
    }
}

fn spawn(cluster: &Cluster) -> Value {
    serde_json::to_value(cluster.backend().spawn_config("x")).unwrap()
}

#[tokio::test]
async fn each_bad_request_gets_its_named_error_and_changes_nothing() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let held = cluster.connect_ready("held").await;
    let before = state(&cluster).await;
    let spawn = spawn(&cluster);
    let with = |field: &str, value: Value| {
        let mut spawn = spawn.clone();
        spawn[field] = value;
        json!({"key": {"name": "k"}, "spawn_config": spawn})
    };
    let key = |value: Value| json!({"key": value, "spawn_config": spawn.clone()});
    let connects = [
        ("key.name", key(json!({"name": ""}))),
        ("key.name", key(json!({"name": "x".repeat(1025)}))),
        ("key.name", key(json!({"name": "ä".repeat(513)}))),
        ("key.name", key(json!({"name": "a\u{0}b"}))),
        ("key.name", key(json!({"name": "a\nb"}))),
        ("key.name", key(json!({"name": "a\u{7f}"}))),
        ("key.name", key(json!({"name": "a\u{85}"}))),
        ("key.name", key(json!({"name": 5}))),
        ("key", key(json!({}))),
        ("key", key(json!("held"))),
        ("key.namespace", key(json!({"name": "k", "namespace": "x".repeat(257)}))),
        ("key.namespace", key(json!({"name": "k", "namespace": "\t"}))),
        ("key.tag", key(json!({"name": "k", "tag": "x".repeat(257)}))),
        ("key.tag", key(json!({"name": "k", "tag": ["a"]}))),
        ("user", json!({"key": {"name": "held"}, "user": "x".repeat(257)})),
        ("user", json!({"key": {"name": "held"}, "user": {"name": "ann"}})),
        ("auth", json!({"key": {"name": "held"}, "auth": "no object"})),
        ("wait_ms", json!({"key": {"name": "held"}, "wait_ms": -1})),
        ("wait_ms", json!({"key": {"name": "held"}, "wait_ms": "soon"})),
        ("spawn_config", json!({"key": {"name": "k"}, "spawn_config": []})),
        ("spawn_config.id", with("id", json!(""))),
        ("spawn_config.id", with("id", json!("Upper"))),
        ("spawn_config.id", with("id", json!("x".repeat(46)))),
        ("spawn_config.cluster", with("cluster", json!("a b"))),
        ("spawn_config.cluster", with("cluster", json!("x".repeat(256)))),
        ("spawn_config.pool", with("pool", json!("pool_with_underscore"))),
        ("spawn_config.subdomain", with("subdomain", json!("a.b"))),
        ("spawn_config.executable", with("executable", json!("sh"))),
        ("spawn_config.executable", with("executable", json!({}))),
        ("spawn_config.executable", with("executable", json!({"command": "sh"}))),
        ("spawn_config.executable.command", with("executable", json!({"command": []}))),
        ("spawn_config.executable.env", with("executable", json!({"command": ["sh"], "env": {"A=B": "c"}}))),
        ("spawn_config.executable", with("executable", json!({"command": ["s\u{0}h"]}))),
        ("spawn_config.executable.image", with("executable", json!({"image": ""}))),
        ("spawn_config.lifetime_limit_seconds", with("lifetime_limit_seconds", json!(0))),
        ("spawn_config.lifetime_limit_seconds", with("lifetime_limit_seconds", json!(1u64 << 40))),
        ("spawn_config.max_idle_seconds", with("max_idle_seconds", json!(-5))),
        ("spawn_config.use_static_token", with("use_static_token", json!("yes"))),
    ];
    for (i, (field, body)) in connects.iter().enumerate() {
        let url = format!("{}/ctrl/connect", cluster.url(i % 3));
        let error = cluster.http.post(&url, body).await.refused(ApiErrorKind::InvalidRequest);
        let named = error.message.strip_prefix(field);
        assert!(named.is_some_and(|rest| rest.starts_with([' ', ':'])), "{field}: {error:?} for {body}");
    }

    let base = cluster.url(1);
    for (path, body, field) in [
        ("/ctrl/key/prevent-renewal", json!({"name": ""}), "name"),
        ("/ctrl/key/prevent-renewal", json!({"namespace": "a"}), "body"),
        ("/ctrl/key/allow-renewal", json!({"name": "k", "namespace": "x".repeat(257)}), "namespace"),
        ("/ctrl/b/revoke", json!({"backend_id": "A", "user": "ann"}), "backend_id"),
        ("/ctrl/b/revoke", json!({"backend_id": held.backend_id, "user": "x".repeat(257)}), "user"),
    ] {
        let error =
            cluster.http.post(&format!("{base}{path}"), &body).await.refused(ApiErrorKind::InvalidRequest);
        assert!(error.message.starts_with(field), "{path} {body}: {error:?}");
    }
    for (method, path, field) in [
        (Method::GET, "/ctrl/key".to_owned(), "name"),
        (Method::GET, "/ctrl/key?name=".to_owned(), "name"),
        (Method::GET, "/ctrl/key?name=%00".to_owned(), "name"),
        (Method::DELETE, "/ctrl/key".to_owned(), "name"),
        (Method::GET, format!("/ctrl/keys?namespace={}", "x".repeat(257)), "namespace"),
        (Method::GET, "/ctrl/keys?prefix=%0a".to_owned(), "prefix"),
        (Method::GET, "/ctrl/c/a%20b/state".to_owned(), "cluster"),
    ] {
        let answer = cluster.http.send(method, &format!("{base}{path}"), &[], None).await.unwrap();
        let error = answer.refused(ApiErrorKind::InvalidRequest);
        assert!(error.message.starts_with(field), "{path}: {error:?}");
    }
    for key in ["", "a b", "ä", &"x".repeat(129)] {
        let url = format!("{base}/ctrl/b/{}/hard-terminate", held.backend_id);
        let answer = cluster.http.send(Method::POST, &url, &[("idempotency-key", key)], None).await.unwrap();
        let error = answer.refused(ApiErrorKind::InvalidRequest);
        assert!(error.message.starts_with("Idempotency-Key"), "{key:?}: {error:?}");
    }
    assert_eq!(state(&cluster).await, before);
    assert_eq!(cluster.journal.events().len(), 1);
}

#[tokio::test]
async fn names_at_their_bounds_and_unknown_fields_are_fine() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let mut body = json!({
        "key": {"name": "ä".repeat(512), "namespace": "x".repeat(256), "tag": "y".repeat(256), "new": 1},
        "spawn_config": spawn(&cluster),
        "user": "u".repeat(256),
        // Capped, not refused.
        "wait_ms": u64::MAX,
        "from_the_future": {"a": [1, 2]},
    });
    body["spawn_config"]["id"] = json!("b".repeat(45));
    body["spawn_config"]["newer"] = json!(null);
    body["spawn_config"]["executable"]["newest"] = json!(true);
    let answer: ConnectResponse =
        cluster.http.post(&format!("{}/ctrl/connect", cluster.url(2)), &body).await.ok();
    assert!(answer.spawned);
    assert_eq!(cluster.wait_status(&answer.backend_id, BackendStatus::Ready).await.key, answer.key);
}

#[tokio::test]
async fn bodies_that_are_no_json_or_too_large_are_refused() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let before = state(&cluster).await;
    let url = format!("{}/ctrl/connect", cluster.url(0));
    for (body, says) in [
        (&b""[..], "body is empty"),
        (b"{", "body is not JSON"),
        (b"{} {}", "body is not JSON"),
        (b"\xff\xfe", "body is not JSON"),
        (b"[]", "body"),
        (b"null", "body"),
        (b"5", "body"),
    ] {
        let answer = cluster.http.send(Method::POST, &url, &[], Some(body.to_vec())).await.unwrap();
        let error = answer.refused(ApiErrorKind::InvalidRequest);
        assert!(error.message.starts_with(says), "{body:?}: {error:?}");
    }
    // Deep nesting must not overflow a stack.
    let deep = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    let answer = cluster.http.send(Method::POST, &url, &[], Some(deep)).await.unwrap();
    answer.refused(ApiErrorKind::InvalidRequest);
    for bytes in [BODY_BYTES_MAX + 1, 10 * 1024 * 1024] {
        let mut body = br#"{"key":{"name":""#.to_vec();
        body.resize(bytes - 3, b'k');
        body.extend(br#""}}"#);
        let answer = cluster.http.send(Method::POST, &url, &[], Some(body)).await.unwrap();
        assert_eq!(answer.status.as_u16(), 413);
        assert_eq!(answer.json()["kind"], "InvalidRequest");
        assert!(answer.json()["message"].as_str().unwrap().contains("larger than 1048576 bytes"));
    }
    // Half a request.
    let mut half = TcpStream::connect(cluster.url(0).trim_start_matches("http://")).await.unwrap();
    half.write_all(b"POST /ctrl/connect HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{\"key\":")
        .await
        .unwrap();
    drop(half);
    assert_eq!(state(&cluster).await, before);
}

#[tokio::test]
async fn unknown_backends_keys_and_drones_are_not_found() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let before = state(&cluster).await;
    let base = cluster.url(1);
    let name = &cluster.name;
    for (method, path) in [
        (Method::GET, "/pub/b/ba-none/status".to_owned()),
        (Method::GET, "/pub/b/NOT%20A%20NAME/status".to_owned()),
        (Method::GET, "/pub/b/ba-none/status-stream".to_owned()),
        (Method::POST, "/ctrl/b/ba-none/soft-terminate".to_owned()),
        (Method::POST, "/ctrl/b/ba-none/hard-terminate".to_owned()),
        (Method::GET, "/ctrl/key?name=none".to_owned()),
        (Method::DELETE, "/ctrl/key?name=none".to_owned()),
        (Method::POST, format!("/ctrl/c/{name}/d/dr-none/drain")),
        (Method::POST, "/ctrl/c/elsewhere:1/d/dr-0/drain".to_owned()),
    ] {
        let answer = cluster.http.send(method, &format!("{base}{path}"), &[], None).await.unwrap();
        answer.refused(ApiErrorKind::NotFound);
    }
    let body = json!({"name": "none"});
    for verb in ["prevent-renewal", "allow-renewal"] {
        let answer = cluster.http.post(&format!("{base}/ctrl/key/{verb}"), &body).await;
        answer.refused(ApiErrorKind::NotFound);
    }
    let body = json!({"backend_id": "ba-none", "user": "ann"});
    cluster.http.post(&format!("{base}/ctrl/b/revoke"), &body).await.refused(ApiErrorKind::NotFound);
    assert_eq!(state(&cluster).await, before);
}

/// A drone's end of the socket, which says whatever it is told to.
struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    async fn open(cluster: &Cluster, index: usize) -> Self {
        let url = cluster.url(index).replace("http://", "ws://");
        let url = format!("{url}/ctrl/c/{}/drone-socket?pool=other", cluster.name);
        Self(connect_async(url).await.unwrap().0)
    }

    async fn say(&mut self, message: impl Into<Message>) {
        self.0.send(message.into()).await.unwrap();
    }

    async fn handshake(&mut self, name: &str) {
        let version = json!({"version": "0", "git_hash": "0"});
        let handshake = json!({"version": version, "name": name, "incarnation": format!("test-{name}"), "data_id": "m", "new": 1});
        self.say(handshake.to_string()).await;
    }

    /// The next text or close frame.
    async fn hear(&mut self) -> Message {
        loop {
            let next =
                tokio::time::timeout(SHORT, self.0.next()).await.expect("the controller says something");
            match next.expect("the controller closes with a reason").unwrap() {
                Message::Ping(_) | Message::Pong(_) => {}
                message => return message,
            }
        }
    }

    async fn hear_json<T: serde::de::DeserializeOwned>(&mut self) -> T {
        match self.hear().await {
            Message::Text(text) => serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in {text}")),
            other => panic!("not a text: {other:?}"),
        }
    }

    /// The close code and reason; other messages before it don't matter.
    async fn closed(&mut self) -> (u16, String) {
        loop {
            if let Message::Close(frame) = self.hear().await {
                let frame = frame.expect("a close code");
                return (u16::from(frame.code), frame.reason.to_string());
            }
        }
    }
}

#[tokio::test]
async fn frames_that_are_no_messages_close_the_drone_socket_with_a_reason() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let held = cluster.connect_ready("held").await;
    let before = state(&cluster).await;
    // Instead of the handshake.
    let version = json!({"version": "0", "git_hash": "0"});
    for (i, (frame, says)) in [
        (Message::text("not JSON"), "not a handshake"),
        (Message::text("{"), "not a handshake"),
        (Message::text(json!({"name": "dr-x"}).to_string()), "not a handshake"),
        (Message::text(json!({"version": version, "name": "x"}).to_string()), "name must begin with 'dr'"),
        (Message::text(json!({"version": version, "name": ""}).to_string()), "name must not be empty"),
        (Message::text(json!({"version": version, "name": "dr-X"}).to_string()), "name may hold only"),
        (Message::text(json!({"version": version, "name": "d".repeat(46)}).to_string()), "name is 46 bytes"),
        (
            Message::text(json!({"version": version, "name": "dr-x", "incarnation": ""}).to_string()),
            "incarnation",
        ),
        (
            Message::text(json!({"version": version, "name": "dr-x", "incarnation": "i"}).to_string()),
            "data_id",
        ),
        (Message::text(" ".repeat(64 * 1024 + 1)), "the handshake is 65537 bytes"),
        (Message::binary(vec![0; 8]), "binary"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut socket = Socket::open(&cluster, i % 3).await;
        socket.say(frame).await;
        let (code, reason) = socket.closed().await;
        assert!(code == CLOSE_BAD_MESSAGE && reason.starts_with(says), "{says}: {code} {reason}");
    }
    // An HTTP request, and names in the path.
    let url = format!("{}/ctrl/c/{}/drone-socket", cluster.url(0), cluster.name);
    let answer = cluster.http.get(&url).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["kind"]), (426, &json!("InvalidRequest")));
    let url = format!("{}/ctrl/c/a%20b/drone-socket", cluster.url(0).replace("http://", "ws://"));
    let error = connect_async(url).await.unwrap_err();
    assert!(matches!(&error, tungstenite::Error::Http(answer) if answer.status() == 400), "{error}");
    assert_eq!(state(&cluster).await, before);

    // After the handshake: a drone that exists from then on, and nothing more.
    let mut all = Vec::new();
    for (i, frame) in [
        Message::text("not JSON"),
        Message::text(r#"{"Heartbeat":"#),
        Message::text(r#"{"Heartbeat":{"local_time":"now"}}"#),
        Message::text(r#"{"RenewKeys":{"local_time":1,"keys":[{"backend":"NOT A NAME","token":1}]}}"#),
        Message::text(r#"{"RenewKey":{"local_time":1}}"#),
        Message::text(
            r#"{"BackendEvent":{"event_id":1,"backend_id":"ba-x","state":{"status":"gone"},"timestamp":1}}"#,
        ),
        Message::text("[]"),
        Message::text("x".repeat(BODY_BYTES_MAX + 1)),
        Message::binary(vec![1, 2, 3]),
    ]
    .into_iter()
    .enumerate()
    {
        let mut socket = Socket::open(&cluster, i % 3).await;
        socket.handshake(&format!("dr-bad-{i}")).await;
        let _: ControllerHandshake = socket.hear_json().await;
        // Of a kind that this version does not know: not an error.
        socket.say(r#"{"FromTheFuture":{"a":1}}"#).await;
        socket.say(frame.clone()).await;
        let (code, reason) = socket.closed().await;
        assert!(code == CLOSE_BAD_MESSAGE && !reason.is_empty(), "{frame:.80}: {code} {reason}");
        all.push(format!("dr-bad-{i}"));
    }
    let after = state(&cluster).await;
    assert_eq!((&after.keys, &after.backends), (&before.keys, &before.backends));
    assert_eq!(after.drones.len(), before.drones.len() + all.len());
    assert_eq!(cluster.ask(&held.backend_id).await["SESSION_BACKEND_KEY"], "held");
}

#[tokio::test]
async fn half_frames_on_the_drone_socket_are_a_lost_connection_and_nothing_more() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let held = cluster.connect_ready("held").await;
    let before = state(&cluster).await;
    for (i, rest) in [
        // A text frame of 100 bytes, masked, of which 3 come.
        &b"\x81\xe4\x00\x00\x00\x00{\"H"[..],
        // Half a header.
        b"\x81",
        // A length of 2^63 - 1 bytes.
        b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
        // Not masked, as a client's frames must be.
        b"\x81\x02{}",
        // A reserved opcode.
        b"\x8f\x80\x00\x00\x00\x00",
        // A continuation of nothing.
        b"\x80\x80\x00\x00\x00\x00",
        // Not UTF-8.
        b"\x81\x82\x00\x00\x00\x00\xff\xfe",
    ]
    .into_iter()
    .enumerate()
    {
        let mut stream = TcpStream::connect(cluster.url(i % 3).trim_start_matches("http://")).await.unwrap();
        let request = format!(
            "GET /ctrl/c/{}/drone-socket HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            cluster.name
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 101");
        stream.write_all(rest).await.unwrap();
        // Our half is closed; the controller closes the other.
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let read = tokio::time::timeout(SHORT, stream.read_to_end(&mut rest)).await;
        // A reset is an end too.
        drop(read.expect("the controller ends the connection"));
    }
    assert_eq!(state(&cluster).await, before);
    for index in 0..3 {
        cluster.wait_controller(index).await;
    }
    assert_eq!(cluster.ask(&held.backend_id).await["SESSION_BACKEND_KEY"], "held");
}

#[tokio::test]
async fn a_drone_can_neither_renew_nor_end_what_is_anothers() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let held = cluster.connect_ready("held").await;
    let said = cluster.ask(&held.backend_id).await;
    let before = state(&cluster).await;
    let mut socket = Socket::open(&cluster, 1).await;
    socket.handshake("dr-thief").await;
    let handshake: ControllerHandshake = socket.hear_json().await;
    assert_eq!(handshake.lease.unwrap().to_string(), STILL);
    assert!(handshake.cluster_id.is_some());
    socket.say(json!({"Heartbeat": {"local_time": 5}}).to_string()).await;

    // In our form, with the right token.
    let keys = json!([
        {"backend": held.backend_id, "token": held.fencing_token},
        {"backend": "ba-none", "token": 1},
    ]);
    socket.say(json!({"RenewKeys": {"local_time": 5, "keys": keys}}).to_string()).await;
    let mut refused = Vec::<RenewedKey>::new();
    let mut told_to_end = Vec::new();
    while refused.is_empty() || told_to_end.len() < 2 {
        match socket.hear_json::<MessageToDrone>().await {
            MessageToDrone::RenewKeysResponse(response) => refused = response.keys,
            MessageToDrone::Action(action) => told_to_end.push(action.backend_id),
            other => panic!("{other:?}"),
        }
    }
    let key = |backend: &str, refused| RenewedKey {
        backend: backend.to_owned(),
        deadlines: None,
        refused: Some(refused),
    };
    assert_eq!(
        refused,
        [key(&held.backend_id, RenewRefusal::NotHolder), key("ba-none", RenewRefusal::Unknown)]
    );
    // In Plane's form, which knows no token and no reason.
    socket.say(json!({"RenewKey": {"backend": held.backend_id, "local_time": 5}}).to_string()).await;
    loop {
        match socket.hear_json::<MessageToDrone>().await {
            MessageToDrone::RenewKeyResponse(response) => {
                assert_eq!((response.backend.as_str(), response.deadlines), (held.backend_id.as_str(), None));
                break;
            }
            MessageToDrone::Action(_) => {}
            other => panic!("{other:?}"),
        }
    }
    // And a report of its end.
    let event = json!({
        "event_id": 7, "backend_id": held.backend_id, "timestamp": 5, "token": held.fencing_token,
        "state": {"status": "terminated", "last_status": "ready"},
    });
    socket.say(json!({"BackendEvent": event}).to_string()).await;
    loop {
        match socket.hear_json::<MessageToDrone>().await {
            MessageToDrone::AckEvent { event_id: 7 } => break,
            MessageToDrone::Action(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let after = state(&cluster).await;
    assert_eq!((&after.keys, &after.backends), (&before.keys, &before.backends));
    assert_eq!(cluster.ask(&held.backend_id).await["instance"], said["instance"]);
    assert_eq!(cluster.journal.kinds("held"), [EventKind::Start]);
}

#[tokio::test]
async fn a_second_drone_under_a_live_drones_name_is_closed_and_disturbs_nobody() {
    let cluster = Cluster::builder().lease(STILL).start().await;
    let held = cluster.connect_ready("held").await;
    let before = state(&cluster).await;
    for index in 0..3 {
        let mut socket = Socket::open(&cluster, index).await;
        socket.handshake("dr-0").await;
        let (code, reason) = socket.closed().await;
        assert_eq!(code, CLOSE_NAME_TAKEN, "{reason}");
        assert!(!reason.is_empty());
    }
    assert_eq!(state(&cluster).await, before);
    // The first one still works.
    cluster.wait_drone(0).await;
    assert_eq!(cluster.connect_ready("another").await.drone, held.drone);
    assert_eq!(cluster.journal.kinds("held"), [EventKind::Start]);
    let log = cluster.drones[0].log();
    assert!(!log.contains("session lost"), "the live drone lost its session: {log}");
}
