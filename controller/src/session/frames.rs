//! Reading frames of the drone socket. Pure.

use holdfast_wire::drone::MessageFromDrone;
use holdfast_wire::limits::{ACTIVITIES_MAX, BACKENDS_PER_PAGE_MAX, BODY_BYTES_MAX, RENEW_KEYS_MAX};
use holdfast_wire::names::check_name;
use serde_json::Value;

/// The messages that this controller knows, by their tags.
const KINDS: [&str; 9] = [
    "Heartbeat",
    "RenewKey",
    "RenewKeys",
    "BackendEvent",
    "AckAction",
    "BackendMetrics",
    "Draining",
    "BackendActivity",
    "Backends",
];
/// Longest action id that can be acknowledged, in bytes. Ours are shorter.
const ACTION_ID_BYTES_MAX: usize = 64;

/// A text frame.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// A message.
    Message(MessageFromDrone),
    /// A message of a kind that this version does not know: ignored.
    Unknown(String),
    /// Not a message: the session is closed with this reason.
    Bad(String),
}

/// Reads a text frame.
pub fn read(text: &str) -> Frame {
    if text.len() > BODY_BYTES_MAX {
        return Frame::Bad(format!("the message is larger than {BODY_BYTES_MAX} bytes"));
    }
    match serde_json::from_str::<MessageFromDrone>(text) {
        Ok(message) => match check(&message) {
            Ok(()) => Frame::Message(message),
            Err(problem) => Frame::Bad(problem),
        },
        Err(error) => explain(text, &error),
    }
}

/// Tells a newer drone's message from one that is wrong.
fn explain(text: &str, error: &serde_json::Error) -> Frame {
    let tag = match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(object)) if object.len() == 1 => object.into_iter().next().map(|(tag, _)| tag),
        // A kind without content.
        Ok(Value::String(tag)) => Some(tag),
        Ok(_) => None,
        Err(error) => return Frame::Bad(format!("the message is not JSON: {error}")),
    };
    match tag {
        Some(tag) if !KINDS.contains(&tag.as_str()) => Frame::Unknown(truncated(&tag, 64).to_owned()),
        _ => Frame::Bad(format!("not a message: {error}")),
    }
}

fn check(message: &MessageFromDrone) -> Result<(), String> {
    let name = |field, id: &str| check_name(field, id).map_err(|error| error.to_string());
    match message {
        MessageFromDrone::Heartbeat(_) | MessageFromDrone::BackendMetrics(_) => Ok(()),
        MessageFromDrone::RenewKey(renew) => name("RenewKey.backend", &renew.backend),
        MessageFromDrone::RenewKeys(renew) if renew.keys.len() > RENEW_KEYS_MAX => Err(format!(
            "RenewKeys.keys has {} entries, at most {RENEW_KEYS_MAX} are allowed",
            renew.keys.len()
        )),
        MessageFromDrone::RenewKeys(renew) => {
            renew.keys.iter().try_for_each(|key| name("RenewKeys.keys.backend", &key.backend))
        }
        MessageFromDrone::BackendEvent(event) => name("BackendEvent.backend_id", &event.backend_id),
        MessageFromDrone::AckAction { action_id } if action_id.len() > ACTION_ID_BYTES_MAX => {
            Err(format!("AckAction.action_id is longer than {ACTION_ID_BYTES_MAX} bytes"))
        }
        MessageFromDrone::AckAction { .. } | MessageFromDrone::Draining {} => Ok(()),
        MessageFromDrone::BackendActivity(activity) if activity.backends.len() > ACTIVITIES_MAX => {
            Err(format!(
                "BackendActivity.backends has {} entries, at most {ACTIVITIES_MAX} are allowed",
                activity.backends.len()
            ))
        }
        MessageFromDrone::BackendActivity(activity) => activity
            .backends
            .iter()
            .try_for_each(|item| name("BackendActivity.backends.backend", &item.backend)),
        MessageFromDrone::Backends(page) if page.backends.len() > BACKENDS_PER_PAGE_MAX => Err(format!(
            "Backends.backends has {} entries, at most {BACKENDS_PER_PAGE_MAX} are allowed",
            page.backends.len()
        )),
        MessageFromDrone::Backends(page) => {
            page.backends.iter().try_for_each(|item| name("Backends.backends.backend", &item.backend))
        }
    }
}

/// At most `bytes_max` bytes of `text`, cut between characters.
pub fn truncated(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::drone::Heartbeat;
    use serde_json::json;

    #[test]
    fn messages_unknown_kinds_and_garbage_are_told_apart() {
        assert_eq!(
            read(r#"{"Heartbeat":{"local_time":-5,"new":1}}"#),
            Frame::Message(MessageFromDrone::Heartbeat(Heartbeat { local_time: -5 }))
        );
        assert_eq!(read(r#"{"Teleport":{"to":"x"}}"#), Frame::Unknown("Teleport".into()));
        assert_eq!(read(r#""Goodbye""#), Frame::Unknown("Goodbye".into()));
        for bad in [
            "",
            "x",
            "{",
            "[]",
            "5",
            "{}",
            r#"{"Heartbeat":{}}"#,
            r#"{"Heartbeat":{"local_time":"x"}}"#,
            r#"{"Heartbeat":{"local_time":1},"RenewKey":{}}"#,
            r#"{"RenewKey":{"backend":"","local_time":1}}"#,
            r#"{"BackendEvent":{"event_id":1,"backend_id":"A","state":{"status":"ready","address":"1.1.1.1:1"},"timestamp":1}}"#,
            r#"{"BackendEvent":{"event_id":1,"backend_id":"a","state":{"status":"flying"},"timestamp":1}}"#,
        ] {
            assert!(matches!(read(bad), Frame::Bad(_)), "{bad}: {:?}", read(bad));
        }
    }

    #[test]
    fn bounds_are_checked() {
        let keys = |count| {
            let keys = vec![json!({"backend": "b", "token": 1}); count];
            read(&json!({"RenewKeys": {"local_time": 1, "keys": keys}}).to_string())
        };
        assert!(matches!(keys(RENEW_KEYS_MAX), Frame::Message(_)));
        assert!(matches!(keys(RENEW_KEYS_MAX + 1), Frame::Bad(_)));
        let activity = |count| {
            let backends = vec![json!({"backend": "b", "connections": 1}); count];
            read(&json!({"BackendActivity": {"activity_id": 1, "backends": backends}}).to_string())
        };
        assert!(matches!(activity(ACTIVITIES_MAX), Frame::Message(_)));
        assert!(matches!(activity(ACTIVITIES_MAX + 1), Frame::Bad(_)));
        let page = |count| {
            let backends = vec![json!({"backend": "b"}); count];
            read(&json!({"Backends": {"backends": backends, "last": true}}).to_string())
        };
        assert!(matches!(page(BACKENDS_PER_PAGE_MAX), Frame::Message(_)));
        assert!(matches!(page(BACKENDS_PER_PAGE_MAX + 1), Frame::Bad(_)));
        let ack = json!({"AckAction": {"action_id": "x".repeat(65)}}).to_string();
        assert!(matches!(read(&ack), Frame::Bad(_)));
        let large = json!({"BackendMetrics": "x".repeat(BODY_BYTES_MAX)}).to_string();
        assert!(matches!(read(&large), Frame::Bad(_)));
    }

    #[test]
    fn close_reasons_are_cut_between_characters() {
        assert_eq!(truncated("aä", 2), "a");
        assert_eq!(truncated("aä", 3), "aä");
        assert_eq!(truncated("a", 9), "a");
    }
}
