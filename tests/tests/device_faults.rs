//! Disks that are block devices and return errors, by the kernel's device mapper: under the data, under the metadata
//! alone, and now and then. No acknowledged write is lost, nobody who cannot keep a record goes on alone, and no daemon dies.
//!
//! Skipped, aloud, where there is no device mapper, as in most containers; `make test-rdma` runs them in a guest.

use costandby_control::admin::Command;
use costandby_control::nbd_client::{NbdClient, Options};
use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{run, system_command};
use costandby_tests::{skip_outside_rig, wait_for};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SIZE_MIB: u64 = 12;

/// What a block device holds besides the volume.
const METADATA_MIB: u64 = 1;

/// Sectors of 512 bytes in a MiB.
const SECTORS_PER_MIB: u64 = 2048;

/// A device whose parts can be made to fail. Dropping it takes it down.
struct Device {
    name: String,
    below: String,
    dir: tempfile::TempDir,
}

impl Device {
    /// A good one, as `node`'s disk of the volume `db`.
    fn new(node: usize) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("medium");
        let made = File::create(&file).and_then(|file| file.set_len((SIZE_MIB + METADATA_MIB) << 20));
        made.expect("a file");
        let below = run(system_command("losetup").args(["--find", "--show"]).arg(&file)).ok().stdout;
        let name = format!("costandby-{}-{}", std::process::id(), NODES[node]);
        let device = Self { name, below: below.trim().to_owned(), dir };
        let table = device.linear(0, SIZE_MIB + METADATA_MIB);
        device.dmsetup(&["create", &device.name, "--noudevrules", "--noudevsync", "--table", &table]);
        // Where no udev is, nobody else makes its node.
        device.dmsetup(&["mknodes", &device.name]);
        let link = device.dir().join(format!("db.{}.img", NODES[node]));
        std::os::unix::fs::symlink(Path::new("/dev/mapper").join(&device.name), link).expect("a link");
        device
    }

    /// The directory in which a link to it stands.
    fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn dmsetup(&self, args: &[&str]) {
        let _ = run(system_command("dmsetup").args(args)).ok();
    }

    /// A line of a table: MiB that work.
    fn linear(&self, start: u64, len: u64) -> String {
        let (start, len) = (start * SECTORS_PER_MIB, len * SECTORS_PER_MIB);
        format!("{start} {len} linear {} {start}", self.below)
    }

    /// A line of a table: MiB that return an error for whatever is asked.
    fn error(start: u64, len: u64) -> String {
        format!("{} {} error", start * SECTORS_PER_MIB, len * SECTORS_PER_MIB)
    }

    /// Makes it what `table` says, under whoever uses it.
    fn become_table(&self, table: &str) {
        self.dmsetup(&["suspend", "--noflush", "--nolockfs", "--noudevsync", &self.name]);
        self.dmsetup(&["load", &self.name, "--table", table]);
        self.dmsetup(&["resume", "--noudevsync", &self.name]);
    }

    fn fail(&self) {
        self.become_table(&Self::error(0, SIZE_MIB + METADATA_MIB));
    }

    fn fail_metadata(&self) {
        let table = [self.linear(0, SIZE_MIB), Self::error(SIZE_MIB, METADATA_MIB)].join("\n");
        self.become_table(&table);
    }

    /// Writes fail every second second.
    fn fail_writes_at_times(&self) {
        let len = (SIZE_MIB + METADATA_MIB) * SECTORS_PER_MIB;
        self.become_table(&format!("0 {len} flakey {} 0 1 1 1 error_writes", self.below));
    }

    fn mend(&self) {
        self.become_table(&self.linear(0, SIZE_MIB + METADATA_MIB));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Whoever still has it open, after a failed test, is left an error.
        let _ = run(system_command("dmsetup").args(["remove", "--force", "--noudevsync", &self.name]));
        let _ = run(system_command("losetup").args(["-d", &self.below]));
    }
}

/// Whether there is a device mapper with these targets; leaves the test out where not.
fn has_device_mapper() -> bool {
    for module in ["loop", "dm_mod", "dm_flakey"] {
        let _ = system_command("modprobe").arg(module).output();
    }
    let targets = system_command("dmsetup").arg("targets").output();
    let found = targets.is_ok_and(|said| {
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        ["linear", "error", "flakey"].iter().all(|target| said.contains(target))
    });
    if !found {
        skip_outside_rig("there is no device mapper");
    }
    found
}

/// A pair with `db` on a device that can fail, on one node, and a file on the other.
/// In this order, for the device is to be dropped after the daemon that has it open.
fn pair(node: usize) -> (Device, Pair) {
    let device = Device::new(node);
    let mut db = VolumeSettings::new("db", SIZE_MIB);
    db.dirs[node] = Some(PathBuf::from(device.dir()));
    let mut settings = Settings::new(&[db]);
    settings.peer_timeout = "3s";
    (device, Pair::start(settings))
}

/// A disk that is not served any more from where it is.
fn is_lost(pair: &Pair, node: usize) -> bool {
    pair.status(node, "db").is_some_and(|status| matches!(status.disk_state.as_str(), "Failed" | "Diskless"))
}

fn start(ledger: Ledger, pair: &Pair, seed: u64) -> costandby_tests::ledger::Writing {
    let writing = ledger.write(&pair.uri(ALPHA, "db"), seed);
    wait_for("a start", LIMIT, || (writing.acked() > 20).then_some(()));
    writing
}

/// Whatever became of alpha, beta has everything.
fn assert_beta_has_all(mut pair: Pair, mut ledger: Ledger) {
    pair.assert_alive(ALPHA);
    pair.kill(ALPHA);
    wait_for("beta may be promoted", LIMIT, || pair.tell(BETA, "db", Command::Promote { force: false }).ok());
    ledger.check(&mut pair.client(BETA, "db")).unwrap_or_else(|lost| panic!("on the survivor: {lost}"));
}

#[test]
fn a_primarys_device_that_fails_takes_nothing_with_it() {
    if !has_device_mapper() {
        return;
    }
    let (device, pair) = pair(ALPHA);
    let writing = start(Ledger::new(SIZE_MIB << 20), &pair, 1);
    device.fail();
    wait_for("alpha notices", LIMIT, || is_lost(&pair, ALPHA).then_some(()));
    let (ledger, _) = writing.finish();
    assert!(pair.log(ALPHA).contains("Input/output error"), "the log says why: {}", pair.log(ALPHA));
    assert_beta_has_all(pair, ledger);
}

#[test]
fn a_standbys_device_that_fails_leaves_the_primary_alone() {
    if !has_device_mapper() {
        return;
    }
    let (device, mut pair) = pair(BETA);
    let writing = start(Ledger::new(SIZE_MIB << 20), &pair, 2);
    device.fail();
    wait_for("beta notices", LIMIT, || is_lost(&pair, BETA).then_some(()));
    let before = writing.acked();
    wait_for("the primary goes on", LIMIT, || (writing.acked() > before + 50).then_some(()));
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.assert_alive(BETA);
    assert!(pair.tell(BETA, "db", Command::Promote { force: false }).is_err(), "a failed disk is promoted");
}

#[test]
fn without_its_record_a_primary_acknowledges_nothing_alone() {
    if !has_device_mapper() {
        return;
    }
    let (device, pair) = pair(ALPHA);
    let writing = start(Ledger::new(SIZE_MIB << 20), &pair, 3);
    device.fail_metadata();
    let told = pair.tell(BETA, "db", Command::Disconnect);
    told.unwrap_or_else(|error| panic!("beta leaves: {error}"));
    std::thread::sleep(Duration::from_secs(5));
    let acked = writing.acked();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(writing.acked(), acked, "writes are acknowledged with no record and no standby");
    let (ledger, error) = writing.finish();
    assert!(error.is_some(), "the writers were told");
    assert!(pair.log(ALPHA).contains("metadata"), "the log says why: {}", pair.log(ALPHA));
    assert_beta_has_all(pair, ledger);
}

#[test]
fn metadata_that_cannot_be_read_is_named() {
    if !has_device_mapper() {
        return;
    }
    let (device, mut pair) = pair(ALPHA);
    pair.stop(ALPHA);
    device.fail_metadata();
    // The kernel may remember what it read before.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    pair.up(ALPHA);
    let status = pair.wait_status(ALPHA, "db", "failed", |status| status.disk_state == "Failed");
    let advice = status.advice.expect("advice");
    let named = ["metadata", "Input/output error"].iter().all(|word| advice.contains(word));
    assert!(named, "{advice}");
    device.mend();
    let told = pair.tell(ALPHA, "db", Command::Connect { discard_my_data: false });
    told.unwrap_or_else(|error| panic!("a good disk again: {error}"));
    pair.wait_in_sync("db");
}

#[test]
fn a_device_that_fails_at_times_ends_as_a_failed_disk_or_as_a_good_one() {
    if !has_device_mapper() {
        return;
    }
    let (device, mut pair) = pair(BETA);
    let writing = start(Ledger::new(SIZE_MIB << 20), &pair, 4);
    device.fail_writes_at_times();
    std::thread::sleep(Duration::from_secs(6));
    device.mend();
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.assert_alive(BETA);
    if is_lost(&pair, BETA) {
        println!("the standby's disk has failed");
        // Not left out: a failed disk holds nothing to look at.
        return;
    }
    // It was lucky: then it must hold what the primary does.
    println!("the standby's disk has not failed");
    let options = Options { timeout: LIMIT, ..Options::default() };
    let mut client = NbdClient::connect(&pair.uri(ALPHA, "db"), &options).expect("a connection");
    client.flush().expect("a flush");
    drop(client);
    pair.wait_in_sync("db");
    pair.kill(ALPHA);
    wait_for("beta may be promoted", LIMIT, || pair.tell(BETA, "db", Command::Promote { force: false }).ok());
    ledger.check(&mut pair.client(BETA, "db")).unwrap_or_else(|lost| panic!("on the standby: {lost}"));
}
