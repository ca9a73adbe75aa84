//! What RDMA there is: devices and ports, modules, memory that may be locked, and which link each volume would take.
//!
//! A machine without RDMA is in order, since TCP does it too; only a volume that is set to `rdma` makes a fault of it.

use super::Check;
#[cfg(feature = "rdma")]
use super::machine::{module, read};
use crate::config::quantity::display_size;
use crate::config::{LinkKind, Node, Volume};
use crate::link::gist;
#[cfg(feature = "rdma")]
use costandby_datapath::limits::RDMA_BOUNCE_LEN;
use costandby_datapath::limits::RDMA_RING_LEN;
#[cfg(feature = "rdma")]
use costandby_ffi::verbs::{
    Device, Gid, GidKind, LinkLayer, Memlock, Port, PortState, Transport, VerbsError,
};
use std::net::IpAddr;

/// Bytes that each volume locks in any case: its ring, and the bounce buffer of its link.
#[cfg(feature = "rdma")]
const LINK_LOCKED_LEN: u64 = RDMA_RING_LEN + RDMA_BOUNCE_LEN as u64;

/// Smallest path MTU that is worth no word: below it each 4 KiB write takes several packets more than it has to.
#[cfg(feature = "rdma")]
const MTU_GOOD: u32 = 4096;

/// What holds of the machine, whatever its configuration.
#[cfg(feature = "rdma")]
pub(super) fn checks() -> Vec<Check> {
    let release = read("/proc/sys/kernel/osrelease");
    let mut checks = match costandby_ffi::verbs::devices() {
        Ok(devices) => devices.iter().flat_map(device_checks).collect(),
        Err(error) => vec![no_devices(&error)],
    };
    checks.push(memlock_check(costandby_ffi::verbs::memlock()));
    for (name, use_for, device) in [
        ("ib_uverbs", "RDMA by programs", "/sys/module/ib_uverbs"),
        ("rdma_ucm", "RDMA connections", "/dev/infiniband/rdma_cm"),
        ("rdma_rxe", "soft-RoCE, RDMA on any network card", "/sys/module/rdma_rxe"),
    ] {
        checks.push(module(name, use_for, &release, device));
    }
    checks
}

/// A build without it.
#[cfg(not(feature = "rdma"))]
pub(super) fn checks() -> Vec<Check> {
    vec![Check::ok("rdma", "this program was built without the feature `rdma`; the link is TCP")]
}

#[cfg(feature = "rdma")]
pub(super) fn no_devices(error: &VerbsError) -> Check {
    match error {
        VerbsError::NoDevice | VerbsError::NoLibrary { .. } | VerbsError::NoModule { .. } => {
            Check::ok("rdma", format!("{error}; until then the link is TCP"))
        }
        // There is something, and it cannot be used.
        _ => Check::warn("rdma", error.to_string()),
    }
}

/// A line for the device and one for each of its ports.
#[cfg(feature = "rdma")]
pub(super) fn device_checks(device: &Device) -> Vec<Check> {
    let what = format!("rdma {}", device.name);
    let kind = match device.transport {
        Transport::InfiniBand => "",
        Transport::Iwarp => {
            ", iWARP: of use only if it has writes with immediate data (RFC 7306); never tried"
        }
        Transport::Other => ", of a kind that cannot be used",
    };
    let netdevs = device.netdevs();
    let on = if netdevs.is_empty() { String::new() } else { format!(" on {}", netdevs.join(", ")) };
    let text = format!("driver {}{on}{kind}", device.driver);
    let first = match device.transport {
        Transport::InfiniBand => Check::ok(&what, text),
        Transport::Iwarp | Transport::Other => Check::warn(&what, text),
    };
    let ports = device.ports.iter().map(|port| port_check(&format!("{what}/{}", port.number), port));
    [first].into_iter().chain(ports).collect()
}

#[cfg(feature = "rdma")]
fn port_check(what: &str, port: &Port) -> Check {
    let state = match port.state {
        PortState::Active => "active",
        PortState::Starting => {
            return Check::warn(what, "starting; on InfiniBand a port waits for a subnet manager (opensm)");
        }
        PortState::Down => {
            return Check::warn(
                what,
                "down: no cable, or its network interface is down (`ip link set … up`)",
            );
        }
        PortState::Unknown => "in a state it does not tell",
    };
    let layer = match port.link_layer {
        LinkLayer::InfiniBand => "InfiniBand",
        LinkLayer::Ethernet => "Ethernet",
        LinkLayer::Unspecified => "a wire it does not name",
    };
    let addresses: Vec<_> = port.gids.iter().filter_map(address).collect();
    let text = format!("{state}, {layer}, path MTU {}", port.mtu);
    if addresses.is_empty() {
        let text = if port.link_layer == LinkLayer::InfiniBand {
            format!("{text}; connections need an IP address: set one on its IPoIB interface")
        } else {
            format!("{text}; no RoCE v2 address: give its network interface an IP address")
        };
        return Check::warn(what, text);
    }
    let text = format!("{text}; {}", addresses.join(", "));
    if port.mtu < MTU_GOOD.min(port.mtu_max) && port.link_layer == LinkLayer::Ethernet {
        let text = format!(
            "{text}; with jumbo frames (`ip link set … mtu 9000` on both nodes and the switch) the path MTU would be \
             {}",
            MTU_GOOD.min(port.mtu_max)
        );
        return Check::ok(what, text);
    }
    Check::ok(what, text)
}

/// A table's entry as an address to connect to, for people; link-local ones are of no use in a configuration.
#[cfg(feature = "rdma")]
fn address(gid: &Gid) -> Option<String> {
    let address = gid.address.to_canonical();
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let useful = gid.kind == GidKind::RoceV2 && !link_local;
    useful.then(|| format!("{address} (GID {})", gid.index))
}

#[cfg(feature = "rdma")]
pub(super) fn memlock_check((limit, _): (Memlock, u64)) -> Check {
    let each = display_size(LINK_LOCKED_LEN);
    match limit.0 {
        None => Check::ok("memlock", "unlimited here; the daemon's own limit may be another (LimitMEMLOCK)"),
        Some(limit) if limit >= 2 * LINK_LOCKED_LEN => Check::ok(
            "memlock",
            format!("{}; each volume's RDMA link locks {each} and more", display_size(limit)),
        ),
        Some(limit) => {
            let text = format!(
                "{}: enough for TCP; each volume's RDMA link locks {each} and more: LimitMEMLOCK=infinity in the \
                 unit, or `ulimit -l unlimited`",
                display_size(limit)
            );
            Check::warn("memlock", text)
        }
    }
}

/// Whether this node can connect by RDMA from where it listens.
#[cfg(feature = "rdma")]
fn able(local: IpAddr) -> Result<(), String> {
    costandby_datapath::transport::rdma::setup::able(local).map_err(|error| error.to_string())
}

#[cfg(not(feature = "rdma"))]
fn able(_: IpAddr) -> Result<(), String> {
    Err("this program was built without the feature `rdma`".to_owned())
}

/// Which link a volume would take, as far as this node is concerned.
pub(super) fn volume_check(node: &Node, volume: &Volume) -> Check {
    let local = node.listen.ip();
    judge(&format!("volume {}", volume.name), volume.link, local, able(local))
}

pub(super) fn judge(what: &str, link: LinkKind, local: IpAddr, able: Result<(), String>) -> Check {
    match (link, able) {
        (LinkKind::Tcp, _) => Check::ok(what, "link: tcp, as configured"),
        (LinkKind::Auto, Ok(())) => {
            let text = format!(
                "link: rdma from {local}, if the peer has it too; {} of ring",
                display_size(RDMA_RING_LEN)
            );
            Check::ok(what, text)
        }
        (LinkKind::Rdma, Ok(())) => Check::ok(what, format!("link: rdma from {local}, as configured")),
        // What to do about it stands once, in the lines about RDMA.
        (LinkKind::Auto, Err(why)) => {
            Check::ok(what, format!("link: tcp, because there is no RDMA ({}), see rdma above", gist(&why)))
        }
        (LinkKind::Rdma, Err(why)) => {
            Check::fail(what, format!("link = \"rdma\", and {why}; or let it be \"auto\""))
        }
    }
}

#[cfg(all(test, feature = "rdma"))]
mod tests {
    use super::super::Verdict;
    use super::*;
    use costandby_ffi::verbs::Limits;
    use std::net::Ipv4Addr;

    fn gid(index: u32, kind: GidKind, address: &str) -> Gid {
        let address = match address.parse().expect("an address") {
            IpAddr::V4(v4) => Ipv4Addr::to_ipv6_mapped(&v4),
            IpAddr::V6(v6) => v6,
        };
        Gid { index, kind, address, netdev: Some("eth0".into()) }
    }

    fn device(state: PortState, mtu: u32, gids: Vec<Gid>) -> Device {
        let (link_layer, mtu_max) = (LinkLayer::Ethernet, 4096);
        let port = Port { number: 1, state, link_layer, mtu, mtu_max, message_len_max: 1 << 31, gids };
        Device {
            name: "rxe0".into(),
            driver: "rdma_rxe".into(),
            transport: Transport::InfiniBand,
            guid: 1,
            limits: Limits {
                queue_pairs: 1,
                work_requests: 1,
                pieces: 1,
                completions: 1,
                regions: 1,
                region_len: 1,
            },
            ports: vec![port],
        }
    }

    #[test]
    fn ports_are_judged_by_state_address_and_mtu() {
        let good = || vec![gid(0, GidKind::RoceV2, "fe80::1"), gid(1, GidKind::RoceV2, "10.9.0.1")];
        let port = |state, mtu, gids| device_checks(&device(state, mtu, gids)).pop().expect("a port");
        let check = port(PortState::Active, 4096, good());
        assert_eq!(check.verdict, Verdict::Ok);
        assert_eq!(check.what, "rdma rxe0/1");
        assert_eq!(check.text, "active, Ethernet, path MTU 4096; 10.9.0.1 (GID 1)");
        assert!(port(PortState::Active, 1024, good()).text.contains("jumbo frames"));
        assert_eq!(port(PortState::Down, 4096, good()).verdict, Verdict::Warn);
        assert_eq!(port(PortState::Starting, 4096, good()).verdict, Verdict::Warn);
        let v1 = vec![gid(0, GidKind::RoceV2, "fe80::1"), gid(1, GidKind::RoceV1, "10.9.0.1")];
        let check = port(PortState::Active, 4096, v1);
        assert!(check.verdict == Verdict::Warn && check.text.contains("no RoCE v2 address"), "{check:?}");
    }

    #[test]
    fn a_device_is_named_with_its_driver_and_interface() {
        let gids = vec![gid(1, GidKind::RoceV2, "10.9.0.1")];
        let mut device = device(PortState::Active, 4096, gids);
        assert_eq!(device_checks(&device)[0], Check::ok("rdma rxe0", "driver rdma_rxe on eth0"));
        device.transport = Transport::Other;
        assert_eq!(device_checks(&device)[0].verdict, Verdict::Warn);
    }

    #[test]
    fn no_device_is_no_fault_and_one_that_cannot_be_opened_is() {
        let none = no_devices(&VerbsError::NoDevice);
        assert!(
            none.verdict == Verdict::Ok && none.text.contains("costandby soft-roce up NETDEV"),
            "{none:?}"
        );
        let closed = no_devices(&VerbsError::Permission { path: "/dev/infiniband/uverbs0".into() });
        assert_eq!(closed.verdict, Verdict::Warn);
    }

    #[test]
    fn locked_memory_is_held_against_what_a_link_takes() {
        let verdict = |limit| memlock_check((Memlock(limit), 0)).verdict;
        assert_eq!(verdict(None), Verdict::Ok);
        assert_eq!(verdict(Some(8 << 20)), Verdict::Warn);
        assert_eq!(verdict(Some(LINK_LOCKED_LEN)), Verdict::Warn);
        assert_eq!(verdict(Some(1 << 30)), Verdict::Ok);
    }

    #[test]
    fn each_volumes_link_is_foretold() {
        let local = IpAddr::from([10, 9, 0, 1]);
        let judge =
            |link, able: Result<(), &str>| judge("volume db", link, local, able.map_err(str::to_owned));
        assert!(judge(LinkKind::Auto, Ok(())).text.contains("link: rdma from 10.9.0.1"));
        let none = judge(LinkKind::Auto, Err("no device; make one: modprobe rdma_rxe"));
        assert_eq!(none.text, "link: tcp, because there is no RDMA (no device), see rdma above");
        assert_eq!(judge(LinkKind::Auto, Err("no device")).verdict, Verdict::Ok);
        assert_eq!(judge(LinkKind::Rdma, Err("no device")).verdict, Verdict::Fail);
        assert_eq!(judge(LinkKind::Rdma, Ok(())).verdict, Verdict::Ok);
        assert_eq!(judge(LinkKind::Tcp, Err("no device")).text, "link: tcp, as configured");
    }
}
