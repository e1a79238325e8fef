//! The few messages of etcd's API that are needed, in protobuf's encoding, so that no build needs `protoc`.
//!
//! Field numbers are those of etcd's `rpc.proto`.

use crate::problem::{During, Result};

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3 | VARINT);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | BYTES);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

fn take_varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = data.split_first()?;
        *data = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_bytes<'a>(data: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = data.split_at_checked(count)?;
    *data = rest;
    Some(taken)
}

fn take_field<'a>(data: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let tag = take_varint(data)?;
    let value = match tag & 7 {
        VARINT => Value::Number(take_varint(data)?),
        BYTES => {
            let count = usize::try_from(take_varint(data)?).ok()?;
            Value::Bytes(take_bytes(data, count)?)
        }
        FIXED64 => take_bytes(data, 8).map(|_| Value::Other)?,
        FIXED32 => take_bytes(data, 4).map(|_| Value::Other)?,
        _ => return None,
    };
    Some((tag >> 3, value))
}

/// The last value of `field`; `None` if it is absent, which means its default.
fn find<'a>(mut data: &'a [u8], field: u64) -> Result<Option<Value<'a>>> {
    let mut found = None;
    while !data.is_empty() {
        let (number, value) = take_field(&mut data).during("an answer of etcd is not protobuf")?;
        if number == field {
            found = Some(value);
        }
    }
    Ok(found)
}

fn find_number(data: &[u8], field: u64) -> Result<u64> {
    Ok(match find(data, field)? {
        Some(Value::Number(value)) => value,
        _ => 0,
    })
}

/// `LeaseGrantRequest{TTL}`.
pub fn lease_grant(ttl_s: u64) -> Vec<u8> {
    let mut out = Vec::new();
    number(&mut out, 1, ttl_s);
    out
}

/// `LeaseGrantResponse.ID`; 0 if no lease was granted.
pub fn granted(answer: &[u8]) -> Result<u64> {
    find_number(answer, 2)
}

/// `TxnRequest`: if `key` was never created, put it with its lease.
pub fn create_if_absent(key: &str, value: &str, lease: u64) -> Vec<u8> {
    let mut compare = Vec::new();
    number(&mut compare, 1, 0); // result: EQUAL
    number(&mut compare, 2, 1); // target: CREATE
    bytes(&mut compare, 3, key.as_bytes());
    number(&mut compare, 5, 0); // create_revision
    let mut put = Vec::new();
    bytes(&mut put, 1, key.as_bytes());
    bytes(&mut put, 2, value.as_bytes());
    number(&mut put, 3, lease);
    let mut request = Vec::new();
    bytes(&mut request, 2, &put); // RequestOp.request_put
    let mut out = Vec::new();
    bytes(&mut out, 1, &compare);
    bytes(&mut out, 2, &request); // success
    out
}

/// `TxnResponse.succeeded`.
pub fn succeeded(answer: &[u8]) -> Result<bool> {
    Ok(find_number(answer, 2)? != 0)
}

/// `LeaseKeepAliveRequest{ID}`.
pub fn keep_alive(lease: u64) -> Vec<u8> {
    let mut out = Vec::new();
    number(&mut out, 1, lease);
    out
}

/// `LeaseKeepAliveResponse{ID, TTL}`; a TTL of 0 is a lease that is gone.
pub fn kept(answer: &[u8]) -> Result<(u64, u64)> {
    Ok((find_number(answer, 2)?, find_number(answer, 3)?))
}

/// `StatusResponse`: the member that answers, and the one that it takes for the leader (0: none).
pub fn status(answer: &[u8]) -> Result<(u64, u64)> {
    let member = match find(answer, 1)? {
        Some(Value::Bytes(header)) => find_number(header, 2)?,
        _ => 0,
    };
    Ok((member, find_number(answer, 4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_length_come_back() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            number(&mut out, 3, value);
            assert_eq!(find_number(&out, 3).unwrap(), value);
            assert_eq!(find_number(&out, 2).unwrap(), 0);
        }
    }

    #[test]
    fn a_transaction_has_the_bytes_of_the_specification() {
        let expected = [
            0x0a, 0x09, 0x08, 0x00, 0x10, 0x01, 0x1a, 0x01, b'k', 0x28, 0x00, // compare
            0x12, 0x0a, 0x12, 0x08, 0x0a, 0x01, b'k', 0x12, 0x01, b'v', 0x18, 0x05, // success: put
        ];
        assert_eq!(create_if_absent("k", "v", 5), expected);
    }

    #[test]
    fn answers_are_read_past_their_headers() {
        let mut header = Vec::new();
        number(&mut header, 2, 77);
        let mut answer = Vec::new();
        bytes(&mut answer, 1, &header);
        number(&mut answer, 2, 9);
        number(&mut answer, 3, 60);
        number(&mut answer, 4, 77);
        assert_eq!(granted(&answer).unwrap(), 9);
        assert_eq!(kept(&answer).unwrap(), (9, 60));
        assert_eq!(status(&answer).unwrap(), (77, 77));
        assert!(succeeded(&answer).unwrap());
        assert!(!succeeded(&header[..0]).unwrap());
    }

    #[test]
    fn damaged_answers_are_errors() {
        for bad in [&[0x0a, 0x05, 1][..], &[0x08], &[0x0b], &[0x80; 12]] {
            assert!(find(bad, 1).is_err(), "{bad:?}");
        }
    }
}
