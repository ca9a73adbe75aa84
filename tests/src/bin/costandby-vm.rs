//! `costandby-vm`: the soft-RoCE rig's command line. What it does stands in [`costandby_tests::vm`].
#![forbid(unsafe_code)]

use clap::{Args, Parser, Subcommand};
use costandby_tests::patience::Limits;
use costandby_tests::vm::guest::{Guest, Kernel, Settings};
use costandby_tests::vm::{
    LINK, Rig, Steps, VmError, agent, auto, failover, fast, first_link, lost_host, power, survivor,
};
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Nobody sits in a shell for longer without saying so.
const SHELL_LIMITS: Limits = Limits::silent(Duration::from_secs(24 * 3600));

#[derive(Parser)]
#[command(
    name = "costandby-vm",
    version,
    about = "Runs things in virtual machines that have an RDMA device, rxe0"
)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run the RDMA tests: one guest for tests, clients and demo, two for plugs that are pulled.
    #[command(
        after_help = "Examples:\n  costandby-vm test\n  costandby-vm test --only clients,two-guests --link tcp"
    )]
    Test {
        /// What carries the copies: rdma or tcp.
        #[arg(long, default_value = LINK)]
        link: String,
        /// Only these steps: device, modules, ffi, removed, unplugged, datapath, control, clients, devices, demo,
        /// auto, linux-6.12, lost-host, two-guests, power.
        #[arg(long, value_delimiter = ',', value_name = "STEP")]
        only: Vec<String>,
        /// Also what takes long and finds little: all tests with RDMA in their names, and the power cuts three times.
        #[arg(long)]
        long: bool,
        /// What the guests run: debian (what this system's Debian has) or 6.12. The step linux-6.12 has its own.
        #[arg(long, default_value = Kernel::default().name())]
        kernel: Kernel,
        /// Leave the logs there when all is well, too.
        #[arg(long)]
        keep: bool,
    },
    /// Run a command in a guest; its output and exit status are this program's.
    #[command(
        after_help = "Examples:\n  costandby-vm run ibv_devinfo\n  costandby-vm run --memory 4096 -- target/release/costandby-bench run --quick\n\n\
        The host's files are there, read-only; /tmp is empty, and programs are found where they are on the host. The \
        directory printed with -v is /share in the guest, where it may leave files."
    )]
    Run(RunArgs),
    /// Open a shell in a guest. Without a terminal, run what stands on standard input.
    Shell {
        /// MiB of memory.
        #[arg(long, default_value_t = 2048, value_name = "MIB")]
        memory: u64,
        /// What it runs: debian (what this system's Debian has) or 6.12.
        #[arg(long, default_value = Kernel::default().name())]
        kernel: Kernel,
    },
    /// Inside a guest: outlive the other one. Used by `test`.
    #[command(hide = true)]
    Survivor {
        /// What must carry the copies.
        #[arg(long)]
        link: String,
        /// The daemon's admin socket.
        admin: PathBuf,
        /// Its socket for NBD clients.
        nbd: PathBuf,
    },
    /// Inside a guest: say how the daemon sees the volume, and do as ordered. Used by `test`.
    #[command(hide = true)]
    Agent {
        /// The node.
        node: String,
        /// The daemon's admin socket.
        admin: PathBuf,
        /// The file with orders.
        orders: PathBuf,
    },
    /// Inside a guest: say how the volume's connection changes. Used by `test`.
    #[command(hide = true)]
    Watch {
        /// The daemon's admin socket.
        admin: PathBuf,
    },
    /// Inside a guest without an RDMA device: a pair with `link = "auto"` gets one. Used by `test`.
    #[command(hide = true)]
    Auto {
        /// The interface that the device is to be on.
        netdev: String,
    },
    /// Inside a guest: measure how soon the RDMA link is there. Used by `test`.
    #[command(hide = true)]
    FirstLink,
}

/// Times that all power cuts are run in the long run, each time with another seed.
const LONG_ROUNDS: u64 = 3;

/// Steps with guests of their own.
const WITH_OWN: [&str; 4] = [NEWER, "lost-host", "two-guests", "power"];

/// The one with a newer kernel.
const NEWER: &str = "linux-6.12";

#[derive(Args)]
struct RunArgs {
    /// MiB of memory.
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    memory: u64,
    /// Virtual processors.
    #[arg(long, default_value_t = 2, value_name = "N")]
    cpus: u32,
    /// What it runs: debian (what this system's Debian has) or 6.12.
    #[arg(long, default_value = Kernel::default().name())]
    kernel: Kernel,
    /// Bytes of the largest packet on the device's network.
    #[arg(long, default_value_t = 9000, value_name = "BYTES")]
    mtu: u32,
    /// Seconds, boot included, after which the guest is ended.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    limit: u64,
    /// Say where the guest's files are, and leave them there.
    #[arg(short, long)]
    verbose: bool,
    /// A shell command, or a program and its arguments.
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Task::Test { link, only, long, kernel, keep } => test(&link, &only, long, kernel, keep),
        Task::Run(args) => run(&args),
        Task::Shell { memory, kernel } => shell(memory, kernel),
        Task::Survivor { link, admin, nbd } => {
            survivor::run(&admin, &nbd, &link).map(|()| 0).map_err(VmError::Failed)
        }
        Task::Agent { node, admin, orders } => {
            agent::run(&node, &admin, &orders).map(|()| 0).map_err(VmError::Failed)
        }
        Task::Watch { admin } => survivor::watch(&admin).map(|()| 0).map_err(VmError::Failed),
        Task::Auto { netdev } => {
            auto::run(&netdev);
            Ok(0)
        }
        Task::FirstLink => {
            first_link::inside();
            Ok(0)
        }
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("costandby-vm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn test(link: &str, only: &[String], long: bool, kernel: Kernel, keep: bool) -> Result<u8, VmError> {
    let rig = Rig::prepare(kernel)?;
    let one = fast::steps(&rig, link);
    let known: Vec<_> = one.iter().map(|step| step.id).chain(WITH_OWN).collect();
    if let Some(unknown) = only.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(VmError::Failed(format!("there is no step {unknown:?}; there are {}", known.join(", "))));
    }
    let wanted = |id: &str| only.is_empty() || only.iter().any(|name| name == id);
    let directory = rig.run_directory("test")?;
    let mut steps = Steps::default();
    let built = steps.run("building programs and tests", || rig.build())?;
    let mut outcomes = Vec::new();
    let wanted_step = |step: &fast::Step| wanted(step.id) && (long || !step.long || !only.is_empty());
    if one.iter().any(wanted_step) {
        outcomes.push(fast::run(&rig, &built, &directory, link, long, wanted_step, &mut steps));
    }
    // Copies by RDMA are what it is about.
    if wanted(NEWER) && (link == LINK || only.iter().any(|name| name == NEWER)) {
        outcomes.push(newer_kernel(&rig, &directory, &mut steps));
    }
    if wanted("lost-host") {
        outcomes.push(lost_host::run(&rig, &built, &directory, &mut steps));
    }
    if wanted("two-guests") {
        outcomes.push(failover::run(&rig, &directory, link, &mut steps));
    }
    if wanted("power") {
        let seed = costandby_tests::seed();
        for seed in seed..seed + if long { LONG_ROUNDS } else { 1 } {
            outcomes.push(power::run(&rig, &directory, link, seed, &mut steps));
        }
    }
    let broken = outcomes.into_iter().filter_map(Result::err).collect::<Vec<_>>();
    for error in &broken {
        println!("{error}");
    }
    let seconds = steps.seconds();
    if steps.failures().is_empty() && broken.is_empty() {
        println!("{seconds:7.1} s  in all, copies by {link}");
        if keep {
            println!("logs: {}", directory.display());
        } else {
            let _ = std::fs::remove_dir_all(&directory);
        }
        return Ok(0);
    }
    println!("{seconds:7.1} s  in all, copies by {link}; FAILED: {}", steps.failures().join("; "));
    println!("logs: {}", directory.display());
    Ok(1)
}

fn newer_kernel(rig: &Rig, directory: &Path, steps: &mut Steps) -> Result<(), VmError> {
    let newer = steps.run("Linux 6.12 for a guest", || rig.with(Kernel::Linux6_12))?;
    first_link::run(&newer, directory, steps)
}

fn run(args: &RunArgs) -> Result<u8, VmError> {
    // One word is a shell command; more are a program with arguments that no shell shall take apart.
    let command = match args.command.as_slice() {
        [command] => command.clone(),
        words => words.iter().map(|word| format!("'{}' ", word.replace('\'', r"'\''"))).collect(),
    };
    let rig = Rig::prepare(args.kernel)?;
    let directory = rig.run_directory("run")?;
    let mut settings = Settings::new("guest", &command);
    settings.memory_mib = args.memory;
    settings.cpus = args.cpus;
    settings.mtu = args.mtu;
    let mut guest = Guest::boot(&rig, &directory, &settings)?;
    if args.verbose {
        println!("/share is {}", guest.share().display());
    }
    let mut stdout = std::io::stdout();
    let over = guest.follow(Limits::silent(Duration::from_secs(args.limit)), None, |line| {
        // A reader that has gone away ends this program by its own means.
        writeln!(stdout, "{line}").is_err()
    })?;
    if over.is_some() {
        return Err(guest.error(format!("was not done after {} s (--limit)", args.limit)));
    }
    let status = guest.status()?;
    if status == 0 && !args.verbose {
        let _ = std::fs::remove_dir_all(&directory);
    } else {
        eprintln!("status {status}; the guest's files are in {}", directory.display());
    }
    Ok(u8::try_from(status).unwrap_or(1))
}

fn shell(memory: u64, kernel: Kernel) -> Result<u8, VmError> {
    let mut stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let mut script = String::new();
        stdin.read_to_string(&mut script).map_err(|source| VmError::Io {
            doing: "reading the commands on standard input".to_owned(),
            source,
        })?;
        if script.trim().is_empty() {
            println!("no terminal and no commands on standard input: nothing to do in a guest");
            return Ok(0);
        }
        let (cpus, mtu, limit, command) = (2, 9000, 3600, vec![script]);
        return run(&RunArgs { memory, cpus, kernel, mtu, limit, verbose: false, command });
    }
    let rig = Rig::prepare(kernel)?;
    let directory = rig.run_directory("shell")?;
    println!("booting a guest with the device rxe0 on 10.9.0.1; `exit` or Ctrl-D ends it");
    println!("/share there is {} here", directory.join("guest/share").display());
    let mut settings = Settings::new("guest", "");
    settings.command = None;
    settings.memory_mib = memory;
    let mut guest = Guest::boot(&rig, &directory, &settings)?;
    let over = guest.follow(SHELL_LIMITS, None, |line| {
        print!("{line}\r\n");
        false
    })?;
    if over.is_some() {
        return Err(guest.error("was left alone for a day".to_owned()));
    }
    Ok(u8::try_from(guest.status()?).unwrap_or(1))
}
