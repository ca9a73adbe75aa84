//! A disk that fails under a primary whose peer is in sync.

use super::*;
use crate::generation::{View, compare};
use costandby_datapath::disk::superblock::DiskState;

fn failing() -> Event {
    Event::DiskFailing { text: "EIO".to_owned() }
}

/// A primary in a session whose disk failed and whose peer stands in.
fn without_disk() -> One {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.on(failing());
    one.message(code::DISK_FAILED_NOTED, 99);
    one
}

/// A standby in a session with a primary.
fn standing_by() -> One {
    let mut one = One::with("beta", OnPeerLoss::Continue, |_| {}, |peer| peer.primary = true);
    one.peer_serves = true;
    one.connect();
    assert!(one.controller.peer.as_ref().is_some_and(|peer| peer.primary));
    one
}

#[test]
fn the_peer_is_asked_and_the_disk_is_detached_only_after_its_record() {
    for on_peer_loss in [OnPeerLoss::Continue, OnPeerLoss::Freeze] {
        let mut one = One::primary("alpha", on_peer_loss);
        let actions = one.on(failing());
        let [Action::SendPeer { code: code::DISK_FAILED, arg: 5 }, Action::TryStoreMetadata(stored)] =
            &actions[..]
        else {
            panic!("{actions:?}")
        };
        assert_eq!(
            (stored.disk_state, stored.primary),
            (DiskState::Failed, false),
            "should this daemon die now"
        );
        assert_eq!(one.controller.role, Role::Primary);
        let actions = one.message(code::DISK_FAILED_NOTED, 99);
        let [Action::Detach, Action::TryStoreMetadata(stored)] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!((stored.disk_state, stored.primary), (DiskState::Failed, false));
        let status = one.controller.status();
        assert_eq!((status.role, status.disk_state), (Role::Primary, DiskState::Diskless));
        assert!(status.advice.expect("what to do").contains(" demote db`"));
    }
}

#[test]
fn the_record_is_a_generation_that_leaves_the_failed_disk_behind_for_good() {
    let mut one = standing_by();
    let before = one.controller.superblock.clone();
    let actions = one.message(code::DISK_FAILED, 5);
    let [store, Action::SendPeer { code: code::DISK_FAILED_NOTED, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    let after = stored(store).clone();
    assert!(after.generations.descends_from(before.generations.current));
    assert_eq!(after.generations.base, Generation::ZERO, "nobody counts what differs from here on");
    assert!(!after.peer_has_current);
    assert_eq!(one.controller.status().peer_state, Some(DiskState::Diskless));
    // Asked again, it says the same.
    let again = one.message(code::DISK_FAILED, after.generations.current.0);
    assert_eq!(again, actions[1..]);

    // Whatever the failed disk says of itself when it returns, it is the one that is copied to.
    one.on(lost(false));
    let mine: View = one.controller.view();
    for spoil in [
        |_: &mut Superblock| {},
        |superblock: &mut Superblock| superblock.disk_state = DiskState::Failed,
        |superblock: &mut Superblock| (superblock.primary, superblock.clean) = (true, false),
    ] {
        let mut returned = synced("alpha");
        spoil(&mut returned);
        let theirs = controller(returned, OnPeerLoss::Continue).view();
        let verdict = compare(&mine, &theirs);
        assert!(matches!(verdict, Verdict::Resync { source: Side::Mine, .. }), "{verdict:?}");
    }
    assert!(reply(&one.command(promote(false))).is_ok(), "all that was acknowledged is here");
}

#[test]
fn a_peer_that_may_not_be_served_from_is_not() {
    let refused = |one: &mut One, arg| {
        let before = one.controller.superblock.clone();
        assert_eq!(one.message(code::DISK_FAILED, arg), [Action::CloseLink]);
        assert_eq!(one.controller.superblock, before);
    };
    refused(&mut standing_by(), 6);
    refused(&mut One::primary("alpha", OnPeerLoss::Continue), 5);
    let behind = |superblock: &mut Superblock| superblock.disk_state = DiskState::Inconsistent;
    let mut copied_to = One::with("beta", OnPeerLoss::Continue, behind, |peer| peer.primary = true);
    copied_to.peer_serves = true;
    copied_to.connect();
    assert_eq!(copied_to.controller.connection, Connection::SyncTarget);
    refused(&mut copied_to, 5);
    // An answer to a question that was never asked.
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    assert_eq!(one.message(code::DISK_FAILED_NOTED, 5), [Action::CloseLink]);
}

#[test]
fn an_answer_that_comes_twice_ends_the_session_and_nobody_goes_on_alone() {
    let mut one = without_disk();
    assert_eq!(one.message(code::DISK_FAILED_NOTED, 99), [Action::CloseLink]);
    let actions = one.on(lost(true));
    assert!(actions.contains(&Action::StopServing) && !actions.contains(&Action::GoAlone), "{actions:?}");
}

#[test]
fn a_primary_that_died_before_the_answer_is_the_one_that_is_copied_to() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    let actions = one.on(failing());
    let stored = actions.iter().find_map(|action| match action {
        Action::TryStoreMetadata(superblock) => Some(superblock.clone()),
        _ => None,
    });
    let returned = controller(*stored.expect("on record"), OnPeerLoss::Continue).view();
    let mut other = standing_by();
    other.on(lost(false));
    let verdict = compare(&other.controller.view(), &returned);
    assert!(matches!(verdict, Verdict::Resync { source: Side::Mine, scope: Scope::Full, .. }), "{verdict:?}");
}

#[test]
fn a_peer_that_is_known_to_differ_does_not_stand_in() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.controller.unrepaired = true;
    let actions = one.on(failing());
    assert!(actions.contains(&Action::StopServing), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::SendPeer { .. })), "{actions:?}");
}

#[test]
fn a_failure_that_the_peer_cannot_help_with_ends_the_service() {
    let mut alone = One::primary("alpha", OnPeerLoss::Continue);
    alone.on(lost(false));
    let mut copying = One::with(
        "alpha",
        OnPeerLoss::Continue,
        |superblock| superblock.primary = true,
        |peer| peer.disk_state = DiskState::Inconsistent,
    );
    copying.connect();
    assert_eq!(copying.controller.connection, Connection::SyncSource);
    for mut one in [alone, copying] {
        assert!(one.on(failing()).contains(&Action::StopServing));
        assert_eq!(one.controller.status().disk_state, DiskState::Failed);
    }
}

#[test]
fn without_disk_and_peer_nothing_is_served_and_nobody_goes_on_alone() {
    for noted in [false, true] {
        for on_peer_loss in [OnPeerLoss::Continue, OnPeerLoss::Freeze] {
            let mut one = One::primary("alpha", on_peer_loss);
            one.on(failing());
            if noted {
                one.message(code::DISK_FAILED_NOTED, 99);
            }
            let actions = one.on(lost(true));
            assert!(actions.contains(&Action::StopServing));
            assert!(!actions.contains(&Action::GoAlone), "{actions:?}");
            assert_eq!(one.controller.connection, Connection::Standalone);
            assert_eq!(one.controller.status().disk_state, DiskState::Failed);
            assert_eq!(one.on(Event::DiskFailed { text: "and the peer".to_owned() }), [], "told before");
            assert_eq!(one.on(Event::NeedAlone), []);
            assert!(reply(&one.command(promote(true))).is_err());
            // What the peer says too late changes nothing.
            assert_eq!(one.message(code::DISK_FAILED_NOTED, 99), []);
        }
    }
}

#[test]
fn the_only_copy_is_neither_parted_from_nor_given_up() {
    let mut one = without_disk();
    assert!(reply(&one.command(Command::Disconnect)).is_err());
    let mut other = standing_by();
    other.message(code::DISK_FAILED, 5);
    for command in [Command::Disconnect, Command::Invalidate, promote(false)] {
        let actions = other.command(command);
        assert!(reply(&actions).expect_err("refused").contains("demote"), "{actions:?}");
    }
}

#[test]
fn a_demotion_and_an_end_of_the_daemon_need_no_metadata() {
    let mut one = without_disk();
    assert_eq!(one.command(Command::Demote), [Action::Quiesce]);
    let actions = one.on(Event::Quiesced);
    assert!(!actions.iter().any(|action| matches!(action, Action::StoreMetadata(_))), "{actions:?}");
    assert_eq!(actions.last(), Some(&Action::SendPeer { code: code::DEMOTED, arg: 0 }));
    assert_eq!(reply(&one.message(code::DEMOTED_NOTED, 0)), Ok("volume db: alpha is standby"));
    one.on(Event::DiskFailed { text: "over".to_owned() });
    assert!(one.on(lost(false)).is_empty());
    assert_eq!(one.controller.connection, Connection::Standalone);

    let mut one = without_disk();
    assert!(one.on(Event::Shutdown).contains(&Action::Quiesce));
    let mut actions = one.on(Event::Quiesced);
    actions.extend(one.on(lost(false)));
    assert_eq!(actions.last(), Some(&Action::ShutdownComplete));
    assert!(!actions.iter().any(|action| matches!(action, Action::StoreMetadata(_))), "{actions:?}");
}
