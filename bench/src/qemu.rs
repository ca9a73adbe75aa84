//! The peer to compare with: qemu-storage-daemon exporting a quorum of a local file and a remote NBD disk.
//!
//! One daemon serves the second disk over NBD, by TCP or by a unix socket; the other mirrors each write to its own file
//! and to the first, and exports the pair over NBD to the same fio job. Two votes of two are asked for, so a write
//! completes when both children have it: what ack level `memory` promises here. Like our mapping, the files go
//! through the page cache (`cache.direct=off`). Each kind of file access qemu offers there is tried; the best counts.

use crate::Outcome;
use crate::inproc::allocate;
use crate::nbd::{fill, free_port, same_bytes};
use crate::process::Process;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program.
const PROGRAM: &str = "qemu-storage-daemon";

/// How the mirroring daemon reaches the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Hop {
    /// Loopback TCP.
    Tcp,
    /// A unix socket.
    Unix,
}

/// Two daemons, the pair exported.
pub(crate) struct Quorum {
    disks: [PathBuf; 2],
    /// For fio.
    pub(crate) uri: String,
    /// The mirroring one first, so that it is ended first.
    _daemons: [Process; 2],
}

/// Whether qemu is missing, and if so what to do.
pub(crate) fn missing() -> Option<String> {
    let found = Command::new(PROGRAM).arg("--version").output().is_ok_and(|output| output.status.success());
    (!found).then(|| format!("qemu: there is no {PROGRAM} (Debian: apt-get install qemu-system-common)"))
}

impl Quorum {
    /// Makes the disks in `directory` and starts both daemons.
    pub(crate) fn start(directory: &Path, hop: Hop, aio: &str, disk_len: u64) -> Outcome<Self> {
        std::fs::create_dir_all(directory)?;
        let disks = ["local", "remote"].map(|name| directory.join(format!("{name}.img")));
        for disk in &disks {
            allocate(disk, disk_len)?;
        }
        let at = |name: &str| directory.join(name).display().to_string();
        let file = |node: &str, disk: &Path| {
            format!(
                "driver=file,node-name={node},filename={},aio={aio},cache.direct=off,cache.no-flush=off",
                disk.display()
            )
        };
        let (address, server) = match hop {
            Hop::Unix => {
                let path = at("remote.nbd");
                (format!("addr.type=unix,addr.path={path}"), format!("server.type=unix,server.path={path}"))
            }
            Hop::Tcp => {
                let port = free_port()?;
                let of = |what: &str| format!("{what}.type=inet,{what}.host=127.0.0.1,{what}.port={port}");
                (of("addr"), of("server"))
            }
        };
        let mut remote = daemon(&[
            ("--blockdev", file("disk", &disks[1])),
            ("--nbd-server", address),
            ("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on".into()),
            ("--pidfile", at("remote.pid")),
        ]);
        let mut remote = Process::start(&mut remote, &directory.join("remote.log"))?;
        let pid_file = directory.join("remote.pid");
        remote.wait_until("the remote qemu to be ready", || pid_file.exists())?;
        let quorum = r#"{"driver":"quorum","node-name":"pair","vote-threshold":2,"children":["disk","far"]}"#;
        let mut local = daemon(&[
            ("--blockdev", file("disk", &disks[0])),
            ("--blockdev", format!("driver=nbd,node-name=far,export=disk,{server}")),
            ("--blockdev", quorum.into()),
            ("--nbd-server", format!("addr.type=unix,addr.path={}", at("local.nbd"))),
            ("--export", "type=nbd,id=export,node-name=pair,name=bench,writable=on".into()),
            ("--pidfile", at("local.pid")),
        ]);
        let mut local = Process::start(&mut local, &directory.join("local.log"))?;
        let pid_file = directory.join("local.pid");
        local.wait_until("the mirroring qemu to be ready", || pid_file.exists())?;
        let uri = format!("nbd+unix:///bench?socket={}", at("local.nbd"));
        fill(&uri)?;
        Ok(Self { disks, uri, _daemons: [local, remote] })
    }

    /// Both disks are equal.
    pub(crate) fn check(&self) -> Outcome<()> {
        same_bytes(&self.disks[0], &self.disks[1])
    }
}

fn daemon(options: &[(&str, String)]) -> Command {
    let mut command = Command::new(PROGRAM);
    for (option, value) in options {
        command.arg(option).arg(value);
    }
    command
}
