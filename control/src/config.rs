//! The configuration: one TOML file, the same on both nodes.
//!
//! Read once at start by every subcommand; nothing below `control` sees it, the datapath is handed plain values.
//!
//! Invariants of a [`Config`] that exists: every volume has disks on exactly two known nodes and its primary is one of
//! them; at least one of those disks outlives its daemon; names are safe as file names, host names, URLs and NBD export names; no two users share a disk, a socket or an
//! address; nothing is reachable from other machines without a `key`, unless `insecure = true` says so.
//!
//! Survives any text: each problem is one [`ConfigError`] with file, line and what to do, never a panic.

use costandby_datapath::limits;
use costandby_datapath::units::{AckLevel, OnPeerLoss, PollMode};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod check;
mod error;
pub mod quantity;
mod reader;
#[cfg(test)]
mod tests;

pub use error::{ConfigError, Problem};
use reader::{Source, Table, nearest};

/// Bytes of a configuration file: a thousand volumes take about 300 KiB, and reading a disk image by mistake must not
/// fill the memory.
pub const CONFIG_LEN_MAX: u64 = 4 << 20;

/// Bytes of a node's or volume's name: Linux host names have at most 64, and two of them with a suffix still make a
/// file name.
pub const NAME_LEN_MAX: usize = 64;

/// Bytes of a unix socket's path, which the kernel keeps in 108 bytes with a zero at the end.
pub const SOCKET_PATH_LEN_MAX: usize = 107;

/// Volumes are whole sectors: kernel block devices and most NBD clients can address nothing smaller.
pub const VOLUME_GRAIN_LEN: u64 = 512;

/// Silence after which the peer counts as gone, where the file does not say.
pub const PEER_TIMEOUT_DEFAULT: Duration = Duration::from_millis(500);

/// Shortest `peer_timeout`: below it one late wake-up of a busy virtual machine ends the session.
pub const PEER_TIMEOUT_MIN: Duration = Duration::from_millis(50);

/// Longest `peer_timeout`: with `ack = "memory"` a write hangs as long as this when the peer dies.
pub const PEER_TIMEOUT_MAX: Duration = Duration::from_secs(300);

/// Least `rdma_memory` other than none: one section of the smallest kind; less could register nothing.
pub const RDMA_MEMORY_MIN: u64 = limits::RDMA_SECTION_LEN_MIN as u64;

/// Most `rdma_memory`: more memory than a machine has, so that a slip of the unit is noticed.
pub const RDMA_MEMORY_MAX: u64 = 64 << 40;

/// A node's or volume's name: ASCII letters, digits, `.`, `_`, `-`, beginning with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Name(String);

impl Name {
    /// Checks `text`.
    ///
    /// # Errors
    /// The reason, ready to follow "… is no name: ".
    pub fn new(text: &str) -> Result<Self, &'static str> {
        let good = |letter: char| letter.is_ascii_alphanumeric() || ".-_".contains(letter);
        if text.is_empty() {
            Err("it is empty")
        } else if text.len() > NAME_LEN_MAX {
            Err("it is longer than 64 bytes")
        } else if !text.chars().all(good) {
            Err("use only letters a-z and A-Z, digits, '.', '_' and '-'")
        } else if !text.starts_with(|letter: char| letter.is_ascii_alphanumeric()) {
            Err("it must begin with a letter or a digit")
        } else {
            Ok(Self(text.to_owned()))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// A node's name.
pub type NodeName = Name;

/// A volume's name, which is its NBD export's name too.
pub type VolumeName = Name;

/// Where NBD clients connect.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Endpoint {
    /// `unix:/path`.
    Unix(PathBuf),
    /// `tcp:address:port`.
    Tcp(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// What carries the copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkKind {
    /// RDMA or nothing.
    Rdma,
    /// TCP.
    Tcp,
    /// RDMA where both ends have it, TCP otherwise.
    #[default]
    Auto,
}

impl LinkKind {
    /// As the configuration writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
            Self::Auto => "auto",
        }
    }
}

/// Where one node keeps a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Disk {
    /// A file or a block device.
    Path(PathBuf),
    /// `memory:`, anonymous memory: the content is lost when the daemon ends, so the node then resyncs from its peer.
    Memory,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Memory => f.write_str("memory:"),
        }
    }
}

/// One `[nodes.NAME]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// Where peers connect.
    pub listen: SocketAddr,
    /// Unix socket of the admin API.
    pub admin: PathBuf,
    /// Where NBD clients connect.
    pub nbd: Vec<Endpoint>,
    /// Where Prometheus scrapes.
    pub metrics: Option<SocketAddr>,
    /// How the reactor waits.
    pub poll: PollMode,
    /// Bytes of its disks that may be registered with RDMA devices at a time, all volumes together. Left out: what
    /// `datapath` finds the machine can spare.
    pub rdma_memory: Option<u64>,
}

/// One `[volumes.NAME]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// Bytes.
    pub size: u64,
    /// The node it starts on.
    pub primary: NodeName,
    /// What carries the copies.
    pub link: LinkKind,
    /// What an acknowledged write promises.
    pub ack: AckLevel,
    /// What the primary does without its standby.
    pub on_peer_loss: OnPeerLoss,
    /// A copy to the standby compares first and sends only what differs.
    pub checksum_first: bool,
    /// The disk of each of its two nodes.
    pub disks: BTreeMap<NodeName, Disk>,
}

impl Volume {
    /// The other node of the volume, or `None` where `node` has no disk of it.
    #[must_use]
    pub fn peer_of(&self, node: &str) -> Option<&NodeName> {
        self.disks.contains_key(node).then(|| self.disks.keys().find(|name| name.as_str() != node))?
    }

    /// What an acknowledged write promises, as the configuration writes it.
    #[must_use]
    pub fn ack_str(&self) -> &'static str {
        match self.ack {
            AckLevel::Async => "async",
            AckLevel::Memory => "memory",
            AckLevel::Durable => "durable",
        }
    }
}

/// A whole configuration, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The file it was read from.
    pub file: PathBuf,
    /// The file with the key that the nodes prove to each other.
    pub key: Option<PathBuf>,
    /// Running without a key, beyond loopback as well, is wanted.
    pub insecure: bool,
    /// Silence after which the peer counts as gone.
    pub peer_timeout: Duration,
    /// All nodes by name.
    pub nodes: BTreeMap<NodeName, Node>,
    /// All volumes by name.
    pub volumes: BTreeMap<VolumeName, Volume>,
}

impl Config {
    /// Reads and checks a file. Blocks.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let error = |problem| ConfigError { file: file.to_owned(), line: None, problem: Box::new(problem) };
        let read = |source| error(Problem::Read { source });
        let len = std::fs::metadata(file).map_err(read)?.len();
        if len > CONFIG_LEN_MAX {
            return Err(error(Problem::TooLong { len, max: CONFIG_LEN_MAX }));
        }
        Self::parse(&std::fs::read_to_string(file).map_err(read)?, file)
    }

    /// Checks a text; `file` only names it in messages.
    ///
    /// # Errors
    /// [`ConfigError`]: the first problem that is found.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let source = Source { file, text };
        let document = toml::de::DeTable::parse(text).map_err(|error| {
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            source.error(error.span().map(|span| span.start), Problem::Toml { message })
        })?;
        let top = Table::new(source, error::TOP, 0, document.get_ref());
        top.only(&["key", "insecure", "peer_timeout", "nodes", "volumes"])?;
        let insecure = top.boolean("insecure")?.unwrap_or(false);
        let mut checker = check::Checker::new(source, insecure);
        let key = match top.string("key", "a path such as \"/etc/costandby/pair.key\"")? {
            Some((text, at)) => Some(checker.key(&top, text, at)?),
            None => None,
        };
        let peer_timeout = peer_timeout(&top)?;

        let mut nodes = BTreeMap::new();
        let expected = "a table for each node, as in [nodes.alpha],";
        let Some(node_tables) = top.table("nodes", "nodes".to_owned(), expected)? else {
            return Err(top.missing("nodes", "a table for each, as in [nodes.alpha]"));
        };
        for (key, table) in node_tables.tables(expected)? {
            let node = node(&mut checker, key, &table)?;
            nodes.insert(node.name.clone(), node);
        }
        let mut volumes = BTreeMap::new();
        let expected = "a table for each volume, as in [volumes.db],";
        if let Some(volume_tables) = top.table("volumes", "volumes".to_owned(), expected)? {
            for (key, table) in volume_tables.tables(expected)? {
                let volume = volume(&mut checker, key, &table, &nodes)?;
                volumes.insert(volume.name.clone(), volume);
            }
        }
        Ok(Self { file: file.to_owned(), key, insecure, peer_timeout, nodes, volumes })
    }

    fn error(&self, problem: Problem) -> ConfigError {
        ConfigError { file: self.file.clone(), line: None, problem: Box::new(problem) }
    }

    /// The node called `name`.
    ///
    /// # Errors
    /// [`Problem::NoSuchNode`], which names the nodes there are.
    pub fn node(&self, name: &str) -> Result<&Node, ConfigError> {
        self.nodes.get(name).ok_or_else(|| {
            let known = self.nodes.keys().map(Name::as_str);
            self.error(Problem::NoSuchNode { name: name.to_owned(), hint: nearest(name, known) })
        })
    }

    /// The volume called `name`.
    ///
    /// # Errors
    /// [`Problem::NoSuchVolume`], which names the volumes there are.
    pub fn volume(&self, name: &str) -> Result<&Volume, ConfigError> {
        self.volumes.get(name).ok_or_else(|| {
            let known = self.volumes.keys().map(Name::as_str);
            self.error(Problem::NoSuchVolume { name: name.to_owned(), hint: nearest(name, known) })
        })
    }

    /// The volumes that have a disk on `node`, by name, each with that disk.
    pub fn volumes_of<'a>(&'a self, node: &'a str) -> impl Iterator<Item = (&'a Volume, &'a Disk)> {
        self.volumes.values().filter_map(move |volume| Some((volume, volume.disks.get(node)?)))
    }

    /// How the command line begins that means this configuration and `node`, to be named in a remedy.
    #[must_use]
    pub fn command_line(&self, node: &str) -> String {
        crate::command_line::begin(&self.file.display().to_string(), node)
    }

    /// Refuses what the file may say but no daemon runs with; for `up`, after [`Config::node`]. A machine without an RDMA
    /// device is no reason: it may get one while the daemon runs.
    ///
    /// # Errors
    /// [`Problem::NoKey`] without a key that `insecure` does not stand in for; [`Problem::RdmaNotBuiltIn`] for a volume of `node` that wants RDMA and nothing else, where this program was built without
    /// it.
    pub fn check_supported(&self, node: &str) -> Result<(), ConfigError> {
        if self.key.is_none() && !self.insecure {
            return Err(self.error(Problem::NoKey));
        }
        match self.volumes_of(node).find(|(volume, _)| volume.link == LinkKind::Rdma) {
            Some((volume, _)) if !cfg!(feature = "rdma") => {
                Err(self.error(Problem::RdmaNotBuiltIn { volume: volume.name.to_string() }))
            }
            _ => Ok(()),
        }
    }
}

fn peer_timeout(top: &Table<'_>) -> Result<Duration, ConfigError> {
    let key = "peer_timeout";
    let Some((text, at)) = top.string(key, "a duration such as \"500ms\"")? else {
        return Ok(PEER_TIMEOUT_DEFAULT);
    };
    let timeout = top.quantity(key, at, quantity::parse_duration(text))?;
    if (PEER_TIMEOUT_MIN..=PEER_TIMEOUT_MAX).contains(&timeout) {
        Ok(timeout)
    } else {
        let bounds = format!("between {PEER_TIMEOUT_MIN:?} and {PEER_TIMEOUT_MAX:?}");
        Err(top.bounds(key, at, text, bounds))
    }
}

fn node(checker: &mut check::Checker<'_>, key: &str, table: &Table<'_>) -> Result<Node, ConfigError> {
    let name = checker.name(key, "node", table.at())?;
    let known = ["listen", "admin", "nbd", "metrics", "poll", "rdma_memory"];
    table.undotted("nodes", key, &known)?;
    table.only(&known)?;
    let address = "an address such as \"10.9.0.1:7790\"";
    let (text, at) = table
        .string("listen", address)?
        .ok_or_else(|| table.missing("listen", "listen = \"10.9.0.1:7790\", where its peers connect"))?;
    let listen = checker.listen(table, text, at)?;
    let (text, at) =
        table.string("admin", "a path such as \"/run/costandby/alpha.sock\"")?.ok_or_else(|| {
            table.missing(
                "admin",
                format!("admin = \"/run/costandby/{name}.sock\", its command line's socket"),
            )
        })?;
    let admin = checker.admin(table, text, at, listen)?;
    let mut nbd = Vec::new();
    for (text, at) in table.strings("nbd", "a list such as [\"unix:/run/costandby/alpha.nbd\"]")? {
        nbd.push(checker.endpoint(table, text, at, listen)?);
    }
    let metrics = match table.string("metrics", address)? {
        Some((text, at)) => Some(checker.metrics(table, text, at)?),
        None => None,
    };
    let words = [
        ("busy", PollMode::Busy, "keeps a core to itself"),
        ("adaptive", PollMode::Adaptive, "spins briefly while work keeps coming"),
        ("event", PollMode::Event, "always sleeps until there is work"),
    ];
    let poll = table.choice("poll", &words, PollMode::default())?;
    let rdma_memory = rdma_memory(table)?;
    Ok(Node { name, listen, admin, nbd, metrics, poll, rdma_memory })
}

fn rdma_memory(table: &Table<'_>) -> Result<Option<u64>, ConfigError> {
    let key = "rdma_memory";
    let expected = "a size such as \"256MiB\" or a number of bytes";
    let Some((text, at)) = table.string_or_integer(key, expected)? else { return Ok(None) };
    let bytes = table.quantity(key, at, quantity::parse_size(&text))?;
    if bytes == 0 || (RDMA_MEMORY_MIN..=RDMA_MEMORY_MAX).contains(&bytes) {
        return Ok(Some(bytes));
    }
    let (min, max) = (quantity::display_size(RDMA_MEMORY_MIN), quantity::display_size(RDMA_MEMORY_MAX));
    let bounds = format!("0, to copy everything that is sent, or between {min} and {max}");
    Err(table.bounds(key, at, &text, bounds))
}

fn volume(
    checker: &mut check::Checker<'_>,
    key: &str,
    table: &Table<'_>,
    nodes: &BTreeMap<NodeName, Node>,
) -> Result<Volume, ConfigError> {
    let name = checker.name(key, "volume", table.at())?;
    let known = ["size", "primary", "link", "ack", "on_peer_loss", "checksum_first", "disk"];
    table.undotted("volumes", key, &known)?;
    table.only(&known)?;
    let (text, at) = table
        .string_or_integer("size", "a size such as \"64GiB\" or a number of bytes")?
        .ok_or_else(|| table.missing("size", "size = \"64GiB\""))?;
    let size = table.quantity("size", at, quantity::parse_size(&text))?;
    if !(limits::VOLUME_LEN_MIN..=limits::VOLUME_LEN_MAX).contains(&size)
        || !size.is_multiple_of(VOLUME_GRAIN_LEN)
    {
        let bounds = format!(
            "a multiple of {VOLUME_GRAIN_LEN} from {} to {} bytes",
            limits::VOLUME_LEN_MIN,
            limits::VOLUME_LEN_MAX
        );
        return Err(table.bounds("size", at, &text, bounds));
    }
    let words = [
        ("rdma", LinkKind::Rdma, "RDMA or no session"),
        ("tcp", LinkKind::Tcp, "TCP"),
        ("auto", LinkKind::Auto, "RDMA where both nodes have it, else TCP"),
    ];
    let link = table.choice("link", &words, LinkKind::default())?;
    let words = [
        (
            "async",
            AckLevel::Async,
            "a write is answered when it is in this node's memory, as with DRBD's protocol A",
        ),
        ("memory", AckLevel::Memory, "when it is in both nodes' memory, as with B"),
        ("durable", AckLevel::Durable, "when it is on stable storage on both nodes, as with C"),
    ];
    let ack = table.choice("ack", &words, AckLevel::default())?;
    let words = [
        ("continue", OnPeerLoss::Continue, "the primary goes on alone, on record"),
        ("freeze", OnPeerLoss::Freeze, "the primary holds writes until its standby is back"),
    ];
    let on_peer_loss = table.choice("on_peer_loss", &words, OnPeerLoss::default())?;
    let disks = checker.disks(table, &name, nodes)?;
    let primary = checker.primary(table, nodes, &disks)?;
    let checksum_first = table.boolean("checksum_first")?.unwrap_or(false);
    Ok(Volume { name, size, primary, link, ack, on_peer_loss, checksum_first, disks })
}
