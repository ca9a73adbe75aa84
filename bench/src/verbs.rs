//! The floor over RDMA: one write with an immediate out, one inline message back, on bare verbs.
//!
//! No disk, checksum, credit or protocol: the near end posts a write of so many bytes from one registered region and
//! polls until the answer is here; the far end polls until it is told of the write and posts the answer. A mirrored write
//! does that and more, so it cannot be faster on the same device. Two threads, both polling; every completion is signalled
//! and checked for what it is.

use crate::Outcome;
use crate::histogram::{Recorder, Summary};
use costandby_datapath::limits::RDMA_RING_LEN;
use costandby_datapath::transport::Link;
use costandby_datapath::transport::rdma::setup::{self, Connected};
use costandby_datapath::transport::rdma::{Joined, RdmaLink};
use costandby_ffi::mapping::{Mapping, Span};
use costandby_ffi::verbs::{
    Completion, Domain, Established, Listener, MESSAGE_LEN, Piece, QueuePair, Region, Resolved, Settings,
    Target,
};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest time one step of connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for one answer before the run counts as hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Unanswered packets are sent again after 4 s: a machine that stalls spoils a number and not the run.
const SETTINGS: Settings = Settings { send_len: 64, receive_len: 64, ack_timeout: 20 };

/// Bytes of the disk that may be registered: all of the largest that is measured.
const REGISTERED_BYTES_MAX: u64 = 4 << 30;

/// What the two ends say when they connect: where the ring is, and its key.
const PRIVATE_LEN: usize = 12;

/// One end.
struct End {
    queue_pair: QueuePair,
    peer: Target,
    /// What is written from; the far end writes nothing.
    source: Region,
    /// Registered until the queue pair is gone.
    _ring: Region,
    room: [Completion; 16],
    posted: u64,
    done: u64,
}

/// Measures the exchange with writes of `len` bytes, for `time` and a tenth of it before to warm up.
pub(crate) fn floor(address: IpAddr, len: usize, time: Duration) -> Outcome<Summary> {
    let listener = Listener::bind(SocketAddr::new(address, 0))?;
    let meeting = listener.local_address();
    let ended = AtomicBool::new(false);
    let over = &ended;
    std::thread::scope(|scope| {
        let far = std::thread::Builder::new().name("floor".into()).spawn_scoped(
            scope,
            move || -> Outcome<()> {
                let request = listener.request(soon())?.ok_or("nobody connected")?.open()?;
                let (ring, private) = ring(request.domain(), len)?;
                let mut end = End::new(request.accept(&SETTINGS, &private, soon())?, ring, len)?;
                end.answer(over)
            },
        )?;
        let measured = near(meeting, len, time);
        over.store(true, Ordering::Relaxed);
        let answered = far.join().expect("the answering thread does not panic");
        let summary = measured?;
        answered?;
        Ok(summary)
    })
}

fn near(meeting: SocketAddr, len: usize, time: Duration) -> Outcome<Summary> {
    let resolved = Resolved::new(None, meeting, soon())?;
    let (ring, private) = ring(resolved.domain(), len)?;
    let mut end = End::new(resolved.connect(&SETTINGS, &private, soon())?, ring, len)?;
    let mut recorder = Recorder::new(len);
    let start = Instant::now();
    let (warm, finish) = (start + time / 10, start + time / 10 + time);
    let (mut warming, mut now) = (true, start);
    while now < finish {
        if warming && now >= warm {
            warming = false;
            recorder.restart();
        }
        let began = now;
        end.write(len)?;
        end.await_message()?;
        now = Instant::now();
        recorder.record(now - began);
    }
    Ok(recorder.finish())
}

fn soon() -> Instant {
    Instant::now() + CONNECT_TIMEOUT
}

/// A registered ring that a write of `len` bytes fits in, and what to tell the peer of it.
fn ring(domain: &Domain, len: usize) -> Outcome<(Region, [u8; PRIVATE_LEN])> {
    let region = Region::ring(domain, &memory(len)?)?;
    let mut private = [0; PRIVATE_LEN];
    private[..8].copy_from_slice(&region.address().to_le_bytes());
    private[8..].copy_from_slice(&region.remote_key().to_le_bytes());
    Ok((region, private))
}

fn memory(len: usize) -> Outcome<Span> {
    let span = Mapping::anonymous(len)?.span(0, len);
    span.fill_zero();
    Ok(span)
}

impl End {
    fn new(established: Established, ring: Region, len: usize) -> Outcome<Self> {
        let Established { queue_pair, private } = established;
        let private = private.first_chunk::<PRIVATE_LEN>().ok_or("the other end said too little")?;
        let [address, key] = [&private[..8], &private[8..]];
        let peer = Target {
            address: u64::from_le_bytes(address.try_into()?),
            key: u32::from_le_bytes(key.try_into()?),
        };
        let source = Region::source(queue_pair.domain(), &memory(len)?)?;
        let room = [Completion::Done { id: 0 }; 16];
        Ok(Self { queue_pair, peer, source, _ring: ring, room, posted: 0, done: 0 })
    }

    fn write(&mut self, len: usize) -> Outcome<()> {
        self.posted += 1;
        let piece = Piece { region: &self.source, offset: 0, len };
        self.queue_pair.write(&[piece], self.peer, Some(0), self.posted, true);
        Ok(self.queue_pair.ring_doorbell()?)
    }

    /// Polls once. Returns whether anything but a request's own completion was there.
    fn poll(&mut self) -> Outcome<Option<Completion>> {
        let taken = self.queue_pair.poll(&mut self.room)?;
        let mut heard = None;
        for completion in &self.room[..taken] {
            match completion {
                Completion::Done { id } => self.done = *id,
                other if heard.is_none() => heard = Some(*other),
                other => return Err(format!("{other:?} came along with {heard:?}").into()),
            }
        }
        Ok(heard)
    }

    fn await_message(&mut self) -> Outcome<()> {
        let mut turns = 0_u32;
        let start = Instant::now();
        loop {
            match self.poll()? {
                Some(Completion::Message { .. }) => return Ok(()),
                Some(other) => return Err(format!("{other:?} instead of an answer").into()),
                None => std::hint::spin_loop(),
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(1024) && start.elapsed() > ANSWER_TIMEOUT {
                return Err(format!("no answer within {ANSWER_TIMEOUT:?}").into());
            }
        }
    }

    /// The far end's part, until it is over.
    fn answer(&mut self, over: &AtomicBool) -> Outcome<()> {
        while !over.load(Ordering::Relaxed) {
            match self.poll() {
                Ok(Some(Completion::Placed { .. })) => {
                    self.posted += 1;
                    self.queue_pair.send(&[0x5a; MESSAGE_LEN], self.posted, true);
                    self.queue_pair.ring_doorbell()?;
                }
                Ok(Some(other)) => return Err(format!("{other:?} instead of a write").into()),
                Ok(None) => std::hint::spin_loop(),
                // The near end closes when it has measured enough.
                Err(_) if self.posted > 0 => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Two joined ends of the mirror's own link, over the device that has `address`.
pub(crate) fn links(address: IpAddr) -> Outcome<[Box<dyn Link>; 2]> {
    let [near, far] = setup::both_ends(address, usize::try_from(RDMA_RING_LEN)?, CONNECT_TIMEOUT)?;
    Ok([link(near)?, link(far)?])
}

fn link(connected: Connected) -> Outcome<Box<dyn Link>> {
    let Connected { endpoint, ring, receives, peer_ring_len, peer_receives } = connected;
    let joined = Joined {
        ring,
        receives,
        peer_ring_len,
        peer_receives,
        companion: None,
        registered_bytes_max: REGISTERED_BYTES_MAX,
    };
    Ok(Box::new(RdmaLink::new(endpoint, joined)?))
}
