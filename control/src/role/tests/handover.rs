//! Demotions and what their peer is told, consent that comes too late, and the numbers of sessions.

use super::going_on::{broke, goes_on, in_session, meet};
use super::*;

/// As source, the link broke when all was on stable storage on both nodes.
fn broke_durably() -> Event {
    match broke(true, 12, 12) {
        Event::LinkDown { reason, dirty, parted, .. } => {
            Event::LinkDown { reason, undurable: false, dirty, parted }
        }
        other => panic!("{other:?}"),
    }
}

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
    let mut gone = demoted();
    assert_eq!(gone.on(lost(false)), [], "the session may be back in a moment");
    let actions = gone.at(NOW + GRANT_TIMEOUT, Event::Tick);
    let text = "volume db: alpha is standby; whether beta knows it is not known: the link broke, and there was no session \
                within 5 s";
    assert_eq!(reply(&actions), Ok(text));
    let mut parted = demoted();
    let actions = parted.command_of(ReplyId(8), Command::Disconnect);
    let text = "volume db: alpha is standby; whether beta knows it is not known: the two are disconnected"
        .to_owned();
    assert!(actions.contains(&Action::Reply { id: ID, result: Ok(text) }), "{actions:?}");
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

#[test]
fn a_demotion_outlives_a_broken_link_and_is_answered_when_the_peer_knows() {
    let told = Action::SendPeer { code: code::DEMOTED, arg: 0 };
    // Broken between the demotion and the peer's word.
    let (mut alpha, mut beta) = in_session();
    alpha.command(Command::Demote);
    alpha.on(Event::Quiesced);
    assert_eq!(alpha.on(broke(false, 9, 9)), []);
    beta.on(broke(false, 9, 9));
    beta.on(Event::Settled);
    let actions = meet(&mut alpha, &mut beta);
    assert_eq!(actions[0].last(), Some(&told), "in the session that follows");
    assert!(!actions[0].iter().any(|action| matches!(action, Action::Reply { .. })));
    let noted = beta.message(code::DEMOTED, 0);
    assert_eq!(noted, [Action::SendPeer { code: code::DEMOTED_NOTED, arg: 0 }]);
    assert_eq!(reply(&alpha.message(code::DEMOTED_NOTED, 0)), Ok("volume db: alpha is standby"));
    let asked = beta.command(promote(false));
    assert!(matches!(asked[..], [Action::SendPeer { code: code::PROMOTE_REQUEST, .. }]), "{asked:?}");

    // Broken while requests in flight end: they end in the session that goes on.
    let (mut alpha, mut beta) = in_session();
    alpha.command(Command::Demote);
    assert_eq!(alpha.on(broke(true, 6, 12)), []);
    beta.on(broke(false, 7, 7));
    let generation = alpha.stored().generations;
    let actions = meet(&mut alpha, &mut beta);
    let Some(Action::StartSession { before, serve, side, .. }) = actions[0].last() else {
        panic!("{actions:?}")
    };
    assert_eq!((*before, *serve, *side), (goes_on(7), false, SessionSide::Source { resync: false }));
    assert_eq!(alpha.controller.role, Role::Demoting);
    let actions = alpha.on(Event::Quiesced);
    assert_eq!((actions[0].clone(), actions.last()), (Action::StopServing, Some(&told)));
    assert_eq!(alpha.stored().generations, generation, "nothing was acknowledged without beta");
    assert_eq!(reply(&alpha.message(code::DEMOTED_NOTED, 0)), Ok("volume db: alpha is standby"));

    // Nothing was in flight, and all of it was durable on both: the end of the demotion needs no session, its answer does.
    let (mut alpha, mut beta) = in_session();
    alpha.command(Command::Demote);
    alpha.on(broke_durably());
    beta.on(broke(false, 12, 12));
    beta.on(Event::Settled);
    let actions = alpha.on(Event::Quiesced);
    assert!(matches!(actions[..], [Action::StopServing, Action::StoreMetadata(_)]), "{actions:?}");
    assert_eq!(meet(&mut alpha, &mut beta)[0].last(), Some(&told));
    assert_eq!(alpha.controller.status().connection, Connection::Connected);
    assert_eq!(reply(&alpha.message(code::DEMOTED_NOTED, 0)), Ok("volume db: alpha is standby"));
}

#[test]
fn a_demotion_says_where_its_node_ended_without_the_peer() {
    let (mut alpha, mut beta) = in_session();
    alpha.command(Command::Demote);
    alpha.on(broke(true, 6, 12));
    beta.on(broke(false, 7, 7));
    alpha.on(Event::NeedAlone);
    // A handshake that would end it is put off, and one whose agreement has it serve is given up with it.
    let [from_alpha, from_beta] =
        [&mut alpha, &mut beta].map(|one| Box::new(one.controller.hello(1 << 20, &["tcp"])));
    drop(from_alpha);
    let actions = alpha.on(Event::HelloReceived(from_beta));
    assert!(matches!(&actions[..], [Action::Refuse(Refuse { code: RefuseCode::Busy, .. })]), "{actions:?}");
    let text = "volume db: alpha is standby; beta lacks what was written here without it, and is copied to when it is back";
    assert_eq!(reply(&alpha.on(Event::Quiesced)), Ok(text));

    let (mut alpha, mut beta) = in_session();
    alpha.command(Command::Demote);
    alpha.on(broke_durably());
    beta.on(broke(false, 12, 12));
    let [_, from_beta] = [&mut alpha, &mut beta].map(|one| Box::new(one.controller.hello(1 << 20, &["tcp"])));
    let Some(Action::SendReady(mine)) = alpha.on(Event::HelloReceived(from_beta)).last().cloned() else {
        panic!("no ready")
    };
    let actions = alpha.on(Event::Quiesced);
    assert_eq!(actions[..2], [Action::CloseLink, Action::StopServing]);
    let theirs = Ready { agreement: mine.agreement.mirrored(), lineage: mine.lineage };
    assert_eq!(alpha.on(Event::SessionReady(theirs)), []);
    assert_eq!(alpha.controller.role, Role::Standby);
}
