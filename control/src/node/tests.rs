//! Two nodes in one process, each with its reactor, its volume's task and its peer port, and with RDMA played by memory:
//! which link their sessions take, what they say about it, and how a session comes to a better one.

use super::rdma::fake::{Fabric, FakeRdma, Script};
use super::*;
use crate::role::{Found, VolumeController};
use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::front::queue::{Operation, OperationKind, queue};
use costandby_datapath::reactor::command::VolumeSpec;
use costandby_datapath::units::{AckLevel, OnPeerLoss, PollMode};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use volume::VolumeTask;

const SIZE: u64 = 1 << 20;

/// How long anything here may take: many times what it does on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

struct TestNode {
    registry: Arc<Registry>,
    rdma: Arc<FakeRdma>,
    address: SocketAddr,
}

fn config(link: &str, ports: [u16; 2]) -> Config {
    let [alpha, beta] = ports;
    let text = format!(
        r#"
        nodes.alpha = {{ listen = "127.0.0.1:{alpha}", admin = "/nonexistent/alpha.sock" }}
        nodes.beta = {{ listen = "127.0.0.1:{beta}", admin = "/nonexistent/beta.sock" }}
        volumes.db = {{ size = {SIZE}, primary = "alpha", link = "{link}", disk.alpha = "memory:", disk.beta = "/nonexistent/db" }}
        "#
    );
    Config::parse(&text, Path::new("c.toml")).expect("good")
}

fn keys() -> Arc<Keyring> {
    use crate::secure::key::{KEY_LEN, Key, Keys};
    Arc::new(Keyring::fixed(Keys::one(Key::from_bytes([7; KEY_LEN]))))
}

async fn listener() -> (tokio::net::TcpListener, u16) {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

fn start(config: &Config, node: &str, listener: tokio::net::TcpListener, rdma: Arc<FakeRdma>) -> TestNode {
    let volume = config.volume("db").expect("there").clone();
    let disk = DiskImage::memory("db", SIZE).expect("memory");
    let (ack, on_peer_loss) = (AckLevel::Memory, OnPeerLoss::Continue);
    let spec = VolumeSpec {
        checksum_first: false,
        name: "db".into(),
        disk,
        ack,
        on_peer_loss,
        record: costandby_datapath::disk::record::Record::in_memory(SIZE),
    };
    let (sender, events) = crossbeam_channel::unbounded();
    let reactor_config =
        ReactorConfig { poll: PollMode::Event, peer_timeout: Duration::from_secs(5), nbd_listeners: vec![] };
    let (reactor, handle) = Reactor::new(reactor_config, Vec::new(), sender).expect("starts");
    std::thread::spawn(move || reactor.run());
    let peer = volume.peer_of(node).expect("two nodes").clone();
    let settings = VolumeSettings {
        volume: "db".into(),
        node: node.into(),
        peer: peer.as_str().into(),
        configured_primary: volume.primary.as_str() == node,
        on_peer_loss,
        ack,
    };
    let superblock = Superblock::fresh("db", node, SIZE, true);
    let found = Found { superblock, dirty: false, boot: [1; 16] };
    let controller = VolumeController::new(settings, found, random_source().expect("numbers"));
    let (inbox, queue) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared::new(volume, peer.clone(), controller.status(), Phase::Opening, inbox));
    let surroundings = Surroundings {
        route: Route::to(peer.as_str(), config.node(peer.as_str()).expect("there").listen, node, keys()),
        command_line: "costandby --config f --node alpha".into(),
        node: node.into(),
        local: [127, 0, 0, 1].into(),
        rdma: Arc::clone(&rdma) as Arc<dyn rdma::RdmaSetup>,
        settings: crate::compared::Settings::new(),
    };
    let task = VolumeTask::new(0, Arc::clone(&shared), controller, None, handle.clone(), queue, surroundings);
    let name = config.node(node).expect("there").name.clone();
    let registry = Arc::new(Registry::new(name, keys(), handle, vec![Arc::clone(&shared)]));
    let index = registry.admit(&shared, spec);
    *shared.phase.lock().expect("nobody panics with it") = Phase::Open(index);
    forward_events(events, &registry).expect("a thread");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(task.run());
    tokio::spawn(peers::accept(listener, Arc::clone(&registry)));
    TestNode { registry, rdma, address }
}

impl TestNode {
    fn status(&self) -> admin::VolumeStatus {
        status::volume_status(&self.registry, &self.registry.volumes[0])
    }

    fn send(&self, command: Command) {
        self.registry.reactor.send(command);
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.registry.reactor.send(Command::Shutdown);
    }
}

/// Alpha and beta, with these scripts of their RDMA.
async fn pair(link: &str, alpha: Script, beta: Script) -> [TestNode; 2] {
    let fabric = Fabric::default();
    let ((alpha_listener, alpha_port), (beta_listener, beta_port)) = (listener().await, listener().await);
    let config = config(link, [alpha_port, beta_port]);
    [
        start(&config, "alpha", alpha_listener, fabric.node(alpha)),
        start(&config, "beta", beta_listener, fabric.node(beta)),
    ]
}

/// Waits until both nodes' status is as wanted.
async fn both(nodes: &[TestNode; 2], what: &str, wanted: impl Fn(&admin::VolumeStatus) -> bool) {
    let began = Instant::now();
    while !nodes.iter().all(|node| wanted(&node.status())) {
        let [alpha, beta] = nodes.each_ref().map(TestNode::status);
        assert!(began.elapsed() < LIMIT, "not {what}: {alpha:?} {beta:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn over(link: &'static str) -> impl Fn(&admin::VolumeStatus) -> bool {
    move |status| status.in_sync() && status.link == link
}

fn no(why: &'static str) -> Script {
    Script { able: Some(why), ..Script::default() }
}

#[tokio::test]
async fn two_nodes_with_rdma_take_it_and_say_so() {
    let nodes = pair("auto", Script::default(), Script::default()).await;
    both(&nodes, "over RDMA", |status| over("rdma")(status) && status.link_note.is_none()).await;
}

#[tokio::test]
async fn a_session_over_tcp_goes_on_to_rdma_when_both_have_it_without_ending() {
    let nodes = pair("auto", Script::default(), no("no device")).await;
    both(&nodes, "over TCP", over("tcp")).await;
    for node in &nodes {
        assert_eq!(node.status().link_note.as_deref(), Some("beta has no RDMA: no device"));
    }
    let epoch = nodes[0].status().epoch;
    nodes[1].rdma.set(Script::default());
    both(&nodes, "over RDMA", |status| over("rdma")(status) && status.link_note.is_none()).await;
    assert_eq!(nodes[0].status().epoch, epoch);
    // It is a session like any other: its end is noticed, and the next one begins over RDMA.
    nodes[0].send(Command::CloseLink { volume: 0, reason: "a test" });
    both(&nodes, "over RDMA again", over("rdma")).await;
}

/// Writes one block after another through a queue until told to end, and gives how long each took.
fn write_on(node: &TestNode, end: Arc<AtomicBool>) -> std::thread::JoinHandle<Vec<Duration>> {
    let (mut client, server) = queue(1, node.registry.reactor.waker()).expect("a queue");
    node.send(Command::Attach { volume: 0, queue: server });
    std::thread::spawn(move || {
        let mut took = Vec::new();
        while !end.load(Ordering::Relaxed) {
            let tag = took.len() as u64;
            let offset = tag % (SIZE / 4096) * 4096;
            let buffer = vec![u8::try_from(tag % 251).expect("a byte"); 4096];
            let (kind, began) = (OperationKind::Write, Instant::now());
            client.submit(Operation { tag, kind, offset, len: 4096, fua: false, buffer }).expect("room");
            let done = client.wait(LIMIT).expect("answered");
            assert_eq!((done.tag, done.result), (tag, Ok(())));
            took.push(began.elapsed());
        }
        took
    })
}

/// Also the measure of how long a change of link holds up the writes: run with `--nocapture`.
#[tokio::test]
async fn a_change_of_link_under_load_is_the_going_on_of_the_session_after_a_short_pause() {
    let nodes = pair("auto", Script::default(), no("no device")).await;
    both(&nodes, "over TCP", over("tcp")).await;
    let told =
        |nodes: &[TestNode; 2]| nodes.each_ref().map(|node| (node.status().epoch, node.status().generation));
    let before = told(&nodes);
    let end = Arc::new(AtomicBool::new(false));
    let writer = write_on(&nodes[0], Arc::clone(&end));
    nodes[1].rdma.set(Script::default());
    both(&nodes, "over RDMA", |status| over("rdma")(status) && status.link_note.is_none()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    end.store(true, Ordering::Relaxed);
    let mut took = writer.join().expect("no panic");
    took.sort_unstable();
    let longest = took.last().copied().expect("some writes");
    println!("{} writes, the median took {:?}, the longest {longest:?}", took.len(), took[took.len() / 2]);
    assert!(longest < Duration::from_secs(2), "the change held a write up for {longest:?}");
    assert_eq!(told(&nodes), before, "no new generation: the same session went on");
    let moved =
        |node: &TestNode| node.registry.reactor.counters(0).resync_total_bytes.load(Ordering::Relaxed);
    assert_eq!(nodes.each_ref().map(moved), [0, 0], "nothing was copied");
}

#[tokio::test]
async fn rdma_that_cannot_connect_leaves_tcp_and_is_tried_again_over_the_session() {
    let unreachable = Script { dial: Some("no route"), ..Script::default() };
    let nodes = pair("auto", unreachable, Script::default()).await;
    both(&nodes, "over TCP", over("tcp")).await;
    for node in &nodes {
        let note = node.status().link_note.expect("a note");
        assert_eq!(note, "alpha could not connect by RDMA: no route");
    }
    nodes[0].rdma.set(Script::default());
    both(&nodes, "over RDMA", over("rdma")).await;
}

#[tokio::test]
async fn a_volume_set_to_rdma_waits_for_it_and_says_why() {
    let nodes = pair("rdma", no("no device"), Script::default()).await;
    both(&nodes, "refused", |status| {
        let wanted = "has link = \"rdma\" and nothing else, and alpha has no RDMA: no device";
        status.connection == "connecting"
            && status.link_note.as_deref().is_some_and(|note| note.contains(wanted))
    })
    .await;
    nodes[0].rdma.set(Script::default());
    both(&nodes, "over RDMA", over("rdma")).await;
    // An RDMA connection that breaks is made again, and nothing else.
    nodes[0].rdma.set(Script { dial: Some("no route"), ..Script::default() });
    nodes[1].send(Command::CloseLink { volume: 0, reason: "a test" });
    both(&nodes, "refused", |status| {
        status.link == "rdma"
            && status
                .link_note
                .as_deref()
                .is_some_and(|note| note.ends_with("could not connect by RDMA: no route"))
    })
    .await;
    nodes[0].rdma.set(Script::default());
    both(&nodes, "over RDMA again", over("rdma")).await;
}

#[tokio::test]
async fn a_question_for_rdma_that_comes_to_nothing_leaves_the_session_alone() {
    use crate::hello::{Ask, Message, Refuse, RefuseCode};
    let nodes = pair("auto", no("no device"), no("no device")).await;
    both(&nodes, "over TCP", over("tcp")).await;
    for (node, peer) in nodes.iter().zip(["beta", "alpha"]) {
        let name = if peer == "beta" { "alpha" } else { "beta" };
        let mut stream = Route::to(name, node.address, peer, keys()).connect().await.expect("proved");
        let ask = Ask { node: peer.into(), volume: "db".into(), rdma: true };
        connection::say(&mut stream, &Message::Ask(ask)).await.expect("said");
        let heard = connection::listen(&mut stream).await;
        // The dialler is asked by nobody; the acceptor has none.
        let wanted = if name == "alpha" { RefuseCode::Busy } else { RefuseCode::Link };
        assert!(matches!(&heard, Ok(Message::Refuse(Refuse { code, .. })) if *code == wanted), "{heard:?}");
    }
    both(&nodes, "over TCP still", over("tcp")).await;
}
