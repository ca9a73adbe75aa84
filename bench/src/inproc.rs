//! Mirrored writes in process: a queue client, a primary's reactor and a standby's reactor over a link of this machine.
//!
//! In busy mode the client drives the primary's reactor on its own thread and the standby has the other, as a program
//! that embeds the datapath would; in the sleeping modes all three have threads of their own. After every run both
//! disks are compared byte for byte, and every block with the last write that was made to it.

use crate::Outcome;
use crate::floor::tcp_pair;
use crate::histogram::{Recorder, Summary};
use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::front::queue::{Completion, Operation, OperationKind, QueueClient, queue};
use costandby_datapath::limits::RING_LEN;
use costandby_datapath::reactor::command::{Before, Command, Direction, Event, VolumeSpec};
use costandby_datapath::reactor::{Reactor, ReactorConfig, ReactorHandle};
use costandby_datapath::transport::Link;
use costandby_datapath::transport::tcp::TcpLink;
use costandby_datapath::units::{AckLevel, ByteRange, Epoch, OnPeerLoss, PollMode};
use crossbeam_channel::{Receiver, unbounded};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Silence after which an end gives the other up: long, so that a machine that stalls spoils a number and not the run.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for one completion before the run counts as hung.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(20);

/// What stands behind the disks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Backing {
    /// Memory files.
    Memory,
    /// Files in this directory.
    Files(PathBuf),
}

/// What carries the frames, between two ends on this machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Via {
    /// TCP over this address.
    Tcp(IpAddr),
    /// RDMA over the device that has this address.
    #[cfg(feature = "rdma")]
    Rdma(IpAddr),
}

impl Via {
    /// TCP over loopback.
    pub(crate) const LOOPBACK: Self = Self::Tcp(IpAddr::V4(Ipv4Addr::LOCALHOST));

    /// Two joined ends.
    fn links(self) -> Outcome<[Box<dyn Link>; 2]> {
        match self {
            Self::Tcp(address) => {
                let (near, far) = tcp_pair(address)?;
                let ring_len = usize::try_from(RING_LEN)?;
                let mut links: Vec<Box<dyn Link>> = Vec::new();
                for stream in [near, far] {
                    stream.set_nonblocking(true)?;
                    links.push(Box::new(TcpLink::new(stream, ring_len, ring_len)?));
                }
                links.try_into().map_err(|_| "two ends".into())
            }
            #[cfg(feature = "rdma")]
            Self::Rdma(address) => crate::verbs::links(address),
        }
    }
}

/// One load.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) via: Via,
    pub(crate) poll: PollMode,
    pub(crate) depth: usize,
    pub(crate) payload_len: usize,
    /// Random offsets, else one after the other.
    pub(crate) random: bool,
    pub(crate) backing: Backing,
    pub(crate) disk_len: u64,
    /// How long, a tenth of it for warming up before.
    pub(crate) time: Duration,
}

/// Runs the load and checks both disks.
pub(crate) fn run(load: &Load) -> Outcome<Summary> {
    let mut pair = Pair::start(load)?;
    let mut client = Client::new(load);
    let summary = client.drive(&mut pair)?;
    let disks = pair.stop()?;
    client.check(&disks)?;
    Ok(summary)
}

/// A disk of `len` bytes with every page in place, so that no first touch is measured.
pub(crate) fn prepared_disk(backing: &Backing, name: &str, len: u64) -> Outcome<Arc<DiskImage>> {
    let disk = match backing {
        Backing::Memory => DiskImage::memory(name, len)?,
        Backing::Files(directory) => {
            let path = directory.join(name);
            allocate(&path, len)?;
            DiskImage::open(&path, len)?
        }
    };
    disk.span(ByteRange::new(0, len)).fill_zero();
    disk.flush()?;
    Ok(disk)
}

/// Makes a file with all its blocks.
pub(crate) fn allocate(path: &Path, len: u64) -> Outcome<()> {
    let file = std::fs::File::create(path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len)?;
    Ok(())
}

/// One node: its reactor, driven here or by a thread.
struct Node {
    handle: ReactorHandle,
    here: Option<Reactor>,
    thread: Option<JoinHandle<()>>,
    events: Receiver<Event>,
}

impl Node {
    fn start(disk: &Arc<DiskImage>, link: Box<dyn Link>, primary: bool, load: &Load) -> Outcome<Self> {
        let spec = VolumeSpec {
            checksum_first: false,
            name: "bench".into(),
            disk: Arc::clone(disk),
            ack: AckLevel::Memory,
            on_peer_loss: OnPeerLoss::Freeze,
            record: costandby_datapath::disk::record::Record::in_memory(disk.size()),
        };
        let (sender, events) = unbounded();
        let config = ReactorConfig { poll: load.poll, peer_timeout: PEER_TIMEOUT, nbd_listeners: Vec::new() };
        let (reactor, handle) = Reactor::new(config, vec![spec], sender)?;
        let direction =
            if primary { Direction::Source { resync: false } } else { Direction::Target { resync: false } };
        handle.send(Command::Session {
            volume: 0,
            before: Before::Unknown,
            link,
            direction,
            epoch: Epoch(1),
        });
        let mut node = Self { handle, here: None, thread: None, events };
        if primary && load.poll == PollMode::Busy {
            node.here = Some(reactor);
        } else {
            let name = if primary { "primary" } else { "standby" };
            node.thread = Some(std::thread::Builder::new().name(name.into()).spawn(move || reactor.run())?);
        }
        Ok(node)
    }

    fn stop(&mut self) -> Outcome<()> {
        self.handle.send(Command::Shutdown);
        self.here = None;
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| "a reactor panicked")?;
        }
        // The end of the session is expected now; anything else means that the run measured something else.
        for event in self.events.try_iter() {
            if !matches!(event, Event::Stopped | Event::LinkDown { .. } | Event::Settled { .. }) {
                return Err(format!("during the run a node said {event:?}").into());
            }
        }
        Ok(())
    }
}

/// Two nodes, one volume.
struct Pair {
    primary: Node,
    standby: Node,
    queue: QueueClient,
    disks: [Arc<DiskImage>; 2],
}

impl Pair {
    fn start(load: &Load) -> Outcome<Self> {
        let disks = [
            prepared_disk(&load.backing, "primary.img", load.disk_len)?,
            prepared_disk(&load.backing, "standby.img", load.disk_len)?,
        ];
        let [near, far] = load.via.links()?;
        let standby = Node::start(&disks[1], far, false, load)?;
        let primary = Node::start(&disks[0], near, true, load)?;
        let (client, server) = queue(load.depth, primary.handle.waker())?;
        primary.handle.send(Command::Serve { volume: 0 });
        primary.handle.send(Command::Attach { volume: 0, queue: server });
        let mut pair = Self { primary, standby, queue: client, disks };
        if let Some(reactor) = &mut pair.primary.here {
            reactor.turn();
        }
        Ok(pair)
    }

    /// The next completion, if one is here after a turn or a sleep.
    fn completion(&mut self) -> Option<Completion> {
        match &mut self.primary.here {
            None => self.queue.wait(Duration::from_millis(100)),
            Some(reactor) => self.queue.poll().or_else(|| {
                if !reactor.turn() {
                    std::hint::spin_loop();
                }
                self.queue.poll()
            }),
        }
    }

    /// Ends both nodes and gives the disks back.
    fn stop(mut self) -> Outcome<[Arc<DiskImage>; 2]> {
        self.primary.stop()?;
        self.standby.stop()?;
        Ok(self.disks)
    }
}

/// The writer. Each write stamps the first bytes of its block with its number.
struct Client {
    payload_len: usize,
    random: bool,
    blocks: u64,
    time: Duration,
    spare: Vec<Vec<u8>>,
    began: Vec<Instant>,
    depth: usize,
    recorder: Recorder,
    number: u64,
    seed: u64,
    /// Number of the last write to each block.
    last: Vec<u64>,
}

impl Client {
    fn new(load: &Load) -> Self {
        let blocks = load.disk_len / load.payload_len as u64;
        Self {
            payload_len: load.payload_len,
            random: load.random,
            blocks,
            time: load.time,
            spare: (0..load.depth).map(|_| vec![0xa5; load.payload_len]).collect(),
            began: vec![Instant::now(); load.depth],
            depth: load.depth,
            recorder: Recorder::new(load.payload_len),
            number: 0,
            seed: 0x9e37_79b9_7f4a_7c15,
            last: vec![0; usize::try_from(blocks).expect("64-bit")],
        }
    }

    fn drive(&mut self, pair: &mut Pair) -> Outcome<Summary> {
        let start = Instant::now();
        let (warm, end) = (start + self.time / 10, start + self.time / 10 + self.time);
        let mut warming = true;
        let mut heard = start;
        let mut free: Vec<u64> = (0..self.depth as u64).collect();
        let mut summary = None;
        loop {
            if summary.is_none() && heard >= end {
                summary = Some(self.recorder.finish());
            }
            if summary.is_none() {
                while let Some(slot) = free.pop() {
                    self.submit(slot, pair)?;
                }
            } else if free.len() == self.depth {
                break;
            }
            let Some(completion) = pair.completion() else {
                if heard.elapsed() > COMPLETION_TIMEOUT {
                    return Err(format!("no completion within {COMPLETION_TIMEOUT:?}").into());
                }
                continue;
            };
            heard = Instant::now();
            free.push(completion.tag);
            self.take(completion, heard)?;
            while let Some(completion) = pair.queue.poll() {
                free.push(completion.tag);
                self.take(completion, heard)?;
            }
            if warming && heard >= warm {
                warming = false;
                self.recorder.restart();
            }
        }
        Ok(summary.expect("set before the loop ends"))
    }

    fn submit(&mut self, slot: u64, pair: &mut Pair) -> Outcome<()> {
        let mut buffer = self.spare.pop().expect("a buffer for each slot");
        self.number += 1;
        let block = if self.random { self.next_random() % self.blocks } else { self.number % self.blocks };
        buffer[..8].copy_from_slice(&self.number.to_le_bytes());
        self.last[usize::try_from(block)?] = self.number;
        let len = self.payload_len as u64;
        self.began[usize::try_from(slot)?] = Instant::now();
        let operation =
            Operation { tag: slot, kind: OperationKind::Write, offset: block * len, len, fua: false, buffer };
        pair.queue.submit(operation).map_err(|full| full.to_string().into())
    }

    fn take(&mut self, completion: Completion, now: Instant) -> Outcome<()> {
        completion.result?;
        self.recorder.record(now - self.began[usize::try_from(completion.tag)?]);
        self.spare.push(completion.buffer);
        Ok(())
    }

    /// Xorshift: enough to scatter offsets.
    fn next_random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed >> 11
    }

    /// Both disks hold each block's last write, and the same bytes everywhere.
    fn check(&self, disks: &[Arc<DiskImage>; 2]) -> Outcome<()> {
        let mut blocks = [vec![0; self.payload_len], vec![0; self.payload_len]];
        for (at, &number) in self.last.iter().enumerate() {
            let range = ByteRange::new(at as u64 * self.payload_len as u64, self.payload_len as u64);
            for (block, disk) in blocks.iter_mut().zip(disks) {
                disk.span(range).read_into(block);
            }
            if blocks[0] != blocks[1] {
                return Err(format!("the disks differ in bytes {range}").into());
            }
            if blocks[0][..8] != number.to_le_bytes() {
                return Err(
                    format!("bytes {range} do not hold write {number}, the last one made to them").into()
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(poll: PollMode, depth: usize) -> Load {
        Load {
            via: Via::LOOPBACK,
            poll,
            depth,
            payload_len: 4096,
            random: true,
            backing: Backing::Memory,
            disk_len: 64 * 4096,
            time: Duration::from_millis(200),
        }
    }

    #[test]
    fn every_poll_mode_mirrors() {
        for poll in [PollMode::Busy, PollMode::Adaptive, PollMode::Event] {
            for depth in [1, 32] {
                let summary = run(&load(poll, depth)).expect("a run");
                assert!(summary.requests > 0, "{poll:?} {depth}");
            }
        }
    }

    #[test]
    fn the_check_finds_a_wrong_byte_and_a_lost_write() {
        let load = load(PollMode::Busy, 1);
        let disks = [0, 1].map(|_| prepared_disk(&Backing::Memory, "check", load.disk_len).expect("memory"));
        let mut client = Client::new(&load);
        client.check(&disks).expect("both are empty");
        client.last[3] = 7;
        assert!(client.check(&disks).unwrap_err().to_string().contains("write 7"));
        disks[1].span(ByteRange::new(5 * 4096 + 100, 1)).write_from(&[1]);
        client.last[3] = 0;
        assert!(client.check(&disks).unwrap_err().to_string().contains("differ"));
    }
}
