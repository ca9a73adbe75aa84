//! A real file system on a mirrored volume: made, filled and checked on the primary, then checked again on the standby;
//! with nodes killed at random moments, after which every file that was synced is there; and mounted through planned
//! handovers, which no program may notice but as a pause.
//!
//! nbdfuse shows the export as a file, a loop device makes a disk of it, and the kernel's ext4 does the rest. Skipped,
//! aloud, where a machine has no FUSE or no loop devices, as in most containers.

use costandby_control::admin::Command as Operator;
use costandby_control::nbd_client::NbdUri;
use costandby_tests::floating::Floating;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Guarded, run, system_command};
use costandby_tests::{Rng, seed, skip, wait_for};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Kills of a node below a mounted file system.
const KILLS: u64 = 10;

/// How long a survivor may need until it may be promoted.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(5);

/// Files that the writer of those rounds keeps rewriting.
const FILES: u64 = 40;

/// An export as a file, and what stands upon it. Dropping it takes everything down again, top first.
struct Stack {
    nbdfuse: Guarded,
    shown: PathBuf,
    device: Option<String>,
    mounted: Option<PathBuf>,
    /// Nothing is left to take down.
    gone: bool,
}

impl Stack {
    fn new(uri: &NbdUri, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let mut command = Command::new("nbdfuse");
        command.arg(dir.join("disk")).arg(uri.to_string());
        let nbdfuse = Guarded::spawn(&mut command);
        let mut stack = Self { nbdfuse, shown: dir.to_owned(), device: None, mounted: None, gone: false };
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
        self.gone = true;
        assert!(ended.is_some_and(|status| status.success()), "nbdfuse ended with {ended:?}");
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        // After a failure any of these may be gone already; lazily, because a test that failed may hold files open.
        if let Some(at) = self.mounted.take() {
            run(system_command("umount").arg("-l").arg(at));
        }
        if let Some(device) = self.device.take() {
            let _ = run(system_command("losetup").args(["-d", &device]));
        }
        // Also where nbdfuse has ended with its server: its mount stays, and every look at it is an error.
        let _ = run(system_command("umount").arg("-l").arg(&self.shown));
    }
}

/// What a file of the rounds with kills must hold: whole, and of a version not older than the last one synced.
#[derive(Clone, Debug)]
struct Synced {
    /// Of each file, the version synced and the one last begun.
    versions: Vec<(u64, u64)>,
}

/// A file's bytes: its name and version, and what follows from them.
fn version(file: u64, version: u64) -> Vec<u8> {
    let mut rng = Rng::new(file << 40 ^ version);
    let len = 16 + usize::try_from(rng.below(96 << 10)).expect("small");
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend_from_slice(&rng.bytes(len));
    bytes
}

/// Writes files until told to stop or until the file system fails: each anew, synced, renamed into place, the directory
/// synced. That is how programs change a file that must never be lost.
fn keep_writing(
    root: &Path,
    mut synced: Synced,
    mut rng: Rng,
    stop: &Arc<AtomicBool>,
) -> JoinHandle<(Synced, u64)> {
    let (root, stop) = (root.to_owned(), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            let file = rng.below(FILES);
            let entry = &mut synced.versions[usize::try_from(file).expect("small")];
            entry.1 += 1;
            if replace(&root, file, &version(file, entry.1)).is_err() {
                break;
            }
            entry.0 = entry.1;
            count += 1;
        }
        (synced, count)
    })
}

fn replace(root: &Path, file: u64, bytes: &[u8]) -> std::io::Result<()> {
    let new = root.join(format!("new{file}"));
    let mut written = File::create(&new)?;
    written.write_all(bytes)?;
    written.sync_all()?;
    std::fs::rename(new, root.join(format!("file{file}")))?;
    File::open(root)?.sync_all()
}

impl Synced {
    /// Compares with what is in the directory, and takes that as the new state.
    fn check(&mut self, root: &Path) {
        for (file, (synced, begun)) in (0..).zip(&mut self.versions) {
            let path = root.join(format!("file{file}"));
            let found = match std::fs::read(&path) {
                Ok(found) => found,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && *synced == 0 => continue,
                Err(error) => panic!("{}, synced at version {synced}: {error}", path.display()),
            };
            let is = found.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            assert!(
                (*synced..=*begun).contains(&is),
                "{} is of version {is}, {synced} was synced, {begun} begun",
                path.display()
            );
            assert!(found == version(file, is), "{} is not whole at version {is}", path.display());
            *synced = is;
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
        skip(reason);
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

/// A mounted file system on a volume whose nodes are killed.
struct Rounds {
    pair: Pair,
    rng: Rng,
    primary: usize,
    synced: Synced,
    stack: Option<Stack>,
    mount: PathBuf,
}

impl Rounds {
    /// Sees to it that ext4 is mounted on the primary's export, and sound: its journal replayed as after any crash.
    fn mount(&mut self) {
        if self.stack.is_none() {
            let mut stack = Stack::new(&self.pair.uri(self.primary, "db"), &self.pair.path("fuse"));
            stack.attach();
            stack.mount(&self.mount, "noatime");
            self.stack = Some(stack);
        }
    }

    /// Unmounts. With `whole` everything below must have worked; else the server is gone, and so is what was cached.
    fn unmount(&mut self, whole: bool) {
        let mut stack = self.stack.take().expect("it is mounted");
        if whole {
            stack.detach();
            stack.fsck();
            stack.take_down();
        }
    }

    /// Kills `victims` under a writer and returns how many files that one had synced.
    fn kill(&mut self, victims: &[usize]) -> u64 {
        self.mount();
        let stop = Arc::new(AtomicBool::new(false));
        let rng = Rng::new(self.rng.next_u64());
        let writer = keep_writing(&self.mount, self.synced.clone(), rng, &stop);
        std::thread::sleep(Duration::from_millis(200 + self.rng.below(700)));
        for &node in victims {
            self.pair.kill(node);
        }
        let (dead, primary) = (victims[0], self.primary);
        if !victims.contains(&primary) {
            std::thread::sleep(Duration::from_millis(self.rng.below(400)));
            self.pair.up(dead);
            self.pair.wait_in_sync("db");
        } else if victims.len() == 1 {
            wait_for("the survivor may be promoted", TAKEOVER_LIMIT, || {
                self.pair.tell(1 - dead, "db", Operator::Promote { force: false }).ok()
            });
            self.primary = 1 - dead;
        }
        stop.store(true, Ordering::Relaxed);
        let (synced, count) = writer.join().expect("the writer does not panic");
        self.synced = synced;
        self.unmount(!victims.contains(&primary));
        if victims.len() == 2 {
            self.pair.up(ALPHA);
            self.pair.up(BETA);
            self.pair.wait_in_sync("db");
            self.primary = self.pair.primary("db");
        }
        self.mount();
        self.synced.check(&self.mount);
        if victims == [primary] {
            // It catches up below the mounted file system.
            self.pair.up(dead);
            self.pair.wait_in_sync("db");
        }
        count
    }
}

#[test]
fn ext4_keeps_every_synced_file_through_10_kills() {
    if let Some(reason) = lacking() {
        skip(reason);
        return;
    }
    let mut rng = Rng::new(seed());
    let mut settings = Settings::new(&[VolumeSettings::new("db", 64)]);
    settings.peer_timeout = "2s";
    let pair = Pair::start(settings);
    let mut stack = Stack::new(&pair.uri(ALPHA, "db"), &pair.path("fuse"));
    run(system_command("mkfs.ext4").args(["-q", "-F"]).arg(stack.attach())).ok();
    stack.detach();
    stack.take_down();
    let synced = Synced { versions: vec![(0, 0); usize::try_from(FILES).expect("small")] };
    let mount = pair.path("mount");
    let rng = Rng::new(rng.next_u64());
    let mut rounds = Rounds { pair, rng, primary: ALPHA, synced, stack: None, mount };
    let mut total = 0;
    for round in 0..KILLS {
        let primary = rounds.primary;
        let (what, victims) = match round % 5 {
            0 | 3 => ("primary", vec![primary]),
            1 | 4 => ("standby", vec![1 - primary]),
            _ if round % 2 == 0 => ("both", vec![primary, 1 - primary]),
            _ => ("both", vec![1 - primary, primary]),
        };
        let count = rounds.kill(&victims);
        println!("round {round}: killed {what} ({} was primary), {count} files synced", NODES[primary]);
        total += count;
        rounds.unmount(true);
        rounds.pair.settle_and_compare("db");
    }
    assert!(total > KILLS, "files were written: {total}");
}

#[test]
fn ext4_stays_mounted_and_writable_through_planned_handovers() {
    if let Some(reason) = lacking() {
        skip(reason);
        return;
    }
    let mut floating = Floating::before(Pair::start(Settings::new(&[VolumeSettings::new("db", 64)])));
    let (fuse, mount) = (floating.pair.path("fuse"), floating.pair.path("mount"));
    let mut stack = Stack::new(&floating.uri(), &fuse);
    run(system_command("mkfs.ext4").args(["-q", "-F"]).arg(stack.attach())).ok();
    stack.mount(&mount, "noatime,errors=remount-ro");
    let synced = Synced { versions: vec![(0, 0); usize::try_from(FILES).expect("small")] };
    let stop = Arc::new(AtomicBool::new(false));
    let writer = keep_writing(&mount, synced, Rng::new(seed()), &stop);
    for round in 0..2 {
        std::thread::sleep(Duration::from_millis(300));
        floating.hand_over();
        // Waits as long as qemu does.
        let own = replace(&mount, FILES + round, b"after a handover");
        own.unwrap_or_else(|error| panic!("round {round}: a file after the handover: {error}"));
        assert!(!writer.is_finished(), "round {round}: the writer was told of an error");
    }
    stop.store(true, Ordering::Relaxed);
    let (mut synced, count) = writer.join().expect("the writer does not panic");
    assert!(count > 2 * FILES, "files were written: {count}");
    synced.check(&mount);
    stack.detach();
    stack.fsck();
    stack.attach();
    stack.mount(&mount, "ro");
    synced.check(&mount);
    stack.take_down();
    floating.pair.wait_in_sync("db");
    floating.pair.settle_and_compare("db");
}
