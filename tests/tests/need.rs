//! `tests/tools/need.sh` on machines that lack something: what it says, what it asks apt for, and that it looks again.
//!
//! Each test makes a machine: one directory of programs, which is the whole PATH, where compilers, tools, package managers,
//! `id` and `sudo` are small scripts of ours. The script under test runs as it is, and installs nothing real.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What the script itself is written with.
const UTILITIES: [&str; 20] = [
    "awk", "bash", "cat", "chmod", "dirname", "env", "grep", "head", "ln", "mktemp", "paste", "rm", "sed",
    "sh", "sleep", "sort", "tail", "touch", "true", "uname",
];

/// What the sets `build`, `test` and `vm` ask for, by the package that brings it.
const PROGRAMS: [(&str, &str); 28] = [
    ("gcc", "cc"),
    ("make", "make"),
    ("g++", "c++"),
    ("pkg-config", "pkg-config"),
    ("git", "git"),
    ("libnbd-bin", "nbdinfo"),
    ("libnbd-bin", "nbdcopy"),
    ("libnbd-bin", "nbdfuse"),
    ("fio", "fio"),
    ("qemu-utils", "qemu-img"),
    ("qemu-utils", "qemu-io"),
    ("qemu-utils", "qemu-nbd"),
    ("qemu-system-common", "qemu-storage-daemon"),
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("e2fsprogs", "mkfs.ext4"),
    ("fuse3", "fusermount3"),
    ("mount", "losetup"),
    ("util-linux", "setpriv"),
    ("iproute2", "ip"),
    ("iproute2", "rdma"),
    ("nftables", "nft"),
    ("strace", "strace"),
    ("busybox-static", "busybox"),
    ("cpio", "cpio"),
    ("kmod", "depmod"),
    ("dmsetup", "dmsetup"),
    ("ibverbs-utils", "ibv_devinfo"),
    ("perftest", "ib_write_lat"),
];

const LIBRARIES: [&str; 4] =
    ["libclang.so", "libibverbs.so.1", "librdmacm.so.1", "libibverbs/librxe-rdmav34.so"];

/// The oldest Rust that builds the workspace.
const RUST: &str = env!("CARGO_PKG_RUST_VERSION");

/// A compiler whose programs all print the version that a libclang is asked for.
const COMPILES: &str = r#"while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then printf '#!/bin/sh\necho 14\n' >"$2" && chmod 755 "$2"; fi
    shift
done"#;

struct Machine {
    dir: tempfile::TempDir,
    variables: Vec<(&'static str, String)>,
}

impl Machine {
    /// With all that is needed, root, and no package manager.
    fn complete() -> Self {
        let machine = Self { dir: tempfile::tempdir().expect("a directory"), variables: Vec::new() };
        for dir in ["bin", "lib/libibverbs", "packages"] {
            fs::create_dir_all(machine.path(dir)).expect("a directory");
        }
        for name in UTILITIES {
            symlink(found_in_path(name), machine.bin(name)).expect("a link");
        }
        for (package, program) in PROGRAMS {
            machine.program(program, if program == "cc" { COMPILES } else { "exit 0" });
            // What the false apt-get installs.
            let programs = machine.path(&format!("packages/{package}"));
            let others = fs::read_to_string(&programs).unwrap_or_default();
            fs::write(&programs, format!("{others}{program}\n")).expect("a list");
        }
        for name in LIBRARIES {
            machine.library(name);
        }
        machine.program("readelf", "echo LOAD");
        machine.program("id", "echo 0");
        machine.rust("cargo", "1.95.0 (abc 2026-03-21)");
        machine.rust("rustc", "1.95.0 (abc 2026-03-21)");
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bin(&self, name: &str) -> PathBuf {
        self.path("bin").join(name)
    }

    fn program(&self, name: &str, script: &str) {
        script_at(&self.bin(name), script);
    }

    fn rust(&self, program: &str, version: &str) {
        self.program(program, &format!("echo '{program} {version}'"));
    }

    fn library(&self, name: &str) {
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-x", "c", "/dev/null", "-o"]).arg(self.path("lib").join(name));
        assert!(cc.status().expect("cc runs").success());
    }

    fn without(self, programs: &[&str]) -> Self {
        for name in programs {
            fs::remove_file(self.bin(name)).expect("a program");
            // The script looks there too, after PATH.
            if ["/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(name).exists()) {
                self.program(name, "exit 127");
            }
        }
        self
    }

    /// With an apt-get that writes down what it is asked for, runs `special`, and installs the programs of each package.
    fn with_apt(self, special: &str) -> Self {
        let script = format!(
            r#"root={root}
            while [ "${{1#-}}" != "$1" ]; do
                if [ "$1" = -o ]; then shift; fi
                shift
            done
            echo "$*" >>"$root/asked"
            command=$1
            asked=
            for word in "$@"; do
                case $word in -* | *=* | "$command") ;; *) asked="$asked $word" ;; esac
            done
            asked="$asked "
            {special}
            [ "$command" = install ] || exit 0
            for package in $asked; do
                [ -e "$root/packages/$package" ] || continue
                while read -r program; do ln -sf "$root/answer" "$root/bin/$program"; done <"$root/packages/$package"
            done"#,
            root = self.dir.path().display()
        );
        self.program("apt-get", &script);
        script_at(&self.path("answer"), COMPILES);
        self
    }

    fn with(mut self, variable: &'static str, value: &str) -> Self {
        self.variables.push((variable, value.to_owned()));
        self
    }

    fn need(&self, sets: &[&str]) -> Outcome {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/need.sh");
        let mut command = Command::new(self.bin("bash"));
        command.arg(script).args(sets).env_clear();
        command.env("PATH", self.path("bin")).env("HOME", self.dir.path());
        command.env("LD_LIBRARY_PATH", self.path("lib")).env("TMPDIR", self.dir.path());
        command.env("LIBCLANG_PATH", self.path("lib"));
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let output = command.output().expect("bash runs");
        Outcome::of(&output, &fs::read_to_string(self.path("asked")).unwrap_or_default())
    }
}

fn script_at(path: &Path, script: &str) {
    // Written beside and moved into place: a link there is replaced, not followed.
    let new = path.with_extension("new");
    fs::write(&new, format!("#!/bin/sh\n{script}\n")).expect("a script");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("executable");
    fs::rename(&new, path).expect("a script");
}

fn found_in_path(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("PATH is set");
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("there is no {name} in PATH"))
}

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    /// The words of each call of apt-get, its options left out.
    asked: Vec<Vec<String>>,
}

impl Outcome {
    fn of(output: &Output, asked: &str) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let words = |line: &str| line.split(' ').map(str::to_owned).collect();
        Self {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
            asked: asked.lines().map(words).collect(),
        }
    }

    fn installs(&self) -> impl Iterator<Item = &Vec<String>> {
        self.asked.iter().filter(|words| words[0] == "install")
    }

    #[track_caller]
    fn succeeds(&self) {
        assert_eq!(self.code, Some(0), "{}{}{:?}", self.stdout, self.stderr, self.asked);
    }

    /// Ended with status 1 and all of `words` on stderr, in no more than `lines` lines, without a call of apt-get's install.
    #[track_caller]
    fn refuses(&self, lines: usize, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "no \"{word}\" in: {}", self.stderr);
        }
        assert!(self.stderr.lines().count() <= lines, "more than {lines} lines: {}", self.stderr);
    }
}

#[test]
fn a_complete_machine_is_left_alone() {
    let outcome = Machine::complete().with_apt("").need(&["rust", "build", "test", "vm"]);
    outcome.succeeds();
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    assert_eq!(outcome.asked.len(), 0, "{:?}", outcome.asked);
}

#[test]
fn an_old_rust_is_named_with_the_one_that_is_needed() {
    for (program, version, enough) in [
        ("cargo", "1.65.0", false),
        ("rustc", "1.85.0 (4d91de4e4 2025-02-17) (built from a source tarball)", false),
        ("cargo", "1.9.0", false),
        ("rustc", "0.66.0", false),
        ("cargo", RUST, true),
        ("rustc", &format!("{RUST}.0-nightly (abc 2025-05-01)"), true),
        ("cargo", "1.100.0", true),
        ("rustc", "2.0.0", true),
    ] {
        let machine = Machine::complete().with_apt("");
        machine.rust(program, version);
        let outcome = machine.need(&["build"]);
        if enough {
            outcome.succeeds();
        } else {
            let number = version.split(' ').next().expect("a version");
            let is = format!("{program} {number}");
            let wanted = format!("Rust {RUST} or newer");
            outcome.refuses(2, &[&is, &wanted, "https://rustup.rs"]);
            assert_eq!(outcome.asked.len(), 0, "{:?}", outcome.asked);
        }
    }
}

#[test]
fn a_rust_that_is_there_and_not_found_is_pointed_at() {
    let machine = Machine::complete();
    machine.rust("cargo", "1.65.0");
    fs::create_dir_all(machine.path(".cargo/bin")).expect("a directory");
    script_at(&machine.path(".cargo/bin/cargo"), "echo cargo 1.95.0");
    let newer = machine.path(".cargo/bin");
    machine.need(&["build"]).refuses(2, &["cargo 1.65.0", "is 1.95.0", newer.to_str().expect("UTF-8")]);
}

#[test]
fn a_missing_or_broken_rust_is_told_apart() {
    let wanted = format!("Rust {RUST} or newer");
    let get = "https://rustup.rs";
    Machine::complete().without(&["cargo"]).need(&["build"]).refuses(2, &["no cargo", &wanted, get]);
    Machine::complete().without(&["rustc"]).need(&["rust"]).refuses(2, &["no rustc", &wanted, get]);
    for (script, words) in [
        (
            "echo 'error: rustup could not choose a version of cargo to run, because one was not specified' >&2; exit 1",
            ["could not choose a version of cargo", "rustup default stable"],
        ),
        ("echo 'libssl.so.3: cannot open' >&2; exit 127", ["libssl.so.3: cannot open", get]),
        ("echo hello", ["hello", get]),
    ] {
        let machine = Machine::complete();
        machine.program("cargo", script);
        machine.need(&["build"]).refuses(2, &words);
    }
}

#[test]
fn without_apt_the_system_is_told_in_its_own_words() {
    let lacking = ["cc", "c++", "qemu-img", "nbdfuse", "fio"];
    for (manager, words) in [
        ("dnf", ["dnf install", "gcc-c++", "glibc-devel", "qemu-img", "nbdfuse"]),
        ("pacman", ["pacman -S --needed", "glibc", "qemu-img", "fio", "    nbdfuse\n"]),
        ("zypper", ["zypper install", "gcc-c++", "glibc-devel", "qemu-tools", "    nbdfuse\n"]),
        ("apk", ["apk add", "g++", "musl-dev", "qemu-img", "    nbdfuse\n"]),
        ("none", ["(cc)", "(c++)", "    qemu-img\n", "    fio\n", "    nbdfuse\n"]),
    ] {
        let machine = Machine::complete().without(&lacking);
        machine.program(manager, &format!("touch {}", machine.path("called").display()));
        let outcome = machine.need(&["test"]);
        outcome.refuses(8, &words);
        outcome.refuses(8, &["no apt"]);
        assert!(!machine.path("called").exists(), "{manager} was called");
        for unsaid in ["libc6-dev", "verbs.h", "clang"] {
            assert!(!outcome.stderr.contains(unsaid), "{}", outcome.stderr);
        }
    }
    // Nothing is missing: no package manager is missed either.
    Machine::complete().need(&["test", "vm"]).succeeds();
}

/// The emulator's package takes away tools of the same source that came from elsewhere, unless asked for together.
const TAKES_AWAY: &str = r#"case $asked in
    *" qemu-utils "*) ;;
    *" qemu-system-x86 "*) rm "$root/bin/qemu-img" "$root/bin/qemu-io" "$root/bin/qemu-nbd" ;;
    esac"#;

#[test]
fn packages_of_one_source_are_asked_for_together() {
    let machine = Machine::complete().without(&["qemu-system-x86_64"]).with_apt(TAKES_AWAY);
    let outcome = machine.need(&["test", "vm"]);
    outcome.succeeds();
    assert!(machine.bin("qemu-img").exists() && machine.bin("qemu-system-x86_64").exists());
    let installs: Vec<_> = outcome.installs().collect();
    assert_eq!(installs.len(), 1, "{installs:?}");
    for package in ["qemu-utils", "qemu-system-common", "qemu-system-x86"] {
        assert!(installs[0].iter().any(|word| word == package), "{installs:?}");
    }
    // A set that needs only one of them does not bring the others.
    let machine = Machine::complete().without(&["losetup"]).with_apt("");
    let outcome = machine.need(&["vm"]);
    outcome.succeeds();
    assert!(outcome.installs().all(|words| !words.concat().contains("qemu")), "{:?}", outcome.asked);
}

#[test]
fn what_an_installation_took_away_is_installed_again() {
    // apt finds no way to have both, for the installed tools are newer than its own.
    let refuses_both = r#"case $asked in
        *" qemu-system-x86 "*" qemu-utils "* | *" qemu-utils "*" qemu-system-x86 "*)
            echo "E: Unable to correct problems, you have held broken packages."
            exit 100 ;;
        *" qemu-system-x86 "*)
            printf 'The following packages will be REMOVED:\n  qemu-utils\nThe following NEW packages will be installed:\n  new\n'
            rm "$root/bin/qemu-img" ;;
        esac"#;
    let machine = Machine::complete().without(&["qemu-system-x86_64"]).with_apt(refuses_both);
    // qemu-system-x86 is there by the second round, so that qemu-utils alone is missing; its family is asked for, refused,
    // and then qemu-utils alone.
    let outcome = machine.need(&["vm"]);
    outcome.succeeds();
    assert!(machine.bin("qemu-img").exists() && machine.bin("qemu-system-x86_64").exists());
    let removed: Vec<&str> = outcome.stdout.lines().filter(|line| line.starts_with("apt removed")).collect();
    assert_eq!(removed.len(), 1, "{}", outcome.stdout);
    assert!(removed[0].trim_end().ends_with(": qemu-utils"), "{removed:?}");
}

#[test]
fn a_tool_that_does_not_answer_after_installing_is_named() {
    let machine = Machine::complete();
    machine.program("fio", "echo 'fio: libaio is missing' >&2; exit 127");
    let machine = machine.with_apt(r#"rm -f "$root/packages/fio""#);
    let outcome = machine.need(&["test"]);
    outcome.refuses(3, &["fio", "libaio is missing", "PATH"]);
    let installs: Vec<_> = outcome.installs().collect();
    assert_eq!(installs.len(), 2, "{installs:?}");
    assert!(installs[1].iter().any(|word| word == "--reinstall"), "{installs:?}");
}

#[test]
fn a_package_whose_files_are_gone_is_installed_again() {
    // apt takes the package for installed and does nothing, unless told to install it again.
    let machine =
        Machine::complete().without(&["nft"]).with_apt(r#"case "$*" in *--reinstall*) ;; *) asked= ;; esac"#);
    machine.need(&["test"]).succeeds();
}

#[test]
fn each_package_is_asked_for_once() {
    let lacking: Vec<&str> = PROGRAMS.iter().map(|(_, program)| *program).collect();
    let machine = Machine::complete().without(&lacking).with_apt("");
    let outcome = machine.need(&["build", "test", "vm", "test"]);
    outcome.succeeds();
    let installs: Vec<_> = outcome.installs().collect();
    assert_eq!(installs.len(), 1, "one call for all sets: {installs:?}");
    let words = installs[0];
    let different: BTreeSet<&String> = words.iter().collect();
    assert_eq!(different.len(), words.len(), "{words:?}");
    for (package, _) in PROGRAMS {
        assert!(different.iter().any(|word| *word == package), "{package} in {words:?}");
    }
}

#[test]
fn without_the_right_to_install_the_command_is_said() {
    for sudo in [None, Some("echo 'sudo: a password is required' >&2; exit 1")] {
        let machine = Machine::complete().without(&["fio", "git"]).with_apt("");
        machine.program("id", "echo 1000");
        if let Some(script) = sudo {
            machine.program("sudo", script);
        }
        let outcome = machine.need(&["test"]);
        outcome.refuses(2, &["root", "apt-get install fio git"]);
        assert_eq!(outcome.asked.len(), 0, "{:?}", outcome.asked);
    }
    let machine = Machine::complete().without(&["fio"]).with_apt("");
    machine.program("id", "echo 1000");
    machine.program("sudo", r#"[ "$1" = -n ] && shift && exec "$@""#);
    machine.need(&["test"]).succeeds();
}

#[test]
fn what_keeps_apt_from_installing_is_said_in_one_line() {
    let lock = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)";
    for (said, words) in [
        (lock, ["lock", "wait until it is done"]),
        ("E: Failed to fetch http://mirror/x  Could not resolve 'mirror'", ["/etc/apt", "network"]),
        ("E: Unable to locate package fio", ["fio", "Debian 12"]),
        ("E: dpkg was interrupted, you must manually run 'dpkg'", ["interrupted", "dpkg --configure -a"]),
        ("E: You don't have enough free space in /var/cache/apt/archives/.", ["full", "make room"]),
        ("E: something else", ["something else", "Mend"]),
    ] {
        let special = format!("if [ \"$command\" = install ]; then echo \"{said}\" >&2; exit 100; fi");
        let machine =
            Machine::complete().without(&["fio"]).with_apt(&special).with("COSTANDBY_APT_WAIT", "1");
        let outcome = machine.need(&["test"]);
        outcome.refuses(2, &words);
        outcome.refuses(2, &[said, "could not install: fio", "run this again"]);
    }
}

#[test]
fn a_lock_that_is_given_up_is_waited_for() {
    for command in ["update", "install"] {
        let special = format!(
            r#"if [ "$command" = {command} ] && [ ! -e "$root/tried" ]; then
                touch "$root/tried"
                echo "E: Could not get lock /var/lib/apt/lists/lock" >&2
                exit 100
            fi"#
        );
        let outcome = Machine::complete().without(&["fio"]).with_apt(&special).need(&["test"]);
        outcome.succeeds();
        assert!(outcome.stdout.contains("waiting"), "{}", outcome.stdout);
    }
}

#[test]
fn a_failed_update_alone_stops_nothing() {
    let machine = Machine::complete().without(&["fio"]).with_apt(r#"[ "$command" = install ] || exit 100"#);
    machine.need(&["test"]).succeeds();
}

#[test]
fn what_only_looks_like_it_does_not_count() {
    let asks_for = |machine: Machine, package: &str| {
        let outcome = machine.with_apt("").need(&["vm"]);
        let asked = outcome.installs().any(|words| words.iter().any(|word| word == package));
        assert!(asked, "{package}: {:?}", outcome.asked);
    };
    let machine = Machine::complete();
    fs::write(machine.path("lib/libibverbs.so.1"), "no library").expect("a file");
    asks_for(machine, "libibverbs1");

    let machine = Machine::complete();
    fs::rename(machine.path("lib/librdmacm.so.1"), machine.path("lib/librdmacm.so.10")).expect("renamed");
    // Only where the system has none of its own, which would be found then.
    if !has_system_library("librdmacm.so.1") {
        asks_for(machine, "librdmacm1");
    }

    let machine = Machine::complete();
    fs::write(machine.path("lib/libibverbs/librxe-rdmav34.so"), "no library").expect("a file");
    asks_for(machine, "ibverbs-providers");

    let machine = Machine::complete();
    machine.program("readelf", "echo INTERP LOAD");
    asks_for(machine, "busybox-static");

    let machine = Machine::complete().without(&["readelf"]);
    asks_for(machine, "busybox-static");

    let machine = Machine::complete();
    machine.program("ib_write_lat", "exec /nowhere/ib_write_lat");
    asks_for(machine, "perftest");
}

fn has_system_library(name: &str) -> bool {
    let mut shell = Command::new("/bin/sh");
    let output = shell.args(["-c", ":"]).env("LD_PRELOAD", name).output().expect("a shell");
    output.stderr.is_empty()
}

#[test]
fn a_wrong_set_is_no_success() {
    assert_eq!(Machine::complete().need(&["tests"]).code, Some(2));
    assert_eq!(Machine::complete().need(&[]).code, Some(2));
}
