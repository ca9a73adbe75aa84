//! One disk that cannot be opened, or one address that cannot be bound, keeps nothing else of a node down: the volume is
//! `Failed` and says why to operators, clients and the peer; the address is tried again.

use costandby_control::admin::Command;
use costandby_control::nbd_client::{NbdClient, Options};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{costandby_binary, run};
use costandby_tests::wait_for;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Long enough for a peer to ask or dial again.
const LATER: Duration = Duration::from_secs(4);

fn two_volumes() -> Settings {
    Settings::new(&[VolumeSettings::new("db", 8), VolumeSettings::new("web", 8)])
}

fn rename(from: &std::path::Path, to: &str) -> std::path::PathBuf {
    let hidden = from.with_extension(to);
    fs::rename(from, &hidden).expect("a disk is moved");
    hidden
}

#[test]
fn a_missing_disk_keeps_its_own_volume_down_and_says_why_to_everyone() {
    let mut pair = Pair::start(two_volumes());
    // Once the node that dials, once the one that is dialled.
    for node in [ALPHA, BETA] {
        pair.stop(node);
        let disk = pair.disk(node, "db");
        let hidden = rename(&disk, "hidden");
        pair.up(node);
        pair.wait_in_sync("web");
        let name = NODES[node];
        let why = format!("disk {} is missing", disk.display());
        let status = pair.wait_status(node, "db", "failed", |status| status.disk_state == "Failed");
        let advice = status.advice.expect("advice");
        assert!(advice.contains(&why) && advice.contains(" connect db`"), "{advice}");
        assert_ne!(status.generation, format!("{:016x}", 0), "what its metadata says is shown");
        let commands = [
            Command::Promote { force: true },
            Command::Demote,
            Command::Disconnect,
            Command::Invalidate,
            Command::Connect { discard_my_data: false },
            Command::Connect { discard_my_data: true },
        ];
        for command in commands {
            let told = pair.tell(node, "db", command).expect_err("refused").to_string();
            assert!(told.contains(&why), "{command:?}: {told}");
        }
        let told = pair.connect(node, "db").map(|_| ()).expect_err("a client is refused").to_string();
        assert!(told.contains(&why), "{told}");
        // The peer's operator hears why, and what it means there: one line in `status`, and one in the log.
        let word = format!("{name} refuses a session: {name} cannot use its disk of volume db: {why}");
        let status = pair.wait_status(1 - node, "db", "told why", |status| {
            status.advice.as_ref().is_some_and(|advice| advice.contains(&word))
        });
        assert!(status.parted, "it waits for an operator");
        let advice = status.advice.expect("advice");
        let meanwhile =
            if node == ALPHA { "waiting for alpha" } else { "nothing was acknowledged without beta since" };
        assert!(advice.contains(meanwhile), "{advice}");
        let shown = pair.cli_ok(1 - node, &["status"]);
        assert_eq!(shown.matches("cannot use its disk").count(), 1, "{shown}");
        pair.wait_log(1 - node, &[&word]);
        std::thread::sleep(LATER);
        let log = pair.log(1 - node);
        assert_eq!(log.matches("cannot use its disk").count(), 1, "said once, whenever it is asked: {log}");
        pair.assert_alive(node);
        fs::rename(&hidden, &disk).expect("a disk is put back");
        let told = pair.cli_ok(node, &["connect", "db"]);
        assert!(told.contains("open again"), "{told}");
        pair.wait_in_sync("db");
        assert_eq!(pair.status(1 - node, "db").expect("a status").advice, None, "it is over");
    }
    pair.settle_and_compare("db");
    pair.settle_and_compare("web");
}

#[test]
fn a_daemon_whose_disks_are_all_missing_stays_up_and_ends_well() {
    let mut pair = Pair::create(two_volumes());
    for volume in ["db", "web"] {
        rename(&pair.disk(ALPHA, volume), "hidden");
    }
    pair.up(ALPHA);
    for volume in ["db", "web"] {
        pair.wait_status(ALPHA, volume, "failed", |status| status.disk_state == "Failed");
    }
    pair.stop(ALPHA);
}

#[test]
fn up_before_create_names_the_command_that_makes_the_disk() {
    let mut pair = Pair::create(two_volumes());
    for made in [pair.disk(ALPHA, "db"), pair.metadata(ALPHA, "db")] {
        fs::remove_file(made).expect("a file that create made");
    }
    pair.up(ALPHA);
    pair.up(BETA);
    let status = pair.wait_status(ALPHA, "db", "failed", |status| status.disk_state == "Failed");
    let advice = status.advice.expect("advice");
    let command = advice.split('`').find(|quoted| quoted.contains(" create ")).expect("a command");
    let again = advice.split('`').find(|quoted| quoted.contains(" connect ")).expect("a command");
    for command in [command, again] {
        let mut words = command.split_whitespace();
        assert_eq!(words.next(), Some("costandby"), "{advice}");
        run(std::process::Command::new(costandby_binary()).args(words)).ok();
    }
    pair.wait_in_sync("db");
}

#[test]
fn addresses_that_are_taken_are_tried_again_and_keep_nothing_down() {
    let mut pair = Pair::create(two_volumes());
    let taken = TcpListener::bind(pair.peer_address(BETA)).expect("beta's port is taken");
    let in_the_way = pair.nbd_socket(BETA);
    fs::write(&in_the_way, "precious").expect("a file at the socket's path");
    pair.up(ALPHA);
    pair.up(BETA);
    let listening = |pair: &Pair| pair.not_listening(BETA);
    let refused = listening(&pair);
    let addresses: Vec<_> = refused.iter().map(|refused| refused.address.clone()).collect();
    let (port, socket) =
        (format!("tcp:{}", pair.peer_address(BETA)), format!("unix:{}", in_the_way.display()));
    assert_eq!(addresses, [port, socket], "{refused:?}");
    assert!(refused[0].reason.contains("another program listens there"), "{refused:?}");
    assert!(refused[1].reason.contains("no socket"), "{refused:?}");
    assert!(pair.cli_ok(BETA, &["status"]).contains("not listening on"));
    drop(taken);
    pair.wait_in_sync("db");
    assert_eq!(fs::read_to_string(&in_the_way).expect("the file"), "precious", "what is no socket stays");
    // It is not the daemon's to remove at its end either.
    pair.stop(BETA);
    assert_eq!(fs::read_to_string(&in_the_way).expect("the file"), "precious", "what is no socket stays");
    pair.up(BETA);
    fs::remove_file(&in_the_way).expect("the file is moved away");
    wait_for("beta listens everywhere", LIMIT, || listening(&pair).is_empty().then_some(()));
    pair.wait_log(BETA, &["listening now", &in_the_way.display().to_string()]);
    pair.wait_in_sync("db");
    pair.hand_over("db", ALPHA);
    pair.settle_and_compare("db");
}

#[test]
fn an_admin_socket_that_cannot_be_made_keeps_no_client_out() {
    let mut pair = Pair::start(two_volumes());
    pair.stop(ALPHA);
    let path = pair.path("alpha.sock");
    fs::write(&path, "precious").expect("a file at the socket's path");
    pair.up_unasked(ALPHA);
    wait_for("a client is served", LIMIT, || pair.connect(ALPHA, "db").ok());
    pair.wait_log(ALPHA, &["cannot listen", "not a socket"]);
    let ran = pair.cli(ALPHA, &["status"]);
    assert!(ran.stderr.contains(&format!("{} is not a socket", path.display())), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(&path).expect("the file"), "precious");
    fs::remove_file(&path).expect("the file is moved away");
    pair.wait_in_sync("db");
    pair.stop(ALPHA);
}

/// A program that holds a socket and takes no connections, with as many waiting as the kernel holds for it.
fn stuck_program(path: &Path) -> (OwnedFd, UnixStream) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("a path")).expect("bound");
    rustix::net::listen(&socket, 0).expect("listens");
    (socket, UnixStream::connect(path).expect("the one place"))
}

#[test]
fn a_socket_that_a_stuck_program_holds_keeps_nothing_else_down() {
    let mut pair = Pair::create(two_volumes());
    let path = pair.nbd_socket(ALPHA);
    let held = stuck_program(&path);
    pair.up(ALPHA);
    pair.up(BETA);
    for volume in ["db", "web"] {
        pair.wait_in_sync(volume);
    }
    let refused = pair.not_listening(ALPHA);
    let addresses: Vec<_> = refused.iter().map(|refused| refused.address.clone()).collect();
    assert_eq!(addresses, [format!("unix:{}", path.display())], "{refused:?}");
    assert!(refused[0].reason.contains("takes no connections"), "{refused:?}");
    NbdClient::connect(&pair.uri_tcp(ALPHA, "db"), &Options::default()).expect("the other address serves");
    pair.stop(ALPHA);
    assert!(path.exists(), "the socket is its holder's");
    pair.up(ALPHA);
    drop(held);
    wait_for("alpha listens everywhere", LIMIT, || pair.not_listening(ALPHA).is_empty().then_some(()));
    pair.wait_in_sync("db");
    wait_for("a client is served", LIMIT, || pair.connect(ALPHA, "db").ok());
}

#[test]
fn an_admin_socket_that_a_stuck_program_holds_keeps_no_client_out() {
    let mut pair = Pair::create(two_volumes());
    let path = pair.path("alpha.sock");
    let held = stuck_program(&path);
    pair.up_unasked(ALPHA);
    pair.up(BETA);
    wait_for("a client is served", LIMIT, || pair.connect(ALPHA, "db").ok());
    pair.wait_log(ALPHA, &["cannot listen", "takes no connections"]);
    let ran = pair.cli(ALPHA, &["status"]);
    assert!(ran.stderr.contains("takes no connections"), "{}", ran.stderr);
    pair.stop(ALPHA);
    drop(held);
}

#[test]
fn metadata_that_is_a_pipe_is_refused_by_name_and_waited_for_by_nobody() {
    let mut pair = Pair::create(two_volumes());
    let metadata = pair.metadata(ALPHA, "web");
    let hidden = rename(&metadata, "hidden");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &metadata, mode).expect("a FIFO");
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    let status = pair.wait_status(ALPHA, "web", "failed", |status| status.disk_state == "Failed");
    let advice = status.advice.expect("advice");
    let what = format!("metadata {} is neither a file nor a block device", metadata.display());
    assert!(advice.contains(&what) && advice.contains("connect web"), "{advice}");
    for look in ["dump-metadata", "doctor"] {
        let ran = pair.cli(ALPHA, &[look]);
        assert!((ran.stdout.clone() + &ran.stderr).contains(&what), "{look}: {} {}", ran.stdout, ran.stderr);
    }
    fs::remove_file(&metadata).expect("the FIFO is taken away");
    fs::rename(&hidden, &metadata).expect("the metadata is put back");
    pair.cli_ok(ALPHA, &["connect", "web"]);
    pair.wait_in_sync("web");
}
