//! With a device: both ends in one process, over the device that has `COSTANDBY_RDMA_ADDRESS`.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::mapping::{Mapping, Span};
use crate::testing::{scaled, skip_outside_rig};

const RING_LEN: usize = 1 << 20;
const SETTINGS: Settings = Settings { send_len: 64, receive_len: 128, ack_timeout: 14 };

/// One test at a time: some count the process's descriptors and pinned pages.
static ALONE: Mutex<()> = Mutex::new(());

fn device() -> Option<(IpAddr, MutexGuard<'static, ()>)> {
    let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
        skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
        return None;
    };
    let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Some((address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address"), alone))
}

fn soon() -> Instant {
    Instant::now() + scaled(Duration::from_secs(10))
}

/// What has begun at `start` took less than `limit`, which suits a quiet machine.
fn assert_within(start: Instant, limit: Duration) {
    let took = start.elapsed();
    println!("took {took:?}, of {limit:?}");
    assert!(took < scaled(limit), "{took:?}");
}

/// One end of a connection, with a ring of its own.
struct End {
    queue_pair: QueuePair,
    ring: Span,
    ring_region: Region,
    peer_ring: Target,
    source: Arc<Mapping>,
    region: Region,
}

fn register_ring(domain: &Domain) -> (Region, Span, Vec<u8>) {
    let mapping = Mapping::ring(RING_LEN).unwrap();
    let ring = mapping.span(0, 2 * RING_LEN);
    let region = Region::ring(domain, &ring).unwrap();
    let mut private = region.address().to_le_bytes().to_vec();
    private.extend(region.remote_key().to_le_bytes());
    (region, ring, private)
}

impl End {
    fn new(established: Established, ring_region: Region, ring: Span) -> Self {
        let Established { queue_pair, private } = established;
        let address = u64::from_le_bytes(private[..8].try_into().unwrap());
        let peer_ring = Target { address, key: u32::from_le_bytes(private[8..12].try_into().unwrap()) };
        let source = Mapping::anonymous(RING_LEN).unwrap();
        let region = Region::source(queue_pair.domain(), &source.span(0, RING_LEN)).unwrap();
        Self { queue_pair, ring, ring_region, peer_ring, source, region }
    }

    /// A write of `len` bytes from the source's beginning to the same offset in the peer's ring.
    fn write(&mut self, offset: usize, len: usize, immediate: Option<u32>, id: u64, signalled: bool) {
        let target = Target { address: self.peer_ring.address + offset as u64, ..self.peer_ring };
        let piece = Piece { region: &self.region, offset, len };
        self.queue_pair.write(&[piece], target, immediate, id, signalled);
    }

    /// Polls until `count` completions are here.
    fn expect(&mut self, count: usize) -> Vec<Completion> {
        let deadline = soon();
        let mut found = Vec::new();
        let mut room = [Completion::Done { id: 0 }; 16];
        while found.len() < count {
            assert!(Instant::now() < deadline, "only {found:?}");
            let taken = self.queue_pair.poll(&mut room).unwrap();
            found.extend_from_slice(&room[..taken]);
        }
        found
    }

    /// Polls and checks until it fails.
    fn failure(&mut self) -> Failure {
        let deadline = soon();
        let mut room = [Completion::Done { id: 0 }; 16];
        loop {
            assert!(Instant::now() < deadline, "no failure");
            if let Err(failure) = self.queue_pair.poll(&mut room).and_then(|_| self.queue_pair.check()) {
                return failure;
            }
        }
    }

    fn ring_bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ring.sub(offset, len).read_into(&mut bytes);
        bytes
    }

    fn fill(&self, byte: u8) {
        self.source.span(0, RING_LEN).write_from(&vec![byte; RING_LEN]);
    }
}

/// A ring that outlives connections: registered in a domain made before them.
struct Kept {
    domain: Domain,
    ring: Span,
    region: Region,
    private: Vec<u8>,
}

impl Kept {
    fn new(address: IpAddr) -> Self {
        let domain = Domain::at(address).unwrap();
        let (region, ring, private) = register_ring(&domain);
        Self { domain, ring, region, private }
    }

    /// An end whose ring this is, which takes the connection of another that has its own.
    fn accept(&self, address: IpAddr) -> (End, End) {
        let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
        assert!(listener.is_on(&self.domain));
        let peer = listener.local_address();
        let active = thread::spawn(move || {
            let resolved = Resolved::new(None, peer, soon()).unwrap();
            let (region, ring, private) = register_ring(resolved.domain());
            End::new(resolved.connect(&SETTINGS, &private, soon()).unwrap(), region, ring)
        });
        let request = listener.request(soon()).unwrap().expect("somebody connects");
        let request = request.open_within(&self.domain).unwrap();
        let established = request.accept(&SETTINGS, &self.private, soon()).unwrap();
        let end = End::new(established, self.region.clone(), self.ring.clone());
        (end, active.join().unwrap())
    }
}

/// Two connected ends; the first one connected to the second.
fn pair(address: IpAddr) -> (End, End) {
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let peer = listener.local_address();
    assert_ne!(peer.port(), 0);
    let passive = thread::spawn(move || {
        let request = listener.request(soon()).unwrap().expect("somebody connects");
        assert_eq!(request.peer().ip(), address);
        let request = request.open().unwrap();
        let (region, ring, private) = register_ring(request.domain());
        End::new(request.accept(&SETTINGS, &private, soon()).unwrap(), region, ring)
    });
    let resolved = Resolved::new(None, peer, soon()).unwrap();
    let (region, ring, private) = register_ring(resolved.domain());
    let active = End::new(resolved.connect(&SETTINGS, &private, soon()).unwrap(), region, ring);
    (active, passive.join().unwrap())
}

#[test]
fn the_device_is_described() {
    let Some((address, _alone)) = device() else { return };
    let devices = devices().unwrap();
    println!("{devices:#?}");
    let device = devices.iter().find(|device| device.has_address(address)).expect("a device has the address");
    if let Ok(name) = std::env::var("COSTANDBY_RDMA_DEVICE") {
        assert_eq!(device.name, name);
    }
    let port = &device.ports[0];
    assert_eq!(port.state, PortState::Active);
    assert!(port.mtu >= 1024 && port.mtu <= port.mtu_max && port.message_len_max >= 1 << 20);
    assert!(
        device.limits.work_requests >= 1024
            && device.limits.pieces >= 4
            && device.limits.region_len >= 1 << 30
    );
    assert!(!device.netdevs().is_empty());
}

#[test]
fn writes_land_and_messages_arrive_in_order_both_ways() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    for (from, to) in [(0, 1), (1, 0)] {
        let (sender, receiver) = if from < to { (&mut a, &mut b) } else { (&mut b, &mut a) };
        sender.fill(0x5a);
        sender.write(4096, 8192, Some(0x0102_0304), 7, true);
        sender.queue_pair.send(&[9; MESSAGE_LEN], 8, false);
        sender.write(0, 64, None, 9, true);
        sender.queue_pair.ring_doorbell().unwrap();
        let expected =
            [Completion::Placed { immediate: 0x0102_0304 }, Completion::Message { bytes: [9; MESSAGE_LEN] }];
        assert_eq!(receiver.expect(2), expected);
        assert_eq!(sender.expect(2), [Completion::Done { id: 7 }, Completion::Done { id: 9 }]);
        assert_eq!(receiver.ring_bytes(4096, 8192), vec![0x5a; 8192]);
        assert_eq!(receiver.ring_bytes(4096 + 8192, 64), vec![0; 64], "and not a byte more");
        sender.queue_pair.check().unwrap();
    }
}

#[test]
fn a_write_gathers_its_pieces_and_may_cross_the_lap() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    for (at, byte) in [(0, 1), (5000, 2), (70_000, 3)] {
        a.source.span(at, 64).write_from(&[byte; 64]);
    }
    let pieces = [0, 5000, 70_000].map(|offset| Piece { region: &a.region, offset, len: 64 });
    let target = Target { address: a.peer_ring.address + RING_LEN as u64 - 64, ..a.peer_ring };
    a.queue_pair.write(&pieces, target, Some(1), 0, true);
    a.queue_pair.ring_doorbell().unwrap();
    b.expect(1);
    assert_eq!(b.ring_bytes(RING_LEN - 64, 192), [vec![1; 64], vec![2; 64], vec![3; 64]].concat());
    assert_eq!(b.ring_bytes(0, 64), vec![2; 64], "the second lap is the first");
}

#[test]
fn thousands_of_writes_with_one_in_32_signalled() {
    const COUNT: u64 = 5000;
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    let (mut open, mut posted, mut placed) = (0, 0, 0);
    let mut room = [Completion::Done { id: 0 }; 32];
    let deadline = Instant::now() + Duration::from_secs(60);
    while placed < COUNT {
        assert!(Instant::now() < deadline, "{posted} posted, {placed} placed");
        while posted < COUNT && open < SETTINGS.send_len && posted - placed < u64::from(SETTINGS.receive_len)
        {
            let last = posted + 1 == COUNT;
            a.write(64, 64, Some(u32::try_from(posted).unwrap()), posted, posted % 32 == 31 || last);
            (open, posted) = (open + 1, posted + 1);
        }
        a.queue_pair.ring_doorbell().unwrap();
        let taken = a.queue_pair.poll(&mut room).unwrap();
        for completion in &room[..taken] {
            let Completion::Done { id } = completion else { panic!("{completion:?}") };
            open = u32::try_from(posted - 1 - id).unwrap();
        }
        let taken = b.queue_pair.poll(&mut room).unwrap();
        for completion in &room[..taken] {
            assert_eq!(*completion, Completion::Placed { immediate: u32::try_from(placed).unwrap() });
            placed += 1;
        }
    }
}

#[test]
fn a_wrong_key_ends_the_connection_at_both_ends() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    a.fill(7);
    a.peer_ring.key ^= 0x5500;
    a.write(0, 64, Some(1), 1, true);
    a.queue_pair.ring_doorbell().unwrap();
    let failure = a.failure();
    assert_eq!(failure, Failure::WorkRequest { status: 10 }, "{failure}");
    b.failure();
    assert_eq!(b.ring_bytes(0, 64), vec![0; 64]);
}

#[test]
fn a_write_past_the_ring_is_denied() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, _b) = pair(address);
    a.peer_ring.address += 2 * RING_LEN as u64 - 32;
    a.write(0, 64, Some(1), 1, true);
    a.queue_pair.ring_doorbell().unwrap();
    assert_eq!(a.failure(), Failure::WorkRequest { status: 10 });
}

#[test]
fn a_message_of_a_wrong_length_is_named() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    a.queue_pair.send.message(&[1; MESSAGE_LEN], 1, true);
    a.queue_pair.send.shorten_last(48);
    a.queue_pair.ring_doorbell().unwrap();
    assert_eq!(b.expect(1), [Completion::Short { len: 48 }]);
}

#[test]
fn what_completed_before_the_cut_is_kept_and_what_comes_after_does_not_land() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    a.fill(1);
    for at in 0..3 {
        a.write(at * 64, 64, Some(u32::try_from(at).unwrap()), 0, true);
    }
    a.queue_pair.ring_doorbell().unwrap();
    a.expect(3);
    b.queue_pair.cut();
    b.queue_pair.cut();
    a.fill(2);
    a.write(0, 4096, Some(9), 1, true);
    let _ = a.queue_pair.ring_doorbell();
    let placed = |immediate| Completion::Placed { immediate };
    assert_eq!(b.expect(3), [placed(0), placed(1), placed(2)]);
    let mut room = [placed(0); 4];
    assert_eq!(b.queue_pair.poll(&mut room), Err(Failure::Closed));
    assert_eq!(b.queue_pair.check(), Err(Failure::Closed));
    a.failure();
    assert_eq!(b.ring_bytes(0, 192), vec![1; 192]);
    assert_eq!(b.ring_bytes(192, 4096), vec![0; 4096]);
    drop(b.ring_region);
}

#[test]
fn a_write_that_is_landing_is_stopped_by_the_cut() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    let len = RING_LEN / 2;
    a.fill(1);
    for at in 0..32 {
        a.write((at % 2) * len, len, Some(0), 0, true);
    }
    a.queue_pair.ring_doorbell().unwrap();
    b.expect(1);
    b.queue_pair.cut();
    // Wiped after the cut: whatever lands now is seen.
    b.ring.sub(0, RING_LEN).fill_zero();
    a.failure();
    thread::sleep(Duration::from_millis(100));
    assert!(b.ring.is_zero(), "a write landed after the cut");
}

#[test]
fn the_peer_learns_of_a_close_at_once_and_of_nothing_else() {
    let Some((address, _alone)) = device() else { return };
    let (a, mut b) = pair(address);
    b.queue_pair.check().unwrap();
    let start = Instant::now();
    drop(a);
    b.failure();
    assert_within(start, Duration::from_secs(1));
}

/// Not a test of its own: the other process of the next one.
#[test]
fn peer_process() {
    // Not left out: a test below runs it.
    let Ok(peer) = std::env::var("COSTANDBY_RDMA_TEST_PEER") else { return };
    let resolved = Resolved::new(None, peer.parse().unwrap(), soon()).unwrap();
    let (_region, _ring, private) = register_ring(resolved.domain());
    let _established = resolved.connect(&SETTINGS, &private, soon()).unwrap();
    thread::sleep(Duration::from_secs(30));
}

#[test]
fn a_killed_peer_is_noticed_within_a_second() {
    let Some((address, _alone)) = device() else { return };
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let mut child =
        process("peer_process", &[], "COSTANDBY_RDMA_TEST_PEER", &listener.local_address().to_string());
    let request = listener.request(soon()).unwrap().expect("the child connects");
    let request = request.open().unwrap();
    let (region, ring, private) = register_ring(request.domain());
    let mut end = End::new(request.accept(&SETTINGS, &private, soon()).unwrap(), region, ring);
    end.queue_pair.check().unwrap();
    let start = Instant::now();
    child.kill().unwrap();
    end.failure();
    println!("noticed after {:?}", start.elapsed());
    assert_within(start, Duration::from_secs(1));
    let start = Instant::now();
    end.queue_pair.cut();
    drop(end);
    assert_within(start, Duration::from_millis(500));
    child.wait().unwrap();
}

#[test]
fn a_sleeper_is_woken_by_a_completion() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    let readable = |end: &End, limit: Duration| {
        let descriptors = end.queue_pair.descriptors();
        let mut polled: Vec<_> = descriptors
            .into_iter()
            .map(|fd| rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN))
            .collect();
        rustix::event::poll(&mut polled, Some(&limit.try_into().unwrap())).unwrap() > 0
    };
    for _ in 0..3 {
        // The connection manager's leftovers (the connection is up) are taken here.
        b.queue_pair.check().unwrap();
        b.queue_pair.notify().unwrap();
        assert!(!readable(&b, Duration::from_millis(20)), "asleep");
        a.queue_pair.send(&[1; MESSAGE_LEN], 0, true);
        a.queue_pair.ring_doorbell().unwrap();
        assert!(readable(&b, scaled(Duration::from_secs(5))), "woken");
        b.queue_pair.check().unwrap();
        assert!(!readable(&b, Duration::ZERO), "the event is taken");
        b.expect(1);
        a.expect(1);
    }
}

#[test]
fn private_data_travel_both_ways_and_a_rejection_is_told_from_a_refusal() {
    let Some((address, _alone)) = device() else { return };
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let peer = listener.local_address();
    assert!(listener.request(Instant::now()).unwrap().is_none(), "nobody there, no wait");
    let passive = thread::spawn(move || {
        let request = listener.request(soon()).unwrap().unwrap();
        assert!(request.private().starts_with(&[3; PRIVATE_LEN_MAX]), "{:?}", request.private());
        request.reject();
        let request = listener.request(soon()).unwrap().unwrap();
        request.open().unwrap().accept(&SETTINGS, &[4; PRIVATE_LEN_MAX], soon()).unwrap()
    });
    let connect = || Resolved::new(Some(address), peer, soon()).unwrap().connect(&SETTINGS, &[3; 56], soon());
    let rejected = connect();
    assert!(matches!(rejected, Err(VerbsError::Rejected { .. })), "{rejected:?}");
    let established = connect().unwrap();
    assert!(established.private.starts_with(&[4; PRIVATE_LEN_MAX]), "{:?}", established.private);
    drop(passive.join().unwrap());
    let start = Instant::now();
    let refused = connect();
    assert!(matches!(refused, Err(VerbsError::Refused { .. })), "{refused:?}");
    assert_within(start, Duration::from_secs(2));
}

#[test]
fn a_host_without_an_answer_is_unreachable_or_times_out() {
    let Some((address, _alone)) = device() else { return };
    let IpAddr::V4(v4) = address else { return };
    let [a, b, c, _] = v4.octets();
    let nobody = SocketAddr::from(([a, b, c, 250], 9));
    let start = Instant::now();
    let deadline = start + Duration::from_secs(2);
    let error = Resolved::new(None, nobody, deadline).unwrap_err();
    let timely = matches!(error, VerbsError::Unreachable { .. } | VerbsError::Timeout { .. });
    assert!(timely, "{error}");
    assert_within(start, Duration::from_secs(4));
    let elsewhere = Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0)));
    assert!(matches!(elsewhere, Err(VerbsError::NoDeviceAt { .. })), "{elsewhere:?}");
    let elsewhere = Resolved::new(Some(IpAddr::from([192, 0, 2, 1])), nobody, deadline);
    assert!(matches!(elsewhere, Err(VerbsError::NoDeviceAt { .. })), "{elsewhere:?}");
}

#[test]
fn a_request_nobody_answers_ends_with_the_deadline() {
    let Some((address, _alone)) = device() else { return };
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let resolved = Resolved::new(None, listener.local_address(), soon()).unwrap();
    let start = Instant::now();
    let error = resolved.connect(&SETTINGS, &[], start + Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, VerbsError::Timeout { .. }), "{error}");
    assert_within(start, Duration::from_secs(2));
}

#[test]
fn a_ring_serves_one_connection_after_another_and_each_peer_reaches_it_only_over_its_own() {
    let Some((address, _alone)) = device() else { return };
    let kept = Kept::new(address);
    assert_eq!(kept.domain.state(), DomainState::Free);
    let mut numbers = Vec::new();
    let mut former: Option<End> = None;
    for round in 1..=4 {
        let (mut end, mut peer) = kept.accept(address);
        assert_eq!(kept.domain.state(), DomainState::Taken);
        assert_eq!(peer.peer_ring.key, kept.region.remote_key(), "the key is the same each time");
        numbers.push(end.queue_pair.number());
        peer.fill(round);
        peer.write(0, 4096, Some(1), 1, true);
        peer.queue_pair.ring_doorbell().unwrap();
        end.expect(1);
        assert_eq!(end.ring_bytes(0, 4096), vec![round; 4096]);
        if let Some(mut former) = former.take() {
            // The peer of the connection before has its queue pair still, the address and the key.
            former.fill(0xee);
            for id in 0..8 {
                former.write(0, 4096, Some(2), id, true);
            }
            // Nobody is told of it, whether or not the device takes it.
            let _ = former.queue_pair.ring_doorbell();
            former.failure();
            assert_eq!(end.ring_bytes(0, 4096), vec![round; 4096], "a late write landed");
            let mut room = [Completion::Done { id: 0 }; 4];
            assert_eq!(end.queue_pair.poll(&mut room).unwrap(), 0, "a late write was told");
        }
        end.queue_pair.cut();
        assert_eq!(kept.domain.state(), DomainState::Free);
        former = Some(peer);
    }
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 4, "a queue pair's number came again");
}

#[test]
fn a_queue_pair_gets_no_number_that_its_domain_had_lately() {
    let Some((address, _alone)) = device() else { return };
    let kept = Kept::new(address);
    let (mut end, _peer) = kept.accept(address);
    let number = end.queue_pair.number();
    assert!(!kept.domain.had(number));
    // The device goes on counting; whichever numbers it has in mind next are said to have been used.
    (number..number + 40).for_each(|used| {
        kept.domain.created();
        kept.domain.destroyed(used, false);
    });
    end.queue_pair.cut();
    let (end, _peer) = kept.accept(address);
    let next = end.queue_pair.number();
    assert!(!kept.domain.had(next), "{next} came again after {number}");
}

#[test]
fn regions_in_flight_outlive_their_owner() {
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    let memory = Mapping::anonymous(1 << 20).unwrap();
    memory.span(0, 1 << 20).write_from(&vec![6; 1 << 20]);
    let region = Region::source(a.queue_pair.domain(), &memory.span(0, 1 << 20)).unwrap();
    let weak = Arc::downgrade(&memory);
    let piece = Piece { region: &region, offset: 0, len: 1 << 19 };
    a.queue_pair.write(&[piece], a.peer_ring, Some(5), 3, true);
    a.queue_pair.ring_doorbell().unwrap();
    drop((region, memory));
    assert!(weak.upgrade().is_some(), "held while the device may read it");
    assert_eq!(b.expect(1), [Completion::Placed { immediate: 5 }]);
    assert_eq!(b.ring_bytes(0, 1 << 19), vec![6; 1 << 19]);
    assert_eq!(a.expect(1), [Completion::Done { id: 3 }]);
    assert!(weak.upgrade().is_none(), "and given back when it is done");
    // Dropped with requests open: nothing hangs, nothing lands later.
    for id in 0..32 {
        a.write(0, 1 << 19, None, id, false);
    }
    a.queue_pair.ring_doorbell().unwrap();
    drop(a);
    b.failure();
}

#[test]
fn a_trim_keeps_off_what_is_registered() {
    let Some((address, _alone)) = device() else { return };
    let (a, _b) = pair(address);
    let mapping = a.source.clone();
    let unpinned = mapping.hold_unpinned(0, RING_LEN);
    assert_eq!(unpinned.free().count(), 0, "all of it is registered");
    drop(unpinned);
    let domain = a.queue_pair.domain().clone();
    drop(a);
    let unpinned = mapping.hold_unpinned(0, RING_LEN);
    assert_eq!(unpinned.free().count(), 1);
    let error = Region::source(&domain, &mapping.span(4096, 4096)).unwrap_err();
    assert!(matches!(error, VerbsError::Busy), "{error}");
    drop(unpinned);
    Region::source(&domain, &mapping.span(4096, 4096)).unwrap();
}

/// Runs another test of this file in a process of its own, by way of `wrapper`, and returns it.
fn process(test: &str, wrapper: &[&str], variable: &str, value: &str) -> std::process::Child {
    let exe = std::env::current_exe().unwrap();
    let test = format!("verbs::tests::device::{test}");
    let command = wrapper.iter().map(std::ffi::OsStr::new).chain([exe.as_os_str()]).collect::<Vec<_>>();
    std::process::Command::new(command[0])
        .args(&command[1..])
        .args(["--exact", &test, "--nocapture"])
        .env(variable, value)
        .spawn()
        .unwrap()
}

/// Not a test of its own: without the right to lock more than it may. The kernel lets nobody use RDMA descriptors whose
/// capabilities changed since they were opened, so this is not done to a thread.
#[test]
fn limited_process() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    // Not left out: a test below runs it.
    let Ok(_) = std::env::var("COSTANDBY_RDMA_TEST_LIMITED") else { return };
    let Some((address, _alone)) = device() else { return };
    setrlimit(Resource::Memlock, Rlimit { current: Some(64 << 20), maximum: Some(64 << 20) }).unwrap();
    let (a, _b) = pair(address);
    let (limit, pinned) = memlock();
    assert_eq!(limit, Memlock(Some(64 << 20)));
    assert!(pinned >= 4 * RING_LEN as u64, "rings and arenas: {pinned}");
    let len = 64 << 20;
    let memory = Mapping::anonymous(len).unwrap();
    let refused = Region::source(a.queue_pair.domain(), &memory.span(0, len));
    let Err(VerbsError::Memlock { asked, limit: Memlock(Some(told)), pinned: counted }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((asked, told, counted), (len, 64 << 20, pinned));
    Region::source(a.queue_pair.domain(), &memory.span(0, 1 << 20)).unwrap();
}

#[test]
fn too_little_locked_memory_is_told_in_bytes() {
    let Some(_device) = device() else { return };
    let wrapper = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];
    let mut child = process("limited_process", &wrapper, "COSTANDBY_RDMA_TEST_LIMITED", "1");
    assert!(child.wait().unwrap().success());
}

fn rdma(args: &[&str]) -> bool {
    std::process::Command::new("rdma").args(args).status().unwrap().success()
}

/// Not a test of its own: loses its device. What the libraries keep of it goes with the process, and only then does the
/// kernel finish removing a software device.
#[test]
fn bereft_process() {
    // Not left out: a test below runs it.
    let Ok(name) = std::env::var("COSTANDBY_RDMA_TEST_REMOVE") else { return };
    let Some((address, _alone)) = device() else { return };
    let (mut a, mut b) = pair(address);
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let mut remover = std::process::Command::new("rdma").args(["link", "delete", &name]).spawn().unwrap();
    let start = Instant::now();
    let failures = [a.failure(), b.failure()];
    println!("{failures:?} after {:?}", start.elapsed());
    assert_within(start, Duration::from_secs(1));
    let gone = listener.request(soon());
    assert!(matches!(gone, Err(VerbsError::Removed)), "{gone:?}");
    let start = Instant::now();
    drop((a, b, listener));
    println!("dropped in {:?}", start.elapsed());
    assert_within(start, Duration::from_secs(1));
    let _ = remover.try_wait();
}

/// To be run alone: a process that used the device holds it.
#[test]
fn a_removed_device_ends_the_connection_and_may_come_back() {
    let Ok(netdev) = std::env::var("COSTANDBY_RDMA_NETDEV") else {
        skip_outside_rig("no software RDMA device that may be removed (COSTANDBY_RDMA_NETDEV is not set)");
        return;
    };
    let Some((address, _alone)) = device() else { return };
    let name = std::env::var("COSTANDBY_RDMA_DEVICE").expect("the name of the device to remove");
    let mut child = process("bereft_process", &[], "COSTANDBY_RDMA_TEST_REMOVE", &name);
    assert!(child.wait().unwrap().success());
    let deadline = soon();
    while !rdma(&["link", "add", &name, "type", "rxe", "netdev", &netdev])
        || Listener::bind(SocketAddr::new(address, 0)).is_err()
    {
        assert!(Instant::now() < deadline, "the device does not come back");
        thread::sleep(Duration::from_millis(100));
    }
    let (mut a, mut b) = pair(address);
    a.write(0, 64, Some(1), 1, true);
    a.queue_pair.ring_doorbell().unwrap();
    assert_eq!(b.expect(1), [Completion::Placed { immediate: 1 }]);
}

#[test]
fn a_port_without_a_wire_ends_the_connection_and_the_next_one_works() {
    let Some((address, _alone)) = device() else { return };
    let Ok(netdev) = std::env::var("COSTANDBY_RDMA_NETDEV") else {
        skip_outside_rig("no interface that may be switched off (COSTANDBY_RDMA_NETDEV is not set)");
        return;
    };
    let switch = |to: &str| {
        let status = std::process::Command::new("ip").args(["link", "set", &netdev, to]).status().unwrap();
        assert!(status.success(), "ip link set {netdev} {to}");
    };
    let (mut a, mut b) = pair(address);
    switch("down");
    let start = Instant::now();
    let failures = [a.failure(), b.failure()];
    println!("{failures:?} after {:?}", start.elapsed());
    assert_eq!(failures, [Failure::Device("the port went down"); 2]);
    assert_within(start, Duration::from_secs(1));
    drop((a, b));
    // Long enough that a good-bye said at once would have gone out, or tried to.
    thread::sleep(Duration::from_millis(300));
    switch("up");
    let deadline = soon();
    while devices().unwrap()[0].ports[0].state != PortState::Active {
        assert!(Instant::now() < deadline, "the port does not come back");
        thread::sleep(Duration::from_millis(20));
    }
    let (mut a, mut b) = pair(address);
    a.write(0, 64, Some(1), 1, true);
    a.queue_pair.ring_doorbell().unwrap();
    assert_eq!(b.expect(1), [Completion::Placed { immediate: 1 }]);
}

#[test]
fn no_connection_leaves_anything_behind() {
    let Some((address, _alone)) = device() else { return };
    let count = || (std::fs::read_dir("/proc/self/fd").unwrap().count(), memlock().1);
    let cycle = || {
        let (mut a, mut b) = pair(address);
        a.write(0, 64, Some(1), 1, true);
        a.queue_pair.ring_doorbell().unwrap();
        b.expect(1);
    };
    // Once for what the libraries keep for good.
    cycle();
    settle(&count, None);
    let before = count();
    for _ in 0..100 {
        cycle();
    }
    assert_eq!(settle(&count, Some(before)), before);
}

/// Waits until the reaper is through: until the count is `wanted`, or has not changed for a while.
fn settle(count: &impl Fn() -> (usize, u64), wanted: Option<(usize, u64)>) -> (usize, u64) {
    let deadline = soon();
    let (mut last, mut since) = (count(), Instant::now());
    while Instant::now() < deadline && wanted != Some(last) {
        thread::sleep(Duration::from_millis(10));
        let now = count();
        if now != last {
            (last, since) = (now, Instant::now());
        } else if wanted.is_none() && since.elapsed() > Duration::from_millis(500) {
            break;
        }
    }
    last
}

/// On two machines at once, which share the directory `COSTANDBY_RDMA_SHARE`: node 2 connects to node 1 and loses its
/// power. Only the device can tell then, as nobody closes anything.
#[test]
fn a_host_without_power_is_noticed() {
    let Some((address, _alone)) = device() else { return };
    let (Ok(share), Ok(node)) = (std::env::var("COSTANDBY_RDMA_SHARE"), std::env::var("NODE")) else {
        skip_outside_rig("one machine only (COSTANDBY_RDMA_SHARE and NODE are not set)");
        return;
    };
    let file = std::path::Path::new(&share).join("verbs-listener");
    let patience = Instant::now() + scaled(Duration::from_secs(100));
    if node == "2" {
        let peer = loop {
            assert!(Instant::now() < patience, "node 1 does not listen");
            match std::fs::read_to_string(&file).map(|text| text.parse()) {
                Ok(Ok(peer)) => break peer,
                _ => thread::sleep(Duration::from_millis(50)),
            }
        };
        let resolved = loop {
            // A host that has just booted may miss the first questions for its address.
            match Resolved::new(None, peer, Instant::now() + scaled(Duration::from_secs(4))) {
                Ok(resolved) => break resolved,
                Err(error) => assert!(Instant::now() < patience, "{error}"),
            }
        };
        let (_region, _ring, private) = register_ring(resolved.domain());
        let mut queue_pair = resolved.connect(&SETTINGS, &private, soon()).unwrap().queue_pair;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            queue_pair.poll(&mut [Completion::Done { id: 0 }; 16]).unwrap();
        }
        std::fs::write("/proc/sysrq-trigger", "o").unwrap();
        thread::sleep(Duration::from_secs(20));
    }
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    std::fs::write(&file, listener.local_address().to_string()).unwrap();
    let request = listener.request(patience).unwrap().expect("node 2 connects").open().unwrap();
    let (region, ring, private) = register_ring(request.domain());
    let mut end = End::new(request.accept(&SETTINGS, &private, soon()).unwrap(), region, ring);
    let mut last = Instant::now();
    let failure = 'alive: loop {
        end.write(0, 64, Some(1), 1, true);
        end.queue_pair.ring_doorbell().unwrap();
        loop {
            assert!(last.elapsed() < scaled(Duration::from_secs(10)), "not noticed");
            match end.queue_pair.poll(&mut [Completion::Done { id: 0 }; 16]) {
                Ok(0) => {}
                Ok(_) => break,
                Err(failure) => break 'alive failure,
            }
        }
        last = Instant::now();
        thread::sleep(Duration::from_millis(10));
    };
    println!("{failure}, {:?} after the last sign of life", last.elapsed());
    assert_within(last, Duration::from_secs(2));
    let start = Instant::now();
    drop(end);
    assert_within(start, Duration::from_secs(1));
}
