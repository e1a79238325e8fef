//! The pure key state machine of Holdfast: what a log entry does to the state, and nothing else.
//!
//! No IO, no clock, no randomness, no async. The replicated state is a set of ordered tables ([`kv::Table`]) behind the
//! [`kv::ReadState`] trait; RocksDB serves it in `raft-store`, a `BTreeMap` in tests.
//!
//! ```text
//!             stamp (term, cluster time)              ┌────────────┐
//!   Command ──────────▶ Entry ── log index ──▶ apply ─▶ Txn writes │──▶ one write batch
//!                                               │     └────────────┘
//!                                               ├──▶ Outcome (answer to the proposer)
//!                                               └──▶ Effects (who has to look: drone sessions, waiters)
//! ```
//!
//! Invariants (the numbers are those of the design):
//!
//! 1. *Exclusion*: a key has at most one holder; a holder is replaced only after its expiry in cluster time or after
//!    its own drone said that nothing of it is left.
//! 2. *Tokens grow*: a token is the log index of the acquisition.
//! 3. *No early expiry*: only [`clock::ClusterClock`] makes time, and it never runs ahead of elapsed real time.
//! 4. *No resurrection*: a renewal needs the same drone, backend and token, an unexpired key and `allow_renew`.
//! 6. *Replicas agree*: apply is a function of (state, index, entry); the running checksum covers every write.
//! 7. *Bounded*: see [`limits`].
//! 8. *Unknown is said*: an idempotency record is written in the same step as what it records.

pub mod apply;
pub mod clock;
pub mod codec;
pub mod command;
pub mod kv;
pub mod limits;
pub mod listing;
pub mod outcome;
pub mod records;
pub mod view;
