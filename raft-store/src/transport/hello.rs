//! Who may talk to whom, decided once for each connection, before any message on it is handled and whatever term that
//! message names. Pure.
//!
//! A receiver that is named wrongly refuses the connection and does nothing else: a wrong hello must silence no one.

use super::wire::{Hello, PROTOCOL, PROTOCOL_MIN, Refusal};
use crate::membership::naming::{DiskIdentity, Me, Start};

/// What a receiver knows of the member that connects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sender {
    /// Its disk by the committed membership; none if the receiver does not know it (yet).
    pub recorded: Option<DiskIdentity>,
    /// Whether its removal is committed and applied here.
    pub removed: bool,
    /// The newest start of its disk that was seen here.
    pub seen: Option<Start>,
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
    if !hello.starts.are_plausible() {
        return Err(Refusal::SetBack(hello.starts.last().number));
    }
    match sender.seen.filter(|newest| !hello.starts.include(*newest)) {
        Some(newest) => Err(Refusal::SetBack(newest.number)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Mode;
    use super::*;
    use crate::membership::naming::{Disk, Starts};

    fn started() -> Starts {
        let mut starts = Starts::default();
        starts.begin();
        starts
    }

    fn me() -> Me {
        let disk = Disk { identity: DiskIdentity::random(), starts: Starts::default() };
        Me { id: 2, cluster_id: "c".into(), disk }
    }

    fn hello(me: &Me) -> Hello {
        Hello {
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL + 1,
            cluster_id: "c".into(),
            from: 1,
            from_identity: DiskIdentity::random(),
            starts: started(),
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
        let mut starts = Starts::default();
        starts.begin();
        let copy = Hello { starts: starts.clone(), ..hello(&me) };
        starts.begin();
        let newest = starts.last();
        let seen = Sender { seen: Some(newest), ..Sender::default() };
        let real = Hello { starts, ..copy.clone() };
        assert_eq!(judge(&me, &real, &seen), Ok(()));
        assert_eq!(judge(&me, &copy, &seen), Err(Refusal::SetBack(newest.number)));
    }
}
