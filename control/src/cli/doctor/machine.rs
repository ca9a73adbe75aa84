//! What the machine can do: kernel, processor, memory, limits, devices. Reads /proc, /sys and the limits of this process.
//!
//! Reading is apart from judging: each judgement is a function of plain values, so tests cover machines we do not have.

use super::Check;
use crate::config::quantity::display_size;
use crate::descriptors::{self, RECOMMENDED};
use std::path::Path;

/// Memory a node wants for itself besides its disks' pages: one ring a volume, and the process.
const MEMORY_LEN_MIN: u64 = 512 << 20;

/// Descriptors that a hundred volumes are served well with.
const OPEN_FILES_MIN: u64 = 4096;

pub(super) fn checks() -> Vec<Check> {
    let release = read("/proc/sys/kernel/osrelease");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let open_files = descriptors::limit();
    vec![
        kernel(&release),
        cores_check(cores),
        memory(field_kib("/proc/meminfo", "MemTotal:"), field_kib("/proc/meminfo", "MemAvailable:")),
        crc32c(has_crc32c()),
        open_files_check(open_files),
        hugepages(number("/proc/sys/vm/nr_hugepages")),
        somaxconn(number("/proc/sys/net/core/somaxconn")),
        socket_buffers(number("/proc/sys/net/core/rmem_max"), number("/proc/sys/net/core/wmem_max")),
        module("nbd", "nbd-client to turn an export into a kernel disk", &release, "/dev/nbd0"),
        module("ublk_drv", "a later version's kernel block devices", &release, "/dev/ublk-control"),
        io_uring(&release, number("/proc/sys/kernel/io_uring_disabled")),
    ]
}

pub(super) fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn number(path: &str) -> Option<u64> {
    read(path).parse().ok()
}

/// A line such as `MemTotal:  8048124 kB`, in bytes.
fn field_kib(path: &str, name: &str) -> Option<u64> {
    let text = read(path);
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(super) fn kernel(release: &str) -> Check {
    match version(release) {
        Some(found) if found >= (5, 10) => Check::ok("kernel", format!("Linux {release}")),
        Some(_) => Check::warn(
            "kernel",
            format!("Linux {release} is older than any this was tested on: use 5.10 or newer"),
        ),
        None => Check::warn("kernel", "its version cannot be read: is /proc mounted?"),
    }
}

pub(super) fn cores_check(cores: usize) -> Check {
    match cores {
        1 => Check::warn(
            "cores",
            "1: client and daemon take turns on it; use poll = \"event\" or \"adaptive\"",
        ),
        2 | 3 => Check::ok("cores", format!("{cores}; poll = \"busy\" would keep one of them to itself")),
        _ => Check::ok("cores", cores.to_string()),
    }
}

pub(super) fn memory(total: Option<u64>, available: Option<u64>) -> Check {
    let (Some(total), Some(available)) = (total, available) else {
        return Check::warn("memory", "its size cannot be read: is /proc mounted?");
    };
    let text = format!("{}, {} available", display_size(total), display_size(available));
    if available < MEMORY_LEN_MIN {
        let wanted = display_size(MEMORY_LEN_MIN);
        return Check::warn(
            "memory",
            format!("{text}: below {wanted} the disks' pages leave it at once; add some"),
        );
    }
    Check::ok("memory", text)
}

pub(super) fn memory_for(what: &str, size: u64) -> Option<Check> {
    let available = field_kib("/proc/meminfo", "MemAvailable:")?;
    (available < size).then(|| {
        let (size, available) = (display_size(size), display_size(available));
        Check::fail(
            what,
            format!("{size} of memory wanted, {available} available: make it smaller or use a file"),
        )
    })
}

#[cfg(target_arch = "x86_64")]
fn has_crc32c() -> bool {
    std::arch::is_x86_feature_detected!("sse4.2")
}

#[cfg(target_arch = "aarch64")]
fn has_crc32c() -> bool {
    std::arch::is_aarch64_feature_detected!("crc")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_crc32c() -> bool {
    false
}

pub(super) fn crc32c(has: bool) -> Check {
    if has {
        Check::ok("crc32c", "computed by the processor")
    } else {
        let text = "no instruction for it: checksums cost several times more; on a virtual machine pass the host's processor through";
        Check::warn("crc32c", text)
    }
}

pub(super) fn open_files_check(limit: u64) -> Check {
    let shell = "a daemon that is started from here may have";
    if limit < OPEN_FILES_MIN {
        let text = format!(
            "{limit} descriptors, which {shell}: five for each volume, twelve with RDMA, and one for each NBD connection; \
             use `ulimit -n {RECOMMENDED}` as root, or LimitNOFILE={RECOMMENDED} in the unit"
        );
        return Check::warn("open files", text);
    }
    Check::ok(
        "open files",
        format!("{limit} descriptors, which {shell}; a unit has its own limit, LimitNOFILE"),
    )
}

pub(super) fn hugepages(count: Option<u64>) -> Check {
    match count {
        Some(count) if count > 0 => Check::ok("huge pages", format!("{count} reserved")),
        _ => Check::ok("huge pages", "none reserved; the rings of links would take free ones"),
    }
}

pub(super) fn somaxconn(value: Option<u64>) -> Check {
    match value {
        Some(value) if value < 128 => {
            let text = format!(
                "{value}: many clients connecting at once are turned away; `sysctl net.core.somaxconn=4096`"
            );
            Check::warn("somaxconn", text)
        }
        Some(value) => Check::ok("somaxconn", value.to_string()),
        None => Check::warn("somaxconn", "cannot be read: is /proc mounted?"),
    }
}

pub(super) fn socket_buffers(receive: Option<u64>, send: Option<u64>) -> Check {
    let (Some(receive), Some(send)) = (receive, send) else {
        // Network namespaces do not show them; the host's values hold.
        return Check::ok("socket buffers", "set by the host of this network namespace");
    };
    let text = format!("receive {}, send {}", display_size(receive), display_size(send));
    // The link leaves buffer sizes to the kernel's own tuning, which these bound only where a program sets them.
    Check::ok("socket buffers", format!("at most {text} where a program asks; TCP tunes its own"))
}

pub(super) fn module(name: &str, use_for: &str, release: &str, device: &str) -> Check {
    if Path::new(device).exists() {
        return Check::ok(name, format!("there, for {use_for}"));
    }
    let file = format!("/{name}.ko");
    let known = ["modules.dep", "modules.builtin"].iter().any(|list| {
        let list = std::fs::read_to_string(format!("/lib/modules/{release}/{list}")).unwrap_or_default();
        list.lines().any(|line| line.split(':').next().unwrap_or_default().contains(&file))
    });
    if known {
        Check::ok(name, format!("not loaded; `modprobe {name}` for {use_for}"))
    } else {
        Check::ok(name, format!("this kernel has none; needed only for {use_for}"))
    }
}

pub(super) fn io_uring(release: &str, disabled: Option<u64>) -> Check {
    let text = match (version(release), disabled) {
        (_, Some(2)) => "switched off by kernel.io_uring_disabled",
        (_, Some(1)) => "for the group of kernel.io_uring_group only",
        (Some(found), _) if found >= (5, 1) => "there",
        _ => "this kernel has none",
    };
    Check::ok("io_uring", format!("{text}; not used by this version"))
}

pub(super) fn free_bytes(directory: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(directory).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

/// The file system a path is on, by its longest mount point, for people.
pub(super) fn file_system(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mounts = read("/proc/self/mounts");
    let found = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .filter(|(point, _)| path.starts_with(point))
        .max_by_key(|(point, _)| point.len());
    found.map_or_else(|| "an unknown file system".to_owned(), |(_, kind)| kind.to_owned())
}
