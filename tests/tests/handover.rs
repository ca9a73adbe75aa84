//! What a planned handover, a restart and a crash are to a client that reconnects: a pause. qemu's NBD client
//! (`reconnect-delay`) stands between many writers and a pair; the path that it connects to leads to whoever serves, as a
//! floating address does.
//!
//! No writer may see an error, for a file system would act on it, and everything that was acknowledged is there at the
//! end.

use costandby_control::nbd_client::{Endpoint, NbdClient, NbdUri, Options};
use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use costandby_tests::process::Guarded;
use costandby_tests::wait_for;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Writes under way at one time, each on a connection and in a range of its own.
const WRITERS: u64 = 16;

/// Bytes of a write.
const LEN: usize = 4096;

/// Places that a writer goes round.
const PLACES: u64 = 64;

/// Longest that qemu's pauses between two tries leave a writer waiting: they double up to 16 s.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pair, qemu in front of it, and the path that leads to whoever serves.
struct Floating {
    pair: Pair,
    path: PathBuf,
    front: PathBuf,
    serves: usize,
    _qemu: Guarded,
    _dir: tempfile::TempDir,
}

fn socket(pair: &Pair, node: usize) -> PathBuf {
    match pair.uri(node, "db").endpoint {
        Endpoint::Unix(path) => path,
        other => panic!("{other:?} is no unix socket"),
    }
}

impl Floating {
    fn start() -> Self {
        let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", 16)]));
        let dir = tempfile::Builder::new().prefix("costandby-").tempdir().expect("a temporary directory");
        let (path, front) = (dir.path().join("floating"), dir.path().join("front"));
        std::os::unix::fs::symlink(socket(&pair, ALPHA), &path).expect("a link");
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=nbd,node-name=db,server.type=unix,server.path={},export=db,reconnect-delay=60,open-timeout=60",
            path.display()
        ));
        command
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", front.display()));
        command.args(["--export", "type=nbd,id=db,node-name=db,name=db,writable=on"]);
        let qemu = Guarded::spawn(command.stdin(Stdio::null()));
        let floating = Self { pair, path, front, serves: ALPHA, _qemu: qemu, _dir: dir };
        wait_for("qemu serves", PATIENCE, || floating.connect().ok());
        floating
    }

    fn connect(&self) -> Result<NbdClient, costandby_control::nbd_client::NbdError> {
        connect(&self.front)
    }

    /// The address goes to the other node.
    fn float(&mut self) {
        self.serves = 1 - self.serves;
        let next = self.path.with_extension("next");
        std::os::unix::fs::symlink(socket(&self.pair, self.serves), &next).expect("a link");
        std::fs::rename(&next, &self.path).expect("the link moves");
    }
}

fn connect(front: &Path) -> Result<NbdClient, costandby_control::nbd_client::NbdError> {
    let uri = NbdUri { endpoint: Endpoint::Unix(front.to_owned()), export: "db".to_owned() };
    NbdClient::connect(&uri, &Options { timeout: PATIENCE, ..Options::default() })
}

fn place(writer: u64, round: u64) -> u64 {
    (writer * PLACES + round % PLACES) * LEN as u64
}

fn payload(writer: u64, round: u64) -> Vec<u8> {
    let word = (writer << 48 | round).to_le_bytes();
    word.iter().copied().cycle().take(LEN).collect()
}

/// Has `work` happen under writers, and checks what they were told.
fn under_writers(floating: &mut Floating, work: impl FnOnce(&mut Floating, &dyn Fn())) {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let front = floating.front.clone();
    let rounds: Vec<u64> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (front, stop, written) = (&front, &stop, &written);
                scope.spawn(move || {
                    let mut client = connect(front).expect("a connection to qemu");
                    let mut round = 0;
                    while !stop.load(Ordering::Relaxed) {
                        round += 1;
                        let told = client.write(place(writer, round), &payload(writer, round), false);
                        told.unwrap_or_else(|error| panic!("writer {writer}, round {round}: {error}"));
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                    round
                })
            })
            .collect();
        // Writing goes on before the next trouble.
        let flows = || {
            let before = written.load(Ordering::Relaxed);
            wait_for("writes go on", PATIENCE, || {
                let failed = writers.iter().any(std::thread::ScopedJoinHandle::is_finished);
                assert!(!failed, "a writer was told of an error");
                (written.load(Ordering::Relaxed) > before + 20 * WRITERS).then_some(())
            });
        };
        flows();
        work(floating, &flows);
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().expect("no writer was told of an error")).collect()
    });
    let mut reader = floating.connect().expect("a connection to qemu");
    reader.flush().expect("a flush");
    for (writer, last) in (0..WRITERS).zip(rounds) {
        for round in last.saturating_sub(PLACES - 1).max(1)..=last {
            let mut found = vec![0; LEN];
            reader.read(place(writer, round), &mut found).expect("a read");
            assert!(found == payload(writer, round), "write {round} of writer {writer} is lost");
        }
    }
    drop(reader);
    floating.pair.wait_in_sync("db");
    floating.pair.settle_and_compare("db");
}

#[test]
fn a_planned_handover_is_a_pause_to_a_client_that_reconnects() {
    under_writers(&mut Floating::start(), |floating, flows| {
        for _ in 0..5 {
            let from = floating.serves;
            floating.pair.hand_over("db", from);
            floating.float();
            flows();
        }
    });
}

#[test]
fn a_restart_is_a_pause_to_a_client_that_reconnects() {
    under_writers(&mut Floating::start(), |floating, flows| {
        for _ in 0..5 {
            floating.pair.stop(ALPHA);
            floating.pair.up(ALPHA);
            flows();
            floating.pair.wait_in_sync("db");
        }
    });
}

#[test]
fn a_crash_is_a_pause_to_a_client_that_reconnects() {
    under_writers(&mut Floating::start(), |floating, flows| {
        floating.pair.kill(ALPHA);
        wait_for("beta may be promoted", PATIENCE, || {
            let promote = costandby_control::admin::Command::Promote { force: false };
            floating.pair.tell(BETA, "db", promote).ok()
        });
        floating.float();
        flows();
        floating.pair.up(ALPHA);
        floating.pair.wait_in_sync("db");
    });
}
