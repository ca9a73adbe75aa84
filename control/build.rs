//! Tells the program which commit it is built from: `COSTANDBY_COMMIT`, for `costandby --version`.
//!
//! `unknown` where the sources are no git checkout of their own: an archive, or a directory of somebody else's repository.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let commit = commit().unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=COSTANDBY_COMMIT={commit}");
}

fn commit() -> Option<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.canonicalize().ok()?;
    let root = PathBuf::from(git(&workspace, &["rev-parse", "--show-toplevel"])?);
    if root.canonicalize().ok()? != workspace {
        return None;
    }
    // A commit, a checkout and a reset change one of these. The branch's own file is missing while it is packed.
    let mut watched = vec!["HEAD".to_owned(), "logs/HEAD".to_owned(), "packed-refs".to_owned()];
    watched.extend(git(&workspace, &["symbolic-ref", "--quiet", "HEAD"]));
    for name in watched {
        let path = workspace.join(git(&workspace, &["rev-parse", "--git-path", &name])?);
        // A path that is not there would have cargo run this each time.
        if path.exists() {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    git(&workspace, &["rev-parse", "--short=12", "HEAD"])
}

/// What git says, of the repository around `dir` and not of one that a hook's environment names.
fn git(dir: &Path, args: &[&str]) -> Option<String> {
    let mut git = Command::new("git");
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR"] {
        git.env_remove(variable);
    }
    let output = git.current_dir(dir).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
