//! A host that loses its power while a bare queue pair is connected to it: nobody closes anything, and only the device can
//! tell. The two halves are one test of `ffi`, in two guests.
//!
//! Invariant: the guest that stays ends with the test's own outcome; that of the other one has none.

use super::guest::{Guest, Settings, Wire};
use super::{Built, Rig, Steps, VmError, io_error, quoted};
use crate::patience::{Limits, Patience};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The test.
pub(super) const TEST: &str = "a_host_without_power_is_noticed";

/// The file by which the first half tells where it listens.
const LISTENER: &str = "verbs-listener";

/// How long the test may take in guests that are up, which says nothing before its end.
const LIMITS: Limits = Limits::silent(Duration::from_secs(180));

const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Runs it. Logs are in `run`.
///
/// # Errors
/// What does not hold.
pub fn run(rig: &Rig, built: &Built, run: &Path, steps: &mut Steps) -> Result<(), VmError> {
    steps.begin("two guests: a queue pair whose host lost its power");
    match lose(rig, built, run) {
        Ok(note) => steps.passed(&note),
        Err(error) => {
            steps.failed("");
            return Err(error);
        }
    }
    Ok(())
}

fn lose(rig: &Rig, built: &Built, run: &Path) -> Result<String, VmError> {
    let program = built.tests.iter().find(|program| program.package == "costandby-ffi");
    let program =
        program.ok_or_else(|| VmError::Failed("the package costandby-ffi has no tests".to_owned()))?;
    let sockets = tempfile::Builder::new().prefix("costandby-vm-").tempdir();
    let sockets = sockets.map_err(io_error("making a temporary directory"))?;
    let socket = |node: u8| sockets.path().join(node.to_string());
    let boot = |node: u8, other: u8| {
        let path = quoted(&program.path.display().to_string());
        let command = format!("exec {path} {TEST} --test-threads=1 --show-output\n");
        let mut settings = Settings::new(&format!("host{node}"), &command);
        settings.node = node;
        settings.memory_mib = 1024;
        settings.wire = Some(Wire { own: socket(node), other: socket(other) });
        settings.environment.push(("NODE".to_owned(), node.to_string()));
        settings.environment.push(("COSTANDBY_RDMA_SHARE".to_owned(), "/share".to_owned()));
        Guest::boot(rig, run, &settings)
    };
    let (mut stays, goes) = (boot(1, 2)?, boot(2, 1)?);
    stays.wait_up()?;
    hand_over(&mut stays, goes.share())?;
    let output = run.join("host1/output");
    let status = stays.finish(LIMITS)?;
    let log = std::fs::read_to_string(&output).unwrap_or_default();
    if status != 0 || !log.contains("1 passed") || log.contains("SKIPPED") {
        return Err(VmError::Failed(format!("the test ended with status {status}:\n{log}")));
    }
    let noticed = log.lines().find(|line| line.contains("after the last sign of life"));
    Ok(noticed.unwrap_or_default().trim().to_owned())
}

/// Carries the listener's address from one guest to the other, once it is there.
fn hand_over(from: &mut Guest, to: &Path) -> Result<(), VmError> {
    let patience = Patience::new(LIMITS.stretched(from.slowness()), Instant::now());
    let address = loop {
        match std::fs::read_to_string(from.share().join(LISTENER)) {
            Ok(address) if !address.is_empty() => break address,
            _ => {}
        }
        if let Some(over) = patience.over(Instant::now()) {
            return Err(from.error(format!("does not come to listen: {over}")));
        }
        std::thread::sleep(LOOK_INTERVAL);
    };
    let part: PathBuf = to.join("verbs-listener.part");
    let written = std::fs::write(&part, address).and_then(|()| std::fs::rename(&part, to.join(LISTENER)));
    written.map_err(io_error("handing over the listener's address"))
}
