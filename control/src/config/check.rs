//! The checks that need more than one value: who shares what, who is known, who can be reached from where.
//!
//! One [`Checker`] sees the whole file in order and remembers each disk, socket and address with its user, so that the
//! second user of a thing is told of the first.

use super::error::{ConfigError, Problem};
use super::reader::{At, Source, Table, nearest};
use super::{Disk, Endpoint, Name, Node, NodeName, SOCKET_PATH_LEN_MAX};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Component, Path, PathBuf};

/// A machine, as far as the file tells: all of loopback is one.
type Host = Option<IpAddr>;

pub(super) struct Checker<'a> {
    source: Source<'a>,
    /// Peers are not asked for a proof, and that is wanted.
    insecure: bool,
    /// Peers prove a key.
    keyed: bool,
    addresses: HashMap<SocketAddr, String>,
    admins: HashMap<PathBuf, String>,
    /// Disks, their metadata and the sockets of each machine.
    paths: HashMap<(Host, PathBuf), String>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(source: Source<'a>, insecure: bool) -> Self {
        let (addresses, admins, paths) = Default::default();
        Self { source, insecure, keyed: false, addresses, admins, paths }
    }

    /// The key file; from here on listening beyond loopback is as safe as the key.
    pub(super) fn key(&mut self, table: &Table<'_>, text: &str, at: At) -> Result<PathBuf, ConfigError> {
        self.keyed = true;
        self.path(table, "key", text, text, at)
    }

    pub(super) fn name(&self, text: &str, what: &'static str, at: At) -> Result<Name, ConfigError> {
        Name::new(text)
            .map_err(|reason| self.source.error(at, Problem::Name { name: text.to_owned(), what, reason }))
    }

    fn shared(&self, at: At, what: &'static str, found: String, first: &str, second: String) -> ConfigError {
        self.source.error(at, Problem::Shared { what, found, first: first.to_owned(), second })
    }

    fn address(
        &mut self,
        table: &Table<'_>,
        key: &str,
        text: &str,
        at: At,
    ) -> Result<SocketAddr, ConfigError> {
        let bad = |reason| table.place(key, at, text, reason);
        let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        let address: SocketAddr = numeric.as_deref().unwrap_or(text).parse().map_err(|_| {
            if has_large_port(text) {
                return bad("a port is a number from 1 to 65535");
            }
            bad("write an IP address and a port, such as 10.9.0.1:7790 or [fd00::1]:7790")
        })?;
        if address.port() == 0 {
            return Err(bad("port 0 is a different one at each start: name a port"));
        }
        let user = format!("{key} of {}", table.name);
        // Every machine has its own wildcard address.
        if !address.ip().is_unspecified() {
            // One that moves from node to node with the service is the same on both, for clients alone.
            let floats = |first: &str| {
                key == "nbd" && first.starts_with("nbd of ") && first != user && !address.ip().is_loopback()
            };
            if let Some(first) = self.addresses.get(&address).filter(|first| !floats(first)) {
                return Err(self.shared(at, "address", address.to_string(), first, user));
            }
            self.addresses.insert(address, user);
        }
        Ok(address)
    }

    fn secure(&self, table: &Table<'_>, key: &str, address: SocketAddr, at: At) -> Result<(), ConfigError> {
        if self.insecure || self.keyed || address.ip().is_loopback() {
            return Ok(());
        }
        let problem =
            Problem::Insecure { table: table.name.clone(), key: key.to_owned(), found: address.to_string() };
        Err(self.source.error(at, problem))
    }

    pub(super) fn listen(
        &mut self,
        table: &Table<'_>,
        text: &str,
        at: At,
    ) -> Result<SocketAddr, ConfigError> {
        let address = self.address(table, "listen", text, at)?;
        if address.ip().is_unspecified() {
            let reason =
                "the peer connects to this address: name one that this node has on the peers' network";
            return Err(table.place("listen", at, text, reason));
        }
        self.secure(table, "listen", address, at)?;
        Ok(address)
    }

    pub(super) fn metrics(
        &mut self,
        table: &Table<'_>,
        text: &str,
        at: At,
    ) -> Result<SocketAddr, ConfigError> {
        self.address(table, "metrics", text, at)
    }

    pub(super) fn admin(
        &mut self,
        table: &Table<'_>,
        text: &str,
        at: At,
        listen: SocketAddr,
    ) -> Result<PathBuf, ConfigError> {
        let path = self.path(table, "admin", text, text, at)?;
        self.socket(table, "admin", text, &path, at, listen)?;
        let user = format!("admin of {}", table.name);
        if let Some(first) = self.admins.insert(path.clone(), user.clone()) {
            return Err(self.shared(at, "socket", text.to_owned(), &first, user));
        }
        Ok(path)
    }

    pub(super) fn endpoint(
        &mut self,
        table: &Table<'_>,
        text: &str,
        at: At,
        listen: SocketAddr,
    ) -> Result<Endpoint, ConfigError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = self.path(table, "nbd", text, path, at)?;
            self.socket(table, "nbd", text, &path, at, listen)?;
            Ok(Endpoint::Unix(path))
        } else if let Some(address) = text.strip_prefix("tcp:") {
            let address = self.address(table, "nbd", address, at)?;
            self.secure(table, "nbd", address, at)?;
            Ok(Endpoint::Tcp(address))
        } else {
            let reason = "write unix:/run/costandby/alpha.nbd or tcp:10.9.0.1:10809";
            Err(table.place("nbd", at, text, reason))
        }
    }

    fn path(
        &self,
        table: &Table<'_>,
        key: &str,
        text: &str,
        path: &str,
        at: At,
    ) -> Result<PathBuf, ConfigError> {
        let reason = if path.contains('\0') {
            "a path cannot contain a zero byte"
        } else if !path.starts_with('/') {
            "write the whole path, beginning with '/', because the daemon's directory is not yours"
        } else if path.ends_with('/') {
            "it ends with '/': name a file, not a directory"
        } else {
            return Ok(lexical(Path::new(path)));
        };
        Err(table.place(key, at, text, reason))
    }

    fn socket(
        &mut self,
        table: &Table<'_>,
        key: &str,
        text: &str,
        path: &Path,
        at: At,
        listen: SocketAddr,
    ) -> Result<(), ConfigError> {
        if path.as_os_str().len() > SOCKET_PATH_LEN_MAX {
            return Err(table.place(
                key,
                at,
                text,
                "a socket's path has at most 107 bytes: use a shorter one",
            ));
        }
        self.claim(listen, path.to_owned(), at, "path", format!("{key} of {}", table.name))
    }

    fn claim(
        &mut self,
        listen: SocketAddr,
        path: PathBuf,
        at: At,
        what: &'static str,
        user: String,
    ) -> Result<(), ConfigError> {
        let host = (!listen.ip().is_loopback()).then_some(listen.ip());
        let found = path.display().to_string();
        match self.paths.insert((host, path), user.clone()) {
            Some(first) => Err(self.shared(at, what, found, &first, user)),
            None => Ok(()),
        }
    }

    pub(super) fn disks(
        &mut self,
        volume: &Table<'_>,
        name: &Name,
        nodes: &BTreeMap<NodeName, Node>,
    ) -> Result<BTreeMap<NodeName, Disk>, ConfigError> {
        let expected = "a path for each of two nodes, as in disk.alpha = \"/srv/db.img\",";
        let Some(table) = volume.table("disk", format!("disk of {}", volume.name), expected)? else {
            return Err(volume.missing("disk", "disk.alpha = \"/srv/db.img\" and one for the other node"));
        };
        let mut disks = BTreeMap::new();
        for (key, text, at) in table.all_strings(expected)? {
            let node = self.known(volume, "disk", key, at, nodes)?;
            let disk = if let Some(rest) = text.strip_prefix("memory:") {
                if !rest.is_empty() {
                    let reason = "write just \"memory:\", the volume's size says the rest";
                    return Err(table.place(key, at, text, reason));
                }
                Disk::Memory
            } else {
                let path = self.path(&table, key, text, text, at)?;
                let user = format!("volume {name} on node {key}");
                let mut metadata = OsString::from(&path);
                metadata.push(".meta");
                self.claim(node.listen, path.clone(), at, "disk", user.clone())?;
                self.claim(node.listen, metadata.into(), at, "path", format!("metadata of {user}"))?;
                Disk::Path(path)
            };
            disks.insert(node.name.clone(), disk);
        }
        if disks.len() == 2 {
            if disks.values().all(|disk| *disk == Disk::Memory) {
                return Err(self.source.error(table.at(), Problem::AllMemory { table: volume.name.clone() }));
            }
            return Ok(disks);
        }
        let problem = Problem::DiskCount { table: volume.name.clone(), found: disks.len() };
        Err(self.source.error(table.at(), problem))
    }

    pub(super) fn primary(
        &self,
        volume: &Table<'_>,
        nodes: &BTreeMap<NodeName, Node>,
        disks: &BTreeMap<NodeName, Disk>,
    ) -> Result<NodeName, ConfigError> {
        let names: Vec<_> = disks.keys().map(Name::as_str).collect();
        let (text, at) = volume.string("primary", "the name of a node")?.ok_or_else(|| {
            volume.missing("primary", format!("primary = \"{}\", where it starts", names.join("\" or \"")))
        })?;
        let node = self.known(volume, "primary", text, at, nodes)?;
        if disks.contains_key(text) {
            return Ok(node.name.clone());
        }
        let problem = Problem::PrimaryWithoutDisk {
            table: volume.name.clone(),
            primary: text.to_owned(),
            nodes: names.join(" and "),
        };
        Err(self.source.error(at, problem))
    }

    fn known<'n>(
        &self,
        table: &Table<'_>,
        key: &str,
        found: &str,
        at: At,
        nodes: &'n BTreeMap<NodeName, Node>,
    ) -> Result<&'n Node, ConfigError> {
        nodes.get(found).ok_or_else(|| {
            let problem = Problem::UnknownNode {
                table: table.name.clone(),
                key: key.to_owned(),
                found: found.to_owned(),
                hint: nearest(found, nodes.keys().map(Name::as_str)),
            };
            self.source.error(at, problem)
        })
    }
}

/// The path without `.`, `..` and doubled slashes, so that two spellings of one path are seen to be the same. Symbolic
/// links are not followed: the other node's are out of reach.
fn lexical(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// Whether all that is wrong with an address is a port that is too large.
fn has_large_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let large =
            port.len() >= 5 && port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_err();
        large && (host == "localhost" || format!("{host}:1").parse::<SocketAddr>().is_ok())
    })
}
