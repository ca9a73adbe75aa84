//! What a mirrored write costs on the primary while it polls busily: no allocation, no copy of its payload, and no system
//! call but the doorbell of the device's driver.
//!
//! Over endpoints in memory everywhere, and over a real device where `COSTANDBY_RDMA_ADDRESS` names one. System calls are
//! counted by `strace`, which runs this program once more with a fixed number of writes.

use costandby_datapath::disk::record::{Admit, Record, Touched};
use costandby_datapath::limits::RDMA_LOOK_MS;
use costandby_datapath::testing::fake_rdma::{self, Manner};
use costandby_datapath::transport::rdma::RdmaLink;
use costandby_datapath::transport::rdma::endpoint::Endpoint;
use costandby_datapath::transport::{Link, LinkEvent, Slot};
use costandby_datapath::units::{ByteRange, Epoch, Seq, Token};
use costandby_datapath::wire::{Header, Kind};
use costandby_ffi::counting::{Counting, allocations};
use costandby_ffi::mapping::{Mapping, Span};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of each write.
const LEN: usize = 4096;

/// Bytes of the disk: writes go round it.
const DISK_LEN: usize = 1 << 20;

const PATIENCE: Duration = Duration::from_secs(300);

/// The primary's end of a link, as the mirror pipeline uses it.
struct Primary<E: Endpoint> {
    link: RdmaLink<E>,
    disk: Span,
    events: Vec<LinkEvent>,
    seq: u64,
    acked: u64,
}

impl<E: Endpoint> Primary<E> {
    fn new(link: RdmaLink<E>) -> Self {
        let disk = Mapping::anonymous(DISK_LEN).expect("memory").span(0, DISK_LEN);
        Self { link, disk, events: Vec::with_capacity(256), seq: 0, acked: 0 }
    }

    fn post(&mut self) {
        let permit = self.link.claim(LEN).expect("room for one");
        let start = usize::try_from(self.seq).expect("64-bit") * LEN % DISK_LEN;
        self.seq += 1;
        let span = self.disk.sub(start, LEN);
        let header = Header {
            seq: Seq(self.seq),
            range: ByteRange::new(start as u64, LEN as u64),
            payload_crc: 1,
            ..Header::new(Kind::Write, Epoch(1))
        };
        self.link.post(permit, header, Some(span), Token(self.seq));
        self.link.kick();
    }

    fn poll(&mut self) {
        self.link.poll(&mut self.events);
        for event in self.events.drain(..) {
            match event {
                LinkEvent::Message(header) => self.acked = self.acked.max(header.seq.0),
                LinkEvent::Sent(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// The standby's: releases and acks what arrives.
struct Standby<E: Endpoint> {
    link: RdmaLink<E>,
    events: Vec<LinkEvent>,
    slots: Vec<Slot>,
}

impl<E: Endpoint> Standby<E> {
    fn new(link: RdmaLink<E>) -> Self {
        Self { link, events: Vec::with_capacity(256), slots: Vec::with_capacity(256) }
    }

    /// False once the link has ended.
    fn turn(&mut self) -> bool {
        self.link.poll(&mut self.events);
        for event in self.events.drain(..) {
            match event {
                LinkEvent::Arrived(slot) => self.slots.push(slot),
                LinkEvent::Down(_) => return false,
                _ => {}
            }
        }
        let Some(last) = self.slots.last().map(|slot| slot.header.seq) else { return true };
        for slot in self.slots.drain(..) {
            self.link.release(slot);
        }
        let ack = Header { seq: last, ..Header::new(Kind::Ack, Epoch(1)) };
        self.link.send(ack).expect("one ack waits at most");
        self.link.kick();
        true
    }
}

/// Does so many writes, one at a time. `other` has the standby's turn where it has no thread of its own.
fn write<E: Endpoint>(primary: &mut Primary<E>, count: u64, mut other: impl FnMut()) {
    let begun = Instant::now();
    for _ in 0..count {
        primary.post();
        let mut polls = 0_u32;
        while primary.acked < primary.seq {
            primary.poll();
            other();
            polls += 1;
            // Not each time: where the clock is a system call, it would be counted.
            assert!(!polls.is_multiple_of(1 << 14) || begun.elapsed() < PATIENCE, "no ack");
        }
    }
}

/// Writes round the disk until all of it is registered and nothing is copied any more.
fn warm_up<E: Endpoint>(primary: &mut Primary<E>, mut other: impl FnMut()) {
    let begun = Instant::now();
    loop {
        let before = primary.link.registration_counters().bounced_bytes;
        write(primary, (DISK_LEN / LEN) as u64, &mut other);
        if primary.link.registration_counters().bounced_bytes == before {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the disk is never registered");
    }
}

#[test]
fn rdma_write_allocates_nothing_in_memory() {
    let (first, second) = fake_rdma::pair(16 << 20, Manner::default()).expect("memory");
    let (mut primary, mut standby) = (Primary::new(first), Standby::new(second));
    warm_up(&mut primary, || assert!(standby.turn()));
    let before = (allocations(), primary.link.registration_counters().bounced_bytes);
    write(&mut primary, 10_000, || assert!(standby.turn()));
    let after = (allocations(), primary.link.registration_counters().bounced_bytes);
    assert_eq!(after, before, "allocations on either end, bytes copied");
}

#[test]
fn rdma_write_allocates_nothing_for_its_record() {
    let mut record = Record::in_memory(DISK_LEN as u64);
    record.session_began();
    let mut write = |count: u64| {
        for n in 0..count {
            let range = ByteRange::new(n * LEN as u64 % DISK_LEN as u64, LEN as u64);
            assert_eq!(record.touch(Token(n), range), Admit::Go(Touched::Log));
            record.written(Token(n), range, Touched::Log);
            if n % 100 == 0 {
                let serial = record.begin_checkpoint().expect("with a peer: a flush");
                record.flushed(serial);
            }
        }
    };
    write(1000);
    let before = allocations();
    write(10_000);
    assert_eq!(allocations(), before, "checkpoints included");
}

#[cfg(feature = "rdma")]
mod rdma_device {
    use super::*;
    use costandby_datapath::transport::rdma::Joined;
    use costandby_datapath::transport::rdma::setup::{Connected, both_ends};
    use costandby_datapath::transport::rdma::verbs::VerbsEndpoint;
    use costandby_ffi::testing::{skip, skip_outside_rig};
    use std::collections::BTreeMap;
    use std::io::Write;
    use std::net::IpAddr;
    use std::process::Command;

    const RING_LEN: usize = 64 << 20;

    /// Writes that `strace` watches.
    const WATCHED: u64 = 300;

    fn address() -> Option<IpAddr> {
        let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
            skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
            return None;
        };
        Some(address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address"))
    }

    fn link(connected: Connected) -> RdmaLink<VerbsEndpoint> {
        let Connected { endpoint, ring, receives, peer_ring_len, peer_receives } = connected;
        let joined = Joined {
            ring,
            receives,
            peer_ring_len,
            peer_receives,
            companion: None,
            registered_bytes_max: 1 << 30,
        };
        RdmaLink::new(endpoint, joined).expect("link")
    }

    /// A primary whose standby has a thread of its own.
    fn with_primary<T>(address: IpAddr, work: impl FnOnce(&mut Primary<VerbsEndpoint>) -> T) -> T {
        let [here, there] = both_ends(address, RING_LEN, PATIENCE).expect("connected");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                let mut standby = Standby::new(link(there));
                while !stop.load(Ordering::Relaxed) && standby.turn() {
                    // Not a yield: a system call that nobody is watching for slows all the others down.
                    std::hint::spin_loop();
                }
            });
            let mut primary = Primary::new(link(here));
            let result = work(&mut primary);
            stop.store(true, Ordering::Relaxed);
            result
        })
    }

    #[test]
    fn rdma_write_allocates_nothing_on_a_device() {
        let Some(address) = address() else { return };
        with_primary(address, |primary| {
            warm_up(primary, || ());
            let before = (allocations(), primary.link.registration_counters().bounced_bytes);
            write(primary, 1000, || ());
            let after = (allocations(), primary.link.registration_counters().bounced_bytes);
            assert_eq!(after, before, "allocations, bytes copied");
        });
    }

    const BEGIN: &str = "costandby: begin";
    const END: &str = "costandby: end";

    /// One system call that is easy to find.
    fn mark(text: &str) {
        std::io::stderr().write_all(format!("{text}\n").as_bytes()).expect("stderr");
    }

    /// What `strace` watches; does nothing else.
    #[test]
    #[ignore = "only under strace, by the test below"]
    fn rdma_writes_to_be_watched() {
        let address = address().expect("the test below asked");
        with_primary(address, |primary| {
            warm_up(primary, || ());
            let begun = Instant::now();
            mark(BEGIN);
            write(primary, WATCHED, || ());
            mark(&format!("{END} {}", begun.elapsed().as_millis()));
        });
    }

    /// The system calls of the thread that wrote, between the marks, by name and first argument.
    fn calls_between_marks(trace: &str) -> (BTreeMap<String, u64>, u64) {
        let begin = trace.lines().find(|line| line.contains(BEGIN)).expect("the begin is in the trace");
        let thread = begin.split_whitespace().next().expect("strace names threads");
        let mut calls = BTreeMap::new();
        let own = trace.lines().filter(|line| line.split_whitespace().next() == Some(thread));
        for line in own.skip_while(|line| !line.contains(BEGIN)).skip(1) {
            if let Some((_, rest)) = line.split_once(END) {
                let elapsed: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
                return (calls, elapsed.parse().expect("milliseconds"));
            }
            let call = line.split_whitespace().nth(1).unwrap_or_default();
            if call.starts_with("<...") || call.starts_with("---") {
                continue;
            }
            let name = call.split(',').next().unwrap_or_default().trim_end_matches(')');
            *calls.entry(name.to_owned()).or_insert(0) += 1;
        }
        panic!("the end is not in the trace");
    }

    #[test]
    fn rdma_write_makes_no_call_but_the_doorbell() {
        let Some(address) = address() else { return };
        if Command::new("strace").arg("-V").output().is_err() {
            skip("strace is not installed");
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let trace = directory.path().join("trace");
        let status = Command::new("strace")
            .args(["-f", "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().expect("this program"))
            .args(["rdma_device::rdma_writes_to_be_watched", "--exact", "--ignored", "--nocapture"])
            .env("COSTANDBY_RDMA_ADDRESS", address.to_string())
            .status()
            .expect("strace runs");
        assert!(status.success(), "{status}");
        let trace = String::from_utf8_lossy(&std::fs::read(&trace).expect("the trace")).into_owned();
        let (calls, elapsed_ms) = calls_between_marks(&trace);
        println!("{WATCHED} writes in {elapsed_ms} ms: {calls:?}");
        let all_of = |name: &str| -> u64 {
            calls.iter().filter(|(call, _)| call.starts_with(name)).map(|(_, count)| count).sum()
        };
        // The driver's doorbell is a write to its device. Where the clock is a system call (emulated machines have no
        // other), the look that comes every so many polls shows up too.
        let (doorbells, clock) = (all_of("write("), all_of("clock_gettime("));
        assert!((1..=WATCHED + WATCHED / 10).contains(&doorbells), "one doorbell a write: {calls:?}");
        // Looks at what no completion tells: a few calls each, every few milliseconds, however many writes there are.
        let others = calls.values().sum::<u64>() - doorbells - clock;
        let looks = elapsed_ms / RDMA_LOOK_MS + 1;
        assert!(others <= 2 * looks, "more than {looks} looks explain: {calls:?}");
    }
}
