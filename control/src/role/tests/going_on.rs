//! Two controllers whose link broke while both live: what they tell each other, and what comes of it.

use super::*;
use costandby_datapath::units::Seq;

/// Hello and ready between two controllers, both as they are.
pub(super) fn meet(alpha: &mut One, beta: &mut One) -> [Vec<Action>; 2] {
    let hellos = [&mut *alpha, &mut *beta].map(|one| one.controller.hello(1 << 20, &["tcp"]));
    let [from_alpha, from_beta] = hellos.map(Box::new);
    let mut actions = [alpha.on(Event::HelloReceived(from_beta)), beta.on(Event::HelloReceived(from_alpha))];
    let ready = |actions: &[Action]| match actions.last() {
        Some(Action::SendReady(ready)) => *ready,
        other => panic!("no ready but {other:?}"),
    };
    let readies = [ready(&actions[0]), ready(&actions[1])];
    actions[0].extend(alpha.on(Event::SessionReady(readies[1])));
    actions[1].extend(beta.on(Event::SessionReady(readies[0])));
    actions
}

/// A pair in sync, of which alpha serves.
pub(super) fn in_session() -> (One, One) {
    let serves = |superblock: &mut Superblock| superblock.primary = true;
    let (mut alpha, mut beta) = (One::new("alpha", serves), One::new("beta", |_| {}));
    let actions = meet(&mut alpha, &mut beta);
    assert!(actions.iter().all(|list| before(list) == Before::Unknown));
    (alpha, beta)
}

fn before(actions: &[Action]) -> Before {
    match actions.last() {
        Some(Action::StartSession { before, .. }) => *before,
        other => panic!("no session but {other:?}"),
    }
}

pub(super) fn broke(source: bool, applied: u64, numbered: u64) -> Event {
    let (epoch, applied, numbered) = (Epoch(3), Seq(applied), Seq(numbered));
    let parted = Some(Parted { source, epoch, applied, numbered, map_told: true });
    Event::LinkDown { reason: "cut".to_owned(), undurable: source, dirty: false, parted }
}

pub(super) fn goes_on(applied: u64) -> Before {
    Before::GoesOn { applied: Seq(applied), map_told: true }
}

#[test]
fn a_broken_link_between_living_daemons_changes_no_record_but_that_the_standby_applies() {
    let (mut alpha, mut beta) = in_session();
    for applied in [7, 9] {
        let generation = alpha.stored().generations;
        // Nobody goes alone at once, although writes are on their way.
        assert_eq!(alpha.on(broke(true, applied - 1, applied + 5)), []);
        assert_eq!(beta.on(broke(false, applied, applied)), []);
        let actions = meet(&mut alpha, &mut beta);
        assert_eq!(actions.each_ref().map(|list| before(list)), [goes_on(applied); 2]);
        assert!(
            !actions.iter().flatten().any(|action| matches!(action, Action::StoreMetadata(_))),
            "{actions:?}"
        );
        for one in [&alpha, &beta] {
            assert_eq!(one.stored().generations, generation);
            assert_eq!(one.stored().disk_state, DiskState::UpToDate);
            assert_eq!(one.controller.status().connection, Connection::Connected);
        }
        assert!(beta.stored().applying && alpha.stored().peer_has_current);
    }
}

#[test]
fn who_waited_long_enough_goes_alone_on_record_and_copies_what_it_wrote_since() {
    let (mut alpha, mut beta) = in_session();
    alpha.on(broke(true, 6, 12));
    beta.on(broke(false, 7, 7));
    let alone = alpha.on(Event::NeedAlone);
    assert!(
        matches!(&alone[..], [Action::StoreMetadata(stored), Action::GoAlone] if !stored.peer_has_current)
    );
    let actions = meet(&mut alpha, &mut beta);
    assert_eq!(before(&actions[0]), Before::Kept { applied: Seq(7) }, "beta lives and has what it had");
    assert_eq!(beta.stored().disk_state, DiskState::Inconsistent);
    // The same with a beta that was restarted.
    let (mut alpha, mut beta) = in_session();
    alpha.on(broke(true, 6, 12));
    alpha.on(Event::NeedAlone);
    let record = Superblock { applying: false, ..beta.stored().clone() };
    beta.controller = controller(record, OnPeerLoss::Continue);
    let actions = meet(&mut alpha, &mut beta);
    assert_eq!(before(&actions[0]), Before::Unknown);
}

#[test]
fn a_wish_to_go_alone_while_the_session_comes_back_is_none() {
    let (mut alpha, mut beta) = in_session();
    alpha.on(broke(true, 6, 12));
    beta.on(broke(false, 7, 7));
    let hellos = [&mut alpha, &mut beta].map(|one| Box::new(one.controller.hello(1 << 20, &["tcp"])));
    let [from_alpha, from_beta] = hellos;
    let Some(Action::SendReady(_)) = alpha.on(Event::HelloReceived(from_beta)).last().cloned() else {
        panic!("no ready")
    };
    assert_eq!(alpha.on(Event::NeedAlone), [], "the peer may be about to go on");
    let Some(Action::SendReady(ready)) = beta.on(Event::HelloReceived(from_alpha)).last().cloned() else {
        panic!("no ready")
    };
    assert_eq!(before(&alpha.on(Event::SessionReady(ready))), goes_on(7));
}

#[test]
fn a_restarted_standby_is_copied_to() {
    let (mut alpha, mut beta) = in_session();
    alpha.on(broke(true, 6, 12));
    // What it had applied was brought to its stable storage before it ended.
    let record = Superblock { applying: false, clean: true, ..beta.stored().clone() };
    beta.controller = controller(record, OnPeerLoss::Continue);
    let actions = meet(&mut alpha, &mut beta);
    assert_eq!(before(&actions[0]), Before::Unknown);
    assert_eq!(alpha.controller.status().connection, Connection::SyncSource);
}

#[test]
fn a_standby_that_was_promoted_meanwhile_has_ended_the_session() {
    let (mut alpha, mut beta) = in_session();
    alpha.on(broke(true, 6, 12));
    beta.on(broke(false, 7, 7));
    assert_eq!(reply(&beta.command(promote(false))), Ok("volume db: beta is primary, without alpha"));
    // Alpha, which serves, is not overwritten unasked; demoted, it is copied to.
    let hello = Box::new(beta.controller.hello(1 << 20, &["tcp"]));
    let _ = alpha.controller.hello(1 << 20, &["tcp"]);
    let refused = alpha.on(Event::HelloReceived(hello));
    assert!(matches!(refused.last(), Some(Action::Refuse(_) | Action::Log { .. })), "{refused:?}");
    assert_eq!(alpha.controller.role, Role::Primary);
    let made_way = alpha.command(Command::Demote);
    assert_eq!(reply(&made_way), Ok("volume db: alpha is standby, and is copied from beta"));
    let actions = meet(&mut alpha, &mut beta);
    assert!(actions.iter().all(|list| before(list) == Before::Unknown));
    assert_eq!(alpha.controller.status().connection, Connection::SyncTarget);
}

#[test]
fn an_operators_disconnect_waits_for_nobody() {
    let (mut alpha, mut beta) = in_session();
    alpha.command(Command::Disconnect);
    let actions = alpha.on(broke(true, 6, 12));
    assert!(actions.contains(&Action::GoAlone), "{actions:?}");
    beta.on(broke(false, 7, 7));
    alpha.command(Command::Connect { discard_my_data: false });
    assert_eq!(before(&meet(&mut alpha, &mut beta)[0]), Before::Kept { applied: Seq(7) });
}

#[test]
fn frozen_clients_wait_and_the_session_goes_on_whenever_the_peer_is_back() {
    let serves = |superblock: &mut Superblock| superblock.primary = true;
    let mut alpha = One::with("alpha", OnPeerLoss::Freeze, serves, |_| {});
    let mut beta = One::with("beta", OnPeerLoss::Freeze, |_| {}, |_| {});
    meet(&mut alpha, &mut beta);
    alpha.on(broke(true, 6, 12));
    beta.on(broke(false, 7, 7));
    assert_eq!(alpha.on(Event::NeedAlone), []);
    assert_eq!(before(&meet(&mut alpha, &mut beta)[0]), goes_on(7));
}

#[test]
fn a_primary_without_a_disk_goes_on_over_the_next_link_and_ends_where_none_comes() {
    for comes in [true, false] {
        let (mut alpha, mut beta) = in_session();
        let asked = alpha.on(Event::DiskFailing { text: "EIO".to_owned() });
        let Some(Action::SendPeer { code: code::DISK_FAILED, arg }) = asked.first().cloned() else {
            panic!("{asked:?}")
        };
        beta.message(code::DISK_FAILED, arg);
        let noted = beta.stored().generations;
        alpha.message(code::DISK_FAILED_NOTED, noted.current.0);
        let actions = alpha.on(broke(true, 6, 12));
        assert_eq!(actions, [], "no generation of its own, and no end");
        assert_eq!(alpha.controller.status().disk_state, DiskState::Diskless);
        beta.on(broke(false, 7, 7));
        if comes {
            let actions = meet(&mut alpha, &mut beta);
            assert_eq!(actions.each_ref().map(|list| before(list)), [goes_on(7); 2]);
            assert_eq!(alpha.controller.role, Role::Primary);
            assert_eq!((alpha.stored().primary, alpha.stored().disk_state), (false, DiskState::Failed));
            assert_eq!(beta.stored().generations, noted, "the failed disk stays behind");
            assert!(!beta.stored().peer_has_current);
            assert_eq!(alpha.controller.status().disk_state, DiskState::Diskless);
            assert_eq!(beta.controller.status().peer_state, Some(DiskState::Diskless));
        } else {
            let actions = alpha.on(Event::DiskFailed { text: "the link is gone".to_owned() });
            assert!(actions.contains(&Action::StopServing), "{actions:?}");
            assert_eq!(alpha.controller.status().disk_state, DiskState::Failed);
            assert_eq!(reply(&beta.command(promote(false))), Ok("volume db: beta is primary, without alpha"));
        }
    }
}

/// The lines that an event leaves in the log.
fn logged(one: &mut One, event: Event) -> Vec<String> {
    let mut actions = Vec::new();
    one.controller.handle(NOW, event, &mut actions);
    let lines = actions.into_iter().filter_map(|action| match action {
        Action::Log { text, .. } => Some(text),
        _ => None,
    });
    lines.collect()
}

/// A break of the link and the going on of the session, and what both nodes log of that.
fn lines_of_a_break(alpha: &mut One, beta: &mut One) -> Vec<String> {
    let mut lines = logged(alpha, broke(true, 6, 12));
    lines.extend(logged(beta, broke(false, 7, 7)));
    let [from_alpha, from_beta] =
        [&mut *alpha, &mut *beta].map(|one| Box::new(one.controller.hello(1 << 20, &["tcp"])));
    let mut readies = Vec::new();
    for (one, hello) in [(&mut *alpha, from_beta), (&mut *beta, from_alpha)] {
        match one.on(Event::HelloReceived(hello)).last() {
            Some(Action::SendReady(ready)) => readies.push(*ready),
            other => panic!("no ready but {other:?}"),
        }
    }
    lines.extend(logged(alpha, Event::SessionReady(readies[1])));
    lines.extend(logged(beta, Event::SessionReady(readies[0])));
    lines
}

#[test]
fn a_link_that_is_left_on_purpose_leaves_no_line_and_one_that_breaks_does() {
    let (mut alpha, mut beta) = in_session();
    for one in [&mut alpha, &mut beta] {
        one.on(Event::LinkChanges(true));
    }
    assert_eq!(lines_of_a_break(&mut alpha, &mut beta), [""; 0]);
    let lines = lines_of_a_break(&mut alpha, &mut beta);
    assert!(lines[0].contains("lost beta: cut") && lines[1].contains("lost alpha: cut"), "{lines:?}");
    assert!(lines.len() == 4 && lines[2..].iter().all(|line| line.contains("goes on")), "{lines:?}");
    // What was to be a change of link and is none.
    for one in [&mut alpha, &mut beta] {
        one.on(Event::LinkChanges(true));
        one.on(Event::LinkChanges(false));
    }
    assert_eq!(lines_of_a_break(&mut alpha, &mut beta), lines);
}

#[test]
fn a_link_is_left_only_while_nothing_is_under_way_that_its_end_would_end() {
    let may = |one: &One| one.controller.may_change_link();
    let (mut alpha, mut beta) = in_session();
    assert!(may(&alpha) && may(&beta));
    alpha.command(Command::Verify { repair: false });
    assert!(!may(&alpha), "a verification");
    alpha.on(Event::Verified(Box::default()));
    assert!(may(&alpha));
    alpha.on(Event::DiskFailing { text: "gone".to_owned() });
    assert!(!may(&alpha), "the peer does not know yet that it stands in for the disk");
    let (mut alpha, _) = in_session();
    alpha.command(Command::Demote);
    assert!(!may(&alpha), "a demotion");
    beta.on(Event::Shutdown);
    assert!(!may(&beta), "the daemon ends");
    let (mut alpha, _) = in_session();
    alpha.on(broke(true, 6, 12));
    assert!(!may(&alpha), "there is no link");
}
