//! Tests of the judgements on machines we do not have, and of the report about disks we make here.

use super::machine;
use super::*;
use costandby_datapath::disk::metadata::file::create_at;
use costandby_datapath::disk::superblock::Superblock;
use std::path::PathBuf;

#[test]
fn each_judgement_has_two_sides() {
    let table = [
        (machine::kernel("6.1.0-28-amd64"), Verdict::Ok),
        (machine::kernel("5.10.0"), Verdict::Ok),
        (machine::kernel("5.9.16"), Verdict::Warn),
        (machine::kernel(""), Verdict::Warn),
        (machine::cores_check(1), Verdict::Warn),
        (machine::cores_check(2), Verdict::Ok),
        (machine::memory(Some(8 << 30), Some(4 << 30)), Verdict::Ok),
        (machine::memory(Some(8 << 30), Some(1 << 20)), Verdict::Warn),
        (machine::memory(None, None), Verdict::Warn),
        (machine::crc32c(true), Verdict::Ok),
        (machine::crc32c(false), Verdict::Warn),
        (machine::open_files_check(1024), Verdict::Warn),
        (machine::open_files_check(65536), Verdict::Ok),
        (machine::somaxconn(Some(16)), Verdict::Warn),
        (machine::somaxconn(Some(4096)), Verdict::Ok),
    ];
    for (check, verdict) in table {
        assert_eq!(check.verdict, verdict, "{check:?}");
    }
    assert!(machine::io_uring("6.12.0", Some(2)).text.contains("switched off"));
    assert!(machine::memory_for("volume db", u64::MAX).is_some_and(|check| check.verdict == Verdict::Fail));
    assert_eq!(machine::memory_for("volume db", 4096), None);
}

#[test]
fn the_report_is_aligned_and_one_line_each() {
    let checks = [Check::ok("a", "fine"), Check::fail("longer", "broken\nbadly")];
    assert_eq!(render(&checks, false), "ok    a       fine\nfail  longer  broken; badly\n");
    assert!(render(&checks, true).contains("\x1b[31mfail\x1b[0m"));
}

struct Bench {
    directory: tempfile::TempDir,
    config: Config,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path().display();
        let text = format!(
            r#"
            nodes.alpha = {{ listen = "127.0.0.1:7790", admin = "{at}/alpha.sock" }}
            nodes.beta = {{ listen = "127.0.0.1:7791", admin = "{at}/beta.sock" }}
            volumes.db = {{ size = 65536, primary = "alpha", disk.alpha = "{at}/a.img", disk.beta = "{at}/nix/b.img" }}
            "#
        );
        let config = Config::parse(&text, Path::new("c.toml")).expect("good");
        Self { directory, config }
    }

    fn disk(&self) -> PathBuf {
        self.directory.path().join("a.img")
    }

    fn check(&self, node: &str, running: bool) -> Check {
        let command_line = self.config.command_line(node);
        let node = self.config.node(node).expect("a node");
        let (volume, disk) = self.config.volumes_of(node.name.as_str()).next().expect("a volume");
        let mut checks = disk_checks(&command_line, node, volume, disk, running);
        assert_eq!(checks.len(), 1);
        checks.remove(0)
    }

    fn expect(&self, node: &str, running: bool, verdict: Verdict, part: &str) {
        let check = self.check(node, running);
        assert!(check.verdict == verdict && check.text.contains(part), "{part:?}: {check:?}");
    }
}

#[test]
fn disks_are_found_missing_cut_foreign_in_use_or_good() {
    let bench = Bench::new();
    let make = "if it was never made, `costandby --config c.toml --node alpha create db`";
    bench.expect("alpha", false, Verdict::Fail, make);
    bench.expect("alpha", false, Verdict::Fail, "if it was made before, mount its file system");
    bench.expect("beta", false, Verdict::Fail, "nor is its directory: mount what belongs there");
    std::fs::write(Location::beside(&bench.disk()).path, "anything").expect("written");
    bench.expect("alpha", false, Verdict::Fail, "is missing, and its metadata");
    std::fs::remove_file(Location::beside(&bench.disk()).path).expect("removed");
    std::fs::write(bench.disk(), vec![0; 4096]).expect("written");
    bench.expect("alpha", false, Verdict::Fail, "has 4096 bytes, 65536 are needed");
    std::fs::write(bench.disk(), vec![0; 65536]).expect("written");
    bench.expect("alpha", false, Verdict::Fail, "no metadata");

    let location = Location::beside(&bench.disk());
    create_at(&location, &Superblock::fresh("web", "alpha", 65536, true), 1, true).expect("made");
    bench.expect("alpha", false, Verdict::Fail, "belongs to volume web");
    create_at(&location, &Superblock::fresh("db", "alpha", 65536, true), 2, true).expect("made");
    bench.expect("alpha", false, Verdict::Ok, "UpToDate");

    let held = FileMedium::open(&location.path).expect("opened");
    bench.expect("alpha", true, Verdict::Ok, "in use by the daemon");
    bench.expect("alpha", false, Verdict::Fail, "in use");
    drop(held);
    std::fs::remove_file(bench.disk()).expect("removed");
    std::fs::create_dir(bench.disk()).expect("made");
    bench.expect("alpha", false, Verdict::Fail, "neither a file nor a block device");
}

#[test]
fn addresses_and_sockets_are_tried() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("bound");
    assert_eq!(address_check("listen", address).verdict, Verdict::Fail);
    drop(taken);
    assert_eq!(address_check("listen", address).verdict, Verdict::Ok);
    let foreign = "192.0.2.1:7790".parse().expect("an address");
    let check = address_check("listen", foreign);
    assert_eq!(check.verdict, Verdict::Fail);
    assert!(check.text.contains("no address of this machine: is --node right?"), "{}", check.text);
    let check = address_check("nbd", foreign);
    assert_eq!(check.verdict, Verdict::Warn, "the daemon starts all the same");
    assert!(check.text.contains("192.0.2.1:7790 is no address of this machine now"), "{}", check.text);

    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("x.sock");
    assert_eq!(socket_check("admin socket", &socket).verdict, Verdict::Ok);
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
    assert!(socket_check("nbd socket", &socket).text.contains("another program's"));
    drop(listener);
    assert!(socket_check("nbd socket", &socket).text.contains("left over"));
    std::fs::remove_file(&socket).expect("removed");
    std::fs::write(&socket, "text").expect("written");
    assert!(socket_check("nbd socket", &socket).text.contains("not a socket"));
}
