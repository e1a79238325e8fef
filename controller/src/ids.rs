//! Random names and tokens. They are made here, by the proposer, and travel in the log entry, because `apply` has no
//! randomness.

use rand::Rng;

/// Letters of generated ids; every generated id passes `names::check_name`.
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
/// Random letters of a backend id (62 bits: a collision is possible in principle and handled, but not expected).
const BACKEND_LETTERS: usize = 12;
/// Random letters of a generated key name.
const KEY_LETTERS: usize = 20;
/// Random letters of what must not be guessed (165 bits).
const SECRET_LETTERS: usize = 32;
/// Random letters of an error's id.
const ERROR_LETTERS: usize = 10;

fn random(prefix: &str, letters: usize) -> String {
    let mut rng = rand::rng();
    let mut id = String::with_capacity(prefix.len() + letters);
    id.push_str(prefix);
    for _ in 0..letters {
        id.push(char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    }
    id
}

/// A backend id: `ba-…`.
pub fn backend_id() -> String {
    random("ba-", BACKEND_LETTERS)
}

/// The name of a key for a connect that gives none: `lk-…`.
pub fn key_name() -> String {
    random("lk-", KEY_LETTERS)
}

/// The id of an error, the same in the answer and in the log: `err-…`.
pub fn error_id() -> String {
    random("err-", ERROR_LETTERS)
}

/// A token that must not be guessed: static connection tokens and proxy secrets.
pub fn secret() -> String {
    random("", SECRET_LETTERS)
}

/// What sessions' names begin with.
const SESSION: &str = "se-";

/// Names one session of a drone, or one incarnation of a drone that gives none.
pub fn session() -> String {
    random(SESSION, KEY_LETTERS)
}

/// Whether an incarnation was made by [`session`], for a drone that gave none.
pub fn is_session(incarnation: &str) -> bool {
    incarnation.starts_with(SESSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_are_valid_names_and_differ() {
        for make in [backend_id, key_name, error_id, secret, session] {
            let (a, b) = (make(), make());
            assert_ne!(a, b);
            assert!(holdfast_wire::names::check_name("id", &a).is_ok(), "{a}");
        }
        assert!(backend_id().starts_with("ba-") && key_name().starts_with("lk-"));
    }
}
