//! The protocol holds in every state within the small bounds. `make model` explores larger ones.

#![allow(clippy::unwrap_used, reason = "a test that panics has found something")]

use holdfast_model::{Holdfast, Limits, Variant, Violation, check, scenarios};

/// No run of these tests may need more states.
const STATES: usize = 20_000_000;

/// Runs a scenario by name, prints what it explored, and answers whether all it should reach was reached.
fn explore(name: &str) {
    let mut all = [scenarios::protocol(false), scenarios::examined()].concat();
    all.retain(|scenario| scenario.name == name);
    let scenario = all.pop().unwrap();
    let outcome = check(scenario.model, 1, STATES);
    println!("{name}: {outcome}");
    assert!(outcome.counterexamples.is_empty());
    assert!(outcome.complete, "more than {STATES} states");
    assert!(outcome.unreached.is_empty());
}

#[test]
fn three_members_survive_two_lost_disks_and_two_leader_changes() {
    explore("3 members");
}

#[test]
fn three_members_serve_whenever_their_good_disks_are_a_majority() {
    explore("3 members, recovery");
}

#[test]
fn founders_that_have_heard_nothing_are_safe() {
    explore("3 members, just initialised");
}

#[test]
fn an_append_that_arrives_after_its_leader_is_gone_is_harmless() {
    explore("3 members, late append");
}

#[test]
fn five_members_survive_a_lost_disk() {
    explore("5 members");
}

#[test]
fn two_inits_with_one_list_form_at_most_one_cluster() {
    explore("two inits, one list");
}

#[test]
fn two_inits_with_the_list_in_another_order_form_at_most_one_cluster() {
    explore("two inits, another order");
}

#[test]
fn two_inits_with_overlapping_lists_form_at_most_one_cluster() {
    explore("two inits, overlapping lists");
}

#[test]
fn a_member_is_removed_while_disks_are_lost() {
    explore("remove");
}

#[test]
fn a_member_is_added_promoted_and_leads() {
    explore("add");
}

#[test]
fn a_restored_cluster_never_meets_the_old_one() {
    explore("restore");
}

#[test]
fn a_stale_uncommitted_add_blocks_no_one() {
    explore("protocol after a stale add");
}

#[test]
fn a_learner_is_never_ahead_of_the_voters_of_a_deposed_leader() {
    explore("protocol with a deposed leader");
}

#[test]
fn a_member_is_added_and_promoted_while_a_disk_is_lost() {
    explore("add, lost disk");
}

#[test]
fn a_follower_that_lags_stops_no_new_member() {
    explore("protocol with a lagging follower");
}

/// The reduction by symmetry hides nothing: it keeps the length of a shortest counterexample.
#[test]
fn symmetry_keeps_the_shortest_counterexample() {
    let limits = Limits { lost: 1, terms: 2, ..Limits::formed(3) };
    let lengths = [false, true].map(|symmetry| {
        let limits = Limits { symmetry, ..limits.clone() };
        let model = Holdfast::new(limits).with(Variant::WipedKeepsId).watching(Violation::TwoHolders);
        let outcome = check(model, 1, STATES);
        println!("symmetry {symmetry}: {outcome}");
        outcome.counterexamples[0].1.len()
    });
    assert_eq!(lengths[0], lengths[1]);
}
