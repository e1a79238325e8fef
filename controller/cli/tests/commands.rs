//! The binary against a controller that answers as the test says: exit codes, what is on stdout and what is not.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a failed test")]

#[path = "../../client/tests/fake/mod.rs"]
mod fake;

use fake::{CONNECTED, Fake, json, nobody, refusal, sse};
use holdfast_client::wire::ApiErrorKind;
use serde_json::{Value, json as value};
use std::io::Write;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

/// No step of a test takes longer, unless it hangs.
const STEP_MAX: Duration = Duration::from_secs(20);

fn command(url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HOLDFAST_")) {
        command.env_remove(name);
    }
    command.env("HOLDFAST_CONTROLLER", url).args(args).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(url: &str, args: &[&str]) -> Output {
    timeout(STEP_MAX, command(url, args).output()).await.expect("it hangs").unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// Exit code, and that failure says something on stderr and nothing on stdout.
fn assert_fails(output: &Output, code: i32, word: &str) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(stderr(output).contains(word), "{output:?}");
    assert_eq!(stdout(output), "", "{output:?}");
}

const KEY: &str = r#"{"name":"room","namespace":"n","tag":"","backend":"ba-1","drone":"dr-a","token":7,
    "allow_renew":true,"acquired_at":1000,"expires_at":61000,"expires_in_ms":42000}"#;
const BACKEND: &str = r#"{"id":"ba-1","key":{"name":"room","namespace":"n","tag":""},"cluster":"localhost:7100",
    "drone":"dr-a","status":"ready","address":"127.0.0.1:4000","fencing_token":7,"created_at":1000,"status_at":2000}"#;

#[tokio::test]
async fn exit_codes_are_the_contracts() {
    let refusing = Fake::start(|_, _| refusal(ApiErrorKind::KeyHeld)).await;
    let connect = ["connect", "--key", "k", "--tag", "t", "--", "sleep", "1"];
    assert_fails(&run(&refusing.url, &connect).await, 1, "this is KeyHeld (KeyHeld)");
    assert_fails(&run(&refusing.url, &[&connect[..], &["--json"]].concat()[..]).await, 1, "KeyHeld");
    for wrong in [
        &["connect"][..],
        &["connect", "--key"],
        &["keys", "list", "--limit", "x"],
        &["backends", "logs", "../x", "--data-dir", "/"],
        &["--controller", "https://x", "keys", "list"],
        &["--config", "/no/such/file", "keys", "list"],
        &["dev", "--controllers", "0"],
        &["dev", "--base-port", "65535"],
        &["cluster", "init"],
        &["cluster", "init", "--members", "a:1", "--lease", "hard=59s"],
        &["cluster", "add"],
        &["cluster", "add", "4", "a:1"],
        &["cluster", "move", "a:1"],
        &["cluster", "remove", "a:1"],
        &["no-such-command"],
        &[],
    ] {
        let output = run(&refusing.url, wrong).await;
        assert_eq!(output.status.code(), Some(2), "{wrong:?} {output:?}");
        assert_eq!(stdout(&output), "", "{wrong:?}");
    }
    assert_fails(&run(&nobody().await, &["keys", "list"]).await, 3, "no controller could be reached");
    for fine in ["--help", "--version"] {
        assert_eq!(run(&refusing.url, &[fine]).await.status.code(), Some(0));
    }
}

#[tokio::test]
async fn listings_are_tables_for_people_and_arrays_for_programs() {
    let controller = Fake::start(|_, asked| {
        json(&match asked.line.split(['?', ' ']).nth(1).unwrap() {
            "/ctrl/keys" => format!(r#"{{"keys":[{KEY}]}}"#),
            "/ctrl/backends" => format!(r#"{{"backends":[{BACKEND}]}}"#),
            "/ctrl/drones" => r#"{"drones":[{"id":1,"name":"dr-a","cluster":"c","pool":"","ready":true,
                "draining":false,"backend_count":3,"last_heartbeat_age_ms":1200,"version":"0.1.0"}]}"#
                .to_owned(),
            _ => r#"{"cluster_id":"c","leader":1,"term":2,"cluster_time":43000,"members":[],
                "checksum":{"index":1,"value":"02"},"lease":null}"#
                .to_owned(),
        })
    })
    .await;
    let keys = run(&controller.url, &["keys", "list"]).await;
    assert_eq!(
        stdout(&keys),
        "NAMESPACE  NAME  BACKEND  DRONE  TOKEN  RENEWS  EXPIRES IN\n\
         n          room  ba-1     dr-a       7  yes            42s\n"
    );
    let backends = run(&controller.url, &["backends", "list"]).await;
    assert_eq!(
        stdout(&backends),
        "ID    KEY     DRONE  STATUS  ADDRESS         TOKEN  AGE\n\
         ba-1  n/room  dr-a   ready   127.0.0.1:4000      7  42s\n"
    );
    let drones = run(&controller.url, &["drones", "list"]).await;
    assert_eq!(
        stdout(&drones),
        "NAME  CLUSTER  STATE  BACKENDS   HEARD  VERSION\n\
         dr-a  c        ready         3  1s ago  0.1.0\n"
    );
    for (args, id) in [(["keys", "list"], "name"), (["backends", "list"], "id"), (["drones", "list"], "name")]
    {
        let output = run(&controller.url, &[&args[..], &["--json"]].concat()).await;
        let rows: Value = serde_json::from_str(stdout(&output)).unwrap();
        assert!(rows[0][id].is_string(), "{rows}");
        assert_eq!(stderr(&output), "");
    }
    let shown = run(&controller.url, &["backends", "show", "ba-1", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(stdout(&shown)).unwrap()["fencing_token"], 7);
    assert_fails(&run(&controller.url, &["backends", "show", "ba"]).await, 1, "there is no backend ba");
}

#[tokio::test]
async fn an_empty_listing_says_so_to_people_and_is_an_empty_array_to_programs() {
    let controller = Fake::start(|_, _| json(r#"{"keys":[],"backends":[],"drones":[]}"#)).await;
    for (what, text) in [("keys", "no keys held\n"), ("backends", "no backends\n"), ("drones", "no drones\n")]
    {
        assert_eq!(stdout(&run(&controller.url, &[what, "list"]).await), text);
        assert_eq!(stdout(&run(&controller.url, &[what, "list", "--json"]).await), "[]\n");
    }
}

#[tokio::test]
async fn a_limit_is_kept_and_the_rest_is_mentioned() {
    let controller =
        Fake::start(|number, _| json(&format!(r#"{{"keys":[{KEY},{KEY}],"next_cursor":"c{number}"}}"#)))
            .await;
    let output = run(&controller.url, &["keys", "list", "--json", "--limit", "3"]).await;
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).unwrap().as_array().unwrap().len(), 3);
    assert!(stderr(&output).contains("only the first 3"), "{output:?}");
    assert_eq!(controller.lines(), ["GET /ctrl/keys?limit=4", "GET /ctrl/keys?limit=4&cursor=c0"]);
}

#[tokio::test]
async fn key_commands_reach_their_paths() {
    let controller = Fake::start(|number, _| json(if number == 0 { KEY } else { "null" })).await;
    let shown = run(&controller.url, &["keys", "show", "room", "--namespace", "n", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(stdout(&shown)).unwrap()["token"], 7);
    for verb in ["prevent-renewal", "allow-renewal", "revoke"] {
        let output = run(&controller.url, &["keys", verb, "room", "--namespace", "n"]).await;
        assert!(output.status.success() && stdout(&output).starts_with("n/room "), "{output:?}");
    }
    assert_eq!(
        controller.lines(),
        [
            "GET /ctrl/key?name=room&namespace=n",
            "POST /ctrl/key/prevent-renewal",
            "POST /ctrl/key/allow-renewal",
            "DELETE /ctrl/key?name=room&namespace=n",
        ]
    );
    assert_eq!(
        serde_json::from_str::<Value>(&controller.asked()[1].body).unwrap(),
        value!({"name": "room", "namespace": "n"})
    );
}

#[tokio::test]
async fn backends_and_drones_are_ended_and_drained_by_name() {
    let controller = Fake::start(|_, asked| {
        json(match asked.line.as_str() {
            line if line.starts_with("GET /ctrl/drones") => {
                r#"{"drones":[{"id":1,"name":"dr-a","cluster":"localhost:7100","pool":"","ready":true,
                "draining":false,"backend_count":3,"version":"0.1.0"}]}"#
            }
            line if line.ends_with("/drain") => r#"{"updated":true}"#,
            _ => "null",
        })
    })
    .await;
    assert!(run(&controller.url, &["backends", "terminate", "ba-1"]).await.status.success());
    assert!(run(&controller.url, &["backends", "terminate", "ba-1", "--hard"]).await.status.success());
    let drained = run(&controller.url, &["drones", "drain", "dr-a", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(stdout(&drained)).unwrap(), value!({"updated": true}));
    assert_fails(&run(&controller.url, &["drones", "drain", "dr-z"]).await, 1, "there is no drone dr-z");
    let posts: Vec<_> = controller.lines().into_iter().filter(|line| line.starts_with("POST")).collect();
    assert_eq!(
        posts,
        [
            "POST /ctrl/b/ba-1/soft-terminate",
            "POST /ctrl/b/ba-1/hard-terminate",
            "POST /ctrl/c/localhost:7100/d/dr-a/drain",
        ]
    );
}

#[tokio::test]
async fn a_drain_has_a_deadline_is_waited_for_and_undone() {
    let looks = Arc::new(AtomicUsize::new(0));
    let controller = Fake::start(move |_, asked| {
        json(&match asked.line.as_str() {
            line if line.starts_with("GET /ctrl/drones") => {
                // The first look is for the drone's cluster.
                let left = [3, 2, 1, 0][looks.fetch_add(1, Ordering::SeqCst).min(3)];
                format!(
                    r#"{{"drones":[{{"id":1,"name":"dr-a","cluster":"c","pool":"","ready":true,
                    "draining":true,"stopping":true,"backend_count":{left},"version":"0.1.0"}}]}}"#
                )
            }
            line if line.ends_with("/drain") => r#"{"updated":true,"remaining":3}"#.to_owned(),
            _ => "null".to_owned(),
        })
    })
    .await;
    let drained = run(&controller.url, &["drones", "drain", "dr-a", "--deadline", "5m", "--wait"]).await;
    assert_eq!(stdout(&drained), "dr-a takes no new backends and has none\n");
    assert_eq!(controller.lines().iter().filter(|line| line.starts_with("GET")).count(), 4);
    let cluster = ["--cluster", "c"];
    let drained = run(&controller.url, &[&["drones", "drain", "dr-a"][..], &cluster].concat()).await;
    assert_eq!(stdout(&drained), "dr-a takes no new backends and has 3 backends\n");
    let undone = run(&controller.url, &[&["drones", "undrain", "dr-a"][..], &cluster].concat()).await;
    assert_eq!(stdout(&undone), "dr-a takes backends again\n");
    let listed = run(&controller.url, &["drones", "list"]).await;
    assert!(stdout(&listed).contains("stopping"), "{listed:?}");
    let bodies: Vec<_> =
        controller.asked().into_iter().filter(|asked| asked.line.starts_with("POST")).collect();
    let bodies: Vec<_> = bodies.iter().map(|asked| asked.body.as_str()).collect();
    assert_eq!(bodies, [r#"{"deadline_ms":300000}"#, "", r#"{"undo":true}"#]);
}

#[tokio::test]
async fn a_drain_that_does_not_end_in_time_is_a_failure() {
    let controller = Fake::start(|_, asked| {
        json(if asked.line.ends_with("/drain") {
            r#"{"updated":false,"remaining":1}"#
        } else {
            r#"{"drones":[{"id":1,"name":"dr-a","cluster":"c","pool":"","ready":true,
            "draining":true,"backend_count":1,"version":"0.1.0"}]}"#
        })
    })
    .await;
    let args = ["drones", "drain", "dr-a", "--wait", "--wait-timeout", "1ms"];
    assert_fails(&run(&controller.url, &args).await, 1, "dr-a still has 1 backend");
}

/// A controller with one backend whose statuses are `statuses`.
async fn one_backend(statuses: &'static [&'static str]) -> Fake {
    Fake::start(move |_, asked| match asked.line.split(['?', ' ']).nth(1).unwrap() {
        "/ctrl/connect" => json(CONNECTED),
        "/pub/b/ba-1/status-stream" => {
            let event =
                |status: &&str| format!("id: {status}\ndata: {{\"status\":\"{status}\",\"time\":1}}\n\n");
            sse(&statuses.iter().map(event).collect::<String>())
        }
        "/ctrl/backends" => json(&format!(r#"{{"backends":[{BACKEND}]}}"#)),
        _ => refusal(ApiErrorKind::NotFound),
    })
    .await
}

#[tokio::test]
async fn connect_prints_what_was_got() {
    let controller = one_backend(&[]).await;
    let connect = ["connect", "--key", "k", "--", "server"];
    let text = run(&controller.url, &connect).await;
    for line in [
        "backend        ba-1",
        "spawned        yes",
        "fencing token  7",
        "token          to-1",
        "key            k",
    ] {
        assert!(stdout(&text).lines().any(|l| l == line), "{line:?} is missing:\n{}", stdout(&text));
    }
    let output = run(&controller.url, &["connect", "--key", "k", "--json", "--", "server"]).await;
    let response: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!((&response["fencing_token"], &response["address"]), (&value!(7), &Value::Null));
    let asked: Value = serde_json::from_str(&controller.asked()[0].body).unwrap();
    assert_eq!(asked["spawn_config"]["executable"], value!({"command": ["server"], "env": {}}));
}

#[tokio::test]
async fn connect_waits_until_ready_and_prints_the_address() {
    let controller = one_backend(&["scheduled", "starting", "ready"]).await;
    let text = run(&controller.url, &["connect", "--key", "k", "--wait", "--", "server"]).await;
    assert!(text.status.success(), "{text:?}");
    assert!(stdout(&text).ends_with("\naddress        127.0.0.1:4000\n"), "{text:?}");
    let states: Vec<_> = stderr(&text).lines().filter_map(|l| l.split_whitespace().last()).collect();
    assert_eq!(states, ["scheduled", "starting", "ready"]);
    let output = run(&controller.url, &["connect", "--key", "k", "--wait", "--json", "--", "server"]).await;
    let response: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!((&response["status"], &response["address"]), (&value!("ready"), &value!("127.0.0.1:4000")));
}

#[tokio::test]
async fn connect_that_waits_in_vain_fails() {
    let connect = ["connect", "--key", "k", "--wait", "--wait-timeout", "300ms", "--json", "--", "server"];
    let ended = one_backend(&["scheduled", "terminated"]).await;
    let output = run(&ended.url, &connect).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("ba-1 ended before it was ready"), "{output:?}");
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).unwrap()["status"], "terminated");
    let slow = one_backend(&["scheduled", "loading"]).await;
    let output = run(&slow.url, &connect).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("not ready after 300ms; it is loading"), "{output:?}");
}

#[tokio::test]
async fn cluster_status_asks_each_controller_how_far_it_is() {
    let member = Fake::start(|_, _| {
        json(r#"{"cluster_id":"cl-1","leader":1,"term":2,"cluster_time":1000,"checksum":{"index":8,"value":"00000000000000ff"},
            "lease":{"renew_ms":30000,"soft_terminate_ms":40000,"hard_terminate_ms":50000,"expiry_ms":60000},
            "members":[{"id":2,"url":null,"peer_addr":"p:2","role":"follower","last_log":9,"applied":8,"lag":null}]}"#)
    })
    .await;
    let (member_url, gone_url) = (member.url.clone(), nobody().await);
    let leader = Fake::start(move |_, _| {
        json(&format!(
            r#"{{"cluster_id":"cl-1","leader":1,"term":2,"cluster_time":1000,"checksum":{{"index":8,"value":"00000000000000ff"}},"checksum_agreement":{{"state":"split","index":8,"values":[{{"member":1,"value":"00000000000000ff"}},{{"member":2,"value":"00000000000000fe"}}]}},
            "lease":{{"renew_ms":30000,"soft_terminate_ms":40000,"hard_terminate_ms":50000,"expiry_ms":60000}},
            "members":[
              {{"id":1,"url":null,"peer_addr":"p:1","role":"leader","last_log":9,"applied":9,"lag":null}},
              {{"id":2,"url":"{member_url}","peer_addr":"p:2","role":"follower","last_log":null,"applied":null,"lag":null}},
              {{"id":3,"url":"{gone_url}","peer_addr":"p:3","role":"follower","last_log":null,"applied":null,"lag":null}}]}}"#
        ))
    })
    .await;
    let output = run(&leader.url, &["cluster", "status", "--json"]).await;
    let info: Value = serde_json::from_str(stdout(&output)).unwrap();
    let lags: Vec<_> = info["members"].as_array().unwrap().iter().map(|m| m["lag"].as_u64()).collect();
    assert_eq!(lags, [Some(0), Some(1), None]);
    assert_eq!(member.lines(), ["GET /ctrl/cluster?consistency=local"]);
    let text = run(&leader.url, &["cluster", "status"]).await;
    assert!(stdout(&text).contains("lease         renew=30s,soft=40s,hard=50s,expiry=60s"), "{text:?}");
    assert!(stdout(&text).contains("checksum      00000000000000ff at index 8"), "{text:?}");
    let differ = "replicas      DIFFER at index 8, no key is acquired: member 1 has 00000000000000ff, member 2 has \
                  00000000000000fe; decide with cluster accept-checksum 8 CHECKSUM";
    assert!(stdout(&text).contains(differ), "{text:?}");
    assert!(stdout(&text).lines().last().unwrap().ends_with("-    -  no"), "{text:?}");
}

#[tokio::test]
async fn cluster_init_asks_the_first_controller_that_answers() {
    let formed = Fake::start(|_, _| {
        json(r#"{"cluster_id":"cl-1","members":[{"id":1,"peer_addr":"a:1"},{"id":2,"peer_addr":"b:1"}]}"#)
    })
    .await;
    let init = ["cluster", "init", "--members", "a:1,b:1"];
    let urls = format!("{},{}", nobody().await, formed.url);
    assert_eq!(stdout(&run(&urls, &init).await), "cluster cl-1 is formed: 1 at a:1, 2 at b:1\n");
    let lease = ["--lease", "renew=1s,soft=2s,hard=3s,expiry=5s", "--json"];
    let output = run(&urls, &[&init[..], &lease].concat()).await;
    let result: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!(result["members"][1], value!({"id": 2, "peer_addr": "b:1"}));
    let posts = || formed.asked().into_iter().filter(|asked| asked.line == "POST /ctrl/cluster/init");
    let bodies: Vec<Value> = posts().map(|asked| serde_json::from_str(&asked.body).unwrap()).collect();
    assert_eq!(bodies[0], value!({"members": ["a:1", "b:1"]}));
    assert_eq!(bodies[1]["lease"]["expiry_ms"], 5_000);
    assert!(formed.lines().contains(&"GET /ctrl/ready".to_owned()), "it waits for a leader");
    // The first one that answers decides: another one must not be asked for a second cluster.
    let refusing = Fake::start(|_, _| refusal(ApiErrorKind::ChangeUnsafe)).await;
    let urls = format!("{},{}", refusing.url, formed.url);
    assert_fails(&run(&urls, &init).await, 1, "this is ChangeUnsafe (ChangeUnsafe)");
    let there = Fake::start(|_, _| refusal(ApiErrorKind::AlreadyInitialised)).await;
    assert_fails(&run(&there.url, &init).await, 1, "AlreadyInitialised");
    assert_eq!(posts().count(), 2);
    assert_fails(&run(&nobody().await, &init).await, 3, "no controller could be reached");
}

#[tokio::test]
async fn members_are_added_moved_and_removed_by_name() {
    let controller = Fake::start(|_, asked| {
        json(match asked.line.as_str() {
            "DELETE /ctrl/cluster/members/3" => r#"{"id":3,"role":"removed","updated":true}"#,
            _ if asked.body.contains("\"id\"") => r#"{"id":2,"role":"voter","updated":true}"#,
            _ => r#"{"id":4,"role":"learner","updated":true}"#,
        })
    })
    .await;
    let added = run(&controller.url, &["cluster", "add", "d:1"]).await;
    assert_eq!(stdout(&added), "member 4 is added; it votes as soon as it has caught up\n");
    let moved = run(&controller.url, &["cluster", "move", "2", "e:1"]).await;
    assert_eq!(stdout(&moved), "member 2 is reached at e:1 from now on\n");
    let removed = run(&controller.url, &["cluster", "remove", "3"]).await;
    assert_eq!(stdout(&removed), "member 3 is removed; its id can't be used again\n");
    let again = run(&controller.url, &["cluster", "add", "d:1", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(stdout(&again)).unwrap()["id"], 4);
    let post = "POST /ctrl/cluster/members";
    assert_eq!(controller.lines(), [post, post, "DELETE /ctrl/cluster/members/3", post]);
    let bodies: Vec<_> = controller.asked().into_iter().map(|asked| asked.body).collect();
    assert_eq!(bodies[..2], [r#"{"peer_addr":"d:1"}"#, r#"{"id":2,"peer_addr":"e:1"}"#]);

    let refusing = Fake::start(|_, _| refusal(ApiErrorKind::MemberIdUsed)).await;
    for command in
        [&["cluster", "add", "d:1"][..], &["cluster", "move", "2", "e:1"], &["cluster", "remove", "3"]]
    {
        assert_fails(&run(&refusing.url, command).await, 1, "this is MemberIdUsed (MemberIdUsed)");
        let unreachable = [command, &["--timeout", "1s"]].concat();
        assert_fails(&run(&nobody().await, &unreachable).await, 3, "no controller could be reached");
    }
}

#[tokio::test]
async fn cluster_add_waits_until_the_new_member_votes() {
    let looks = Arc::new(AtomicUsize::new(0));
    let controller = Fake::start(move |_, asked| {
        if asked.line.starts_with("POST") {
            return json(r#"{"id":4,"role":"learner","updated":true}"#);
        }
        let role = if looks.fetch_add(1, Ordering::SeqCst) == 0 { "learner" } else { "follower" };
        json(&format!(
            r#"{{"cluster_id":"c","leader":1,"term":2,"cluster_time":1,"checksum":{{"index":1,"value":2}},"lease":null,
            "members":[{{"id":4,"url":null,"peer_addr":"d:1","role":"{role}","last_log":1,"applied":1,"lag":null}}]}}"#
        ))
    })
    .await;
    let added = run(&controller.url, &["cluster", "add", "d:1", "--wait"]).await;
    assert_eq!(stdout(&added), "member 4 votes\n");
    assert_eq!(controller.lines().iter().filter(|line| line.starts_with("GET")).count(), 2);
}

#[tokio::test]
async fn cluster_status_says_what_to_do_about_a_member() {
    let leader = Fake::start(|_, _| {
        json(
            r#"{"cluster_id":"cl-1","leader":1,"term":2,"cluster_time":1000,"checksum":{"index":8,"value":255},
            "lease":null,"members":[{"id":2,"url":null,"peer_addr":"p:2","identity":"0a","role":"follower",
            "problem":"lost disk: remove this member, then add the new one",
            "last_log":null,"applied":null,"lag":null}]}"#,
        )
    })
    .await;
    let text = run(&leader.url, &["cluster", "status"]).await;
    let last = stdout(&text).lines().last();
    assert_eq!(last, Some("member 2: lost disk: remove this member, then add the new one"), "{text:?}");
}

#[tokio::test]
async fn accept_checksum_posts_the_decision_and_checks_the_value_first() {
    let controller = Fake::start(|_, _| json(r#"{"updated":true}"#)).await;
    let output = run(&controller.url, &["cluster", "accept-checksum", "8", "00000000000000fe"]).await;
    assert!(stdout(&output).starts_with("checksum 00000000000000fe at index 8 is right"), "{output:?}");
    assert_eq!(controller.lines(), ["POST /ctrl/cluster/checksum"]);
    let wrong = run(&controller.url, &["cluster", "accept-checksum", "8", "254?"]).await;
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("hexadecimal"), "{wrong:?}");
}

#[tokio::test]
async fn logs_are_read_from_disk_and_followed_to_the_backends_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("drone-1/backends/ba-1/output.log");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "one\n").unwrap();
    let data_dir = dir.path().to_str().unwrap();
    // Nobody can say that it ends: it is followed until its file is gone.
    let nobody = nobody().await;
    let logs = ["backends", "logs", "ba-1", "--data-dir", data_dir];
    assert_eq!(stdout(&run(&nobody, &logs).await), "one\n");
    let mut follow =
        command(&nobody, &[&logs[..], &["--follow"]].concat()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert_eq!(timeout(STEP_MAX, lines.next_line()).await.unwrap().unwrap().as_deref(), Some("one"));
    let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"two\n").unwrap();
    assert_eq!(timeout(STEP_MAX, lines.next_line()).await.unwrap().unwrap().as_deref(), Some("two"));
    // The file is full: it is renamed, and the path leads to a new one at once.
    std::fs::hard_link(&path, path.with_extension("log.1")).unwrap();
    std::fs::write(path.with_extension("log.new"), "three\n").unwrap();
    std::fs::rename(path.with_extension("log.new"), &path).unwrap();
    assert_eq!(timeout(STEP_MAX, lines.next_line()).await.unwrap().unwrap().as_deref(), Some("three"));
    assert_eq!(stdout(&run(&nobody, &logs).await), "one\ntwo\nthree\n");
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"four\n").unwrap();
    assert_eq!(timeout(STEP_MAX, lines.next_line()).await.unwrap().unwrap().as_deref(), Some("four"));
    std::fs::remove_file(path.with_extension("log.1")).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(timeout(STEP_MAX, follow.wait()).await.expect("it hangs").unwrap().success());
    // The service says that it has ended.
    std::fs::write(&path, "all\n").unwrap();
    let ended = one_backend(&["scheduled", "terminated"]).await;
    assert_eq!(stdout(&run(&ended.url, &[&logs[..], &["-f"]].concat()).await), "all\n");
    // Elsewhere.
    let elsewhere = run(&ended.url, &["backends", "logs", "ba-1", "--data-dir", "/no/such"]).await;
    assert_fails(&elsewhere, 1, "ba-1 is not under /no/such. It runs, or ran, on drone dr-a.");
}

#[tokio::test]
async fn a_reader_that_goes_away_is_no_error() {
    let controller = Fake::start(|_, _| json(&format!(r#"{{"keys":[{KEY}]}}"#))).await;
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command(&controller.url, &["keys", "list"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .await
        .unwrap();
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
}

#[tokio::test]
async fn settings_come_from_the_line_then_the_environment_then_the_file() {
    let (first, second, third) = (
        Fake::start(|_, _| json(r#"{"keys":[]}"#)).await,
        Fake::start(|_, _| json(r#"{"keys":[]}"#)).await,
        Fake::start(|_, _| json(r#"{"keys":[]}"#)).await,
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        &file,
        format!("controller = \"{}\"\njson = true\n[keys.list]\nprefix = \"p\"", third.url),
    )
    .unwrap();
    let config = file.path().to_str().unwrap();
    run(&second.url, &["keys", "list", "--config", config, "--controller", &first.url]).await;
    let mut from_env = command(&second.url, &["keys", "list"]);
    from_env.env("HOLDFAST_CONFIG", config).env("HOLDFAST_KEYS_LIST_PREFIX", "e");
    from_env.output().await.unwrap();
    let mut from_file = command("", &["--config", config, "keys", "list"]);
    let output = from_file.env_remove("HOLDFAST_CONTROLLER").output().await.unwrap();
    assert_eq!(stdout(&output), "[]\n");
    assert_eq!(first.lines(), ["GET /ctrl/keys?prefix=p&limit=1000"]);
    assert_eq!(second.lines(), ["GET /ctrl/keys?prefix=e&limit=1000"]);
    assert_eq!(third.lines(), ["GET /ctrl/keys?prefix=p&limit=1000"]);
}

#[tokio::test]
async fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run("http://none", &["completions", shell]).await;
        assert!(stdout(&output).contains("prevent-renewal"), "{shell}");
    }
}

/// A standard output that takes nothing: a full disk, or a pipe whose reader has gone.
fn useless_stdouts() -> [(Stdio, i32); 2] {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    [(full.into(), 1), (closed.into(), 0)]
}

#[tokio::test]
async fn a_full_stdout_is_a_failure_and_a_closed_one_is_a_quiet_end() {
    let controller = Fake::start(|_, _| json(&format!(r#"{{"keys":[{KEY}]}}"#))).await;
    for args in [&["keys", "list"][..], &["keys", "list", "--json"], &["completions", "bash"], &["--help"]] {
        for (stdout, code) in useless_stdouts() {
            let output = command(&controller.url, args).stdout(stdout).stderr(Stdio::piped()).output();
            let output = timeout(STEP_MAX, output).await.expect("it hangs").unwrap();
            assert_eq!(output.status.code(), Some(code), "{args:?} {output:?}");
            assert_eq!(stderr(&output).is_empty(), code == 0, "{args:?} {output:?}");
        }
    }
}

#[tokio::test]
async fn a_stderr_that_takes_nothing_changes_neither_result_nor_exit_code() {
    let controller = Fake::start(|_, _| json(&format!(r#"{{"keys":[{KEY}]}}"#))).await;
    for (args, code) in [(&["keys", "list", "--limit", "0"][..], 0), (&["keys", "show"], 2)] {
        for (stderr, _) in useless_stdouts() {
            let output = command(&controller.url, args).env("HOLDFAST_LOG", "trace").stderr(stderr).output();
            let output = timeout(STEP_MAX, output).await.expect("it hangs").unwrap();
            assert_eq!(output.status.code(), Some(code), "{args:?} {output:?}");
        }
    }
}
