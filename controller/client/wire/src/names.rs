//! Checks on names. Each returns a [`FieldError`] that names the field it was given for.

use crate::error::FieldError;
use crate::limits::{CLUSTER_BYTES_MAX, NAME_BYTES_MAX};

/// Checks a backend, pool or subdomain name: `[a-z0-9-]`, 1 to [`NAME_BYTES_MAX`] bytes.
pub fn check_name(field: &'static str, value: &str) -> Result<(), FieldError> {
    if value.is_empty() {
        return Err(FieldError::new(field, "must not be empty"));
    }
    check_name_or_empty(field, value)
}

/// As [`check_name`], but the empty string is allowed (the default pool).
pub fn check_name_or_empty(field: &'static str, value: &str) -> Result<(), FieldError> {
    if value.len() > NAME_BYTES_MAX {
        return Err(FieldError::new(
            field,
            format!("is {} bytes, at most {NAME_BYTES_MAX} are allowed", value.len()),
        ));
    }
    if !value.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return Err(FieldError::new(field, "may hold only a-z, 0-9 and '-'"));
    }
    Ok(())
}

/// Checks a drone name: as [`check_name`], beginning with `dr`.
pub fn check_drone_name(field: &'static str, value: &str) -> Result<(), FieldError> {
    check_name(field, value)?;
    if !value.starts_with("dr") {
        return Err(FieldError::new(field, "must begin with 'dr'"));
    }
    Ok(())
}

/// Checks a cluster name: a host name or IP address, with an optional port.
pub fn check_cluster(field: &'static str, value: &str) -> Result<(), FieldError> {
    if value.is_empty() {
        return Err(FieldError::new(field, "must not be empty"));
    }
    if value.len() > CLUSTER_BYTES_MAX {
        return Err(FieldError::new(
            field,
            format!("is {} bytes, at most {CLUSTER_BYTES_MAX} are allowed", value.len()),
        ));
    }
    let (host, port) = match value.rsplit_once(':') {
        // A bare IPv6 address in brackets has colons but no port.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (value, None),
    };
    if host.is_empty()
        || !host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'[' | b']' | b':'))
    {
        return Err(FieldError::new(field, "must be HOST or HOST:PORT"));
    }
    if let Some(port) = port
        && port.parse::<u16>().is_err()
    {
        return Err(FieldError::new(field, "has a port that is not a number from 0 to 65535"));
    }
    Ok(())
}

/// Checks free text: UTF-8 without control characters, at most `bytes_max` bytes.
pub fn check_text(field: &'static str, value: &str, bytes_max: usize) -> Result<(), FieldError> {
    if value.len() > bytes_max {
        return Err(FieldError::new(
            field,
            format!("is {} bytes, at most {bytes_max} are allowed", value.len()),
        ));
    }
    if value.chars().any(char::is_control) {
        return Err(FieldError::new(field, "must not hold control characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lowercase_digits_and_dashes() {
        assert!(check_name("id", "ba-0z").is_ok());
        for bad in ["", "A", "a_b", "a b", "ä", "a\n", &"a".repeat(46)] {
            assert_eq!(check_name("id", bad).map_err(|e| e.field), Err("id"), "{bad:?}");
        }
        assert!(check_name("id", &"a".repeat(45)).is_ok());
    }

    #[test]
    fn drone_names_begin_with_dr() {
        assert!(check_drone_name("name", "dr-a").is_ok());
        assert!(check_drone_name("name", "a-dr").is_err());
    }

    #[test]
    fn clusters_are_hosts_with_an_optional_port() {
        for good in ["localhost", "plane.example.com:443", "127.0.0.1:9090", "[::1]:80", "[::1]"] {
            assert!(check_cluster("cluster", good).is_ok(), "{good}");
        }
        for bad in ["", ":80", "a b", "host:port", "host:99999", "a/b", "a\0"] {
            assert!(check_cluster("cluster", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn text_has_no_control_characters_and_a_bound() {
        assert!(check_text("tag", "émoji 🦀", 64).is_ok());
        assert!(check_text("tag", "a\u{7f}", 64).is_err());
        assert!(check_text("tag", "a\0", 64).is_err());
        assert!(check_text("tag", "abc", 2).is_err());
    }
}
