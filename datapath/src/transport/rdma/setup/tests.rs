//! Connections over the device that has `COSTANDBY_RDMA_ADDRESS`, both ends in one process; and what is said without one.

use super::*;
use crate::transport::rdma::endpoint::{Completion, Endpoint, MESSAGE_LEN, Piece, Registrar};
use costandby_ffi::testing::{scaled, skip_outside_rig};
use std::time::Duration;

/// Small, since the device pins it twice and emulated processors are slow.
const RING_LEN: usize = 64 << 20;
const SECRET: Secret = Secret([7; 16]);

fn address() -> Option<IpAddr> {
    let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
        skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
        return None;
    };
    Some(address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address"))
}

fn soon() -> Instant {
    Instant::now() + scaled(Duration::from_secs(20))
}

fn pair(address: IpAddr) -> (Connected, Connected) {
    let listening = Listening::bind(address, SECRET).unwrap();
    let peer = listening.address();
    let passive = std::thread::spawn(move || listening.accept(RING_LEN, soon()));
    let active = dial(address, peer, SECRET, RING_LEN, soon()).unwrap();
    (active, passive.join().unwrap().unwrap())
}

fn expect(endpoint: &mut VerbsEndpoint) -> Completion {
    let deadline = soon();
    let mut completions = [Completion::Done { id: 0 }];
    while endpoint.poll(&mut completions).unwrap() == 0 {
        assert!(Instant::now() < deadline, "nothing completes");
    }
    completions[0]
}

#[test]
fn without_a_device_there_every_call_says_so() {
    let nowhere = IpAddr::from([127, 0, 0, 1]);
    let errors = [
        able(nowhere).unwrap_err(),
        Listening::bind(nowhere, SECRET).unwrap_err(),
        dial(nowhere, SocketAddr::from(([127, 0, 0, 1], 1)), SECRET, RING_LEN, soon()).unwrap_err(),
    ];
    for error in errors {
        println!("{error}");
        assert!(matches!(error, SetupError::Verbs(_)), "{error}");
    }
}

#[test]
fn refusals_are_counted_in_the_text() {
    assert!(!SetupError::NobodyCame { refused: 0 }.to_string().contains("turned away"));
    assert!(
        SetupError::NobodyCame { refused: 3 }.to_string().contains("3 other connections were turned away")
    );
}

#[test]
fn two_ends_meet_and_both_rings_take_writes() {
    let Some(address) = address() else { return };
    able(address).unwrap();
    let (mut a, mut b) = pair(address);
    assert_eq!((a.peer_ring_len, b.peer_ring_len), (RING_LEN, RING_LEN));
    assert_eq!((a.peer_receives, b.peer_receives), (b.receives, a.receives));
    for turn in 0..2 {
        let (from, to) = if turn == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let source = Mapping::anonymous(8192).unwrap();
        source.span(0, 8192).write_from(&[3; 8192]);
        let region = from.endpoint.registrar().register(&source.span(0, 8192)).unwrap();
        let pieces = [(4096, 64), (0, 4096)].map(|(offset, len)| Piece { region: &region, offset, len });
        from.endpoint.write(&pieces, (RING_LEN - 128) as u64, Some(77), 1, true);
        from.endpoint.send(&[5; MESSAGE_LEN], 2, true);
        from.endpoint.ring_doorbell().unwrap();
        assert_eq!(expect(&mut to.endpoint), Completion::Placed { immediate: 77 });
        assert_eq!(expect(&mut to.endpoint), Completion::Message { bytes: [5; MESSAGE_LEN] });
        assert_eq!(expect(&mut from.endpoint), Completion::Done { id: 1 });
        assert_eq!(expect(&mut from.endpoint), Completion::Done { id: 2 });
        let mut bytes = [0; 4160];
        to.ring.span(RING_LEN - 128, 4160).read_into(&mut bytes);
        assert_eq!(bytes, [3; 4160]);
        from.endpoint.check().unwrap();
    }
    b.endpoint.cut();
    assert!(b.endpoint.check().is_err());
}

#[test]
fn strangers_are_turned_away_and_the_peer_still_comes_in() {
    let Some(address) = address() else { return };
    let listening = Listening::bind(address, SECRET).unwrap();
    let peer = listening.address();
    let passive = std::thread::spawn(move || listening.accept(RING_LEN, soon()));
    for secret in [Secret([0; 16]), Secret([6; 16])] {
        let refused = dial(address, peer, secret, RING_LEN, soon());
        assert!(matches!(refused, Err(SetupError::Verbs(VerbsError::Rejected { .. }))), "{refused:?}");
    }
    let silent = Resolved::new(None, peer, soon()).unwrap();
    let settings = Settings { send_len: 16, receive_len: 16, ack_timeout: 14 };
    let refused = silent.connect(&settings, b"hello", soon());
    assert!(matches!(refused, Err(VerbsError::Rejected { .. })), "{refused:?}");
    dial(address, peer, SECRET, RING_LEN, soon()).unwrap();
    passive.join().unwrap().unwrap();
    let gone = dial(address, peer, SECRET, RING_LEN, soon());
    assert!(matches!(gone, Err(SetupError::Verbs(VerbsError::Refused { .. }))), "{gone:?}");
}

#[test]
fn a_peer_that_never_comes_is_waited_for_until_the_deadline() {
    let Some(address) = address() else { return };
    let listening = Listening::bind(address, SECRET).unwrap();
    let start = Instant::now();
    let error = listening.accept(RING_LEN, start + Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, SetupError::NobodyCame { refused: 0 }), "{error}");
    assert!(start.elapsed() < scaled(Duration::from_secs(2)), "{:?}", start.elapsed());
}

#[test]
fn a_peer_that_accepts_without_the_secret_is_not_used() {
    let Some(address) = address() else { return };
    for lie in [true, false] {
        let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
        let peer = listener.local_address();
        let passive = std::thread::spawn(move || {
            let request = listener.request(soon()).unwrap().unwrap().open().unwrap();
            let settings = settings(request.domain()).unwrap();
            let ring_len = RING_LEN as u64;
            let (secret, ring_address, ring_rkey) = (Secret([8; 16]), 4096, 5);
            let introduction = Introduction { secret, ring_address, ring_rkey, ring_len, receives: 64 };
            let private = if lie { introduction.encode().to_vec() } else { vec![1; 20] };
            request.accept(&settings, &private, soon()).unwrap()
        });
        let error = dial(address, peer, SECRET, RING_LEN, soon()).unwrap_err();
        let right = matches!(
            (lie, &error),
            (true, SetupError::Secret { .. }) | (false, SetupError::Introduction { .. })
        );
        assert!(right, "{error}");
        drop(passive.join().unwrap());
    }
}
