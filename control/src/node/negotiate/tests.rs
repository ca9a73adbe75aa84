//! Two nodes settle their link over a real connection, with RDMA that can be made to fail at each step.

use super::*;
use crate::node::rdma::fake::{Fabric, FakeRdma, RingScript, Script};
use crate::role::{Found, VolumeController, VolumeSettings};
use crate::secure::key::{KEY_LEN, Key, Keys};
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::units::{AckLevel, OnPeerLoss};
use tokio::net::{TcpListener, TcpStream};

async fn connection() -> (Channel, Channel) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bound");
    let dialled = TcpStream::connect(listener.local_addr().expect("bound"));
    let (dialled, accepted) = tokio::join!(dialled, listener.accept());
    let keys = Keys::one(Key::from_bytes([7; KEY_LEN]));
    let (dialled, accepted) = tokio::join!(
        Channel::dial(dialled.expect("connected"), &keys, "alpha", "beta"),
        Channel::accept(accepted.expect("accepted").0, &keys, "beta")
    );
    (dialled.expect("proved"), accepted.expect("proved"))
}

fn terms(node: &str, wanted: LinkKind, rdma: Arc<FakeRdma>) -> Terms {
    let peer = if node == "alpha" { "beta" } else { "alpha" };
    let local = [127, 0, 0, 1].into();
    let listeners = Arc::new(Semaphore::new(LISTENERS_MAX));
    Terms { wanted, paused: None, local, node: node.into(), peer: peer.into(), rdma, listeners }
}

fn hello(node: &str) -> Hello {
    let settings = VolumeSettings {
        config: "pair.toml".into(),
        volume: "db".into(),
        node: node.into(),
        peer: "other".into(),
        configured_primary: true,
        on_peer_loss: OnPeerLoss::Continue,
        ack: AckLevel::Memory,
        peer_timeout: Duration::from_secs(5),
    };
    let superblock = Superblock::fresh("db", node, 1 << 20, true);
    let found = Found { superblock, dirty: false, boot: [1; 16] };
    VolumeController::new(settings, found, Box::new(|| 7)).hello(1 << 20, &[])
}

/// What one side came to, in a word and a sentence.
fn outcome(met: Result<Met, NoLink>) -> (&'static str, String) {
    match met {
        Ok(Met { carrier: Carrier::Rdma(_), .. }) => ("rdma", String::new()),
        Ok(Met { carrier: Carrier::Tcp { why, tried }, .. }) => {
            (if tried { "fallback" } else { "tcp" }, why.unwrap_or_default())
        }
        Err(error) => ("none", error.to_string()),
    }
}

/// A whole conversation between alpha, who dials, and beta.
async fn meet(alpha: &Terms, beta: &Terms) -> [(&'static str, String); 2] {
    let (mut dialled, mut accepted) = connection().await;
    let there = async {
        let Ok(Message::Hello(theirs)) = listen(&mut accepted).await else { panic!("no hello") };
        let met = answer(&mut accepted, hello("beta"), theirs, beta).await;
        (met, accepted)
    };
    let (here, (there, _accepted)) = tokio::join!(greet(&mut dialled, hello("alpha"), alpha), there);
    [outcome(here), outcome(there)]
}

async fn with_scripts(wanted: [LinkKind; 2], alpha: Script, beta: Script) -> [(&'static str, String); 2] {
    let fabric = Fabric::default();
    let alpha = terms("alpha", wanted[0], fabric.node(alpha));
    let beta = terms("beta", wanted[1], fabric.node(beta));
    meet(&alpha, &beta).await
}

const WANTED: [LinkKind; 3] = [LinkKind::Rdma, LinkKind::Tcp, LinkKind::Auto];

#[tokio::test]
async fn every_configuration_and_ability_comes_to_the_same_link_on_both_sides() {
    for wanted in WANTED.into_iter().flat_map(|mine| WANTED.map(|theirs| [mine, theirs])) {
        for able in [[true, true], [true, false], [false, true], [false, false]] {
            let [alpha, beta] =
                able.map(|able| Script { able: (!able).then_some("no device"), ..Script::default() });
            let outcomes = with_scripts(wanted, alpha, beta).await;
            let only = wanted.contains(&LinkKind::Rdma);
            let expected = match wanted {
                [LinkKind::Tcp, LinkKind::Rdma] | [LinkKind::Rdma, LinkKind::Tcp] => "none",
                _ if wanted.contains(&LinkKind::Tcp) => "tcp",
                _ if able == [true, true] => "rdma",
                _ if only => "none",
                _ => "tcp",
            };
            for (side, (found, text)) in outcomes.iter().enumerate() {
                assert_eq!(*found, expected, "{wanted:?} {able:?} {side}: {text}");
                assert_eq!(
                    text.is_empty(),
                    expected == "rdma" || (expected == "tcp" && wanted[side] == LinkKind::Tcp)
                );
            }
        }
    }
}

#[tokio::test]
async fn rdma_that_fails_falls_back_to_tcp_where_that_is_allowed() {
    use LinkKind::{Auto, Rdma};
    let unreachable = || Script { dial: Some("no route"), ..Script::default() };
    let [here, there] = with_scripts([Auto, Auto], unreachable(), Script::default()).await;
    assert_eq!(here, ("fallback", "alpha could not connect by RDMA: no route".to_owned()));
    assert_eq!(there, here, "the peer is told the reason");
    for wanted in [[Rdma, Auto], [Auto, Rdma], [Rdma, Rdma]] {
        let [here, there] = with_scripts(wanted, unreachable(), Script::default()).await;
        assert_eq!(here, ("none", "alpha could not connect by RDMA: no route".to_owned()));
        assert_eq!(there, ("none", "alpha could not connect by RDMA: no route".to_owned()));
    }
}

#[tokio::test]
async fn an_acceptor_that_cannot_listen_says_so_in_its_hello() {
    use LinkKind::{Auto, Rdma};
    let deaf = || Script { listen: Some("no port is up"), ..Script::default() };
    let [here, there] = with_scripts([Auto, Auto], Script::default(), deaf()).await;
    assert_eq!(here, ("tcp", "beta has no RDMA: no port is up".to_owned()));
    assert_eq!(there, here);
    let [here, there] = with_scripts([Rdma, Auto], Script::default(), deaf()).await;
    let text = "alpha has link = \"rdma\" and nothing else, and beta has no RDMA: no port is up";
    assert_eq!([here, there], [("none", text.to_owned()), ("none", text.to_owned())]);
}

#[tokio::test]
async fn a_connection_that_only_the_dialer_believes_in_ends_the_conversation() {
    let script = Script { accept: Some("the queue pair broke"), ..Script::default() };
    let [here, there] = with_scripts([LinkKind::Auto; 2], Script::default(), script).await;
    assert_eq!(here.0, "rdma", "it waits for the acceptor's ready then, which does not come");
    assert_eq!(there, ("none", "beta was not connected by RDMA: the queue pair broke".to_owned()));
}

#[tokio::test]
async fn a_pause_keeps_rdma_out_of_the_conversation() {
    let fabric = Fabric::default();
    let mut alpha = terms("alpha", LinkKind::Auto, fabric.node(Script::default()));
    let beta = terms("beta", LinkKind::Auto, fabric.node(Script::default()));
    alpha.paused = Some("no route".into());
    let outcomes = meet(&alpha, &beta).await;
    assert_eq!(outcomes, [(); 2].map(|()| ("tcp", "alpha has no RDMA: no route".to_owned())));
    assert_eq!(fabric.listening(), 0);
    alpha.paused = None;
    assert_eq!(meet(&alpha, &beta).await.map(|(kind, _)| kind), ["rdma"; 2]);
}

#[tokio::test]
async fn each_connection_has_another_secret_and_a_wrong_one_is_turned_away() {
    let fabric = Fabric::default();
    let beta = terms("beta", LinkKind::Auto, fabric.node(Script::default()));
    let alpha = terms("alpha", LinkKind::Auto, fabric.node(Script::default()));
    let [(one_dialled, one_accepted), (_, other_accepted)] = [connection().await, connection().await];
    let secret = link_secret(&one_accepted);
    assert!(secret == link_secret(&one_dialled), "both ends know it");
    let (first, offer) = beta.listen(secret.clone()).await.expect("listens");
    let (_second, other) = beta.listen(link_secret(&other_accepted)).await.expect("listens");
    assert_ne!(offer.address, other.address);
    let stolen = alpha.dial(offer.clone(), link_secret(&other_accepted)).await;
    assert_eq!(stolen.err().as_deref(), Some("turned away"));
    let accepting = accept(first);
    assert!(alpha.dial(offer, secret.clone()).await.is_ok());
    assert_eq!(format!("{secret:?}"), "Secret(..)");
    assert!(accepted(accepting, &beta).await.is_ok());
}

/// Plays a dialer by hand against [`answer`], after a hello with both kinds.
async fn answered_with(wanted: LinkKind, message: Message) -> (&'static str, String) {
    let (mut dialled, mut accepted) = connection().await;
    let fabric = Fabric::default();
    let beta = terms("beta", wanted, fabric.node(Script::default()));
    let mut theirs = hello("alpha");
    theirs.set_voice(Voice::new(LinkKind::Auto, Ok(())));
    let hand = async {
        assert!(matches!(listen(&mut dialled).await, Ok(Message::Hello(hello)) if hello.rdma.is_some()));
        say(&mut dialled, &message).await.expect("said");
    };
    let (met, ()) = tokio::join!(answer(&mut accepted, hello("beta"), Box::new(theirs), &beta), hand);
    outcome(met)
}

#[tokio::test]
async fn a_dialer_that_says_what_does_not_belong_there_is_named() {
    let link = |kind| Message::Link(Settled { kind, why: None });
    let (kind, text) = answered_with(LinkKind::Auto, Message::Hello(Box::new(hello("alpha")))).await;
    assert_eq!(kind, "none");
    assert!(text.contains("expected what became of the RDMA offer, got a hello"), "{text}");
    let (kind, text) = answered_with(LinkKind::Rdma, link(Kind::Tcp)).await;
    assert_eq!((kind, text.as_str()), ("none", "beta has link = \"rdma\" and nothing else"));
    assert_eq!(answered_with(LinkKind::Auto, link(Kind::Tcp)).await.0, "fallback");
    // It promises a connection that it never made.
    let (kind, text) = answered_with(LinkKind::Auto, link(Kind::Rdma)).await;
    assert_eq!((kind, text.as_str()), ("none", "beta was not connected by RDMA: nobody connected"));
}

#[tokio::test]
async fn an_acceptor_of_an_older_release_gets_tcp_and_no_word_it_does_not_know() {
    let (mut dialled, mut accepted) = connection().await;
    let alpha = terms("alpha", LinkKind::Auto, Fabric::default().node(Script::default()));
    let hand = async {
        let heard = listen(&mut accepted).await;
        let Ok(Message::Hello(theirs)) = heard else { panic!("no hello") };
        assert_eq!(theirs.links, ["rdma", "tcp"]);
        let mut old = hello("beta");
        old.links = vec!["tcp".into()];
        say(&mut accepted, &Message::Hello(Box::new(old))).await.expect("said");
        accepted
    };
    let (met, mut accepted) = tokio::join!(greet(&mut dialled, hello("alpha"), &alpha), hand);
    assert_eq!(outcome(met).0, "tcp");
    drop(dialled);
    assert!(matches!(listen(&mut accepted).await, Err(HelloError::Secure(_))), "nothing more was said");
}

#[tokio::test]
async fn an_acceptor_that_has_rdma_and_offers_no_place_is_named() {
    let (mut dialled, mut accepted) = connection().await;
    let alpha = terms("alpha", LinkKind::Auto, Fabric::default().node(Script::default()));
    let hand = async {
        let _ = listen(&mut accepted).await;
        let mut odd = hello("beta");
        odd.set_voice(Voice::new(LinkKind::Auto, Ok(())));
        say(&mut accepted, &Message::Hello(Box::new(odd))).await.expect("said");
    };
    let (met, ()) = tokio::join!(greet(&mut dialled, hello("alpha"), &alpha), hand);
    assert!(outcome(met).1.contains("where its RDMA listens"));
}

/// Waits until so many are listening.
async fn listening(fabric: &Fabric, count: usize) {
    let patience = Instant::now() + Duration::from_secs(2);
    while fabric.listening() != count {
        assert!(Instant::now() < patience, "{} listen", fabric.listening());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn strangers_hellos_hold_two_listeners_as_long_as_they_stay() {
    let fabric = Fabric::default();
    let alpha = terms("alpha", LinkKind::Auto, fabric.node(Script::default()));
    let beta = terms("beta", LinkKind::Auto, fabric.node(Script::default()));
    // They say hello, get an offer, and say nothing more.
    let mut strangers = Vec::new();
    for _ in 0..LISTENERS_MAX {
        let (mut dialled, mut accepted) = connection().await;
        let mut theirs = hello("alpha");
        theirs.set_voice(Voice::new(LinkKind::Auto, Ok(())));
        let terms = beta.clone();
        let answering = tokio::spawn(async move {
            outcome(answer(&mut accepted, hello("beta"), Box::new(theirs), &terms).await)
        });
        assert!(matches!(listen(&mut dialled).await, Ok(Message::Hello(hello)) if hello.rdma.is_some()));
        strangers.push((dialled, answering));
    }
    assert_eq!(fabric.listening(), LISTENERS_MAX);
    let [here, there] = meet(&alpha, &beta).await;
    assert_eq!(here.0, "tcp");
    assert!(here.1.contains("all 2 RDMA listeners of the volume"), "{}", here.1);
    assert_eq!(there, here);
    // One that goes takes its listener along at once, and the peer comes in.
    let (stranger, answering) = strangers.pop().expect("two");
    drop(stranger);
    assert_eq!(answering.await.expect("answered").0, "none");
    listening(&fabric, LISTENERS_MAX - 1).await;
    assert_eq!(meet(&alpha, &beta).await.map(|(kind, _)| kind), ["rdma"; 2]);
}

#[tokio::test]
async fn a_conversation_that_ends_ends_its_listener() {
    let fabric = Fabric::default();
    let beta = terms("beta", LinkKind::Auto, fabric.node(Script::default()));
    let mut theirs = hello("alpha");
    theirs.set_voice(Voice::new(LinkKind::Auto, Ok(())));
    // The dialer could not connect, says so, and both go on over TCP.
    let (mut dialled, mut accepted) = connection().await;
    let hand = async {
        listen(&mut dialled).await.expect("a hello");
        say(&mut dialled, &Message::Link(Settled { kind: Kind::Tcp, why: None })).await.expect("said");
    };
    let answered = answer(&mut accepted, hello("beta"), Box::new(theirs), &beta);
    let (met, ()) = tokio::join!(answered, hand);
    assert_eq!(outcome(met).0, "fallback");
    listening(&fabric, 0).await;
    assert_eq!(beta.listeners.available_permits(), LISTENERS_MAX);
}

#[tokio::test]
async fn a_ring_that_is_being_made_is_waited_for_on_either_side() {
    use LinkKind::{Auto, Rdma};
    for (wanted, looks) in [([Auto; 2], [50, 0]), ([Rdma; 2], [0, 50]), ([Auto, Rdma], [20, 80])] {
        let [alpha, beta] = looks.map(|looks| Script { ring: RingScript::After(looks), ..Script::default() });
        let outcomes = with_scripts(wanted, alpha, beta).await;
        assert_eq!(outcomes.map(|(kind, _)| kind), ["rdma"; 2]);
    }
}

#[tokio::test]
async fn a_ring_that_takes_too_long_is_promised_to_nobody() {
    use LinkKind::{Auto, Rdma};
    let never = || Script { ring: RingScript::Never, ..Script::default() };
    let began = Instant::now();
    let [here, there] = with_scripts([Auto; 2], Script::default(), never()).await;
    let text = "beta has no RDMA: its ring is still being made (61 %), and it is tried again";
    assert_eq!([here, there], [("tcp", text.to_owned()), ("tcp", text.to_owned())]);
    assert!((RING_WAIT_AUTO..RING_WAIT_RDMA).contains(&began.elapsed()), "{:?}", began.elapsed());
    // Within the time that the peer waits for each message.
    let [here, there] = with_scripts([Rdma; 2], never(), Script::default()).await;
    let text = "beta has link = \"rdma\" and nothing else, and alpha has no RDMA: its ring is still being made (61 %), and \
                it is tried again";
    assert_eq!([here, there], [("none", text.to_owned()), ("none", text.to_owned())]);
}

#[tokio::test]
async fn a_ring_that_cannot_be_made_is_a_reason_for_tcp() {
    let script = Script { ring: RingScript::Fails("no memory for a ring"), ..Script::default() };
    let outcomes = with_scripts([LinkKind::Auto; 2], script, Script::default()).await;
    assert_eq!(outcomes, [(); 2].map(|()| ("tcp", "alpha has no RDMA: no memory for a ring".to_owned())));
}

#[tokio::test]
async fn nobody_waits_for_a_ring_that_the_peer_has_no_use_for() {
    let began = Instant::now();
    let never = Script { ring: RingScript::Never, ..Script::default() };
    let outcomes = with_scripts([LinkKind::Tcp, LinkKind::Auto], Script::default(), never).await;
    assert_eq!(outcomes.map(|(kind, _)| kind), ["tcp"; 2]);
    assert!(began.elapsed() < RING_WAIT_AUTO / 2, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_that_nobody_wants_is_closed_by_another_thread() {
    struct Tell(std::sync::mpsc::Sender<std::thread::ThreadId>);
    impl Drop for Tell {
        fn drop(&mut self) {
            self.0.send(std::thread::current().id()).expect("the test waits");
        }
    }
    let (sender, closed_by) = std::sync::mpsc::channel();
    let tell = Tell(sender);
    drop(Prepared::new(move |_| {
        drop(tell);
        Err(std::io::ErrorKind::Unsupported.into())
    }));
    let thread = closed_by.recv_timeout(Duration::from_secs(60)).expect("closed");
    assert_ne!(thread, std::thread::current().id());
}
