//! `cluster init`: forms a cluster of waiting processes.
//!
//! ```text
//!   1 identify all ──a different process, or bound to something else──▶ refused by name; nothing was changed
//!   2 name itself, durably: the cluster id is drawn here, once
//!   3 name each of the others (Bind), durably ──one is missing──▶ refused by name: repeat it here
//!   4 write down, durably, that all have answered and who they are ──▶ the operator's answer
//!   5 become a member and write the initial membership
//! ```
//!
//! A process that was named answers no other init, so of two inits that share a process at most one comes to step 4. What
//! is cut short before that is repeated at the same process with the same members, or all data directories are emptied:
//! nothing was served yet. After step 4 a restart goes on by itself. Only the coordinator writes the initial membership:
//! the others would each know of it only by hearsay, and a member that lost its disk could write it a second time.

use super::naming::{DiskIdentity, Founding, Naming};
use super::waiting::Shared;
use super::{MEMBERS_MAX, check_addr};
use crate::transport::client::ask;
use crate::transport::wire::{Bind, Opening};
use futures::future::join_all;
use holdfast_wire::LeaseConfig;
use std::collections::BTreeMap;

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitRequest {
    /// Peer addresses of the members, whose ids will be 1..n in this order.
    pub members: Vec<String>,
    /// Lease durations.
    pub lease: LeaseConfig,
}

/// A cluster that is formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initialised {
    /// The cluster's id.
    pub cluster_id: String,
    /// Id and peer address of each member.
    pub members: BTreeMap<u64, String>,
}

/// Why no cluster was formed. Asking again at the same process is safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// A field breaks a rule.
    #[error("{field} {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A member could not be asked.
    #[error("member {addr} does not answer: {why}. Nothing was formed; repeat the init at this controller")]
    NoAnswer {
        /// Its address.
        addr: String,
        /// The cause.
        why: String,
    },
    /// A member belongs to something else.
    #[error(
        "member {addr} is bound to {to}; nothing was done. If that was never formed, repeat its init where it began. Empty no \
         data directory before \"holdfast cluster status\" has shown that none of its members serves"
    )]
    Bound {
        /// Its address.
        addr: String,
        /// To what.
        to: String,
    },
    /// Another init is being coordinated here.
    #[error("another init is in progress at this controller; nothing was done")]
    Busy,
    /// This process is a member of a formed cluster.
    #[error("this controller is member {member} of cluster {cluster_id} already")]
    AlreadyInitialised {
        /// Its id.
        member: u64,
        /// Its cluster.
        cluster_id: String,
    },
    /// The disk failed.
    #[error("naming this controller failed: {0}")]
    Storage(String),
}

fn invalid(field: &'static str, problem: impl Into<String>) -> InitError {
    InitError::Invalid { field, problem: problem.into() }
}

fn check(request: &InitRequest) -> Result<(), InitError> {
    if request.members.is_empty() || request.members.len() > MEMBERS_MAX {
        let given = request.members.len();
        return Err(invalid("members", format!("must be 1 to {MEMBERS_MAX} addresses, got {given}")));
    }
    for (at, addr) in request.members.iter().enumerate() {
        check_addr(addr).map_err(|problem| invalid("members", format!("has {addr:?}: {problem}")))?;
        if request.members[..at].contains(addr) {
            return Err(invalid("members", format!("names {addr} twice")));
        }
    }
    request.lease.check().map_err(|error| invalid("lease", error.problem))
}

/// What a process answers when it is asked who it is.
type Identified = (DiskIdentity, Option<Naming>);

/// Which of the members the process with this identity is. Checks that no process answers at two addresses.
fn own_place(own: DiskIdentity, members: &[String], answers: &[Identified]) -> Result<usize, InitError> {
    for (at, (identity, _)) in answers.iter().enumerate() {
        if let Some(first) = answers[..at].iter().position(|(other, _)| other == identity) {
            let problem = format!("names one process twice: {} and {}", members[first], members[at]);
            return Err(invalid("members", problem));
        }
    }
    answers.iter().position(|(identity, _)| *identity == own).ok_or_else(|| {
        let problem = "does not name this controller: ask one of the members, and give the addresses at which they \
                       reach each other";
        invalid("members", problem)
    })
}

/// Says to what a member is bound, if not to `wanted`.
fn check_bound(addr: &str, held: Option<&Naming>, wanted: &Naming) -> Result<(), InitError> {
    let Some(held) = held.filter(|held| !held.is_same_member(wanted)) else { return Ok(()) };
    let to = match &held.founding {
        Some(founding) => format!(
            "the init of {} that began at {} (as member {} of cluster {})",
            founding.members.join(","),
            founding.coordinator_addr(),
            held.member_id,
            held.cluster_id
        ),
        None => format!("cluster {} as member {}", held.cluster_id, held.member_id),
    };
    Err(InitError::Bound { addr: addr.to_owned(), to })
}

async fn ask_all(members: &[String], questions: Vec<Opening>) -> Result<Vec<Identified>, InitError> {
    let asked = members.iter().zip(&questions).map(|(addr, question)| async move {
        ask(addr, question).await.map_err(|why| InitError::NoAnswer { addr: addr.clone(), why })
    });
    join_all(asked).await.into_iter().collect()
}

/// See the module.
pub(super) async fn init(here: &Shared, request: &InitRequest) -> Result<Initialised, InitError> {
    let Ok(_alone) = here.initiating.try_lock() else { return Err(InitError::Busy) };
    check(request)?;
    let members = &request.members;
    let answers = ask_all(members, vec![Opening::Identify; members.len()]).await?;
    let own = own_place(here.log.disk().identity, members, &answers)?;
    let began = here.log.naming();
    if let Some(began) = began.as_ref().filter(|began| !began.is_unfinished_init()) {
        return Err(InitError::AlreadyInitialised {
            member: began.member_id,
            cluster_id: began.cluster_id.clone(),
        });
    }
    let cluster_id = match &began {
        Some(began) => began.cluster_id.clone(),
        None => format!("{:032x}", rand::random::<u128>()),
    };
    let name = |at: usize, identities: &[DiskIdentity]| Naming {
        cluster_id: cluster_id.clone(),
        member_id: at as u64 + 1,
        founding: Some(Founding {
            members: members.clone(),
            coordinator: own as u64 + 1,
            lease: request.lease,
            terminated_keep_ms: here.config.terminated_keep_ms,
            identities: identities.to_vec(),
        }),
    };
    if let Some(Naming { founding: Some(founding), .. }) = &began
        && (founding.members != *members || founding.lease != request.lease)
    {
        let problem = format!(
            "and lease must be those of the init that began here: {} with {}. Repeat that, or empty the data directories \
             of all its members",
            founding.members.join(","),
            founding.lease
        );
        return Err(invalid("members", problem));
    }
    for (at, (addr, (_, held))) in members.iter().zip(&answers).enumerate() {
        check_bound(addr, held.as_ref(), &name(at, &[]))?;
    }
    let failed = |error: std::io::Error| InitError::Storage(error.to_string());
    let held = here.name(name(own, &[])).await.map_err(failed)?;
    check_bound(&members[own], Some(&held), &name(own, &[]))?;
    let others: Vec<usize> = (0..members.len()).filter(|at| *at != own).collect();
    let addrs: Vec<String> = others.iter().map(|at| members[*at].clone()).collect();
    let bind = |at: &usize| Opening::Bind(Bind { identity: answers[*at].0, naming: name(*at, &[]) });
    let bound = ask_all(&addrs, others.iter().map(bind).collect()).await?;
    for (at, (identity, held)) in others.iter().zip(&bound) {
        let addr = &members[*at];
        if *identity != answers[*at].0 || held.is_none() {
            let why = "it has lost its disk since it was asked who it is".to_owned();
            return Err(InitError::NoAnswer { addr: addr.clone(), why });
        }
        check_bound(addr, held.as_ref(), &name(*at, &[]))?;
    }
    let identities: Vec<DiskIdentity> = answers.iter().map(|(identity, _)| *identity).collect();
    let held = here.name(name(own, &identities)).await.map_err(failed)?;
    check_bound(&members[own], Some(&held), &name(own, &[]))?;
    tracing::info!(%cluster_id, members = members.join(","), "all members have answered the init");
    let members = members.iter().enumerate().map(|(at, addr)| (at as u64 + 1, addr.clone())).collect();
    Ok(Initialised { cluster_id, members })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addrs(given: &[&str]) -> Vec<String> {
        given.iter().map(|addr| (*addr).to_owned()).collect()
    }

    #[test]
    fn a_request_is_checked_before_anyone_is_asked() {
        let ask =
            |members: &[&str]| check(&InitRequest { members: addrs(members), lease: LeaseConfig::default() });
        assert_eq!(ask(&["a:1", "b:1", "c:1"]), Ok(()));
        for wrong in [&[][..], &["a"], &["a:1", "a:1"], &["a:0"]] {
            assert!(matches!(ask(wrong), Err(InitError::Invalid { field: "members", .. })), "{wrong:?}");
        }
        let lease = LeaseConfig { hard_terminate_ms: 59_000, ..LeaseConfig::default() };
        let refused = check(&InitRequest { members: addrs(&["a:1"]), lease });
        assert!(matches!(refused, Err(InitError::Invalid { field: "lease", .. })));
    }

    #[test]
    fn the_coordinator_finds_itself_by_its_disk() {
        let own = DiskIdentity::random();
        let members = addrs(&["a:1", "b:1"]);
        let other = (DiskIdentity::random(), None);
        assert_eq!(own_place(own, &members, &[other.clone(), (own, None)]), Ok(1));
        assert!(own_place(own, &members, &[other.clone(), (DiskIdentity::random(), None)]).is_err());
        assert!(own_place(own, &members, &[(own, None), (own, None)]).is_err(), "one process, two addresses");
    }

    #[test]
    fn a_member_that_is_bound_elsewhere_is_named() {
        let name =
            |cluster: &str, member_id| Naming { cluster_id: cluster.into(), member_id, founding: None };
        assert_eq!(check_bound("a:1", None, &name("c", 1)), Ok(()));
        assert_eq!(check_bound("a:1", Some(&name("c", 1)), &name("c", 1)), Ok(()));
        for other in [name("d", 1), name("c", 2)] {
            let refused = check_bound("a:1", Some(&other), &name("c", 1));
            assert!(matches!(refused, Err(InitError::Bound { addr, .. }) if addr == "a:1"));
        }
    }
}
