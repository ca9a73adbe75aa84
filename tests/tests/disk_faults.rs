//! A disk that fails under a running daemon: truncated, or on a file system that is full, which its metadata is on too.
//! It ends as an I/O error and a Failed disk, never as a dead daemon; the other volume does not notice, and the peer
//! has the data. What a primary makes of a peer in sync is in `diskless.rs`.

use costandby_control::nbd_client::NbdError;
use costandby_datapath::front::nbd::proto::NbdErrno;
use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::process::{run, system_command};
use costandby_tests::{skip, wait_for};
use std::path::{Path, PathBuf};

const SIZE_MIB: u64 = 16;

fn truncate(pair: &Pair, node: usize, volume: &str) {
    let disk = pair.disk(node, volume);
    let file = std::fs::File::options().write(true).open(disk).expect("a disk");
    file.set_len(1 << 20).expect("a disk can be cut short");
}

fn two_volumes() -> Pair {
    Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB), VolumeSettings::new("web", SIZE_MIB)]))
}

fn assert_other_volume_works(pair: &Pair) {
    let mut client = pair.client(ALPHA, "web");
    client.write(3 << 20, &[0x77; 1 << 20], true).expect("the other volume takes writes");
    pair.settle_and_compare("web");
}

#[test]
fn a_primary_alone_whose_disk_is_truncated_fails_it_and_lives() {
    let mut pair = two_volumes();
    let mut client = pair.client(ALPHA, "db");
    client.write(8 << 20, &[0x55; 1 << 20], false).expect("a write before");
    pair.stop(BETA);
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "web"), 1);
    truncate(&pair, ALPHA, "db");
    let error = client.write(9 << 20, &[0x66; 4096], false).expect_err("a write beyond the file's end");
    assert_eq!(error.errno(), Some(NbdErrno::Io), "{error}");
    let status = pair.wait_status(ALPHA, "db", "failed", |status| status.disk_state == "Failed");
    assert_eq!(status.role, "standby", "a failed disk is not served");
    assert!(status.advice.is_some_and(|advice| advice.contains("disk failed")), "the status says so");
    pair.assert_alive(ALPHA);
    let before = writing.acked();
    wait_for("the other volume's writers go on", LIMIT, || (writing.acked() > before + 100).then_some(()));
    let _ = writing.finish_ok();
    pair.up(BETA);
    assert_other_volume_works(&pair);

    pair.promote(BETA, "db");
    let mut found = vec![0; 1 << 20];
    pair.client(BETA, "db").read(8 << 20, &mut found).expect("a read from the survivor");
    assert!(found == [0x55; 1 << 20], "what was acknowledged is on the survivor");
}

#[test]
fn a_read_of_a_truncated_disk_is_an_io_error() {
    let mut pair = two_volumes();
    let mut client = pair.client(ALPHA, "db");
    pair.stop(BETA);
    truncate(&pair, ALPHA, "db");
    let error = client.read(9 << 20, &mut [0; 8192]).expect_err("a read beyond the file's end");
    assert!(
        error.errno() == Some(NbdErrno::Io) || matches!(error, NbdError::Io { .. }),
        "an I/O error, or the connection's end: {error}"
    );
    pair.wait_status(ALPHA, "db", "failed", |status| status.disk_state == "Failed");
    pair.assert_alive(ALPHA);
    pair.up(BETA);
    assert_other_volume_works(&pair);
}

#[test]
fn a_standby_whose_disk_is_truncated_leaves_the_primary_alone() {
    let mut pair = two_volumes();
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 2);
    wait_for("a start", LIMIT, || (writing.acked() > 20).then_some(()));
    truncate(&pair, BETA, "db");
    pair.wait_status(BETA, "db", "failed", |status| status.disk_state == "Failed");
    let before = writing.acked();
    wait_for("the primary goes on", LIMIT, || (writing.acked() > before + 100).then_some(()));
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    let status = pair.status(ALPHA, "db").expect("a status");
    assert!(!status.in_sync() && status.role == "primary", "{status:?}");
    pair.assert_alive(BETA);
    assert!(pair.tell(BETA, "db", costandby_control::admin::Command::Promote { force: false }).is_err());
    assert_other_volume_works(&pair);
}

/// A file system of its own, small enough to fill.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, mib: u64) -> Self {
        std::fs::create_dir_all(at).expect("a directory");
        let mut mount = system_command("mount");
        let _ =
            run(mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "costandby-test"]).arg(at)).ok();
        Self(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: the daemon may still have the disk open.
        let _ = run(system_command("umount").arg("-l").arg(&self.0));
    }
}

/// Whether a file system can be mounted here; leaves the test out where not.
fn may_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("only root may mount");
    }
    root
}

/// A pair whose `db` lies sparse on a file system with half its room, on one node.
fn cramped(node: usize) -> (Pair, Tmpfs, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tmpfs = Tmpfs::mount(&dir.path().join("small"), SIZE_MIB / 2);
    let mut db = VolumeSettings::new("db", SIZE_MIB);
    db.dirs[node] = Some(tmpfs.0.clone());
    let mut settings = Settings::new(&[db, VolumeSettings::new("web", SIZE_MIB)]);
    settings.sparse = true;
    (Pair::start(settings), tmpfs, dir)
}

#[test]
fn a_primary_on_a_full_file_system_goes_on_over_its_peer() {
    if !may_mount() {
        return;
    }
    let (mut pair, _tmpfs, _dir) = cramped(ALPHA);
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 3);
    pair.wait_status(ALPHA, "db", "diskless", |status| status.disk_state == "Diskless");
    let before = writing.acked();
    wait_for("the writers go on", LIMIT, || (writing.acked() > before + 100).then_some(()));
    let mut ledger = writing.finish_ok();
    pair.assert_alive(ALPHA);
    assert_other_volume_works(&pair);
    pair.tell(ALPHA, "db", costandby_control::admin::Command::Demote).expect("demoted");
    pair.wait_status(BETA, "db", "apart", |status| status.peer_state == "Unknown");
    pair.promote(BETA, "db");
    ledger.check(&mut pair.client(BETA, "db")).unwrap_or_else(|lost| panic!("on the survivor: {lost}"));
}

#[test]
fn a_standby_on_a_full_file_system_leaves_the_primary_alone() {
    if !may_mount() {
        return;
    }
    let (mut pair, _tmpfs, _dir) = cramped(BETA);
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 4);
    pair.wait_status(BETA, "db", "failed", |status| status.disk_state == "Failed");
    let before = writing.acked();
    wait_for("the primary goes on", LIMIT, || (writing.acked() > before + 100).then_some(()));
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.assert_alive(BETA);
    assert_other_volume_works(&pair);
}

#[test]
fn metadata_on_a_full_file_system_costs_no_acknowledged_write() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Room for the disk and for some metadata; what is left is taken before the daemon writes any.
    let tmpfs = Tmpfs::mount(&dir.path().join("small"), SIZE_MIB + 2);
    let mut db = VolumeSettings::new("db", SIZE_MIB);
    db.dirs[ALPHA] = Some(tmpfs.0.clone());
    let mut pair = Pair::create(Settings::new(&[db, VolumeSettings::new("web", SIZE_MIB)]));
    fill(&tmpfs.0.join("filler"));
    pair.up(BETA);
    // Whoever wants room at the start may refuse to start, in so many words.
    let ran = run(pair.command(ALPHA).args(["dump-metadata", "db"]));
    assert!(ran.status.success(), "{}", ran.stderr);
    pair.up(ALPHA);
    pair.wait_in_sync("web");
    let serves = |pair: &Pair| pair.status(ALPHA, "db").is_some_and(|status| status.role == "primary");
    let ledger = Ledger::new(SIZE_MIB << 20);
    let ledger = if serves(&pair) {
        let writing = ledger.write(&pair.uri(ALPHA, "db"), 5);
        std::thread::sleep(std::time::Duration::from_secs(1));
        writing.finish().0
    } else {
        ledger
    };
    pair.assert_alive(ALPHA);
    let mut ledger = ledger;
    let status = pair.status(ALPHA, "db").expect("a status");
    if status.disk_state == "UpToDate" {
        println!("the metadata needed no more room");
        ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
        pair.settle_and_compare("db");
    } else {
        println!("the disk is {}", status.disk_state);
        assert!(pair.log(ALPHA).contains("No space left on device"), "the log says why: {}", pair.log(ALPHA));
        pair.kill(ALPHA);
        wait_for("beta may be promoted", LIMIT, || {
            pair.tell(BETA, "db", costandby_control::admin::Command::Promote { force: false }).ok()
        });
        ledger.check(&mut pair.client(BETA, "db")).unwrap_or_else(|lost| panic!("on the survivor: {lost}"));
    }
}

/// Takes all room that is left.
fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).expect("a file");
    while file.write_all(&[1; 4096]).is_ok() {}
}
