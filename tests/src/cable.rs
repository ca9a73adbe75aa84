//! Two network name spaces joined by a cable: two machines, as far as the kernel's network is concerned.

use crate::process::{run, system_command};
use crate::skip;
use std::net::{Ipv4Addr, SocketAddr};

/// Where the nodes listen for each other.
const PORT: u16 = 7790;

/// Two name spaces and a cable. Dropping it removes them.
#[derive(Debug)]
pub struct Cable {
    spaces: [String; 2],
    addresses: [SocketAddr; 2],
}

impl Cable {
    /// `None`, said aloud, where this is not allowed.
    #[must_use]
    pub fn lay() -> Option<Self> {
        let id = std::process::id();
        let spaces = ["a", "b"].map(|end| format!("costandby-{id}-{end}"));
        let octet = id.to_le_bytes()[0];
        let ips = [1, 2].map(|host| Ipv4Addr::new(10, 231, octet, host));
        let made = system_command("ip").args(["netns", "add", &spaces[0]]).output();
        if !made.as_ref().is_ok_and(|made| made.status.success()) {
            skip(format_args!("network name spaces cannot be made: {made:?}"));
            return None;
        }
        let cable = Self { spaces, addresses: ips.map(|ip| SocketAddr::from((ip, PORT))) };
        let [a, b] = &cable.spaces;
        ip(&["netns", "add", b]);
        ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b]);
        for (space, address) in cable.spaces.iter().zip(ips) {
            ip(&["-n", space, "address", "add", &format!("{address}/24"), "dev", "cable"]);
            ip(&["-n", space, "link", "set", "lo", "up"]);
            ip(&["-n", space, "link", "set", "cable", "up"]);
        }
        Some(cable)
    }

    /// The name spaces' names.
    #[must_use]
    pub fn spaces(&self) -> &[String; 2] {
        &self.spaces
    }

    /// The same with the address of each node in its own.
    #[must_use]
    pub fn namespaces(&self) -> [(String, SocketAddr); 2] {
        let [a, b] = self.spaces.clone();
        [(a, self.addresses[0]), (b, self.addresses[1])]
    }

    /// `up` or `down`.
    pub fn set(&self, state: &str) {
        ip(&["-n", &self.spaces[1], "link", "set", "cable", state]);
    }

    /// Drops each packet of more bytes than that, silently and in both directions. False, said aloud, where there is no nft.
    #[must_use]
    pub fn swallow_longer_than(&self, bytes: u32) -> bool {
        let rules = format!(
            "add table inet hole; add chain inet hole drops {{ type filter hook input priority 0; }}; \
             add rule inet hole drops meta length > {bytes} drop"
        );
        self.spaces.iter().all(|space| {
            let made = system_command("ip").args(["netns", "exec", space, "nft", &rules]).output();
            let well = made.as_ref().is_ok_and(|made| made.status.success());
            if !well {
                skip(format_args!("packets cannot be dropped by their length: {made:?}"));
            }
            well
        })
    }

    /// Lets all packets through again.
    pub fn swallow_nothing(&self) {
        for space in &self.spaces {
            ip(&["netns", "exec", space, "nft", "delete table inet hole"]);
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for space in &self.spaces {
            run(system_command("ip").args(["netns", "delete", space]));
        }
    }
}

/// Runs `ip`, which has to do what it is asked.
pub fn ip(args: &[&str]) {
    run(system_command("ip").args(args)).ok();
}
