//! Bad input at two running daemons, from clients, peers, configurations and damaged disks: each gets a clear error, and
//! nobody else notices.

use costandby_control::admin;
use costandby_control::nbd_client::{NbdClient, NbdError, NoReads, Options};
use costandby_datapath::front::nbd::proto::{
    Command, NBD_CMD_FLAG_FUA, NBD_INIT_MAGIC, NBD_OPT_ABORT, NBD_OPT_GO, NBD_OPT_LIST, NBD_OPTS_MAGIC,
    NBD_REP_ACK, NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNSUP, NBD_REP_MAGIC, NBD_REQUEST_MAGIC, NbdErrno, Request,
};
use costandby_tests::pair::{ALPHA, BETA, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Guarded, Ran, run};
use costandby_tests::{Rng, seed};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const PAYLOAD_MAX: u32 = 32 << 20;

fn pair() -> Pair {
    Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE >> 20)]))
}

/// Another client, which must not notice what the first one does.
fn neighbour(pair: &Pair) -> NbdClient {
    let mut client = pair.client(ALPHA, "db");
    client.write(0, b"the neighbour's", false).expect("a write");
    client
}

fn assert_serves(client: &mut NbdClient) {
    let mut found = [0; 15];
    client.read(0, &mut found).expect("a read after the bad input");
    assert_eq!(&found, b"the neighbour's");
}

#[test]
fn malformed_requests_get_nbds_own_errors_and_the_connection_lives() {
    let pair = pair();
    let mut other = neighbour(&pair);
    let (read, write, trim) = (Command::Read, Command::Write, Command::Trim);
    let cases: &[(&str, Command, u16, u64, u32, NbdErrno)] = &[
        ("read of zero length", read, 0, 0, 0, NbdErrno::Inval),
        ("write of zero length", write, 0, 0, 0, NbdErrno::Inval),
        ("trim of zero length", trim, 0, 0, 0, NbdErrno::Inval),
        ("read past the end", read, 0, SIZE - 100, 101, NbdErrno::Inval),
        ("read far past the end", read, 0, u64::MAX - 10, 20, NbdErrno::Inval),
        ("write past the end", write, 0, SIZE - 4096, 4097, NbdErrno::NoSpace),
        ("write that wraps", write, 0, u64::MAX - 511, 512, NbdErrno::NoSpace),
        ("zeroes past the end", Command::WriteZeroes, 0, SIZE, 1, NbdErrno::NoSpace),
        ("trim past the end", trim, 0, SIZE - 1, 2, NbdErrno::Inval),
        ("block status past the end", Command::BlockStatus, 0, SIZE, 1, NbdErrno::Inval),
        ("oversized read", read, 0, 0, PAYLOAD_MAX + 1, NbdErrno::Overflow),
        ("oversized write", write, 0, 0, PAYLOAD_MAX + 4096, NbdErrno::Inval),
        ("flush with a length", Command::Flush, 0, 0, 512, NbdErrno::Inval),
        ("read with FUA and an unknown flag", read, NBD_CMD_FLAG_FUA | 1 << 12, 0, 512, NbdErrno::Inval),
        ("write with an unknown flag", write, 1 << 9, 0, 512, NbdErrno::Inval),
    ];
    let mut client = pair.client(ALPHA, "db");
    for &(what, command, flags, offset, len, errno) in cases {
        let request = Request { flags, command: command.to_wire(), cookie: 0, offset, len };
        let payload = vec![0xee; if command == write { len as usize } else { 0 }];
        let error = client.request(&request, &payload).expect_err(what);
        assert_eq!(error.errno(), Some(errno), "{what}: {error}");
        assert_serves(&mut client);
    }
    let unknown = Request { flags: 0, command: 77, cookie: 0, offset: 0, len: 512 };
    let error = client.request(&unknown, &[]).expect_err("an unknown command");
    assert_eq!(error.errno(), Some(NbdErrno::Inval), "{error}");
    assert_serves(&mut client);

    // One byte is the smallest block we advertise, so odd requests are good ones.
    client.write(SIZE - 1, &[7], false).expect("a write of the last byte");
    client.write(12_345, &[8; 3333], true).expect("a misaligned write");
    let mut found = [0; 3335];
    client.read(12_344, &mut found).expect("a misaligned read");
    assert!(found[0] == 0 && found[1..3334] == [8; 3333] && found[3334] == 0);
    assert_serves(&mut other);
    pair.settle_and_compare("db");
}

#[test]
fn a_client_out_of_step_is_left_and_nobody_else_notices() {
    let pair = pair();
    let mut other = neighbour(&pair);
    let mut rng = Rng::new(seed());
    for round in 0..20 {
        let options = Options { timeout: Duration::from_secs(5), ..Options::default() };
        let client = NbdClient::connect(&pair.uri(ALPHA, "db"), &options).expect("a connection");
        let (mut sender, mut receiver) = client.split();
        let mut junk = rng.bytes(64);
        if round % 2 == 0 {
            // A good beginning, and the magic of a reply.
            junk[..4].copy_from_slice(&(NBD_REQUEST_MAGIC ^ 1).to_be_bytes());
        }
        sender.send_raw(&junk).expect("bytes are sent");
        let end = receiver.receive(&mut NoReads).expect_err("no answer to junk");
        let closed = matches!(&end, NbdError::Io { source, .. }
            if matches!(source.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset));
        assert!(closed, "round {round}: not closed: {end:?}");
        assert_serves(&mut other);
    }
    pair.settle_and_compare("db");
}

struct Haggler(UnixStream);

impl Haggler {
    /// Past the greeting.
    fn new(pair: &Pair) -> Self {
        let mut stream = UnixStream::connect(pair.nbd_socket(ALPHA)).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(greeting[..8], NBD_INIT_MAGIC.to_be_bytes());
        stream.write_all(&1_u32.to_be_bytes()).expect("client flags");
        Self(stream)
    }

    fn ask(&mut self, option: u32, len: u32, data: &[u8]) {
        let mut bytes = NBD_OPTS_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(data);
        self.0.write_all(&bytes).expect("an option is sent");
    }

    /// The code of one reply; its text is read and thrown away.
    fn answer(&mut self) -> u32 {
        let mut header = [0; 20];
        self.0.read_exact(&mut header).expect("an answer");
        assert_eq!(header[..8], NBD_REP_MAGIC.to_be_bytes());
        let field = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let mut text = vec![0; field(16) as usize];
        self.0.read_exact(&mut text).expect("the answer's text");
        field(12)
    }

    fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(len) => len == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn malformed_options_are_answered_and_haggling_goes_on() {
    let pair = pair();
    let mut other = neighbour(&pair);
    let mut client = Haggler::new(&pair);
    client.ask(4711, 5, b"hello");
    assert_eq!(client.answer(), NBD_REP_ERR_UNSUP, "an option nobody knows");
    client.ask(NBD_OPT_GO, 20_000, &[0; 20_000]);
    assert_eq!(client.answer(), NBD_REP_ERR_TOO_BIG, "a long one");
    client.ask(NBD_OPT_LIST, 3, b"abc");
    assert!(client.answer() > NBD_REP_ERR_UNSUP, "a list has no data");
    client.ask(NBD_OPT_LIST, 0, b"");
    assert_eq!(client.answer(), 2, "and still: the list");
    assert_eq!(client.answer(), NBD_REP_ACK, "all of it");
    client.ask(NBD_OPT_ABORT, 0, b"");
    assert_eq!(client.answer(), NBD_REP_ACK);
    assert!(client.is_closed(), "aborted");

    let mut client = Haggler::new(&pair);
    client.ask(1, u32::MAX, b"");
    assert!(client.is_closed(), "an option of 4 GiB");
    let mut client = Haggler::new(&pair);
    client.0.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").expect("bytes are sent");
    assert!(client.is_closed(), "another protocol");
    assert_serves(&mut other);
}

#[test]
fn garbage_on_the_peers_port_disturbs_nobody() {
    let mut pair = pair();
    let mut client = neighbour(&pair);
    let mut rng = Rng::new(seed());
    for node in [ALPHA, BETA] {
        for len in [1, 7, 64, 4096, 200_000] {
            let mut stream = TcpStream::connect(pair.peer_address(node)).expect("a connection");
            // The daemon may well hang up before it has read everything.
            let _ = stream.write_all(&rng.bytes(len));
        }
        let mut stream = TcpStream::connect(pair.peer_address(node)).expect("a connection");
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        pair.wait_log(node, &["refused a connection", "does not begin as costandby does"]);
    }
    let idle: Vec<_> =
        (0..100).map(|_| TcpStream::connect(pair.peer_address(BETA)).expect("a connection")).collect();
    client.write(1 << 20, &[1; 100_000], true).expect("a write while strangers stand at the door");
    assert_serves(&mut client);
    for node in [ALPHA, BETA] {
        pair.assert_alive(node);
        assert!(pair.status(node, "db").is_some_and(|status| status.in_sync()));
        assert!(!pair.log(node).contains("lost "), "the link held: {}", pair.log(node));
    }
    // The way in is free again once the silent ones' time is over.
    pair.kill(ALPHA);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    drop(idle);
    pair.settle_and_compare("db");
}

/// Runs `up`, which must fail at once, with one line on stderr.
fn refused_up(pair: &Pair, node: usize) -> String {
    let mut command = pair.command(node);
    refusal(&run(command.arg("up")))
}

fn refusal(ran: &Ran) -> String {
    assert_eq!(ran.status.code(), Some(1), "{}{}{}", ran.command, ran.stdout, ran.stderr);
    let lines: Vec<_> = ran.stderr.lines().filter(|line| line.starts_with("costandby: ")).collect();
    assert_eq!(lines.len(), 1, "one line says why: {}", ran.stderr);
    lines[0].to_owned()
}

#[test]
fn errors_in_the_configuration_name_what_was_meant() {
    let pair = Pair::create(Settings::new(&[VolumeSettings::new("db", 8)]));
    let good = fs::read_to_string(pair.config(ALPHA)).expect("a configuration");
    let cases: &[(&str, &str, &[&str])] = &[
        ("on_peer_loss", "on_peer_los", &["on_peer_los", "on_peer_loss"]),
        ("peer_timeout", "peer_timeuot", &["peer_timeuot", "peer_timeout"]),
        ("\"continue\"", "\"carry on\"", &["carry on", "continue"]),
        ("size = 8388608", "size = \"8 GiBs\"", &["size", "volumes.db"]),
        ("primary = \"alpha\"", "primary = \"alhpa\"", &["alhpa", "alpha"]),
        ("[nodes.alpha]", "[nodes.alpha", &["TOML"]),
        ("key = \"", "kay = \"", &["kay", "key"]),
        ("key = \"", "# \"", &["there is no key", "costandby keygen", "insecure = true"]),
    ];
    for (good_text, bad_text, words) in cases {
        let bad = good.replacen(good_text, bad_text, 1);
        assert_ne!(bad, good, "{good_text} is in the configuration");
        fs::write(pair.config(ALPHA), bad).expect("a configuration");
        let ran = pair.cli(ALPHA, &["up"]);
        let said = refusal(&ran);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        for word in *words {
            assert!(said.contains(word), "{bad_text}: {word:?} is not in {said}");
        }
    }
}

#[test]
fn foreign_and_truncated_disks_are_refused() {
    let volumes = [VolumeSettings::new("db", 8), VolumeSettings::new("web", 8)];
    let mut pair = Pair::create(Settings::new(&volumes));
    let (disk, meta) = (pair.disk(ALPHA, "db"), pair.metadata(ALPHA, "db"));
    let good = fs::read(&meta).expect("metadata");
    // The daemon stays up, and has the disk tried again at an operator's word.
    let expect = |pair: &Pair, words: &[&str]| {
        let told = pair.tell(ALPHA, "db", admin::Command::Connect { discard_my_data: false });
        let said = told.expect_err("a bad disk is refused").to_string();
        let status = pair.status(ALPHA, "db").expect("a status");
        assert_eq!((status.disk_state.as_str(), status.role.as_str()), ("Failed", "standby"));
        let advice = status.advice.expect("advice");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said}");
            assert!(advice.contains(word), "{word:?} is not in {advice}");
        }
    };
    let path = meta.to_str().expect("text").to_owned();

    fs::write(&meta, Rng::new(1).bytes(good.len())).expect("metadata");
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("web");
    expect(&pair, &["db", &path, "unreadable"]);
    fs::write(&meta, &good[..good.len() / 2]).expect("metadata");
    expect(&pair, &["db", &path, "truncated"]);
    fs::write(&meta, b"").expect("metadata");
    expect(&pair, &["db", &path, "truncated"]);
    fs::copy(pair.metadata(BETA, "db"), &meta).expect("metadata");
    expect(&pair, &["db", &path, "belongs to", "beta"]);
    fs::remove_file(&meta).expect("metadata");
    expect(&pair, &["db", &path, "is missing", "create db --force"]);
    fs::write(&meta, &good).expect("metadata");

    let file = fs::File::options().write(true).open(&disk).expect("a disk");
    file.set_len(4 << 20).expect("a disk is cut");
    expect(&pair, &["db", disk.to_str().expect("text"), "4194304 bytes", "8388608"]);
    file.set_len(8 << 20).expect("a disk is whole again");
    let shut = fs::metadata(&disk).expect("a disk").permissions();
    fs::remove_file(&disk).expect("a disk");
    expect(&pair, &["db", disk.to_str().expect("text"), "is missing, its metadata is there"]);
    fs::write(&disk, vec![0; 8 << 20]).expect("a disk");
    fs::set_permissions(&disk, shut).expect("permissions");
    assert!(pair.status(ALPHA, "web").expect("a status").in_sync(), "the other volume is not touched");

    // One copy of the two is enough.
    let mut damaged = good.clone();
    damaged[100] ^= 1;
    fs::write(&meta, damaged).expect("metadata");
    let told = pair.tell(ALPHA, "db", admin::Command::Connect { discard_my_data: false });
    told.unwrap_or_else(|error| panic!("a good disk: {error}"));
    pair.wait_in_sync("db");
    pair.wait_log(ALPHA, &["damaged", "db"]);
}

#[test]
fn a_second_daemon_on_the_same_disks_is_refused() {
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", 8)]));
    for node in [ALPHA, BETA] {
        let said = refused_up(&pair, node);
        assert!(said.contains("already") || said.contains("in use"), "{}: {said}", NODES[node]);
        assert!(pair.status(node, "db").is_some_and(|status| status.in_sync()), "the first one goes on");
    }
    let mut command = pair.command(ALPHA);
    let mut usage = Guarded::spawn(command.arg("promote").stderr(Stdio::null()));
    assert_eq!(usage.wait(Duration::from_secs(10)).and_then(|status| status.code()), Some(2), "wrong usage");
    pair.settle_and_compare("db");
}
