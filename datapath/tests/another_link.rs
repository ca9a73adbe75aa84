//! Two whole reactors, each on its thread, whose session goes on over one link after another while a client writes: every
//! wake-up must come from the link of the moment, in every way of waiting, no write may be lost, and none waits long.

use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::front::queue::{Operation, OperationKind, QueueClient, queue};
use costandby_datapath::limits::RING_LEN;
use costandby_datapath::reactor::command::{Before, Command, Direction, Event, Parted, VolumeSpec};
use costandby_datapath::reactor::{Reactor, ReactorConfig, ReactorHandle};
use costandby_datapath::transport::tcp::TcpLink;
use costandby_datapath::units::{AckLevel, ByteRange, Epoch, OnPeerLoss, PollMode};
use crossbeam_channel::Receiver;
use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;
const BLOCK: u64 = 4096;
const DEPTH: usize = 16;
const PATIENCE: Duration = Duration::from_secs(120);

fn links() -> [Box<TcpLink>; 2] {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let here = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
    let (there, _) = listener.accept().expect("accept");
    let ring_len = usize::try_from(RING_LEN).expect("64-bit");
    [here, there].map(|stream| {
        stream.set_nonblocking(true).expect("a socket");
        Box::new(TcpLink::new(stream, ring_len, ring_len).expect("link"))
    })
}

struct Node {
    disk: Arc<DiskImage>,
    handle: ReactorHandle,
    events: Receiver<Event>,
    thread: JoinHandle<()>,
}

fn node(poll: PollMode, direction: Direction, link: Box<TcpLink>) -> Node {
    let disk = DiskImage::memory("test", SIZE).expect("memory");
    let spec = VolumeSpec {
        checksum_first: false,
        name: "v".into(),
        disk: Arc::clone(&disk),
        ack: AckLevel::Memory,
        on_peer_loss: OnPeerLoss::Freeze,
        record: costandby_datapath::disk::record::Record::in_memory(SIZE),
    };
    let (sender, events) = crossbeam_channel::unbounded();
    // Long, because the machine that runs the tests may stand still for a while.
    let config = ReactorConfig { poll, peer_timeout: Duration::from_secs(10), nbd_listeners: Vec::new() };
    let (reactor, handle) = Reactor::new(config, vec![spec], sender).expect("starts");
    handle.send(Command::Session { volume: 0, before: Before::Unknown, link, direction, epoch: Epoch(1) });
    let thread = std::thread::spawn(move || reactor.run());
    Node { disk, handle, events, thread }
}

struct Client {
    queue: QueueClient,
    number: u64,
    open: HashMap<u64, Instant>,
    slowest: Duration,
    done: usize,
}

impl Client {
    /// Keeps the queue full, each write to a block of its own.
    fn submit(&mut self) {
        while self.open.len() < DEPTH {
            self.number += 1;
            let byte = u8::try_from(self.number % 251).expect("a byte");
            let operation = Operation {
                tag: self.number,
                kind: OperationKind::Write,
                offset: self.number % (SIZE / BLOCK) * BLOCK,
                len: BLOCK,
                fua: false,
                buffer: vec![byte; usize::try_from(BLOCK).expect("64-bit")],
            };
            self.queue.submit(operation).expect("room");
            self.open.insert(self.number, Instant::now());
        }
    }

    fn take(&mut self) {
        while let Some(completion) = self.queue.wait(Duration::from_millis(1)) {
            let began = self.open.remove(&completion.tag).expect("answered once");
            assert_eq!(completion.result, Ok(()));
            self.slowest = self.slowest.max(began.elapsed());
            self.done += 1;
            if self.open.len() < DEPTH / 2 {
                return;
            }
        }
    }
}

/// Waits for the end of the session's link at a node, and gives what it knows of the session.
fn ended(node: &Node) -> Parted {
    loop {
        match node.events.recv_timeout(PATIENCE).expect("the link ends") {
            Event::LinkDown { volume: 0, parted, .. } => return parted.expect("the session may go on"),
            Event::Settled { volume: 0 } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn run(poll: PollMode, rounds: u64) {
    let [here, there] = links();
    let b = node(poll, Direction::Target { resync: false }, there);
    let a = node(poll, Direction::Source { resync: false }, here);
    let (client, server) = queue(DEPTH, a.handle.waker()).expect("queue");
    a.handle.send(Command::Serve { volume: 0 });
    a.handle.send(Command::Attach { volume: 0, queue: server });
    let mut client =
        Client { queue: client, number: 0, open: HashMap::new(), slowest: Duration::ZERO, done: 0 };
    let mut longest = Duration::ZERO;
    for round in 1..=rounds {
        // The odd ones are under load all along, the even ones only until here.
        let until = client.done + 20;
        while client.done < until {
            client.submit();
            client.take();
        }
        while round % 2 == 0 && !client.open.is_empty() {
            client.take();
        }
        let closes = if round % 3 == 0 { &a } else { &b };
        let next = links();
        let closed = Instant::now();
        closes.handle.send(Command::CloseLink { volume: 0, reason: "another link is there" });
        let (source, target) = (ended(&a), ended(&b));
        let before = Before::GoesOn { applied: target.applied, map_told: source.map_told };
        let directions = [Direction::Source { resync: false }, Direction::Target { resync: false }];
        for ((node, link), direction) in [&a, &b].into_iter().zip(next).zip(directions) {
            node.handle.send(Command::Session { volume: 0, before, link, direction, epoch: Epoch(1) });
        }
        let done = client.done;
        while client.done == done {
            client.submit();
            client.take();
            assert!(closed.elapsed() < PATIENCE, "nothing is answered after change {round}");
        }
        longest = longest.max(closed.elapsed());
    }
    let began = Instant::now();
    while !client.open.is_empty() {
        client.take();
        assert!(began.elapsed() < PATIENCE, "never answered: {:?}", client.open);
    }
    println!(
        "{poll:?}: {} writes, the slowest took {:?}; from a link's end to the next answer at most {longest:?}",
        client.done, client.slowest
    );
    let content = |node: &Node| {
        let mut bytes = vec![0; usize::try_from(SIZE).expect("64-bit")];
        node.disk.span(ByteRange::new(0, SIZE)).read_into(&mut bytes);
        bytes
    };
    assert!(content(&a) == content(&b), "the disks differ");
    for node in [a, b] {
        node.handle.send(Command::Shutdown);
        node.thread.join().expect("no panic");
    }
}

#[test]
fn event_mode_wakes_for_the_link_of_the_moment() {
    run(PollMode::Event, 40);
}

#[test]
fn adaptive_mode_wakes_for_the_link_of_the_moment() {
    run(PollMode::Adaptive, 40);
}

#[test]
fn busy_mode_looks_at_the_link_of_the_moment() {
    run(PollMode::Busy, 20);
}
