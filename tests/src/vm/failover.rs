//! The cable and then the plug pulled on a primary: two guests, alpha and beta, with a wire between them and a disk each on
//! the host.
//!
//! A client in beta's guest writes to alpha ([`super::survivor`]). First the wire carries nothing for a while, and neither
//! card can tell: both notice, and come together again. Then alpha's QEMU gets SIGKILL in mid-write, which takes
//! with it whatever alpha's kernel had not written out. Beta is promoted and must hold every acknowledged write. Then
//! alpha boots again on the same disk, catches up under load, and the two disks are compared from outside.
//!
//! Invariants: the disks are compared only after both guests have powered off; both are as large as they were made.

use super::guest::{Guest, Settings, WORK, Wire};
use super::{Rig, Steps, VmError, io_error, last_lines, quoted};
use crate::patience::Limits;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The nodes, with their addresses. Alpha starts as primary.
pub const PAIR: [(&str, &str); 2] = [("alpha", "10.9.0.1"), ("beta", "10.9.0.2")];
/// The volume.
pub const VOLUME: &str = "db";
/// Its size. Two guests on two cores copy some 3 MiB a second.
pub const SIZE_MIB: u64 = 24;
/// Where a node serves NBD clients of other machines.
pub const NBD_PORT: u16 = 10809;

/// What a block device holds besides the volume.
const METADATA_MIB: u64 = 1;

/// How long daemons may take to end, and guests to power off.
const STOP: Limits = Limits::silent(Duration::from_secs(120));

/// How long both may take to notice that the cable is out, waking up and being asked included. An RDMA device gives up
/// after 0.7 s, over TCP it takes `peer_timeout`; the rest is for emulated processors. Stretched by how slow they are.
const NOTICE_MAX: Duration = Duration::from_secs(3);

/// How long anything is waited for that should happen in that time.
const NOTICE: Limits = Limits::silent(Duration::from_secs(60));

/// The cable is out for this long after both have noticed.
const CUT_TIME: Duration = Duration::from_millis(500);

/// Writing goes on for this long before the plug is pulled.
const WRITE_TIME: Duration = Duration::from_secs(2);

/// The steps' names, in order.
const STEPS: [&str; 6] = [
    "two guests: both boot, in sync, a client writes to alpha",
    "two guests: the cable is pulled in mid-write, and plugged in again",
    "two guests: alpha's plug is pulled in mid-write, beta is promoted",
    "two guests: every acknowledged write is on beta",
    "two guests: alpha boots again and catches up under load",
    "two guests: both power off, their disks are equal",
];

/// Runs it all; `link` carries the copies. Logs are in `run`.
///
/// # Errors
/// What does not hold; the step it happened in is marked as failed.
pub fn run(rig: &Rig, run: &Path, link: &str, steps: &mut Steps) -> Result<(), VmError> {
    let done = Failover::new(rig, run, link).and_then(|failover| failover.run(steps));
    if done.is_err() {
        steps.failed("");
        for (node, _) in PAIR {
            println!("    --- the end of {node}'s log");
            print!("{}", last_lines(&run.join(node).join("share/daemon.log"), 15));
            // A guest that did not get as far as a daemon has said why elsewhere; one of them is in the error already.
            for log in ["console", "output"] {
                println!("    --- the end of {node}'s {log}");
                print!("{}", last_lines(&run.join(node).join(log), 12));
            }
        }
    }
    done
}

struct Failover<'a> {
    rig: &'a Rig,
    run: &'a Path,
    link: &'a str,
    /// Unix sockets have short names, and a clone may lie deep.
    sockets: tempfile::TempDir,
    disks: [PathBuf; 2],
}

impl<'a> Failover<'a> {
    fn new(rig: &'a Rig, run: &'a Path, link: &'a str) -> Result<Self, VmError> {
        let sockets = tempfile::Builder::new().prefix("costandby-vm-").tempdir();
        let sockets = sockets.map_err(io_error("making a temporary directory"))?;
        let disks = PAIR.map(|(node, _)| run.join(format!("{node}.disk")));
        for disk in &disks {
            let made = File::create(disk).and_then(|file| file.set_len((SIZE_MIB + METADATA_MIB) << 20));
            made.map_err(io_error(format!("making {}", disk.display())))?;
        }
        Ok(Self { rig, run, link, sockets, disks })
    }

    fn run(&self, steps: &mut Steps) -> Result<(), VmError> {
        steps.begin(STEPS[0]);
        let mut alpha = self.boot(0)?;
        let mut beta = self.boot(1)?;
        beta.wait_line("#writing", WORK)?;
        alpha.wait_line("#connection connected", WORK)?;
        let slowness = [alpha.slowness(), beta.slowness()];
        steps.passed(&format!("{:.1} and {:.1} times slower than one guest alone", slowness[0], slowness[1]));

        steps.begin(STEPS[1]);
        steps.passed(&self.pull_the_cable(&mut alpha, &mut beta)?);

        steps.begin(STEPS[2]);
        std::thread::sleep(WRITE_TIME);
        alpha.pull_the_plug()?;
        let pulled = Instant::now();
        let acked = beta.wait_line("#promoted", WORK)?;
        let took = pulled.elapsed().as_secs_f64();
        steps.passed(&format!("{acked} writes acknowledged, taken over after {took:.1} s"));

        steps.begin(STEPS[3]);
        beta.wait_line("#verified", WORK)?;
        let alone = beta.wait_line("#alone", WORK)?;
        steps.passed(&format!("beta went on alone with {alone} more"));

        steps.begin(STEPS[4]);
        let alpha = self.boot(0)?;
        beta.wait_line("#in-sync", WORK)?;
        let acked = beta.wait_line("#settled", WORK)?;
        steps.passed(&format!("{acked} writes acknowledged by beta"));

        steps.begin(STEPS[5]);
        let stop = alpha.share().join("stop");
        File::create(&stop).map_err(io_error(format!("making {}", stop.display())))?;
        for (guest, (node, _)) in [alpha, beta].into_iter().zip(PAIR) {
            let status = guest.finish(STOP)?;
            if status != 0 {
                return Err(VmError::Failed(format!("{node}'s guest ended with status {status}")));
            }
        }
        self.compare()?;
        steps.passed(&format!("{SIZE_MIB} MiB"));
        Ok(())
    }

    /// Nothing goes over the wire for a while; then it does again. What was seen of it.
    fn pull_the_cable(&self, alpha: &mut Guest, beta: &mut Guest) -> Result<String, VmError> {
        let ends = PAIR.map(|(node, _)| self.sockets.path().join(node));
        let loose = PAIR.map(|(node, _)| self.sockets.path().join(format!("{node}.loose")));
        // QEMU looks its socket up with each packet: where it finds none, the packet is lost.
        let carry = |from: &[PathBuf; 2], to: &[PathBuf; 2]| {
            let moved = from.iter().zip(to).try_for_each(|(from, to)| std::fs::rename(from, to));
            moved.map_err(io_error("moving the wire's sockets"))
        };
        let pulled = Instant::now();
        carry(&ends, &loose)?;
        beta.wait_line("#cut", NOTICE)?;
        let beta_noticed = pulled.elapsed();
        let said = alpha.wait_line("#connection", NOTICE)?;
        let alpha_noticed = pulled.elapsed();
        std::thread::sleep(CUT_TIME);
        carry(&loose, &ends)?;
        if said == "connected" {
            return Err(VmError::Failed("alpha found a connection while the cable was out".to_owned()));
        }
        let seconds = [alpha_noticed, beta_noticed].map(|took| took.as_secs_f64());
        let notice_max = NOTICE_MAX.mul_f64(alpha.slowness().max(beta.slowness()));
        if alpha_noticed.max(beta_noticed) > notice_max {
            let [alpha, beta] = seconds;
            return Err(VmError::Failed(format!(
                "alpha noticed after {alpha:.1} s, beta after {beta:.1} s: later than {:.1} s",
                notice_max.as_secs_f64()
            )));
        }
        beta.wait_line("#healed", WORK)?;
        let acked = beta.wait_line("#writing-again", WORK)?;
        let [alpha, beta] = seconds;
        Ok(format!("alpha noticed within {alpha:.2} s, beta within {beta:.2} s; {acked} writes acknowledged"))
    }

    fn boot(&self, node: usize) -> Result<Guest, VmError> {
        let (name, _) = PAIR[node];
        let socket = |node: usize| self.sockets.path().join(PAIR[node].0);
        let mut settings = Settings::new(name, &self.script(node));
        settings.node = u8::try_from(node + 1).expect("1 or 2");
        settings.memory_mib = 1024;
        settings.wire = Some(Wire { own: socket(node), other: socket(1 - node) });
        settings.disks = vec![self.disks[node].clone()];
        Guest::boot(self.rig, self.run, &settings)
    }

    /// What a guest does: alpha's daemon until told to stop, beta's as long as the client in the same guest needs it.
    fn script(&self, node: usize) -> String {
        let (name, _) = PAIR[node];
        let quoted_path = |path: PathBuf| quoted(&path.display().to_string());
        let costandby = quoted_path(self.rig.program("costandby"));
        let own = quoted_path(self.rig.program("costandby-vm"));
        let work = if node == 0 {
            format!("{own} watch /run/{name}.sock &\n")
                + "while [ ! -e /share/stop ]; do sleep 0.2; kill -0 $daemon 2>/dev/null || exit 1; done"
        } else {
            format!("{own} survivor --link {} /run/{name}.sock /run/{name}.nbd || exit", self.link)
        };
        format!(
            "/bin/busybox modprobe virtio_blk\n\
             cat >/run/pair.toml <<'END'\n{}END\n\
             costandby() {{ {costandby} --config /run/pair.toml --node {name} \"$@\"; }}\n\
             if [ ! -e /share/created ]; then costandby create --zero >/share/daemon.log 2>&1 || exit; touch /share/created; fi\n\
             export COSTANDBY_LOG=info\n\
             {costandby} --config /run/pair.toml --node {name} up >>/share/daemon.log 2>&1 &\n\
             daemon=$!\n\
             until [ -S /run/{name}.sock ]; do sleep 0.1; kill -0 $daemon 2>/dev/null || exit 1; done\n\
             {work}\n\
             kill -TERM $daemon\n\
             wait $daemon\n",
            self.configuration()
        )
    }

    fn configuration(&self) -> String {
        let nodes = PAIR.map(|(node, address)| {
            format!(
                "[nodes.{node}]\nlisten = \"{address}:7790\"\nadmin = \"/run/{node}.sock\"\n\
                 nbd = [\"unix:/run/{node}.nbd\", \"tcp:{address}:{NBD_PORT}\"]\n"
            )
        });
        format!(
            "insecure = true\npeer_timeout = \"2s\"\n{}{}[volumes.{VOLUME}]\nsize = \"{SIZE_MIB}MiB\"\n\
             primary = \"alpha\"\nlink = \"{}\"\ndisk.alpha = \"/dev/vda\"\ndisk.beta = \"/dev/vda\"\n",
            nodes[0], nodes[1], self.link
        )
    }

    /// Compares the volumes on both disks' files, byte for byte.
    fn compare(&self) -> Result<(), VmError> {
        let open = |path: &PathBuf| File::open(path).map_err(io_error(format!("opening {}", path.display())));
        let mut files = [open(&self.disks[0])?, open(&self.disks[1])?];
        let mut chunks = [vec![0; 1 << 20], vec![0; 1 << 20]];
        for mib in 0..SIZE_MIB {
            for (file, chunk) in files.iter_mut().zip(&mut chunks) {
                file.read_exact(chunk).map_err(io_error("reading a disk's file"))?;
            }
            if let Some(at) = chunks[0].iter().zip(&chunks[1]).position(|(alpha, beta)| alpha != beta) {
                let (alpha, beta) = (chunks[0][at], chunks[1][at]);
                let at = (mib << 20) + at as u64;
                return Err(VmError::Failed(format!(
                    "the disks differ at byte {at}: alpha has {alpha:#x}, beta {beta:#x}"
                )));
            }
        }
        Ok(())
    }
}
