//! What an idle daemon costs: memory of its own and processor time.
//!
//! Memory of its own is what the kernel counts as anonymous and shared memory (`RssAnon`, `RssShmem`: heap, stacks,
//! rings), without the pages of the mapped disk, which are the page cache's. Time is what the scheduler charged.

use crate::Outcome;
use crate::process::Process;
use crate::report::Idle;
use std::time::{Duration, Instant};

/// Mebibytes of its own a daemon with one idle volume may have.
const OWN_MIB_MAX: f64 = 64.0;

/// Percent of a core it may use.
const CPU_PERCENT_MAX: f64 = 1.0;

/// Looks at a daemon that has nothing to do, for this long.
pub(crate) fn look(title: &str, daemon: &Process, time: Duration) -> Outcome<Idle> {
    let start = Instant::now();
    let before = cpu_seconds(daemon.id())?;
    std::thread::sleep(time);
    let used = cpu_seconds(daemon.id())? - before;
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id()))?;
    Ok(Idle {
        title: title.into(),
        own_mib: own_mib(&status)?,
        own_mib_max: OWN_MIB_MAX,
        cpu_percent: 100.0 * used / start.elapsed().as_secs_f64(),
        cpu_percent_max: CPU_PERCENT_MAX,
    })
}

fn own_mib(status: &str) -> Outcome<f64> {
    let kib = |name: &str| -> Outcome<f64> {
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(|| format!("no {name}"))?;
        let number = line.split_whitespace().next().ok_or_else(|| format!("{name} has no value"))?;
        Ok(number.parse::<f64>()?)
    };
    Ok((kib("RssAnon:")? + kib("RssShmem:")?) / 1024.0)
}

/// Time on a processor of all threads, by the scheduler's nanoseconds: a tick would be too coarse for 1%.
fn cpu_seconds(id: u32) -> Outcome<f64> {
    let mut nanoseconds = 0_u64;
    for thread in std::fs::read_dir(format!("/proc/{id}/task"))? {
        let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += text.split_whitespace().next().ok_or("an empty schedstat")?.parse::<u64>()?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_its_own_leaves_the_mapping_out() {
        let status = "VmRSS:\t  9000 kB\nRssAnon:\t    1024 kB\nRssFile:\t 7000 kB\nRssShmem:\t  512 kB\n";
        assert!((own_mib(status).expect("complete") - 1.5).abs() < 1e-9);
        assert!(own_mib("RssAnon: 5 kB\n").is_err());
    }

    #[test]
    fn time_on_the_processor_is_seen() {
        let id = std::process::id();
        let before = cpu_seconds(id).expect("procfs");
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            std::hint::spin_loop();
        }
        assert!(cpu_seconds(id).expect("procfs") > before);
    }
}
