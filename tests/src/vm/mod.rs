//! The soft-RoCE rig: virtual machines in which the RDMA link runs for real, on a machine whose own kernel has no RDMA.
//!
//! A guest boots a Debian kernel under QEMU without hardware virtualization, sees the host's files over 9p and has one
//! software device, `rxe0`. [`guest`] boots and ends one, [`fast`] runs the tests and clients that fit into one guest,
//! [`failover`] pulls the cable and the plug on one of two, with [`survivor`] inside the other, and [`power`] the plug on
//! either or both in every state, with [`agent`] in each; [`lost_host`] shows what a bare queue pair notices of a lost host,
//! [`auto`] is the part inside a guest whose device comes late, and [`first_link`] measures how soon the link is there with a
//! newer kernel. What a guest boots from is made by
//! `tests/vm/image.sh`; `tests/vm/init` and `tests/vm/guest.sh` bring it up.
//!
//! Invariants: a guest never outlives the program that started it; every wait is bounded; nothing a guest does reaches
//! the host's files but for the directory of its run; what failed leaves that directory behind, and says where it is.

pub mod agent;
pub mod auto;
pub mod failover;
pub mod fast;
pub mod first_link;
pub mod guest;
pub mod lost_host;
pub mod power;
pub mod survivor;

use crate::process::Guarded;
use guest::Kernel;
use std::io::{self, IsTerminal, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What carries the copies in the rig's runs, unless its caller says otherwise.
pub const LINK: &str = "rdma";

/// The device that each guest has.
pub const DEVICE: &str = "rxe0";

/// How long the kernel may take to be fetched and unpacked: 70 MB over a slow line.
const IMAGE_LIMIT: Duration = Duration::from_secs(1800);

/// How long the workspace's programs and tests may take to be built: ten times what two cores need from nothing.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// Why the rig, or what ran in it, failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, and to what.
        doing: String,
        /// Its words.
        source: io::Error,
    },
    /// A program that prepares something failed; it has said why itself.
    #[error("{what} failed: {status}")]
    Preparing {
        /// Which one.
        what: &'static str,
        /// How it ended.
        status: String,
    },
    /// A guest did not come up, ended by itself or did not end in time.
    #[error("guest {guest} {what}; its kernel's and QEMU's last words:\n{last_words}")]
    Guest {
        /// Its name.
        guest: String,
        /// What went wrong.
        what: String,
        /// The end of its console and of QEMU's messages.
        last_words: String,
    },
    /// What was to be shown does not hold.
    #[error("{0}")]
    Failed(String),
}

/// [`VmError::Io`] out of what the operating system said.
fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
    let doing = doing.into();
    move |source| VmError::Io { doing, source }
}

/// Where everything is: the sources, what was built from them, and what guests boot from.
#[derive(Clone, Debug)]
pub struct Rig {
    root: PathBuf,
    profile: PathBuf,
    vm: PathBuf,
    kernel: Kernel,
}

impl Rig {
    /// Makes what guests with that kernel boot from, where that is missing.
    ///
    /// # Errors
    /// Without a network where a kernel is still to be fetched, or without the programs that `tests/tools/need.sh vm`
    /// installs.
    pub fn prepare(kernel: Kernel) -> Result<Self, VmError> {
        let root =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above").to_path_buf();
        let own = std::env::current_exe().map_err(io_error("finding this program's own path"))?;
        let profile = own.parent().expect("programs are in target/PROFILE").to_path_buf();
        let vm = profile.parent().expect("a profile is in a target directory").join("vm");
        let rig = Self { root, profile, vm, kernel };
        let mut image = Command::new(rig.root.join("tests/vm/image.sh"));
        prepare("making what a guest boots from", image.arg(&rig.vm).arg(kernel.name()), IMAGE_LIMIT)?;
        Ok(rig)
    }

    /// The same rig for guests with another kernel.
    ///
    /// # Errors
    /// As [`Rig::prepare`].
    pub fn with(&self, kernel: Kernel) -> Result<Self, VmError> {
        if kernel == self.kernel { Ok(self.clone()) } else { Self::prepare(kernel) }
    }

    /// Where what its guests boot from lies: `image` and `kernel`, as `tests/vm/image.sh` makes them.
    fn boots_from(&self) -> PathBuf {
        match self.kernel {
            Kernel::Debian => self.vm.clone(),
            other => self.vm.join(other.name()),
        }
    }

    /// A program of the workspace, of the profile that this one was built with.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.profile.join(name)
    }

    /// `cargo`, in the workspace and for the target directory that this program is from.
    fn cargo(&self) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.root).env("CARGO_TARGET_DIR", self.profile.parent().expect("as in prepare"));
        cargo
    }

    /// Builds the programs of the workspace and its tests, in one call: apart they would be built with other features of
    /// what they depend on, and so twice. Those that `make test` has built are used as they are.
    ///
    /// # Errors
    /// When they cannot be built; cargo has said why.
    pub fn build(&self) -> Result<Built, VmError> {
        let mut cargo = self.cargo();
        cargo.args(["build", "--quiet", "--locked", "--workspace", "--bins", "--tests", "--message-format"]);
        // Into a file, for who reads from a pipe has no time limit.
        let mut messages = tempfile::tempfile().map_err(io_error("making a temporary file"))?;
        let output = messages.try_clone().map_err(io_error("making a temporary file"))?;
        cargo.arg("json-render-diagnostics").stdin(Stdio::null()).stdout(output);
        prepare("building programs and tests", &mut cargo, BUILD_LIMIT)?;
        let mut said = String::new();
        let read = messages.rewind().and_then(|()| messages.read_to_string(&mut said));
        read.map_err(io_error("reading what cargo says"))?;
        Ok(Built { tests: said.lines().filter_map(test_program).collect() })
    }

    /// An empty directory for a run. Those of earlier runs of the same name are removed once their programs have ended.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn run_directory(&self, name: &str) -> Result<PathBuf, VmError> {
        let runs = self.vm.join("runs");
        for entry in std::fs::read_dir(&runs).into_iter().flatten().flatten() {
            let file_name = entry.file_name();
            let (found, pid) = file_name.to_str().and_then(|name| name.rsplit_once('-')).unwrap_or_default();
            if found == name && !Path::new("/proc").join(pid).exists() {
                // Whoever else tidies up at the same time is welcome to.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let dir = runs.join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(io_error(format!("making {}", dir.display())))?;
        Ok(dir)
    }
}

/// The tests of the workspace, built.
#[derive(Debug)]
pub struct Built {
    tests: Vec<TestProgram>,
}

/// A test program.
#[derive(Clone, PartialEq, Eq, Debug)]
struct TestProgram {
    package: String,
    name: String,
    path: PathBuf,
}

/// The test program that a message of cargo's is about, if it is about one.
fn test_program(message: &str) -> Option<TestProgram> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    // path+file:///…/tests#costandby-tests@0.1.0, or …/costandby-tests#0.1.0 where the directory is called so.
    let id = message["package_id"].as_str()?;
    let (directory, name) = id.rsplit_once('#')?;
    let package =
        name.split_once('@').map_or_else(|| directory.rsplit('/').next(), |(name, _)| Some(name))?;
    Some(TestProgram {
        package: package.to_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        path: message["executable"].as_str()?.into(),
    })
}

/// Runs a program that prepares something, with this one's output.
fn prepare(what: &'static str, command: &mut Command, limit: Duration) -> Result<(), VmError> {
    let ended = Guarded::spawn(command).wait(limit);
    match ended {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(VmError::Preparing { what, status: status.to_string() }),
        None => Err(VmError::Preparing { what, status: format!("took longer than {limit:?}") }),
    }
}

/// Prints one line a step, with the time it took; on a terminal also the step under way.
#[derive(Debug)]
pub struct Steps {
    started: Instant,
    step_started: Instant,
    current: String,
    on_terminal: bool,
    failed: Vec<String>,
}

impl Default for Steps {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            step_started: now,
            current: String::new(),
            on_terminal: io::stdout().is_terminal(),
            failed: Vec::new(),
        }
    }
}

impl Steps {
    /// A step begins.
    pub fn begin(&mut self, name: &str) {
        name.clone_into(&mut self.current);
        self.step_started = Instant::now();
        if self.on_terminal {
            print!("          … {name}");
            let _ = io::stdout().flush();
        }
    }

    /// It ended as it should; `note` says what was seen.
    pub fn passed(&mut self, note: &str) {
        self.end("ok  ", note);
    }

    /// It did not.
    pub fn failed(&mut self, note: &str) {
        self.end("FAIL", note);
        self.failed.push(self.current.clone());
    }

    /// Runs `work` as a step.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn run<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T, VmError>) -> Result<T, VmError> {
        self.begin(name);
        let done = work();
        match &done {
            Ok(_) => self.passed(""),
            Err(_) => self.failed(""),
        }
        done
    }

    /// Seconds since the first step, for a last line.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// The steps that failed.
    #[must_use]
    pub fn failures(&self) -> &[String] {
        &self.failed
    }

    fn end(&self, word: &str, note: &str) {
        let erase = if self.on_terminal { "\r\x1b[K" } else { "" };
        let between = if note.is_empty() { "" } else { ": " };
        let seconds = self.step_started.elapsed().as_secs_f64();
        println!("{erase}{seconds:7.1} s  {word}  {}{between}{note}", self.current);
    }
}

/// The last `count` lines of a file, or nothing where there is none.
fn last_lines(path: &Path, count: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| format!("    {line}\n")).collect()
}

/// `text` as one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_takes_what_is_quoted_as_one_word() {
        for text in ["plain", "two words", "it's", "$HOME `x` \"y\" \\", ""] {
            let said =
                Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(text))).output().expect("sh");
            assert_eq!(String::from_utf8_lossy(&said.stdout), text);
        }
    }

    #[test]
    fn a_test_program_is_found_in_what_cargo_says() {
        let message = |id: &str, test: bool| {
            let profile = serde_json::json!({ "test": test });
            let target = serde_json::json!({ "name": "real_clients" });
            serde_json::json!({ "reason": "compiler-artifact", "package_id": id, "profile": profile,
                "target": target, "executable": "/t/deps/real_clients-1" })
            .to_string()
        };
        let package = |id: &str| test_program(&message(id, true)).map(|found| found.package);
        assert_eq!(package("path+file:///a/tests#costandby-tests@0.1.0").as_deref(), Some("costandby-tests"));
        assert_eq!(package("path+file:///a/costandby-tests#0.1.0").as_deref(), Some("costandby-tests"));
        assert_eq!(test_program(&message("path+file:///a#b@1", false)), None, "a library");
        assert_eq!(test_program("not JSON"), None);
    }
}
