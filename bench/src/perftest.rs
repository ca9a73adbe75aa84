//! perftest's own figures for the same device: what other people call its latency and its bandwidth.
//!
//! A server and a client of `ib_write_lat` or `ib_write_bw` run against each other over one device of this machine, and
//! the client's table is read. Latency there is *half* a round trip of writes answered by writes, so a mirrored write,
//! which is answered too, can at best take twice that. Rates count payload only, as ours do.

use crate::Outcome;
use crate::histogram::Summary;
use crate::nbd::free_port;
use crate::process::{Process, run_to_end};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Latency's program; its presence stands for the package's.
const LATENCY: &str = "ib_write_lat";
const BANDWIDTH: &str = "ib_write_bw";

/// Bytes of what perftest calls MB.
const MEBIBYTE: f64 = 1_048_576.0;

/// Exchanges measured a call of the latency test.
const LATENCY_ITERATIONS: u32 = 1000;

/// Bytes moved a call of the bandwidth test, and the bounds of how many writes that makes.
const BANDWIDTH_LEN: usize = 32 << 20;
const BANDWIDTH_ITERATIONS: (usize, usize) = (100, 5000);

/// perftest's programs on one device.
#[derive(Clone, Debug)]
pub(crate) struct Perftest {
    device: String,
    address: IpAddr,
    directory: PathBuf,
}

/// Whether perftest is missing, and if so what to do.
pub(crate) fn missing() -> Option<String> {
    let found = Command::new(LATENCY).arg("--version").output().is_ok();
    (!found).then(|| format!("perftest: there is no {LATENCY} (Debian: apt-get install perftest)"))
}

impl Perftest {
    /// Over `device`, meeting at `address` of this machine; the servers' logs go to `directory`.
    pub(crate) fn new(device: &str, address: IpAddr, directory: &Path) -> Self {
        Self { device: device.into(), address, directory: directory.into() }
    }

    /// Half a round trip of writes of `payload_len` bytes.
    pub(crate) fn latency(&self, payload_len: usize) -> Outcome<Summary> {
        let columns = self.run(LATENCY, payload_len, LATENCY_ITERATIONS as usize, None)?;
        let [_, iterations, _, _, typical, average, _, p99, ..] = columns[..] else {
            return Err(format!("{LATENCY} printed a row of {} numbers", columns.len()).into());
        };
        let iops = 1e6 / average;
        Ok(Summary {
            requests: count(iterations),
            p50_us: typical,
            p99_us: p99,
            iops,
            mb_s: iops * payload_len as f64 / 1e6,
        })
    }

    /// Rate of writes of `payload_len` bytes, `depth` at a time. Latencies are not measured there and read 0.
    pub(crate) fn bandwidth(&self, payload_len: usize, depth: usize) -> Outcome<Summary> {
        let iterations = (BANDWIDTH_LEN / payload_len).clamp(BANDWIDTH_ITERATIONS.0, BANDWIDTH_ITERATIONS.1);
        let columns = self.run(BANDWIDTH, payload_len, iterations, Some(depth))?;
        let [_, iterations, _peak, average, ..] = columns[..] else {
            return Err(format!("{BANDWIDTH} printed a row of {} numbers", columns.len()).into());
        };
        let mb_s = average * MEBIBYTE / 1e6;
        Ok(Summary {
            requests: count(iterations),
            p50_us: 0.0,
            p99_us: 0.0,
            iops: mb_s * 1e6 / payload_len as f64,
            mb_s,
        })
    }

    /// Runs server and client; returns the numbers of the client's one row.
    fn run(
        &self,
        program: &str,
        payload_len: usize,
        iterations: usize,
        depth: Option<usize>,
    ) -> Outcome<Vec<f64>> {
        let port = free_port()?;
        let command = || {
            let mut command = Command::new(program);
            command.args([
                "-d",
                &self.device,
                "-F",
                "-s",
                &payload_len.to_string(),
                "-n",
                &iterations.to_string(),
            ]);
            command.args(["-p", &port.to_string()]);
            if let Some(depth) = depth {
                command.args(["-t", &depth.to_string()]);
            }
            command
        };
        let mut server = Process::start(&mut command(), &self.directory.join(format!("{program}.log")))?;
        server.wait_until("its port was open", || listens(port))?;
        let text = run_to_end(command().arg(self.address.to_string()))?;
        row(&text).ok_or_else(|| format!("{program} printed no row of numbers: {}", text.trim()).into())
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count that a program printed")]
fn count(printed: f64) -> u64 {
    printed as u64
}

/// Whether some socket of this machine listens on the port. Connecting to find out would be taken for the client.
fn listens(port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
        std::fs::read_to_string(table).unwrap_or_default().lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|local| local.ends_with(&wanted)) && words.nth(1) == Some("0A")
        })
    })
}

/// The row under the heading: the first line after it that is numbers only.
fn row(text: &str) -> Option<Vec<f64>> {
    let after = text.lines().skip_while(|line| !line.trim_start().starts_with("#bytes")).skip(1);
    after
        .filter_map(|line| {
            line.split_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<f64>>>()
        })
        .find(|numbers| numbers.len() >= 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_under_the_heading_is_read() {
        let text = "---\n GID: 00:00\n #bytes #iterations    t_min[usec]    t_max[usec]\n\
            4096    1000          2.40           2.71  1 2 3 4 5\n----\n";
        assert_eq!(row(text), Some(vec![4096.0, 1000.0, 2.40, 2.71, 1.0, 2.0, 3.0, 4.0, 5.0]));
        assert_eq!(row("1 2 3 4\nnothing"), None);
        assert_eq!(row("#bytes\nConflicting CPU frequency\n"), None);
    }

    #[test]
    fn a_listening_port_is_seen_and_a_closed_one_is_not() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("bound").port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
    }
}
