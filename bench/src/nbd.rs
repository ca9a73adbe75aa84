//! Mirrored writes through NBD: two real daemons on loopback, driven by fio.
//!
//! The daemons are this program started again with the command line of `costandby` ([`daemon_main`]), so a benchmark
//! needs no second binary and measures the same code. fio's nbd engine writes through the primary's unix socket.
//! Afterwards both disks are compared byte for byte: at ack level `memory` everything fio saw complete is on both.

use crate::Outcome;
use crate::histogram::Summary;
use crate::process::{Process, run_to_end};
use crate::relay::Relay;
use costandby_control::secure::key::{Key, Keys};
use costandby_control::secure::keyring;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Subcommand under which this program is the daemon. Not for people.
pub(crate) const DAEMON: &str = "costandby-daemon";

/// Bytes of one write.
const WRITE_LEN: u64 = 4096;

/// Longest wait for two fresh daemons to be in sync.
const SYNC_TIMEOUT: &str = "60s";

/// Being `costandby`: what follows [`DAEMON`] are its arguments.
pub(crate) fn daemon_main() -> ExitCode {
    let arguments = std::env::args_os().skip(2);
    costandby_control::cli::main(std::iter::once("costandby".into()).chain(arguments))
}

/// Two daemons with one volume, primary on the first.
pub(crate) struct Mirror {
    configs: [PathBuf; 2],
    disks: [PathBuf; 2],
    /// For fio.
    pub(crate) uri: String,
    /// The primary's and the standby's process.
    pub(crate) daemons: [Process; 2],
}

impl Mirror {
    /// Makes the disks in `directory`, starts both daemons and waits until they are in sync.
    pub(crate) fn start(directory: &Path, poll: &str, disk_len: u64, sparse: bool) -> Outcome<Self> {
        Self::start_between(directory, poll, disk_len, sparse, None)
    }

    /// The same with `relay` on the way from alpha to beta.
    pub(crate) fn start_over(directory: &Path, poll: &str, disk_len: u64, relay: &Relay) -> Outcome<Self> {
        Self::start_between(directory, poll, disk_len, false, Some(relay))
    }

    fn start_between(
        directory: &Path,
        poll: &str,
        disk_len: u64,
        sparse: bool,
        relay: Option<&Relay>,
    ) -> Outcome<Self> {
        std::fs::create_dir_all(directory)?;
        let configs = ["alpha", "beta"].map(|node| directory.join(format!("{node}.toml")));
        let disks = ["alpha", "beta"].map(|node| directory.join(format!("{node}.img")));
        let ports = [free_port()?, free_port()?];
        let mut alphas = ports;
        if let Some(relay) = relay {
            relay.lead_to(ports[1]);
            alphas[1] = relay.port();
        }
        let key = Keys::one(Key::random()?);
        keyring::replace(&directory.join("pair.key"), &key)?;
        for (config, ports) in configs.iter().zip([alphas, ports]) {
            std::fs::write(config, configuration(directory, poll, disk_len, &disks, ports))?;
        }
        for (config, node) in configs.iter().zip(["alpha", "beta"]) {
            let mut create = costandby(config, node)?;
            create.arg("create");
            if sparse {
                create.arg("--sparse");
            }
            run_to_end(&mut create)?;
        }
        let up = |config: &Path, node: &str| -> Outcome<Process> {
            let log = directory.join(format!("{node}.log"));
            Process::start(costandby(config, node)?.arg("up"), &log)
        };
        let daemons = [up(&configs[0], "alpha")?, up(&configs[1], "beta")?];
        let uri = format!("nbd+unix:///bench?socket={}", directory.join("alpha.nbd").display());
        let mut mirror = Self { configs, disks, uri, daemons };
        mirror.wait_for_sync()?;
        if !sparse {
            // Once over the whole disk, so that no first touch of a page is measured.
            fill(&mirror.uri)?;
        }
        Ok(mirror)
    }

    fn wait_for_sync(&mut self) -> Outcome<()> {
        for (daemon, socket) in [(0, "alpha.sock"), (0, "alpha.nbd"), (1, "beta.sock")] {
            let path = self.configs[0].with_file_name(socket);
            self.daemons[daemon].wait_until(&format!("{} appeared", path.display()), || path.exists())?;
        }
        run_to_end(costandby(&self.configs[0], "alpha")?.args([
            "wait-sync",
            "bench",
            "--timeout",
            SYNC_TIMEOUT,
        ]))?;
        Ok(())
    }

    /// Runs the command line on the first or the second node.
    pub(crate) fn command(&self, node: usize, args: &[&str]) -> Outcome<()> {
        run_to_end(costandby(&self.configs[node], ["alpha", "beta"][node])?.args(args)).map(drop)
    }

    /// The volume as the primary's daemon sees it: a look that costs well below a millisecond, unlike a process.
    pub(crate) fn status(&self) -> Outcome<Value> {
        let mut socket = UnixStream::connect(self.configs[0].with_file_name("alpha.sock"))?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        socket.write_all(b"GET /v1/status HTTP/1.1\r\nHost: alpha\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let status: Value = serde_json::from_str(body).map_err(|error| format!("{error}: {answer}"))?;
        Ok(status["volumes"][0].clone())
    }

    /// Both disks are equal.
    pub(crate) fn check(&self) -> Outcome<()> {
        same_bytes(&self.disks[0], &self.disks[1])
    }
}

fn configuration(
    directory: &Path,
    poll: &str,
    disk_len: u64,
    disks: &[PathBuf; 2],
    ports: [u16; 2],
) -> String {
    let at = |name: &str| directory.join(name).display().to_string();
    let mut text = format!("key = \"{}\"\n", at("pair.key"));
    for (node, port) in ["alpha", "beta"].into_iter().zip(ports) {
        let (admin, nbd) = (at(&format!("{node}.sock")), at(&format!("{node}.nbd")));
        text += &format!("[nodes.{node}]\nlisten = \"127.0.0.1:{port}\"\nadmin = \"{admin}\"\n");
        text += &format!("nbd = [\"unix:{nbd}\"]\npoll = \"{poll}\"\n\n");
    }
    text +=
        &format!("[volumes.bench]\nsize = \"{}MiB\"\nprimary = \"alpha\"\nlink = \"tcp\"\n", disk_len >> 20);
    text += &format!("disk.alpha = \"{}\"\ndisk.beta = \"{}\"\n", disks[0].display(), disks[1].display());
    text
}

fn costandby(config: &Path, node: &str) -> Outcome<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(DAEMON).arg("--config").arg(config).args(["--node", node]);
    Ok(command)
}

/// A port nobody listens on at the moment.
pub(crate) fn free_port() -> Outcome<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Whether fio or its nbd engine is missing, and if so what to do.
pub(crate) fn fio_missing() -> Option<String> {
    let engines = Command::new("fio").arg("--enghelp").output();
    let found = engines
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).lines().any(|l| l.trim() == "nbd"));
    (!found)
        .then(|| "NBD and qemu: there is no fio with the nbd engine (Debian: apt-get install fio)".to_owned())
}

fn fio(uri: &str, more: &[String]) -> Outcome<Value> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--ioengine=nbd", "--numjobs=1", "--output-format=json"]);
    command.arg(format!("--uri={uri}")).args(more);
    let output = run_to_end(&mut command)?;
    // Notes to people may stand before the JSON.
    let json = output.find('{').map_or("", |start| &output[start..]);
    let report: Value =
        serde_json::from_str(json).map_err(|error| format!("fio's report: {error}: {output}"))?;
    let job = &report["jobs"][0];
    if job["error"] != 0 {
        return Err(format!("fio reports error {}", job["error"]).into());
    }
    Ok(job.clone())
}

/// Writes a whole export once, in large pieces.
pub(crate) fn fill(uri: &str) -> Outcome<()> {
    let more = ["--rw=write", "--bs=1M", "--iodepth=4"].map(str::to_owned);
    fio(uri, &more).map(|_| ())
}

/// Random 4 KiB writes, `depth` at a time.
pub(crate) fn random_writes(uri: &str, depth: usize, time: Duration) -> Outcome<Summary> {
    let more = [
        "--rw=randwrite".into(),
        format!("--bs={WRITE_LEN}"),
        format!("--iodepth={depth}"),
        "--time_based".into(),
        format!("--runtime={}ms", time.as_millis()),
        format!("--ramp_time={}ms", time.as_millis() / 10),
        "--norandommap".into(),
        "--randrepeat=0".into(),
        "--percentile_list=50:99".into(),
    ];
    summary(&fio(uri, &more)?["write"])
}

/// fio's figures as ours. Latency is from submission to completion.
fn summary(write: &Value) -> Outcome<Summary> {
    let number =
        |value: &Value, what: &str| value.as_f64().ok_or_else(|| format!("fio's report has no {what}"));
    let percentiles = &write["clat_ns"]["percentile"];
    let iops = number(&write["iops"], "iops")?;
    Ok(Summary {
        requests: write["total_ios"].as_u64().ok_or("fio's report has no total_ios")?,
        p50_us: number(&percentiles["50.000000"], "median")? / 1e3,
        p99_us: number(&percentiles["99.000000"], "99th percentile")? / 1e3,
        iops,
        mb_s: iops * WRITE_LEN as f64 / 1e6,
    })
}

/// Compares two files.
pub(crate) fn same_bytes(a: &Path, b: &Path) -> Outcome<()> {
    let (mut files, mut pieces) = ([File::open(a)?, File::open(b)?], [vec![0; 1 << 20], vec![0; 1 << 20]]);
    let mut at = 0;
    loop {
        let mut counts = [0; 2];
        for side in 0..2 {
            // Regular files answer whole pieces, but for the last one.
            counts[side] = files[side].read(&mut pieces[side])?;
        }
        let count = counts[0];
        if counts[1] != count || pieces[0][..count] != pieces[1][..count] {
            return Err(format!("{} and {} differ past byte {at}", a.display(), b.display()).into());
        }
        if count == 0 {
            return Ok(());
        }
        at += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_figures_are_read_from_the_right_places() {
        let write = serde_json::json!({
            "total_ios": 1000, "iops": 500.5,
            "clat_ns": {"percentile": {"50.000000": 20_000, "99.000000": 70_000}},
        });
        let figures = summary(&write).expect("complete");
        assert_eq!(figures.requests, 1000);
        assert!((figures.p50_us - 20.0).abs() < 1e-9 && (figures.p99_us - 70.0).abs() < 1e-9, "{figures:?}");
        assert!(summary(&serde_json::json!({"iops": 1})).is_err());
    }

    #[test]
    fn files_are_compared_to_the_last_byte() {
        let directory = tempfile::tempdir().expect("a directory");
        let [a, b] = ["a", "b"].map(|name| directory.path().join(name));
        let mut bytes = vec![7; (1 << 20) + 3];
        std::fs::write(&a, &bytes).expect("written");
        std::fs::write(&b, &bytes).expect("written");
        same_bytes(&a, &b).expect("equal");
        *bytes.last_mut().expect("not empty") = 8;
        std::fs::write(&b, &bytes).expect("written");
        assert!(same_bytes(&a, &b).is_err(), "the last byte");
        std::fs::write(&b, &bytes[..10]).expect("written");
        assert!(same_bytes(&a, &b).is_err(), "shorter");
    }
}
