//! The report: a table for people, a record for machines.
//!
//! Cases come as [`Row`]s of the same run. A ratio is taken round by round, since the two cases of one round ran close to
//! each other, and then the median over the rounds: noise of a shared machine falls on both alike. Of several rivals
//! the best is chosen once, by its median: choosing anew each round would count its luckiest moments only.

use crate::Outcome;
use crate::histogram::{Summary, joined, median};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// What two cases are compared by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Measure {
    /// Median latency: lower is better.
    P50,
    /// Latency of all but one in a hundred: lower is better.
    P99,
    /// Requests a second: higher is better.
    Iops,
    /// Bytes a second: higher is better.
    Rate,
}

/// What a case is held against.
#[derive(Clone, Debug)]
pub(crate) struct Against {
    /// Ids of the cases it is compared with; the one that is best by its median counts.
    pub(crate) ids: Vec<&'static str>,
    pub(crate) measure: Measure,
    /// The ratio aimed at: an upper bound for latencies, a lower bound for the others. `None`: for information.
    pub(crate) target: Option<f64>,
}

/// One case, measured.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    pub(crate) against: Option<Against>,
    pub(crate) rounds: Vec<Summary>,
}

/// A ratio and whether it is as wanted.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ratio {
    to: String,
    measure: Measure,
    value: f64,
    target: Option<f64>,
    met: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Case<'a> {
    id: &'a str,
    title: &'a str,
    #[serde(flatten)]
    median: Summary,
    ratio: Option<Ratio>,
    rounds: &'a [Summary],
}

/// What the idle check found.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Idle {
    pub(crate) title: String,
    pub(crate) own_mib: f64,
    pub(crate) own_mib_max: f64,
    pub(crate) cpu_percent: f64,
    pub(crate) cpu_percent_max: f64,
}

/// A number that is no load's.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    pub(crate) value: f64,
    /// What is aimed at.
    pub(crate) at_most: Option<f64>,
}

/// Where and of what the numbers are.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cores: usize,
    cpu: String,
    kernel: String,
    load_average: String,
    commit: String,
    optimised: bool,
}

impl Machine {
    /// Looks around. What cannot be learnt says `unknown`.
    pub(crate) fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let or_unknown = |text: &str| if text.is_empty() { "unknown".into() } else { text.trim().to_owned() };
        let cpu_info = read("/proc/cpuinfo");
        let model = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split(':').nth(1));
        let git = Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty", "--abbrev=12"])
            .output();
        let commit =
            git.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: or_unknown(model.unwrap_or_default()),
            kernel: or_unknown(&read("/proc/sys/kernel/osrelease")),
            load_average: or_unknown(&read("/proc/loadavg")),
            commit: or_unknown(&commit),
            optimised: !cfg!(debug_assertions),
        }
    }
}

/// The whole of a run.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) rows: Vec<Row>,
    pub(crate) idle: Vec<Idle>,
    pub(crate) figures: Vec<Figure>,
    /// What was left out, and why.
    pub(crate) skipped: Vec<String>,
    /// What was seen besides.
    pub(crate) notes: Vec<String>,
}

impl Measure {
    fn of(self, summary: &Summary) -> f64 {
        match self {
            Self::P50 => summary.p50_us,
            Self::P99 => summary.p99_us,
            Self::Iops => summary.iops,
            Self::Rate => summary.mb_s,
        }
    }

    fn lower_is_better(self) -> bool {
        matches!(self, Self::P50 | Self::P99)
    }

    fn is_better(self, a: f64, than: f64) -> bool {
        if self.lower_is_better() { a < than } else { a > than }
    }
}

impl Report {
    fn ratio(&self, row: &Row) -> Option<Ratio> {
        let against = row.against.as_ref()?;
        let measure = against.measure;
        let others =
            self.rows.iter().filter(|other| against.ids.contains(&other.id) && !other.rounds.is_empty());
        let of = |row: &Row| measure.of(&joined(&row.rounds));
        let best = others.reduce(|a, b| if measure.is_better(of(b), of(a)) { b } else { a })?;
        let rounds = row.rounds.iter().zip(&best.rounds);
        let value = median(rounds.map(|(ours, theirs)| measure.of(ours) / measure.of(theirs)));
        let met = against
            .target
            .map(|target| if measure.lower_is_better() { value <= target } else { value >= target });
        Some(Ratio { to: best.title.into(), measure, value, target: against.target, met })
    }

    /// The table.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{} cores, {}, Linux {}, commit {}, load {}{}\n\n",
            self.machine.cores,
            self.machine.cpu,
            self.machine.kernel,
            self.machine.commit,
            self.machine.load_average,
            if self.machine.optimised {
                ""
            } else {
                "\nNOT AN OPTIMISED BUILD: only the shape means anything"
            },
        );
        let _ = writeln!(
            text,
            "{:<54} {:>10} {:>10} {:>10} {:>10}  ratio",
            "", "p50 µs", "p99 µs", "IOPS", "MB/s"
        );
        for row in &self.rows {
            let all = joined(&row.rounds);
            let ratio = self.ratio(row).map(|ratio| describe(&ratio)).unwrap_or_default();
            let _ = writeln!(
                text,
                "{:<54} {:>10.1} {:>10.1} {:>10.0} {:>10.1}  {ratio}",
                row.title, all.p50_us, all.p99_us, all.iops, all.mb_s
            );
        }
        for idle in &self.idle {
            let _ = writeln!(
                text,
                "\n{}: {:.1} MiB of its own (at most {}), {:.2}% of a core (at most {})",
                idle.title, idle.own_mib, idle.own_mib_max, idle.cpu_percent, idle.cpu_percent_max
            );
        }
        for Figure { title, value, at_most, .. } in &self.figures {
            let aim = at_most.map(|most| {
                let met = if *value <= most { "met" } else { "MISSED" };
                format!(" (aim ≤ {most}: {met})")
            });
            let _ = writeln!(text, "\n{title}: {value:.3}{}", aim.unwrap_or_default());
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "\nleft out: {skipped}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "\nnote: {note}");
        }
        text
    }

    /// Writes the record.
    pub(crate) fn write_json(&self, path: &Path) -> Outcome<()> {
        let case = |row: &'_ Row| {
            serde_json::to_value(Case {
                id: row.id,
                title: row.title,
                median: joined(&row.rounds),
                ratio: self.ratio(row),
                rounds: &row.rounds,
            })
        };
        let cases = self.rows.iter().map(case).collect::<Result<Vec<_>, _>>()?;
        let record = serde_json::json!({
            "machine": self.machine, "cases": cases, "idle": self.idle, "figures": self.figures,
            "skipped": self.skipped, "notes": self.notes,
        });
        let mut text = serde_json::to_string_pretty(&record)?;
        text.push('\n');
        std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()).into())
    }
}

fn describe(ratio: &Ratio) -> String {
    let what = match ratio.measure {
        Measure::P50 => "p50 of",
        Measure::P99 => "p99 of",
        Measure::Iops => "IOPS of",
        Measure::Rate => "rate of",
    };
    let wanted = match (ratio.target, ratio.met) {
        (Some(target), Some(met)) => {
            let sign = if ratio.measure.lower_is_better() { '≤' } else { '≥' };
            format!(" (aim {sign} {target}: {})", if met { "met" } else { "MISSED" })
        }
        _ => String::new(),
    };
    format!("{:.2} × {what} {}{wanted}", ratio.value, ratio.to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(p50_us: f64, iops: f64) -> Summary {
        Summary { requests: 1, p50_us, p99_us: p50_us, iops, mb_s: iops }
    }

    #[test]
    fn ratios_pair_the_rounds_and_take_the_best_rival() {
        let row = |id, against, rounds| Row { id, title: id, against, rounds };
        let against = |measure, target| Some(Against { ids: vec!["a", "b"], measure, target: Some(target) });
        let report = Report {
            machine: Machine::here(),
            rows: vec![
                row("a", None, vec![summary(10.0, 100.0), summary(100.0, 10.0), summary(10.0, 100.0)]),
                row("b", None, vec![summary(20.0, 50.0), summary(50.0, 20.0), summary(20.0, 50.0)]),
                row(
                    "ours",
                    against(Measure::P50, 1.2),
                    vec![summary(11.0, 300.0), summary(110.0, 60.0), summary(30.0, 300.0)],
                ),
                row("rate", against(Measure::Iops, 3.5), vec![summary(11.0, 300.0), summary(55.0, 30.0)]),
            ],
            idle: Vec::new(),
            figures: vec![Figure { id: "f", title: "a figure", value: 2.0, at_most: Some(1.05) }],
            skipped: vec!["nothing".into()],
            notes: Vec::new(),
        };
        let ratio = report.ratio(&report.rows[2]).expect("rivals ran");
        assert!((ratio.value - 1.1).abs() < 1e-9, "the median of 1.1, 1.1 and 3.0: {ratio:?}");
        assert_eq!(ratio.met, Some(true));
        let rate = report.ratio(&report.rows[3]).expect("rivals ran");
        assert!((rate.value - 3.0).abs() < 1e-9 && rate.met == Some(false), "{rate:?}");
        assert!(report.ratio(&report.rows[0]).is_none());
        assert!(report.table().contains("a figure: 2.000 (aim ≤ 1.05: MISSED)"));
        assert!(report.table().contains("MISSED") && report.table().contains("left out: nothing"));
        let file = tempfile::NamedTempFile::new().expect("a file");
        report.write_json(file.path()).expect("written");
        let record: serde_json::Value =
            serde_json::from_reader(std::fs::File::open(file.path()).expect("open")).expect("JSON");
        assert_eq!(record["cases"][2]["ratio"]["met"], true);
        assert_eq!(record["cases"][0]["rounds"].as_array().map(Vec::len), Some(3));
    }
}
