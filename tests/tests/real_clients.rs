//! Real NBD clients against two running daemons: what they write is what they read, and both disks end equal.
//!
//! Debian's nbdinfo, nbdcopy, qemu-io, qemu-img and fio, as a user would run them. After each, the volume is flushed, and
//! once it is quiet the disks of both nodes are compared byte for byte. With `COSTANDBY_TEST_LINK=rdma` the copies go by
//! RDMA; that needs a device, so the rig in `src/vm` runs these tests again where there is one.

use costandby_control::nbd_client::{NbdClient, NbdUri, NoReads, Options};
use costandby_tests::Rng;
use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Ran, run, run_within};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn pair(size_mib: u64) -> Pair {
    Pair::start(Settings::new(&[VolumeSettings::new("db", size_mib)]))
}

fn program(name: &str, args: &[&str]) -> Ran {
    run(Command::new(name).args(args))
}

/// A file of data, zeros and data again, so that copying tools meet both.
fn source_file(pair: &Pair, size: u64, seed: u64) -> PathBuf {
    let path = pair.path("source.raw");
    let mut rng = Rng::new(seed);
    let mut bytes = rng.bytes(usize::try_from(size).expect("small"));
    let third = bytes.len() / 3;
    bytes[third..2 * third].fill(0);
    std::fs::write(&path, bytes).expect("a source file");
    path
}

fn assert_same_bytes(left: &Path, right: &Path) {
    let read =
        |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (a, b) = (read(left), read(right));
    assert_eq!(a.len(), b.len(), "lengths of {} and {}", left.display(), right.display());
    let first = a.iter().zip(&b).position(|(a, b)| a != b);
    assert_eq!(first, None, "{} and {} differ at this byte", left.display(), right.display());
}

#[test]
fn nbdinfo_sees_what_the_export_is() {
    let pair = pair(16);
    for uri in [pair.uri(ALPHA, "db").to_string(), pair.uri_tcp(ALPHA, "db").to_string()] {
        let said = program("nbdinfo", &["--json", &uri]).ok().stdout;
        let json: serde_json::Value = serde_json::from_str(&said).expect("nbdinfo writes JSON");
        assert_eq!(json["protocol"], "newstyle-fixed");
        assert_eq!(json["structured"], true);
        let export = &json["exports"][0];
        assert_eq!(export["export-name"], "db");
        assert_eq!(export["export-size"], 16 * MIB);
        assert_eq!(export["is_read_only"], false);
        for able in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache", "can_df"]
        {
            // A server that sends every read whole need not offer to.
            assert!(able == "can_df" || export[able] == true, "{able} is {}", export[able]);
        }
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 32 * MIB);
    }
    let list = program("nbdinfo", &["--list", "--json", &pair.uri(ALPHA, "").to_string()]).ok().stdout;
    assert!(list.contains("\"export-name\": \"db\""), "the list has db: {list}");
}

#[test]
fn the_standby_refuses_clients_and_says_where_to_go() {
    let pair = pair(16);
    let uri = pair.uri(BETA, "db").to_string();
    let refused = program("nbdinfo", &[&uri]);
    assert!(!refused.status.success(), "the standby serves: {}", refused.stdout);
    // Of the two, only this one prints the server's own words.
    let refused = program("qemu-img", &["info", "-f", "raw", &uri]);
    assert_eq!(refused.status.code(), Some(1), "the standby serves: {}", refused.stdout);
    assert!(refused.stderr.contains("served by alpha"), "the message names the primary: {}", refused.stderr);
}

#[test]
fn nbdinfo_maps_what_is_allocated() {
    let pair = pair(16);
    let mut client = pair.client(ALPHA, "db");
    client.write(0, &vec![7; 16 << 20], false).expect("a write");
    client.trim(4 << 20, 8 << 20, false).expect("a trim");
    let uri = pair.uri(ALPHA, "db").to_string();
    let said = program("nbdinfo", &["--map", "--json", &uri]).ok().stdout;
    let extents: Vec<serde_json::Value> = serde_json::from_str(&said).expect("nbdinfo writes JSON");
    let field = |extent: &serde_json::Value, name: &str| extent[name].as_u64().expect("a number");
    let mut next = 0;
    for extent in &extents {
        assert_eq!(field(extent, "offset"), next, "extents without a gap: {said}");
        next += field(extent, "length");
        let middle = field(extent, "offset") + field(extent, "length") / 2;
        let trimmed = (4 * MIB..12 * MIB).contains(&middle) && extents.len() > 1;
        let kinds: &[u64] = match (trimmed, pair.device_keeps_pages()) {
            (true, false) => &[3],
            (true, true) => &[3, 0],
            (false, _) => &[0],
        };
        assert!(kinds.contains(&field(extent, "type")), "{said}");
    }
    assert_eq!(next, 16 * MIB);
    if !pair.device_keeps_pages() {
        assert_eq!(extents.len(), 3, "data, hole, data: {said}");
    }
    let mut trimmed = vec![1; 8 << 20];
    client.read(4 << 20, &mut trimmed).expect("a read");
    assert!(trimmed.iter().all(|&byte| byte == 0), "what was trimmed reads as zeros");
    drop(client);
    pair.settle_and_compare("db");
}

#[test]
fn nbdcopy_in_and_out() {
    let pair = pair(64);
    let source = source_file(&pair, 64 * MIB, 1);
    let uri = pair.uri(ALPHA, "db").to_string();
    program("nbdcopy", &["--flush", "--connections=4", source.to_str().expect("text"), &uri]).ok();
    let back = pair.path("back.raw");
    program("nbdcopy", &["--connections=4", &uri, back.to_str().expect("text")]).ok();
    assert_same_bytes(&source, &back);
    pair.settle_and_compare("db");
    assert_same_bytes(&source, &pair.disk(BETA, "db"));
}

/// `qemu-io` has exit status 0 for some failures, so what it says counts too.
fn qemu_io(uri: &str, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-t", "none"]);
    for text in commands {
        command.args(["-c", text]);
    }
    let ran = run(command.arg(uri)).ok();
    let said = format!("{}{}", ran.stdout, ran.stderr);
    for bad in ["failed", "error", "Error"] {
        assert!(!said.contains(bad), "qemu-io says {said}");
    }
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    let pair = pair(16);
    let uri = pair.uri(ALPHA, "db").to_string();
    let commands = [
        "write -P 0xa5 0 4M",
        "write -P 0x5a -f 4M 64k",
        "write -P 0x11 1M 512",
        "write -z 2M 1M",
        "write -z -u 3M 512k",
        "discard 8M 4M",
        "aio_write -P 0x77 12M 256k",
        "aio_write -P 0x78 13M 256k",
        "aio_flush",
        "flush",
        "read -P 0xa5 0 1M",
        "read -P 0x11 1M 512",
        "read -P 0xa5 1049088 1047040",
        "read -P 0 2M 1536k",
        "read -P 0xa5 3670016 512k",
        "read -P 0x5a 4M 64k",
        "read -P 0 8M 4M",
        "read -P 0x77 12M 256k",
        "read -P 0x78 13M 256k",
    ];
    qemu_io(&uri, &commands);
    pair.settle_and_compare("db");
}

#[test]
fn qemu_img_converts_and_compares() {
    let pair = pair(32);
    let source = source_file(&pair, 32 * MIB, 2);
    let source = source.to_str().expect("text");
    let (uri, tcp) = (pair.uri(ALPHA, "db").to_string(), pair.uri_tcp(ALPHA, "db").to_string());
    program("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", source, &uri]).ok();
    let compared = program("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &tcp]).ok();
    assert!(compared.stdout.contains("identical"), "{}", compared.stdout);
    let copy = pair.path("copy.qcow2");
    let copy = copy.to_str().expect("text");
    program("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &tcp, copy]).ok();
    program("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", copy, source]).ok();
    pair.settle_and_compare("db");

    pair.client(ALPHA, "db").write(5 << 20, b"different", false).expect("a write");
    let compared = program("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    assert_eq!(compared.status.code(), Some(1), "a difference is found: {}", compared.stdout);
    pair.settle_and_compare("db");
}

fn fio(pair: &Pair, uri: &NbdUri, depth: u32, sizes: &str) {
    let mut command = Command::new("fio");
    command.args(["--name=verify", "--ioengine=nbd", "--rw=randwrite"]).arg(format!("--bsrange={sizes}"));
    command.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=42", "--fsync=64"]);
    // Four jobs are four processes, each with a quarter of the volume and a connection of its own.
    command.args(["--numjobs=4", "--offset_increment=16m", "--size=16m", "--group_reporting"]);
    command.args([format!("--iodepth={depth}"), format!("--uri={uri}")]).arg("--output-format=json");
    let ran = run_within(command.current_dir(pair.path("")), Duration::from_secs(120)).ok();
    let start = ran.stdout.find('{').unwrap_or_else(|| panic!("fio writes JSON: {}", ran.stdout));
    let json: serde_json::Value = serde_json::from_str(&ran.stdout[start..]).expect("fio writes JSON");
    let job = &json["jobs"][0];
    assert_eq!(job["error"], 0, "{}", ran.stderr);
    let bytes = |what: &str| job[what]["io_bytes"].as_u64().expect("a number");
    assert_eq!(bytes("read"), bytes("write"), "verified and written");
    // With mixed sizes fio leaves out gaps that no request of the range fits into.
    let least = if sizes == "4k-4k" { 64 * MIB } else { 32 * MIB };
    assert!(bytes("write") >= least, "written: {}", bytes("write"));
    pair.settle_and_compare("db");
}

#[test]
fn fio_verifies_one_deep_on_four_connections() {
    let pair = pair(64);
    fio(&pair, &pair.uri(ALPHA, "db"), 1, "4k-4k");
}

#[test]
fn fio_verifies_32_deep_on_four_connections() {
    let pair = pair(64);
    fio(&pair, &pair.uri(ALPHA, "db"), 32, "4k-4k");
    fio(&pair, &pair.uri_tcp(ALPHA, "db"), 32, "512-64k");
}

/// Writes `data` to `offset` on, in pieces of any size, 32 of them under way at a time.
fn write_odd_pieces(uri: &NbdUri, offset: u64, data: &[u8], mut rng: Rng) {
    let options = Options { timeout: Duration::from_secs(10), ..Options::default() };
    let (mut sender, mut receiver) = NbdClient::connect(uri, &options).expect("a connection").split();
    let (permits, sent) = std::sync::mpsc::sync_channel(32);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for () in sent {
                let reply = receiver.receive(&mut NoReads).expect("a reply");
                reply.result.expect("a write that succeeded");
            }
        });
        let mut at = 0;
        while at < data.len() {
            let len = usize::try_from(1 + rng.below(64 << 10)).expect("small").min(data.len() - at);
            let place = offset + at as u64;
            sender.send_write(place, place, &data[at..at + len], false).expect("a write is sent");
            permits.send(()).expect("the receiver runs");
            at += len;
        }
        drop(permits);
    });
}

/// TCP clients whose payloads begin and end anywhere: what lies in the socket of a sector whose rest is still on its way
/// must not keep that rest away.
#[test]
fn writes_of_odd_sizes_do_not_stall_over_tcp() {
    let pair = pair(64);
    let data = Rng::new(5).bytes(64 << 20);
    let uri = pair.uri_tcp(ALPHA, "db");
    std::thread::scope(|scope| {
        for (n, part) in (0_u64..).zip(data.chunks(16 << 20)) {
            let uri = &uri;
            scope.spawn(move || write_odd_pieces(uri, n * (16 << 20), part, Rng::new(n)));
        }
    });
    let mut found = vec![0; data.len()];
    pair.client(ALPHA, "db").read(0, &mut found).expect("a read");
    assert!(found == data, "the volume holds what was written");
    pair.settle_and_compare("db");
}

/// The flush of one connection covers what another one wrote: afterwards the standby has it in its file too.
#[test]
fn a_flush_covers_the_writes_of_other_connections() {
    let pair = pair(16);
    let mut rng = Rng::new(3);
    let mut writer = pair.client(ALPHA, "db");
    let mut flusher = pair.client(ALPHA, "db");
    for round in 0..50_u64 {
        let data = rng.bytes(64 << 10);
        let offset = round * (64 << 10);
        writer.write(offset, &data, false).expect("a write");
        flusher.flush().expect("a flush on the other connection");
        for node in [ALPHA, BETA] {
            let disk = std::fs::read(pair.disk(node, "db")).expect("a disk");
            let at = usize::try_from(offset).expect("small");
            assert!(disk[at..at + data.len()] == data, "round {round} is not in the file of node {node}");
        }
    }
    pair.settle_and_compare("db");
}
