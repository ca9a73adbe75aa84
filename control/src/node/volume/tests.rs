//! A task whose metadata cannot be stored any more.

use super::*;
use crate::admin;
use crate::config::Config;
use crate::node::registry::Phase;
use crate::role::{Found, Role, VolumeSettings};
use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::disk::metadata::create;
use costandby_datapath::disk::metadata::file::open_at;
use costandby_datapath::disk::metadata::layout::Geometry;
use costandby_datapath::disk::superblock::Location;
use costandby_datapath::reactor::command::VolumeSpec;
use costandby_datapath::reactor::{Reactor, ReactorConfig};
use costandby_datapath::units::{AckLevel, OnPeerLoss, PollMode};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

const SIZE: u64 = 1 << 20;
const CONFIG: &str = r#"
[nodes.alpha]
listen = "127.0.0.1:7790"
admin = "/nonexistent/alpha.sock"
nbd = ["unix:/nonexistent/alpha.nbd"]
[nodes.beta]
listen = "127.0.0.1:7791"
admin = "/nonexistent/beta.sock"
nbd = ["unix:/nonexistent/beta.nbd"]
[volumes.db]
size = "1MiB"
primary = "alpha"
link = "tcp"
disk.alpha = "memory:"
disk.beta = "/nonexistent/db"
"#;

/// A store in memory that takes no more writes.
fn sealed_store(superblock: &Superblock) -> SuperblockStore<FileMedium> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("meta", flags).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let medium = FileMedium::open(&path).expect("opens");
    let geometry = Geometry::for_volume(SIZE).expect("usual");
    create(&medium, 0, superblock, geometry, 1, false).expect("made");
    drop(medium);
    let location = Location { path, offset: 0 };
    let store = open_at(&location, "db", "alpha", SIZE).expect("opens").superblocks;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).expect("seals");
    store
}

fn task(superblock: Superblock, store: SuperblockStore<FileMedium>) -> (VolumeTask, Reactor) {
    let config = Config::parse(CONFIG, Path::new("c.toml")).expect("parses");
    let disk = DiskImage::memory("db", SIZE).expect("memory");
    let spec = VolumeSpec {
        checksum_first: false,
        name: "db".into(),
        disk,
        ack: AckLevel::Memory,
        on_peer_loss: OnPeerLoss::Continue,
        record: costandby_datapath::disk::record::Record::in_memory(SIZE),
    };
    let (events, _) = crossbeam_channel::unbounded();
    let reactor_config =
        ReactorConfig { poll: PollMode::Event, peer_timeout: Duration::from_secs(1), nbd_listeners: vec![] };
    let (reactor, handle) = Reactor::new(reactor_config, vec![spec], events).expect("starts");
    let settings = VolumeSettings {
        volume: "db".into(),
        node: "alpha".into(),
        peer: "beta".into(),
        configured_primary: true,
        on_peer_loss: OnPeerLoss::Continue,
        ack: AckLevel::Memory,
    };
    let mut next = 1000;
    let random = Box::new(move || {
        next += 1;
        next
    });
    let controller =
        VolumeController::new(settings, Found { superblock, dirty: false, boot: [1; 16] }, random);
    let (inbox, queue) = mpsc::unbounded_channel();
    let volume = config.volume("db").expect("there").clone();
    let peer = volume.peer_of("alpha").expect("two nodes").clone();
    let shared = Arc::new(Shared::new(volume, peer, controller.status(), Phase::Open(0), inbox));
    let surroundings = Surroundings {
        route: Route::to("beta", ([127, 0, 0, 1], 1).into(), "alpha", Arc::default()),
        command_line: "costandby --config f --node alpha".into(),
        node: "alpha".into(),
        local: [127, 0, 0, 1].into(),
        rdma: crate::node::rdma::setup(0, &crate::node::rdma::Makers::default()),
        settings: Settings::new(),
    };
    (VolumeTask::new(0, shared, controller, Some(store), handle, queue, surroundings), reactor)
}

#[tokio::test]
async fn an_operator_hears_that_a_promotion_could_not_be_put_on_record() {
    let superblock = Superblock::fresh("db", "alpha", SIZE, true);
    let store = sealed_store(&superblock);
    let (mut task, _reactor) = task(superblock, store);
    let (reply, mut answer) = oneshot::channel();
    let asked = admin::Asked::default();
    task.take(Input::Admin { command: admin::Command::Promote { force: true }, asked, reply }).await;
    let text = answer.try_recv().expect("answered").expect_err("refused");
    assert!(text.contains("cannot be stored"), "{text}");
    assert_eq!(task.shared.status.lock().expect("nobody panics with it").role, Role::Standby);
}
