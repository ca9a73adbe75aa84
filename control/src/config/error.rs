//! What can be wrong with a configuration: always the file, mostly the line, what it is, and what to do about it.

use super::quantity::QuantityError;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// A configuration that cannot be used. One line when printed.
#[derive(Debug)]
pub struct ConfigError {
    /// The file as it was named.
    pub file: PathBuf,
    /// Line in it, counted from 1, where the problem has one.
    pub line: Option<usize>,
    /// The problem.
    pub problem: Box<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.problem {
            Problem::Read { source } => Some(source),
            _ => None,
        }
    }
}

/// How the table of the keys before the first `[…]` is called.
pub(super) const TOP: &str = "the top of the file";

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file cannot be read.
    #[error("cannot be read: {source}; name the configuration with --config FILE or COSTANDBY_CONFIG")]
    Read {
        /// The operating system's words.
        source: io::Error,
    },
    /// Larger than any configuration.
    #[error("is {len} bytes long, a configuration has at most {max}: is this the right file?")]
    TooLong {
        /// Bytes of the file.
        len: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// Not TOML.
    #[error("not valid TOML: {message}")]
    Toml {
        /// The parser's words, on one line.
        message: String,
    },
    /// A key nobody knows.
    #[error("unknown key {key:?} in {table}: {hint}")]
    UnknownKey {
        /// As written.
        key: String,
        /// Where.
        table: String,
        /// The nearest known key, or all of them.
        hint: String,
    },
    /// A name with dots that is not in quotes.
    #[error(
        "{written}: in TOML a dot begins an inner table: put a name that has dots in quotes, as in {meant}"
    )]
    Dotted {
        /// As TOML has read it.
        written: String,
        /// As it should be written.
        meant: String,
    },
    /// A key that must be there.
    #[error("{table} has no {key}: add {example}")]
    Missing {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// A line to add.
        example: String,
    },
    /// A string where a number belongs, and the like.
    #[error("{} is {found}, {expected} belongs there", of(key, table))]
    Type {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// What is there.
        found: &'static str,
        /// What should be, with an example.
        expected: &'static str,
    },
    /// One of a few words was expected.
    #[error("{} is {found:?}: {hint}", of(key, table))]
    Choice {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// As written.
        found: String,
        /// The words there are, the nearest first where one is near.
        hint: String,
    },
    /// A size or duration.
    #[error("{}: {source}", of(key, table))]
    Quantity {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// What is wrong with it.
        source: QuantityError,
    },
    /// A number outside its bounds.
    #[error("{} is {found}: it must be {bounds}", of(key, table))]
    Bounds {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// As written.
        found: String,
        /// What is allowed.
        bounds: String,
    },
    /// A name of a node or volume that would not work as a file name, a host name or an NBD export.
    #[error("{name:?} is no name for a {what}: {reason}")]
    Name {
        /// As written.
        name: String,
        /// `"node"` or `"volume"`.
        what: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// An address, endpoint or path that cannot be used.
    #[error("{} is {found:?}: {reason}", of(key, table))]
    Place {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// As written.
        found: String,
        /// Why not, and what to write.
        reason: &'static str,
    },
    /// A node that has no table.
    #[error("{key} of {table} names node {found:?}: {hint}")]
    UnknownNode {
        /// Where.
        table: String,
        /// Which key.
        key: String,
        /// As written.
        found: String,
        /// The nodes there are.
        hint: String,
    },
    /// Not two disks.
    #[error(
        "{table} has {found} disks: give exactly two, as in disk.alpha = \"/srv/db.img\" and disk.beta = \"/srv/db.img\""
    )]
    DiskCount {
        /// Where.
        table: String,
        /// How many.
        found: usize,
    },
    /// Nothing would be left of the volume.
    #[error(
        "both disks of {table} are in memory, so all of it is lost once both daemons have ended, at a loss of power as well: \
         give at least one node a file or a block device"
    )]
    AllMemory {
        /// Where.
        table: String,
    },
    /// The primary has no disk of the volume.
    #[error("primary of {table} is {primary:?}, which has no disk there: its disks are on {nodes}")]
    PrimaryWithoutDisk {
        /// Where.
        table: String,
        /// As written.
        primary: String,
        /// The nodes with a disk.
        nodes: String,
    },
    /// Two users of one thing.
    #[error("{what} {found} is used by {first} and by {second}: give each its own")]
    Shared {
        /// What kind of thing.
        what: &'static str,
        /// Which.
        found: String,
        /// One user.
        first: String,
        /// The other.
        second: String,
    },
    /// Reachable from other machines without being asked to.
    #[error(
        "{key} of {table} is {found}, which other machines can reach, and there is no key that peers would have to prove: make one with `costandby keygen /etc/costandby/pair.key` and set `key = \"/etc/costandby/pair.key\"` at the top of the file, use 127.0.0.1, or set `insecure = true` if the network is yours alone"
    )]
    Insecure {
        /// Where.
        table: String,
        /// Which.
        key: String,
        /// As written.
        found: String,
    },
    /// Nothing that peers would have to prove.
    #[error(
        "there is no key, so anybody who can reach a node could overwrite its volumes as a peer: make one with `costandby \
         keygen /etc/costandby/pair.key`, copy it to the other node and set `key = \"/etc/costandby/pair.key\"` at the top of \
         the file; or set `insecure = true` there to run without"
    )]
    NoKey,
    /// Asked for a node that the file does not have.
    #[error("has no node {name:?}: {hint}; choose with --node NAME or COSTANDBY_NODE")]
    NoSuchNode {
        /// As asked.
        name: String,
        /// The nodes there are.
        hint: String,
    },
    /// Asked for a volume that the file does not have.
    #[error("has no volume {name:?}: {hint}")]
    NoSuchVolume {
        /// As asked.
        name: String,
        /// The volumes there are.
        hint: String,
    },
    /// RDMA in a build without it.
    #[error(
        "volume {volume} has link = \"rdma\", and this program was built without the feature `rdma`: build it with, or use \"auto\""
    )]
    RdmaNotBuiltIn {
        /// Which volume.
        volume: String,
    },
}

/// How the value of `key` in `table` is called.
fn of(key: &str, table: &str) -> String {
    if table == TOP { format!("{key} at {TOP}") } else { format!("{key} of {table}") }
}
