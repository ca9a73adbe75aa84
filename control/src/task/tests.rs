//! What a failed store leaves undone, and what becomes of a session that cannot begin. Nodes are `alpha`, which dials, and
//! `beta`; a connection is a number.

use super::*;
use crate::role::{Found, ReplyId, VolumeSettings};
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::units::{AckLevel, OnPeerLoss};

type TestTask = Task<u32, ()>;
type TestAction = Action<u32, ()>;

const SIZE: u64 = 1 << 20;

fn task(node: &str) -> TestTask {
    let peer = if node == "alpha" { "beta" } else { "alpha" };
    let settings = VolumeSettings {
        volume: "db".into(),
        node: node.into(),
        peer: peer.into(),
        configured_primary: node == "alpha",
        on_peer_loss: OnPeerLoss::Continue,
        ack: AckLevel::Memory,
    };
    let superblock = Superblock::fresh("db", node, SIZE, true);
    let mut next = node.len() as u64 * 1000;
    let random = Box::new(move || {
        next += 1;
        next
    });
    let found = Found { superblock, dirty: false, boot: [1; 16] };
    let setup = Setup {
        volume: 0,
        name: "db".into(),
        node: node.into(),
        peer: peer.into(),
        wanted: LinkKind::Tcp,
        rdma: Ok(()),
        ring_len: 1 << 20,
        payload_len_max: 1 << 16,
        settings: crate::compared::Settings::new(),
    };
    Task::new(Duration::ZERO, setup, VolumeController::new(settings, found, random))
}

fn give(task: &mut TestTask, event: Event<u32, ()>) -> Vec<TestAction> {
    let mut actions = Vec::new();
    task.handle(Duration::from_secs(1), event, &mut actions);
    actions
}

/// The same with every store answered well, which must be the last of its list.
fn give_stored(task: &mut TestTask, event: Event<u32, ()>) -> Vec<TestAction> {
    let mut actions = give(task, event);
    while matches!(actions.last(), Some(Action::StoreMetadata(_) | Action::MarkAll)) {
        actions.extend(give(task, Event::Stored(Ok(()))));
    }
    actions
}

fn found<T>(actions: Vec<TestAction>, pick: impl FnMut(TestAction) -> Option<T>) -> T {
    actions.into_iter().find_map(pick).expect("it is among the actions")
}

fn met(serial: u64, stream: u32, hello: Box<Hello>) -> Event<u32, ()> {
    Event::Met { serial, stream, met: Ok(Met { hello, carrier: Carrier::Tcp { why: None, tried: false } }) }
}

/// Both tasks, and the event by which each begins its session.
fn ready() -> [(TestTask, Event<u32, ()>); 2] {
    let (mut alpha, mut beta) = (task("alpha"), task("beta"));
    let actions = give_stored(&mut alpha, Event::Start);
    assert!(actions.iter().any(|action| matches!(action, Action::Dial)), "alpha dials");
    give_stored(&mut beta, Event::Start);
    let (greeting, ours) = found(give_stored(&mut alpha, Event::Dialled(Ok(1))), |action| match action {
        Action::Greet { serial, hello, .. } => Some((serial, hello)),
        _ => None,
    });
    let accepted = Event::Accepted { stream: 2, hello: ours.clone() };
    let (answering, theirs) = found(give_stored(&mut beta, accepted), |action| match action {
        Action::Answer { serial, hello, .. } => Some((serial, hello)),
        _ => None,
    });
    let said = |action| match action {
        Action::SendReady { ready, .. } => Some(ready),
        _ => None,
    };
    let beta_says = found(give_stored(&mut beta, met(answering, 2, ours)), said);
    let alpha_says = found(give_stored(&mut alpha, met(greeting, 1, theirs)), said);
    let heard = |serial, stream, ready| Event::Heard { serial, stream, heard: Ok(Message::Ready(ready)) };
    [(alpha, heard(greeting, 1, beta_says)), (beta, heard(answering, 2, alpha_says))]
}

#[test]
fn after_a_failed_store_a_command_is_answered_and_nothing_that_rests_on_it_is_done() {
    let mut task = task("alpha");
    give_stored(&mut task, Event::Start);
    let command = role::Command::Promote { force: true };
    let actions = give(&mut task, Event::Operator { id: ReplyId(7), command });
    assert!(matches!(actions.last(), Some(Action::StoreMetadata(_))), "the promotion goes on record first");
    assert!(!actions.iter().any(|action| matches!(action, Action::Command(Command::Serve { .. }))));
    let actions = give(&mut task, Event::Stored(Err("no space".into())));
    let has = |wanted: fn(&TestAction) -> bool| actions.iter().any(wanted);
    assert!(has(|action| matches!(action, Action::Reply { id: ReplyId(7), result: Err(text) }
        if text.contains("cannot be stored: no space"))));
    assert!(has(|action| matches!(action, Action::Command(Command::StopServing { .. }))));
    assert!(has(|action| matches!(action, Action::Command(Command::CloseLink { .. }))));
    assert!(!has(|action| matches!(action, Action::Command(Command::Serve { .. }))));
    assert!(!has(|action| matches!(action, Action::StoreMetadata(_))), "the medium has failed");
    assert_eq!(task.status().role, role::Role::Standby);
}

#[test]
fn after_a_failed_store_the_shutdown_is_honoured() {
    let mut task = task("beta");
    give_stored(&mut task, Event::Start);
    let actions = give(&mut task, Event::Shutdown);
    assert!(matches!(actions.last(), Some(Action::StoreMetadata(_))));
    let complete = |actions: &[TestAction]| actions.iter().any(|a| matches!(a, Action::ShutdownComplete));
    assert!(!complete(&actions), "what is to be on record is stored first");
    assert!(complete(&give(&mut task, Event::Stored(Err("no space".into())))));
}

#[test]
#[should_panic(expected = "events wait for the end of a store")]
fn an_event_in_the_middle_of_a_store_is_a_defect_of_the_driver() {
    let mut task = task("beta");
    give_stored(&mut task, Event::Start);
    give(&mut task, Event::Shutdown);
    give(&mut task, Event::Due);
}

#[test]
fn a_session_that_cannot_be_put_on_record_ends_with_its_connection() {
    let [(mut alpha, begin), _] = ready();
    let actions = give(&mut alpha, begin);
    assert!(matches!(actions.last(), Some(Action::StoreMetadata(_))), "a session goes on record first");
    let actions = give(&mut alpha, Event::Stored(Err("no space".into())));
    assert!(actions.iter().any(|action| matches!(action, Action::Close(1))));
    assert!(!actions.iter().any(|action| matches!(action, Action::StartSession { .. })));
    let connection = alpha.status().connection;
    assert!(matches!(connection, Connection::Standalone | Connection::Connecting), "{connection:?}");
}

#[test]
fn a_session_whose_link_cannot_be_made_ends_and_is_settled() {
    let [_, (mut beta, begin)] = ready();
    let mut stored = None;
    let mut actions = give(&mut beta, begin);
    while let Some(Action::StoreMetadata(superblock)) = actions.last() {
        stored = Some(superblock.clone());
        actions = give(&mut beta, Event::Stored(Ok(())));
    }
    assert!(stored.is_some_and(|superblock| superblock.applying), "beta is the target, on record");
    assert!(actions.iter().any(|action| matches!(action, Action::StartSession { stream: 2, .. })));
    assert!(!matches!(beta.status().connection, Connection::Connecting));
    let actions = give(&mut beta, Event::NotBegun { reason: "too many open files".into() });
    assert_eq!(beta.status().connection, Connection::Connecting);
    let settled = actions.iter().any(|action| matches!(action, Action::StoreMetadata(s) if !s.applying));
    assert!(settled, "beta's disk is whole, on record, as after any session that is settled");
}

#[test]
fn a_connection_of_a_conversation_that_is_over_is_closed() {
    let [(mut alpha, _), _] = ready();
    let command = role::Command::Disconnect;
    give_stored(&mut alpha, Event::Operator { id: ReplyId(1), command });
    let late = std::io::Error::from(std::io::ErrorKind::TimedOut);
    let actions = give(&mut alpha, Event::Heard { serial: 1, stream: 1, heard: Err(late.into()) });
    assert!(matches!(actions[..], [Action::Close(1)]));
}
