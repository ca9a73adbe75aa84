//! `costandby-bench`: what a mirrored write costs, next to the floor and to a peer, measured in one run.
//!
//! `run` goes through every case once a round, so that cases which are compared run next to each other, and reports
//! medians over the rounds. Every case checks its result; a run with a wrong byte fails instead of reporting.
//!
//! `inproc` measures mirrored writes in process, `nbd` through NBD; `floor` (bare sockets), `verbs` and `perftest` (bare RDMA)
//! and `qemu` are what they are compared with. `resync` measures a copy, `idle` a node at rest. `plan` lists the cases,
//! `report` prints them.
#![forbid(unsafe_code)]

mod floor;
mod histogram;
mod idle;
mod inproc;
mod nbd;
#[cfg(feature = "rdma")]
mod perftest;
mod plan;
mod process;
mod qemu;
mod relay;
mod report;
mod resync;
#[cfg(feature = "rdma")]
mod verbs;

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use plan::Plan;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Errors go to a person: text will do.
type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser)]
#[command(name = "costandby-bench", version, about = "Measures mirrored writes against the floor and a peer")]
struct Cli {
    #[command(subcommand)]
    command: Option<Task>,
    /// Without a subcommand: run.
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Task {
    /// Measure everything and print a table.
    #[command(
        after_help = "Examples:\n  costandby-bench run\n  costandby-bench run --seconds 10 --json bench.json\n  \
        costandby-bench run --only floor,inproc --rounds 9\n  costandby-bench run --quick"
    )]
    Run(RunArgs),
    /// Measure only what catching up costs: bytes sent, its rate, and what clients feel of it.
    #[command(after_help = "Examples:\n  costandby-bench resync\n  costandby-bench resync --disk-mib 1024")]
    Resync(RunArgs),
    /// Measure the mirror over an RDMA device of this machine, beside bare verbs, perftest and TCP.
    #[cfg(feature = "rdma")]
    #[command(after_help = "Examples:\n  costandby-bench rdma --device rxe0 --address 10.9.0.1\n  \
        costandby-bench rdma --device mlx5_0 --address 192.0.2.7 --seconds 10 --json rdma.json")]
    Rdma(RdmaArgs),
}

/// How to run.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    /// Seconds each case is measured for, all rounds together.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Rounds the cases are gone through; medians are over rounds.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Also write a JSON record here.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Everything tiny: shows that the benchmark works, not how fast anything is.
    #[arg(long)]
    quick: bool,
    /// Size of each disk in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    disk_mib: u64,
    /// Only cases whose id begins with one of these, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "ID")]
    only: Vec<String>,
    /// Directory for disk files, on the file system to be measured.
    #[arg(long, default_value_os_t = std::env::temp_dir(), value_name = "DIR")]
    dir: PathBuf,
}

/// On which device.
#[cfg(feature = "rdma")]
#[derive(Args, Clone, Debug)]
pub(crate) struct RdmaArgs {
    /// The RDMA device, as `rdma link` names it.
    #[arg(long)]
    device: String,
    /// An address of the network interface the device belongs to.
    #[arg(long, value_name = "IP")]
    address: std::net::IpAddr,
    #[command(flatten)]
    run: RunArgs,
}

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|first| first == nbd::DAEMON) {
        return nbd::daemon_main();
    }
    let cli = Cli::parse();
    let outcome = match cli.command {
        None => run(&cli.run, Plan::new(&cli.run)),
        Some(Task::Run(args)) => run(&args, Plan::new(&args)),
        Some(Task::Resync(mut args)) => {
            args.only = vec![resync::ID.to_owned()];
            run(&args, Plan::new(&args))
        }
        #[cfg(feature = "rdma")]
        Some(Task::Rdma(args)) => run(&args.run, Plan::over_rdma(&args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("costandby-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs, plan: Outcome<Plan>) -> Outcome<()> {
    let (seconds, rounds) = if args.quick { (0.05, 1) } else { (args.seconds, args.rounds.max(1)) };
    let time = Duration::try_from_secs_f64(seconds / f64::from(rounds))?;
    let machine = report::Machine::here();
    let mut plan = plan?;
    let steps = u64::from(rounds) * plan.cases.len() as u64;
    // Draws nothing where standard error is no terminal.
    let bar = ProgressBar::new(steps).with_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
    for _ in 0..rounds {
        for case in &mut plan.cases {
            bar.set_message(case.row.title);
            let summary = (case.run)(time).map_err(|error| format!("{}: {error}", case.row.title))?;
            case.row.rounds.push(summary);
            bar.inc(1);
        }
    }
    bar.set_message("checking the disks");
    let report = plan.finish(machine)?;
    bar.finish_and_clear();
    print!("{}", report.table());
    if let Some(path) = &args.json {
        report.write_json(path)?;
    }
    Ok(())
}
