//! One test for each conclusion, and for each way in which a value can be absent.

use super::*;

fn set(ids: &[u64]) -> BTreeSet<u64> {
    ids.iter().copied().collect()
}

/// Replicas' values: member → `(index, value)` pairs.
type Values<'a> = &'a [(u64, &'a [(u64, u64)])];

fn of(me: u64, voters: &[&[u64]], values: Values<'_>) -> Comparison {
    let voters: Vec<BTreeSet<u64>> = voters.iter().map(|ids| set(ids)).collect();
    let mut all: BTreeMap<u64, Published> =
        values.iter().map(|(id, published)| (*id, published.iter().copied().collect())).collect();
    let own = all.remove(&me).unwrap_or_default();
    compare(&Known { me, voters: &voters, own: &own, others: &all })
}

fn verdict(me: u64, voters: &[&[u64]], values: Values<'_>) -> Verdict {
    of(me, voters, values).verdict
}

const THREE: &[&[u64]] = &[&[1, 2, 3]];
const FIVE: &[&[u64]] = &[&[1, 2, 3, 4, 5]];

#[test]
fn equal_values_agree_as_soon_as_a_majority_has_them() {
    assert_eq!(verdict(1, THREE, &[(1, &[(16, 7)])]), Verdict::Waiting);
    let two: Values<'_> = &[(1, &[(16, 7)]), (3, &[(16, 7)])];
    assert_eq!(verdict(1, THREE, two), Verdict::Agrees { index: 16 });
    assert_eq!(verdict(1, FIVE, two), Verdict::Waiting);
    let three: Values<'_> = &[(1, &[(16, 7)]), (3, &[(16, 7)]), (4, &[(16, 7)])];
    assert_eq!(verdict(1, FIVE, three), Verdict::Agrees { index: 16 });
}

#[test]
fn a_lone_voter_agrees_with_itself() {
    assert_eq!(verdict(1, &[&[1]], &[(1, &[(16, 7), (32, 8)])]), Verdict::Agrees { index: 32 });
}

#[test]
fn without_values_or_voters_nothing_follows() {
    assert_eq!(verdict(1, THREE, &[]), Verdict::Waiting);
    assert_eq!(verdict(1, &[], &[(1, &[(16, 7)])]), Verdict::Waiting);
    assert_eq!(verdict(1, &[&[]], &[(1, &[(16, 7)])]), Verdict::Waiting);
}

#[test]
fn one_of_three_that_differs_is_in_the_minority_and_the_others_know_it() {
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 9)]), (3, &[(16, 7)])];
    assert_eq!(verdict(2, THREE, values), Verdict::Minority { index: 16, own: 9, majority: 7 });
    for me in [1, 3] {
        let seen = of(me, THREE, values);
        assert_eq!((seen.verdict, seen.differing), (Verdict::Agrees { index: 16 }, set(&[2])));
    }
}

#[test]
fn two_of_five_that_differ_are_in_the_minority_equal_or_not() {
    for other in [9, 10] {
        let values = [(1, 7), (2, 9), (3, 7), (4, other), (5, 7)].map(|(id, value)| (id, [(16, value)]));
        let values: Vec<(u64, &[(u64, u64)])> = values.iter().map(|(id, v)| (*id, v.as_slice())).collect();
        assert_eq!(verdict(2, FIVE, &values), Verdict::Minority { index: 16, own: 9, majority: 7 });
        assert_eq!(verdict(4, FIVE, &values), Verdict::Minority { index: 16, own: other, majority: 7 });
        assert_eq!(of(1, FIVE, &values).differing, set(&[2, 4]));
    }
}

#[test]
fn three_different_values_of_three_are_a_split_for_all() {
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)]), (3, &[(16, 9)])];
    for me in 1..=3 {
        assert_eq!(
            verdict(me, THREE, values),
            Verdict::Split { index: 16, values: vec![(1, 7), (2, 8), (3, 9)] }
        );
    }
}

#[test]
fn two_voters_that_differ_are_a_split() {
    let split = verdict(1, &[&[1, 2]], &[(1, &[(16, 7)]), (2, &[(16, 8)])]);
    assert_eq!(split, Verdict::Split { index: 16, values: vec![(1, 7), (2, 8)] });
}

#[test]
fn of_five_two_and_two_and_one_is_a_split() {
    let values: Values<'_> =
        &[(1, &[(16, 7)]), (2, &[(16, 8)]), (3, &[(16, 7)]), (4, &[(16, 8)]), (5, &[(16, 9)])];
    assert!(matches!(verdict(5, FIVE, values), Verdict::Split { index: 16, .. }));
}

#[test]
fn a_missing_value_that_could_make_a_majority_leaves_it_undecided() {
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)])];
    assert_eq!(
        verdict(1, THREE, values),
        Verdict::Undecided { index: 16, values: vec![(1, 7), (2, 8)], missing: vec![3] }
    );
    // With it there is one.
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)]), (3, &[(16, 8)])];
    assert_eq!(verdict(1, THREE, values), Verdict::Minority { index: 16, own: 7, majority: 8 });
    assert_eq!(verdict(2, THREE, values), Verdict::Agrees { index: 16 });
    // Of five, two and two that differ leave the fifth no choice that decides only if it is neither.
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)]), (3, &[(16, 7)]), (4, &[(16, 8)])];
    assert!(matches!(verdict(1, FIVE, values), Verdict::Undecided { .. }));
    // Three values and one missing: it can't make one of them a majority.
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)]), (3, &[(16, 9)]), (4, &[(16, 10)])];
    assert!(matches!(verdict(1, FIVE, values), Verdict::Split { .. }));
}

#[test]
fn a_missing_value_alone_changes_nothing() {
    // A member without any answer, one with an empty list, and one that has not come so far yet.
    for third in [None, Some(&[][..]), Some(&[(16, 7)][..])] {
        let mut values: Vec<(u64, &[(u64, u64)])> = vec![(1, &[(16, 7), (32, 8)]), (2, &[(16, 7), (32, 8)])];
        values.extend(third.map(|published| (3, published)));
        let seen = of(1, THREE, &values);
        assert_eq!((seen.verdict, seen.differing), (Verdict::Agrees { index: 32 }, set(&[])), "{third:?}");
    }
}

#[test]
fn values_of_different_indexes_are_not_compared() {
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(32, 8)]), (3, &[(48, 9)])];
    for me in 1..=3 {
        assert_eq!(verdict(me, THREE, values), Verdict::Waiting);
    }
}

#[test]
fn a_member_that_lags_compares_what_it_has() {
    let ahead: &[(u64, u64)] = &[(16, 7), (32, 8), (48, 9)];
    let lagging = verdict(3, THREE, &[(1, ahead), (2, ahead), (3, &[(16, 7)])]);
    assert_eq!(lagging, Verdict::Agrees { index: 16 });
    let wrong = verdict(3, THREE, &[(1, ahead), (2, ahead), (3, &[(16, 6)])]);
    assert_eq!(wrong, Verdict::Minority { index: 16, own: 6, majority: 7 });
}

#[test]
fn a_learner_compares_itself_but_its_value_never_counts() {
    // It is compared with the majority of the voters.
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 7)]), (4, &[(16, 9)])];
    assert_eq!(verdict(4, THREE, values), Verdict::Minority { index: 16, own: 9, majority: 7 });
    assert_eq!(of(1, THREE, values).differing, set(&[4]));
    // It makes no majority, and no split, with a voter.
    let values: Values<'_> = &[(1, &[(16, 7)]), (4, &[(16, 7)])];
    assert_eq!(verdict(1, THREE, values), Verdict::Waiting);
    let values: Values<'_> = &[(1, &[(16, 7)]), (4, &[(16, 9)])];
    assert_eq!(verdict(1, THREE, values), Verdict::Waiting);
    assert_eq!(verdict(4, THREE, values), Verdict::Waiting);
    // It learns of a split among the voters.
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)]), (4, &[(16, 7)])];
    assert!(matches!(verdict(4, &[&[1, 2]], values), Verdict::Split { .. }));
}

#[test]
fn a_joint_membership_needs_a_majority_of_both_parts() {
    let joint: &[&[u64]] = &[&[1, 2, 3], &[3, 4, 5]];
    let old_part: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 7)]), (3, &[(16, 7)])];
    assert_eq!(verdict(1, joint, old_part), Verdict::Waiting);
    let both: Values<'_> = &[(1, &[(16, 7)]), (3, &[(16, 7)]), (4, &[(16, 7)]), (5, &[(16, 9)])];
    assert_eq!(verdict(1, joint, both), Verdict::Agrees { index: 16 });
    assert_eq!(verdict(5, joint, both), Verdict::Minority { index: 16, own: 9, majority: 7 });
    // Each part has a majority, but not of the same value.
    let torn: Values<'_> =
        &[(1, &[(16, 7)]), (2, &[(16, 7)]), (3, &[(16, 8)]), (4, &[(16, 8)]), (5, &[(16, 8)])];
    assert!(matches!(verdict(1, joint, torn), Verdict::Split { .. }));
}

#[test]
fn a_change_of_the_membership_changes_whose_values_count() {
    let values: Values<'_> = &[(1, &[(16, 7)]), (2, &[(16, 8)]), (3, &[(16, 9)])];
    // The operator chose member 1's value, and the others were removed.
    assert_eq!(verdict(1, &[&[1]], values), Verdict::Agrees { index: 16 });
    assert_eq!(verdict(1, &[&[1, 4]], values), Verdict::Waiting);
}

#[test]
fn a_member_that_differed_once_is_believed_no_more() {
    // Member 2 differs from a majority at 16. At 32 the third value is still on its way: nothing is in doubt.
    let values: Values<'_> = &[(1, &[(16, 7), (32, 8)]), (2, &[(16, 6), (32, 5)]), (3, &[(16, 7)])];
    let seen = of(1, THREE, values);
    assert_eq!((seen.verdict, seen.differing), (Verdict::Agrees { index: 16 }, set(&[2])));
}

#[test]
fn a_later_agreement_settles_an_earlier_doubt() {
    // Member 3 came by a snapshot and has no value at 16.
    let values: Values<'_> = &[(1, &[(16, 7), (32, 8)]), (2, &[(16, 6), (32, 5)]), (3, &[(32, 8)])];
    assert_eq!(verdict(1, THREE, values), Verdict::Agrees { index: 32 });
    assert_eq!(verdict(2, THREE, values), Verdict::Minority { index: 32, own: 5, majority: 8 });
}

#[test]
fn of_several_contested_indexes_a_certain_one_that_is_kept_long_is_reported() {
    let values: Values<'_> = &[
        (1, &[(240, 1), (256, 2), (272, 3), (288, 4)]),
        (2, &[(240, 5), (256, 6), (272, 7), (288, 8)]),
        (3, &[(240, 9), (256, 10), (272, 11)]),
    ];
    assert!(matches!(verdict(1, THREE, values), Verdict::Split { index: 256, .. }));
}

#[test]
fn values_are_shown_as_sixteen_digits() {
    assert_eq!(
        show_values(&[(1, 255), (3, u64::MAX)]),
        "member 1 has 00000000000000ff, member 3 has ffffffffffffffff"
    );
}
