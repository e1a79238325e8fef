//! Images that come from a registry, which the test plays: one image, for who has the password.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;
mod docker_support;

use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use common::*;
use docker_support::*;
use holdfast_wire::{BackendState, BackendStatus, TerminationReason};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

/// "user:secret", as a registry is told it.
const AUTHORIZATION: &str = "Basic dXNlcjpzZWNyZXQ=";
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

fn digest(bytes: &[u8]) -> String {
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hash}")
}

struct Registry {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
    /// How often the manifest was asked for with the right password.
    asked: AtomicUsize,
}

impl Registry {
    fn new() -> Self {
        let program = program();
        let tar = Command::new("tar")
            .args(["--transform", "s/.*/backend/", "-C"])
            .arg(program.parent().unwrap())
            .arg("-cf")
            .arg("-")
            .arg(program.file_name().unwrap())
            .output()
            .unwrap();
        assert!(tar.status.success());
        let layer = tar.stdout;
        let config = json!({
            "architecture": std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"),
            "os": "linux",
            "config": {"Entrypoint": ["/backend"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        });
        let config = config.to_string().into_bytes();
        let blob = |media: &str, bytes: &[u8]| -> Value {
            json!({"mediaType": media, "size": bytes.len(), "digest": digest(bytes)})
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blob("application/vnd.docker.container.image.v1+json", &config),
            "layers": [blob("application/vnd.docker.image.rootfs.diff.tar", &layer)],
        });
        let manifest = manifest.to_string().into_bytes();
        Self { layer, config, manifest, asked: AtomicUsize::new(0) }
    }

    fn answer(&self, path: &str, headers: &HeaderMap) -> Response {
        if headers.get("authorization").is_none_or(|given| given != AUTHORIZATION) {
            return (StatusCode::UNAUTHORIZED, [("www-authenticate", "Basic realm=\"test\"")])
                .into_response();
        }
        let bytes = |media: &'static str, bytes: &[u8]| {
            let headers = [("content-type", media.to_owned()), ("docker-content-digest", digest(bytes))];
            (headers, bytes.to_vec()).into_response()
        };
        match path.rsplit('/').next().unwrap_or_default() {
            "" => StatusCode::OK.into_response(),
            "1" => {
                self.asked.fetch_add(1, Ordering::SeqCst);
                bytes(MANIFEST, &self.manifest)
            }
            last if last == digest(&self.manifest) => bytes(MANIFEST, &self.manifest),
            last if last == digest(&self.config) => bytes("application/octet-stream", &self.config),
            last if last == digest(&self.layer) => bytes("application/octet-stream", &self.layer),
            _ => StatusCode::NOT_FOUND.into_response(),
        }
    }
}

#[tokio::test]
async fn an_image_is_pulled_with_its_credentials_and_as_its_policy_says() {
    static REGISTRY: LazyLock<Arc<Registry>> = LazyLock::new(|| Arc::new(Registry::new()));
    let Some(ground) = Ground::new() else { return };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    // In the name, by which it is removed in the end.
    let image = format!("{}/{}:1", listener.local_addr().unwrap(), ground.name);
    let app = axum::Router::new()
        .fallback(|uri: Uri, headers: HeaderMap| async move { REGISTRY.answer(uri.path(), &headers) });
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let mut fake = Fake::start(container_lease()).await;
    let _drone = ground.drone(&fake);
    let mut conn = fake.conn().await;
    let executable = |with: Value| {
        let env = json!({"EXIT_CODE": "7"});
        let mut executable = ground.executable(env, with);
        executable["image"] = json!(image);
        executable
    };

    let wrong = json!({"credentials": {"username": "user", "password": "incorrect"}});
    spawn(&mut conn, "ba-wrong", executable(wrong), key("room", "")).await;
    conn.expect("ba-wrong", BackendStatus::Loading).await;
    let ended = conn.expect("ba-wrong", BackendStatus::Terminated).await;
    let reason = Some(TerminationReason::InternalError);
    assert!(matches!(ended, BackendState::Terminated { reason: r, .. } if r == reason), "{ended:?}");
    assert_eq!(REGISTRY.asked.load(Ordering::SeqCst), 0);

    let right = json!({"username": "user", "password": "secret"});
    for (backend, policy, asks) in [
        ("ba-first", "IfNotPresent", true),
        ("ba-again", "IfNotPresent", false),
        ("ba-never", "Never", false),
        ("ba-always", "Always", true),
    ] {
        let asked = REGISTRY.asked.load(Ordering::SeqCst);
        let with = json!({"credentials": right, "pull_policy": policy});
        spawn(&mut conn, backend, executable(with), key("room", "")).await;
        for status in [BackendStatus::Loading, BackendStatus::Starting, BackendStatus::Waiting] {
            conn.expect(backend, status).await;
        }
        let ended = conn.expect(backend, BackendStatus::Terminated).await;
        assert!(matches!(ended, BackendState::Terminated { exit_code: Some(7), .. }), "{ended:?}");
        assert_eq!(REGISTRY.asked.load(Ordering::SeqCst) > asked, asks, "{backend}");
        let inspected = ground.docker(&["inspect", &ground.container(backend)]);
        assert!(!inspected.contains("secret"), "the password is not kept");
    }
    let log = ground.log();
    assert!(!log.contains("secret") && !log.contains("incorrect"), "the password is not logged: {log}");
}
