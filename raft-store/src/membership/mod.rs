//! Who belongs to the cluster, and how that changes.
//!
//! ```text
//!   waiting process ──Add: committed──▶ learner ──caught up──▶ joint ──▶ voter ──Remove──▶ joint ──▶ removed,
//!   (waiting, naming)      its disk named     │  (by the leader's look)    ▲                          its id used forever
//!                                             └──────────Remove────────────┴── Move: another address, the same disk
//! ```
//!
//! *Ids belong to disks.* The membership records the disk identity of each member, which never changes. A new member gets
//! the next id that was never used, and asking again with the same disk gives the same id. Its disk is named only once the
//! entry that adds it is committed ([`crate::transport::client`]): before that the entry may be removed from the logs, and
//! the id given to another.
//!
//! *What survives a change of leader.* All of it is in the membership entries of the log: a learner is there to be promoted
//! and for nothing else, so each leader promotes every learner that has caught up (`duties::Step::Promote`), while so many voters
//! answer that its vote is not needed; a joint membership whose leader was lost is completed by the next one
//! (`duties::Step::Flatten`).
//!
//! *Used ids.* Applying a membership entry records the ids in it ([`holdfast_core::records::MemberIdsRecord`]); the record
//! is part of every snapshot. An id that is recorded and not in the membership was removed. A change is proposed only on top
//! of the membership that was looked at (a precondition that openraft checks at append), which is applied here by then, so
//! no id slips through.
//!
//! *A removed member* can't disturb: with pre-vote it never raises its term while a quorum hears of a leader, its log is
//! behind, and its peers refuse its hello and say why ([`Standing::is_gone`]). Then, or when it applies the entry that
//! removes it, it stops serving: [`Standing::dismissed`]. Removal is judged by the *applied* membership: an uncommitted one
//! may yet be removed from the log, and then the member's vote may be needed.

pub mod changes;
pub mod duties;
pub mod init;
pub mod naming;
pub mod standing;
pub mod waiting;

pub use changes::change_here;
pub use duties::{greet, hand_over, run};
pub use standing::{AppliedMembers, Standing};

/// Most members, learners among them. Each is replicated to.
pub const MEMBERS_MAX: usize = 15;
/// Longest peer address, in bytes.
pub const PEER_ADDR_BYTES_MAX: usize = 260;

/// Says what is wrong with a peer address.
pub(crate) fn check_addr(addr: &str) -> Result<(), &'static str> {
    if addr.len() > PEER_ADDR_BYTES_MAX {
        return Err("is too long");
    }
    match addr.rsplit_once(':') {
        Some((host, port))
            if !host.is_empty()
                && !addr.chars().any(|c| c.is_whitespace() || c.is_control())
                && port.parse::<u16>().is_ok_and(|port| port > 0) =>
        {
            Ok(())
        }
        _ => Err("must be HOST:PORT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in ["127.0.0.1:7201", "[::1]:7201", "controller-4.example:1"] {
            assert!(check_addr(good).is_ok(), "{good}");
        }
        for bad in ["", ":1", "a", "a:0", "a:x", "a b:1", "a:70000", &format!("{}:1", "a".repeat(300))] {
            assert!(check_addr(bad).is_err(), "{bad}");
        }
    }
}
