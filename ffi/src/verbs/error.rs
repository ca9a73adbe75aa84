//! What can be wrong with RDMA on this machine, with one device or one connection, and what to do about it.
//!
//! Most machines that this program starts on have no RDMA device; some lack only a package, a module or a limit. Each
//! case has a kind of its own, so that `doctor` and the choice of a link can tell them apart.

use std::io;
use std::net::{IpAddr, SocketAddr};

/// Why something of RDMA did not work.
#[derive(Debug, thiserror::Error)]
pub enum VerbsError {
    /// A library that is loaded when first needed is not there.
    #[error(
        "{library} cannot be loaded: install the Debian packages {packages} (on other systems, the libraries of rdma-core)"
    )]
    NoLibrary {
        /// File name of it.
        library: &'static str,
        /// What to install.
        packages: &'static str,
    },
    /// A library is there and cannot be used: it is too old to have what we call, for another machine, or lacks something
    /// itself.
    #[error(
        "{library} is there but cannot be used ({cause}): install or upgrade the Debian package {package}; version 32 is \
         enough (on other systems, the libraries of rdma-core 32 or newer)"
    )]
    BadLibrary {
        /// File name of it.
        library: &'static str,
        /// Where it comes from.
        package: &'static str,
        /// What is wrong with it.
        cause: String,
    },
    /// The kernel's part is not loaded.
    #[error("the kernel's RDMA interface is not there ({missing}): modprobe {modules}")]
    NoModule {
        /// What was looked for.
        missing: &'static str,
        /// What to load.
        modules: &'static str,
    },
    /// The kernel has a device for which no library is installed.
    #[error("RDMA device {device} has no user-space driver: install the Debian package ibverbs-providers")]
    NoProvider {
        /// The kernel's name of it.
        device: String,
    },
    /// The device files cannot be opened.
    #[error(
        "{path} may not be opened: run as root, or let the user read and write /dev/infiniband (udev rule)"
    )]
    Permission {
        /// Which.
        path: String,
    },
    /// There is nothing to work with.
    #[error(
        "no RDMA device; on any network card a software one will do: costandby soft-roce up NETDEV \
         (that is: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NETDEV)"
    )]
    NoDevice,
    /// The address is of a network card without RDMA.
    #[error("no RDMA device has the address {address}: see `costandby doctor` for those that have one")]
    NoDeviceAt {
        /// Which.
        address: IpAddr,
    },
    /// Memory for the device may not be pinned.
    #[error(
        "{asked} bytes cannot be pinned for the device; the limit on locked memory is {limit}, {pinned} bytes are \
         pinned already: raise it (LimitMEMLOCK=infinity in the systemd unit, `memlock` in /etc/security/limits.conf, \
         ulimit -l) or give CAP_IPC_LOCK"
    )]
    Memlock {
        /// Bytes that were to be registered.
        asked: usize,
        /// What the process may lock.
        limit: Memlock,
        /// What it has pinned.
        pinned: u64,
    },
    /// Pages of the memory are being given back (a trim under way).
    #[error("pages of this memory are being dropped: try again")]
    Busy,
    /// Nobody listens there.
    #[error("{peer} refused the RDMA connection: nobody listens there")]
    Refused {
        /// Who.
        peer: SocketAddr,
    },
    /// The peer's program turned the connection down.
    #[error(
        "{peer} rejected the RDMA connection (reason {reason}; 28 is its program's word: wrong or outdated secret)"
    )]
    Rejected {
        /// Who.
        peer: SocketAddr,
        /// `IB_CM_REJ_*`; 28 is a program's own refusal.
        reason: i32,
    },
    /// There is no way to the peer, or no answer from it.
    #[error("{peer} cannot be reached by RDMA ({step}: {cause})")]
    Unreachable {
        /// Who.
        peer: SocketAddr,
        /// How far it came.
        step: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The deadline passed.
    #[error("time is up while {step}")]
    Timeout {
        /// What was being done.
        step: &'static str,
    },
    /// The peer went away while the connection was being made.
    #[error("the connection ended while {step}")]
    Closed {
        /// What was being done.
        step: &'static str,
    },
    /// The device does not have what a connection needs.
    #[error("RDMA device {device} offers {found} {what}, {needed} are needed")]
    Limit {
        /// Which device.
        device: String,
        /// Of what.
        what: &'static str,
        /// As the device says.
        found: u64,
        /// As asked.
        needed: u64,
    },
    /// Memory is registered with another device than the one that the connection goes over.
    #[error(
        "the address is not on the RDMA device {device} any more: it is tried again with the device that has it"
    )]
    OtherDevice {
        /// Which one has the memory.
        device: String,
    },
    /// The device was taken away.
    #[error("the RDMA device was removed")]
    Removed,
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// A limit on locked memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memlock(
    /// `None` where there is none.
    pub Option<u64>,
);

impl std::fmt::Display for Memlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{bytes} bytes"),
            None => f.write_str("unlimited"),
        }
    }
}

impl VerbsError {
    /// The call's error as `errno` has it.
    pub(super) fn last(call: &'static str) -> Self {
        Self::of(call, io::Error::last_os_error())
    }

    /// The call's error as it returned it.
    pub(super) fn code(call: &'static str, errno: i32) -> Self {
        Self::of(call, io::Error::from_raw_os_error(errno))
    }

    pub(super) fn of(call: &'static str, source: io::Error) -> Self {
        Self::Call { call, source }
    }

    pub(super) fn no_library(library: &'static str) -> Self {
        Self::NoLibrary { library, packages: "libibverbs1 librdmacm1 ibverbs-providers" }
    }

    /// The same as the system's error kinds, for who only tells those apart.
    #[must_use]
    pub fn io_kind(&self) -> io::ErrorKind {
        match self {
            Self::NoLibrary { .. }
            | Self::BadLibrary { .. }
            | Self::NoModule { .. }
            | Self::NoProvider { .. } => io::ErrorKind::Unsupported,
            Self::NoDevice | Self::NoDeviceAt { .. } => io::ErrorKind::NotFound,
            Self::Permission { .. } => io::ErrorKind::PermissionDenied,
            Self::Memlock { .. } => io::ErrorKind::OutOfMemory,
            Self::Busy => io::ErrorKind::WouldBlock,
            Self::Refused { .. } | Self::Rejected { .. } => io::ErrorKind::ConnectionRefused,
            Self::Unreachable { .. } => io::ErrorKind::HostUnreachable,
            Self::Timeout { .. } => io::ErrorKind::TimedOut,
            Self::Closed { .. } | Self::OtherDevice { .. } | Self::Removed => io::ErrorKind::ConnectionReset,
            Self::Limit { .. } => io::ErrorKind::InvalidInput,
            Self::Call { source, .. } => source.kind(),
        }
    }
}

impl From<VerbsError> for io::Error {
    fn from(error: VerbsError) -> Self {
        match error {
            VerbsError::Call { source, .. } => source,
            other => Self::new(other.io_kind(), other),
        }
    }
}

/// The limit on what this process may lock, and what it has pinned for devices.
#[must_use]
pub fn memlock() -> (Memlock, u64) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    // A process that may lock without limit is not asked for the number.
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let capabilities = field("CapEff:").and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
    let limit = if capabilities & CAP_IPC_LOCK == 0 { limit } else { None };
    let pinned =
        field("VmPin:").and_then(|text| text.strip_suffix(" kB")).and_then(|text| text.trim().parse().ok());
    (Memlock(limit), pinned.map_or(0, |kib: u64| kib << 10))
}

/// Bit of the capability that lifts the limit (`linux/capability.h`).
const CAP_IPC_LOCK: u64 = 1 << 14;

/// The standard's word for a completion's status.
#[must_use]
pub fn status_text(status: u32) -> &'static str {
    const TEXTS: [&str; 22] = [
        "success",
        "message longer than its buffer",
        "local queue pair operation error",
        "local EE context operation error",
        "local protection error: memory not registered",
        "flushed",
        "memory window bind error",
        "bad response",
        "local access error",
        "the peer calls the request invalid",
        "the peer denies access: wrong key or outside its ring",
        "the peer could not carry it out",
        "the peer does not answer",
        "the peer has no receive posted",
        "RDD violation",
        "invalid RD request",
        "aborted by the peer",
        "invalid EE context number",
        "invalid EE context state",
        "fatal error",
        "response timeout",
        "general error",
    ];
    usize::try_from(status).ok().and_then(|at| TEXTS.get(at)).copied().unwrap_or("unknown status")
}

/// Why a queue pair is of no use any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Failure {
    /// The peer closed, or its kernel for it, or we did.
    #[error("the connection was closed")]
    Closed,
    /// A work request failed.
    #[error("work request failed: {} (status {status})", status_text(*status))]
    WorkRequest {
        /// `ibv_wc_status`.
        status: u32,
    },
    /// The device, its port or the queue pair itself.
    #[error("RDMA device: {0}")]
    Device(&'static str),
    /// A call failed.
    #[error("{call} failed (errno {errno})")]
    Call {
        /// Which.
        call: &'static str,
        /// With what.
        errno: i32,
    },
}

impl From<VerbsError> for Failure {
    fn from(error: VerbsError) -> Self {
        match error {
            VerbsError::Call { call, source } => {
                Self::Call { call, errno: source.raw_os_error().unwrap_or(0) }
            }
            _ => Self::Device("it does not answer"),
        }
    }
}
