//! Fuzzes the handshake that proves the pair's key, and the key file's text: what a node reads first from whoever dials it, or
//! takes its dial.
//!
//! What must hold: no input panics; nothing that was not made with the key is let in, as an opening, an answer or a sealed
//! message; a header announces no more than a handshake may have; the text of a key file that is accepted says the same when
//! it is written again. An input is tried as it is, and as the body of a well-formed message of each kind.
#![no_main]

use costandby_control::secure::handshake::{
    HANDSHAKE_LEN_MAX, HEADER_LEN, MAGIC, SecureError, VERSION, accept, body_len, open, rejection, sealed_len,
};
use costandby_control::secure::key::{KEY_LEN, Key, Keys};
use libfuzzer_sys::fuzz_target;

fn check(bytes: &[u8], keys: &Keys) {
    let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return };
    let Ok(len) = body_len(header) else { return };
    assert!((1..=HANDSHAKE_LEN_MAX).contains(&len), "a body of {len} bytes");
    let error = accept(keys, "beta", bytes).expect_err("made without the key");
    if let Some(told) = rejection(&error) {
        let (opened, _) = open(keys, "alpha", "beta");
        assert!(matches!(opened.finish(&told), Err(SecureError::Rejected(_))), "{error}");
    }
    let (opened, _) = open(keys, "alpha", "beta");
    assert!(opened.finish(bytes).is_err(), "an answer made without the key");
}

fuzz_target!(|data: &[u8]| {
    let keys = Keys::one(Key::from_bytes([7; KEY_LEN]));
    check(data, &keys);
    let body = &data[..data.len().min(HANDSHAKE_LEN_MAX)];
    for kind in 0..6 {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[VERSION, kind]);
        bytes.extend_from_slice(&u16::try_from(body.len()).expect("bounded").to_le_bytes());
        bytes.extend_from_slice(body);
        check(&bytes, &keys);
    }
    let (opened, opening) = open(&keys, "alpha", "beta");
    let (answer, mut beta) = accept(&keys, "beta", &opening).expect("made with the key");
    let mut alpha = opened.finish(&answer).expect("made with the key");
    assert!(beta.unseal(data).is_err() && alpha.unseal(data).is_err(), "sealed without the key");
    if let Some(&[low, high]) = data.first_chunk::<2>() {
        let _ = sealed_len([low, high]);
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(keys) = Keys::from_text(text)
    {
        assert_eq!(Keys::from_text(&keys.to_text()), Ok(keys), "changed by being written");
    }
});
