//! `costandby doctor`: what this machine can do, what this configuration asks of it, and what to change.
//!
//! Looks only; changes nothing and starts nothing. Each line has a verdict: `ok`, `warn` (works, but slower or only so
//! far) or `fail` (the daemon would not start or not keep a promise), and the latter two say what to do.
//!
//! Survives: a machine without /proc or a configuration, which are findings like any other.

use super::{CONFIG_DEFAULT, CliError, Colour, Place, colours_wanted, print};
use crate::config::quantity::display_size;
use crate::config::{Config, Disk, Endpoint, Node, Volume};
use crate::descriptors::{self, Judged, Need};
use costandby_datapath::disk::metadata::MetadataError;
use costandby_datapath::disk::metadata::inspect::{Inspection, inspect};
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::place;
use costandby_datapath::disk::superblock::{DEVICE_METADATA_LEN, Location, Superblock, SuperblockError};
use std::io::{self, IsTerminal};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

mod key;
mod machine;
mod rdma;

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Check {
    verdict: Verdict,
    what: String,
    text: String,
}

impl Check {
    fn new(verdict: Verdict, what: &str, text: impl Into<String>) -> Self {
        Self { verdict, what: what.to_owned(), text: text.into() }
    }

    fn ok(what: &str, text: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, what, text)
    }

    fn warn(what: &str, text: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, what, text)
    }

    fn fail(what: &str, text: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, what, text)
    }
}

/// Checks everything and prints a line each.
///
/// # Errors
/// [`CliError::Doctor`] where a check failed.
pub(super) fn run(place: &Place) -> Result<(), CliError> {
    let mut checks = machine::checks();
    checks.extend(rdma::checks());
    configuration(place, &mut checks);
    print(&render(&checks, colours_wanted(io::stdout().is_terminal())))?;
    match checks.iter().filter(|check| check.verdict == Verdict::Fail).count() {
        0 => Ok(()),
        count => Err(CliError::Doctor { count, total: checks.len() }),
    }
}

fn render(checks: &[Check], colours: bool) -> String {
    let width = checks.iter().map(|check| check.what.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for Check { verdict, what, text } in checks {
        let (word, colour) = match verdict {
            Verdict::Ok => ("ok  ", Colour::Good),
            Verdict::Warn => ("warn", Colour::Attention),
            Verdict::Fail => ("fail", Colour::Bad),
        };
        let word = colour.paint(word, colours);
        let text = super::one_line(text);
        out.push_str(&format!("{word}  {what:width$}  {text}\n"));
    }
    out
}

fn configuration(place: &Place, checks: &mut Vec<Check>) {
    let config = match Config::load(&place.file) {
        Ok(config) => config,
        Err(_) if place.file == Path::new(CONFIG_DEFAULT) && !place.file.exists() => {
            let text = format!("none at {CONFIG_DEFAULT}: name yours with --config FILE or COSTANDBY_CONFIG");
            checks.push(Check::warn("configuration", text));
            return;
        }
        Err(error) => {
            checks.push(Check::fail("configuration", error.to_string()));
            return;
        }
    };
    let (nodes, volumes) = (config.nodes.len(), config.volumes.len());
    let text = format!("{}: {nodes} nodes, {volumes} volumes", config.file.display());
    checks.push(Check::ok("configuration", text));
    if config.insecure && config.key.is_none() {
        checks.push(Check::warn(
            "insecure",
            "peers and NBD clients are neither authenticated nor encrypted: only on a network that is yours alone; `costandby \
             keygen` makes a key that peers have to prove",
        ));
    }
    let node = match place.node(&config) {
        Ok(node) => node,
        Err(error) => {
            checks.push(Check::fail("node", error.to_string()));
            return;
        }
    };
    checks.push(Check::ok("node", format!("{} listens on {}", node.name, node.listen)));
    checks.extend(key::checks(&config, node));
    let running = UnixStream::connect(&node.admin).is_ok();
    checks.push(if running {
        Check::ok("daemon", format!("answers on {}", node.admin.display()))
    } else {
        let text = format!("does not run; start it with `{} up`", config.command_line(node.name.as_str()));
        Check::ok("daemon", text)
    });
    if !running {
        addresses(node, checks);
    }
    checks.push(descriptors_check(Need::here(&config, node), node.name.as_str(), descriptors::limit()));
    let command_line = config.command_line(node.name.as_str());
    for (volume, disk) in config.volumes_of(node.name.as_str()) {
        checks.extend(disk_checks(&command_line, node, volume, disk, running));
        checks.push(rdma::volume_check(node, volume));
    }
}

/// Whether a daemon that is started from here could have the descriptors that its volumes need.
fn descriptors_check(need: Need, node: &str, limit: u64) -> Check {
    match need.judge(limit) {
        Judged::Enough(clients) => Check::ok(
            "descriptors",
            format!("{} at least; {limit} leave {clients} for NBD connections", need.sum()),
        ),
        Judged::FewClients(clients) => {
            let text = format!("{limit} leave only {clients} for NBD connections: {}", need.remedy());
            Check::warn("descriptors", text)
        }
        Judged::TooFew => Check::fail("descriptors", need.refusal(node, limit)),
    }
}

/// How addresses for clients are called.
const NBD: &str = "nbd";

fn addresses(node: &Node, checks: &mut Vec<Check>) {
    let nbd = node.nbd.iter().filter_map(|endpoint| match endpoint {
        Endpoint::Tcp(address) => Some((NBD, *address)),
        Endpoint::Unix(_) => None,
    });
    let metrics = node.metrics.map(|address| ("metrics", address));
    for (key, address) in [("listen", node.listen)].into_iter().chain(nbd).chain(metrics) {
        checks.push(address_check(key, address));
    }
    let sockets = node.nbd.iter().filter_map(|endpoint| match endpoint {
        Endpoint::Unix(path) => Some(("nbd socket", path)),
        Endpoint::Tcp(_) => None,
    });
    for (what, path) in [("admin socket", &node.admin)].into_iter().chain(sockets) {
        checks.push(socket_check(what, path));
    }
}

fn address_check(key: &str, address: SocketAddr) -> Check {
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(key, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Check::fail(key, format!("{address} is taken: `ss -ltnp` says by whom"))
        }
        // The daemon listens on those for clients before any interface has them.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && key == NBD => Check::warn(
            key,
            format!(
                "{address} is no address of this machine now: the daemon waits for clients there all the same, which is right for \
                 an address that moves with the service; is it one? see `ip addr`"
            ),
        ),
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Check::fail(
            key,
            format!("{address} is no address of this machine: is --node right? see `ip addr`"),
        ),
        Err(error) => Check::fail(key, format!("{address}: {error}")),
    }
}

fn socket_check(what: &str, path: &Path) -> Check {
    let shown = path.display();
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        return match (metadata.file_type().is_socket(), UnixStream::connect(path)) {
            (false, _) => Check::fail(what, format!("{shown} is not a socket: move it away")),
            (true, Ok(_)) => Check::fail(what, format!("{shown} is another program's: choose another path")),
            (true, Err(_)) => Check::ok(what, format!("{shown} is left over and will be replaced")),
        };
    }
    let existing = path.ancestors().skip(1).find(|directory| directory.is_dir()).unwrap_or(Path::new("/"));
    let may = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    match rustix::fs::access(existing, may) {
        Ok(()) => Check::ok(what, format!("{shown} can be made")),
        Err(error) => {
            let text = format!(
                "{shown} cannot be made in {}: {error}; run as root or choose another path",
                existing.display()
            );
            Check::fail(what, text)
        }
    }
}

fn disk_checks(command_line: &str, node: &Node, volume: &Volume, disk: &Disk, running: bool) -> Vec<Check> {
    let what = format!("volume {}", volume.name);
    let mut checks = Vec::new();
    match disk {
        Disk::Memory => {
            let text = format!(
                "{} of memory; lost when the daemon ends, then copied from the peer",
                display_size(volume.size)
            );
            checks.push(Check::warn(&what, text));
            // A running daemon has taken its memory already.
            checks.extend(machine::memory_for(&what, volume.size).filter(|_| !running));
        }
        Disk::Path(path) => checks.push(path_check(&what, command_line, node, volume, path, running)),
    }
    checks
}

fn path_check(
    what: &str,
    command_line: &str,
    node: &Node,
    volume: &Volume,
    path: &Path,
    running: bool,
) -> Check {
    let shown = path.display();
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return missing_disk(what, command_line, volume, path);
        }
        Err(error) => return Check::fail(what, format!("{shown}: {error}")),
    };
    let (found, needed, location) = if metadata.file_type().is_block_device() {
        match device_len(path) {
            Ok(len) => {
                let needed = volume.size.saturating_add(DEVICE_METADATA_LEN);
                (len, needed, place::find(path, volume.size))
            }
            Err(error) => return Check::fail(what, format!("{shown}: {error}")),
        }
    } else if metadata.is_file() {
        (metadata.len(), volume.size, Ok(Location::beside(path)))
    } else {
        return Check::fail(what, format!("{shown} is neither a file nor a block device"));
    };
    if found < needed {
        let text = format!(
            "{shown} has {found} bytes, {needed} are needed: correct `size` in the configuration if that is wrong; if the disk was \
             cut short, its end is lost, and must not be filled up, for zeros would count as data"
        );
        return Check::fail(what, text);
    }
    let location = match location {
        Ok(location) => location,
        Err(error) => return Check::fail(what, error.to_string()),
    };
    let place = if metadata.is_file() {
        format!("on {}", machine::file_system(path))
    } else {
        "a block device".to_owned()
    };
    let about = format!("{shown}, {}, {place}", display_size(volume.size));
    metadata_check(what, &about, &location, running, |superblock, path| {
        superblock.check_belongs(path, volume.name.as_str(), node.name.as_str(), volume.size)
    })
}

/// What the daemon would make of the metadata, found by looking only.
fn metadata_check(
    what: &str,
    about: &str,
    location: &Location,
    running: bool,
    belongs: impl Fn(&Superblock, &Path) -> Result<(), SuperblockError>,
) -> Check {
    let looked = || {
        let (medium, in_use) = FileMedium::look(&location.path)?;
        let Inspection { copies, newest, area } = inspect(&medium, location.offset, 0)?;
        let (_, superblock) = newest?;
        belongs(&superblock, &location.path)?;
        Ok::<_, MetadataError>((superblock, in_use, copies, area.transpose()?))
    };
    let (superblock, in_use, copies, area) = match looked() {
        Ok(found) => found,
        Err(error) => return Check::fail(what, error.to_string()),
    };
    if in_use {
        let path = location.path.clone();
        return if running {
            Check::ok(what, format!("{about}, in use by the daemon"))
        } else {
            Check::fail(what, SuperblockError::Locked { path }.to_string())
        };
    }
    let text = format!("{about}, {}", superblock.disk_state.as_str());
    let damaged = copies.iter().enumerate().find_map(|(copy, read)| Some((copy, read.as_ref().err()?)));
    if let Some((copy, error)) = damaged {
        let text = format!("{text}; metadata copy {copy} is damaged ({error}): check the medium");
        return Check::warn(what, text);
    }
    match area {
        Some(area) if area.activity_damage.is_some() || area.dirty_damage.sectors > 0 => {
            let text = format!(
                "{text}; the dirty bitmap or activity log is damaged, so {} count as differing: check the medium",
                display_size(area.dirty_bytes)
            );
            Check::warn(what, text)
        }
        // Where a copy is good, there is an area.
        Some(_) | None => Check::ok(what, text),
    }
}

fn missing_disk(what: &str, command_line: &str, volume: &Volume, path: &Path) -> Check {
    let shown = path.display();
    let make = format!("`{command_line} create {}`", volume.name);
    // A disk that was made and is not there now may be the newer of the two: an empty one must not take its place unawares.
    let metadata = Location::beside(path).path;
    if metadata.exists() {
        let text = format!(
            "{shown} is missing, and its metadata {} is there: mount the disk's file system, or put the disk back; if it is \
             lost, {make} with --force makes an empty one, which is copied from the peer; what only the lost disk held is given up",
            metadata.display()
        );
        return Check::fail(what, text);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.is_dir() {
        let text = format!(
            "{shown} is not there, nor is its directory: mount what belongs there; for a disk that was never made, make the \
             directory, then {make}"
        );
        return Check::fail(what, text);
    }
    let make = format!("if it was made before, mount its file system; if it was never made, {make}");
    let size = display_size(volume.size);
    match machine::free_bytes(directory) {
        Some(free) if free < volume.size => {
            let free = display_size(free);
            let text = format!(
                "{shown} is not there, and only {free} are free for its {size}: {make}, with some more freed"
            );
            Check::fail(what, text)
        }
        _ => Check::fail(what, format!("{shown} is not there: {make}")),
    }
}

fn device_len(path: &Path) -> io::Result<u64> {
    let device = std::fs::File::open(path)?;
    Ok(rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0))?)
}

#[cfg(test)]
mod tests;
