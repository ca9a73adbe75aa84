//! Programs started by a test: each with a limit to its time, each ended by its own id.
//!
//! Output goes to files, not pipes, so that a program that says much cannot stand still for want of a reader.

use crate::scaled;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a well-behaved helper program may take on a loaded machine.
pub const PROGRAM_LIMIT: Duration = Duration::from_secs(60);

/// A process that dies with this guard.
#[derive(Debug)]
pub struct Guarded {
    child: Child,
}

impl Guarded {
    /// Starts `command`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child }
    }

    /// Its id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be asked")
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for the end; `None` where it takes longer than `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Option<ExitStatus> {
        if let Some(pid) = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        self.wait(limit)
    }

    /// Waits for the end; `None` where it takes longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if started.elapsed() >= limit {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ran {
    /// Itself, if the program succeeded.
    ///
    /// # Panics
    /// When it did not, with all it said.
    pub fn ok(self) -> Self {
        assert!(
            self.status.success(),
            "{} ended with {}\n{}{}",
            self.command,
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }
}

/// Runs a program to its end. `limit` suits a quiet machine, and is longer on a slow one.
///
/// # Panics
/// When it cannot be started or takes longer than `limit`.
pub fn run_within(command: &mut Command, limit: Duration) -> Ran {
    let (text, limit) = (format!("{command:?}"), scaled(limit));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (out, err) = (dir.path().join("out"), dir.path().join("err"));
    let file = |path: &Path| File::create(path).expect("a file in a temporary directory");
    let mut child = Guarded::spawn(command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err)));
    let status = child.wait(limit);
    let said = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let (stdout, stderr) = (said(&out), said(&err));
    let Some(status) = status else { panic!("{text} took longer than {limit:?}\n{stdout}{stderr}") };
    Ran { command: text, status, stdout, stderr }
}

/// Runs a program to its end within [`PROGRAM_LIMIT`].
///
/// # Panics
/// When it cannot be started or takes longer.
pub fn run(command: &mut Command) -> Ran {
    run_within(command, PROGRAM_LIMIT)
}

/// A program of `/sbin` or `/usr/sbin` is found even where the path of the user does not name these.
#[must_use]
pub fn system_command(name: &str) -> Command {
    let found = ["/usr/sbin", "/sbin"].iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists());
    Command::new(found.unwrap_or_else(|| PathBuf::from(name)))
}

/// Whether a program is installed.
#[must_use]
pub fn is_installed(name: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<_> = std::env::split_paths(&dirs).collect();
    dirs.extend(["/usr/sbin".into(), "/sbin".into()]);
    dirs.iter().any(|dir| dir.join(name).is_file())
}

/// The daemon's program, of the profile and target directory of the running test. Built where it is missing.
///
/// # Panics
/// When it cannot be built.
pub fn costandby_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().expect("the test's own path");
        // Tests are in target/PROFILE/deps, programs one above.
        let own = test.parent().expect("a program is in a directory");
        let above = own.parent().filter(|_| own.ends_with("deps"));
        let profile = above.unwrap_or(own);
        let binary = profile.join("costandby");
        if !binary.exists() {
            let target = profile.parent().expect("a profile is in a target directory");
            let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            build.args(["build", "--quiet", "--package", "costandby-control", "--target-dir"]).arg(target);
            build.current_dir(env!("CARGO_MANIFEST_DIR"));
            run_within(&mut build, Duration::from_secs(600)).ok();
        }
        assert!(binary.exists(), "{} is missing: `cargo build -p costandby-control`", binary.display());
        binary
    })
}
