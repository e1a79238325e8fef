//! Keys.

use crate::error::FieldError;
use crate::limits::{KEY_NAME_BYTES_MAX, KEY_NAMESPACE_BYTES_MAX, KEY_TAG_BYTES_MAX};
use crate::names::check_text;
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// A key as a request names it. `(namespace, name)` is unique in the whole store; `tag` must match a live holder's.
#[derive(
    Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode,
)]
pub struct KeyConfig {
    /// Identifies the backend; passed to it.
    pub name: String,
    /// Lets names be reused; not passed to the backend.
    #[serde(default)]
    pub namespace: String,
    /// A connect whose tag differs from the holder's is refused.
    #[serde(default)]
    pub tag: String,
}

impl KeyConfig {
    /// Checks all three fields; the error names the field as `key.…`.
    pub fn check(&self) -> Result<(), FieldError> {
        if self.name.is_empty() {
            return Err(FieldError::new("key.name", "must not be empty"));
        }
        check_text("key.name", &self.name, KEY_NAME_BYTES_MAX)?;
        check_text("key.namespace", &self.namespace, KEY_NAMESPACE_BYTES_MAX)?;
        check_text("key.tag", &self.tag, KEY_TAG_BYTES_MAX)
    }
}
