//! Demotions and what their peer is told, consent that comes too late, and the numbers of sessions.

use super::*;

#[test]
fn demotion_quiesces_then_stops_then_is_on_record_then_told() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    assert_eq!(one.command(Command::Demote), [Action::Quiesce]);
    let actions = one.on(Event::Quiesced);
    assert_eq!(actions[0], Action::StopServing);
    assert!(!stored(&actions[1]).primary && stored(&actions[1]).clean);
    assert_eq!(
        actions[2..],
        [Action::SendPeer { code: code::DEMOTED, arg: 0 }],
        "no answer before the peer knows"
    );
    assert_eq!(reply(&one.message(code::DEMOTED_NOTED, 0)), Ok("volume db: alpha is standby"));
    assert_eq!(one.message(code::DEMOTED_NOTED, 0), [], "once");
    let advice = one.controller.status().advice.expect("nobody serves");
    assert!(advice.contains("no node serves"), "{advice}");
    assert_eq!(reply(&one.command(Command::Demote)), Ok("volume db: alpha is standby already"));
}

#[test]
fn a_demotion_is_answered_also_where_the_peer_says_nothing() {
    let demoted = || {
        let mut one = One::primary("alpha", OnPeerLoss::Continue);
        one.command(Command::Demote);
        one.on(Event::Quiesced);
        one
    };
    let mut silent = demoted();
    assert_eq!(silent.at(NOW + GRANT_TIMEOUT / 2, Event::Tick), []);
    let actions = silent.at(NOW + GRANT_TIMEOUT, Event::Tick);
    assert!(reply(&actions).expect("it is").contains("alpha is standby; whether beta knows"), "{actions:?}");
    let actions = demoted().on(lost(false));
    let answer = Action::Reply {
        id: ID,
        result: Ok(
            "volume db: alpha is standby; whether beta knows it is not known: the link broke".to_owned()
        ),
    };
    assert!(actions.contains(&answer), "{actions:?}");
    let mut told = One::new("beta", |_| {});
    told.peer_serves = true;
    told.connect();
    let actions = told.message(code::DEMOTED, 0);
    assert_eq!(actions.last(), Some(&Action::SendPeer { code: code::DEMOTED_NOTED, arg: 0 }));
    assert!(!stored(&actions[0]).applying, "a promotion that follows is not refused");
}

#[test]
fn a_session_is_on_record_as_offered_before_ready_and_as_begun_before_it_begins() {
    let numbers = |superblock: &Superblock| (superblock.sessions_offered, superblock.sessions_begun);
    let mut one = One::with(
        "alpha",
        OnPeerLoss::Continue,
        |mine| mine.sessions_offered = 4,
        |peer| {
            (peer.sessions_offered, peer.sessions_begun) = (6, 3);
        },
    );
    let actions = one.connect();
    let [first, Action::SendReady(_), second, Action::StartSession { .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!((numbers(stored(first)), numbers(stored(second))), ((7, 0), (7, 7)));
    // The peer's disk and record are put back to what they were before that session.
    one.on(lost(false));
    (one.peer.sessions_offered, one.peer.sessions_begun) = (6, 6);
    let Some(Action::SendReady(ready)) = one.greet().last().cloned() else { panic!("agreed") };
    let expected = Verdict::Resync { source: Side::Mine, why: Why::TargetRolledBack, scope: Scope::Full };
    assert_eq!(ready.agreement.verdict, expected);
}

#[test]
fn nobody_is_demoted_in_the_middle_of_a_copy() {
    let behind = |peer: &mut Superblock| peer.disk_state = DiskState::Inconsistent;
    let mut one = One::with("alpha", OnPeerLoss::Continue, |mine| mine.primary = true, behind);
    one.connect();
    assert_eq!((one.controller.role, one.controller.connection), (Role::Primary, Connection::SyncSource));
    let actions = one.command(Command::Demote);
    let text = reply(&actions).expect_err("nobody could serve").to_owned();
    assert!(text.contains("beta is being copied to") && text.contains("wait-sync db"), "{text}");
    assert_eq!(one.controller.role, Role::Primary);
}

#[test]
fn consent_that_comes_after_its_time_makes_no_primary() {
    let mut one = One::new("beta", |_| {});
    one.connect();
    one.command(promote(false));
    // The process stood still: the answer of before is read before the clock is looked at.
    let actions = one.at(NOW + GRANT_TIMEOUT, Event::PeerMessage { code: code::PROMOTE_GRANT, arg: 4 });
    assert!(
        matches!(&actions[0], Action::Reply { result: Err(text), .. } if text.contains("too late")),
        "{actions:?}"
    );
    assert_eq!(actions.last(), Some(&Action::SendPeer { code: code::DEMOTED, arg: 0 }));
    assert_eq!(one.controller.role, Role::Standby);
}

#[test]
fn a_demotion_that_cannot_quiesce_is_given_up() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.command(Command::Demote);
    let actions = one.at(NOW + QUIESCE_TIMEOUT, Event::Tick);
    assert_eq!(actions[0], Action::Serve { epoch: Epoch(3) });
    reply(&actions).expect_err("given up");
    assert_eq!(one.on(Event::Quiesced), []);
    assert_eq!(one.controller.role, Role::Primary);
}

#[test]
fn a_handshake_under_way_does_not_undo_a_demotion() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.on(lost(false));
    let actions = one.greet();
    let Some(Action::SendReady(mine)) = actions.last().cloned() else { panic!("no ready in {actions:?}") };
    assert_eq!(mine.agreement.primary, Some(Side::Mine));
    assert_eq!(one.command(Command::Demote), [Action::CloseLink, Action::Quiesce]);
    one.on(Event::Quiesced);
    let theirs = Ready { agreement: mine.agreement.mirrored(), lineage: mine.lineage };
    assert_eq!(one.on(Event::SessionReady(theirs)), [], "the connection was given up");
    assert_eq!(one.controller.role, Role::Standby);
    assert!(!one.stored().primary && one.stored().clean);
}
