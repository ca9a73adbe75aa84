//! `costandby -V` and `--version`: which release this is, and which formats it shares with its peer and its disks.

use crate::hello;
use costandby_datapath::disk::metadata::header;
use costandby_datapath::wire;
use std::sync::LazyLock;

/// The commit this program was built from, or `unknown`.
const COMMIT: &str = env!("COSTANDBY_COMMIT");

/// One line: release and commit.
pub(super) fn short() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("COSTANDBY_COMMIT"), ")")
}

/// The same, and the versions that must be the same on both nodes.
pub(super) fn long() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        format!(
            "{} (commit {COMMIT})\nhello version: {}\nframe version: {}\nmetadata format: {}",
            env!("CARGO_PKG_VERSION"),
            hello::VERSION,
            wire::VERSION,
            header::FORMAT,
        )
    });
    &TEXT
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_version_names_the_commit_it_was_built_from_and_all_formats() {
        let text = long();
        for (name, number) in [
            ("hello version", u32::from(hello::VERSION)),
            ("frame version", u32::from(wire::VERSION)),
            ("metadata format", header::FORMAT),
        ] {
            assert!(text.contains(&format!("\n{name}: {number}")), "{text}");
        }
        assert!(text.starts_with(short()) && !short().contains('\n'), "{text}");
        // The sources may have been copied without their repository; then nothing else is known.
        let asked = Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short=12", "HEAD"])
            .output();
        if COMMIT == "unknown" {
            // Not left out: there is nothing to compare with.
            return;
        }
        let head = String::from_utf8(asked.expect("git, which named the commit, runs").stdout).expect("text");
        assert_eq!(COMMIT, head.trim(), "built from another commit");
    }
}
