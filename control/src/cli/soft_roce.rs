//! `costandby soft-roce up|down NETDEV`: an RDMA device in software on any network interface, and its end.
//!
//! Loads the kernel's modules and has iproute2's `rdma` make or remove the device, as an operator would by hand; what
//! there is already is found in /sys. Every way in which a machine lacks a part of it ends in a sentence that says which
//! part and what to do.
//!
//! Invariants: a device that is no soft-RoCE is never touched; asking for what is there already, or for the end of what is
//! not there, is done without root.
//!
//! Survives: a machine without /sys, tools or modules.

use super::{CliError, one_line, print};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Examples for `--help`.
pub(super) const EXAMPLES: &str = "\
Examples:
  costandby soft-roce up eth0        RDMA on eth0: the device rxe_eth0
  costandby soft-roce up lo          enough for `costandby demo --link rdma`
  costandby soft-roce down eth0      and gone again

Root only. The device is gone after a restart; docs/RDMA.md shows a unit that makes it again.";

/// The modules: the device, its queues for user space, its connections for user space.
const MODULES: [&str; 3] = ["rdma_rxe", "ib_uverbs", "rdma_ucm"];

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum SoftRoceError {
    /// No such interface.
    #[error("there is no network interface {netdev}: this machine has {known}")]
    NoNetdev {
        /// As asked.
        netdev: String,
        /// Those there are.
        known: String,
    },
    /// Not root.
    #[error("making and removing RDMA devices is for root: run it with sudo")]
    NotRoot,
    /// A tool is missing.
    #[error("the program `{program}` is not there: install the package {package}")]
    NoTool {
        /// Which.
        program: &'static str,
        /// Where it is.
        package: &'static str,
    },
    /// The kernel has no such module.
    #[error(
        "this kernel ({release}) has no module {module}: take the distribution's full kernel instead of its cloud or \
         virtual one (on Debian the package linux-image-amd64, on Ubuntu linux-modules-extra-{release}); \
         modprobe said: {said}"
    )]
    NoModule {
        /// Which.
        module: &'static str,
        /// The running kernel.
        release: String,
        /// The tool's words.
        said: String,
    },
    /// The tool failed.
    #[error("`{command}` failed: {said}")]
    Tool {
        /// What was run.
        command: String,
        /// Its words.
        said: String,
    },
    /// Another kind of device has the interface.
    #[error("{device} on {netdev} is no soft-RoCE device: it is left alone")]
    Hardware {
        /// Which.
        device: String,
        /// Where.
        netdev: String,
    },
    /// The kernel would wait for somebody, and there is no interrupting that.
    #[error(
        "{device} is in use by {users}: the kernel would wait, uninterruptibly, until that ends; stop it first"
    )]
    InUse {
        /// Which.
        device: String,
        /// Programs that have it open.
        users: String,
    },
    /// It could not even be tried.
    #[error("running `{program}`: {source}")]
    Run {
        /// What.
        program: &'static str,
        /// The operating system's words.
        source: io::Error,
    },
}

/// An RDMA device as /sys shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Device {
    name: String,
    /// In software, on an interface.
    soft: bool,
}

/// Runs a program and gives what it said.
type Runner<'a> = dyn FnMut(&'static str, &[&str]) -> io::Result<Output> + 'a;

/// The machine: /sys, the running kernel and how programs are run, so that tests can make one up.
struct Machine<'a> {
    sys: PathBuf,
    proc: PathBuf,
    release: String,
    root: bool,
    run: &'a mut Runner<'a>,
}

/// Does it and prints one line.
///
/// # Errors
/// [`SoftRoceError`].
pub(super) fn run(args: &super::SoftRoceArgs) -> Result<(), CliError> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut machine = Machine {
        sys: PathBuf::from("/sys"),
        proc: PathBuf::from("/proc"),
        release: release.trim().to_owned(),
        root: rustix::process::geteuid().is_root(),
        run: &mut |program, args| {
            Command::new(program)
                .args(args)
                .stdin(Stdio::null())
                // Of an administrator who came by `su`, too.
                .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
                .env("LC_ALL", "C")
                .output()
        },
    };
    let text = match &args.action {
        super::SoftRoceAction::Up { netdev } => machine.up(netdev)?,
        super::SoftRoceAction::Down { netdev } => machine.down(netdev)?,
    };
    print(&format!("{text}\n"))
}

impl Machine<'_> {
    fn up(&mut self, netdev: &str) -> Result<String, SoftRoceError> {
        self.check_netdev(netdev)?;
        if let Some(device) = self.devices_on(netdev).first() {
            let kind = if device.soft { "soft-RoCE" } else { "RDMA, and needs no soft-RoCE" };
            return Ok(format!("{} on {netdev} is there already: {kind}", device.name));
        }
        self.check_root()?;
        for module in MODULES {
            self.load(module)?;
        }
        let name = format!("rxe_{netdev}");
        self.rdma(&["link", "add", &name, "type", "rxe", "netdev", netdev])?;
        Ok(format!(
            "{name} is up on {netdev}, until the next restart; `costandby doctor` shows what it can do"
        ))
    }

    fn down(&mut self, netdev: &str) -> Result<String, SoftRoceError> {
        let devices = self.devices_on(netdev);
        let Some(device) = devices.iter().find(|device| device.soft) else {
            return match devices.into_iter().next() {
                Some(Device { name: device, .. }) => {
                    Err(SoftRoceError::Hardware { device, netdev: netdev.to_owned() })
                }
                None => {
                    self.check_netdev(netdev)?;
                    Ok(format!("there is no soft-RoCE device on {netdev}"))
                }
            };
        };
        self.check_root()?;
        let users = self.users_of(&device.name);
        if !users.is_empty() {
            return Err(SoftRoceError::InUse { device: device.name.clone(), users: users.join(", ") });
        }
        self.rdma(&["link", "delete", &device.name])?;
        Ok(format!("{} on {netdev} is gone; volumes with link = \"auto\" go on over TCP", device.name))
    }

    fn check_netdev(&self, netdev: &str) -> Result<(), SoftRoceError> {
        let known = names_in(&self.sys.join("class/net"));
        if known.iter().any(|name| name == netdev) {
            return Ok(());
        }
        let known = if known.is_empty() { "none that can be seen".to_owned() } else { known.join(", ") };
        Err(SoftRoceError::NoNetdev { netdev: netdev.to_owned(), known })
    }

    fn check_root(&self) -> Result<(), SoftRoceError> {
        if self.root { Ok(()) } else { Err(SoftRoceError::NotRoot) }
    }

    /// The devices with a port on an interface. A software device names the interface it stands on (`parent`); others
    /// have it beside the addresses of their ports.
    fn devices_on(&self, netdev: &str) -> Vec<Device> {
        let class = self.sys.join("class/infiniband");
        let says = |path: PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == netdev);
        let mut found = Vec::new();
        for name in names_in(&class) {
            let device = class.join(&name);
            if device.join("parent").exists() {
                if says(device.join("parent")) {
                    found.push(Device { name, soft: true });
                }
                continue;
            }
            let ports = names_in(&device.join("ports"));
            let on = ports.iter().any(|port| {
                let interfaces = device.join("ports").join(port).join("gid_attrs/ndevs");
                names_in(&interfaces).iter().any(|index| says(interfaces.join(index)))
            });
            if on {
                found.push(Device { name, soft: false });
            }
        }
        found
    }

    /// The programs that have a device open: a soft-RoCE device is not removed under them. The connection manager's
    /// library keeps the last device open for as long as its program lives.
    fn users_of(&self, device: &str) -> Vec<String> {
        let class = self.sys.join("class/infiniband_verbs");
        let names = names_in(&class).into_iter();
        let files: Vec<_> = names
            .filter(|name| {
                let owner = std::fs::read_to_string(class.join(name).join("ibdev"));
                owner.is_ok_and(|owner| owner.trim() == device)
            })
            .map(|name| PathBuf::from("/dev/infiniband").join(name))
            .collect();
        let opened = |process: &PathBuf| {
            let open = names_in(&process.join("fd"));
            open.iter().any(|fd| {
                std::fs::read_link(process.join("fd").join(fd)).is_ok_and(|target| files.contains(&target))
            })
        };
        let processes = names_in(&self.proc).into_iter().filter(|name| name.parse::<u32>().is_ok());
        let mut users = Vec::new();
        for id in processes {
            let process = self.proc.join(&id);
            if opened(&process) {
                let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
                users.push(format!("{} (process {id})", name.trim()));
            }
        }
        users
    }

    /// Loads a module unless it is there, built in or loaded.
    fn load(&mut self, module: &'static str) -> Result<(), SoftRoceError> {
        if self.sys.join("module").join(module).exists() {
            return Ok(());
        }
        let output = self.tool("modprobe", "kmod", &[module])?;
        if output.status.success() {
            return Ok(());
        }
        Err(SoftRoceError::NoModule { module, release: self.release.clone(), said: said(&output) })
    }

    fn rdma(&mut self, args: &[&str]) -> Result<(), SoftRoceError> {
        let output = self.tool("rdma", "iproute2 (Debian, Ubuntu) or iproute (Fedora and kin)", args)?;
        if output.status.success() {
            return Ok(());
        }
        Err(SoftRoceError::Tool { command: format!("rdma {}", args.join(" ")), said: said(&output) })
    }

    fn tool(
        &mut self,
        program: &'static str,
        package: &'static str,
        args: &[&str],
    ) -> Result<Output, SoftRoceError> {
        (self.run)(program, args).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SoftRoceError::NoTool { program, package },
            _ => SoftRoceError::Run { program, source },
        })
    }
}

/// What a failed program said, in one line.
fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = one_line(if text.trim().is_empty() { "nothing" } else { &text });
    format!("{text} ({})", output.status)
}

/// The names in a directory, in order; none where it cannot be read.
fn names_in(directory: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    /// A made-up machine: interfaces eth0 and lo, and what is added to its /sys.
    struct Fake {
        sys: tempfile::TempDir,
        root: bool,
        ran: Vec<String>,
        /// Programs that are not there, or fail with these words.
        missing: &'static str,
        fails: (&'static str, &'static str),
    }

    impl Fake {
        fn new() -> Self {
            let sys = tempfile::tempdir().expect("a directory");
            for netdev in ["eth0", "lo"] {
                std::fs::create_dir_all(sys.path().join("class/net").join(netdev)).expect("made");
            }
            Self { sys, root: true, ran: vec![], missing: "", fails: ("", "") }
        }

        fn add(&self, path: &str, text: &str) {
            let path = self.sys.path().join(path);
            std::fs::create_dir_all(path.parent().expect("below /sys")).expect("made");
            std::fs::write(path, text).expect("written");
        }

        fn act(&mut self, act: impl FnOnce(&mut Machine<'_>) -> Result<String, SoftRoceError>) -> String {
            let Self { sys, root, ran, missing, fails } = self;
            let (missing, fails) = (*missing, *fails);
            let mut run = |program: &'static str, args: &[&str]| {
                if program == missing {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let line = format!("{program} {}", args.join(" "));
                let failed = !fails.0.is_empty() && line.starts_with(fails.0);
                ran.push(line);
                let status = ExitStatus::from_raw(if failed { 1 << 8 } else { 0 });
                let stderr = if failed { fails.1.into() } else { vec![] };
                Ok(Output { status, stdout: vec![], stderr })
            };
            let release = "6.1.0-9-amd64".to_owned();
            let mut machine = Machine {
                sys: sys.path().to_owned(),
                proc: sys.path().join("proc"),
                release,
                root: *root,
                run: &mut run,
            };
            act(&mut machine).unwrap_or_else(|error| format!("error: {error}"))
        }

        fn up(&mut self, netdev: &str) -> String {
            self.act(|machine| machine.up(netdev))
        }

        fn down(&mut self, netdev: &str) -> String {
            self.act(|machine| machine.down(netdev))
        }
    }

    #[test]
    fn up_loads_what_is_missing_and_makes_the_device() {
        let mut fake = Fake::new();
        fake.add("module/ib_uverbs/initstate", "live\n");
        assert!(fake.up("eth0").starts_with("rxe_eth0 is up on eth0"));
        let add = "rdma link add rxe_eth0 type rxe netdev eth0";
        assert_eq!(fake.ran, ["modprobe rdma_rxe", "modprobe rdma_ucm", add]);
    }

    #[test]
    fn what_is_there_already_needs_neither_root_nor_tools() {
        let mut fake = Fake::new();
        fake.root = false;
        fake.add("class/infiniband/rxe7/parent", "eth0\n");
        assert_eq!(fake.up("eth0"), "rxe7 on eth0 is there already: soft-RoCE");
        fake.add("class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/0", "lo\n");
        assert_eq!(fake.up("lo"), "mlx5_0 on lo is there already: RDMA, and needs no soft-RoCE");
        assert_eq!(fake.ran, [""; 0]);
    }

    #[test]
    fn down_removes_soft_devices_only() {
        let mut fake = Fake::new();
        assert_eq!(fake.down("eth0"), "there is no soft-RoCE device on eth0");
        fake.add("class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/3", "eth0\n");
        assert_eq!(fake.down("eth0"), "error: mlx5_0 on eth0 is no soft-RoCE device: it is left alone");
        fake.add("class/infiniband/rxe7/parent", "eth0\n");
        assert!(fake.down("eth0").starts_with("rxe7 on eth0 is gone"));
        assert_eq!(fake.ran, ["rdma link delete rxe7"]);
        fake.root = false;
        assert!(fake.down("eth0").contains("run it with sudo"));
    }

    #[test]
    fn a_device_that_a_program_has_open_is_not_waited_for() {
        let mut fake = Fake::new();
        fake.add("class/infiniband/rxe7/parent", "eth0\n");
        fake.add("class/infiniband_verbs/uverbs3/ibdev", "rxe7\n");
        fake.add("class/infiniband_verbs/uverbs4/ibdev", "rxe8\n");
        fake.add("proc/12/comm", "costandby\n");
        fake.add("proc/13/comm", "other\n");
        let open = |id: &str, file: &str| {
            let directory = fake.sys.path().join("proc").join(id).join("fd");
            std::fs::create_dir_all(&directory).expect("made");
            std::os::unix::fs::symlink(format!("/dev/infiniband/{file}"), directory.join("9")).expect("made");
        };
        open("12", "uverbs3");
        open("13", "uverbs4");
        let text = fake.down("eth0");
        assert!(text.contains("rxe7 is in use by costandby (process 12): the kernel would wait"), "{text}");
        assert_eq!(fake.ran, [""; 0]);
        std::fs::remove_file(fake.sys.path().join("proc/12/fd/9")).expect("removed");
        assert!(fake.down("eth0").starts_with("rxe7 on eth0 is gone"));
    }

    #[test]
    fn each_lack_has_its_own_words() {
        let mut fake = Fake::new();
        assert_eq!(fake.up("eth9"), "error: there is no network interface eth9: this machine has eth0, lo");
        assert!(fake.down("eth9").contains("this machine has eth0, lo"));
        fake.root = false;
        assert!(fake.up("eth0").contains("run it with sudo"));
        fake.root = true;
        fake.missing = "rdma";
        assert!(fake.up("eth0").contains("`rdma` is not there: install the package iproute2"));
        fake.missing = "modprobe";
        assert!(fake.up("eth0").contains("`modprobe` is not there: install the package kmod"));
        fake.missing = "";
        fake.fails = ("modprobe rdma_rxe", "FATAL: Module rdma_rxe not found\nin directory\n");
        let text = fake.up("eth0");
        assert!(text.contains("this kernel (6.1.0-9-amd64) has no module rdma_rxe"), "{text}");
        assert!(text.contains("FATAL: Module rdma_rxe not found; in directory"), "{text}");
        fake.fails = ("rdma link add", "error: Operation not supported\n");
        let text = fake.up("eth0");
        assert!(
            text.contains("`rdma link add rxe_eth0 type rxe netdev eth0` failed: error: Operation"),
            "{text}"
        );
    }
}
