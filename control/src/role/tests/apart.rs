//! What is said while there is no session: why, once in the log, in `status` for as long as it holds; and that nothing is
//! advised that gives up the newest data without saying so.

use super::*;
use crate::role::{Obstacle, Reach};

impl One {
    /// The log lines of an event, and the advice after it.
    fn told(&mut self, event: Event) -> (Vec<String>, String) {
        let mut actions = Vec::new();
        self.controller.handle(NOW, event, &mut actions);
        let lines = actions.into_iter().filter_map(|action| match action {
            Action::Log { text, .. } => Some(text),
            _ => None,
        });
        (lines.collect(), self.controller.status().advice.unwrap_or_default())
    }

    fn parted(&self) -> bool {
        self.controller.status().parted
    }
}

fn unreachable(reach: Reach, text: &str) -> Event {
    Event::NoContact(Obstacle::Unreachable { reach, text: text.to_owned() })
}

fn refused(code: RefuseCode, text: &str) -> Event {
    Event::PeerRefused(Refuse { code, text: text.to_owned() })
}

#[test]
fn an_unreachable_peer_is_logged_once_and_on_change_and_when_it_is_over() {
    let mut one = One::new("alpha", |_| {});
    let refusal = "connection refused by 10.9.0.2:7790";
    let (log, advice) = one.told(unreachable(Reach::Refused, refusal));
    assert_eq!(log, [format!("volume db: beta cannot be reached: {refusal}")]);
    assert!(
        advice.starts_with(&format!("beta cannot be reached: {refusal}; waiting for beta; ")),
        "{advice}"
    );
    assert!(!one.parted(), "it may come back by itself");
    assert_eq!(one.told(unreachable(Reach::Refused, refusal)).0, [""; 0], "told before");
    let (log, advice) = one.told(unreachable(Reach::Silent, "no answer"));
    assert_eq!(log, ["volume db: beta cannot be reached: no answer"]);
    assert!(advice.contains("no answer"), "{advice}");
    let (log, advice) = one.told(unreachable(Reach::Silent, "no machine answers"));
    assert_eq!(log, [""; 0], "what the network says of a host that is off changes all the time");
    assert!(advice.contains("no machine answers"), "{advice}");
    let (log, advice) = one.told(Event::Contact { willing: false });
    assert_eq!(log, ["volume db: beta can be reached again"]);
    assert!(advice.starts_with("waiting for beta;"), "{advice}");
    assert_eq!(one.told(Event::Contact { willing: false }).0, [""; 0]);
    let (log, _) = one.told(unreachable(Reach::Refused, refusal));
    assert_eq!(log.len(), 1, "anew");
}

#[test]
fn every_refusal_of_a_peer_reaches_the_operator_until_it_is_over() {
    use RefuseCode::{Busy, Configuration, Disconnected, Disks, Link, Other};
    for code in [Busy, Disconnected, Disks, Configuration, Link, Other] {
        let mut one = One::new("alpha", |_| {});
        let (log, advice) = one.told(refused(code, "node beta has no volume db"));
        assert_eq!(log.len(), 1, "{log:?}");
        assert!(log[0].contains("beta") && log[0].ends_with("node beta has no volume db"), "{log:?}");
        assert!(advice.contains("node beta has no volume db; waiting for beta"), "{advice}");
        assert_eq!(one.parted(), matches!(code, Disconnected | Disks | Configuration), "{code:?}");
        let (log, _) = one.told(refused(code, "node beta has no volume db"));
        assert_eq!(log, [""; 0], "told before");
        one.connect();
        assert_eq!(one.controller.connection, Connection::Connected);
        assert!(!one.parted());
        one.on(lost(false));
        let advice = one.controller.status().advice.expect("waiting");
        assert!(advice.starts_with("waiting for beta;"), "the session ended it: {advice}");
    }
}

#[test]
fn whoever_waits_to_be_dialled_hears_that_the_peer_would_have_a_session() {
    let mut one = One::new("beta", |_| {});
    let no_volume =
        Refuse { code: RefuseCode::Configuration, text: "node alpha has no volume db".to_owned() };
    let (log, advice) = one.told(Event::NoContact(Obstacle::Refused(no_volume)));
    assert_eq!(log, ["volume db: alpha refuses a session: node alpha has no volume db"]);
    assert!(advice.contains("node alpha has no volume db") && one.parted(), "{advice}");
    one.told(Event::Contact { willing: false });
    assert!(one.parted(), "that its port answers says nothing about the volume");
    let (log, advice) = one.told(Event::Contact { willing: true });
    assert_eq!(log, ["volume db: alpha would have a session again"]);
    assert!(advice.starts_with("waiting for alpha;") && !one.parted(), "{advice}");
    one.connect();
    let late = Obstacle::Failed { text: "an answer from before".to_owned() };
    assert_eq!(
        one.told(Event::NoContact(late)),
        (vec![], "no node serves: on the one that should, `costandby --config pair.toml --node beta promote db` or \
             `costandby --config pair.toml --node alpha promote db`".to_owned())
    );
}

#[test]
fn a_peers_words_are_one_line_of_bounded_length() {
    let mut one = One::new("alpha", |_| {});
    let (_, advice) = one.told(refused(RefuseCode::Disks, "a\nb\x1b[31mc"));
    assert!(advice.contains("a b [31mc"), "{advice:?}");
    let (log, advice) = one.told(refused(RefuseCode::Disks, &"é".repeat(30_000)));
    assert!(log[0].len() < 2600 && advice.len() < 2600);
}

#[test]
fn a_node_that_stays_apart_says_so_to_the_peer_and_to_who_waits() {
    let mut one = One::new("beta", |_| {});
    assert_eq!(one.controller.will_refuse(), None);
    reply(&one.command(Command::Disconnect)).expect("done");
    assert!(one.parted());
    let refuse = one.controller.will_refuse().expect("it stays apart");
    assert_eq!(refuse.code, RefuseCode::Disconnected);
    assert!(
        refuse.text.contains("`costandby --config pair.toml --node beta connect db` looks for alpha again"),
        "{}",
        refuse.text
    );
    let actions = one.greet();
    assert_eq!(actions, [Action::Refuse(refuse)]);
    reply(&one.command(Command::Connect { discard_my_data: false })).expect("done");
    assert!(!one.parted() && one.controller.will_refuse().is_none());
    one.told(unreachable(Reach::Refused, "connection refused"));
    let actions = one.command(Command::Connect { discard_my_data: false });
    let text = reply(&actions).expect("a no-op");
    assert!(text.contains("connection refused"), "{text}");
}

#[test]
fn a_promotion_without_the_peer_is_never_advised_without_its_price() {
    let mut waiting = One::new("beta", |_| {});
    let mut frozen = One::primary("alpha", OnPeerLoss::Freeze);
    frozen.on(lost(true));
    for one in [&mut waiting, &mut frozen] {
        let advice = one.controller.status().advice.expect("what to do");
        assert!(advice.contains(" promote db") && advice.contains("writes is lost"), "{advice}");
    }
    let changes: [fn(&mut Superblock); 3] = [
        |superblock| superblock.disk_state = DiskState::Inconsistent,
        |superblock| superblock.disk_state = DiskState::Outdated,
        |superblock| superblock.disk_state = DiskState::Failed,
    ];
    for change in changes {
        let mut one = One::new("beta", change);
        let actions = one.command(promote(false));
        let text = reply(&actions).expect_err("refused");
        assert!(text.contains("gives up what alpha has: only if alpha's data is lost for good"), "{text}");
    }
}

/// The advice of a primary that lost its disk after `change`.
fn after_failure(change: impl Fn(&mut One)) -> String {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    change(&mut one);
    one.on(Event::DiskFailed { text: "EIO".to_owned() });
    one.controller.status().advice.expect("what to do")
}

#[test]
fn a_failed_disk_says_who_has_the_data() {
    let advice = after_failure(|_| {});
    assert!(
        advice.contains(
            "beta has the data, and `costandby --config pair.toml --node beta promote db` serves it"
        ),
        "{advice}"
    );
    let advice = after_failure(|one| drop(one.on(lost(false))));
    assert!(advice.contains("beta had the same data when the two parted"), "{advice}");
    let alone = after_failure(|one| drop(one.on(lost(true))));
    let differs = after_failure(|one| one.controller.unrepaired = true);
    for advice in [alone, differs] {
        assert!(advice.contains("IT MAY HOLD WRITES THAT beta LACKS"), "{advice}");
        assert!(advice.contains("gives those writes up") && !advice.contains("has the data"), "{advice}");
    }
    let mut copying = One::with(
        "alpha",
        OnPeerLoss::Continue,
        |superblock| superblock.primary = true,
        |peer| peer.disk_state = DiskState::Inconsistent,
    );
    copying.connect();
    copying.on(Event::DiskFailed { text: "EIO".to_owned() });
    let advice = copying.controller.status().advice.expect("what to do");
    assert!(advice.contains("IT MAY HOLD WRITES THAT beta LACKS"), "half a copy is none: {advice}");

    let mut standby = One::new("beta", |_| {});
    standby.peer_serves = true;
    standby.connect();
    standby.on(Event::DiskFailed { text: "EIO".to_owned() });
    let advice = standby.controller.status().advice.expect("what to do");
    assert!(advice.contains("alpha has the data. Repair or replace the disk of beta"), "{advice}");
}

#[test]
fn a_failed_disk_that_was_alone_is_the_newer_one_after_a_restart_too() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.on(lost(true));
    one.on(Event::DiskFailed { text: "EIO".to_owned() });
    let found = one.stored().clone();
    let mut again = One::new("alpha", |superblock| superblock.clone_from(&found));
    again.on(Event::Start);
    let advice = again.controller.status().advice.expect("what to do");
    let actions = again.command(promote(false));
    let refused = reply(&actions).expect_err("refused");
    for text in [advice.as_str(), refused] {
        assert!(text.contains("MAY HOLD WRITES THAT beta LACKS"), "{text}");
        assert!(!text.contains("sync from") && !text.contains("what beta has"), "beta has less: {text}");
    }

    // One whose peer has the data says so.
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.on(Event::DiskFailed { text: "EIO".to_owned() });
    let found = one.stored().clone();
    let mut again = One::new("alpha", |superblock| superblock.clone_from(&found));
    again.on(Event::Start);
    let advice = again.controller.status().advice.expect("what to do");
    assert!(advice.ends_with("waiting for beta, to sync from it"), "{advice}");
}

#[test]
fn a_new_disk_does_not_say_that_the_peer_has_data() {
    let mut one =
        One::new("alpha", |superblock| *superblock = Superblock::fresh("db", "alpha", 1 << 20, true));
    one.on(Event::Start);
    let advice = one.controller.status().advice.expect("what to do");
    let actions = one.command(promote(false));
    let refused = reply(&actions).expect_err("refused");
    for text in [advice.as_str(), refused] {
        assert!(text.contains("new") && text.contains("has never met beta's"), "{text}");
        assert!(!text.contains("sync from") && !text.contains("what beta has"), "{text}");
    }
}

#[test]
fn of_two_disks_that_cannot_be_copied_from_an_operator_hears_what_each_is() {
    let ahead = |superblock: &mut Superblock| {
        superblock.generations.advance(Generation(6), true);
        superblock.disk_state = DiskState::Failed;
    };
    let mut one = One::with("alpha", OnPeerLoss::Continue, |_| {}, ahead);
    one.greet();
    let advice = one.controller.status().advice.expect("what to do");
    assert!(advice.contains("alpha's is UpToDate, beta's Failed; beta's holds the newer data"), "{advice}");
    assert!(advice.contains("gives up the other one's data") && one.parted(), "{advice}");
}

#[test]
fn disks_that_are_no_pair_come_with_a_next_step_and_its_price() {
    let other: fn(&mut Superblock) = |superblock| superblock.volume_id = [9; 16];
    let larger: fn(&mut Superblock) = |superblock| superblock.size *= 2;
    for (change, words) in [(other, "no common past"), (larger, "1048576 bytes on alpha and 2097152 on beta")]
    {
        let mut one = One::with("alpha", OnPeerLoss::Continue, |_| {}, change);
        one.greet();
        let advice = one.controller.status().advice.expect("what to do");
        assert!(advice.contains(words), "{advice}");
        assert!(advice.contains(" create db --force`") && advice.contains("gives up what"), "{advice}");
    }
}

#[test]
fn a_peer_of_another_name_is_refused_said_once_and_shown_until_the_right_one_is_here() {
    let mut one = One::new("beta", |_| {});
    one.on(Event::Start);
    let mut hello = one.peer_hello();
    hello.node = "gamma".to_owned();
    let mut said = |hello: &Hello| {
        let mut actions = Vec::new();
        one.controller.handle(NOW, Event::HelloReceived(Box::new(hello.clone())), &mut actions);
        let refused =
            matches!(&actions[0], Action::Refuse(refuse) if refuse.code == RefuseCode::Configuration);
        assert!(refused, "{actions:?}");
        actions.iter().filter(|action| matches!(action, Action::Log { .. })).count()
    };
    assert_eq!((said(&hello), said(&hello)), (1, 0), "once");
    hello.node = "delta".to_owned();
    assert_eq!(said(&hello), 1, "and on change");
    let advice = one.controller.status().advice.expect("shown");
    assert!(advice.contains("expected alpha") && advice.contains("got delta"), "{advice}");
    one.peer_serves = true;
    one.connect();
    let over = one.controller.status().advice;
    assert!(over.is_none_or(|advice| !advice.contains("delta")));
}
