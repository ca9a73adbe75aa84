//! A disk is its daemon's alone, and nothing that holds anything becomes one unasked: what `create` finds, what keeps others
//! out while a daemon runs, a device that has grown, a file that is deleted under the daemon.
//!
//! The tests of block devices use loop devices and are left out, aloud, where there are none.

use costandby_control::nbd_client::{NbdClient, Options};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{costandby_binary, is_installed, run, system_command};
use costandby_tests::{skip_outside_rig, wait_for};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

const MIB: u64 = 1 << 20;
const SIZE_MIB: u64 = 8;

/// A loop device. Dropping it takes it down.
struct Loop {
    device: String,
    dir: tempfile::TempDir,
}

impl Loop {
    /// Of `len_mib` zeros, linked to as `node`'s disk of the volume `db`. `None` where there are no loop devices.
    fn new(node: usize, len_mib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("medium");
        File::create(&file).and_then(|file| file.set_len(len_mib * MIB)).expect("a file");
        let made = system_command("losetup").args(["--find", "--show"]).arg(&file).output();
        let made = made.ok().filter(|made| made.status.success());
        let Some(made) = made else {
            skip_outside_rig("there are no loop devices");
            return None;
        };
        let device = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        let link = dir.path().join(format!("db.{}.img", NODES[node]));
        std::os::unix::fs::symlink(&device, link).expect("a link");
        Some(Self { device, dir })
    }

    fn grow(&self, len_mib: u64) {
        let file = File::options().write(true).open(self.dir.path().join("medium")).expect("there");
        file.set_len(len_mib * MIB).expect("grown");
        let _ = run(system_command("losetup").args(["-c", &self.device])).ok();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(system_command("losetup").args(["-d", &self.device]));
    }
}

/// A pair whose disk of `db` on alpha is to be a device of this length, with nothing made on alpha yet.
fn settings(device: &Loop) -> Settings {
    let mut db = VolumeSettings::new("db", SIZE_MIB);
    db.dirs[ALPHA] = Some(PathBuf::from(device.dir.path()));
    Settings::new(&[db])
}

#[test]
fn create_takes_a_device_that_holds_something_only_by_force() {
    let Some(device) = Loop::new(ALPHA, SIZE_MIB + 1) else { return };
    let pair = Pair::create(settings(&device));
    // Blank as it was, it was taken. Made once more:
    let said = pair.cli(ALPHA, &["create"]).stderr;
    assert!(said.contains("has metadata already, at its end: of volume db on node alpha"), "{said}");

    run(system_command("mkfs.ext4").args(["-q", "-F", &device.device])).ok();
    let blank = vec![0; usize::try_from(MIB).expect("small")];
    let medium = File::options().write(true).open(&device.device).expect("opens");
    medium.write_all_at(&blank, SIZE_MIB * MIB).expect("written");
    drop(medium);
    let said = pair.cli(ALPHA, &["create"]).stderr;
    assert!(said.contains("it holds an ext2, ext3 or ext4 file system (at byte 1080)"), "{said}");
    assert!(said.contains("--force takes it over and overwrites its last MiB"), "{said}");

    let mount = device.dir.path().join("mounted here");
    fs::create_dir(&mount).expect("a directory");
    let mounted = system_command("mount").arg(&device.device).arg(&mount).output().expect("runs");
    if mounted.status.success() {
        let said = pair.cli(ALPHA, &["create", "--force"]).stderr;
        let _ = run(system_command("umount").arg(&mount)).ok();
        assert!(said.contains("is in use, mounted at ") && said.contains("mounted here"), "{said}");
    } else {
        skip_outside_rig("file systems cannot be mounted");
    }
    let said = pair.cli_ok(ALPHA, &["create", "--force"]);
    assert!(said.contains("content as it is"), "{said}");
}

#[test]
fn a_mounted_device_is_not_served_and_a_served_one_not_mounted() {
    let Some(device) = Loop::new(ALPHA, SIZE_MIB + 1) else { return };
    let mut pair = Pair::create(settings(&device));
    // A file system may well stand on the volume's bytes; its host must not have it mounted beside the daemon.
    let blocks = (SIZE_MIB * 1024).to_string();
    run(system_command("mkfs.ext4").args(["-q", "-F", "-b", "1024", &device.device, &blocks])).ok();
    let mount = device.dir.path().join("there");
    fs::create_dir(&mount).expect("a directory");
    let mounts =
        || system_command("mount").arg(&device.device).arg(&mount).output().expect("runs").status.success();
    if !mounts() {
        skip_outside_rig("file systems cannot be mounted");
        return;
    }
    pair.up(ALPHA);
    let failed = pair.status(ALPHA, "db").expect("answers");
    let advice = failed.advice.unwrap_or_default();
    let unmounted = run(system_command("umount").arg(&mount));
    assert!(failed.disk_state == "Failed" && advice.contains("mounted at "), "{advice}");
    assert!(advice.contains("/there") && advice.contains(" connect db`"), "{advice}");
    let _ = unmounted.ok();
    pair.cli_ok(ALPHA, &["connect", "db"]);
    assert!(!mounts(), "the kernel gives a served device to nobody else");
}

#[test]
fn a_device_that_has_grown_keeps_its_metadata() {
    let Some(device) = Loop::new(ALPHA, SIZE_MIB + 1) else { return };
    let mut pair = Pair::start(settings(&device));
    let data = vec![7; 65_536];
    pair.client(ALPHA, "db").write(MIB, &data, false).expect("written");
    pair.stop(ALPHA);
    let before = pair.cli_ok(ALPHA, &["dump-metadata", "db", "--json"]);
    device.grow(SIZE_MIB + 40);
    let after = pair.cli_ok(ALPHA, &["dump-metadata", "db", "--json"]);
    assert_eq!(before, after, "found where it stood");
    let said = pair.cli(ALPHA, &["create"]).stderr;
    let place = format!("at byte {}, where its end was before it grew", SIZE_MIB * MIB);
    assert!(said.contains(&place), "{said}");
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    let status = pair.status(ALPHA, "db").expect("answers");
    assert_eq!(status.disk_state, "UpToDate", "{status:?}");

    // By force it begins anew at its end, and what stood at the old one is never found again.
    pair.stop(ALPHA);
    pair.cli_ok(ALPHA, &["create", "--force"]);
    device.grow(SIZE_MIB + 50);
    let found = pair.cli_ok(ALPHA, &["dump-metadata", "db", "--json"]);
    assert!(found != after, "{found}");
    let said = pair.cli(ALPHA, &["create"]).stderr;
    assert!(said.contains(&format!("at byte {}", (SIZE_MIB + 39) * MIB)), "{said}");
}

#[test]
fn a_device_without_metadata_is_not_called_damaged() {
    let Some(device) = Loop::new(ALPHA, SIZE_MIB + 1) else { return };
    let mut pair = Pair::create(settings(&device));
    let medium = File::options().write(true).open(&device.device).expect("opens");
    medium.write_all_at(&[0; 8192], SIZE_MIB * MIB).expect("written");
    drop(medium);
    pair.up(ALPHA);
    let advice = pair.status(ALPHA, "db").and_then(|status| status.advice).unwrap_or_default();
    assert!(advice.contains("there is no metadata on device"), "{advice}");
    assert!(!advice.contains("unreadable") && !advice.contains("damaged"), "{advice}");
}

#[test]
fn a_served_file_is_nobody_elses() {
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    let disk = pair.disk(ALPHA, "db");
    // Its metadata's own lock aside: another name for the disk has other metadata.
    let link = pair.path("link.img");
    std::os::unix::fs::symlink(&disk, &link).expect("linked");
    let text = fs::read_to_string(pair.config(ALPHA)).expect("there");
    let other = pair.path("other.toml");
    fs::write(&other, text.replace(disk.to_str().expect("text"), link.to_str().expect("text")))
        .expect("written");
    let mut create = Command::new(costandby_binary());
    create.arg("--config").arg(&other).args(["--node", "alpha", "create", "--force"]);
    let said = run(&mut create);
    assert!(!said.status.success() && said.stderr.contains("is in use"), "{said:?}");
    if is_installed("qemu-img") {
        let bench = |how: &[&str]| {
            let small = ["-f", "raw", "-c", "1", "-d", "1", "-s", "512"];
            run(system_command("qemu-img").arg("bench").args(small).args(how).arg(&disk))
        };
        let said = bench(&["-w"]);
        assert!(!said.status.success() && said.stderr.contains("lock"), "{said:?}");
        let said = bench(&[]);
        assert!(
            !said.status.success() && said.stderr.contains("lock"),
            "a reader could see half a write: {said:?}"
        );
    } else {
        skip_outside_rig("there is no qemu-img");
    }
}

#[test]
fn two_volumes_on_one_file_are_refused_by_name_and_keep_no_third_down() {
    let volumes = ["a", "b", "c"].map(|name| VolumeSettings::new(name, SIZE_MIB));
    let mut pair = Pair::create(Settings::new(&volumes));
    let (first, second) = (pair.disk(ALPHA, "a"), pair.disk(ALPHA, "b"));
    fs::remove_file(&second).expect("removed");
    fs::hard_link(&first, &second).expect("linked");
    pair.up(ALPHA);
    for (volume, other) in [("a", "b"), ("b", "a")] {
        let status = pair.status(ALPHA, volume).expect("answers");
        let advice = status.advice.unwrap_or_default();
        assert_eq!(status.disk_state, "Failed", "{advice}");
        assert!(advice.contains(&format!("the disk of volume {other} as well")), "{advice}");
    }
    assert_ne!(pair.status(ALPHA, "c").expect("answers").disk_state, "Failed");
}

#[test]
fn a_deleted_disk_is_shown_with_what_to_do_until_it_is_back() {
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    let (disk, aside) = (pair.disk(BETA, "db"), pair.path("aside"));
    fs::rename(&disk, &aside).expect("renamed");
    let warned =
        wait_for("a warning", LIMIT, || pair.status(BETA, "db").filter(|status| !status.warnings.is_empty()));
    let warning = &warned.warnings[0];
    assert!(warning.contains("deleted or renamed") && warning.contains("Do not restart"), "{warning}");
    assert!(pair.cli_ok(BETA, &["status"]).contains("warning: disk "), "for people too");
    assert!(pair.log(BETA).contains("was deleted or renamed"), "in the log");
    fs::rename(&aside, &disk).expect("renamed");
    wait_for("its end", LIMIT, || pair.status(BETA, "db").filter(|status| status.warnings.is_empty()));
}

#[test]
fn a_disk_that_hangs_is_shown_on_both_nodes() {
    let Some(device) = Loop::new(ALPHA, 64) else { return };
    let mount = device.dir.path().join("fs");
    fs::create_dir(&mount).expect("a directory");
    run(system_command("mkfs.ext4").args(["-q", "-F", &device.device])).ok();
    let mounted = system_command("mount").arg(&device.device).arg(&mount).output().expect("runs");
    if !mounted.status.success() {
        skip_outside_rig("file systems cannot be mounted");
        return;
    }
    let frozen =
        |on: bool| run(system_command("fsfreeze").arg(if on { "-f" } else { "-u" }).arg(&mount)).ok();
    let seen = std::panic::catch_unwind(|| {
        let mut db = VolumeSettings::new("db", SIZE_MIB);
        db.dirs[ALPHA] = Some(mount.clone());
        let mut settings = Settings::new(&[db]);
        settings.peer_timeout = "5s";
        let pair = Pair::start(settings);
        frozen(true);
        // A write to a place that was not written lately waits for the record of that, and the record's store hangs.
        let uri = pair.uri(ALPHA, "db");
        let writer = std::thread::spawn(move || {
            let mut client = NbdClient::connect(&uri, &Options { timeout: 3 * LIMIT, ..Options::default() })
                .expect("connects");
            client.write(5 * MIB, &[1; 4096], false).expect("written in the end");
        });
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for node in [ALPHA, BETA] {
                wait_for("a warning", LIMIT, || {
                    let status = pair.status(node, "db")?;
                    status
                        .warnings
                        .iter()
                        .any(|said| said.contains("the disk of alpha has not answered"))
                        .then_some(())
                });
            }
        }));
        let _ = frozen(false);
        if let Err(panic) = told {
            std::panic::resume_unwind(panic);
        }
        writer.join().expect("the writer");
        for node in [ALPHA, BETA] {
            wait_for("its end", LIMIT, || {
                pair.status(node, "db").filter(|status| status.warnings.is_empty())
            });
        }
    });
    let _ = run(system_command("umount").arg(&mount));
    if let Err(panic) = seen {
        std::panic::resume_unwind(panic);
    }
}
