//! Clients that are idle when all connections are in use, that have come back, and whose host is gone.

use super::*;
use crate::disk::image::DiskImage;
use crate::disk::record::Record;
use crate::reactor::ReactorConfig;
use crate::reactor::command::{Command, VolumeSpec};
use crate::units::{AckLevel, OnPeerLoss, PollMode};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};

const WRITE: u8 = 1;

/// A reactor of one volume that serves and has no peer: its writes land and are not answered.
struct Site {
    reactor: Reactor,
    handle: crate::reactor::ReactorHandle,
    dir: tempfile::TempDir,
}

impl Site {
    fn new(connections_max: usize) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("nbd")).expect("bound");
        listener.set_nonblocking(true).expect("set");
        let disk = DiskImage::memory("test", 1 << 20).expect("memory");
        let spec = VolumeSpec {
            name: "v".into(),
            record: Record::in_memory(disk.size()),
            disk,
            ack: AckLevel::Memory,
            on_peer_loss: OnPeerLoss::Continue,
            checksum_first: false,
        };
        let config = ReactorConfig {
            poll: PollMode::Event,
            peer_timeout: Duration::from_secs(1),
            nbd_listeners: vec![listener.into()],
        };
        let (events, _) = crossbeam_channel::unbounded();
        let (reactor, handle) = Reactor::new(config, vec![spec], events).expect("a reactor");
        let reactor = reactor.with_connections_max(connections_max);
        handle.send(Command::Serve { volume: 0 });
        Self { reactor, handle, dir }
    }

    fn turn(&mut self) {
        for _ in 0..20 {
            self.reactor.turn();
        }
    }

    /// A client that has opened the volume.
    fn client(&mut self) -> UnixStream {
        let mut client = UnixStream::connect(self.dir.path().join("nbd")).expect("connects");
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0\x01v");
        client.write_all(&hello).expect("sends");
        self.turn();
        client.read_exact(&mut [0; 28]).expect("the volume is open");
        client.set_nonblocking(true).expect("set");
        client
    }
}

fn write(client: &mut UnixStream, cookie: u64, offset: u64) {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0, 0, WRITE]);
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, 1, 0xAB]);
    client.write_all(&bytes).expect("sends");
}

/// Cookies of the replies that are there, and whether the stream has ended.
fn replies(client: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let ended = match client.read_to_end(&mut bytes) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    };
    (bytes.chunks(16).map(|reply| reply[15]).collect(), ended)
}

#[test]
fn a_client_that_is_idle_for_long_makes_room_and_no_other() {
    let mut site = Site::new(2);
    let (mut busy, _idle) = (site.client(), site.client());
    write(&mut busy, 1, 0);
    site.turn();
    let now = Instant::now();
    let long = Duration::from_secs(CLIENT_IDLE_S);
    assert!(!site.reactor.has_place(now + long / 2));
    assert!(site.reactor.has_place(now + long));
    assert_eq!(site.reactor.connections_len, 1);
    assert!(site.reactor.connections[0].is_some(), "a reply is owed to the other");
    let _third = site.client();
    assert!(!site.reactor.has_place(now + long / 2));
}

#[test]
fn a_client_that_comes_back_finds_nothing_of_a_half_closed_connection_begun_later() {
    for also_opens in [false, true] {
        let mut site = Site::new(10);
        let (mut first, mut second) = (site.client(), site.client());
        write(&mut first, 1, 0);
        site.turn();
        // It waits for the range of the first, and is half-closed.
        write(&mut second, 2, 0);
        second.shutdown(Shutdown::Write).expect("half-closed");
        site.turn();
        let _third = also_opens.then(|| site.client());
        site.handle.send(Command::GoAlone { volume: 0 });
        site.turn();
        let expected = if also_opens { vec![] } else { vec![2] };
        assert_eq!(replies(&mut second), (expected, true), "another opened the volume: {also_opens}");
        assert_eq!(replies(&mut first), (vec![1], false));
    }
}

#[test]
fn what_a_half_closed_connection_has_not_read_is_not_read_once_another_changes_something() {
    let mut site = Site::new(10);
    let (mut first, mut second) = (site.client(), site.client());
    write(&mut first, 1, 0);
    site.turn();
    write(&mut second, 2, 0);
    // Not taken yet, as the one before it waits.
    write(&mut second, 3, 512);
    second.shutdown(Shutdown::Write).expect("half-closed");
    site.turn();
    write(&mut first, 4, 1024);
    site.turn();
    site.handle.send(Command::GoAlone { volume: 0 });
    site.turn();
    assert_eq!(replies(&mut second), (vec![2], true));
    let mut told = replies(&mut first).0;
    told.sort_unstable();
    assert_eq!(told, [1, 4]);
}

#[test]
fn a_dead_host_is_noticed_within_a_minute_whether_replies_are_on_their_way_or_not() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let _client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
    let socket: OwnedFd = listener.accept().expect("a client").0.into();
    set_up(&socket);
    let user_timeout_ms = sockopt::tcp_user_timeout(&socket).expect("TCP");
    assert!((1..60_000).contains(&user_timeout_ms), "{user_timeout_ms} ms");
    let idle = sockopt::tcp_keepidle(&socket).expect("TCP");
    let step = sockopt::tcp_keepintvl(&socket).expect("TCP");
    let count = sockopt::tcp_keepcnt(&socket).expect("TCP");
    assert!(sockopt::socket_keepalive(&socket).expect("a socket"));
    assert!(idle + step * count < Duration::from_secs(60), "{idle:?}, {step:?}, {count}");
}
