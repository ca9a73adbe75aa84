//! One guest: a QEMU process, the directory it shares with the host, and what it says.
//!
//! The host puts a command and its settings into the shared directory, starts QEMU and follows the file into which the
//! guest's output goes; the guest leaves its exit status there and powers off. SIGKILL of the process is the plug pulled:
//! what the guest's kernel had not written is lost, what it wrote to a disk's file is there.
//!
//! A guest says how slow it is: how long its boot took, next to that on a quiet machine. All limits but those of booting
//! are stretched by that.
//!
//! Invariants: QEMU dies with the thread that started it, by the kernel's hand where that is killed; no wait is without
//! a limit, and no limit ends what moves ([`crate::patience`]). A guest that panics, hangs or never comes up ends in [`VmError::Guest`] with its last words.

use super::{Rig, VmError, io_error, last_lines, quoted};
use crate::patience::{Limits, Over, Patience};
use crate::process::Guarded;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at a guest's output.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What a guest does that says so in lines, or in a log that is watched: one test may take minutes on an emulated
/// processor, and all of a step's tests half an hour.
pub const WORK: Limits = Limits { still: Duration::from_secs(180), whole: Duration::from_secs(1800) };

/// How long a guest may take from its start until it has its device and says how slow it is: 5 s where nothing else runs.
const BOOT: Limits = Limits::silent(Duration::from_secs(300));

/// How long a guest that has been told to, or has written its status, may take to power off.
const POWER_OFF: Limits = Limits::silent(Duration::from_secs(60));

/// The file by which a guest says how slow it is.
const SLOWNESS: &str = "slowness";

/// Directories of the host that a guest covers with its own.
const COVERED: [&str; 5] = ["/tmp", "/run", "/dev", "/var/tmp", "/share"];

/// Variables of this process that a guest's command gets too.
/// Nothing else: what is passed on stands in a file, and other variables may be secrets.
const PASSED_ON: [&str; 6] =
    ["COSTANDBY_TEST_", "COSTANDBY_LOG", "RUST_BACKTRACE", "RUST_LOG", "NO_COLOR", "TERM"];

/// The guest's port that [`Settings::forward`] leads to.
pub const FORWARDED_PORT: u16 = 10809;

/// What a guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Kernel {
    /// What the system's own Debian has: 6.1 in Debian 12.
    #[default]
    Debian,
    /// 6.12, from bookworm-backports where the system's Debian is older.
    Linux6_12,
}

impl Kernel {
    /// As `tests/vm/image.sh` and the command line call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Linux6_12 => "6.12",
        }
    }
}

impl std::str::FromStr for Kernel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = [Self::Debian, Self::Linux6_12];
        known
            .into_iter()
            .find(|kernel| kernel.name() == name)
            .ok_or_else(|| format!("there is no kernel {name:?}: {}", known.map(Self::name).join(" or ")))
    }
}

/// The wire between two guests: the socket of this end and that of the other.
#[derive(Clone, Debug)]
pub struct Wire {
    /// This guest's end; made by its QEMU.
    pub own: PathBuf,
    /// The other's.
    pub other: PathBuf,
}

/// What a guest is made of and does.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, for messages and for its directory below the run's.
    pub name: String,
    /// Its number, 1 or 2: the last part of its address 10.9.0.N.
    pub node: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Bytes of the largest packet on the RDMA device's network: 9000 gives it a path MTU of 4096, 1500 one of 1024.
    pub mtu: u32,
    /// A wire to another guest; without one both ends of a connection are in this guest.
    pub wire: Option<Wire>,
    /// Where the host is let in to the guest's [`FORWARDED_PORT`], through a second network card.
    pub forward: Option<SocketAddr>,
    /// Files that become /dev/vda and so on.
    pub disks: Vec<PathBuf>,
    /// A bash script to run. Without one, a shell on the terminal.
    pub command: Option<String>,
    /// Variables for it, besides those it gets from here.
    pub environment: Vec<(String, String)>,
}

impl Settings {
    /// A guest by itself that runs `command`.
    #[must_use]
    pub fn new(name: &str, command: &str) -> Self {
        Self {
            name: name.to_owned(),
            node: 1,
            memory_mib: 2048,
            cpus: 2,
            mtu: 9000,
            wire: None,
            forward: None,
            disks: Vec::new(),
            command: Some(command.to_owned()),
            environment: Vec::new(),
        }
    }

    /// Its address on the card by which the host is let in.
    #[must_use]
    pub fn inner_address(&self) -> String {
        format!("10.0.2.{}", 15 + self.node)
    }

    /// Its address on the RDMA device's network.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.9.0.{}", self.node)
    }
}

/// A running guest. Dropping it is pulling the plug.
#[derive(Debug)]
pub struct Guest {
    name: String,
    share: PathBuf,
    logs: PathBuf,
    qemu: Guarded,
    output: File,
    /// Lines that nobody has been handed yet.
    lines: VecDeque<String>,
    /// What was read of a line that has not ended.
    partial: Vec<u8>,
    /// How many times slower than on a quiet machine it is, once it has said.
    slowness: Option<f64>,
}

impl Guest {
    /// Boots a guest. Its files lie in `run`/NAME: `share` is what it sees as /share, `output` what it says.
    ///
    /// # Errors
    /// When files cannot be made or QEMU cannot be started; what happens later shows in the calls that wait.
    pub fn boot(rig: &Rig, run: &Path, settings: &Settings) -> Result<Self, VmError> {
        let logs = run.join(&settings.name);
        let share = logs.join("share");
        std::fs::create_dir_all(&share).map_err(io_error(format!("making {}", share.display())))?;
        write_share(rig, &share, settings)?;
        let output = logs.join("output");
        File::create(&output).map_err(io_error(format!("making {}", output.display())))?;
        let mut qemu = qemu(rig, &logs, &share, settings);
        let messages = logs.join("qemu");
        let messages = File::create(&messages).map_err(io_error(format!("making {}", messages.display())))?;
        qemu.stderr(messages);
        if settings.command.is_some() {
            qemu.stdin(Stdio::null()).stdout(Stdio::null());
        }
        Ok(Self {
            name: settings.name.clone(),
            qemu: Guarded::spawn(&mut qemu),
            output: File::open(&output).map_err(io_error(format!("opening {}", output.display())))?,
            share,
            logs,
            lines: VecDeque::new(),
            partial: Vec::new(),
            slowness: None,
        })
    }

    /// The directory that the guest sees as /share.
    #[must_use]
    pub fn share(&self) -> &Path {
        &self.share
    }

    /// How many times slower than on a quiet machine it is: 1 or more, and 1 until it has said.
    pub fn slowness(&mut self) -> f64 {
        if self.slowness.is_none() {
            let said = std::fs::read_to_string(self.share.join(SLOWNESS)).unwrap_or_default();
            // A line without its end is still being written.
            self.slowness = said.strip_suffix('\n').and_then(|text| text.parse().ok());
        }
        self.slowness.unwrap_or(1.0).max(1.0)
    }

    /// Waits until it has booted, has its device and says how slow it is, or has ended before.
    ///
    /// # Errors
    /// When that takes longer than a boot takes on any machine.
    pub fn wait_up(&mut self) -> Result<(), VmError> {
        let patience = Patience::new(BOOT, Instant::now());
        while self.qemu.ended().is_none() {
            self.slowness();
            if self.slowness.is_some() {
                break;
            }
            if let Some(over) = patience.over(Instant::now()) {
                return Err(self.error(format!("did not come up: {over}")));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    /// Waits until it says a line that begins with `start`; the rest of that line. Lines before it are passed over.
    ///
    /// # Errors
    /// When it ends before it does, or `limits`, stretched by its slowness, are over: any line of its is progress.
    pub fn wait_line(&mut self, start: &str, limits: Limits) -> Result<String, VmError> {
        match self.wait_line_watching(start, limits, None)? {
            Ok(rest) => Ok(rest),
            Err(over) => Err(self.error(format!("did not say {start:?}: {over}"))),
        }
    }

    /// The same, where a file's growth is progress too; `Ok(Err(_))` says that the limits are over.
    ///
    /// # Errors
    /// When it ends before it does.
    pub fn wait_line_watching(
        &mut self,
        start: &str,
        limits: Limits,
        watched: Option<&Path>,
    ) -> Result<Result<String, Over>, VmError> {
        self.wait_up()?;
        let limits = limits.stretched(self.slowness());
        let mut found = None;
        let over = self.follow(limits, watched, |line| {
            found = line.strip_prefix(start).map(|rest| rest.trim().to_owned());
            found.is_some()
        })?;
        match (found, over) {
            (Some(rest), _) => Ok(Ok(rest)),
            (None, Some(over)) => Ok(Err(over)),
            (None, None) => Err(self.error(format!("ended before it said {start:?}"))),
        }
    }

    /// Hands each of its lines to `line` until that returns `true`, or until the guest has ended; the reason where it gave
    /// up before. What is progress: a line, and the growth of the file `watched`.
    ///
    /// # Errors
    /// When its output cannot be read.
    pub fn follow(
        &mut self,
        limits: Limits,
        watched: Option<&Path>,
        mut line: impl FnMut(&str) -> bool,
    ) -> Result<Option<Over>, VmError> {
        let mut patience = Patience::new(limits, Instant::now());
        let mut len = None;
        loop {
            // In this order: what it said last must not be missed.
            let ended = self.qemu.ended().is_some();
            self.read_output()?;
            while let Some(said) = self.lines.pop_front() {
                patience.moved(Instant::now());
                if line(&said) {
                    return Ok(None);
                }
            }
            if ended {
                return Ok(None);
            }
            let now = watched.and_then(|file| std::fs::metadata(file).ok()).map(|found| found.len());
            if now != len {
                len = now;
                patience.moved(Instant::now());
            }
            if let Some(over) = patience.over(Instant::now()) {
                return Ok(Some(over));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// What it said since it was last asked, without waiting.
    ///
    /// # Errors
    /// When it has ended.
    pub fn said(&mut self) -> Result<Vec<String>, VmError> {
        let ended = self.qemu.ended().is_some();
        self.read_output()?;
        if ended && self.lines.is_empty() {
            return Err(self.error("ended by itself".to_owned()));
        }
        Ok(self.lines.drain(..).collect())
    }

    fn read_output(&mut self) -> Result<(), VmError> {
        self.output.read_to_end(&mut self.partial).map_err(io_error("reading a guest's output"))?;
        let end = self.partial.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let rest = self.partial.split_off(end);
        let whole = std::mem::replace(&mut self.partial, rest);
        self.lines.extend(String::from_utf8_lossy(&whole).lines().map(str::to_owned));
        Ok(())
    }

    /// Waits until it powers off; the exit status of its command.
    ///
    /// # Errors
    /// When it does not within `limits`, stretched by its slowness, or left no status.
    pub fn finish(mut self, limits: Limits) -> Result<i32, VmError> {
        let limits = limits.stretched(self.slowness());
        if let Some(over) = self.follow(limits, None, |_| false)? {
            return Err(self.error(format!("does not end: {over}")));
        }
        self.status()
    }

    /// The exit status of its command, of a guest that has ended.
    ///
    /// # Errors
    /// When it left none: its kernel panicked, or it was killed.
    pub fn status(&mut self) -> Result<i32, VmError> {
        let limits = POWER_OFF.stretched(self.slowness());
        if self.qemu.wait(limits.whole).is_none() {
            return Err(self.error("does not power off".to_owned()));
        }
        let text = std::fs::read_to_string(self.share.join("status")).unwrap_or_default();
        text.trim().parse().map_err(|_| self.error("ended without an exit status".to_owned()))
    }

    /// Pulls the plug: SIGKILL.
    ///
    /// # Errors
    /// When it had ended by itself.
    pub fn pull_the_plug(mut self) -> Result<(), VmError> {
        if self.qemu.ended().is_some() {
            return Err(self.error("ended by itself before the plug was pulled".to_owned()));
        }
        self.qemu.kill();
        Ok(())
    }

    /// That it failed, with its last words.
    #[must_use]
    pub fn error(&self, what: String) -> VmError {
        let mut last_words = String::new();
        for log in ["console", "qemu", "output"] {
            last_words.push_str(&last_lines(&self.logs.join(log), 12));
        }
        VmError::Guest { guest: self.name.clone(), what, last_words }
    }
}

/// The files by which a guest knows what to do.
fn write_share(rig: &Rig, share: &Path, settings: &Settings) -> Result<(), VmError> {
    let write = |name: &str, text: &str| {
        let path = share.join(name);
        std::fs::write(&path, text).map_err(io_error(format!("writing {}", path.display())))
    };
    let modules = rig.boots_from().join("kernel/lib/modules");
    let real = |path: &Path| path.canonicalize().map_err(io_error(format!("finding {}", path.display())));
    let (rows, columns) = terminal_size();
    write("guest.sh", include_str!("../../vm/guest.sh"))?;
    write("modules", &format!("{}\n", real(&modules)?.display()))?;
    write("keep", &kept(&[real(&rig.root)?, real(&rig.vm)?, real(&rig.profile)?]))?;
    write(
        "settings",
        &format!(
            "NODE={}\nADDRESS={}\nINNER_ADDRESS={}\nWIRE={}\nMTU={}\nSHELL_ON_CONSOLE={}\nHEIGHT={rows}\nWIDTH={columns}\n",
            settings.node,
            settings.address(),
            settings.forward.map(|_| settings.inner_address()).unwrap_or_default(),
            u8::from(settings.wire.is_some()),
            settings.mtu,
            u8::from(settings.command.is_none()),
        ),
    )?;
    write("environment", &environment(settings))?;
    let directory = std::env::current_dir().map_err(io_error("finding the current directory"))?;
    write("directory", &format!("{}\n", directory.display()))?;
    // Those of an earlier boot must not be taken for this one's.
    for said in ["status", SLOWNESS] {
        let _ = std::fs::remove_file(share.join(said));
    }
    write("command", settings.command.as_deref().unwrap_or_default())
}

/// Shell commands that set a guest's variables.
fn environment(settings: &Settings) -> String {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    let passed_on = |(name, _): &(String, String)| {
        let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        is_name && PASSED_ON.iter().any(|start| name.starts_with(start))
    };
    let inherited = std::env::vars_os().filter_map(text).filter(passed_on);
    let mut commands = String::new();
    for (name, value) in inherited.chain(settings.environment.iter().cloned()) {
        let _ = writeln!(commands, "export {name}={}", quoted(&value));
    }
    commands
}

/// Those of `dirs` that a guest would not see otherwise, one a line.
fn kept(dirs: &[PathBuf]) -> String {
    let covered = |dir: &&PathBuf| COVERED.iter().any(|cover| dir.starts_with(cover));
    dirs.iter().filter(covered).map(|dir| format!("{}\n", dir.display())).collect()
}

/// Lines and columns of the terminal, as its user's shell knows them.
fn terminal_size() -> (u16, u16) {
    let said = Command::new("stty").arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output();
    let text = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(rows), Some(columns)) if rows > 0 && columns > 0 => (rows, columns),
        _ => (24, 80),
    }
}

/// A path within an option of QEMU's, where a comma would begin the next one.
fn in_option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn qemu(rig: &Rig, logs: &Path, share: &Path, settings: &Settings) -> Command {
    // The kernel kills QEMU when this thread ends in whatever way.
    let mut qemu = Command::new("setpriv");
    qemu.args([
        "--pdeathsig",
        "KILL",
        "--",
        "qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]);
    // sse4.2=off: the emulator works a checksum instruction out bit by bit, several times slower than a table does.
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,sse4.2=off", "-display", "none"]);
    qemu.arg("-smp").arg(settings.cpus.to_string()).arg("-m").arg(settings.memory_mib.to_string());
    qemu.arg("-kernel")
        .arg(rig.boots_from().join("image/vmlinuz"))
        .arg("-initrd")
        .arg(rig.boots_from().join("image/initramfs.gz"));
    // mitigations=off: they cost much under emulation and protect nobody here. panic=-1: the end, rather than a hang.
    // tsc: the emulated processors count alike, and any other clock is a device to be asked by a system call.
    let options =
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable clocksource=tsc";
    qemu.args(["-append", options]);
    qemu.arg("-serial").arg(format!("file:{}", logs.join("console").display()));
    qemu.args(["-device", "virtio-serial-pci"]);
    qemu.arg("-chardev").arg(format!("file,id=output,path={}", in_option(&logs.join("output"))));
    qemu.args(["-device", "virtserialport,chardev=output,name=output"]);
    if settings.command.is_none() {
        qemu.args(["-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal"]);
    }
    qemu.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    let share = in_option(share);
    qemu.arg("-fsdev").arg(format!("local,id=share,path={share},security_model=none,multidevs=remap"));
    qemu.args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]);
    if let Some(wire) = &settings.wire {
        let (own, other) = (in_option(&wire.own), in_option(&wire.other));
        qemu.arg("-netdev").arg(format!(
            "dgram,id=wire,local.type=unix,local.path={own},remote.type=unix,remote.path={other}"
        ));
        let node = settings.node;
        qemu.arg("-device")
            .arg(format!("virtio-net-pci,netdev=wire,mac=52:54:00:09:00:{node:02x},host_mtu=9000,romfile="));
    }
    if let Some(address) = settings.forward {
        let inner = settings.inner_address();
        // restrict: the guest reaches nothing outside; only what the host begins comes through.
        qemu.arg("-netdev")
            .arg(format!("user,id=host,restrict=on,hostfwd=tcp:{address}-{inner}:{FORWARDED_PORT}"));
        let node = settings.node;
        qemu.arg("-device").arg(format!("virtio-net-pci,netdev=host,mac=52:54:00:0a:00:{node:02x},romfile="));
    }
    for (number, disk) in settings.disks.iter().enumerate() {
        let disk = in_option(disk);
        qemu.arg("-drive").arg(format!("if=none,id=disk{number},file={disk},format=raw,cache=writeback"));
        qemu.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number}"));
    }
    qemu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_covers_is_kept_and_nothing_else() {
        let dirs = ["/tmp/clone", "/home/user/clone", "/tmpfiles", "/run/x"].map(PathBuf::from);
        assert_eq!(kept(&dirs), "/tmp/clone\n/run/x\n");
    }

    #[test]
    fn a_comma_in_a_path_stays_in_its_option() {
        assert_eq!(in_option(Path::new("/a,b/c")), "/a,,b/c");
    }
}
