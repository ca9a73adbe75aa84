//! A real file system on a mirrored volume: made, filled and checked on the primary, then checked again on the standby.
//!
//! nbdfuse shows the export as a file, a loop device makes a disk of it, and the kernel's ext4 does the rest. Skipped,
//! aloud, where a machine has no FUSE or no loop devices, as in most containers.

use costandby_control::nbd_client::NbdUri;
use costandby_tests::Rng;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Guarded, run, system_command};
use costandby_tests::wait_for;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An export as a file, and what stands upon it. Dropping it takes everything down again, top first.
struct Stack {
    nbdfuse: Guarded,
    shown: PathBuf,
    device: Option<String>,
    mounted: Option<PathBuf>,
}

impl Stack {
    fn new(uri: &NbdUri, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let mut command = Command::new("nbdfuse");
        command.arg(dir.join("disk")).arg(uri.to_string());
        let nbdfuse = Guarded::spawn(&mut command);
        let mut stack = Self { nbdfuse, shown: dir.to_owned(), device: None, mounted: None };
        wait_for("nbdfuse shows the disk", LIMIT, || {
            let ended = stack.nbdfuse.ended();
            assert!(ended.is_none(), "nbdfuse ended with {ended:?}");
            stack.file().metadata().ok().filter(std::fs::Metadata::is_file)
        });
        stack
    }

    fn file(&self) -> PathBuf {
        self.shown.join("disk")
    }

    fn attach(&mut self) -> &str {
        let said = run(system_command("losetup").args(["--find", "--show"]).arg(self.file())).ok().stdout;
        self.device.insert(said.trim().to_owned())
    }

    fn mount(&mut self, at: &Path, options: &str) {
        std::fs::create_dir_all(at).expect("a directory");
        let device = self.device.as_ref().expect("attached before it is mounted");
        let mut mount = system_command("mount");
        run(mount.args(["-t", "ext4", "-o", options, device]).arg(at)).ok();
        self.mounted = Some(at.to_owned());
    }

    /// Takes the mount and the device away; the file stays.
    fn detach(&mut self) {
        if let Some(at) = self.mounted.take() {
            run(system_command("umount").arg(at)).ok();
        }
        if let Some(device) = self.device.take() {
            run(system_command("losetup").args(["-d", &device])).ok();
        }
    }

    fn fsck(&self) {
        let said = run(system_command("fsck.ext4").args(["-f", "-n"]).arg(self.file())).ok();
        assert!(said.stdout.contains("Pass 5"), "fsck looked at everything: {}", said.stdout);
    }

    fn take_down(mut self) {
        self.detach();
        run(system_command("umount").arg(&self.shown)).ok();
        let ended = self.nbdfuse.wait(LIMIT);
        assert!(ended.is_some_and(|status| status.success()), "nbdfuse ended with {ended:?}");
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // After a failure any of these may be gone already; lazily, because a test that failed may hold files open.
        if let Some(at) = self.mounted.take() {
            run(system_command("umount").arg("-l").arg(at));
        }
        if let Some(device) = self.device.take() {
            let _ = run(system_command("losetup").args(["-d", &device]));
        }
        if self.nbdfuse.ended().is_none() {
            let _ = run(system_command("umount").arg("-l").arg(&self.shown));
        }
    }
}

/// Why this machine cannot run the test, if it cannot.
fn lacking() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root may mount");
    }
    if std::fs::File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return Some("/dev/fuse cannot be opened");
    }
    let free = run(system_command("losetup").arg("--find"));
    if !free.status.success() || !Path::new(free.stdout.trim()).exists() {
        return Some("there is no loop device");
    }
    None
}

/// Fills a directory, changes and removes some of it, and returns what must be there.
fn fill(root: &Path, rng: &mut Rng) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut expected = BTreeMap::new();
    for n in 0..300_u64 {
        let dir = format!("{}/{}", rng.below(8), rng.below(4));
        std::fs::create_dir_all(root.join(&dir)).expect("a directory");
        let name = PathBuf::from(format!("{dir}/file{n}"));
        let len = usize::try_from(rng.below(64 << 10)).expect("small");
        let bytes = rng.bytes(len);
        std::fs::write(root.join(&name), &bytes).expect("a file");
        match rng.below(5) {
            0 => std::fs::remove_file(root.join(&name)).expect("a file to remove"),
            1 => {
                let renamed = PathBuf::from(format!("renamed{n}"));
                std::fs::rename(root.join(&name), root.join(&renamed)).expect("a file to rename");
                expected.insert(renamed, bytes);
            }
            _ => {
                expected.insert(name, bytes);
            }
        }
    }
    expected
}

fn assert_holds(root: &Path, expected: &BTreeMap<PathBuf, Vec<u8>>) {
    for (name, bytes) in expected {
        let found =
            std::fs::read(root.join(name)).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
        assert!(found == *bytes, "{} has other content", name.display());
    }
}

#[test]
fn ext4_survives_a_handover() {
    if let Some(reason) = lacking() {
        println!("SKIPPED: ext4_survives_a_handover, because {reason}");
        eprintln!("SKIPPED: ext4_survives_a_handover, because {reason}");
        return;
    }
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", 96)]));
    let (fuse, mount) = (pair.path("fuse"), pair.path("mount"));

    let mut stack = Stack::new(&pair.uri(ALPHA, "db"), &fuse);
    let device = stack.attach().to_owned();
    run(system_command("mkfs.ext4").args(["-q", "-F", &device])).ok();
    stack.mount(&mount, "discard");
    let expected = fill(&mount, &mut Rng::new(4));
    run(&mut Command::new("sync")).ok();
    assert_holds(&mount, &expected);
    stack.detach();
    stack.fsck();
    stack.take_down();
    pair.settle_and_compare("db");

    pair.hand_over("db", ALPHA);
    let mut stack = Stack::new(&pair.uri(BETA, "db"), &fuse);
    stack.fsck();
    stack.attach();
    stack.mount(&mount, "ro");
    assert_holds(&mount, &expected);
    stack.take_down();
    pair.settle_and_compare("db");
}
