//! The part of the rig inside a guest that has no RDMA device yet: a pair with `link = "auto"` begins over TCP, gets a
//! device with `costandby soft-roce up`, leaves TCP, and goes on over RDMA under load.
//!
//! Invariants: the session is the same throughout (a lost one shows in the generation), no write fails, the log says what the
//! link is now and tells of no loss, and both disks are equal in the end. A device in use is not taken away.

use crate::ledger::{Ledger, Writing};
use crate::pair::{ALPHA, BETA, NODES, Pair, Settings, VolumeSettings};
use crate::patience::Limits;
use crate::process::{costandby_binary, run as run_program};
use crate::{scaled, wait_while_moving};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const VOLUME: &str = "db";
const SIZE_MIB: u64 = 16;

/// How long the daemons may take to find the device: they look after 3 s, 6 s, 12 s and 24 s, and on a loaded machine it
/// takes an emulated one longer to make two rings than one attempt may. Stretched by how slow the machine is.
const FOUND_MAX: Duration = Duration::from_secs(30);

/// Between two writes of a writer: the rings are made beside them.
const WRITE_PAUSE: Duration = Duration::from_millis(20);

/// How long the writers may take for one write.
const WRITE: Limits = Limits::still(Duration::from_secs(30));

/// Writes that count as some.
const WRITES: u64 = 100;

/// Packets that the device sends for that many at least.
const PACKETS_MIN: u64 = 100;

/// Runs it, with a device on `netdev`.
///
/// # Panics
/// When anything of it does not hold.
pub fn run(netdev: &str) {
    let address = std::env::var("COSTANDBY_RDMA_ADDRESS").ok().and_then(|text| text.parse().ok());
    let settings = Settings {
        link: "auto",
        device_address: Some(address.expect("the address of the interface")),
        ..Settings::new(&[VolumeSettings::new(VOLUME, SIZE_MIB)])
    };
    let pair = Pair::start(settings);
    let seen = [ALPHA, BETA].map(|node| pair.status(node, VOLUME).expect("a daemon answers"));
    for status in &seen {
        let note = status.link_note.as_deref().unwrap_or_default();
        assert!(status.link == "tcp" && note.contains("has no RDMA"), "{status:?}");
    }
    let writing = Ledger::new(SIZE_MIB << 20).write_slowly(&pair.uri(ALPHA, VOLUME), 1, WRITE_PAUSE);
    some_writes(&writing);

    let up = run_program(Command::new(costandby_binary()).args(["soft-roce", "up", netdev])).ok();
    let began = Instant::now();
    for node in [ALPHA, BETA] {
        let status = pair.wait_status(node, VOLUME, "over RDMA", |status| status.link == "rdma");
        assert!(began.elapsed() < scaled(FOUND_MAX), "{} took {:?}", NODES[node], began.elapsed());
        assert_eq!(status.link_note, None, "{status:?}");
        let log = pair.log(node);
        let said = log.lines().filter(|line| line.contains("the link is rdma")).count();
        assert!(said == 1 && !log.contains("lost ") && !log.contains("goes on where"), "{log}");
    }
    println!("{}; in use after {:?}", up.stdout.trim(), began.elapsed());
    let packets = packets(netdev);
    some_writes(&writing);
    let packets = self::packets(netdev) - packets;
    assert!(packets >= PACKETS_MIN, "only {packets} packets went over the device");

    let down = run_program(Command::new(costandby_binary()).args(["soft-roce", "down", netdev]));
    let named = down.stderr.contains("in use by") && down.stderr.contains("costandby (process");
    assert!(!down.status.success() && named, "soft-roce down: {}{}", down.stdout, down.stderr);
    some_writes(&writing);
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, VOLUME)).expect("every acknowledged write is there");
    pair.settle_and_compare(VOLUME);
    for (node, before) in [ALPHA, BETA].into_iter().zip(seen) {
        let after = pair.status(node, VOLUME).expect("a daemon answers");
        let lineage = (before.epoch, before.generation, "rdma");
        assert_eq!((after.epoch, after.generation, after.link.as_str()), lineage, "the session was lost");
    }
}

fn some_writes(writing: &Writing) {
    let wanted = writing.acked() + WRITES;
    let done = wait_while_moving(WRITE, || match writing.acked() {
        acked if acked >= wanted => Ok(()),
        acked => Err(acked),
    });
    done.unwrap_or_else(|(over, acked)| panic!("{acked} of {wanted} writes are acknowledged: {over}"));
}

/// Packets that the device on `netdev` has sent.
fn packets(netdev: &str) -> u64 {
    let counters = format!("/sys/class/infiniband/rxe_{netdev}/ports/1/hw_counters/sent_pkts");
    let text = std::fs::read_to_string(Path::new(&counters)).expect("the device's counters");
    text.trim().parse().expect("a number")
}
