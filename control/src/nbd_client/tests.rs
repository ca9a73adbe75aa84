//! The client against a server of our own protocol, against a foreign server, and against nonsense; and our protocol
//! against foreign clients.

mod foreign;
mod server;

use super::*;
use costandby_datapath::front::nbd::proto::{
    NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_SEND_DF, NBD_INIT_MAGIC, NBD_OPTS_MAGIC, NBD_REP_ACK,
    NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN, NBD_REP_INFO, NBD_REP_MAGIC, NBD_STATE_HOLE, NBD_STATE_ZERO,
};
use proptest::prelude::*;
use server::SIZE;
use std::collections::HashMap;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Instant;

const PLAIN: Options =
    Options { structured: false, base_allocation: false, timeout: Duration::from_secs(10) };
const QUICK: Options = Options { timeout: Duration::from_millis(500), ..PLAIN };

fn at(socket: &Path, export: &str) -> NbdUri {
    NbdUri { endpoint: Endpoint::Unix(socket.to_owned()), export: export.to_owned() }
}

/// Distinct bytes, so that a misplaced piece shows.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    })
    .take(len)
    .collect()
}

#[test]
fn addresses_are_read() {
    let unix: NbdUri = "nbd+unix:///a%20b?socket=/run/x.nbd".parse().unwrap();
    assert_eq!(unix, NbdUri { endpoint: Endpoint::Unix("/run/x.nbd".into()), export: "a b".to_owned() });
    let tcp = |host: &str, port, export: &str| NbdUri {
        endpoint: Endpoint::Tcp { host: host.to_owned(), port },
        export: export.to_owned(),
    };
    for (text, expected) in [
        ("nbd://host/db", tcp("host", 10809, "db")),
        ("nbd://10.9.0.1:7/", tcp("10.9.0.1", 7, "")),
        ("nbd://[::1]:7/db", tcp("::1", 7, "db")),
        ("nbd://[::1]", tcp("::1", 10809, "")),
    ] {
        assert_eq!(text.parse::<NbdUri>().unwrap(), expected, "{text}");
    }
}

#[test]
fn bad_addresses_say_what_is_wrong() {
    for (text, expected) in [
        ("http://host/db", UriProblem::Scheme),
        ("nbd:///db", UriProblem::Host),
        ("nbd+unix://host/db?socket=/x", UriProblem::Host),
        ("nbd+unix:///db", UriProblem::Socket),
        ("nbd+unix:///db?socket=", UriProblem::Socket),
        ("nbd+unix:///db?path=/x", UriProblem::Query),
        ("nbd://host/db?socket=/x", UriProblem::Query),
        ("nbd://host:port/db", UriProblem::Port),
        ("nbd://[::1]7/db", UriProblem::Port),
        ("nbd://host/%4", UriProblem::Escape),
        ("nbd://host/%zz", UriProblem::Escape),
        ("nbd://host/%ff", UriProblem::Escape),
    ] {
        match text.parse::<NbdUri>() {
            Err(NbdError::Uri { problem, .. }) => assert_eq!(problem, expected, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

/// Everything the client can do, on a server that serves an empty `db`; `size` is the export's.
fn exercise(uri: &NbdUri, options: &Options, size: usize) {
    let mut client = NbdClient::connect(uri, options).unwrap();
    assert_eq!(client.info().size, size as u64);
    assert_eq!(client.info().structured, options.structured);
    let data = pattern(7, 64 << 10);
    client.write(4096, &data, false).unwrap();
    client.write(1 << 20, &data, true).unwrap();
    client.flush().unwrap();
    let mut back = vec![0; data.len() + 8192];
    client.read(0, &mut back).unwrap();
    assert!(back[..4096].iter().all(|byte| *byte == 0));
    assert!(back[4096..4096 + data.len()] == data);

    client.write_zeroes(8192, 4096, true, true).unwrap();
    client.trim(1 << 20, 64 << 10, false).unwrap();
    client.cache(0, 4096).unwrap();
    client.read(0, &mut back).unwrap();
    assert!(back[4096..8192] == data[..4096], "before the zeroes");
    assert!(back[8192..12288].iter().all(|byte| *byte == 0), "the zeroes");
    assert!(back[12288..4096 + data.len()] == data[8192..], "behind the zeroes");

    if options.base_allocation {
        assert!(client.info().base_allocation_id.is_some());
        let end = 12288 + (56 << 10);
        let extents = client.block_status(0, 2 << 20).unwrap();
        assert!(extents.iter().map(|extent| u64::from(extent.len)).sum::<u64>() >= end, "{extents:?}");
        let zero = Extent { len: 4096, flags: NBD_STATE_HOLE | NBD_STATE_ZERO };
        assert_eq!(extents[0], zero);
    }
    let beyond = client.write(size as u64, &[1; 512], false).unwrap_err();
    assert!(beyond.errno().is_some(), "{beyond}");
    client.read(4096, &mut back[..4096]).unwrap();
    assert!(back[..4096] == data[..4096], "the connection lives on after an error");
    client.disconnect().unwrap();
}

#[test]
fn everything_works_on_our_own_protocol() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    for options in [PLAIN, Options { structured: true, ..PLAIN }, Options::default()] {
        let uri = at(&socket, "db");
        exercise(&uri, &options, SIZE);
        let mut client = NbdClient::connect(&uri, &PLAIN).unwrap();
        client.write_zeroes(0, u32::try_from(SIZE).unwrap(), false, false).unwrap();
    }
}

#[test]
fn pieces_over_the_largest_payload_are_split() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    let mut client = NbdClient::connect(&at(&socket, ""), &Options::default()).unwrap();
    assert_eq!(client.info().payload_len_max, 32 << 20);
    let data = pattern(3, (32 << 20) + 4097);
    client.write(513, &data, false).unwrap();
    let mut back = vec![0; data.len()];
    client.read(513, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn the_export_is_described_and_refusals_carry_their_reason() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    let plain = *NbdClient::connect(&at(&socket, "db"), &PLAIN).unwrap().info();
    assert_eq!(plain.flags & (NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_DF), NBD_FLAG_CAN_MULTI_CONN);
    let structured = *NbdClient::connect(&at(&socket, "db"), &Options::default()).unwrap().info();
    assert_ne!(structured.flags & NBD_FLAG_SEND_DF, 0);
    for (export, expected_code, expected) in [
        ("far", NBD_REP_ERR_POLICY, "volume far is served by beta"),
        ("bd", NBD_REP_ERR_UNKNOWN, "no export \"bd\" here; there are: db"),
    ] {
        match NbdClient::connect(&at(&socket, export), &Options::default()) {
            Err(NbdError::Refused { code, message }) => {
                assert_eq!((code, message.as_str()), (expected_code, expected));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn bad_requests_are_answered_and_the_connection_lives() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    for options in [PLAIN, Options::default()] {
        let mut client = NbdClient::connect(&at(&socket, "db"), &options).unwrap();
        let size = SIZE as u64;
        let oversized = vec![9; (32 << 20) + 1];
        let len = u32::try_from(oversized.len()).unwrap();
        let bad = [
            (request(Command::Write, 0, 0, 0, len), &oversized[..], NbdErrno::Inval),
            (request(Command::Write, 0, 0, size - 1, 2), &[9, 9], NbdErrno::NoSpace),
            (request(Command::Write, 1 << 7, 0, 0, 2), &[9, 9], NbdErrno::Inval),
            (request(Command::Read, 0, 0, size, 1), &[], NbdErrno::Inval),
            (request(Command::Read, 0, 0, 0, 0), &[], NbdErrno::Inval),
            (request(Command::Flush, 0, 0, 1, 0), &[], NbdErrno::Inval),
            (Request { command: 99, ..request(Command::Read, 0, 0, 0, 1) }, &[], NbdErrno::Inval),
        ];
        for (request, payload, errno) in bad {
            let error = client.request(&request, payload).unwrap_err();
            assert_eq!(error.errno(), Some(errno), "{request:?}: {error}");
            client.flush().unwrap();
        }
        let error = client.write(0, b"fail", false).unwrap_err();
        let text = if options.structured { ": the disk failed" } else { "" };
        assert_eq!(error.to_string(), format!("request failed: input/output error (EIO){text}"));
    }
}

#[test]
fn the_halves_keep_many_requests_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    for options in [PLAIN, Options::default()] {
        let (mut sender, mut receiver) = NbdClient::connect(&at(&socket, "db"), &options).unwrap().split();
        let blocks: u64 = 64;
        for cookie in 0..blocks {
            sender.send_write(cookie, cookie * 4096, &pattern(cookie, 4096), cookie % 3 == 0).unwrap();
        }
        for _ in 0..blocks {
            let reply = receiver.receive(&mut NoReads).unwrap();
            assert!(reply.cookie < blocks && reply.result.is_ok());
        }
        let mut reads: HashMap<u64, (u64, Vec<u8>)> =
            (0..blocks).map(|cookie| (cookie, (cookie * 4096, vec![0; 4096]))).collect();
        for cookie in 0..blocks {
            sender.send_read(cookie, cookie * 4096, 4096).unwrap();
        }
        for _ in 0..blocks {
            let reply = receiver.receive(&mut reads).unwrap();
            reply.result.unwrap();
            let (_, block) = reads.remove(&reply.cookie).expect("each cookie comes back once");
            assert!(block == pattern(reply.cookie, 4096));
        }
        sender.cut();
        assert!(matches!(receiver.receive(&mut NoReads), Err(NbdError::Io { .. })));
    }
}

/// A server that sends `bytes` whatever it hears, then closes if `close`.
fn canned(directory: &Path, bytes: Vec<u8>, close: bool) -> NbdUri {
    let socket = directory.join("canned.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&bytes);
        if close {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let _ = stream.read_to_end(&mut Vec::new());
    });
    at(&socket, "db")
}

/// What a good server says until the export of 1 MiB is open, with simple replies.
fn good_start() -> Vec<u8> {
    let mut bytes = [NBD_INIT_MAGIC.to_be_bytes(), NBD_OPTS_MAGIC.to_be_bytes()].concat();
    bytes.extend([0, 3]);
    let info = [&[0, 0][..], &(1_u64 << 20).to_be_bytes(), &[0, 1]].concat();
    for (kind, data) in [(NBD_REP_INFO, &info[..]), (NBD_REP_ACK, &[])] {
        bytes.extend(NBD_REP_MAGIC.to_be_bytes());
        bytes.extend(7_u32.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
    }
    bytes
}

#[test]
fn a_silent_server_costs_the_timeout_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let error = NbdClient::connect(&canned(directory.path(), Vec::new(), false), &QUICK).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    let mut client = NbdClient::connect(&canned(directory.path(), good_start(), false), &QUICK).unwrap();
    let error = client.flush().unwrap_err();
    assert!(error.is_timeout(), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_server_that_breaks_the_protocol_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let run = |bytes: Vec<u8>| {
        let mut client = NbdClient::connect(&canned(directory.path(), bytes, true), &QUICK)?;
        client.flush()
    };
    let error = run(b"SSH-2.0-something-else".to_vec()).unwrap_err();
    assert!(matches!(error, NbdError::Protocol(Breach::Magic { what: "the greeting", .. })), "{error}");
    let error = run([good_start(), vec![1; 16]].concat()).unwrap_err();
    assert!(matches!(error, NbdError::Protocol(Breach::Magic { what: "a reply", .. })), "{error}");
    let stranger = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &77_u64.to_be_bytes()].concat();
    let error = run([good_start(), stranger].concat()).unwrap_err();
    assert!(matches!(error, NbdError::Protocol(Breach::Cookie { found: 77 })), "{error}");
    let error = run(good_start()).unwrap_err();
    assert!(matches!(&error, NbdError::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof));
}

/// The bytes of a structured reply chunk under cookie 1.
fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(1_u64.to_be_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// What a read of 16 bytes at 4096 comes to when the server sends `chunks`.
fn structured_read(chunks: &[Vec<u8>]) -> Result<Vec<u8>, NbdError> {
    let directory = tempfile::tempdir().unwrap();
    let uri = canned(directory.path(), [good_start(), chunks.concat()].concat(), true);
    let (stream, mut info) = connect::open(&uri, &QUICK).unwrap();
    info.structured = true;
    let mut reads: HashMap<u64, (u64, Vec<u8>)> = HashMap::from([(1, (4096, vec![9; 16]))]);
    NbdReceiver::new(stream, info).receive(&mut reads)?.result?;
    Ok(reads.remove(&1).unwrap().1)
}

#[test]
fn chunks_make_a_read_only_if_they_cover_it() {
    let data = |offset: u64, byte: u8, len: usize| [&offset.to_be_bytes()[..], &vec![byte; len]].concat();
    let hole = [&4104_u64.to_be_bytes()[..], &8_u32.to_be_bytes()].concat();
    let error = [&5_u32.to_be_bytes()[..], &[0, 3], b"why"].concat();
    let (first, done) = (chunk(0, 1, &data(4096, 1, 8)), chunk(1, 0, &[]));

    let whole = structured_read(&[chunk(0, 2, &hole), first.clone(), done.clone()]).unwrap();
    assert_eq!(whole, [[1; 8], [0; 8]].concat());
    let failed = structured_read(&[chunk(0, 0x8001, &error), first.clone(), done.clone()]).unwrap_err();
    assert_eq!(failed.to_string(), "request failed: input/output error (EIO): why");
    for (what, chunks) in [
        ("nothing", vec![done.clone()]),
        ("half", vec![first.clone(), done]),
        ("before", vec![chunk(1, 1, &data(4095, 1, 16))]),
        ("past", vec![chunk(1, 1, &data(4097, 1, 16))]),
        ("too long", vec![chunk(1, 1, &data(4096, 1, 17))]),
        ("wrapping", vec![chunk(1, 1, &data(u64::MAX, 1, 16))]),
    ] {
        let error = structured_read(&chunks).unwrap_err();
        assert!(matches!(error, NbdError::Protocol(Breach::Nonsense { .. })), "{what}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn printed_addresses_parse_back(export in "\\PC{0,20}", path in "/[^\0]{1,20}", port: u16, unix: bool) {
        let endpoint = if unix {
            Endpoint::Unix(path.into())
        } else {
            Endpoint::Tcp { host: "::1".to_owned(), port }
        };
        let uri = NbdUri { endpoint, export };
        prop_assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri);
    }

    #[test]
    fn any_text_as_an_address_is_survived(text in "(nbd|nbd\\+unix)://\\PC{0,40}") {
        let _ = text.parse::<NbdUri>();
    }

    #[test]
    fn any_replies_are_survived(
        structured: bool, kind in 0_u16..8, error: bool, flags in 0_u16..2, cookie in 0_u64..3, len in 0_u32..64,
        tail in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = good_start();
        if structured {
            bytes.extend(0x668e_33ef_u32.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
            bytes.extend((kind | if error { 1 << 15 } else { 0 }).to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(len.to_be_bytes());
        }
        bytes.extend(tail);
        let uri = canned(directory.path(), bytes, true);
        let (stream, mut info) = connect::open(&uri, &QUICK).unwrap();
        info.structured = structured;
        info.base_allocation_id = Some(1);
        let mut receiver = NbdReceiver::new(stream, info);
        let mut reads: HashMap<u64, (u64, Vec<u8>)> = HashMap::from([(1, (4096, vec![0; 512]))]);
        // Bounded by the bytes sent: each reply takes at least 16.
        let ended = (0..100).find_map(|_| receiver.receive(&mut reads).err());
        prop_assert!(ended.is_some());
    }
}
