//! Two reactors joined by an RDMA link, in each way of waiting: a write is answered at once, since each sleeper is woken.
//!
//! The peer timeout is long, so that keep-alives, which would wake a reactor too, cannot stand in for a wake-up that was
//! lost. Over endpoints in memory everywhere, and over a real device where `COSTANDBY_RDMA_ADDRESS` names one.

use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::front::queue::{Operation, OperationKind, QueueClient, queue};
use costandby_datapath::reactor::command::{Before, Command, Direction, VolumeSpec};
use costandby_datapath::reactor::{Reactor, ReactorConfig, ReactorHandle};
use costandby_datapath::testing::fake_rdma::{self, Manner};
use costandby_datapath::transport::Link;
use costandby_datapath::units::{AckLevel, Epoch, OnPeerLoss, PollMode};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
const RING_LEN: usize = 64 << 20;
const WRITES: u64 = 200;

/// A lost wake-up costs a quarter of this.
const PEER_TIMEOUT: Duration = Duration::from_secs(480);

/// What all writes may take together, emulated processors included.
const PATIENCE: Duration = Duration::from_secs(100);

struct Node {
    handle: ReactorHandle,
    thread: Option<JoinHandle<()>>,
    disk: Arc<DiskImage>,
}

impl Node {
    fn new(poll: PollMode, link: Box<dyn Link>, direction: Direction) -> Self {
        let disk = DiskImage::memory("rdma", SIZE).expect("memory");
        let spec = VolumeSpec {
            checksum_first: false,
            name: "v".to_owned(),
            disk: Arc::clone(&disk),
            ack: AckLevel::Memory,
            on_peer_loss: OnPeerLoss::Continue,
            record: costandby_datapath::disk::record::Record::in_memory(SIZE),
        };
        let config = ReactorConfig { poll, peer_timeout: PEER_TIMEOUT, nbd_listeners: Vec::new() };
        let (events, _) = crossbeam_channel::unbounded();
        let (reactor, handle) = Reactor::new(config, vec![spec], events).expect("reactor");
        handle.send(Command::Session {
            volume: 0,
            before: Before::Unknown,
            link,
            direction,
            epoch: Epoch(1),
        });
        let thread = Some(std::thread::spawn(move || reactor.run()));
        Self { handle, thread, disk }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.handle.send(Command::Shutdown);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

fn write(client: &mut QueueClient, number: u64) {
    let operation = Operation {
        tag: number,
        kind: OperationKind::Write,
        offset: number * 4096 % SIZE,
        len: 4096,
        fua: false,
        buffer: vec![number.to_le_bytes()[0]; 4096],
    };
    client.submit(operation).expect("one at a time");
    let completion = client.wait(PATIENCE).expect("an answer in time");
    assert_eq!((completion.tag, completion.result), (number, Ok(())));
}

/// Every few writes both nodes have time to fall asleep.
fn writes_are_answered(poll: PollMode, (here, there): (Box<dyn Link>, Box<dyn Link>)) {
    let standby = Node::new(poll, there, Direction::Target { resync: false });
    let primary = Node::new(poll, here, Direction::Source { resync: false });
    let (mut client, server) = queue(4, primary.handle.waker()).expect("a queue");
    primary.handle.send(Command::Serve { volume: 0 });
    primary.handle.send(Command::Attach { volume: 0, queue: server });
    let begun = Instant::now();
    for number in 0..WRITES {
        if number % 20 == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        write(&mut client, number);
    }
    assert!(begun.elapsed() < PATIENCE, "{:?} for {WRITES} writes", begun.elapsed());
    for offset in (0..WRITES * 4096).step_by(4096) {
        let range = costandby_datapath::units::ByteRange::new(offset, 4096);
        assert_eq!(standby.disk.span(range).crc32c(), primary.disk.span(range).crc32c(), "at {offset}");
    }
}

const MODES: [PollMode; 3] = [PollMode::Event, PollMode::Adaptive, PollMode::Busy];

#[test]
fn rdma_wakes_each_sleeper_in_memory() {
    for poll in MODES {
        let (here, there) = fake_rdma::pair(RING_LEN, Manner::default()).expect("memory");
        writes_are_answered(poll, (Box::new(here), Box::new(there)));
    }
}

#[cfg(feature = "rdma")]
#[test]
fn rdma_wakes_each_sleeper_on_a_device() {
    use costandby_datapath::transport::rdma::setup::{Connected, both_ends};
    use costandby_datapath::transport::rdma::{Joined, RdmaLink};
    use costandby_ffi::testing::skip_outside_rig;

    fn link(connected: Connected) -> Box<dyn Link> {
        let Connected { endpoint, ring, receives, peer_ring_len, peer_receives } = connected;
        let registered_bytes_max = 1 << 30;
        let joined =
            Joined { ring, receives, peer_ring_len, peer_receives, companion: None, registered_bytes_max };
        Box::new(RdmaLink::new(endpoint, joined).expect("link"))
    }

    let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
        skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
        return;
    };
    let address = address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address");
    for poll in MODES {
        let [here, there] = both_ends(address, RING_LEN, PATIENCE).expect("connected");
        writes_are_answered(poll, (link(here), link(there)));
    }
}
