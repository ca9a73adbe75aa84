//! Fuzzes the private data of an RDMA connection: the first thing an RDMA listener reads, from whoever finds its port.
//!
//! What must hold: no input panics the decoder, what it accepts says exactly what its bytes say, and padding behind it
//! changes nothing. An input is tried as it is, and with the magic number and the checksum that its announced length
//! asks for, which the search would hardly ever guess.
#![no_main]

use costandby_datapath::transport::rdma::private_data::{Introduction, LEN, MAGIC};
use libfuzzer_sys::fuzz_target;

const CHECKSUM_LEN: usize = 4;
const LEN_AT: usize = 5;

fn check(bytes: &[u8]) {
    let Ok(introduction) = Introduction::decode(bytes) else { return };
    assert_eq!(introduction.encode(), bytes[..LEN], "accepted private data lost something");
    let padded = [&bytes[..LEN], &[0xa5; 32]].concat();
    let again = Introduction::decode(&padded).expect("padding changes nothing");
    assert!(again.secret.matches(&introduction.secret), "padding changed the secret");
    assert!(introduction.ring_address.checked_add(introduction.ring_len).is_some(), "the ring wraps around");
}

fuzz_target!(|data: &[u8]| {
    check(data);
    let mut fixed = data.to_vec();
    let Some(announced) = fixed.get(LEN_AT).map(|len| usize::from(*len)) else { return };
    fixed[..MAGIC.len()].copy_from_slice(&MAGIC);
    if announced <= LEN_AT + CHECKSUM_LEN || announced > fixed.len() {
        return;
    }
    let (checked, checksum) = fixed[..announced].split_at_mut(announced - CHECKSUM_LEN);
    checksum.copy_from_slice(&crc32c::crc32c(checked).to_le_bytes());
    check(&fixed);
});
