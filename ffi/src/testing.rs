//! What the tests of all crates share: how one says that it is left out, and how slow the machine is.
//!
//! Both come from variables of the environment. `COSTANDBY_SKIPPED_LOG` names a file in which tests that were left out
//! are written down, a line each, for whoever runs many tests and prints the output of none; `tests/tools/test.sh` shows
//! it at its end. `COSTANDBY_TEST_SLOWNESS` says how many times slower than on a quiet machine things are here; the
//! guests of the rig set it by the time that their boot took.
//!
//! It stands here because every crate depends on this one. No program but tests has it (feature `testing`).
//!
//! Invariant: a test that returns before its end has called [`skip`]; `tests/tests/house.rs` looks for it.

use std::fmt::Display;
use std::io::Write as _;
use std::time::Duration;

/// The file in which tests that are left out are written down.
const SKIPPED_LOG: &str = "COSTANDBY_SKIPPED_LOG";

/// How many times slower than on a quiet machine everything is, as a decimal number.
const SLOWNESS: &str = "COSTANDBY_TEST_SLOWNESS";

/// More than this is a typing error rather than a machine.
const SLOWNESS_MAX: f64 = 100.0;

/// Says that the running test is left out, and why: on standard output, and in the file that `COSTANDBY_SKIPPED_LOG`
/// names. The caller returns.
///
/// # Panics
/// When there is such a file and it cannot be written.
pub fn skip(reason: impl Display) {
    let test = test_name();
    println!("SKIPPED: {test}: {reason}");
    let Some(log) = std::env::var_os(SKIPPED_LOG) else { return };
    let file = std::fs::File::options().append(true).create(true).open(&log);
    // One call, so that lines of tests that run side by side stay whole.
    let written = file.and_then(|mut file| file.write_all(format!("{test}: {reason}\n").as_bytes()));
    if let Err(error) = written {
        panic!("{SKIPPED_LOG}={}: {error}", log.display());
    }
}

/// [`skip`], for want of something that the rig of `make test-rdma` has: there the test is run.
///
/// # Panics
/// As [`skip`] does.
pub fn skip_outside_rig(lacking: impl Display) {
    skip(format_args!("{lacking}; `make test-rdma` has it"));
}

/// The running test's name: its runner's word for it, or that of its thread.
fn test_name() -> String {
    let variable = |name| std::env::var(name).ok();
    if let (Some(program), Some(test)) = (variable("NEXTEST_BINARY_ID"), variable("NEXTEST_TEST_NAME")) {
        return format!("{program} {test}");
    }
    match std::thread::current().name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => {
            let program = std::env::args().next().unwrap_or_default();
            program.rsplit('/').next().unwrap_or_default().to_owned()
        }
    }
}

/// How many times slower than on a quiet machine everything is here: 1 or more, and 1 where nobody has said.
///
/// # Panics
/// When `COSTANDBY_TEST_SLOWNESS` is set to what is no number from 0 to 100.
#[must_use]
pub fn slowness() -> f64 {
    std::env::var(SLOWNESS).map_or(1.0, |text| slowness_of(&text))
}

fn slowness_of(text: &str) -> f64 {
    let number = text.parse().ok().filter(|number| (0.0..=SLOWNESS_MAX).contains(number));
    number.unwrap_or_else(|| panic!("{SLOWNESS}={text:?} is no number from 0 to {SLOWNESS_MAX}")).max(1.0)
}

/// `limit`, which suits a quiet machine, for this one.
///
/// # Panics
/// As [`slowness`] does.
#[must_use]
pub fn scaled(limit: Duration) -> Duration {
    limit.mul_f64(slowness())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_faster_machine_than_the_quiet_one_counts_as_that() {
        assert!((slowness_of("0.3") - 1.0).abs() < f64::EPSILON);
        assert!((slowness_of("2.25") - 2.25).abs() < f64::EPSILON);
        for wrong in ["", "fast", "-1", "101", "NaN"] {
            assert!(std::panic::catch_unwind(|| slowness_of(wrong)).is_err(), "{wrong:?} was taken");
        }
    }

    /// Not a test of its own: is left out where the next one runs it.
    #[test]
    fn left_out_process() {
        if std::env::var_os("COSTANDBY_TEST_LEFT_OUT").is_some() {
            skip("for a reason");
        }
    }

    #[test]
    fn a_test_that_is_left_out_is_printed_and_written_down() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("skipped");
        for lines in 1..=2 {
            let mut test = Command::new(std::env::current_exe().unwrap());
            test.args(["testing::tests::left_out_process", "--exact", "--nocapture"]);
            test.env("COSTANDBY_TEST_LEFT_OUT", "1").env(SKIPPED_LOG, &log);
            test.env("NEXTEST_BINARY_ID", "some-program").env("NEXTEST_TEST_NAME", "some::test");
            let output = test.output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success() && said.contains("SKIPPED: some-program some::test: for a reason"),
                "{said}"
            );
            let written = std::fs::read_to_string(&log).unwrap();
            assert_eq!(written, "some-program some::test: for a reason\n".repeat(lines));
        }
    }
}
