//! Each rule is needed: without it, the checker finds a schedule that violates the property named here.

#![allow(clippy::unwrap_used, reason = "a test that panics has found something")]

use holdfast_model::{SERVES, Violation, check, scenarios};

/// Runs a broken rule, prints the counterexample and its length, and compares the property that it violates.
fn finds(name: &str, property: &str) {
    let mut all = scenarios::variants();
    all.retain(|scenario| scenario.name == name);
    let scenario = all.pop().unwrap();
    let outcome = check(scenario.model.clone(), 1, 20_000_000);
    println!("{name}: {outcome}");
    assert!(scenario.accepts(&outcome));
    let (violated, steps) = &outcome.counterexamples[0];
    println!("length of the counterexample: {}", steps.len());
    assert_eq!(*violated, property);
}

/// The rule before issue 9, on the schedule in that issue.
#[test]
fn a_wiped_member_that_accepts_entries_gives_two_holders() {
    finds("wiped keeps id: two holders", Violation::TwoHolders.property());
}

#[test]
fn a_wiped_member_that_accepts_entries_makes_a_token_shrink() {
    finds("wiped keeps id: tokens", Violation::TokenShrinks.property());
}

#[test]
fn a_wiped_member_that_accepts_entries_loses_what_was_acknowledged() {
    finds("wiped keeps id: lost entries", Violation::AcknowledgedLost.property());
}

#[test]
fn a_wiped_member_that_accepts_entries_makes_others_truncate() {
    finds("wiped keeps id: truncation", Violation::TruncatedApplied.property());
}

#[test]
fn founders_that_initialise_themselves_give_two_leaders() {
    finds("everyone initialises", Violation::TwoLeaders.property());
}

#[test]
fn answers_to_an_init_that_bind_no_one_give_two_clusters() {
    finds("answers bind no one", Violation::TwoClusters.property());
}

#[test]
fn an_identity_beside_the_log_gives_two_holders() {
    finds("identity beside the log", Violation::TwoHolders.property());
}

#[test]
fn a_move_that_takes_the_dialed_identity_gives_two_holders() {
    finds("move takes the dialed identity", Violation::TwoHolders.property());
}

#[test]
fn a_receiver_that_believes_a_wrong_hello_gives_two_holders() {
    finds("believes a wrong hello", Violation::TwoHolders.property());
}

#[test]
fn a_restore_without_a_jump_of_the_index_makes_a_token_shrink() {
    finds("restore without jump", Violation::TokenShrinks.property());
}

#[test]
fn a_restore_without_quarantine_gives_two_holders() {
    finds("restore without quarantine", Violation::TwoHolders.property());
}

#[test]
fn senders_compared_with_an_uncommitted_entry_block_the_cluster() {
    finds("sender compared with uncommitted", SERVES);
}

#[test]
fn ids_that_an_uncommitted_entry_uses_stop_a_new_member() {
    finds("used ids from uncommitted", SERVES);
}

#[test]
fn ids_of_removed_members_that_return_block_the_cluster() {
    finds("ids of removed members return", SERVES);
}

#[test]
fn learners_that_get_the_rest_at_the_end_block_the_cluster() {
    finds("learners get the rest at the end", SERVES);
}

/// Two of three voters have their disks. The third disk was lost before the promotion, the new voter's is
/// lost after it.
#[test]
fn a_promotion_while_voters_are_silent_needs_the_promoted_one() {
    finds("promotes while voters are silent", Violation::NewVoterNeeded.property());
}

/// A learner that has an entry of a leader whose disk is lost refuses its vote to the one candidate that is
/// left, whose log counts it as a voter; it does not stand itself.
#[test]
fn learners_ahead_of_the_commit_index_block_the_cluster() {
    finds("learners get uncommitted entries", SERVES);
}
