//! How much of the disks may be registered: what the operator says, or what the machine can spare.
//!
//! Registered pages are locked in memory. A process without CAP_IPC_LOCK may lock RLIMIT_MEMLOCK, and what a link cannot
//! do without (its ring, the bounce buffer) comes out of the same purse, so that is set aside first, twice: a link that is made
//! anew may meet the one before it still being taken apart.

use crate::limits::{RDMA_LINK_LOCKED_LEN, RDMA_MEMORY_SHARE};

/// `CAP_IPC_LOCK` in capabilities(7).
const CAP_IPC_LOCK: u32 = 14;

/// What the machine has, and what of it we may lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes this process may lock; `None` where nothing limits it.
    pub lockable: Option<u64>,
}

impl Machine {
    /// As it is now. What cannot be found out counts as none, or as unlimited where the kernel will tell in time.
    #[must_use]
    pub fn here() -> Self {
        let memory = std::fs::read_to_string("/proc/meminfo").ok();
        let status = std::fs::read_to_string("/proc/self/status").ok();
        let memory = memory.as_deref().and_then(memory_of).unwrap_or(0);
        let privileged = status.as_deref().and_then(capabilities_of).unwrap_or(0) >> CAP_IPC_LOCK & 1 == 1;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        Self { memory, lockable: limit.filter(|_| !privileged) }
    }
}

fn memory_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn capabilities_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Bytes of one disk of `disk_len` bytes that its link may register, on a node with `links` of them. `configured` is for
/// all together; by default it is a share of the memory ([`RDMA_MEMORY_SHARE`]). In both cases no more than may be
/// locked, and than leaves the machine a quarter of its memory.
#[must_use]
pub fn disk_memory(configured: Option<u64>, machine: &Machine, links: usize, disk_len: u64) -> u64 {
    let links = links.max(1) as u64;
    let wanted = configured.unwrap_or(machine.memory / RDMA_MEMORY_SHARE);
    let set_aside = (2 * RDMA_LINK_LOCKED_LEN).saturating_mul(links);
    let lockable = machine.lockable.map_or(u64::MAX, |limit| limit.saturating_sub(set_aside));
    let spared = if machine.memory == 0 { u64::MAX } else { machine.memory / 4 * 3 };
    (wanted.min(lockable).min(spared) / links).min(disk_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_machine_tells_what_it_has() {
        assert_eq!(memory_of("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
        assert_eq!(memory_of("MemFree: 1 kB\n"), None);
        assert_eq!(memory_of("MemTotal: many\n"), None);
        assert_eq!(capabilities_of("CapPrm:\t0\nCapEff:\t0000000000004000\n"), Some(1 << CAP_IPC_LOCK));
        assert_eq!(capabilities_of("CapEff:\tnone"), None);
        assert!(Machine::here().memory > 16 << 20, "{:?}", Machine::here());
    }

    #[test]
    fn no_more_is_registered_than_may_be_locked() {
        let free = Machine { memory: 64 * GIB, lockable: None };
        assert_eq!(disk_memory(None, &free, 1, 1 << 40), 64 * GIB / RDMA_MEMORY_SHARE);
        assert_eq!(disk_memory(None, &free, 4, 1 << 40), 16 * GIB / RDMA_MEMORY_SHARE);
        assert_eq!(disk_memory(None, &free, 1, GIB), GIB);
        assert_eq!(disk_memory(Some(256 << 20), &free, 2, GIB), 128 << 20);
        assert_eq!(disk_memory(Some(0), &free, 1, GIB), 0);
        assert_eq!(disk_memory(Some(1 << 40), &free, 2, 1 << 40), 24 * GIB);
        let unknown = Machine { memory: 0, lockable: None };
        assert_eq!(disk_memory(None, &unknown, 1, GIB), 0);
        assert_eq!(disk_memory(Some(GIB), &unknown, 1, GIB), GIB);
        let limited = Machine { memory: 64 * GIB, lockable: Some(2 * GIB) };
        assert_eq!(disk_memory(None, &limited, 1, 1 << 40), 2 * GIB - 2 * RDMA_LINK_LOCKED_LEN);
        assert_eq!(disk_memory(Some(8 * GIB), &limited, 2, 1 << 40), GIB - 2 * RDMA_LINK_LOCKED_LEN);
        let poor = Machine { memory: 64 * GIB, lockable: Some(8 << 20) };
        assert_eq!(disk_memory(Some(8 * GIB), &poor, 1, 1 << 40), 0);
        assert_eq!(disk_memory(None, &free, 0, GIB), GIB);
    }
}
