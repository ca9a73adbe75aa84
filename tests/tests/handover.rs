//! What a planned handover, a restart and a crash are to a client that reconnects: a pause. qemu's NBD client
//! (`reconnect-delay`) stands between many writers, or fio, and a pair; the path that it connects to leads to whoever serves,
//! as a floating address does. A file system in the writers' place: tests/ext4.rs.
//!
//! No writer may see an error, for a file system would act on it, and everything that was acknowledged is there at the
//! end.

use costandby_tests::floating::{Floating, PATIENCE, connect};
use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Guarded, PROGRAM_LIMIT};
use costandby_tests::wait_for;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Writes under way at one time, each on a connection and in a range of its own.
const WRITERS: u64 = 32;

/// Bytes of a write.
const LEN: usize = 4096;

/// Places that a writer goes round.
const PLACES: u64 = 64;

fn start() -> Floating {
    Floating::before(Pair::start(Settings::new(&[VolumeSettings::new("db", 16)])))
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
    let uri = floating.uri();
    let rounds: Vec<u64> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (uri, stop, written) = (&uri, &stop, &written);
                scope.spawn(move || {
                    let mut client = connect(uri).expect("a connection to qemu");
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
    let mut reader = connect(&floating.uri()).expect("a connection to qemu");
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
    under_writers(&mut start(), |floating, flows| {
        for _ in 0..5 {
            floating.hand_over();
            flows();
        }
    });
}

#[test]
fn a_restart_is_a_pause_to_a_client_that_reconnects() {
    under_writers(&mut start(), |floating, flows| {
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
    under_writers(&mut start(), |floating, flows| {
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

#[test]
fn fio_sees_no_error_and_reads_back_what_it_wrote_over_two_planned_handovers() {
    let mut floating = start();
    let mut fio = Command::new("fio");
    fio.current_dir(floating.pair.path("."));
    fio.args(["--name=handover", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--thread"]);
    fio.args(["--size=16M", "--verify=crc32c", "--verify_fatal=1", "--rate_iops=1000"]);
    fio.arg(format!("--uri={}", floating.uri()));
    let mut fio = Guarded::spawn(fio.stdin(Stdio::null()).stdout(Stdio::null()));
    for round in 1..=2 {
        // A fifth of the time that fio takes at that rate.
        std::thread::sleep(Duration::from_millis(800));
        assert_eq!(fio.ended(), None, "before handover {round}");
        floating.hand_over();
    }
    let ended = fio.wait(PROGRAM_LIMIT).expect("fio ends");
    assert!(ended.success(), "fio: {ended}");
    floating.pair.settle_and_compare("db");
}
