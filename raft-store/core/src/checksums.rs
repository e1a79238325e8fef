//! Comparing the replicas' checksums (invariant 6): what one replica concludes from its own published checksums and the
//! last answers of all others. Pure; `raft-store` asks and acts.
//!
//! Only values at equal log indexes are compared, so a replica that lags is never taken for one that differs: it has no
//! value yet. The checksum is a chain, so what differs at one index differs at all later ones. From that follow two rules:
//! a member that differs from a majority once is believed no more, and an agreement with a majority settles every earlier
//! index.

use std::collections::{BTreeMap, BTreeSet};

/// Published checksums of one replica: log index → value.
pub type Published = BTreeMap<u64, u64>;

/// What is known.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// This member.
    pub me: u64,
    /// The voters of the applied membership. Two sets while the membership changes (a joint one): a majority is then one of
    /// both.
    pub voters: &'a [BTreeSet<u64>],
    /// This replica's own values.
    pub own: &'a Published,
    /// The last answers of other members, learners among them.
    pub others: &'a BTreeMap<u64, Published>,
}

/// What follows for this replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Too few values are known to say anything, and none of them contradicts another.
    Waiting,
    /// Its value at this index, the newest that can be judged, is that of a majority.
    Agrees {
        /// The log index.
        index: u64,
    },
    /// Voters' values differ, none is held by a majority, and the missing ones could still make one.
    Undecided {
        /// The log index.
        index: u64,
        /// Member id and value, in the order of ids.
        values: Vec<(u64, u64)>,
        /// Voters whose value is not known.
        missing: Vec<u64>,
    },
    /// A majority of the voters has another value than this replica.
    Minority {
        /// The log index.
        index: u64,
        /// This replica's value.
        own: u64,
        /// The majority's value.
        majority: u64,
    },
    /// Voters' values differ, and whatever the missing ones are, none will be held by a majority.
    Split {
        /// The log index.
        index: u64,
        /// Member id and value, in the order of ids.
        values: Vec<(u64, u64)>,
    },
}

/// See [`compare`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// What follows for this replica.
    pub verdict: Verdict,
    /// Other members whose value differs from that of a majority.
    pub differing: BTreeSet<u64>,
    /// The newest index at which a majority has this replica's value, also when values differ later: its state up to there
    /// is right, whatever came after.
    pub agreed: Option<u64>,
}

fn is_majority(voters: &[BTreeSet<u64>], of: impl Fn(&u64) -> bool) -> bool {
    voters.iter().all(|set| set.iter().filter(|id| of(id)).count() * 2 > set.len())
}

/// Compares this replica's values with all others, from the oldest index to the newest.
pub fn compare(known: &Known<'_>) -> Comparison {
    let mut differing = BTreeSet::new();
    if known.voters.is_empty() || known.voters.iter().any(BTreeSet::is_empty) {
        return Comparison { verdict: Verdict::Waiting, differing, agreed: None };
    }
    let mut agreed = None;
    let mut contested: Vec<Verdict> = Vec::new();
    for (&index, &own) in known.own {
        let value_of = |id: u64| match id {
            id if id == known.me => Some(own),
            id => known.others.get(&id).and_then(|published| published.get(&index).copied()),
        };
        let (mut holders, mut missing) = (BTreeMap::<u64, BTreeSet<u64>>::new(), BTreeSet::new());
        let all: BTreeSet<u64> = known.voters.iter().flatten().copied().collect();
        for id in all.difference(&differing) {
            match value_of(*id) {
                Some(value) => {
                    holders.entry(value).or_default().insert(*id);
                }
                None => {
                    missing.insert(*id);
                }
            }
        }
        let majority = holders.iter().find(|(_, ids)| is_majority(known.voters, |id| ids.contains(id)));
        match majority.map(|(value, _)| *value) {
            Some(majority) if majority != own => {
                return Comparison { verdict: Verdict::Minority { index, own, majority }, differing, agreed };
            }
            Some(majority) => {
                agreed = Some(index);
                contested.clear();
                let others = known.others.keys().copied().filter(|id| *id != known.me);
                differing.extend(others.filter(|id| value_of(*id).is_some_and(|value| value != majority)));
            }
            None if holders.len() > 1 => contested.push(judge(known.voters, index, &holders, &missing)),
            None => {}
        }
    }
    let verdict = match (contested.into_iter().max_by_key(weight), agreed) {
        (Some(contested), _) => contested,
        (None, Some(index)) => Verdict::Agrees { index },
        (None, None) => Verdict::Waiting,
    };
    Comparison { verdict, differing, agreed }
}

/// At one index voters differ and none has a majority: can a value that is missing make one?
fn judge(
    voters: &[BTreeSet<u64>],
    index: u64,
    holders: &BTreeMap<u64, BTreeSet<u64>>,
    missing: &BTreeSet<u64>,
) -> Verdict {
    let mut values: Vec<(u64, u64)> =
        holders.iter().flat_map(|(value, ids)| ids.iter().map(|id| (*id, *value))).collect();
    values.sort_unstable();
    let no_one = BTreeSet::new();
    let can_win = |ids: &BTreeSet<u64>| is_majority(voters, |id| ids.contains(id) || missing.contains(id));
    if holders.values().chain([&no_one]).any(can_win) {
        Verdict::Undecided { index, values, missing: missing.iter().copied().collect() }
    } else {
        Verdict::Split { index, values }
    }
}

/// Which of several contested indexes is reported: one that is certain, and of those the one that all replicas keep
/// longest, since an operator has to decide by it.
fn weight(contested: &Verdict) -> (bool, u32, u64) {
    match contested {
        Verdict::Split { index, .. } => (true, index.trailing_zeros(), *index),
        Verdict::Undecided { index, .. } => (false, index.trailing_zeros(), *index),
        _ => (false, 0, 0),
    }
}

/// A checksum as it is shown and read everywhere: sixteen hexadecimal digits.
pub fn show_value(value: u64) -> String {
    format!("{value:016x}")
}

/// Members and their checksums, for people.
pub fn show_values(values: &[(u64, u64)]) -> String {
    let shown: Vec<String> =
        values.iter().map(|(member, value)| format!("member {member} has {}", show_value(*value))).collect();
    shown.join(", ")
}

#[cfg(test)]
#[path = "checksums_tests.rs"]
mod tests;
