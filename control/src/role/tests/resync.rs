//! What is on record before a copy, from whom it goes on, and how a primary comes back that lost power.

use super::*;
use costandby_datapath::disk::superblock::COPYING_WHOLE;

/// The agreement's verdict, as the peer sees it.
fn scope_of(actions: &[Action]) -> Scope {
    let ready = actions.iter().find_map(|action| match action {
        Action::SendReady(ready) => Some(ready.agreement.verdict),
        _ => None,
    });
    match ready {
        Some(Verdict::Resync { scope, .. }) => scope,
        other => panic!("a copy was due, not {other:?}"),
    }
}

#[test]
fn a_whole_copy_is_on_the_sources_record_before_it_is_ready_and_on_the_targets_after() {
    let stranger = |superblock: &mut Superblock| superblock.generations.current = Generation(2);
    let newer = |superblock: &mut Superblock| {
        superblock.generations = Generations { current: Generation(5), ..Generations::default() };
        superblock.generations.history[3] = Generation(2);
    };
    let mut source = One::with("alpha", OnPeerLoss::Continue, newer, stranger);
    let actions = source.greet();
    assert_eq!(scope_of(&actions), Scope::Full);
    assert_eq!(actions[0], Action::MarkAll);
    source.on(Event::SessionFailed { text: "cut".to_owned() });
    assert!(!source.greet().contains(&Action::MarkAll), "it still is");

    let mut target = One::with("beta", OnPeerLoss::Continue, stranger, newer);
    let actions = target.connect();
    let [given_up, Action::SendReady(_), begun, Action::StartSession { side, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(*side, SessionSide::Target { resync: true });
    let (given_up, begun) = (stored(given_up), stored(begun));
    assert_eq!((given_up.disk_state, given_up.copying), (DiskState::Inconsistent, COPYING_WHOLE));
    assert_eq!(begun.copying, Generation(5));
    target.on(Event::LinkDown { reason: "cut".to_owned(), undurable: false, dirty: false, parted: None });
    assert_eq!(scope_of(&target.greet()), Scope::Delta, "it goes on where it was");
    target.on(Event::SessionFailed { text: "cut".to_owned() });
    target.peer.generations.advance(Generation(6), true);
    target.peer.generations.advance(Generation(7), false);
    assert_eq!(scope_of(&target.connect()), Scope::Delta);
    let actions = target.message(code::RESYNC_FINISH, 7);
    let done = stored(&actions[0]);
    assert_eq!((done.disk_state, done.copying), (DiskState::UpToDate, Generation::ZERO));
}

/// A primary whose machine lost power.
fn dark(superblock: &mut Superblock) {
    (superblock.primary, superblock.clean, superblock.boot) = (true, false, [9; 16]);
}

#[test]
fn a_primary_that_lost_power_is_copied_to_and_then_resumes() {
    let mut one = One::new("alpha", dark);
    assert_eq!(one.controller.status().disk_state, DiskState::Outdated);
    let text = reply(&one.command(promote(false))).expect_err("the peer has more").to_owned();
    assert!(text.contains("Outdated") && text.contains("--force"), "{text}");
    let actions = one.connect();
    assert_eq!(scope_of(&actions), Scope::Delta);
    for action in actions.iter().filter(|action| matches!(action, Action::StoreMetadata(_))) {
        let stored = stored(action);
        assert!(stored.primary && !stored.clean && stored.boot == [9; 16], "not made up for yet: {stored:?}");
        assert_eq!(stored.disk_state, DiskState::Inconsistent);
    }
    assert_eq!(one.controller.role, Role::Standby);
    let actions = one.message(code::RESYNC_FINISH, 5);
    let whole = stored(&actions[0]);
    assert!(whole.primary && whole.clean && whole.boot == BOOT, "{whole:?}");
    let epoch = whole.epoch.next();
    let ask = Action::SendPeer { code: code::PROMOTE_REQUEST, arg: epoch.0 };
    assert_eq!(actions[1..], [Action::SendPeer { code: code::RESYNC_FINISHED, arg: 5 }, ask.clone()]);
    one.message(code::PROMOTE_DENY, 3);
    assert_eq!(one.at(NOW + GRANT_TIMEOUT / 2, Event::Tick), []);
    assert_eq!(one.at(NOW + GRANT_TIMEOUT, Event::Tick), [ask], "and again");
    let actions = one.message(code::PROMOTE_GRANT, epoch.0);
    assert_eq!(actions[1..], [Action::Serve { epoch }]);
    assert_eq!(one.controller.role, Role::Primary);
}

#[test]
fn a_primary_that_lost_power_does_not_resume_where_somebody_took_over_or_an_operator_says_so() {
    let mut one = One::with("alpha", OnPeerLoss::Continue, dark, |peer| {
        peer.generations.advance(Generation(6), true);
    });
    one.connect();
    assert!(!one.stored().primary);
    let actions = one.message(code::RESYNC_FINISH, 6);
    assert_eq!(actions[1..], [Action::SendPeer { code: code::RESYNC_FINISHED, arg: 6 }]);

    let mut one = One::new("alpha", dark);
    reply(&one.command(Command::Demote)).expect("it serves nothing");
    assert!(one.stored().primary, "its disk may hold what no other does");
    one.connect();
    reply(&one.command(Command::Demote)).expect("it serves nothing");
    let actions = one.message(code::RESYNC_FINISH, 5);
    assert_eq!(actions[1..], [Action::SendPeer { code: code::RESYNC_FINISHED, arg: 5 }]);
    assert!(!one.stored().primary);
}

#[test]
fn the_end_of_a_process_is_no_loss_of_power() {
    let crashed = |superblock: &mut Superblock| (superblock.primary, superblock.clean) = (true, false);
    let mut one = One::new("alpha", crashed);
    assert!(!one.controller.view().lost_power);
    one.connect();
    assert_eq!((one.controller.role, one.controller.connection), (Role::Primary, Connection::SyncSource));
}

#[test]
fn with_async_an_acknowledgement_promises_nothing_about_the_peer() {
    let mut one = One::new("alpha", dark);
    one.controller.settings.ack = AckLevel::Async;
    one.connect();
    assert_eq!(one.controller.connection, Connection::SyncSource);
    assert_eq!(one.stored().boot, BOOT, "what it holds is what there is");
}

#[test]
fn what_may_differ_is_copied_although_nothing_else_says_so() {
    let mut one = One::new("alpha", |superblock| superblock.primary = true);
    one.connect();
    one.on(Event::LinkDown { reason: "cut".to_owned(), undurable: false, dirty: true, parted: None });
    one.connect();
    assert_eq!(one.controller.connection, Connection::SyncSource);
    one.on(Event::ResyncDone);
    one.message(code::RESYNC_FINISHED, 5);
    one.on(lost(false));
    one.connect();
    assert_eq!(one.controller.connection, Connection::Connected);
}
