//! Connections over the device that has `COSTANDBY_RDMA_ADDRESS`, both ends in one process; and what is said without one.

use super::*;
use crate::limits::RDMA_RING_LEN;
use crate::transport::rdma::endpoint::{Completion, Endpoint, EndpointError, MESSAGE_LEN, Piece, Registrar};
use crate::transport::rdma::keeper::Whereabouts;
use crate::transport::rdma::ring::RingKeeper;
use costandby_ffi::testing::{scaled, skip_outside_rig};
use std::time::Duration;

/// Of a peer that is invented: only its length is looked at.
const RING_LEN: usize = 64 << 20;
const SECRET: Secret = Secret([7; 16]);
const STEP_MAX: Duration = Duration::from_secs(20);

fn address() -> Option<IpAddr> {
    let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
        skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
        return None;
    };
    Some(address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address"))
}

fn soon() -> Instant {
    Instant::now() + scaled(STEP_MAX)
}

/// A keeper whose ring is made. The smallest that a peer takes, since emulated processors are slow.
fn kept(address: IpAddr) -> RingKeeper {
    let keeper = RingKeeper::default();
    let making = keeper.begin().expect("there is none");
    Ring::make(making, address, usize::try_from(RDMA_RING_LEN).unwrap()).unwrap();
    assert_eq!(keeper.look(), Whereabouts::Here);
    keeper
}

fn lease(address: IpAddr) -> RingLease {
    kept(address).lend().expect("just made")
}

/// A connection from one keeper's ring to another's.
fn connect(address: IpAddr, active: &RingKeeper, passive: &RingKeeper) -> [Connected; 2] {
    let listening = Listening::bind(address, SECRET).unwrap();
    let peer = listening.address();
    let passive = passive.clone();
    let accept = move || listening.accept(STEP_MAX, STEP_MAX, || true, || passive.lend());
    let accepting = std::thread::spawn(accept);
    let dialled = dial(address, peer, SECRET, active.lend().expect("free"), STEP_MAX).unwrap();
    [dialled, accepting.join().unwrap().unwrap()]
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
        Ring::new(nowhere, RING_LEN, |_| panic!("there is nothing to make it for")).unwrap_err(),
    ];
    for error in errors {
        println!("{error}");
        assert!(matches!(error, SetupError::Verbs(_)), "{error}");
    }
    let keeper = RingKeeper::default();
    let error = Ring::make(keeper.begin().unwrap(), nowhere, RING_LEN).unwrap_err();
    assert!(matches!(error, SetupError::Verbs(_)), "{error}");
    assert_eq!(keeper.look(), Whereabouts::Nowhere, "and it can be tried again");
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
    let keepers = [kept(address), kept(address)];
    let ring_len = keepers[0].lend().unwrap().ring().len();
    let [mut a, mut b] = connect(address, &keepers[0], &keepers[1]);
    assert_eq!((a.peer_ring_len, b.peer_ring_len), (ring_len, ring_len));
    assert_eq!((a.peer_receives, b.peer_receives), (b.receives, a.receives));
    for turn in 0..2 {
        let (from, to) = if turn == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let source = Mapping::anonymous(8192).unwrap();
        source.span(0, 8192).write_from(&[3; 8192]);
        let region = from.endpoint.registrar().register(&source.span(0, 8192)).unwrap();
        let piece = |offset, len| Piece { region: &region, offset, len };
        // Round the ring's end, as a link does it.
        from.endpoint.write(&[piece(4096, 64), piece(0, 64)], (ring_len - 128) as u64, None, 1, false);
        from.endpoint.write(&[piece(64, 4032)], 0, Some(77), 2, true);
        from.endpoint.send(&[5; MESSAGE_LEN], 3, true);
        from.endpoint.ring_doorbell().unwrap();
        assert_eq!(expect(&mut to.endpoint), Completion::Placed { immediate: 77 });
        assert_eq!(expect(&mut to.endpoint), Completion::Message { bytes: [5; MESSAGE_LEN] });
        assert_eq!(expect(&mut from.endpoint), Completion::Done { id: 2 });
        assert_eq!(expect(&mut from.endpoint), Completion::Done { id: 3 });
        let mut bytes = [0; 4160];
        to.ring.span(ring_len - 128, 4160).read_into(&mut bytes);
        assert_eq!(bytes, [3; 4160]);
        from.endpoint.check().unwrap();
    }
    b.endpoint.cut();
    assert!(b.endpoint.check().is_err());
}

#[test]
fn a_write_beyond_the_ring_s_end_is_refused_by_the_device() {
    let Some(address) = address() else { return };
    let keepers = [kept(address), kept(address)];
    let [mut a, b] = connect(address, &keepers[0], &keepers[1]);
    let source = Mapping::anonymous(4096).unwrap();
    let region = a.endpoint.registrar().register(&source.span(0, 4096)).unwrap();
    let piece = Piece { region: &region, offset: 0, len: 128 };
    a.endpoint.write(&[piece], (b.ring.len() / 2 - 64) as u64, Some(1), 1, true);
    a.endpoint.ring_doorbell().unwrap();
    let deadline = soon();
    let mut room = [Completion::Done { id: 0 }];
    let error = loop {
        match a.endpoint.poll(&mut room) {
            Ok(_) => assert!(Instant::now() < deadline, "the second lap takes writes"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, EndpointError::WorkRequest { code: 10, .. }), "{error}");
}

/// What one link leaves behind must not disturb the next: the same ring, session after session, in both roles; the peer
/// of the link before still has its queue pair, the address and the key.
#[test]
fn a_ring_outlives_its_links_and_no_late_write_lands_in_the_next_one_s() {
    let Some(address) = address() else { return };
    let (ours, theirs, others) = (kept(address), [kept(address), kept(address)], [1_u8, 2, 3, 4]);
    let mut former: Option<Connected> = None;
    let mut memory = None;
    for round in others {
        let peers = &theirs[usize::from(round % 2)];
        let [mut end, mut peer] = match round {
            1 | 3 => connect(address, &ours, peers),
            _ => {
                let [peer, end] = connect(address, peers, &ours);
                [end, peer]
            }
        };
        assert!(ours.lend().is_none(), "two links have one ring");
        let start = Arc::as_ptr(&end.ring);
        assert_eq!(*memory.get_or_insert(start), start, "another ring was made");
        let write = |from: &mut Connected, byte: u8| {
            let source = Mapping::anonymous(4096).unwrap();
            source.span(0, 4096).write_from(&[byte; 4096]);
            let region = from.endpoint.registrar().register(&source.span(0, 4096)).unwrap();
            from.endpoint.write(&[Piece { region: &region, offset: 0, len: 4096 }], 0, Some(0), 1, true);
            // A queue pair in trouble says so when it is polled.
            let _ = from.endpoint.ring_doorbell();
        };
        write(&mut peer, round);
        assert_eq!(expect(&mut end.endpoint), Completion::Placed { immediate: 0 });
        let bytes = |end: &Connected| {
            let mut bytes = [0; 4096];
            end.ring.span(0, 4096).read_into(&mut bytes);
            bytes
        };
        assert_eq!(bytes(&end), [round; 4096]);
        if let Some(mut former) = former.take() {
            write(&mut former, 0xee);
            let (deadline, mut room) = (soon(), [Completion::Done { id: 0 }]);
            while former.endpoint.poll(&mut room).is_ok() && former.endpoint.check().is_ok() {
                assert!(Instant::now() < deadline, "the peer of a former link goes on");
            }
            assert_eq!(bytes(&end), [round; 4096], "a late write landed");
            assert_eq!(end.endpoint.poll(&mut room).unwrap(), 0, "a late write was told");
        }
        // What arrived is still being applied when the link has ended: until that is done nobody else may write there.
        let held = end.ring.span(0, 64);
        let Connected { mut endpoint, ring, .. } = end;
        endpoint.cut();
        drop((endpoint, ring));
        assert_eq!((ours.look(), ours.lend().is_some()), (Whereabouts::InUse, false));
        drop(held);
        assert_eq!(ours.look(), Whereabouts::Here);
        former = Some(peer);
    }
}

#[test]
fn a_ring_whose_keeper_is_gone_is_given_up_in_the_making() {
    let Some(address) = address() else { return };
    let keeper = RingKeeper::default();
    let making = keeper.begin().unwrap();
    drop(keeper);
    let error = Ring::make(making, address, RING_LEN).unwrap_err();
    assert!(matches!(error, SetupError::GivenUp), "{error}");
}

#[test]
fn strangers_are_turned_away_and_the_peer_still_comes_in() {
    let Some(address) = address() else { return };
    let listening = Listening::bind(address, SECRET).unwrap();
    let peer = listening.address();
    let (ours, theirs) = (kept(address), kept(address));
    let lent = theirs.clone();
    let accept = move || listening.accept(STEP_MAX, STEP_MAX, || true, || lent.lend());
    let passive = std::thread::spawn(accept);
    for secret in [Secret([0; 16]), Secret([6; 16])] {
        let refused = dial(address, peer, secret, ours.lend().expect("free"), STEP_MAX);
        assert!(matches!(refused, Err(SetupError::Verbs(VerbsError::Rejected { .. }))), "{refused:?}");
        assert_eq!((ours.look(), theirs.look()), (Whereabouts::Here, Whereabouts::Here));
    }
    let silent = Resolved::new(None, peer, soon()).unwrap();
    let settings = Settings { send_len: 16, receive_len: 16, ack_timeout: 14 };
    let refused = silent.connect(&settings, b"hello", soon());
    assert!(matches!(refused, Err(VerbsError::Rejected { .. })), "{refused:?}");
    drop(dial(address, peer, SECRET, ours.lend().expect("free"), STEP_MAX).unwrap());
    drop(passive.join().unwrap().unwrap());
    let gone = dial(address, peer, SECRET, ours.lend().expect("free"), STEP_MAX);
    assert!(matches!(gone, Err(SetupError::Verbs(VerbsError::Refused { .. }))), "{gone:?}");
    assert_eq!((ours.look(), theirs.look()), (Whereabouts::Here, Whereabouts::Here));
}

#[test]
fn a_peer_that_never_comes_is_waited_for_until_the_deadline_or_until_nobody_wants_it() {
    let Some(address) = address() else { return };
    for wanted in [true, false] {
        let listening = Listening::bind(address, SECRET).unwrap();
        let (start, come_max) = (Instant::now(), if wanted { STEP_MAX / 100 } else { STEP_MAX });
        let lend = || panic!("nobody showed the secret");
        let error = listening.accept(come_max, STEP_MAX, || wanted, lend).unwrap_err();
        let right = matches!(
            (wanted, &error),
            (true, SetupError::NobodyCame { refused: 0 }) | (false, SetupError::GivenUp)
        );
        assert!(right, "{error}");
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}

#[test]
fn a_peer_that_comes_while_the_ring_is_in_use_is_turned_away() {
    let Some(address) = address() else { return };
    let listening = Listening::bind(address, SECRET).unwrap();
    let peer = listening.address();
    let passive = std::thread::spawn(move || listening.accept(STEP_MAX, STEP_MAX, || true, || None));
    let refused = dial(address, peer, SECRET, lease(address), STEP_MAX);
    assert!(matches!(refused, Err(SetupError::Verbs(VerbsError::Rejected { .. }))), "{refused:?}");
    let error = passive.join().unwrap().unwrap_err();
    assert!(matches!(error, SetupError::RingInUse), "{error}");
}

#[test]
fn a_peer_that_accepts_without_the_secret_is_not_used() {
    let Some(address) = address() else { return };
    let keeper = kept(address);
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
        let error = dial(address, peer, SECRET, keeper.lend().expect("free"), STEP_MAX).unwrap_err();
        let right = matches!(
            (lie, &error),
            (true, SetupError::Secret { .. }) | (false, SetupError::Introduction { .. })
        );
        assert!(right, "{error}");
        drop(passive.join().unwrap());
        assert_eq!(keeper.look(), Whereabouts::Here, "the ring is free again");
    }
}
