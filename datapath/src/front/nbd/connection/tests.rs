//! Clients that drip, that use all the requests they may, that close, half-close, and take no replies.

use super::*;
use crate::disk::image::DiskImage;
use crate::disk::pool::WorkerPool;
use crate::disk::record::Record;
use crate::disk::worker::DiskWorkers;
use crate::front::nbd::export::{ListedExport, Lookup};
use crate::front::nbd::linger::Lingering;
use crate::limits::RECEIVE_LEN_MAX;
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
fn waiting_volume() -> Site {
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
    Site { volume, memory: ClientMemory::default() }
}

/// What a reactor has beside connections.
struct Site {
    volume: Volume,
    memory: ClientMemory,
}

impl Site {
    /// Some turns with these connections, each of its own serial number. Those that end are closed.
    fn serve(&mut self, connections: &mut [&mut Option<Connection>]) {
        for _ in 0..50 {
            for notice in std::mem::take(&mut self.volume.notices) {
                for connection in connections.iter_mut().filter_map(|c| c.as_mut()) {
                    match notice {
                        Notice::Granted { token, origin: Origin::Nbd { serial, .. } }
                            if serial == connection.serial =>
                        {
                            connection.granted(token);
                        }
                        Notice::Done { origin: Origin::Nbd { serial, cookie, .. }, result }
                            if serial == connection.serial =>
                        {
                            connection.done(cookie, result, &mut self.memory);
                        }
                        Notice::Unpin { token } if connection.pins(token) => {
                            assert!(connection.unpin(token, &mut self.volume, &mut self.memory), "room");
                        }
                        _ => {}
                    }
                }
            }
            for connection in connections.iter_mut() {
                let Some(served) = connection.as_mut() else { continue };
                let (half_closed, closed) = ended(&served.socket).expect("a socket");
                served.ready(true, true, half_closed, closed);
                if served.service(&mut self.volume, &mut self.memory, Instant::now()).is_err() {
                    self.close(connection.take());
                }
            }
            self.volume.pump(Instant::now());
        }
    }

    /// As the reactor closes it, but for the waiting.
    fn close(&mut self, connection: Option<Connection>) {
        let Some(connection) = connection else { return };
        let socket = connection.close(Some(&mut self.volume), &mut self.memory);
        Lingering::default().add(socket, Instant::now());
    }

    /// Serves until the connection is over.
    fn end(&mut self, connection: Connection) {
        let mut connection = Some(connection);
        let began = Instant::now();
        while connection.is_some() {
            self.serve(&mut [&mut connection]);
            assert!(began.elapsed() < Duration::from_secs(10), "the connection never ends");
        }
    }

    fn in_flight(&self) -> u64 {
        self.volume.counters().in_flight.load(Ordering::Relaxed)
    }

    fn byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.volume.disk().span(ByteRange::new(offset, 1)).read_into(&mut byte);
        byte[0]
    }
}

/// The `serial`th client of a site, which has opened its volume.
fn opened(serial: u32) -> (UnixStream, Option<Connection>) {
    let (client, server) = UnixStream::pair().expect("sockets");
    server.set_nonblocking(true).expect("set");
    client.set_nonblocking(true).expect("set");
    let mut connection = Connection::new(server.into(), serial, serial, Instant::now());
    connection.open(0, OPENED);
    (client, Some(connection))
}

/// A request of the command `kind` for one byte, without payload.
fn request(kind: u8, cookie: u64, offset: u64) -> Vec<u8> {
    request_of(kind, cookie, offset, 1)
}

fn request_of(kind: u8, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0, 0, kind]);
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

/// A write of one byte.
fn write_request(cookie: u64, offset: u64) -> Vec<u8> {
    let mut bytes = request(1, cookie, offset);
    bytes.push(0xAB);
    bytes
}

#[test]
fn dripping_does_not_lengthen_the_handshake() {
    let began = Instant::now();
    let (mut client, mut connection) = connected(began);
    for _ in 0..3 {
        client.write_all(&[0]).expect("sends");
        connection.ready(true, true, false, false);
        std::thread::sleep(Duration::from_millis(20));
        assert!(connection.negotiate(&NoExports).expect("goes on").is_none());
    }
    let limit = Duration::from_secs(HANDSHAKE_S_MAX);
    assert!(!connection.is_stalled(began + limit, false));
    assert!(connection.is_stalled(began + limit + Duration::from_millis(10), false));
}

#[test]
fn the_last_request_a_client_may_open_gets_its_payload() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    for n in 0..=CONNECTION_REQUESTS_MAX as u64 {
        client.write_all(&write_request(n, n)).expect("sends");
    }
    site.serve(&mut [&mut connection]);
    assert_eq!(connection.expect("serves").open, CONNECTION_REQUESTS_MAX, "one more is not taken");
    assert_eq!(site.in_flight(), CONNECTION_REQUESTS_MAX as u64, "all that were taken");
}

/// Replies that stand in the client's socket, each by its cookie and error, up to the end of the stream.
fn replies(client: &mut UnixStream) -> Vec<(u64, u32)> {
    let mut bytes = Vec::new();
    client.set_nonblocking(false).expect("set");
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

#[test]
fn a_node_that_stops_serving_answers_what_was_admitted_and_nothing_else() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    for n in 1..=3 {
        client.write_all(&write_request(n, n * 512)).expect("sends");
    }
    site.serve(&mut [&mut connection]);
    // One whose payload is still on its way, and two behind it.
    let (head, payload) = (write_request(4, 4 * 512), write_request(5, 5 * 512));
    client.write_all(&head[..head.len() - 1]).expect("sends");
    site.serve(&mut [&mut connection]);
    let mut connection = connection.expect("serves");
    assert_eq!(connection.open, 3, "admitted");
    assert!(connection.in_payload());
    connection.leave(&mut site.volume, &mut site.memory);
    site.volume.quiesce();
    client.write_all(&payload).expect("sends");
    site.volume.go_alone();
    site.end(connection);
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
            let mut site = waiting_volume();
            let (mut client, connection) = opened(1);
            let mut connection = connection.expect("new");
            connection.open(0, Negotiated { base_allocation: true, structured: true, ..OPENED });
            stop(&mut site.volume);
            client.write_all(late).expect("sends");
            site.end(connection);
            assert_eq!(replies(&mut client), [], "{late:?}");
        }
    }
}

#[test]
fn what_cannot_be_finished_any_more_is_not_answered_either() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    client.write_all(&write_request(1, 0)).expect("sends");
    client.write_all(&write_request(2, 0)).expect("sends");
    site.serve(&mut [&mut connection]);
    let connection = connection.expect("serves");
    assert_eq!(connection.open, 2, "one landed, one waits for the same range");
    site.volume.stop_serving();
    site.end(connection);
    assert_eq!(replies(&mut client), []);
}

#[test]
fn a_write_that_waits_gives_its_place_back_when_the_node_stops_serving_at_once() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    client.write_all(&write_request(1, 0)).expect("sends");
    client.write_all(&write_request(2, 0)).expect("sends");
    site.serve(&mut [&mut connection]);
    // As when a peer that serves deposes this node: no quiesce comes before.
    site.volume.stop_serving();
    site.serve(&mut [&mut connection]);
    assert!(connection.is_none());
    assert_eq!(replies(&mut client), []);

    site.volume.serve();
    site.volume.go_alone();
    let (mut client, mut connection) = opened(2);
    client.write_all(&write_request(3, 0)).expect("sends");
    site.serve(&mut [&mut connection]);
    site.close(connection);
    assert_eq!(replies(&mut client), [(3, 0)], "the range is free again");
}

#[test]
fn a_payload_that_is_not_whole_holds_no_range() {
    let mut site = waiting_volume();
    site.volume.go_alone();
    let ((mut slow, mut one), (mut quick, mut two)) = (opened(1), opened(2));
    let late = write_request(1, 4096);
    slow.write_all(&late[..late.len() - 1]).expect("sends");
    site.serve(&mut [&mut one, &mut two]);
    let served = one.as_ref().expect("serves");
    assert!(served.in_payload() && served.open == 0, "nothing is begun");
    quick.write_all(&write_request(2, 4096)).expect("sends");
    site.serve(&mut [&mut one, &mut two]);
    drop(slow);
    site.close(two);
    assert_eq!(replies(&mut quick), [(2, 0)]);
    site.serve(&mut [&mut one]);
    assert!(one.is_none() && site.in_flight() == 0);
}

#[test]
fn a_payload_of_any_length_and_in_any_pieces_arrives_whole() {
    let mut site = waiting_volume();
    site.volume.go_alone();
    let bytes: Vec<u8> = (0..600_000_u32).map(|n| u8::try_from(n % 251).expect("small")).collect();
    let (mut client, mut connection) = opened(1);
    let lens = [1, 511, 4096, 70_000, RECEIVE_LEN_MAX, RECEIVE_LEN_MAX + 1, 600_000];
    for (offset, len) in (7..).zip(lens) {
        for piece in [len, 1000, 100_000] {
            let mut message = request_of(1, offset, offset, u32::try_from(len).expect("small"));
            message.extend_from_slice(&bytes[..len]);
            // A second one behind it, so that bytes behind the payload are never taken for it.
            message.extend_from_slice(&write_request(99, 0));
            for piece in message.chunks(piece) {
                let mut left = piece;
                while !left.is_empty() {
                    if let Ok(n) = client.write(left) {
                        left = &left[n..];
                    }
                    site.serve(&mut [&mut connection]);
                }
            }
            let mut there = vec![0; len];
            site.volume.disk().span(ByteRange::new(offset, len as u64)).read_into(&mut there);
            assert!(there == bytes[..len] && site.byte(0) == 0xAB, "{len} in pieces of {piece}");
            assert_eq!(site.memory.held_len(0), (0, 0));
            site.volume.disk().span(ByteRange::new(0, SIZE)).fill_zero();
        }
    }
    site.close(connection);
    let replies = replies(&mut client);
    assert!(replies.len() == 42 && replies.iter().all(|(_, error)| *error == 0), "{replies:?}");
}

#[test]
fn what_a_closed_connection_had_not_begun_is_never_begun() {
    let zeroes = request_of(6, 2, 0, 512);
    let trim = request_of(4, 2, 0, 512);
    let write = [request_of(1, 2, 0, 512), vec![0xCC; 512]].concat();
    let long = [request_of(1, 2, 0, 300_000), vec![0xCC; 300_000]].concat();
    for late in [write, long, zeroes, trim] {
        let mut site = waiting_volume();
        let ((mut first, mut one), (mut second, mut two)) = (opened(1), opened(2));
        // It holds the range, as no peer acknowledges it.
        first.write_all(&write_request(1, 0)).expect("sends");
        site.serve(&mut [&mut one, &mut two]);
        let mut left = &late[..];
        while !left.is_empty() {
            if let Ok(n) = second.write(left) {
                left = &left[n..];
            }
            site.serve(&mut [&mut one, &mut two]);
        }
        assert_eq!(two.as_ref().expect("serves").open, 1, "it waits for the range");
        drop(second);
        site.serve(&mut [&mut one, &mut two]);
        assert!(two.is_none(), "closed");
        assert_eq!(site.memory.held_len(0), (0, 0));
        site.volume.go_alone();
        site.serve(&mut [&mut one]);
        assert_eq!((site.byte(0), site.byte(1), site.in_flight()), (0xAB, 0, 0));
        site.close(one);
        assert_eq!(replies(&mut first), [(1, 0)]);
    }
}

#[test]
fn what_stands_in_the_socket_of_a_closed_connection_is_not_read() {
    let mut site = waiting_volume();
    site.volume.go_alone();
    let (mut client, mut connection) = opened(1);
    client.write_all(&write_request(1, 0)).expect("sends");
    drop(client);
    site.serve(&mut [&mut connection]);
    assert!(connection.is_none() && site.byte(0) == 0);
}

#[test]
fn a_turn_that_left_bytes_behind_looks_for_the_end_before_it_reads_on() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    let served = connection.as_mut().expect("new");
    let sent = 2 * TURN_REQUESTS_MAX as u64;
    for n in 0..sent {
        client.write_all(&write_request(n, n)).expect("sends");
    }
    served.service(&mut site.volume, &mut site.memory, Instant::now()).expect("goes on");
    let taken = served.changes();
    assert!(taken < sent, "some are left");
    // The poller has not told yet.
    drop(client);
    assert!(served.service(&mut site.volume, &mut site.memory, Instant::now()).is_err());
    assert_eq!(served.changes(), taken);
    site.serve(&mut [&mut connection]);
}

#[test]
fn a_half_closed_client_gets_the_replies_it_is_owed() {
    for behind in [&[][..], &write_request(9, 9)[..20], &write_request(9, 9)[..28]] {
        let mut site = waiting_volume();
        let (mut client, mut connection) = opened(1);
        // The second waits for the range of the first.
        for request in [write_request(1, 0), write_request(2, 0), write_request(3, 512)] {
            client.write_all(&request).expect("sends");
        }
        client.write_all(behind).expect("sends");
        client.shutdown(std::net::Shutdown::Write).expect("half-closed");
        site.serve(&mut [&mut connection]);
        site.volume.go_alone();
        site.serve(&mut [&mut connection]);
        assert!(connection.is_none(), "and is closed then");
        let mut replies = replies(&mut client);
        replies.sort_unstable();
        assert_eq!(replies, [(1, 0), (2, 0), (3, 0)]);
    }
}

#[test]
fn a_half_closed_client_whose_requests_may_come_too_late_is_read_no_further() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    for request in [write_request(1, 0), write_request(2, 0)] {
        client.write_all(&request).expect("sends");
    }
    site.serve(&mut [&mut connection]);
    client.write_all(&write_request(3, 512)).expect("sends");
    client.shutdown(std::net::Shutdown::Write).expect("half-closed");
    // Another client changes something: what waits stays in its place before that, and the rest is not read.
    connection.as_mut().expect("serves").take_no_more(&mut site.memory);
    site.volume.go_alone();
    site.serve(&mut [&mut connection]);
    assert_eq!(replies(&mut client), [(1, 0), (2, 0)]);
    assert_eq!(site.byte(512), 0);

    // Another client opens the volume: what waits is dropped as well.
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    for request in [write_request(1, 0), write_request(2, 0)] {
        client.write_all(&request).expect("sends");
    }
    client.shutdown(std::net::Shutdown::Write).expect("half-closed");
    site.serve(&mut [&mut connection]);
    connection.as_mut().expect("serves").leave(&mut site.volume, &mut site.memory);
    site.volume.go_alone();
    site.serve(&mut [&mut connection]);
    assert_eq!(replies(&mut client), [(1, 0)]);
}

#[test]
fn a_payload_without_room_is_not_read_and_one_that_others_wait_for_has_a_time_limit() {
    let mut site = waiting_volume();
    site.volume.go_alone();
    let rest =
        site.memory.take_payload(0, 99, crate::limits::PAYLOADS_ASIDE_LEN_MAX - 300_000).expect("room");
    let ((mut slow, mut one), (mut next, mut two)) = (opened(1), opened(2));
    slow.write_all(&[request_of(1, 1, 0, 300_000), vec![1; 1000]].concat()).expect("sends");
    site.serve(&mut [&mut one]);
    let since = Instant::now();
    let late = since + Duration::from_secs(PAYLOAD_ASIDE_S_MAX + 1);
    let stalled = |one: &Option<Connection>, site: &Site, at| {
        one.as_ref().expect("serves").is_stalled(at, site.memory.is_contended(0))
    };
    assert!(!stalled(&one, &site, late), "nobody waits for its room");
    next.write_all(&[request_of(1, 2, 4096, 300_000), vec![2; 1000]].concat()).expect("sends");
    site.serve(&mut [&mut one, &mut two]);
    assert!(two.as_ref().expect("serves").in_payload() && site.byte(4096) == 0);
    assert!(!stalled(&one, &site, since) && stalled(&one, &site, late));
    assert!(!stalled(&two, &site, late), "it has none");
    site.close(one);
    let mut left = &vec![2; 299_000][..];
    while !left.is_empty() {
        if let Ok(n) = next.write(left) {
            left = &left[n..];
        }
        site.serve(&mut [&mut two]);
    }
    assert_eq!(site.byte(4096), 2);
    site.memory.give_payload(0, crate::limits::PAYLOADS_ASIDE_LEN_MAX - 300_000, rest);
    assert_eq!(site.memory.held_len(0), (0, 0));
    assert!(!site.memory.is_contended(0));
}

#[test]
fn a_write_whose_turn_comes_is_placed_although_its_client_takes_no_replies() {
    let mut site = waiting_volume();
    let ((mut first, mut one), (mut second, mut two)) = (opened(1), opened(2));
    first.write_all(&write_request(1, 0)).expect("sends");
    site.serve(&mut [&mut one, &mut two]);
    // A reply that its socket does not take whole, and a write behind it that waits for the first client's.
    second.write_all(&request_of(0, 1, 4096, 900_000)).expect("sends");
    second.write_all(&[request_of(1, 2, 0, 2), vec![0xCD; 2]].concat()).expect("sends");
    let served = two.as_mut().expect("new");
    served.ready(true, true, false, false);
    served.service(&mut site.volume, &mut site.memory, Instant::now()).expect("goes on");
    assert!(served.out.is_stuck());
    // As if it had been taken just before the reply got stuck.
    let new = NewRequest {
        origin: Origin::Nbd { connection: 2, serial: 2, cookie: 2 },
        op: Op::Change(Kind::Write),
        range: ByteRange::new(0, 2),
        fua: false,
    };
    assert_eq!(receive(&served.socket, &mut [0; REQUEST_LEN], &mut true).expect("a header"), REQUEST_LEN);
    served.input = Input::Write(Incoming::new(new, 2));
    served.take_write(&mut site.volume, &mut site.memory, Instant::now()).expect("goes on");
    site.volume.go_alone();
    site.serve(&mut [&mut one, &mut two]);
    assert!(two.as_ref().expect("serves").out.is_stuck());
    assert_eq!((site.byte(0), site.byte(1), site.in_flight()), (0xCD, 0xCD, 0));
}

#[test]
fn replies_that_slow_readers_leave_are_copied_as_far_as_there_is_room() {
    let mut site = waiting_volume();
    site.volume.go_alone();
    let ((mut reader, mut one), (mut writer, mut two)) = (opened(1), opened(2));
    site.volume.disk().span(ByteRange::new(0, 900_000)).write_from(&vec![3; 900_000]);
    reader.write_all(&request_of(0, 1, 0, 900_000)).expect("sends");
    site.serve(&mut [&mut one]);
    writer.write_all(&write_request(1, 800_000)).expect("sends");
    let room = crate::limits::REPLIES_COPIED_LEN_MAX;
    assert!(site.memory.take_reply(0, room - 10));
    let served = two.as_mut().expect("new");
    served.service(&mut site.volume, &mut site.memory, Instant::now()).expect("goes on");
    site.volume.pump(Instant::now());
    let Some(Notice::Unpin { token }) = site.volume.notices.pop() else { panic!("the reply is in the way") };
    let served = one.as_mut().expect("serves");
    assert!(served.pins(token) && served.copy_stuck_since().is_none());
    assert!(!served.unpin(token, &mut site.volume, &mut site.memory), "no room");
    site.memory.give_reply(0, room - 10);
    assert!(served.unpin(token, &mut site.volume, &mut site.memory));
    assert!(!served.pins(token) && served.copy_stuck_since().is_some());
    site.serve(&mut [&mut one, &mut two]);
    assert_eq!(site.byte(800_000), 0xAB, "the writer need not wait");
    let mut got = Vec::new();
    while got.len() < 18 + 16 + 900_000 {
        let mut piece = vec![0; 1 << 16];
        if let Ok(n) = reader.read(&mut piece) {
            got.extend_from_slice(&piece[..n]);
        }
        site.serve(&mut [&mut one, &mut two]);
    }
    assert!(got[34..].iter().all(|byte| *byte == 3), "as it was");
    assert_eq!((site.memory.held_len(0), one.as_ref().expect("serves").open), ((0, 0), 0));
}

#[test]
fn only_a_connection_without_anything_open_is_idle() {
    let mut site = waiting_volume();
    let (mut client, mut connection) = opened(1);
    let later = Instant::now() + Duration::from_secs(100);
    site.serve(&mut [&mut connection]);
    assert!(connection.as_ref().expect("serves").idle(later) > Some(Duration::from_secs(90)));
    client.write_all(&write_request(1, 0)).expect("sends");
    site.serve(&mut [&mut connection]);
    assert_eq!(connection.as_ref().expect("serves").idle(later), None);
}
