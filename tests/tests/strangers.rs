//! Who does not hold the pair's key: whatever is said to a node's port, a healthy session is not touched, nothing is told, and
//! the log is not filled. And what the two nodes say of a key that is wrong, missing, or being replaced.

use costandby_control::admin;
use costandby_control::generation::ServingRole;
use costandby_control::hello::{Hello, Message, encode};
use costandby_control::secure::key::{KEY_LEN, Key, Keys};
use costandby_control::secure::keyring;
use costandby_datapath::units::{ByteRange, Epoch, Generation};
use costandby_datapath::wire::{Header, Kind};
use costandby_tests::ledger::Ledger;
use costandby_tests::liar::{Answer, Liar, hear, recorded_opening, say, say_bare};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::{scaled, wait_for};
use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

const SIZE_MIB: u64 = 8;
const SIZE: u64 = SIZE_MIB << 20;

fn pair() -> Pair {
    Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]))
}

/// A stranger who says to be `node`'s peer, with these keys.
fn stranger(pair: &Pair, node: usize, keys: Keys) -> Liar {
    Liar { node: NODES[1 - node], peer: NODES[node], target: pair.peer_address(node), keys }
}

/// A key of the stranger's own.
fn own_key() -> Keys {
    Keys::one(Key::from_bytes([0x66; KEY_LEN]))
}

/// The five hellos that once did harm, each in the name of `node`'s peer.
fn hellos(liar: &Liar) -> Vec<(&'static str, Vec<Hello>)> {
    let fresh = liar.fresh_hello("db", SIZE);
    let with = |change: &dyn Fn(&mut Hello)| {
        let mut hello = fresh.clone();
        change(&mut hello);
        hello
    };
    let serving = with(&|hello| {
        hello.view.generations.current = Generation(77);
        hello.view.role = ServingRole::Primary;
        hello.view.zeroed = false;
    });
    vec![
        ("any hello", vec![with(&|hello| hello.view.generations.current = Generation(5))]),
        ("two hellos and a frame", vec![serving.clone(), serving]),
        ("a fresh disk", vec![fresh.clone()]),
        ("an epoch of 2^62", vec![with(&|hello| hello.view.epoch = Epoch(1 << 62))]),
        ("another size", vec![with(&|hello| hello.view.size = 2 * SIZE)]),
    ]
}

/// A frame that would overwrite the volume's first block.
fn frame() -> Vec<u8> {
    let payload = vec![b'X'; 4096];
    let mut header = Header::new(Kind::Write, Epoch(1 << 20));
    header.range = ByteRange::new(0, 4096);
    header.seq = costandby_datapath::units::Seq(1);
    header.payload_crc = crc32c::crc32c(&payload);
    [header.encode().as_slice(), &payload].concat()
}

#[test]
fn five_attacks_without_the_key_leave_a_session_and_both_disks_as_they_are() {
    let mut pair = pair();
    let before = [ALPHA, BETA].map(|node| pair.status(node, "db").expect("a status"));
    let ledger = Ledger::new(SIZE);
    let writing = ledger.write_slowly(&pair.uri(ALPHA, "db"), 3, Duration::from_millis(5));
    for node in [ALPHA, BETA] {
        let keys = pair.keys(node);
        for (attack, hellos) in hellos(&stranger(&pair, node, Keys::none())) {
            let mut plain = Vec::new();
            for hello in &hellos {
                plain.extend(encode(&Message::Hello(Box::new(hello.clone()))));
            }
            plain.extend(frame());
            let target = pair.peer_address(node);
            // In the clear, as release 2 spoke; behind nothing; behind an opening that was recorded on the wire.
            let mut old = plain.clone();
            old[8] = 2;
            let mut replayed = recorded_opening(&keys, NODES[1 - node], NODES[node]);
            replayed.extend(u16::to_le_bytes(300));
            replayed.extend(&plain);
            for (way, bytes) in [("plain", &plain), ("of release 2", &old), ("replayed", &replayed)] {
                let answer = say_bare(target, bytes);
                assert!(answer.len() < 200, "{attack}, {way}: {} bytes came back", answer.len());
                let told = String::from_utf8_lossy(&answer);
                assert!(!told.contains("volume_id") && !told.contains("UpToDate"), "{attack}, {way}: {told}");
            }
            for keys in [own_key(), Keys::none()] {
                let refused = stranger(&pair, node, keys).talk(async |channel| {
                    for hello in &hellos {
                        say(channel, &encode(&Message::Hello(Box::new(hello.clone())))).await.expect("sent");
                    }
                    hear(channel).await
                });
                assert!(refused.is_err(), "{attack}: a stranger was let in: {refused:?}");
            }
        }
    }
    let acked = writing.acked();
    wait_for("the writer goes on", LIMIT, || (writing.acked() > acked + 20).then_some(()));
    let mut ledger = writing.finish_ok();
    for (node, before) in [ALPHA, BETA].into_iter().zip(before) {
        pair.assert_alive(node);
        let after = pair.status(node, "db").expect("a status");
        let of = |status: &admin::VolumeStatus| {
            (status.role.clone(), status.connection.clone(), status.epoch, status.generation.clone())
        };
        assert_eq!(of(&after), of(&before), "{}", NODES[node]);
        let log = pair.log(node);
        assert!(!log.contains("lost "), "{}: its session ended: {log}", NODES[node]);
        let refusals = log.lines().filter(|line| line.contains("refused a connection")).count();
        assert!((1..=10).contains(&refusals), "{}: {refusals} lines on refusals: {log}", NODES[node]);
    }
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.settle_and_compare("db");
}

#[test]
fn connections_that_say_nothing_keep_no_peer_out() {
    let pair = pair();
    let held: Vec<_> = (0..400)
        .map(|_| TcpStream::connect(pair.peer_address(BETA)).expect("a connection is taken"))
        .collect();
    let began = Instant::now();
    pair.tell(ALPHA, "db", admin::Command::Disconnect).expect("disconnected");
    pair.wait_status(ALPHA, "db", "apart", |status| status.connection == "standalone");
    pair.tell(ALPHA, "db", admin::Command::Connect { discard_my_data: false }).expect("connects");
    pair.wait_in_sync("db");
    let took = began.elapsed();
    assert!(took < scaled(Duration::from_secs(8)), "{took:?} with strangers at the door");
    pair.wait_log(BETA, &["refused a connection", "it began no handshake within 3 s", "an NBD client"]);
    // None of them is kept for long.
    wait_for("they are closed", LIMIT, || {
        held.iter()
            .all(|stream| {
                stream.set_read_timeout(Some(Duration::from_millis(1))).expect("a limit");
                matches!(std::io::Read::read(&mut &*stream, &mut [0; 64]), Ok(0))
                    || stream.take_error().is_ok_and(|error| error.is_some())
            })
            .then_some(())
    });
    let lines = pair.log(BETA).lines().filter(|line| line.contains("refused a connection")).count();
    assert!(lines <= 10, "{lines} lines");
}

#[test]
fn a_flood_of_connections_stops_neither_the_pair_nor_its_clients_nor_status() {
    let mut pair = pair();
    let writing = Ledger::new(SIZE).write_slowly(&pair.uri(ALPHA, "db"), 5, Duration::from_millis(2));
    let opening = recorded_opening(&pair.keys(BETA), NODES[ALPHA], NODES[BETA]);
    let knocks: [&[u8]; 4] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00",
        &opening,
    ];
    let targets = [ALPHA, BETA].map(|node| pair.peer_address(node));
    let ends = Instant::now() + Duration::from_secs(4);
    let (mut slowest, acked) = (Duration::ZERO, writing.acked());
    let knocked: u32 = std::thread::scope(|scope| {
        let flood = knocks.map(|knock| {
            scope.spawn(move || {
                let (mut held, mut count) = (VecDeque::new(), 0);
                while Instant::now() < ends {
                    for target in targets {
                        // Refused while the node's queue is full.
                        let Ok(mut stream) = TcpStream::connect(target) else { continue };
                        let _ = stream.write_all(knock);
                        held.push_back(stream);
                        count += 1;
                    }
                    // This process has descriptors to spare for the rest of the test.
                    while held.len() > 100 {
                        held.pop_front();
                    }
                }
                count
            })
        });
        while Instant::now() < ends {
            for node in [ALPHA, BETA] {
                let began = Instant::now();
                let status = pair.ask(node).unwrap_or_else(|error| panic!("{}: {error}", NODES[node]));
                assert!(status.volumes[0].in_sync(), "{}: {status:?}", NODES[node]);
                slowest = slowest.max(began.elapsed());
            }
        }
        flood.map(|flood| flood.join().expect("it knocked")).into_iter().sum()
    });
    assert!(knocked > 500, "{knocked} connections are no flood");
    assert!(slowest < scaled(Duration::from_secs(1)), "a status took {slowest:?}");
    assert!(writing.acked() > acked + 50, "{} writes in four seconds", writing.acked() - acked);
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    for node in [ALPHA, BETA] {
        pair.assert_alive(node);
        let log = pair.log(node);
        assert!(!log.contains("lost "), "{}: its session ended: {log}", NODES[node]);
        let refusals: Vec<_> = log.lines().filter(|line| line.contains("refused a connection")).collect();
        assert!((1..=20).contains(&refusals.len()), "{}: {refusals:#?}", NODES[node]);
        for what in ["as HTTP does", "as TLS does"] {
            assert_eq!(
                refusals.iter().filter(|line| line.contains(what)).count(),
                1,
                "{what}: {refusals:#?}"
            );
        }
    }
    pair.settle_and_compare("db");
}

/// Ends the session, so that the next one needs a handshake.
fn part_and_connect(pair: &Pair) {
    pair.tell(ALPHA, "db", admin::Command::Disconnect).expect("disconnected");
    pair.wait_status(ALPHA, "db", "apart", |status| status.connection == "standalone");
    pair.wait_status(BETA, "db", "apart", |status| status.connection == "connecting");
    pair.tell(ALPHA, "db", admin::Command::Connect { discard_my_data: false }).expect("connects");
}

#[test]
fn a_wrong_key_is_said_on_both_nodes_and_the_right_one_mends_it() {
    let mut pair = pair();
    let right = pair.keys(BETA);
    pair.set_keys(BETA, &own_key());
    pair.wait_log(BETA, &["key file", "has changed"]);
    assert!(pair.status(ALPHA, "db").expect("a status").in_sync(), "a session that is up goes on");
    part_and_connect(&pair);
    for node in [ALPHA, BETA] {
        let status = pair.wait_status(node, "db", "told of the key", |status| {
            status.advice.as_deref().is_some_and(|advice| advice.contains("is not this node's key"))
        });
        assert!(status.parted, "it wants an operator");
    }
    std::thread::sleep(Duration::from_secs(3));
    for node in [ALPHA, BETA] {
        let log = pair.log(node);
        let lines = log.lines().filter(|line| line.contains("refuses a session: its key")).count();
        assert_eq!(lines, 1, "{}: {log}", NODES[node]);
        let lines = log.lines().filter(|line| line.contains("does not hold this node's key")).count();
        assert_eq!(lines, 1, "{}: {log}", NODES[node]);
        let doctor = pair.cli(node, &["doctor"]);
        assert!(doctor.stdout.contains("holds another key"), "{}", doctor.stdout);
    }
    pair.set_keys(BETA, &right);
    pair.wait_in_sync("db");
    let doctor = pair.cli(ALPHA, &["doctor"]);
    assert!(doctor.stdout.contains("holds it too"), "{}", doctor.stdout);
    for node in [ALPHA, BETA] {
        pair.assert_alive(node);
        assert!(!pair.log(node).contains(&right.first().expect("one").to_line()), "a key in a log");
    }
}

#[test]
fn a_key_on_one_node_and_none_on_the_other_is_said_on_both() {
    let mut pair = Pair::create(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    let text = fs::read_to_string(pair.config(BETA)).expect("a configuration");
    let (_, rest) = text.split_once('\n').expect("the key's line");
    fs::write(pair.config(BETA), format!("insecure = true\n{rest}")).expect("written");
    pair.up(ALPHA);
    pair.up(BETA);
    for (node, words) in
        [(ALPHA, "has no key (`insecure = true`)"), (BETA, "has a key and this node has none")]
    {
        pair.wait_status(node, "db", "told", |status| {
            status.advice.as_deref().is_some_and(|advice| advice.contains(words))
        });
    }
}

#[test]
fn without_a_key_both_nodes_work_where_that_is_wanted() {
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.keyed = false;
    let pair = Pair::start(settings);
    pair.wait_log(ALPHA, &["insecure = true and no key"]);
    pair.settle_and_compare("db");
}

#[test]
fn a_key_is_replaced_step_by_step_without_a_gap() {
    let pair = pair();
    let old = pair.keys(ALPHA);
    for step in ["add", "use", "end"] {
        let path = pair.key_path(ALPHA);
        let said = pair.cli_ok(ALPHA, &["keygen", "--rotate", step]);
        assert!(said.contains("to the other node"), "{said}");
        // One node is a step ahead.
        std::thread::sleep(Duration::from_millis(1500));
        part_and_connect(&pair);
        pair.wait_in_sync("db");
        pair.set_keys(BETA, &keyring::read(&path).expect("good"));
        std::thread::sleep(Duration::from_millis(1500));
        part_and_connect(&pair);
        pair.wait_in_sync("db");
    }
    assert_ne!(pair.keys(BETA), old);
    let refused =
        stranger(&pair, BETA, old).talk(async |channel| matches!(hear(channel).await, Answer::Said(_)));
    assert!(refused.is_err(), "the old key is of no use any more");
}

#[test]
fn a_daemon_does_not_start_without_a_key_that_is_its_own() {
    let pair = Pair::create(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    let refused = |words: &[&str]| {
        let ran = pair.cli(ALPHA, &["up"]);
        assert!(ran.stderr.lines().count() == 1 && ran.stderr.starts_with("costandby: "), "{}", ran.stderr);
        for word in words {
            assert!(ran.stderr.contains(word), "{word:?} is not in {}", ran.stderr);
        }
    };
    let path = pair.key_path(ALPHA);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("a mode");
    refused(&["mode 0644", &format!("chmod 600 {}", path.display())]);
    let doctor = pair.cli(ALPHA, &["doctor"]);
    assert!(doctor.stdout.contains("chmod 600"), "{}", doctor.stdout);
    fs::remove_file(&path).expect("removed");
    refused(&["is missing", "costandby keygen", "copy"]);
    fs::write(&path, "not a key\n").expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a mode");
    refused(&["line 1", "costandby-key-1:"]);
    let kept = pair.cli(ALPHA, &["keygen", "--force"]);
    assert!(kept.stderr.contains("a text of another kind, and was not touched"), "{}", kept.stderr);
    fs::write(&path, "costandby-key-1:0102\n").expect("written");
    refused(&["line 1", "was it copied whole"]);
    let kept = pair.cli(ALPHA, &["keygen"]);
    assert!(kept.stderr.contains("was not touched"), "{}", kept.stderr);
    pair.cli_ok(ALPHA, &["keygen", "--force"]);
    assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o7777, 0o600);
    let text = fs::read_to_string(pair.config(ALPHA)).expect("a configuration");
    fs::write(pair.config(ALPHA), text.split_once('\n').expect("the key's line").1).expect("written");
    refused(&["there is no key", "costandby keygen", "insecure = true"]);
}
