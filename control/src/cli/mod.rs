//! The command line: `costandby [--config FILE] [--node NAME] SUBCOMMAND`.
//!
//! Parses, loads the configuration where the subcommand needs one, and hands over to one file a subcommand. Others
//! script against this: names of subcommands and flags, `--json` shapes and exit statuses are fixed.
//!
//! Invariants: exit status 0 is done, 1 is failed with exactly one line on stderr that begins with `costandby: `, 2 is
//! wrong usage. Colours and progress bars appear on terminals only, colours never with `NO_COLOR`. A pipe whose reader is gone
//! (`costandby status | head -1`) is no failure and changes no exit status; output that a full device refuses is one.

use crate::admin::Command as AdminCommand;
use crate::admin_client::{AdminClient, ClientError};
use crate::config::quantity::parse_duration;
use crate::config::{Config, ConfigError, Name, Node, NodeName};
use crate::logging;
use crate::node::NodeError;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

pub mod create;
pub mod demo;
pub mod doctor;
pub mod dump_metadata;
pub mod keygen;
pub mod roles;
pub mod soft_roce;
pub mod status;
#[cfg(test)]
mod tests;
pub mod verify;
mod version;
pub mod wait_sync;

/// Where the configuration is where nothing says otherwise.
pub const CONFIG_DEFAULT: &str = "/etc/costandby.toml";

/// Keeps a second server's disk identical to the first server's, write by write.
#[derive(Parser, Debug)]
#[command(
    name = "costandby",
    version = version::short(),
    long_version = version::long(),
    arg_required_else_help = true,
    after_help = "\
Examples:
  costandby doctor                         what this machine can do, and what to change
  costandby keygen /etc/costandby/pair.key make the key that the two nodes prove to each other
  costandby --node alpha create            make the disks of node alpha
  costandby --node alpha up                run its daemon in the foreground
  costandby --node alpha status            what its volumes are doing
  costandby --node beta promote db         let beta serve volume db
  costandby demo                           watch a takeover on this machine, nothing to set up

Exit status: 0 done, 1 failed (one line on stderr says what and why), 2 wrong usage."
)]
pub struct Cli {
    /// Configuration file, the same on both nodes.
    #[arg(long, short = 'c', global = true, env = "COSTANDBY_CONFIG", value_name = "FILE", default_value = CONFIG_DEFAULT)]
    pub config: PathBuf,

    /// Node of the configuration that this machine is [default: the host name].
    #[arg(long, short = 'n', global = true, env = "COSTANDBY_NODE", value_name = "NAME")]
    pub node: Option<String>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make this node's disks and their metadata.
    #[command(after_help = create::EXAMPLES)]
    Create(CreateArgs),
    /// Make the key that the two nodes prove to each other, or replace it.
    #[command(after_help = keygen::EXAMPLES)]
    Keygen(KeygenArgs),
    /// Run this node's daemon in the foreground.
    #[command(after_help = "\
Examples:
  costandby --node alpha up
  COSTANDBY_LOG=debug costandby --config ./demo.toml --node beta up

Logs to stderr. COSTANDBY_LOG sets how much: error, warn, info (default), debug, trace, or for one module
costandby_datapath=debug; several with commas. COSTANDBY_LOG_FORMAT sets what lines look like: text (default), or json.
A log that cannot be written disturbs nothing: `status --json` counts what was dropped in log_lines_dropped.

SIGTERM and SIGINT end it cleanly. SIGHUP is noted in the log, no more: the configuration is read at the start.")]
    Up,
    /// Show what this node's volumes are doing.
    #[command(after_help = "\
Examples:
  costandby --node alpha status
  costandby --node alpha status --json | jq '.volumes[] | {name, role, disk_state}'")]
    Status {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Make this node the primary of a volume.
    #[command(after_help = "\
Examples:
  costandby --node beta promote db
  costandby --node beta promote db --force     the disk may lack acknowledged writes; only when the other is lost for good

Refused while the connected peer is primary (demote it there first) and when this node's disk is not UpToDate.")]
    Promote {
        /// Which volume.
        volume: Name,
        /// Even where this node's disk may lack acknowledged writes. Logged; starts a new generation.
        #[arg(long)]
        force: bool,
    },
    /// Make this node the standby of a volume, once everything acknowledged is on both disks.
    #[command(after_help = "\
Example, a planned handover of db from alpha to beta:
  costandby --node alpha demote db
  costandby --node beta promote db")]
    Demote {
        /// Which volume.
        volume: Name,
    },
    /// Look for a volume's peer again, after `disconnect` or a refused handshake.
    #[command(after_help = "\
Examples:
  costandby --node alpha connect db
  costandby --node beta connect db --discard-my-data     after a split brain, on the node whose data is not wanted")]
    Connect {
        /// Which volume.
        volume: Name,
        /// Give up this node's data: its disk becomes a copy of the peer's. Refused while this node serves.
        #[arg(long)]
        discard_my_data: bool,
    },
    /// Leave a volume's peer and stay apart until `connect`.
    #[command(after_help = "Example:\n  costandby --node alpha disconnect db")]
    Disconnect {
        /// Which volume.
        volume: Name,
    },
    /// Give up this node's copy of a volume and have the connected peer copy all of it anew.
    #[command(after_help = "\
Example, on the standby whose disk is doubted:
  costandby --node beta invalidate db && costandby --node beta wait-sync db

Refused on the node that serves, and while no connected peer holds the whole data.")]
    Invalidate {
        /// Which volume.
        volume: Name,
    },
    /// Compare the standby's disk with this node's, byte by byte, while the volume is in use.
    #[command(after_help = verify::EXAMPLES)]
    Verify(VerifyArgs),
    /// Wait until a volume is connected and both disks are UpToDate.
    #[command(after_help = "\
Examples:
  costandby --node alpha wait-sync db
  costandby --node alpha wait-sync db --timeout 30s && echo in sync

Exit status 1 when the time is over; the line on stderr says where it stood.")]
    WaitSync {
        /// Which volume.
        volume: Name,
        /// Give up after this long, such as 500ms, 30s or 5m [default: never].
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        timeout: Option<Duration>,
    },
    /// Print what this node's disks say about themselves.
    #[command(after_help = dump_metadata::EXAMPLES)]
    DumpMetadata {
        /// Which volume [default: all that have a disk on this node].
        volume: Option<Name>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Say what this machine can do, and what to change.
    #[command(after_help = "\
Examples:
  costandby doctor
  costandby --config ./demo.toml --node alpha doctor

Exit status 1 when a line says fail.")]
    Doctor,
    /// Make, or remove, an RDMA device in software on a network interface.
    #[command(after_help = soft_roce::EXAMPLES)]
    SoftRoce(SoftRoceArgs),
    /// Show a takeover on this machine: two daemons, a kill in mid-write, nothing lost.
    #[command(after_help = "\
Examples:
  costandby demo
  costandby demo --seconds 20 --json

Exit status 1 when anything was lost, torn or different.")]
    Demo(DemoArgs),
    /// Print a completion script for a shell.
    #[command(after_help = "\
Example:
  costandby completions bash > /etc/bash_completion.d/costandby")]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// Flags of `create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Volumes to make [default: all that have a disk on this node].
    #[arg(value_name = "VOLUME")]
    pub volumes: Vec<Name>,
    /// Reserve no space: writes fail when the file system is full.
    #[arg(long)]
    pub sparse: bool,
    /// Take over a disk that is there: its content stays, but counts as a new disk's, which the peer's overwrites.
    #[arg(long)]
    pub force: bool,
    /// Fill the volume with zeros, so that it is known to be empty: two such disks are in sync without a copy.
    #[arg(long)]
    pub zero: bool,
}

/// Flags of `keygen`.
#[derive(Args, Debug)]
pub struct KeygenArgs {
    /// Where the key is kept [default: the configuration's `key`].
    pub file: Option<PathBuf>,
    /// Replace a key that is there, at once.
    #[arg(long, conflicts_with = "rotate")]
    pub force: bool,
    /// Replace a key that is there without a gap: one step of three, each followed by a copy to the other node.
    #[arg(long, value_enum, value_name = "STEP")]
    pub rotate: Option<RotateArg>,
}

/// `keygen --rotate`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum RotateArg {
    /// Accept a new key besides the one in use.
    Add,
    /// Dial with the new one, accept both.
    Use,
    /// Forget the old one.
    End,
}

/// Flags of `verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Which volume.
    pub volume: Name,
    /// Copy what differs from this node to the standby at once.
    #[arg(long)]
    pub repair: bool,
    /// End the verification under way.
    #[arg(long, conflicts_with = "repair")]
    pub stop: bool,
    /// Print one JSON object at the end.
    #[arg(long)]
    pub json: bool,
}

/// `soft-roce`'s.
#[derive(Args, Debug)]
pub struct SoftRoceArgs {
    /// Make or remove.
    #[command(subcommand)]
    pub action: SoftRoceAction,
}

/// What `soft-roce` does.
#[derive(Subcommand, Debug)]
pub enum SoftRoceAction {
    /// Make the device; done where there is one already.
    Up {
        /// Network interface, as `ip link` calls it.
        netdev: String,
    },
    /// Remove it; done where there is none.
    Down {
        /// Network interface, as `ip link` calls it.
        netdev: String,
    },
}

/// Flags of `demo`.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// How long the writer writes before the kill, in seconds.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// What carries the copies.
    #[arg(long, value_enum, default_value_t = LinkArg::Auto)]
    pub link: LinkArg,
    /// Print one JSON object at the end.
    #[arg(long)]
    pub json: bool,
}

/// `--link`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkArg {
    /// TCP.
    Tcp,
    /// RDMA or nothing.
    Rdma,
    /// RDMA where it is there, TCP otherwise.
    Auto,
}

/// Why a subcommand failed: its display is the line on stderr.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No node given and the host name is none.
    #[error(
        "this machine's host name {host:?} is no node of {file}: choose with --node NAME; there are {nodes}"
    )]
    WhichNode {
        /// The host name.
        host: String,
        /// The configuration.
        file: PathBuf,
        /// Its nodes.
        nodes: String,
    },
    /// The daemon, asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The daemon, run.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// Making a disk.
    #[error(transparent)]
    Create(#[from] create::CreateError),
    /// Making a key.
    #[error(transparent)]
    Keygen(#[from] keygen::KeygenError),
    /// Making or removing a device.
    #[error(transparent)]
    SoftRoce(#[from] soft_roce::SoftRoceError),
    /// Waiting.
    #[error(transparent)]
    WaitSync(#[from] wait_sync::WaitError),
    /// Comparing.
    #[error(transparent)]
    Verify(#[from] verify::VerifyError),
    /// Metadata that no daemon would take.
    #[error("volume {volume}: {text}")]
    Metadata {
        /// Which volume.
        volume: Name,
        /// Why.
        text: String,
    },
    /// A doctor with bad news.
    #[error("{count} of {total} checks failed; the lines marked fail say what to change")]
    Doctor {
        /// Failed ones.
        count: usize,
        /// All.
        total: usize,
    },
    /// A demonstration that went wrong, in a sentence.
    #[error("demo: {0}")]
    Demo(String),
    /// A variable of the environment that cannot be followed: wrong usage.
    #[error(transparent)]
    Environment(#[from] logging::SettingsError),
    /// What was asked for is done, and could not be said.
    #[error("writing to stdout: {source}; {done}")]
    Untold {
        /// What was done.
        done: &'static str,
        /// The operating system's words.
        source: io::Error,
    },
    /// Output, or the runtime, failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The operating system's words.
        source: io::Error,
    },
}

/// How long a daemon that cannot start, or failed, may take to say so: its stderr may be a pipe that nobody reads.
const LAST_LINE_MAX: Duration = Duration::from_secs(1);

/// Parses `args`, does what they say and returns the exit status. Reports failures on stderr.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        // Nothing is left to be done where wrong usage cannot be told.
        Err(error) if error.use_stderr() => {
            let error = without_opposite(error);
            let _ = error.print();
            return ExitCode::from(2);
        }
        Err(help) => {
            let printed = help.print().and_then(|()| io::stdout().flush());
            return match told(printed) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(&error, false),
            };
        }
    };
    let daemon = matches!(cli.command, Command::Up);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, daemon),
    }
}

/// The line on stderr and the exit status. Whether stderr takes the line changes nothing.
fn failed(error: &CliError, daemon: bool) -> ExitCode {
    let line = format!("costandby: {}\n", one_line(&error.to_string()));
    if daemon {
        logging::say_within(line, LAST_LINE_MAX);
    } else {
        let _ = io::stderr().write_all(line.as_bytes());
    }
    match error {
        CliError::Environment(_) => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}

/// Suggests no subcommand that means the opposite: `invalidate` gives up a disk's data, and is no misspelling of `validate`.
fn without_opposite(mut error: clap::Error) -> clap::Error {
    use clap::error::{ContextKind, ContextValue};
    let asked = match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(asked)) => asked.clone(),
        _ => return error,
    };
    let suggested = match error.get(ContextKind::SuggestedSubcommand) {
        Some(ContextValue::String(word)) => vec![word.clone()],
        Some(ContextValue::Strings(words)) => words.clone(),
        _ => return error,
    };
    if suggested.iter().any(|word| word.ends_with(&asked) || asked.ends_with(word.as_str())) {
        error.remove(ContextKind::SuggestedSubcommand);
    }
    error
}

fn run(cli: Cli) -> Result<(), CliError> {
    let Cli { config, node, command } = cli;
    let place = Place { file: config, node };
    match command {
        Command::Create(args) => {
            let (config, node) = place.load()?;
            create::run(&config, &node, &args)
        }
        Command::Keygen(args) => keygen::run(&place, &args),
        Command::Up => {
            let settings = logging::Settings::from_environment()?;
            let (config, node) = place.load()?;
            config.check_supported(node.as_str())?;
            let _log = logging::start(settings, colours_wanted(logging::is_terminal()))
                .map_err(|source| CliError::Io { doing: "starting the log", source })?;
            Ok(crate::node::run(&config, node.as_str())?)
        }
        Command::Status { json } => status::run(&place.client()?, json),
        Command::Promote { volume, force } => {
            roles::run(&place.client()?, &volume, AdminCommand::Promote { force })
        }
        Command::Demote { volume } => roles::run(&place.client()?, &volume, AdminCommand::Demote),
        Command::Connect { volume, discard_my_data } => {
            roles::run(&place.client()?, &volume, AdminCommand::Connect { discard_my_data })
        }
        Command::Invalidate { volume } => roles::run(&place.client()?, &volume, AdminCommand::Invalidate),
        Command::Disconnect { volume } => roles::run(&place.client()?, &volume, AdminCommand::Disconnect),
        Command::Verify(args) => verify::run(&place.client()?, &args),
        Command::WaitSync { volume, timeout } => wait_sync::run(&place.client()?, &volume, timeout),
        Command::DumpMetadata { volume, json } => {
            let (config, node) = place.load()?;
            dump_metadata::run(&config, &node, volume.as_ref(), json)
        }
        Command::Doctor => doctor::run(&place),
        Command::SoftRoce(args) => soft_roce::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Completions { shell } => completions(shell),
    }
}

/// Which configuration and which node the command line means.
#[derive(Debug)]
pub struct Place {
    file: PathBuf,
    node: Option<String>,
}

impl Place {
    fn load(&self) -> Result<(Config, NodeName), CliError> {
        let config = Config::load(&self.file)?;
        let name = self.node(&config)?.name.clone();
        Ok((config, name))
    }

    /// The node that `--node` names, or else the one called like this host, with or without its domain.
    fn node<'a>(&self, config: &'a Config) -> Result<&'a Node, CliError> {
        // An environment file may well set COSTANDBY_NODE to nothing.
        if let Some(name) = self.node.as_ref().filter(|name| !name.is_empty()) {
            return Ok(config.node(name)?);
        }
        let host = host_name();
        let short = host.split('.').next().unwrap_or_default();
        config.nodes.get(host.as_str()).or_else(|| config.nodes.get(short)).ok_or_else(|| {
            let nodes: Vec<_> = config.nodes.keys().map(Name::as_str).collect();
            CliError::WhichNode { host: host.clone(), file: self.file.clone(), nodes: nodes.join(", ") }
        })
    }

    fn client(&self) -> Result<AdminClient, CliError> {
        let config = Config::load(&self.file)?;
        let node = self.node(&config)?;
        Ok(AdminClient::new(&node.admin, node.name.as_str()))
    }
}

fn host_name() -> String {
    // Where there is no /proc the name is empty, which no node is called, and the error then asks for --node.
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Runs `work` on a runtime of its own, which ends with it.
fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| CliError::Io { doing: "starting the runtime", source })?
        .block_on(work)
}

/// Writes all of `text` to stdout.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    told(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// A reader who has seen enough and closed the pipe is no failure: what else there is to find out decides the exit status.
fn told(printed: io::Result<()>) -> Result<(), CliError> {
    match printed {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::Io { doing: "writing to stdout", source })
        }
        _ => Ok(()),
    }
}

/// As [`print`], of something that is done already: the failure says so.
fn print_done(text: &str, done: &'static str) -> Result<(), CliError> {
    print(text).map_err(|error| match error {
        CliError::Io { source, .. } => CliError::Untold { done, source },
        other => other,
    })
}

fn completions(shell: clap_complete::Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "costandby", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Whether to colour output that goes to a terminal or not; see <https://no-color.org>.
fn colours_wanted(terminal: bool) -> bool {
    terminal
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|value| value != "dumb")
}

/// Messages of other programs' parsers may span lines; ours is one line by contract.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// The few colours of `status` and `doctor`, each with one meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Colour {
    Good,
    Attention,
    Bad,
    Plain,
}

impl Colour {
    /// `text` in this colour, or as it is where `colours` is false.
    fn paint(self, text: &str, colours: bool) -> String {
        let code = match self {
            Self::Good => 32,
            Self::Attention => 33,
            Self::Bad => 31,
            Self::Plain => return text.to_owned(),
        };
        if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
