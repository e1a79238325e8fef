//! Connection tokens that carry everything themselves, so that connecting to a held key writes no log entry.
//!
//! ```text
//!   token = base64url( version: 1 byte ‖ payload: JSON ‖ HMAC-SHA256(version ‖ payload): 32 bytes )
//! ```
//!
//! The MAC's key is the cluster's replicated secret, so every controller checks what any of them made. A token is valid
//! while its MAC is right, its expiry (cluster time) is ahead and its user is not revoked for that backend.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::Sha256;

/// The version that this program writes.
const VERSION: u8 = 1;
/// Bytes of the MAC.
const MAC_BYTES: usize = 32;
/// How long a token is valid, in milliseconds of cluster time. (A backend's user revokes earlier.)
pub const TOKEN_VALID_MS: u64 = 24 * 60 * 60 * 1000;
/// Longest `auth` object of a connect request, in bytes of JSON: it stands in every URL.
pub const AUTH_BYTES_MAX: usize = 4096;
/// Longest token that is looked at, in bytes.
pub const TOKEN_BYTES_MAX: usize = 8192;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// The backend it connects to.
    #[serde(rename = "b")]
    pub backend_id: String,
    /// The user it was made for.
    #[serde(rename = "u", default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Passed along with the connection.
    #[serde(rename = "a", default, skip_serializing_if = "Map::is_empty")]
    pub auth: Map<String, Value>,
    /// Cluster time in milliseconds.
    #[serde(rename = "x")]
    pub expires_at_ms: u64,
}

/// Why a token is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not made by this cluster, or damaged.
    #[error("the token is not one of this cluster's")]
    Forged,
    /// Its time has passed.
    #[error("the token has expired")]
    Expired,
    /// Its user's tokens were revoked.
    #[error("the token was revoked")]
    Revoked,
}

fn mac(secret: &[u8; 32], signed: &[u8]) -> Option<Hmac<Sha256>> {
    // HMAC takes keys of any length; `None` cannot happen, and if it did nothing would be valid.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).ok()?;
    mac.update(signed);
    Some(mac)
}

/// Makes a token.
pub fn sign(secret: &[u8; 32], payload: &Payload) -> Result<String, serde_json::Error> {
    let mut bytes = vec![VERSION];
    serde_json::to_writer(&mut bytes, payload)?;
    if let Some(mac) = mac(secret, &bytes) {
        bytes.extend_from_slice(&mac.finalize().into_bytes());
    }
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Checks a token at `now_ms` (cluster time). `is_revoked` says whether that user's tokens for that backend were
/// revoked; it is asked only about a token that is genuine and not expired.
pub fn verify(
    secret: &[u8; 32],
    token: &str,
    now_ms: u64,
    is_revoked: impl FnOnce(&str, &str) -> bool,
) -> Result<Payload, TokenError> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(TokenError::Forged);
    }
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| TokenError::Forged)?;
    let signed_bytes = bytes.len().checked_sub(MAC_BYTES).ok_or(TokenError::Forged)?;
    let (signed, given) = bytes.split_at(signed_bytes);
    // Constant time.
    mac(secret, signed).and_then(|mac| mac.verify_slice(given).ok()).ok_or(TokenError::Forged)?;
    let Some((&VERSION, payload)) = signed.split_first() else { return Err(TokenError::Forged) };
    let payload: Payload = serde_json::from_slice(payload).map_err(|_| TokenError::Forged)?;
    if payload.expires_at_ms <= now_ms {
        return Err(TokenError::Expired);
    }
    if payload.user.as_deref().is_some_and(|user| is_revoked(&payload.backend_id, user)) {
        return Err(TokenError::Revoked);
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload() -> Payload {
        Payload {
            backend_id: "ba-1".into(),
            user: Some("ann".into()),
            auth: serde_json::from_str(r#"{"role":"ä"}"#).unwrap(),
            expires_at_ms: 1_000,
        }
    }

    #[test]
    fn a_token_says_what_it_was_made_for_until_it_expires() {
        let token = sign(&[7; 32], &payload()).unwrap();
        assert_eq!(verify(&[7; 32], &token, 999, |_, _| false), Ok(payload()));
        assert_eq!(verify(&[7; 32], &token, 1_000, |_, _| false), Err(TokenError::Expired));
    }

    #[test]
    fn another_cluster_or_one_changed_bit_makes_it_worthless() {
        let token = sign(&[7; 32], &payload()).unwrap();
        assert_eq!(verify(&[8; 32], &token, 0, |_, _| false), Err(TokenError::Forged));
        let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let changed = URL_SAFE_NO_PAD.encode(changed);
            assert_eq!(verify(&[7; 32], &changed, 0, |_, _| false), Err(TokenError::Forged), "byte {at}");
        }
        for garbage in ["", "a", "!!!", &"A".repeat(TOKEN_BYTES_MAX + 1)] {
            assert_eq!(verify(&[7; 32], garbage, 0, |_, _| false), Err(TokenError::Forged));
        }
    }

    #[test]
    fn a_revoked_user_is_refused_and_others_are_not() {
        let token = sign(&[7; 32], &payload()).unwrap();
        let revoked = |backend: &str, user: &str| backend == "ba-1" && user == "ann";
        assert_eq!(verify(&[7; 32], &token, 0, revoked), Err(TokenError::Revoked));
        let nobody = sign(&[7; 32], &Payload { user: None, ..payload() }).unwrap();
        assert!(verify(&[7; 32], &nobody, 0, |_, _| true).is_ok());
    }

    #[test]
    fn the_longest_token_is_within_the_bound() {
        let auth = Map::from_iter([("k".to_owned(), Value::String("x".repeat(AUTH_BYTES_MAX - 8)))]);
        let user = Some("\"".repeat(holdfast_wire::limits::USER_BYTES_MAX));
        let token = sign(&[7; 32], &Payload { auth, user, ..payload() }).unwrap();
        assert!(token.len() <= TOKEN_BYTES_MAX, "{}", token.len());
    }
}
