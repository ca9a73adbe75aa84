//! What RDMA devices this machine has, as far as a connection or an operator wants to know.
//!
//! Asked by `doctor` and when a link is chosen, never on the way of a write. Works on a machine without any of it: then
//! the error says which part is missing.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use super::context::{Context, Limits, name_of, text};
use super::error::VerbsError;
use super::sys;

/// What carries the verbs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// InfiniBand's, over InfiniBand or Ethernet (RoCE).
    InfiniBand,
    /// TCP.
    Iwarp,
    /// Another, which cannot be used.
    Other,
}

/// What the wire is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet.
    Ethernet,
    /// It does not say.
    Unspecified,
}

/// How a port is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortState {
    /// No wire, or switched off.
    Down,
    /// Between the two.
    Starting,
    /// Carries data.
    Active,
    /// It does not say.
    Unknown,
}

/// What an address of a port stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GidKind {
    /// InfiniBand's own, or iWARP's.
    InfiniBand,
    /// RoCE on bare Ethernet.
    RoceV1,
    /// RoCE on UDP: what this program wants.
    RoceV2,
}

/// An address of a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gid {
    /// Where in the port's table.
    pub index: u32,
    /// What it stands for.
    pub kind: GidKind,
    /// As 16 bytes; an IPv4 address is mapped (`::ffff:a.b.c.d`).
    pub address: Ipv6Addr,
    /// The network interface it belongs to, on Ethernet.
    pub netdev: Option<String>,
}

/// One port of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// From 1 on.
    pub number: u8,
    /// How it is.
    pub state: PortState,
    /// What the wire is.
    pub link_layer: LinkLayer,
    /// Bytes of a packet's payload.
    pub mtu: u32,
    /// Bytes it could have at most.
    pub mtu_max: u32,
    /// Bytes of one message at most.
    pub message_len_max: u32,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// One device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// As the kernel calls it: `rxe0`, `mlx5_0`.
    pub name: String,
    /// The kernel's driver: `rdma_rxe`, `mlx5_core`; `unknown` where it does not say.
    pub driver: String,
    /// What carries the verbs.
    pub transport: Transport,
    /// The node's number.
    pub guid: u64,
    /// What it can do.
    pub limits: Limits,
    /// Its ports.
    pub ports: Vec<Port>,
}

impl Device {
    /// Whether one of its ports has this address.
    #[must_use]
    pub fn has_address(&self, address: IpAddr) -> bool {
        let wanted = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        self.ports.iter().flat_map(|port| &port.gids).any(|gid| gid.address == wanted)
    }

    /// The network interfaces its ports stand on.
    #[must_use]
    pub fn netdevs(&self) -> Vec<&str> {
        let mut names: Vec<_> =
            self.ports.iter().flat_map(|port| &port.gids).filter_map(|gid| gid.netdev.as_deref()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// The machine's RDMA devices, at least one. Opens each, asks it and closes it again; blocks for that.
///
/// # Errors
/// What is missing on this machine: [`VerbsError::NoLibrary`], [`VerbsError::NoModule`], [`VerbsError::NoProvider`],
/// [`VerbsError::Permission`], [`VerbsError::NoDevice`].
pub fn devices() -> Result<Vec<Device>, VerbsError> {
    let list = List::new()?;
    list.as_slice().iter().map(|device| describe(*device)).collect()
}

/// The library's list, which keeps the devices in it.
struct List {
    first: *mut *mut sys::ibv_device,
    len: usize,
    verbs: &'static sys::Verbs,
}

impl List {
    fn new() -> Result<Self, VerbsError> {
        let verbs = &sys::libraries()?.verbs;
        let mut len = 0;
        // SAFETY: `len` is written before the call returns; the list is owned by `List` from here on. No device memory
        // is involved.
        let first = unsafe { verbs.ibv_get_device_list(&raw mut len) };
        if first.is_null() {
            let error = VerbsError::last("ibv_get_device_list");
            return Err(match error {
                VerbsError::Call { source, .. } if source.raw_os_error() == Some(libc::ENOSYS) => {
                    no_interface()
                }
                other => other,
            });
        }
        let list = Self { first, len: usize::try_from(len).unwrap_or(0), verbs };
        if list.len == 0 {
            return Err(why_none(Path::new("/sys/class")));
        }
        Ok(list)
    }

    fn as_slice(&self) -> &[*mut sys::ibv_device] {
        // SAFETY: the library made `len` pointers at `first`, which live until the list is freed in `drop`; nobody
        // writes to them.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: `first` came from ibv_get_device_list and is freed once. Devices that are open stay valid: an open
        // context holds its device.
        unsafe { self.verbs.ibv_free_device_list(self.first) };
    }
}

fn no_interface() -> VerbsError {
    VerbsError::NoModule { missing: "/sys/class/infiniband_verbs", modules: "ib_uverbs rdma_ucm" }
}

/// Why the library knows of no device, from the kernel's own list under `class`.
pub(super) fn why_none(class: &Path) -> VerbsError {
    let first = |of: &str| {
        let entries = fs::read_dir(class.join(of)).ok()?;
        let mut names: Vec<_> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| name != "abi_version");
        names.sort_unstable();
        names.into_iter().next()
    };
    match (first("infiniband"), first("infiniband_verbs")) {
        (Some(device), Some(_)) => VerbsError::NoProvider { device },
        (Some(_), None) => no_interface(),
        (None, _) => VerbsError::NoDevice,
    }
}

fn describe(device: *mut sys::ibv_device) -> Result<Device, VerbsError> {
    let name = name_of(device);
    let context = Context::open(device)?;
    let attributes = context.attributes()?;
    let ports =
        (1..=attributes.phys_port_cnt).map(|port| describe_port(&context, port)).collect::<Result<_, _>>()?;
    // SAFETY: the list keeps the device; the field is never written after the device was found.
    let transport = match unsafe { (*device).transport_type } {
        sys::IBV_TRANSPORT_IB => Transport::InfiniBand,
        sys::IBV_TRANSPORT_IWARP => Transport::Iwarp,
        _ => Transport::Other,
    };
    Ok(Device {
        driver: driver_of(&name),
        name,
        transport,
        guid: u64::from_be(attributes.node_guid),
        limits: context.limits(&attributes),
        ports,
    })
}

/// The kernel's driver. A software device has none of its own, but names the interface it stands on.
fn driver_of(name: &str) -> String {
    let class = Path::new("/sys/class/infiniband").join(name);
    let module = fs::read_link(class.join("device/driver/module"))
        .or_else(|_| fs::read_link(class.join("device/driver")));
    match module.ok().and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned())) {
        Some(driver) => driver,
        None if class.join("parent").exists() => "rdma_rxe".to_owned(),
        None => "unknown".to_owned(),
    }
}

fn mtu_len(mtu: u32) -> u32 {
    // 1 is 256 and each further one the double (InfiniBand specification, path MTU).
    if (sys::IBV_MTU_256..=sys::IBV_MTU_4096).contains(&mtu) { 128 << mtu } else { 0 }
}

fn describe_port(context: &Context, number: u8) -> Result<Port, VerbsError> {
    let attributes = context.port(number)?;
    let state = match attributes.state {
        sys::IBV_PORT_DOWN => PortState::Down,
        sys::IBV_PORT_INIT | sys::IBV_PORT_ARMED => PortState::Starting,
        sys::IBV_PORT_ACTIVE | sys::IBV_PORT_ACTIVE_DEFER => PortState::Active,
        _ => PortState::Unknown,
    };
    let link_layer = match attributes.link_layer {
        sys::IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
        sys::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
        _ => LinkLayer::Unspecified,
    };
    let entries = context.gids()?;
    let gids = entries.iter().filter(|entry| entry.port_num == u32::from(number)).map(|entry| {
        let kind = match entry.gid_type {
            sys::IBV_GID_TYPE_ROCE_V1 => GidKind::RoceV1,
            sys::IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
            _ => GidKind::InfiniBand,
        };
        let netdev = interface_name(entry.ndev_ifindex);
        Gid { index: entry.gid_index, kind, address: Ipv6Addr::from(entry.gid.raw), netdev }
    });
    Ok(Port {
        number,
        state,
        link_layer,
        mtu: mtu_len(attributes.active_mtu),
        mtu_max: mtu_len(attributes.max_mtu),
        message_len_max: attributes.max_msg_sz,
        gids: gids.collect(),
    })
}

fn interface_name(index: u32) -> Option<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: `name` has the IF_NAMESIZE bytes the call may write, terminating zero included.
    let found = unsafe { !libc::if_indextoname(index, name.as_mut_ptr()).is_null() };
    found.then(|| text(&name))
}
