//! Integration tests of costandby: what they share.
//!
//! Stands outside everything that is tested. Survives being run without a build of the whole workspace before.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::Command;

/// The `costandby` program of the build this test belongs to; built now where it is not there.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn costandby_binary() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a file");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("tests lie in PROFILE/deps");
    let program = profile.join("costandby");
    if !program.exists() {
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--package", "costandby-control", "--bin", "costandby", "--profile"]);
        let name = profile.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        build.arg(if name == "debug" { "dev" } else { name });
        build.arg("--target-dir").arg(profile.parent().expect("profiles lie in the target directory"));
        let status = build.status().expect("cargo runs");
        assert!(status.success() && program.exists(), "building {}: {status}", program.display());
    }
    program
}
