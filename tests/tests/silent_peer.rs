//! A peer that holds the key and stops talking, at each step of a handshake, whoever dials: it is left within bounded time, holds
//! no client's write for longer than a peer that died, and keeps nothing of the node.

use costandby_control::generation::ServingRole;
use costandby_control::hello::{Hello, Message, Ready, encode};
use costandby_tests::liar::{Answer, Liar, be_silent, hear, say};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::{scaled, wait_for};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SIZE: u64 = 8 << 20;

/// As in the pair's configuration.
const PEER_TIMEOUT: Duration = Duration::from_secs(1);

/// How far a peer comes before it is silent.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Step {
    Proved,
    Greeted,
    Ready,
}

const STEPS: [Step; 3] = [Step::Proved, Step::Greeted, Step::Ready];

fn pair(primary: usize) -> Pair {
    let mut volume = VolumeSettings::new("db", SIZE >> 20);
    volume.primary = primary;
    Pair::start(Settings::new(&[volume]))
}

/// A client that writes one block after the other, and how long the slowest took.
struct Writer {
    ends: Arc<AtomicBool>,
    slowest: Arc<Mutex<Duration>>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(pair: &Pair, node: usize) -> Self {
        let mut client = pair.client(node, "db");
        let (ends, slowest) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Duration::ZERO)));
        let (told, longest) = (Arc::clone(&ends), Arc::clone(&slowest));
        let thread = std::thread::spawn(move || {
            for at in (0..SIZE / 4096).cycle() {
                let began = Instant::now();
                client.write(at * 4096, &[7; 4096], false).expect("a write");
                let mut longest = longest.lock().expect("nobody panics with it");
                *longest = began.elapsed().max(*longest);
                drop(longest);
                if told.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { ends, slowest, thread }
    }

    fn finish(self) -> Duration {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().expect("it wrote");
        *self.slowest.lock().expect("nobody panics with it")
    }
}

/// What the honest peer of a node that says `theirs` might say, as its standby.
fn honest(node: &str, theirs: &Hello) -> Hello {
    let mut hello = theirs.clone();
    let generations = &mut hello.view.generations;
    if generations.base.0 != 0 {
        generations.current = std::mem::take(&mut generations.base);
    }
    node.clone_into(&mut hello.node);
    hello.nonce ^= 1;
    hello.incarnation ^= 1;
    hello.rdma = None;
    hello.view.role = ServingRole::Standby;
    hello.view.was_primary = false;
    // It has writes on their way.
    hello.view.was_primary_unclean = false;
    hello.view.configured_primary = false;
    hello.view.dirty = false;
    hello.view.recall = None;
    hello
}

/// The conversation as the node's peer up to `step`, and then silence. How long the node bore that; `None` where it would have no
/// session at all.
async fn until(
    step: Step,
    node: &'static str,
    known: &Hello,
    channel: &mut costandby_control::secure::channel::Channel,
) -> Option<Duration> {
    if step == Step::Proved {
        return Some(be_silent(channel).await);
    }
    say(channel, &encode(&Message::Hello(Box::new(honest(node, known))))).await.ok()?;
    let mut ready = None;
    while ready.is_none() {
        let Answer::Said(message) = hear(channel).await else { return None };
        match *message {
            Message::Hello(_) => {}
            Message::Ready(said) => ready = Some(said),
            _ => return None,
        }
    }
    if step == Step::Ready {
        let Ready { agreement, lineage } = ready?;
        let ready = Ready { agreement: agreement.mirrored(), lineage };
        say(channel, &encode(&Message::Ready(ready))).await.ok()?;
    }
    Some(be_silent(channel).await)
}

/// The node's hello, said to a peer whose own it refuses.
fn hello_of(liar: &Liar) -> Hello {
    let said = liar.talk(async |channel| {
        let refused = liar.fresh_hello("db", 2 * SIZE);
        say(channel, &encode(&Message::Hello(Box::new(refused)))).await.expect("sent");
        hear(channel).await
    });
    match said.expect("it holds the key") {
        Answer::Said(message) => match *message {
            Message::Hello(hello) => *hello,
            other => panic!("{other:?}"),
        },
        Answer::Closed(why) => panic!("{why}"),
    }
}

fn threads(pair: &Pair, node: usize) -> usize {
    let tasks = format!("/proc/{}/task", pair.pid(node));
    std::fs::read_dir(tasks).expect("it runs").count()
}

#[test]
fn a_silent_peer_that_dials_holds_no_write_for_longer_than_a_dead_one() {
    for step in STEPS {
        let mut pair = pair(BETA);
        let liar = Liar {
            node: NODES[ALPHA],
            peer: NODES[BETA],
            target: pair.peer_address(BETA),
            keys: pair.keys(BETA),
        };
        let writer = Writer::start(&pair, BETA);
        std::thread::sleep(Duration::from_millis(300));
        // In this moment writes wait for a peer that may be back.
        pair.kill(ALPHA);
        let known = hello_of(&liar);
        let lines = pair.log(BETA).lines().count();
        let began = Instant::now();
        let mut borne = Vec::new();
        while began.elapsed() < scaled(Duration::from_secs(8)) {
            let said = liar.talk(async |channel| until(step, NODES[ALPHA], &known, channel).await);
            if let Some(long) = said.expect("it holds the key") {
                borne.push(long);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let slowest = writer.finish();
        assert!(slowest < scaled(PEER_TIMEOUT * 2), "{step:?}: a write took {slowest:?}");
        assert!(
            !borne.is_empty() && borne.iter().all(|long| *long < scaled(Duration::from_secs(6))),
            "{borne:?}"
        );
        let said = pair.log(BETA).lines().count() - lines;
        assert!(said < 40, "{step:?}: {said} lines: {}", pair.log(BETA));
        assert!(threads(&pair, BETA) < 40, "{step:?}: {} threads", threads(&pair, BETA));
        pair.up(ALPHA);
        pair.wait_in_sync("db");
        pair.settle_and_compare("db");
    }
}

#[test]
fn a_silent_peer_that_is_dialled_holds_no_write_for_longer_than_a_dead_one() {
    for step in STEPS {
        let mut pair = pair(ALPHA);
        let liar = Liar {
            node: NODES[BETA],
            peer: NODES[ALPHA],
            target: pair.peer_address(ALPHA),
            keys: pair.keys(ALPHA),
        };
        let writer = Writer::start(&pair, ALPHA);
        std::thread::sleep(Duration::from_millis(300));
        pair.kill(BETA);
        let listener =
            wait_for("the address is free", LIMIT, || TcpListener::bind(pair.peer_address(BETA)).ok());
        let lines = pair.log(ALPHA).lines().count();
        let (began, mut silences) = (Instant::now(), 0);
        while began.elapsed() < scaled(Duration::from_secs(8)) {
            let said = liar.answer(&listener, async |channel| {
                if step == Step::Proved {
                    return Some(be_silent(channel).await);
                }
                // Whoever dials says its hello first.
                let Answer::Said(message) = hear(channel).await else { return None };
                let Message::Hello(known) = *message else { return None };
                until(step, NODES[BETA], &known, channel).await
            });
            silences += usize::from(said.is_ok_and(|long| long.is_some()));
        }
        drop(listener);
        let slowest = writer.finish();
        assert!(silences > 0, "{step:?}");
        assert!(slowest < scaled(PEER_TIMEOUT * 2), "{step:?}: a write took {slowest:?}");
        let said = pair.log(ALPHA).lines().count() - lines;
        assert!(said < 40, "{step:?}: {said} lines: {}", pair.log(ALPHA));
        assert!(threads(&pair, ALPHA) < 40, "{step:?}: {} threads", threads(&pair, ALPHA));
        pair.up(BETA);
        pair.wait_in_sync("db");
        pair.settle_and_compare("db");
    }
}
