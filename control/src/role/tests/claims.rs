//! What a peer claims in its hello is checked against what this node sees of itself: a primary that serves is no target, epochs
//! have bounds, a size that differs is named.

use super::*;
use crate::hello::EPOCH_STEP_MAX;

#[test]
fn a_primary_that_serves_is_copied_to_only_after_an_operator_demoted_it() {
    let mut one = One::primary("alpha", OnPeerLoss::Continue);
    one.on(lost(false));
    one.peer.generations.advance(Generation(6), true);
    one.peer.epoch = Epoch(4);
    one.peer_serves = true;
    let before = one.stored().clone();
    for _ in 0..2 {
        let actions = one.greet();
        let [Action::Refuse(refuse)] = &actions[..] else { panic!("{actions:?}") };
        assert!(refuse.text.contains("beta went on without alpha, which serves"), "{}", refuse.text);
        assert_eq!((one.stored(), one.controller.role), (&before, Role::Primary));
        let status = one.controller.status();
        assert!(status.parted && status.advice == Some(refuse.text.clone()));
    }
    // Even while writes wait for the peer.
    let actions = one.command(Command::Demote);
    assert!(actions[0] == Action::StopServing && !stored(&actions[1]).primary);
    reply(&actions[2..]).expect("done");
    let actions = one.greet();
    let down = stored(&actions[0]);
    assert!(!down.primary && down.disk_state == DiskState::Inconsistent && down.epoch == Epoch(4));
    assert!(matches!(actions[1], Action::SendReady(_)));
    assert_eq!(one.controller.status().advice.filter(|advice| advice.contains("went on")), None);
}

/// A node that was promoted while alpha went on serving, and alpha's hello.
fn promoted_beside_a_primary() -> One {
    let mut one = One::new("beta", |_| {});
    one.on(lost(false));
    reply(&one.command(promote(false))).expect("alone");
    one.peer_serves = true;
    one
}

#[test]
fn both_nodes_say_the_same_of_a_primary_that_was_overtaken_and_store_nothing() {
    let mut ahead = promoted_beside_a_primary();
    let before = ahead.stored().clone();
    let mut texts = Vec::new();
    for _ in 0..3 {
        let actions = ahead.greet();
        let [Action::Refuse(refuse)] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!((ahead.stored(), ahead.controller.role), (&before, Role::Primary));
        texts.push(refuse.text.clone());
    }
    let mut serves = One::primary("alpha", OnPeerLoss::Continue);
    serves.on(lost(false));
    let numbers = (serves.stored().sessions_offered, serves.stored().sessions_begun);
    serves.peer = before;
    (serves.peer.sessions_offered, serves.peer.sessions_begun) = numbers;
    serves.peer_serves = true;
    let actions = serves.greet();
    let [Action::Refuse(refuse)] = &actions[..] else { panic!("{actions:?}") };
    texts.push(refuse.text.clone());
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:#?}");
    for command in ["alpha demote db`", "beta demote db`", "beta connect db --discard-my-data`"] {
        assert!(
            texts[0].contains(&format!("`costandby --config pair.toml --node {command}")),
            "{}",
            texts[0]
        );
    }
    for one in [&serves, &ahead] {
        assert_eq!(one.controller.status().advice.as_ref(), Some(&texts[0]));
    }
}

#[test]
fn who_overtook_a_primary_gives_its_own_data_up_only_demoted_and_at_an_operators_word() {
    let mut one = promoted_beside_a_primary();
    one.greet();
    let discard = Command::Connect { discard_my_data: true };
    let actions = one.command(discard);
    let text = reply(&actions).expect_err("it serves");
    assert!(text.contains("`costandby --config pair.toml --node beta demote db` first"), "{text}");
    one.command(Command::Demote);
    one.on(Event::Quiesced);
    let actions = one.greet();
    assert!(matches!(actions.last(), Some(Action::Refuse(_))), "its data is the newer: {actions:?}");
    let actions = one.command(discard);
    assert_eq!(stored(&actions[0]).disk_state, DiskState::Inconsistent);
    reply(&actions).expect("given up");
    one.greet();
    assert_eq!(one.controller.connection, Connection::Handshaking, "alpha's disk is copied");
}

#[test]
fn an_epoch_that_no_promotions_led_to_is_refused_by_name() {
    let ours = synced("alpha").epoch.0;
    for (epoch, taken) in [
        (ours + EPOCH_STEP_MAX, true),
        (ours + EPOCH_STEP_MAX + 1, false),
        (1 << 62, false),
        (u64::MAX, false),
    ] {
        let mut one = One::with("alpha", OnPeerLoss::Continue, |_| {}, |peer| peer.epoch = Epoch(epoch));
        let actions = one.greet();
        assert_eq!(matches!(actions.last(), Some(Action::SendReady(_))), taken, "{epoch}: {actions:?}");
        if !taken {
            let Some(Action::Refuse(refuse)) = actions.last() else { panic!("{actions:?}") };
            assert!(refuse.text.contains(&format!("beta claims epoch {epoch}")), "{}", refuse.text);
            assert_eq!(one.stored().epoch, Epoch(ours));
        }
        let mut one = One::new("alpha", |_| {});
        one.connect();
        let granted = one
            .message(code::PROMOTE_REQUEST, epoch)
            .contains(&Action::SendPeer { code: code::PROMOTE_GRANT, arg: epoch });
        assert_eq!(granted, taken, "{epoch}");
        let mut one = One::new("alpha", |_| {});
        one.connect();
        one.message(code::PROMOTE_DENY, epoch);
        assert_eq!(one.stored().epoch == Epoch(epoch), taken, "{epoch}");
    }
}

#[test]
fn a_new_disk_that_failed_with_data_on_it_is_named_and_nobody_begins_unasked() {
    let failed = |disk: &mut Superblock| {
        *disk = Superblock::fresh("db", &disk.node, 1 << 20, false);
        disk.disk_state = DiskState::Failed;
    };
    let empty = |disk: &mut Superblock| *disk = Superblock::fresh("db", &disk.node, 1 << 20, true);
    let refused = |one: &mut One| {
        let actions = one.greet();
        let [Action::Refuse(refuse)] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!((refuse.code, one.controller.role), (RefuseCode::Disks, Role::Standby));
        refuse.text.clone()
    };
    let mut here = One::with("alpha", OnPeerLoss::Continue, failed, empty);
    let text = refused(&mut here);
    assert!(text.contains("the disk of alpha (new and failed) is not known to be empty"), "{text}");
    assert!(text.contains("beta's is new and known to be empty"), "{text}");
    let mut there = One::with("alpha", OnPeerLoss::Continue, empty, failed);
    let text = refused(&mut there);
    assert!(text.contains("the disk of beta (new and failed) is not known to be empty"), "{text}");
    reply(&there.command(promote(false))).expect_err("only by force");
    reply(&there.command(promote(true))).expect("an operator gave beta's data up");
    let mut both = One::with("alpha", OnPeerLoss::Continue, failed, failed);
    assert!(refused(&mut both).contains("the disks of alpha and of beta both failed"));
}

#[test]
fn a_size_that_differs_is_named_once_and_is_over_by_itself() {
    let mut one = One::with("alpha", OnPeerLoss::Continue, |_| {}, |peer| peer.size = 2 << 20);
    let mut logged = 0;
    for _ in 0..3 {
        one.controller.hello(1 << 20, &["tcp"]);
        let hello = one.peer_hello();
        let mut actions = Vec::new();
        one.controller.handle(NOW, Event::HelloReceived(Box::new(hello)), &mut actions);
        logged += actions.iter().filter(|action| matches!(action, Action::Log { .. })).count();
        let advice = one.controller.status().advice.expect("named");
        assert!(advice.contains("1048576 bytes on alpha and 2097152 on beta"), "{advice}");
        assert_eq!(one.controller.connection, Connection::Connecting);
    }
    assert_eq!(logged, 1);
    one.peer.size = 1 << 20;
    one.connect();
    assert_eq!(one.controller.connection, Connection::Connected);
    assert_eq!(one.controller.status().advice.filter(|advice| advice.contains("bytes on")), None);
}
