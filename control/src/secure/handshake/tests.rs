//! Who is let in and who is not; that nothing that was changed, repeated or sent back opens; that no bytes panic.

use super::*;
use crate::secure::key::KEY_LEN;
use proptest::prelude::*;

fn key(byte: u8) -> Key {
    Key::from_bytes([byte; KEY_LEN])
}

fn keys(byte: u8) -> Keys {
    Keys::one(key(byte))
}

/// What a handshake between alpha and beta comes to on both ends.
fn shake(dialler: &Keys, acceptor: &Keys) -> (Result<Sealed, SecureError>, Result<Sealed, SecureError>) {
    let (opened, opening) = open(dialler, "alpha", "beta");
    match accept(acceptor, "beta", &opening) {
        Ok((answer, sealed)) => (opened.finish(&answer), Ok(sealed)),
        Err(error) => (opened.finish(&rejection(&error).expect("told")), Err(error)),
    }
}

fn shaken() -> (Sealed, Sealed) {
    let (dialler, acceptor) = shake(&keys(1), &keys(1));
    (dialler.expect("proved"), acceptor.expect("proved"))
}

/// A message without its length.
fn sealed(end: &mut Sealed, message: &[u8]) -> Vec<u8> {
    let bytes = end.seal(message);
    assert_eq!(sealed_len([bytes[0], bytes[1]]).expect("good"), bytes.len() - 2);
    bytes[2..].to_vec()
}

#[test]
fn both_ends_know_each_other_and_open_what_the_other_seals() {
    let (mut alpha, mut beta) = shaken();
    assert_eq!((alpha.peer(), beta.peer()), ("beta", "alpha"));
    for round in 0..3_u8 {
        for message in [vec![], vec![round; 100], vec![round; limits::HELLO_LEN_MAX as usize + 17]] {
            let there = sealed(&mut alpha, &message);
            assert_eq!(beta.unseal(&there).expect("opens"), message);
            let back = sealed(&mut beta, &message);
            assert_eq!(alpha.unseal(&back).expect("opens"), message);
        }
    }
}

#[test]
fn a_secret_is_the_same_at_both_ends_and_another_for_each_label_and_connection() {
    let (alpha, beta) = shaken();
    assert_eq!(alpha.secret("rdma db"), beta.secret("rdma db"));
    assert_ne!(alpha.secret("rdma db"), alpha.secret("rdma web"));
    assert_ne!(alpha.secret("rdma db"), shaken().0.secret("rdma db"));
}

#[test]
fn while_a_key_is_replaced_both_are_accepted() {
    let [old, new] = [keys(1), keys(2)];
    let steps = [
        old.clone(),
        Keys::two(key(1), key(2)), // the new one is accepted
        Keys::two(key(2), key(1)), // the new one is used
        new.clone(),
    ];
    // The two nodes are never more than one step apart.
    for (at, here) in steps.iter().enumerate() {
        for there in &steps[at.saturating_sub(1)..steps.len().min(at + 2)] {
            assert!(matches!(shake(here, there), (Ok(_), Ok(_))), "{at}");
        }
    }
    assert!(matches!(shake(&old, &new), (Err(_), Err(SecureError::OtherKey))));
}

#[test]
fn a_node_without_a_key_talks_to_its_like_alone() {
    assert!(matches!(shake(&Keys::none(), &Keys::none()), (Ok(_), Ok(_))));
    let rejected = |(dialler, acceptor): (Result<Sealed, SecureError>, Result<Sealed, SecureError>)| {
        let Err(SecureError::Rejected(rejection)) = dialler else { panic!("let in") };
        (rejection, acceptor.expect_err("let in"))
    };
    let (told, found) = rejected(shake(&Keys::none(), &keys(1)));
    assert!(told == Rejection::DialerHasNoKey && matches!(found, SecureError::DialerHasNoKey));
    let (told, found) = rejected(shake(&keys(1), &Keys::none()));
    assert!(told == Rejection::AcceptorHasNoKey && matches!(found, SecureError::AcceptorHasNoKey));
    let (told, found) = rejected(shake(&keys(1), &keys(2)));
    assert!(told == Rejection::OtherKey && matches!(found, SecureError::OtherKey));
}

#[test]
fn a_lie_about_having_a_key_opens_nothing() {
    let (_, mut opening) = open(&Keys::none(), "alpha", "beta");
    opening[9] = OPENING;
    assert!(matches!(accept(&keys(1), "beta", &opening), Err(SecureError::OtherKey)));
    let (_, mut opening) = open(&keys(1), "alpha", "beta");
    opening[9] = OPENING_WITHOUT_KEY;
    assert!(matches!(accept(&Keys::none(), "beta", &opening), Err(SecureError::OtherKey)));
    assert!(matches!(accept(&keys(1), "beta", &opening), Err(SecureError::DialerHasNoKey)));
}

#[test]
fn a_nodes_own_opening_sent_back_to_it_is_refused() {
    let (_, opening) = open(&keys(1), "alpha", "beta");
    assert!(matches!(accept(&keys(1), "alpha", &opening), Err(SecureError::OtherNode { .. })));
    let (_, opening) = open(&keys(1), "beta", "beta");
    assert!(matches!(accept(&keys(1), "beta", &opening), Err(SecureError::OtherNode { .. })));
    let (opened, opening) = open(&keys(1), "alpha", "gamma");
    let (answer, _) = accept(&keys(1), "gamma", &opening).expect("gamma was meant");
    assert!(opened.finish(&answer).is_ok());
    // An answer to another dialer.
    let (opened, opening) = open(&keys(1), "alpha", "beta");
    let (answer, _) = accept(&keys(1), "beta", &opening).expect("good");
    let (other, _) = open(&keys(1), "alpha", "beta");
    assert!(matches!(other.finish(&answer), Err(SecureError::Unproved)));
    assert!(opened.finish(&answer).is_ok());
}

#[test]
fn an_opening_that_was_recorded_gives_nothing_that_opens() {
    let (_, opening) = open(&keys(1), "alpha", "beta");
    let (_, mut first) = accept(&keys(1), "beta", &opening).expect("good");
    let (mut alpha, mut beta) = shaken();
    let said = sealed(&mut alpha, b"hello");
    let (_, mut again) = accept(&keys(1), "beta", &opening).expect("the opening itself is good");
    assert!(matches!(again.unseal(&said), Err(SecureError::Broken)), "the hello of another connection");
    assert!(matches!(first.unseal(&said), Err(SecureError::Broken)));
    assert_eq!(beta.unseal(&said).expect("its own"), b"hello");
    assert!(matches!(beta.unseal(&said), Err(SecureError::Broken)), "twice");
}

#[test]
fn a_message_changed_left_out_or_sent_back_does_not_open() {
    let (mut alpha, mut beta) = shaken();
    let said = sealed(&mut alpha, b"hello");
    for at in 0..said.len() {
        let mut changed = said.clone();
        changed[at] ^= 0x10;
        assert!(beta.unseal(&changed).is_err(), "byte {at}");
    }
    assert!(alpha.unseal(&said).is_err(), "its own");
    let next = sealed(&mut alpha, b"next");
    assert!(beta.unseal(&next).is_err(), "the one before was left out");
    assert!(matches!(sealed_len([15, 0]), Err(SecureError::Length { found: 15 })));
}

#[test]
fn every_changed_byte_of_an_opening_or_an_answer_is_found() {
    let (_, opening) = open(&keys(1), "alpha", "beta");
    for at in HEADER_LEN..opening.len() {
        let mut changed = opening.clone();
        changed[at] ^= 1;
        // The highest bit of a Curve25519 point is not looked at, but it is part of the transcript.
        assert!(accept(&keys(1), "beta", &changed).is_err(), "byte {at} of the opening");
    }
    for at in HEADER_LEN..opening.len() {
        let (opened, opening) = open(&keys(1), "alpha", "beta");
        let (mut answer, _) = accept(&keys(1), "beta", &opening).expect("good");
        assert_eq!(answer.len(), opening.len(), "both names stand in both");
        answer[at] ^= 1;
        assert!(opened.finish(&answer).is_err(), "byte {at} of the answer");
    }
}

#[test]
fn other_programs_and_other_releases_are_told_apart() {
    let header = |text: &[u8; HEADER_LEN]| body_len(text);
    assert!(matches!(header(b"GET / HTTP/1"), Err(SecureError::Magic { .. })));
    assert!(matches!(header(b"costandb\x02\x01\x10\x00"), Err(SecureError::Version { found: 2 })));
    assert!(matches!(header(b"costandb\x03\x01\x00\x00"), Err(SecureError::Length { found: 0 })));
    assert!(matches!(header(b"costandb\x03\x01\xff\xff"), Err(SecureError::Length { found: 65_535 })));
    assert_eq!(header(b"costandb\x03\x01\x20\x00").expect("good"), 32);
    // A later release says that this one is older.
    let (opened, _) = open(&keys(1), "alpha", "beta");
    assert!(matches!(opened.finish(b"costandb\x04\x04\x01\x00\x05"), Err(SecureError::Version { found: 4 })));
    let (opened, _) = open(&keys(1), "alpha", "beta");
    let found = opened.finish(b"costandb\x03\x04\x01\x00\x63");
    assert!(matches!(found, Err(SecureError::Rejected(Rejection::Unknown))));
    let (opened, opening) = open(&keys(1), "alpha", "beta");
    assert!(matches!(opened.finish(&opening), Err(SecureError::Kind { found: OPENING })));
}

#[test]
fn the_longest_names_fit() {
    let [alpha, beta] = ["a".repeat(NAME_LEN_MAX), "b".repeat(NAME_LEN_MAX)];
    let (opened, opening) = open(&keys(1), &alpha, &beta);
    assert_eq!(opening.len(), HEADER_LEN + HANDSHAKE_LEN_MAX);
    let (answer, _) = accept(&keys(1), &beta, &opening).expect("good");
    assert_eq!(opened.finish(&answer).expect("good").peer(), beta);
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), keyed in any::<bool>()) {
        let _ = read_names(&bytes);
        if let Some(header) = bytes.first_chunk::<HEADER_LEN>() {
            let _ = body_len(header);
            let keys = if keyed { keys(1) } else { Keys::none() };
            prop_assert!(accept(&keys, "beta", &bytes).is_err());
            let (opened, _) = open(&keys, "alpha", "beta");
            prop_assert!(opened.finish(&bytes).is_err());
        }
        let (_, mut beta) = shaken();
        prop_assert!(beta.unseal(&bytes).is_err());
    }

    /// Whoever holds the key may still say anything.
    #[test]
    fn no_names_of_a_holder_of_the_key_panic(payload in prop::collection::vec(any::<u8>(), 0..130)) {
        let prologue = prologue(OPENING);
        let mut noise = builder(&[1; 32], &prologue).build_initiator().expect("good");
        let mut body = [0; HANDSHAKE_LEN_MAX];
        let len = noise.write_message(&payload, &mut body).expect("fits");
        if let Ok((_, sealed)) = accept(&keys(1), "beta", &message(OPENING, &body[..len])) {
            prop_assert!(sealed.peer() != "beta" && sealed.peer().len() <= NAME_LEN_MAX);
        }
    }
}

#[test]
fn another_programs_first_bytes_are_named() {
    let said = |begin: &[u8]| {
        let mut header = [0; HEADER_LEN];
        header[..begin.len()].copy_from_slice(begin);
        body_len(&header).expect_err("another program's").to_string()
    };
    for (begin, what) in [
        (&b"GET / HTTP/1"[..], "as HTTP does"),
        (b"POST /x HTTP", "as HTTP does"),
        (b"\x16\x03\x01\x02\0\x01", "as TLS does"),
        (b"SSH-2.0-Open", "as SSH does"),
        (b"NBDMAGICIHAV", "as NBD does"),
        (b"\x7fELF", "as another program does"),
    ] {
        let text = said(begin);
        assert!(text.starts_with("it does not begin as costandby does") && text.contains(what), "{text}");
    }
}
