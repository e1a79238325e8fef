//! Who may talk to whom, decided once for each connection, before any message on it is handled and whatever term that
//! message names. Pure.
//!
//! A receiver that is named wrongly refuses the connection and does nothing else: a wrong hello must silence no one.

use super::wire::{Hello, PROTOCOL, PROTOCOL_MIN, Refusal};
use crate::membership::naming::{DiskIdentity, Me};

/// The newest process of a member that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its start number.
    pub start: u64,
    /// Its process number.
    pub process: u64,
}

impl Seen {
    /// Whether `self` can be what that member is now, after `newest` was seen: it has started since, or is the same process.
    pub fn may_follow(self, newest: Option<Self>) -> bool {
        newest.is_none_or(|newest| self.start > newest.start || self == newest)
    }
}

/// What a receiver knows of the member that connects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sender {
    /// Its disk by the membership in force; none if the receiver does not know it (yet).
    pub recorded: Option<DiskIdentity>,
    /// Whether its removal is committed and applied here.
    pub removed: bool,
    /// The newest process of it that was seen here.
    pub seen: Option<Seen>,
}

/// Whether the receiver takes the connection. A sender that it does not know yet is welcome if it names the receiver
/// rightly: the receiver may lag behind the entry that added the sender.
pub fn judge(me: &Me, hello: &Hello, sender: &Sender) -> Result<(), Refusal> {
    if hello.protocol_min > PROTOCOL || hello.protocol_max < PROTOCOL_MIN {
        return Err(Refusal::Protocol { min: PROTOCOL_MIN, max: PROTOCOL });
    }
    if hello.cluster_id != me.cluster_id {
        return Err(Refusal::OtherCluster(me.cluster_id.clone()));
    }
    if hello.to != me.id || hello.to_identity != me.disk.identity {
        return Err(Refusal::OtherReceiver { id: me.id, identity: me.disk.identity });
    }
    if sender.removed {
        return Err(Refusal::Removed);
    }
    if let Some(recorded) = sender.recorded.filter(|recorded| *recorded != hello.from_identity) {
        return Err(Refusal::OtherSender(recorded));
    }
    let now = Seen { start: hello.start, process: hello.process };
    if let Some(newest) = sender.seen.filter(|newest| !now.may_follow(Some(*newest))) {
        return Err(Refusal::SetBack(newest.start));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::wire::Mode;
    use super::*;
    use crate::membership::naming::Disk;

    fn me() -> Me {
        let disk = Disk { identity: DiskIdentity::random(), start: 3 };
        Me { id: 2, cluster_id: "c".into(), disk, process: 7 }
    }

    fn hello(me: &Me) -> Hello {
        Hello {
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL + 1,
            cluster_id: "c".into(),
            from: 1,
            from_identity: DiskIdentity::random(),
            start: 5,
            process: 50,
            to: 2,
            to_identity: me.disk.identity,
            url: String::new(),
            mode: Mode::Rpc,
        }
    }

    #[test]
    fn a_receiver_refuses_whoever_names_it_wrongly() {
        let me = me();
        let right = hello(&me);
        assert_eq!(judge(&me, &right, &Sender::default()), Ok(()), "unknown senders are welcome");
        let receiver = Refusal::OtherReceiver { id: 2, identity: me.disk.identity };
        for (wrong, refusal) in [
            (Hello { to: 3, ..right.clone() }, receiver.clone()),
            (Hello { to_identity: DiskIdentity::random(), ..right.clone() }, receiver),
            (Hello { cluster_id: "d".into(), ..right.clone() }, Refusal::OtherCluster("c".into())),
            (
                Hello { protocol_min: PROTOCOL + 1, ..right.clone() },
                Refusal::Protocol { min: PROTOCOL_MIN, max: PROTOCOL },
            ),
        ] {
            assert_eq!(judge(&me, &wrong, &Sender::default()), Err(refusal), "{wrong:?}");
        }
    }

    #[test]
    fn a_sender_on_another_disk_or_removed_is_refused() {
        let me = me();
        let hello = hello(&me);
        let known = Sender { recorded: Some(hello.from_identity), ..Sender::default() };
        assert_eq!(judge(&me, &hello, &known), Ok(()));
        assert_eq!(judge(&me, &hello, &Sender { removed: true, ..known }), Err(Refusal::Removed));
        let other = DiskIdentity::random();
        let refused = judge(&me, &hello, &Sender { recorded: Some(other), ..known });
        assert_eq!(refused, Err(Refusal::OtherSender(other)));
    }

    #[test]
    fn a_copied_or_set_back_directory_is_refused() {
        let me = me();
        let hello = hello(&me);
        let seen = |start, process| Sender { seen: Some(Seen { start, process }), ..Sender::default() };
        assert_eq!(judge(&me, &hello, &seen(4, 40)), Ok(()), "it has started again");
        assert_eq!(judge(&me, &hello, &seen(5, 50)), Ok(()), "the same process");
        assert_eq!(judge(&me, &hello, &seen(5, 51)), Err(Refusal::SetBack(5)), "a copy");
        assert_eq!(judge(&me, &hello, &seen(6, 60)), Err(Refusal::SetBack(6)), "set back");
    }
}
