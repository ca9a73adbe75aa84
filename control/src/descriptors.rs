//! How many descriptors (open files and sockets) a node's configuration needs, and how many the system gives.
//!
//! The daemon asks once at its start, `costandby doctor` in advance. What the volumes need, connected and with a change of
//! their link under way, is set aside; NBD clients get the rest, up to the reactor's own bound. So clients that take all they
//! can get neither end a session nor keep an operator from an answer.
//!
//! Invariants: the sum is an upper bound of what a daemon opens for anything but NBD clients; a start with fewer descriptors
//! than the volumes and one client each need is refused, since a daemon without descriptors loses its sessions one by one.
//!
//! Survives: a system that refuses to raise the limit (the limit that is in force then counts).

use crate::config::{Config, Disk, LinkKind, Node};
use costandby_datapath::limits::CONNECTIONS_MAX;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::path::Path;

/// What a daemon has open whatever its volumes: three standard streams, the reactor's poller and doorbell, the control
/// runtime's, the signals' socket pair, the source of random numbers; 13 in all, and as many again for files that are open
/// for a moment.
const OWN: u64 = 32;

/// Connections of peers that have not said yet which volume they are for (`STRANGERS_MAX` of [`crate::node`]), and those of
/// operators and monitoring on the admin socket, 32.
const STRANGERS: u64 = 64 + 32;

/// A volume's disk, what takes the disk's place when it fails, and its metadata.
const FILE_DISK: u64 = 3;

/// A memory disk has no metadata, and nothing takes its place.
const MEMORY_DISK: u64 = 1;

/// A volume's session, and a connection to or from the peer that is to become one, to change its link, or that asks why there
/// is none.
const SESSION: u64 = 2;

/// More with RDMA: the ring's device (two), the queue pair's events, its completions and what watches both; two listeners.
const RDMA_LINK: u64 = 7;

/// Fewer connections for each volume are worth a warning: what one client opens with `nbd-client -connections 4`.
const CLIENTS_WANTED: u64 = 4;

/// What is recommended wherever more are needed than there are: enough for several thousand volumes.
pub(crate) const RECOMMENDED: u64 = 65_536;

/// Where Linux lists its RDMA devices.
const RDMA_DEVICES: &str = "/sys/class/infiniband";

/// What a configuration needs on a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Need {
    /// The daemon itself, its listening sockets, strangers and operators.
    own: u64,
    volumes: u64,
    /// Of all volumes together.
    of_volumes: u64,
}

/// What the system gives a daemon of this configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Judged {
    /// Enough for this many NBD connections.
    Enough(u64),
    /// Enough for the volumes and for this many NBD connections, which is few.
    FewClients(u64),
    /// Not enough for the volumes.
    TooFew,
}

impl Need {
    /// Of the volumes with a disk on `node`. With `rdma` volumes that take RDMA where there is any count as having it.
    pub(crate) fn of(config: &Config, node: &Node, rdma: bool) -> Self {
        let each = |disk: &Disk, link: LinkKind| {
            let disk = if *disk == Disk::Memory { MEMORY_DISK } else { FILE_DISK };
            let takes_rdma = link == LinkKind::Rdma || (link == LinkKind::Auto && rdma);
            disk + SESSION + if takes_rdma { RDMA_LINK } else { 0 }
        };
        let listening = 2 + node.nbd.len() as u64;
        let (mut volumes, mut of_volumes) = (0, 0);
        for (volume, disk) in config.volumes_of(node.name.as_str()) {
            volumes += 1;
            of_volumes += each(disk, volume.link);
        }
        Self { own: OWN + STRANGERS + listening, volumes, of_volumes }
    }

    /// The same, asking this machine whether it has an RDMA device.
    pub(crate) fn here(config: &Config, node: &Node) -> Self {
        let rdma =
            std::fs::read_dir(Path::new(RDMA_DEVICES)).is_ok_and(|mut devices| devices.next().is_some());
        Self::of(config, node, rdma)
    }

    /// All but NBD clients.
    fn reserved(self) -> u64 {
        self.own + self.of_volumes
    }

    /// The fewest that a daemon starts with: one NBD connection a volume.
    pub(crate) fn least(self) -> u64 {
        self.reserved() + self.clients(1)
    }

    /// NBD connections of so many for each volume, as far as the reactor takes them.
    fn clients(self, each: u64) -> u64 {
        (self.volumes * each).min(CONNECTIONS_MAX as u64)
    }

    /// What may be done with `limit` descriptors.
    pub(crate) fn judge(self, limit: u64) -> Judged {
        if limit < self.least() {
            return Judged::TooFew;
        }
        let clients = (limit - self.reserved()).min(CONNECTIONS_MAX as u64);
        if clients < self.clients(CLIENTS_WANTED) {
            Judged::FewClients(clients)
        } else {
            Judged::Enough(clients)
        }
    }

    /// What makes up the sum.
    pub(crate) fn sum(self) -> String {
        let Self { own, volumes, of_volumes } = self;
        let (plural, clients) = (if volumes == 1 { "" } else { "s" }, self.clients(1));
        format!(
            "{}: {own} of its own, {of_volumes} for {volumes} volume{plural} and {clients} for NBD clients",
            self.least()
        )
    }

    /// Why a daemon does not start with `limit` descriptors, and what to do.
    pub(crate) fn refusal(self, node: &str, limit: u64) -> String {
        format!(
            "node {node} needs {}; the system gives this process {limit} descriptors at most: {}",
            self.sum(),
            self.remedy()
        )
    }

    /// How to have more.
    pub(crate) fn remedy(self) -> String {
        let wanted = RECOMMENDED.max((self.reserved() + CONNECTIONS_MAX as u64).next_power_of_two());
        format!(
            "set LimitNOFILE={wanted} in the unit's [Service], or run `ulimit -n {wanted}` as root in the shell that starts the daemon"
        )
    }
}

/// Raises how many descriptors this process may have to the most that the system lets it, and says how many that is.
pub(crate) fn raise_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many a daemon that is started like this process may have.
pub(crate) fn limit() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(volumes: usize, link: &str, disk: &str) -> Config {
        let mut text = String::from(
            "nodes.alpha = { listen = \"127.0.0.1:1\", admin = \"/a\", nbd = [\"unix:/n\"] }\n\
             nodes.beta = { listen = \"127.0.0.1:2\", admin = \"/b\" }\n",
        );
        for volume in 0..volumes {
            let disk = disk.replace("NAME", &volume.to_string());
            text += &format!(
                "volumes.v{volume} = {{ size = 65536, primary = \"alpha\", link = \"{link}\", disk.alpha = \"{disk}\", \
                 disk.beta = \"/b{volume}\" }}\n"
            );
        }
        Config::parse(&text, Path::new("c.toml")).expect("good")
    }

    fn need(volumes: usize, link: &str, disk: &str, rdma: bool) -> Need {
        let config = config(volumes, link, disk);
        let node = config.node("alpha").expect("a node");
        Need::of(&config, node, rdma)
    }

    #[test]
    fn what_is_needed_is_the_sum_of_what_each_volume_opens() {
        let one = |link, disk, rdma| need(1, link, disk, rdma).of_volumes;
        assert_eq!(one("tcp", "/d/NAME", true), 5);
        assert_eq!(one("auto", "/d/NAME", false), 5, "there is no device");
        assert_eq!(one("auto", "/d/NAME", true), 12);
        assert_eq!(one("rdma", "/d/NAME", false), 12, "it is asked for");
        assert_eq!(one("tcp", "memory:", true), 3);
        let many = need(300, "tcp", "/d/NAME", false);
        assert_eq!((many.own, many.of_volumes), (32 + 96 + 3, 1500));
        assert_eq!(many.least(), 131 + 1500 + 300);
    }

    #[test]
    fn a_limit_is_too_low_or_leaves_few_for_clients_or_enough() {
        let need = need(10, "tcp", "/d/NAME", false);
        let least = need.least();
        assert_eq!(need.judge(least - 1), Judged::TooFew);
        assert_eq!(need.judge(least), Judged::FewClients(10));
        assert_eq!(need.judge(least + 29), Judged::FewClients(39));
        assert_eq!(need.judge(least + 30), Judged::Enough(40));
        assert_eq!(need.judge(u64::MAX), Judged::Enough(CONNECTIONS_MAX as u64));
        let text = need.refusal("alpha", 100);
        for part in
            ["node alpha needs 191", "10 volumes", "gives this process 100", "LimitNOFILE=65536", "ulimit -n"]
        {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn thousands_of_volumes_do_not_reserve_more_clients_than_the_reactor_takes() {
        let need = need(2000, "tcp", "/d/NAME", false);
        assert_eq!(need.least() - need.reserved(), CONNECTIONS_MAX as u64);
        assert!(need.remedy().contains("65536"));
        assert_eq!(need.judge(need.least()), Judged::Enough(CONNECTIONS_MAX as u64));
    }
}
