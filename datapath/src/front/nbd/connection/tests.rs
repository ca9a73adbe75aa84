//! Clients that drip, that use all the requests they may, and that were made to wait.

use super::*;
use crate::disk::image::DiskImage;
use crate::disk::pool::WorkerPool;
use crate::disk::record::Record;
use crate::disk::worker::DiskWorkers;
use crate::front::nbd::handshake::{ListedExport, Lookup};
use crate::front::nbd::linger::Lingering;
use crate::reactor::command::VolumeSpec;
use crate::units::{AckLevel, OnPeerLoss};
use crate::volume::Notice;
use crate::waker::Waker;
use std::io::{Read as _, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

const SIZE: u64 = 1 << 20;
const OPENED: Negotiated =
    Negotiated { size: SIZE, read_only: false, structured: false, base_allocation: false };

struct NoExports;

impl ExportDirectory for NoExports {
    fn lookup(&self, _: &str) -> Lookup {
        Lookup::Unknown
    }

    fn list(&self) -> Vec<ListedExport> {
        Vec::new()
    }
}

fn connected(now: Instant) -> (UnixStream, Connection) {
    let (client, server) = UnixStream::pair().expect("sockets");
    server.set_nonblocking(true).expect("set");
    (client, Connection::new(server.into(), 0, 1, now))
}

/// A volume that serves, has no peer, and is not on record as alone: writes land and are not answered.
fn waiting_volume() -> Volume {
    let disk = DiskImage::memory("test", SIZE).expect("memory");
    let (done, _) = crossbeam_channel::unbounded();
    let pool = WorkerPool::new(&done, &Waker::new().expect("bell"));
    let workers = DiskWorkers::in_pool(&pool, 0, &disk, None);
    let (ack, on_peer_loss) = (AckLevel::Memory, OnPeerLoss::Continue);
    let spec = VolumeSpec {
        name: "v".into(),
        record: Record::in_memory(disk.size()),
        disk,
        ack,
        on_peer_loss,
        checksum_first: false,
    };
    let mut volume = Volume::new(0, spec, workers, Instant::now());
    volume.serve();
    volume
}

/// A request of the command `kind` for one byte, without payload.
fn request(kind: u8, cookie: u64, offset: u64) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0, 0, kind]);
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&1u32.to_be_bytes());
    bytes
}

/// A write of one byte.
fn write_request(cookie: u64, offset: u64) -> Vec<u8> {
    let mut bytes = request(1, cookie, offset);
    bytes.push(0xAB);
    bytes
}

fn serve(connection: &mut Connection, volume: &mut Volume) {
    for _ in 0..20 {
        connection.ready(true, true, false);
        connection.service(volume, Instant::now()).expect("goes on");
        volume.pump(Instant::now());
    }
}

#[test]
fn dripping_does_not_lengthen_the_handshake() {
    let began = Instant::now();
    let (mut client, mut connection) = connected(began);
    for _ in 0..3 {
        client.write_all(&[0]).expect("sends");
        connection.ready(true, true, false);
        std::thread::sleep(Duration::from_millis(20));
        assert!(connection.negotiate(&NoExports).expect("goes on").is_none());
    }
    let limit = Duration::from_secs(HANDSHAKE_S_MAX);
    assert!(!connection.is_stalled(began + limit));
    assert!(connection.is_stalled(began + limit + Duration::from_millis(10)));
}

#[test]
fn the_last_request_a_client_may_open_gets_its_payload() {
    let (mut client, mut connection) = connected(Instant::now());
    let mut volume = waiting_volume();
    connection.open(0, OPENED);
    for n in 0..=CONNECTION_REQUESTS_MAX as u64 {
        client.write_all(&write_request(n, n)).expect("sends");
    }
    serve(&mut connection, &mut volume);
    assert_eq!(connection.open, CONNECTION_REQUESTS_MAX, "one more is not taken");
    let landed = volume.counters().in_flight.load(Ordering::Relaxed);
    assert_eq!(landed, CONNECTION_REQUESTS_MAX as u64, "all that were taken");
}

#[test]
fn a_client_is_not_blamed_for_the_time_it_was_made_to_wait() {
    let (mut client, mut connection) = connected(Instant::now());
    let mut volume = waiting_volume();
    connection.open(0, OPENED);
    client.write_all(&write_request(1, 0)).expect("sends");
    client.write_all(&write_request(2, 0)).expect("sends");
    serve(&mut connection, &mut volume);
    let asked = Instant::now();
    assert!(matches!(connection.input, Input::AwaitsLock { cookie: 2, .. }));
    std::thread::sleep(Duration::from_millis(50));
    volume.go_alone();
    volume.pump(Instant::now());
    for notice in std::mem::take(&mut volume.notices) {
        if let Notice::Granted { token, .. } = notice {
            connection.granted(token, &mut volume);
        }
    }
    assert!(matches!(connection.input, Input::Payload { cookie: 2, .. }));
    let limit = Duration::from_secs(PAYLOAD_STALL_S_MAX);
    assert!(!connection.is_stalled(asked + limit + Duration::from_millis(20)));
    assert!(connection.is_stalled(asked + limit + limit), "but for its own");
}

/// Replies that stand in the client's socket, each by its cookie and error, up to the end of the stream.
fn replies(client: &mut UnixStream) -> Vec<(u64, u32)> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).expect("the end of the stream");
    let greeting = bytes.drain(..18).take(8);
    assert_eq!(greeting.collect::<Vec<_>>(), b"NBDMAGIC");
    assert_eq!(bytes.len() % 16, 0, "whole simple replies");
    let be = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    bytes
        .chunks(16)
        .map(|reply| (be(&reply[8..]), u32::try_from(be(&reply[4..8])).expect("32 bits")))
        .collect()
}

/// As the reactor closes it, but for the waiting.
fn close(connection: Connection, volume: &mut Volume) {
    Lingering::default().add(connection.close(Some(volume)), Instant::now());
}

/// Serves until the connection is over, then closes it.
fn end(mut connection: Connection, volume: &mut Volume) {
    let began = Instant::now();
    loop {
        for notice in std::mem::take(&mut volume.notices) {
            if let Notice::Done { origin: Origin::Nbd { cookie, .. }, result } = notice {
                connection.done(cookie, result);
            }
        }
        connection.ready(true, true, false);
        if connection.service(volume, Instant::now()).is_err() {
            return close(connection, volume);
        }
        volume.pump(Instant::now());
        assert!(began.elapsed() < Duration::from_secs(10), "the connection never ends");
    }
}

#[test]
fn a_node_that_stops_serving_answers_what_was_admitted_and_nothing_else() {
    let (mut client, mut connection) = connected(Instant::now());
    let mut volume = waiting_volume();
    connection.open(0, OPENED);
    for n in 1..=3 {
        client.write_all(&write_request(n, n * 512)).expect("sends");
    }
    serve(&mut connection, &mut volume);
    assert_eq!(connection.open, 3, "admitted");
    // One whose payload is still on its way, and two behind it.
    let (head, payload) = (write_request(4, 4 * 512), write_request(5, 5 * 512));
    client.write_all(&head[..head.len() - 1]).expect("sends");
    serve(&mut connection, &mut volume);
    assert!(connection.in_payload());
    connection.leave(&mut volume);
    volume.quiesce();
    client.write_all(&payload).expect("sends");
    volume.go_alone();
    end(connection, &mut volume);
    assert_eq!(replies(&mut client), [(1, 0), (2, 0), (3, 0)], "an error would be final to a file system");
}

#[test]
fn a_request_that_comes_too_late_is_not_answered() {
    // Read, write, flush, cache, block status; one beyond the end of the disk, of an unknown command, and no request at all.
    let late = [
        request(0, 1, 0),
        write_request(1, 0),
        request(3, 1, 0),
        request(5, 1, 0),
        request(7, 1, 0),
        request(0, 1, SIZE),
        request(99, 1, 0),
        vec![0x55; REQUEST_LEN],
    ];
    for stop in [Volume::quiesce, Volume::stop_serving] {
        for late in &late {
            let (mut client, mut connection) = connected(Instant::now());
            let mut volume = waiting_volume();
            connection.open(0, Negotiated { base_allocation: true, structured: true, ..OPENED });
            stop(&mut volume);
            client.write_all(late).expect("sends");
            end(connection, &mut volume);
            assert_eq!(replies(&mut client), [], "{late:?}");
        }
    }
}

#[test]
fn what_cannot_be_finished_any_more_is_not_answered_either() {
    let (mut client, mut connection) = connected(Instant::now());
    let mut volume = waiting_volume();
    connection.open(0, OPENED);
    client.write_all(&write_request(1, 0)).expect("sends");
    client.write_all(&write_request(2, 0)).expect("sends");
    serve(&mut connection, &mut volume);
    assert_eq!(connection.open, 2, "one landed, one waits for the same range");
    volume.stop_serving();
    end(connection, &mut volume);
    assert_eq!(replies(&mut client), []);
}

#[test]
fn a_half_received_write_gives_its_range_back_when_the_node_stops_serving_at_once() {
    let (mut client, mut connection) = connected(Instant::now());
    let mut volume = waiting_volume();
    connection.open(0, OPENED);
    client.write_all(&write_request(1, 0)).expect("sends");
    let late = write_request(2, 4096);
    client.write_all(&late[..late.len() - 1]).expect("sends");
    serve(&mut connection, &mut volume);
    assert_eq!(connection.open, 2, "one waits for the peer, one for its payload");
    assert!(connection.in_payload());
    // As when a peer that serves deposes this node: no quiesce comes before.
    volume.stop_serving();
    for notice in std::mem::take(&mut volume.notices) {
        if let Notice::Done { origin: Origin::Nbd { cookie, .. }, result } = notice {
            connection.done(cookie, result);
        }
    }
    let _ = connection.service(&mut volume, Instant::now());
    close(connection, &mut volume);
    assert_eq!(replies(&mut client), []);

    volume.serve();
    volume.go_alone();
    let (mut client, mut connection) = connected(Instant::now());
    connection.open(0, OPENED);
    client.write_all(&write_request(3, 4096)).expect("sends");
    serve(&mut connection, &mut volume);
    for notice in std::mem::take(&mut volume.notices) {
        if let Notice::Done { origin: Origin::Nbd { cookie, .. }, result } = notice {
            connection.done(cookie, result);
        }
    }
    assert!(!matches!(connection.input, Input::AwaitsLock { .. }), "the range is still locked");
    assert_eq!(connection.open, 0, "the range is free again: the write is answered");
}
