//! When a verification may begin, and what follows from its findings.

use super::*;
use costandby_datapath::mirror::verify::Findings;
use costandby_datapath::units::ByteRange;

fn outcome(differing: u64, repaired: bool, unfinished: Option<&str>) -> Event {
    let listed = if differing > 0 { vec![ByteRange::new(0, differing)] } else { Vec::new() };
    let findings = Findings { compared: 1 << 20, differing, ranges: listed.len() as u64, listed };
    Event::Verified(Box::new(Verified { findings, repaired, unfinished: unfinished.map(str::to_owned) }))
}

fn verifying() -> One {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    let actions = one.command(Command::Verify { repair: false });
    assert!(matches!(actions[..], [Action::Verify { repair: false }, Action::Reply { .. }]), "{actions:?}");
    reply(&actions).expect("it begins");
    one
}

#[test]
fn only_a_primary_in_sync_verifies_and_one_at_a_time() {
    let mut standby = One::new("beta", |_| {});
    let actions = standby.command(Command::Verify { repair: false });
    assert!(reply(&actions).expect_err("it does not serve").contains("verify on the node that does"));
    let mut alone = One::primary("alpha", OnPeerLoss::Continue);
    alone.on(Event::LinkDown { reason: "cut".to_owned(), undurable: false, dirty: false, parted: None });
    let actions = alone.command(Command::Verify { repair: false });
    assert!(reply(&actions).expect_err("nobody there").contains("not connected"));
    let mut one = verifying();
    let actions = one.command(Command::Verify { repair: true });
    assert!(reply(&actions).expect_err("one at a time").contains("under way"));
    assert_eq!(one.command(Command::StopVerify)[0], Action::StopVerify);
    one.on(outcome(0, false, Some("it was stopped")));
    assert!(reply(&one.command(Command::StopVerify)).is_err(), "nothing to stop");
    reply(&one.command(Command::Verify { repair: true })).expect("again");
    assert_eq!(one.controller.status().verification.id, 2);
}

#[test]
fn what_differs_is_remembered_and_keeps_the_volume_here_until_it_is_copied() {
    let mut one = verifying();
    assert!(reply(&one.command(Command::Demote)).expect_err("under way").contains("--stop"));
    one.on(outcome(65536, false, None));
    assert!(one.controller.dirty, "the next handshake must end in a copy");
    let status = one.controller.status();
    assert!(!status.verification.running);
    assert_eq!(status.verification.outcome.findings.differing, 65536);
    assert!(status.advice.expect("advice").contains("--repair"));
    assert!(reply(&one.command(Command::Demote)).expect_err("the peer would serve it").contains("--repair"));
    reply(&one.command(Command::Verify { repair: true })).expect("it begins");
    one.on(outcome(65536, true, None));
    assert_eq!(one.controller.status().advice, None);
    assert_eq!(one.command(Command::Demote), [Action::Quiesce]);
}

#[test]
fn what_was_found_before_an_early_end_counts() {
    let mut one = verifying();
    one.on(outcome(4096, false, Some("it was stopped")));
    assert!(one.controller.dirty && one.controller.unrepaired);
    one.on(Event::LinkDown { reason: "cut".to_owned(), undurable: false, dirty: true, parted: None });
    assert!(one.controller.dirty && !one.controller.unrepaired, "the next session copies it");
    let record = one.stored();
    assert!(record.generations.base == Generation(5) && !record.peer_has_current, "and never from the peer");
    let mut equal = verifying();
    equal.on(outcome(0, false, None));
    assert!(!equal.controller.dirty);
    assert_eq!(equal.command(Command::Demote), [Action::Quiesce]);
}

#[test]
fn a_whole_verification_that_finds_nothing_takes_an_earlier_one_back() {
    let mut one = verifying();
    one.on(outcome(4096, false, None));
    assert!(reply(&one.command(Command::Demote)).is_err());
    reply(&one.command(Command::Verify { repair: false })).expect("it begins");
    one.on(outcome(0, false, Some("it was stopped")));
    assert!(reply(&one.command(Command::Demote)).is_err(), "it did not look everywhere");
    reply(&one.command(Command::Verify { repair: false })).expect("it begins");
    one.on(outcome(0, false, None));
    assert_eq!(one.command(Command::Demote), [Action::Quiesce]);
}
