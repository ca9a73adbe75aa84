//! When a verification may begin, and what follows from its findings.

use super::*;
use costandby_datapath::disk::superblock::COPYING_WHOLE;
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
    assert!(reply(&actions).expect_err("it does not serve").contains(" verify db`"));
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

/// A standby in sync with alpha, which serves.
fn standby() -> One {
    let mut one = One::new("beta", |_| {});
    one.peer_serves = true;
    one.connect();
    assert_eq!(one.controller.connection, Connection::Connected);
    one
}

#[test]
fn a_standby_that_finds_itself_to_differ_does_not_serve_until_it_is_repaired() {
    let mut one = standby();
    let actions = one.on(Event::FoundDifferent);
    let record = stored(&actions[0]);
    assert_eq!((record.disk_state, record.copying), (DiskState::Outdated, COPYING_WHOLE));
    assert_eq!(one.on(Event::FoundDifferent), [], "once");
    one.message(code::DIFFERENCES_NOTED, 0);
    assert_eq!((one.stored().disk_state, one.stored().copying), (DiskState::Outdated, Generation::ZERO));

    one.on(lost(false));
    let actions = one.command(promote(false));
    assert!(reply(&actions).expect_err("refused").contains("the disk is Outdated"), "{actions:?}");
    let mut repaired = standby();
    repaired.on(Event::FoundDifferent);
    repaired.message(code::DIFFERENCES_REPAIRED, 0);
    assert_eq!(
        (repaired.stored().disk_state, repaired.stored().copying),
        (DiskState::UpToDate, Generation::ZERO)
    );
}

#[test]
fn what_the_source_did_not_put_on_record_is_all() {
    let mut one = standby();
    one.on(Event::FoundDifferent);
    one.on(lost(false));
    let Some(Action::SendReady(ready)) = one.greet().last().cloned() else { panic!("agreed") };
    let expected = Verdict::Resync { source: Side::Theirs, why: Why::TargetNotUpToDate, scope: Scope::Full };
    assert_eq!(ready.agreement.verdict, expected);
}

#[test]
fn only_a_disk_that_is_in_sync_can_be_found_to_differ() {
    let mut copied =
        One::with("beta", OnPeerLoss::Continue, |mine| mine.disk_state = DiskState::Inconsistent, |_| {});
    copied.connect();
    assert_eq!(copied.controller.connection, Connection::SyncTarget);
    assert_eq!(copied.on(Event::FoundDifferent), [], "a copy that compares first");
    let mut source = One::primary("alpha", OnPeerLoss::Continue);
    assert_eq!(source.on(Event::FoundDifferent), [], "a peer that makes no sense");
    assert_eq!(source.message(code::DIFFERENCES_REPAIRED, 0), []);
}

#[test]
fn the_source_says_what_became_of_the_differences() {
    let told = |actions: &[Action]| {
        actions.iter().find_map(|action| match action {
            Action::SendPeer { code, .. } => Some(*code),
            _ => None,
        })
    };
    assert_eq!(told(&verifying().on(outcome(4096, false, None))), Some(code::DIFFERENCES_NOTED));
    assert_eq!(told(&verifying().on(outcome(4096, true, None))), Some(code::DIFFERENCES_REPAIRED));
    assert_eq!(told(&verifying().on(outcome(0, false, None))), Some(code::DIFFERENCES_REPAIRED));
    assert_eq!(
        told(&verifying().on(outcome(4096, false, Some("it was stopped")))),
        None,
        "not on record yet"
    );
    assert_eq!(told(&verifying().on(outcome(0, false, Some("it was stopped")))), None);
}
