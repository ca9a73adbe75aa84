//! A program that embeds the datapath: two nodes in one process, joined by TCP over loopback, and a client that writes to
//! the primary without NBD and without the daemon.
//!
//! ```sh
//! cargo run -p costandby-datapath --example two_nodes
//! ```
//!
//! What is missing here is `control`: nothing decides who may be primary, nothing is stored about the disks, and a lost link
//! is not dialled again. The daemon adds all that by sending the same commands.

use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::disk::record::Record;
use costandby_datapath::front::queue::{Completion, Operation, OperationKind, QueueClient, queue};
use costandby_datapath::limits::RING_LEN;
use costandby_datapath::reactor::command::{Before, Command, Direction, VolumeSpec};
use costandby_datapath::reactor::{Reactor, ReactorConfig, ReactorHandle};
use costandby_datapath::transport::tcp::TcpLink;
use costandby_datapath::units::{AckLevel, ByteRange, Epoch, OnPeerLoss, PollMode};
use std::error::Error;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

type Outcome<T> = Result<T, Box<dyn Error>>;

const SIZE: u64 = 16 << 20;
const BLOCK_LEN: usize = 4096;

/// Operations that the client may have open at a time.
const DEPTH: usize = 8;

/// A node: a disk in memory, and a reactor on a thread of its own.
struct Node {
    disk: Arc<DiskImage>,
    handle: ReactorHandle,
    thread: JoinHandle<()>,
}

/// Starts a node with one volume and gives it its end of the link.
fn node(direction: Direction, stream: TcpStream) -> Outcome<Node> {
    let disk = DiskImage::memory("example", SIZE)?;
    let volume = VolumeSpec {
        name: "example".into(),
        disk: Arc::clone(&disk),
        ack: AckLevel::Memory,
        on_peer_loss: OnPeerLoss::Freeze,
        checksum_first: false,
        // Activity log and dirty bitmap, kept in memory only.
        record: Record::in_memory(SIZE),
    };
    let config = ReactorConfig {
        poll: PollMode::Adaptive,
        peer_timeout: Duration::from_secs(10),
        nbd_listeners: Vec::new(),
    };
    // The receiver would hear of lost links and failed disks. This program ends too soon for either.
    let (events, _) = crossbeam_channel::unbounded();
    let (reactor, handle) = Reactor::new(config, vec![volume], events)?;
    let thread = std::thread::Builder::new().name("reactor".into()).spawn(move || reactor.run())?;

    stream.set_nonblocking(true)?;
    let ring_len = usize::try_from(RING_LEN)?;
    let link = Box::new(TcpLink::new(stream, ring_len, ring_len)?);
    handle.send(Command::Session { volume: 0, before: Before::Unknown, link, direction, epoch: Epoch(1) });
    Ok(Node { disk, handle, thread })
}

/// Hands one operation over and waits for its completion.
fn carry_out(client: &mut QueueClient, operation: Operation) -> Outcome<Completion> {
    client.submit(operation)?;
    let completion = client.wait(Duration::from_secs(30)).ok_or("no completion within 30 s")?;
    completion.result?;
    Ok(completion)
}

fn main() -> Outcome<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;

    let standby = node(Direction::Target { resync: false }, far)?;
    let primary = node(Direction::Source { resync: false }, near)?;

    let (mut client, server) = queue(DEPTH, primary.handle.waker())?;
    primary.handle.send(Command::Serve { volume: 0 });
    primary.handle.send(Command::Attach { volume: 0, queue: server });

    // At `memory` a completion says that the write is in both nodes' memory, checked and applied.
    let write = Operation {
        tag: 1,
        kind: OperationKind::Write,
        offset: 0,
        len: BLOCK_LEN as u64,
        fua: false,
        buffer: vec![0xab; BLOCK_LEN],
    };
    let written = carry_out(&mut client, write)?;

    let mut at_standby = vec![0; BLOCK_LEN];
    standby.disk.span(ByteRange::new(0, BLOCK_LEN as u64)).read_into(&mut at_standby);
    if at_standby != written.buffer {
        return Err("the standby's disk does not hold what was acknowledged".into());
    }
    println!("{BLOCK_LEN} bytes were acknowledged, and the standby's disk holds them");

    // A flush makes everything acknowledged before durable on both disks.
    let flush =
        Operation { tag: 2, kind: OperationKind::Flush, offset: 0, len: 0, fua: false, buffer: Vec::new() };
    carry_out(&mut client, flush)?;
    println!("flushed on both nodes");

    for node in [primary, standby] {
        node.handle.send(Command::Shutdown);
        node.thread.join().map_err(|_| "the reactor panicked")?;
    }
    Ok(())
}

/// Cargo.toml has examples tested, so that what this one shows stays true.
#[test]
fn the_program_runs_to_its_end() {
    main().expect("the program succeeds");
}
