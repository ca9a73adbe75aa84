//! What the demo found out: one JSON object for programs, a short table for people, and the verdict.
//!
//! Pure rendering. Names of the JSON's fields are fixed: others script against them.

use super::check::Findings;
use serde::Serialize;
use std::fmt::Write;

/// The result of a whole run.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Report {
    /// What carried the copies.
    pub link: String,
    /// The ack level of both volumes.
    pub ack: &'static str,
    /// How long was written before the kill.
    pub seconds: u64,
    /// Writes that were acknowledged, over both volumes and all phases.
    pub acked_writes: u64,
    /// Blocks of which the survivor lacked the last acknowledged write.
    pub lost_writes: u64,
    /// Blocks that were no whole write.
    pub torn_blocks: u64,
    /// SIGKILL of the primary to the first write that the survivor acknowledged.
    pub takeover_ms: f64,
    /// Both nodes' disks hold the same bytes, running and stopped.
    pub identical: bool,
    /// Median latency while both nodes ran.
    pub write_p50_us: u64,
    /// 99th percentile of the same.
    pub write_p99_us: u64,
    /// Writes a second over both volumes while both nodes ran.
    pub writes_per_second: u64,
    /// Requests each writer keeps in flight.
    pub requests_in_flight: usize,
    /// Writes that were in flight to the primary when it was killed.
    pub unacked_at_kill: usize,
    /// Start of the dead node to both volumes in sync, under load.
    pub resync_seconds: f64,
    /// Median latency while the node that returned was caught up and after.
    pub resync_write_p50_us: u64,
    /// 99th percentile of the same.
    pub resync_write_p99_us: u64,
    /// The volumes.
    pub volumes: Vec<VolumeReport>,
}

/// One volume of the run.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct VolumeReport {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Who served it first.
    pub primary_before: &'static str,
    /// Who served it last.
    pub primary_after: &'static str,
    /// Writes acknowledged.
    pub acked_writes: u64,
    /// As in [`Report`].
    pub lost_writes: u64,
    /// As in [`Report`].
    pub torn_blocks: u64,
    /// Longest time without an acknowledgement after the kill, takeover included.
    pub stall_ms: f64,
    /// Where the disks differ first, if they do.
    pub differs_at: Option<u64>,
    /// The first lost or torn block, in words.
    pub first_finding: Option<String>,
}

impl VolumeReport {
    /// Takes a check's findings in. A block that is wrong in two checks is one wrong block, so the worse check counts.
    pub(super) fn take(&mut self, findings: Findings) {
        self.lost_writes = self.lost_writes.max(findings.lost);
        self.torn_blocks = self.torn_blocks.max(findings.torn);
        self.first_finding = self.first_finding.take().or(findings.first);
    }
}

impl Report {
    /// What is wrong, in one line; `None` where all is well.
    pub(super) fn failure(&self) -> Option<String> {
        let mut wrong = Vec::new();
        if self.lost_writes > 0 {
            wrong.push(format!("{} acknowledged writes lost", self.lost_writes));
        }
        if self.torn_blocks > 0 {
            wrong.push(format!("{} blocks torn", self.torn_blocks));
        }
        if !self.identical {
            wrong.push("the disks differ".to_owned());
        }
        if wrong.is_empty() {
            return None;
        }
        for volume in &self.volumes {
            if let Some(text) = &volume.first_finding {
                wrong.push(format!("volume {}: {text}", volume.name));
            }
            if let Some(at) = volume.differs_at {
                wrong.push(format!("volume {}: the disks differ from byte {at} on", volume.name));
            }
        }
        Some(wrong.join("; "))
    }

    /// The table, ending in a newline.
    pub(super) fn table(&self) -> String {
        let mut out = String::new();
        let disks = if self.identical { "identical, byte for byte" } else { "DIFFERENT" };
        let rows = [
            ("link, ack level", format!("{}, {}", self.link, self.ack)),
            ("acknowledged writes", format!("{} of 4 KiB", self.acked_writes)),
            ("lost", self.lost_writes.to_string()),
            ("torn", self.torn_blocks.to_string()),
            ("kill to first write served", format!("{:.1} ms", self.takeover_ms)),
            ("caught up again in", format!("{:.1} s", self.resync_seconds)),
            ("disks of both nodes", disks.to_owned()),
            ("write latency p50 / p99", format!("{} / {} us", self.write_p50_us, self.write_p99_us)),
            ("mirrored writes a second", self.writes_per_second.to_string()),
        ];
        for (name, value) in rows {
            let _ = writeln!(out, "{name:<28}{value}");
        }
        let _ = writeln!(
            out,
            "\n{:<8} {:<16} {:>10} {:>6} {:>6} {:>10}",
            "VOLUME", "SERVED BY", "WRITES", "LOST", "TORN", "STALL"
        );
        for volume in &self.volumes {
            let VolumeReport { name, primary_before: before, primary_after: after, .. } = volume;
            let served = if before == after { (*before).to_owned() } else { format!("{before}, {after}") };
            let stall = format!("{:.1} ms", volume.stall_ms);
            let (writes, lost, torn) = (volume.acked_writes, volume.lost_writes, volume.torn_blocks);
            let _ = writeln!(out, "{name:<8} {served:<16} {writes:>10} {lost:>6} {torn:>6} {stall:>10}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let volume = VolumeReport {
            name: "one".into(),
            size: 4096,
            primary_before: "alpha",
            primary_after: "beta",
            acked_writes: 12,
            lost_writes: 0,
            torn_blocks: 0,
            stall_ms: 30.0,
            differs_at: None,
            first_finding: None,
        };
        Report {
            link: "tcp".into(),
            ack: "memory",
            seconds: 1,
            acked_writes: 12,
            lost_writes: 0,
            torn_blocks: 0,
            takeover_ms: 30.0,
            identical: true,
            write_p50_us: 100,
            write_p99_us: 300,
            writes_per_second: 12,
            requests_in_flight: 8,
            unacked_at_kill: 3,
            resync_seconds: 0.5,
            resync_write_p50_us: 200,
            resync_write_p99_us: 900,
            volumes: vec![volume],
        }
    }

    #[test]
    fn only_a_clean_run_is_no_failure() {
        assert_eq!(report().failure(), None);
        let bad = [
            (Report { lost_writes: 1, ..report() }, "lost"),
            (Report { torn_blocks: 1, ..report() }, "torn"),
            (Report { identical: false, ..report() }, "differ"),
        ];
        for (report, word) in bad {
            assert!(report.failure().is_some_and(|text| text.contains(word)), "{word}");
        }
    }

    #[test]
    fn a_failure_names_the_block() {
        let mut report = report();
        report.volumes[0].take(Findings { lost: 1, torn: 0, first: Some("block 5 is old".into()) });
        report.volumes[0].take(Findings { lost: 1, torn: 0, first: Some("block 6 is old".into()) });
        assert_eq!(report.volumes[0].lost_writes, 1);
        report.lost_writes = 1;
        let text = report.failure().expect("a failure");
        assert!(text.contains("block 5 is old"), "{text}");
    }

    #[test]
    fn the_table_says_who_served() {
        let table = report().table();
        assert!(table.contains("alpha, beta"), "{table}");
        assert!(table.contains("identical, byte for byte"), "{table}");
        let different = Report { identical: false, ..report() }.table();
        assert!(different.contains("DIFFERENT") && !different.contains("identical"), "{different}");
    }
}
