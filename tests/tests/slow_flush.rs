//! A volume whose disk does not answer its first flush, when the daemon starts, delays no other volume of the node, and
//! comes into service by itself once the disk answers.
//!
//! The disk is a file that nbdfuse shows, of a server that is stopped. Skipped, aloud, where a machine has no FUSE.

use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Guarded, run, system_command};
use costandby_tests::{skip, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const SIZE_MIB: u64 = 8;

/// A file whose reads, writes and flushes can be made to hang. Dropping it takes it down.
struct Disk {
    server: Guarded,
    nbdfuse: Guarded,
    shown: PathBuf,
    _dir: tempfile::TempDir,
}

impl Disk {
    /// Puts one in the place of the disk file at `path`, with its content.
    fn in_place_of(path: &Path) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (medium, socket, shown) =
            (dir.path().join("medium"), dir.path().join("socket"), dir.path().join("shown"));
        std::fs::copy(path, &medium).expect("a copy");
        std::fs::remove_file(path).expect("a disk file");
        std::fs::create_dir(&shown).expect("a directory");
        let mut server = Command::new("qemu-storage-daemon");
        server.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", medium.display()));
        server.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        server.args(["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"]);
        let server = Guarded::spawn(server.stdin(Stdio::null()));
        wait_for("the server listens", LIMIT, || socket.exists().then_some(()));
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse.arg(shown.join("disk")).arg(format!("nbd+unix:///disk?socket={}", socket.display()));
        let nbdfuse = Guarded::spawn(&mut nbdfuse);
        wait_for("nbdfuse shows the disk", LIMIT, || shown.join("disk").exists().then_some(()));
        std::os::unix::fs::symlink(shown.join("disk"), path).expect("a link");
        Self { server, nbdfuse, shown, _dir: dir }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.server.pid().cast_signed()).expect("a process");
        kill_process(pid, signal).expect("a signal");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        run(system_command("umount").arg("-l").arg(&self.shown));
        self.nbdfuse.kill();
    }
}

#[test]
fn a_disk_that_hangs_at_its_first_flush_delays_no_other_volume() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root may mount");
    }
    if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return skip("/dev/fuse cannot be opened");
    }
    let volumes = ["db", "web"].map(|name| VolumeSettings::new(name, SIZE_MIB));
    let mut pair = Pair::create(Settings::new(&volumes));
    let disk = Disk::in_place_of(&pair.disk(ALPHA, "db"));
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    pair.client(ALPHA, "db").write(0, b"before", true).expect("a write");
    // So that the next start flushes what this daemon left.
    pair.kill(ALPHA);

    disk.signal(Signal::STOP);
    pair.up(ALPHA);
    pair.wait_in_sync("web");
    for round in 0..20_u64 {
        let mut client = pair.client(ALPHA, "web");
        client.write(round * 4096, &[7; 4096], true).expect("the other volume takes writes");
        std::thread::sleep(Duration::from_millis(50));
    }
    let status = pair.status(ALPHA, "db").expect("a status");
    assert_eq!(status.disk_state, "Attaching", "its disk hangs still");

    disk.signal(Signal::CONT);
    pair.wait_in_sync("db");
    let mut found = [0; 6];
    pair.client(ALPHA, "db").read(0, &mut found).expect("a read");
    assert_eq!(&found, b"before");
    pair.settle_and_compare("db");
    pair.settle_and_compare("web");
    pair.stop(ALPHA);
}
