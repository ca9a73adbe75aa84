//! A session that changes its link: nothing is lost, doubled or reordered, whoever is told first and whatever dies.

use super::*;
use crate::limits::{SWITCH_HELD_MAX, SWITCH_OFFER_S_MAX, SWITCH_STUCK_S_MAX};
use crate::transport::fault::{FaultLink, Plan};
use crate::transport::rdma::fake::{self, Manner};
use crate::transport::tcp::TcpLink;
use crate::units::Seq;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

pub(super) type Ends = (Box<dyn Link>, Box<dyn Link>);

/// What a link is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Make {
    Loopback,
    Tcp,
    /// RDMA over memory, which completes late and in heaps.
    Rdma,
    /// Seldom looked at, at both ends.
    Slow,
}

impl Make {
    pub(super) fn ends(self) -> Ends {
        match self {
            Self::Loopback => {
                let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
                (Box::new(here), Box::new(there))
            }
            Self::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
                let here = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
                let (there, _) = listener.accept().expect("accept");
                let link = |stream| Box::new(TcpLink::new(stream, RING_LEN, RING_LEN).expect("link"));
                (link(here), link(there))
            }
            Self::Rdma => {
                let manner = Manner { seed: Some(11), ..Manner::default() };
                let (here, there) = fake::pair(RING_LEN, manner).expect("memory");
                (Box::new(here), Box::new(there))
            }
            Self::Slow => {
                let plan = Plan { poll_every: Some(7), ..Plan::default() };
                faulty(plan, plan)
            }
        }
    }
}

fn faulty(here: Plan, there: Plan) -> Ends {
    with_faults(loopback::pair(RING_LEN).expect("ring memory"), here, there)
}

fn with_faults<L: Link + 'static>((a, b): (L, L), here: Plan, there: Plan) -> Ends {
    (Box::new(FaultLink::new(a, here)), Box::new(FaultLink::new(b, there)))
}

const MAKES: [Make; 4] = [Make::Loopback, Make::Tcp, Make::Rdma, Make::Slow];

pub(super) fn is_down(event: &Event) -> bool {
    matches!(event, Event::LinkDown { .. })
}

fn is_switched(event: &Event) -> bool {
    matches!(event, Event::LinkSwitched { .. })
}

fn is_failed(event: &Event) -> bool {
    matches!(event, Event::SwitchFailed { .. })
}

/// A pair under load: client writes, zeroes, trims and messages in both directions, each answered and heard in order.
struct Load {
    pair: Pair,
    slot: u32,
    open_max: usize,
    /// Writes that wait for their range.
    waiting: HashMap<u32, ByteRange>,
    said: [u64; 2],
    heard: [u64; 2],
}

impl Load {
    fn over(ends: Ends, resync: bool, open_max: usize) -> Self {
        let mut pair = Pair::new(AckLevel::Memory, OnPeerLoss::Continue);
        pair.attach(ends, resync);
        Self { pair, slot: 0, open_max, waiting: HashMap::new(), said: [0; 2], heard: [0; 2] }
    }

    /// `a` or `b`.
    fn node(&mut self, who: usize) -> &mut Node {
        if who == 0 { &mut self.pair.a } else { &mut self.pair.b }
    }

    fn open(&self) -> usize {
        self.pair.a.volume.requests.iter().flatten().count()
    }

    /// A request and a message each way if there is room, and a turn of both.
    fn step(&mut self) {
        if self.open() < self.open_max {
            self.request();
        }
        for (at, node) in [&mut self.pair.a, &mut self.pair.b].into_iter().enumerate() {
            if self.open_max > 0 && node.volume.has_link() && self.said[at] < self.heard[1 - at] + 5 {
                self.said[at] += 1;
                node.volume.send_peer(7, self.said[at]);
            }
        }
        self.pair.turn();
        for (slot, token) in std::mem::take(&mut self.pair.a.granted) {
            let range = self.waiting.remove(&slot).expect("waits");
            self.land(slot, token, range);
        }
        for (at, node) in [&mut self.pair.a, &mut self.pair.b].into_iter().enumerate() {
            node.events.retain(|event| {
                let Event::PeerMessage { code: 7, arg, .. } = event else { return true };
                self.heard[at] += 1;
                assert_eq!(*arg, self.heard[at], "a message was lost, doubled or overtaken");
                false
            });
        }
    }

    fn request(&mut self) {
        self.slot += 1;
        let slot = self.slot;
        let range = ByteRange::new(u64::from(slot) * 7919 % (SIZE - 9000), u64::from(slot) * 613 % 8999 + 1);
        let op = match slot % 16 {
            3 => Op::Change(Kind::Trim),
            7 => Op::Change(Kind::WriteZeroes),
            11 => Op::Flush,
            _ => Op::Change(Kind::Write),
        };
        match self.pair.a.begin(slot, op, range, slot % 32 == 5) {
            Begin::Go(token) if op == Op::Change(Kind::Write) => self.land(slot, token, range),
            Begin::Waits(_) if op == Op::Change(Kind::Write) => {
                self.waiting.insert(slot, range);
            }
            Begin::Go(_) | Begin::Waits(_) => {}
            other => panic!("{other:?}"),
        }
    }

    fn land(&mut self, slot: u32, token: Token, range: ByteRange) {
        self.pair.a.fill(range, u8::try_from(slot % 255 + 1).expect("a byte"));
        self.pair.a.volume.landed(token);
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| self.step());
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Pair) -> bool) {
        let began = Instant::now();
        while !done(&mut self.pair) {
            self.step();
            std::thread::yield_now();
            assert!(began.elapsed() < PATIENCE, "{what} never came: {:?}", self.pair.a.events);
        }
    }

    fn until_switched(&mut self, serial: u64, name: &str) {
        let (mut here, mut there) = (false, false);
        let is = |e: &Event| {
            assert!(!is_down(e) && !is_failed(e), "{e:?}");
            matches!(e, Event::LinkSwitched { serial: s, name: n, .. } if (*s, *n) == (serial, name))
        };
        self.until("the new link", |pair| {
            here |= pair.a.saw(is);
            there |= pair.b.saw(is);
            here && there
        });
        assert!(self.pair.a.volume.switch.is_none() && self.pair.b.volume.switch.is_none());
    }

    /// Everything asked for is answered once, on both disks, and nothing is left.
    fn finish(mut self) {
        self.open_max = 0;
        self.until("quiet", |pair| pair.a.volume.requests.iter().all(Option::is_none));
        for slot in 1..=self.slot {
            assert_eq!(self.pair.a.told(slot), [Ok(())], "request {slot}");
        }
        self.pair.assert_equal_and_clean();
        for node in [&self.pair.a, &self.pair.b] {
            assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 0);
        }
    }
}

impl Pair {
    pub(super) fn attach(&mut self, (here, there): Ends, resync: bool) {
        if resync {
            self.a.volume.mark_all(Box::new(|result| result.expect("marked")));
        }
        let now = Instant::now();
        self.a.volume.attach(here, Direction::Source { resync }, self.epoch, now);
        self.b.volume.attach(there, Direction::Target { resync }, self.epoch, now);
    }

    fn switch(&mut self, (here, there): Ends, serial: u64) {
        self.a.volume.switch_link(here, serial, Instant::now());
        self.b.volume.switch_link(there, serial, Instant::now());
    }
}

#[test]
fn every_kind_of_link_follows_every_other_under_load() {
    for (old, new) in MAKES.into_iter().flat_map(|old| MAKES.map(|new| (old, new))) {
        let ends = new.ends();
        let name = ends.0.name();
        let mut load = Load::over(old.ends(), false, 40);
        load.steps(100);
        load.pair.switch(ends, 1);
        load.until_switched(1, name);
        load.steps(100);
        load.finish();
    }
}

#[test]
fn a_hundred_changes_in_a_row_under_load() {
    let mut load = Load::over(Make::Tcp.ends(), false, 100);
    for serial in 1..=100 {
        let make = MAKES[usize::try_from(serial).expect("few") % MAKES.len()];
        let ends = make.ends();
        let name = ends.0.name();
        load.steps(usize::try_from(serial % 7).expect("few"));
        load.pair.switch(ends, serial);
        load.until_switched(serial, name);
    }
    load.finish();
}

#[test]
fn an_idle_session_changes_its_link_too() {
    for make in MAKES {
        let mut pair = Pair::in_sync(AckLevel::Memory);
        pair.switch(make.ends(), 5);
        let (mut here, mut there) = (false, false);
        pair.until("the new link", |pair| {
            here |= pair.a.saw(is_switched);
            there |= pair.b.saw(is_switched);
            here && there
        });
        pair.assert_equal_and_clean();
    }
}

#[test]
fn a_node_that_is_told_late_holds_nothing_up() {
    for late in 0..2 {
        for make in MAKES {
            let mut load = Load::over(Make::Loopback.ends(), false, 20);
            let (here, there) = make.ends();
            let name = here.name();
            let mut ends = [Some(here), Some(there)];
            for who in [1 - late, late] {
                let before = load.slot;
                load.until("many answers", |pair| pair.a.told.len() > before as usize + 200);
                load.node(who).volume.switch_link(ends[who].take().expect("once"), 3, Instant::now());
            }
            load.until_switched(3, name);
            load.steps(100);
            load.finish();
        }
    }
}

#[test]
fn a_copy_goes_on_over_the_new_link() {
    for (old, new) in [(Make::Slow, Make::Loopback), (Make::Tcp, Make::Rdma), (Make::Rdma, Make::Slow)] {
        let mut load = Load::over(old.ends(), true, 10);
        load.pair.a.fill(ByteRange::new(0, SIZE), 3);
        load.pair.b.fill(ByteRange::new(0, SIZE), 0xEE);
        load.pair.turn();
        load.pair.turn();
        assert!(load.pair.a.volume.resync.is_some());
        load.pair.switch(new.ends(), 1);
        let (mut copied, mut switched) = (0, 0);
        load.until("the copy and the new link", |pair| {
            copied += usize::from(pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })));
            switched += usize::from(pair.a.saw(is_switched)) + usize::from(pair.b.saw(is_switched));
            (copied, switched) == (1, 2)
        });
        load.pair.a.volume.peer_in_sync();
        load.finish();
    }
}

#[test]
fn a_peer_that_never_comes_costs_nothing_but_the_new_link() {
    for who in 0..2 {
        let mut load = Load::over(Make::Tcp.ends(), false, 20);
        let (here, there) = Make::Tcp.ends();
        let (told, untold) = if who == 0 { (here, there) } else { (there, here) };
        let began = Instant::now();
        load.node(who).volume.switch_link(told, 1, began);
        load.steps(50);
        // Frames that come in all the while do not lengthen the offer.
        let (limit, timeout) = (Duration::from_secs(SWITCH_OFFER_S_MAX), Duration::from_secs(9));
        load.node(who).volume.keep_alive(began + limit - Duration::from_millis(100), timeout);
        assert!(load.node(who).volume.switch.is_some());
        load.node(who).volume.keep_alive(began + limit, timeout);
        load.steps(1);
        assert!(load.node(who).saw(is_failed) && load.node(who).volume.switch.is_none());
        // The other is told now: the offer still lies on the link, and nobody is behind it any more.
        load.node(1 - who).volume.switch_link(untold, 1, Instant::now());
        let late = |pair: &mut Pair| if who == 0 { pair.b.saw(is_failed) } else { pair.a.saw(is_failed) };
        load.until("the late one's answer", late);
        load.steps(50);
        load.pair.switch(Make::Loopback.ends(), 2);
        load.until_switched(2, "loopback");
        load.finish();
    }
}

#[test]
fn a_second_change_is_refused_while_one_is_under_way_and_so_is_one_without_a_session() {
    let mut load = Load::over(Make::Slow.ends(), false, 20);
    load.steps(20);
    load.pair.switch(Make::Slow.ends(), 1);
    load.pair.switch(Make::Tcp.ends(), 2);
    for node in [&mut load.pair.a, &mut load.pair.b] {
        node.events.append(&mut node.volume.events);
        assert!(node.saw(|e| matches!(e, Event::SwitchFailed { serial: 2, .. })));
    }
    load.until_switched(1, "loopback");
    load.finish();
    let mut alone = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    alone.volume.switch_link(Make::Tcp.ends().0, 4, Instant::now());
    alone.turn();
    assert!(alone.saw(|e| matches!(e, Event::SwitchFailed { serial: 4, .. })));
}

/// Runs a change with these links until it is decided, then mends what broke. Returns whether the session lived.
fn killed(old: Ends, new: Ends, told_apart: usize) -> bool {
    let mut load = Load::over(old, false, 30);
    load.steps(3);
    let (here, there) = new;
    // An end that is gone by then has its hand-over dropped, which the tests of refusals are about.
    if load.pair.a.volume.has_link() {
        load.pair.a.volume.switch_link(here, 1, Instant::now());
    }
    load.steps(told_apart);
    if load.pair.b.volume.has_link() {
        load.pair.b.volume.switch_link(there, 1, Instant::now());
    }
    let (mut here, mut there) = (None, None);
    load.until("a decision", |pair| {
        for (node, seen) in [(&mut pair.a, &mut here), (&mut pair.b, &mut there)] {
            while let Some(at) = node.events.iter().position(|e| is_down(e) || is_failed(e) || is_switched(e))
            {
                let event = node.events.remove(at);
                // A change that came to its end, or to nothing, may be followed by the end of the session.
                assert!(
                    seen.is_none() || (is_down(&event) && !seen.as_ref().is_some_and(is_down)),
                    "{event:?} after {seen:?}"
                );
                *seen = Some(event);
            }
        }
        let down = here.as_ref().is_some_and(is_down);
        if down != there.as_ref().is_some_and(is_down) {
            return false;
        }
        here.is_some() && there.is_some() && here.as_ref().map(is_switched) == there.as_ref().map(is_switched)
    });
    let lived = load.pair.a.volume.has_link();
    assert_eq!(lived, load.pair.b.volume.has_link());
    load.open_max = 0;
    let mut copying = false;
    let began = Instant::now();
    let mut quiet = 0;
    while quiet < 30 {
        load.step();
        quiet = if copying || load.open() > 0 { 0 } else { quiet + 1 };
        assert!(began.elapsed() < PATIENCE, "never quiet: {:?}", load.pair.a.events);
        let nodes = [&load.pair.a, &load.pair.b];
        // A cut that comes later than the decision ends the session then.
        if nodes.iter().all(|node| !node.volume.has_link() && node.volume.down_deferred.is_none()) {
            assert!(nodes.iter().all(|node| node.volume.switch.is_none()));
            (load.said, load.heard) = ([0; 2], [0; 2]);
            quiet = 0;
            load.pair.a.volume.go_alone();
            load.pair.attach(Make::Loopback.ends(), true);
            copying = true;
        }
        if load.pair.a.saw(|e| matches!(e, Event::ResyncDone { .. })) {
            load.pair.a.volume.peer_in_sync();
            copying = false;
        }
    }
    load.finish();
    lived
}

#[test]
fn whichever_link_dies_at_whatever_frame_both_ends_agree_and_every_write_is_answered_once() {
    let (mut lived, mut died) = (0, 0);
    for (count, which) in (1..60).flat_map(|count| (0..16).map(move |which| (count, which))) {
        let plan = if which & 1 == 0 {
            Plan { cut_after_arrivals: Some(count), ..Plan::default() }
        } else {
            Plan { cut_after_frames: Some(count), ..Plan::default() }
        };
        let none = Plan::default();
        let (here, there) = if which & 2 == 0 { (plan, none) } else { (none, plan) };
        let broken = if which & 8 == 0 {
            faulty(here, there)
        } else {
            let manner = Manner { seed: Some(count), ..Manner::default() };
            with_faults(fake::pair(RING_LEN, manner).expect("memory"), here, there)
        };
        let whole = faulty(none, none);
        let (old, new) = if which & 4 == 0 { (broken, whole) } else { (whole, broken) };
        let told_apart = usize::try_from(count % 3).expect("few") * 4;
        *(if killed(old, new, told_apart) { &mut lived } else { &mut died }) += 1;
    }
    assert!(lived > 50 && died > 50, "{lived} lived, {died} died: the cuts missed the change");
}

/// A node whose peer is played by the test over an old and a new link, with the change begun.
fn with_raw_peer(direction: Direction) -> (Node, loopback::LoopbackLink, loopback::LoopbackLink) {
    let mut node = Node::new(AckLevel::Memory, OnPeerLoss::Continue);
    node.volume.serve();
    let (old, raw_old) = loopback::pair(RING_LEN).expect("ring memory");
    let (new, raw_new) = loopback::pair(RING_LEN).expect("ring memory");
    let now = Instant::now();
    node.volume.attach(Box::new(old), direction, Epoch(1), now);
    node.volume.switch_link(Box::new(new), 9, now);
    node.turn();
    (node, raw_old, raw_new)
}

fn step(number: u64) -> Header {
    let mut header = Header::new(Kind::Switch, Epoch(1));
    (header.seq, header.aux) = (Seq(number), 9);
    header
}

fn say(raw: &mut loopback::LoopbackLink, header: Header) {
    if header.kind.is_change() {
        let permit = raw.claim(header.payload_len()).expect("room");
        raw.post(permit, header, None, Token(header.seq.0));
    } else {
        raw.send(header).expect("credit");
    }
    raw.kick();
}

fn trim(seq: u64, range: ByteRange) -> Header {
    let mut header = Header::new(Kind::Trim, Epoch(1));
    (header.seq, header.range) = (Seq(seq), range);
    header
}

fn heard(raw: &mut loopback::LoopbackLink) -> (Vec<Header>, bool) {
    let mut events = Vec::new();
    while raw.poll(&mut events) {}
    let down = events.iter().any(|e| matches!(e, LinkEvent::Down(_)));
    let headers = events.into_iter().filter_map(|event| match event {
        LinkEvent::Arrived(Slot { header, .. }) | LinkEvent::Message(header) => Some(header),
        _ => None,
    });
    (headers.filter(|header| header.kind != Kind::KeepAlive).collect(), down)
}

#[test]
fn nothing_of_the_new_link_is_believed_before_the_last_of_the_old_one() {
    let (mut node, mut old, mut new) = with_raw_peer(Direction::Target { resync: false });
    node.fill(ByteRange::new(0, SIZE), 1);
    say(&mut new, step(1));
    say(&mut new, step(2));
    say(&mut new, trim(2, grains(2, 1)));
    (0..20).for_each(|_| node.turn());
    assert_eq!(node.volume.arrived.len(), 0);
    assert!(!node.volume.disk.span(grains(2, 1)).is_zero(), "applied before what was sent before it");
    let said: Vec<u64> = heard(&mut new).0.iter().map(|header| header.seq.0).collect();
    assert_eq!((said, heard(&mut old).0[0].seq.0), (vec![1, 2], 3));
    say(&mut old, trim(1, grains(1, 1)));
    say(&mut old, step(3));
    let zero = |node: &mut Node| node.volume.disk.span(grains(1, 2)).is_zero();
    let began = Instant::now();
    while !zero(&mut node) {
        node.turn();
        assert!(began.elapsed() < PATIENCE);
    }
    (0..20).for_each(|_| node.turn());
    assert!(!node.saw(is_switched) && !heard(&mut old).1, "closed before the peer was done with it");
    say(&mut new, step(4));
    (0..20).for_each(|_| node.turn());
    assert!(node.saw(is_switched) && heard(&mut old).1, "the old link is closed, and that is all");
    assert!(node.volume.has_link());
    node.assert_nothing_left();
}

#[test]
fn what_is_kept_back_is_bounded_and_comes_in_order_when_its_turn_has_come() {
    let (mut node, mut old, mut new) = with_raw_peer(Direction::Target { resync: false });
    say(&mut new, step(1));
    say(&mut new, step(2));
    let mut said = 0;
    for _ in 0..2 * SWITCH_HELD_MAX / 100 {
        for _ in 0..100 {
            let mut header = Header::new(Kind::Control, Epoch(1));
            (header.aux, header.seq) = (1, Seq(said + 1));
            said += u64::from(new.send(header).is_ok());
        }
        new.kick();
        (0..3).for_each(|_| node.turn());
    }
    let held = node.volume.switch.as_ref().expect("under way").held_len();
    assert!((SWITCH_HELD_MAX..SWITCH_HELD_MAX + crate::limits::LINK_EVENTS_MAX).contains(&held), "{held}");
    say(&mut old, step(3));
    let mut heard = 0;
    let began = Instant::now();
    while heard < said {
        new.kick();
        node.turn();
        for event in node.events.drain(..) {
            let Event::PeerMessage { arg, .. } = event else { panic!("{event:?}") };
            heard += 1;
            assert_eq!(arg, heard);
        }
        assert!(began.elapsed() < PATIENCE, "{heard} of {said}");
    }
}

#[test]
fn signs_of_life_go_out_over_both_links_and_silence_is_measured_on_the_one_that_is_read() {
    let timeout = Duration::from_millis(400);
    for crossed in [false, true] {
        let (mut node, mut old, mut new) = with_raw_peer(Direction::Target { resync: false });
        (1..=2).for_each(|number| say(&mut new, step(number)));
        (0..5).for_each(|_| node.turn());
        if crossed {
            say(&mut old, step(3));
            (0..5).for_each(|_| node.turn());
        }
        let began = Instant::now();
        let mut quarters = 0;
        let mut lives = [0, 0];
        while node.volume.has_link() {
            quarters += 1;
            assert!(quarters < 20, "never judged silent");
            let now = began + timeout / 4 * quarters;
            for (raw, lives) in [&mut old, &mut new].into_iter().zip(&mut lives) {
                let mut events = Vec::new();
                while raw.poll(&mut events) {}
                let is_life = |e: &&LinkEvent| matches!(e, LinkEvent::Message(header) if header.kind == Kind::KeepAlive);
                *lives += events.iter().filter(is_life).count();
            }
            // The other link is full of life, and that is not the one that counts.
            let lively = if crossed { &mut old } else { &mut new };
            say(lively, Header::new(Kind::KeepAlive, Epoch(1)));
            node.volume.poll(now);
            node.volume.keep_alive(now, timeout);
            node.volume.poll(now);
        }
        assert!((4..=6).contains(&quarters) && lives.iter().all(|n| *n >= 3), "{quarters} {lives:?}");
    }
}

#[test]
fn the_end_of_the_old_link_in_the_same_breath_as_its_last_frame_is_no_end() {
    let (mut node, mut old, mut new) = with_raw_peer(Direction::Target { resync: false });
    say(&mut new, step(1));
    say(&mut new, step(2));
    (0..5).for_each(|_| node.turn());
    say(&mut old, trim(1, grains(1, 1)));
    say(&mut old, step(3));
    old.close(DownReason::Local("gone"));
    say(&mut new, trim(2, grains(2, 1)));
    say(&mut new, step(4));
    let began = Instant::now();
    while !node.saw(is_switched) {
        node.turn();
        assert!(!node.events.iter().any(is_down) && began.elapsed() < PATIENCE, "{:?}", node.events);
    }
    assert!(node.volume.has_link());
}

#[test]
fn a_peer_that_breaks_the_order_of_steps_loses_the_new_link_or_the_session() {
    type Lie<'a> = (&'a [(bool, Header)], bool);
    let change = trim(1, grains(0, 1));
    let lies: [Lie<'_>; 8] = [
        // (over the new link, what), and whether the session survives it.
        (&[(true, step(2))], true),
        (&[(true, change)], true),
        (&[(true, step(1)), (true, step(1))], true),
        (&[(true, step(1)), (true, step(9))], true),
        (&[(false, step(1))], false),
        (&[(false, step(3))], false),
        (&[(true, step(1)), (true, step(2)), (false, step(3)), (false, change)], false),
        (&[(true, step(1)), (true, step(2)), (false, step(3)), (true, step(4)), (true, step(4))], false),
    ];
    for (lines, survives) in lies {
        let (mut node, mut old, mut new) = with_raw_peer(Direction::Target { resync: false });
        node.fill(ByteRange::new(0, SIZE), 1);
        for (on_new, header) in lines {
            say(if *on_new { &mut new } else { &mut old }, *header);
            (0..5).for_each(|_| node.turn());
        }
        assert_eq!(node.volume.has_link(), survives, "{lines:?}: {:?}", node.events);
        assert_eq!(node.volume.counters.violations.load(Ordering::Relaxed), 1, "{lines:?}");
        assert!(!node.volume.disk.span(grains(0, 1)).is_zero(), "{lines:?}");
        assert!(heard(&mut new).1, "{lines:?}: the new link is closed");
        assert_eq!(heard(&mut old).1, !survives || lines.len() == 5, "{lines:?}");
        node.assert_nothing_left();
    }
    let (mut node, mut old, _new) = with_raw_peer(Direction::Target { resync: false });
    node.volume.keep_alive(Instant::now() + Duration::from_secs(60), Duration::from_secs(90));
    assert!(node.volume.switch.is_none());
    say(&mut old, step(3));
    (0..5).for_each(|_| node.turn());
    assert!(node.saw(is_down), "a step of a change that is not under way");
}

#[test]
fn a_peer_that_stops_half_way_is_given_up_with_its_session() {
    for steps in [2, 3] {
        let (mut node, mut old, mut new) = with_raw_peer(Direction::Target { resync: false });
        (1..=2).for_each(|number| say(&mut new, step(number)));
        (0..5).for_each(|_| node.turn());
        if steps == 3 {
            say(&mut old, step(3));
            (0..5).for_each(|_| node.turn());
        }
        let began = Instant::now();
        let mut ended = 0;
        for second in 1..=2 * SWITCH_STUCK_S_MAX {
            let now = began + Duration::from_secs(second);
            // Signs of life are no progress.
            for raw in [&mut old, &mut new] {
                say(raw, Header::new(Kind::KeepAlive, Epoch(1)));
            }
            node.volume.poll(now);
            node.volume.keep_alive(now, Duration::from_secs(5));
            node.turn();
            if node.saw(is_down) {
                ended = second;
                break;
            }
        }
        assert!((SWITCH_STUCK_S_MAX - 2..SWITCH_STUCK_S_MAX + 3).contains(&ended), "after {ended} s");
        assert!(heard(&mut old).1 && heard(&mut new).1, "both are closed");
    }
}

#[test]
fn a_session_closed_here_in_mid_change_closes_both_links_and_is_told_once() {
    for turns in 0..12 {
        let (mut node, mut old, mut new) = with_raw_peer(Direction::Source { resync: false });
        node.write(1, grains(0, 1), 1);
        for turn in 0..turns {
            match turn {
                1 => say(&mut new, step(1)),
                3 => say(&mut new, step(2)),
                5 => say(&mut old, step(3)),
                7 => say(&mut new, step(4)),
                _ => {}
            }
            node.turn();
        }
        node.saw(is_switched);
        node.volume.close_link(DownReason::Local("closed by the test"));
        assert!(heard(&mut old).1 && heard(&mut new).1, "both are closed at once");
        (0..10).for_each(|_| node.turn());
        assert!(!node.saw(is_failed) && !node.saw(is_switched), "{:?}", node.events);
        assert_eq!(node.events.iter().filter(|e| is_down(e)).count(), 1);
        node.volume.go_alone();
        node.turn();
        assert_eq!(node.told(1), [Ok(())]);
        node.assert_nothing_left();
    }
}
