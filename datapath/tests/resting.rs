//! What a turn of the reactor costs grows with the volumes in use, and not with those that it has.

use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::disk::record::Record;
use costandby_datapath::reactor::command::{Before, Command, Direction, VolumeSpec};
use costandby_datapath::reactor::{Reactor, ReactorConfig};
use costandby_datapath::transport::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot};
use costandby_datapath::units::{AckLevel, Epoch, OnPeerLoss, PollMode, Token};
use costandby_datapath::wire::Header;
use costandby_ffi::mapping::Span;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
const VOLUMES: usize = 40;

/// What was asked of a link.
#[derive(Default)]
struct Asked {
    polls: AtomicU64,
    sends: AtomicU64,
}

/// A link that counts, whose peer says nothing but bytes that wake.
struct Counting {
    socket: UnixStream,
    heard: u64,
    asked: Arc<Asked>,
}

impl Link for Counting {
    fn claim(&mut self, _: usize) -> Option<Permit> {
        None
    }

    fn post(&mut self, _: Permit, _: Header, _: Option<Span>, _: Token) {
        panic!("nothing was claimed");
    }

    fn send(&mut self, _: Header) -> Result<(), NoCredit> {
        self.asked.sends.fetch_add(1, Relaxed);
        Ok(())
    }

    fn kick(&mut self) {}

    fn poll(&mut self, _: &mut Vec<LinkEvent>) -> bool {
        self.asked.polls.fetch_add(1, Relaxed);
        self.heard += self.socket.read(&mut [0; 16]).unwrap_or(0) as u64;
        false
    }

    fn has_backlog(&self) -> bool {
        false
    }

    fn received_bytes(&self) -> u64 {
        self.heard
    }

    fn release(&mut self, _: Slot) {
        panic!("nothing arrived");
    }

    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)> {
        Some((self.socket.as_fd(), Interest { readable: true, writable: false }))
    }

    fn close(&mut self, _: DownReason) {}

    fn name(&self) -> &'static str {
        "tcp"
    }
}

fn spec(number: usize) -> VolumeSpec {
    VolumeSpec {
        name: format!("v{number}"),
        disk: DiskImage::memory("test", SIZE).expect("memory"),
        ack: AckLevel::Memory,
        on_peer_loss: OnPeerLoss::Freeze,
        checksum_first: false,
        record: Record::in_memory(SIZE),
    }
}

#[test]
fn links_of_volumes_that_nobody_uses_are_not_asked_each_turn_and_wake_with_their_peer() {
    let (sender, _events) = crossbeam_channel::unbounded();
    let peer_timeout = Duration::from_secs(60);
    let config = ReactorConfig { poll: PollMode::Event, peer_timeout, nbd_listeners: Vec::new() };
    let specs = (0..VOLUMES).map(spec).collect();
    let (mut reactor, handle) = Reactor::new(config, specs, sender).expect("starts");
    let (mut peers, mut asked) = (Vec::new(), Vec::new());
    for volume in 0..VOLUMES {
        let (socket, peer) = UnixStream::pair().expect("sockets");
        socket.set_nonblocking(true).expect("a socket");
        peers.push(peer);
        asked.push(Arc::<Asked>::default());
        let link = Box::new(Counting { socket, heard: 0, asked: Arc::clone(&asked[volume]) });
        let direction = Direction::Target { resync: false };
        handle.send(Command::Session { volume, before: Before::Unknown, link, direction, epoch: Epoch(1) });
    }
    // But for the one that is in use.
    let polls = || asked[1..].iter().map(|asked| asked.polls.load(Relaxed)).sum::<u64>();
    let settled = Instant::now() + Duration::from_millis(50);
    while Instant::now() < settled {
        reactor.turn();
    }

    // One volume is in use.
    let before = polls();
    for turn in 0..1000 {
        handle.send(Command::Refusal { volume: 0, text: turn.to_string() });
        assert!(reactor.turn(), "there is a command each turn");
    }
    let idle = polls() - before;
    assert!(idle <= 20 * VOLUMES as u64, "{idle} polls of {VOLUMES} idle links in 1000 turns");

    // A peer says something to another one, in the midst of that.
    let before = asked[7].polls.load(Relaxed);
    peers[7].write_all(&[1]).expect("a living link");
    for turn in 0..20 {
        handle.send(Command::Refusal { volume: 0, text: turn.to_string() });
        reactor.turn();
    }
    assert!(asked[7].polls.load(Relaxed) > before, "its peer wakes it");

    // And so does control.
    let before = asked[9].sends.load(Relaxed);
    handle.send(Command::SendPeer { volume: 9, code: 1, arg: 2 });
    reactor.turn();
    assert!(asked[9].sends.load(Relaxed) > before, "what control has for a peer goes out at once");
}
