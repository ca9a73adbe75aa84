//! Child processes: started with a log of their own, ended by their id when dropped, whatever happens.
//!
//! Nothing a benchmark starts outlives it, short of the benchmark's own SIGKILL.

use crate::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for a process to get ready.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest wait for a process to end by itself once asked.
const END_TIMEOUT: Duration = Duration::from_secs(5);

const STEP: Duration = Duration::from_millis(5);

/// A running child.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; what it says goes to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Outcome<Self> {
        let out = File::create(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", command.get_program().display()))?;
        Ok(Self { child, log: log.into() })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready`.
    pub(crate) fn wait_until(&mut self, what: &str, mut ready: impl FnMut() -> bool) -> Outcome<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                return Err(
                    format!("a process ended with {status} before {what}; {}", self.last_words()).into()
                );
            }
            if start.elapsed() > READY_TIMEOUT {
                return Err(format!("waited {READY_TIMEOUT:?} for {what}; {}", self.last_words()).into());
            }
            std::thread::sleep(STEP);
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("it said: {}", lines[lines.len().saturating_sub(5)..].join(" / "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A child that ended was not waited for yet, so its id is still its own.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let start = Instant::now();
        while start.elapsed() < END_TIMEOUT {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(STEP);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `command` to its end. Returns its standard output.
pub(crate) fn run_to_end(command: &mut Command) -> Outcome<String> {
    let name = command.get_program().display().to_string();
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| format!("cannot start {name}: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name} ended with {}: {}", output.status, said.trim()).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
