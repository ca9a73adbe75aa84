//! Where the bytes of a change are sent from: registered sections of the disk, or the bounce buffer.
//!
//! Stands between the link, which posts, and the registrar, which takes milliseconds for a section. Nothing waits for
//! it: what is not registered (yet, or any more, or cannot be) is copied through the bounce buffer ([`super::bounce`]), which was
//! registered before the link was made. Which sections are worth their registration is decided in [`cache`], and carried
//! out by a thread of its own in [`registry`]; how much may be registered is worked out in [`memory`].
//!
//! Invariants:
//! - Per write from a registered section: no copy, allocation, lock or system call. While a registration is under way
//!   there is one look at a channel besides.
//! - Sections are parts of *one* mapping, the first that a client's write comes from. Others' bytes go through the bounce buffer.
//! - Of a mapping that is poisoned nothing is sent where it stands: the pages that a device holds of it may be others than
//!   those that the CPU sees. What is not lost goes through the bounce buffer, what is lost does not go.
//! - Nothing is registered of a mapping whose file was replaced by memory, and nothing sent by what was before.
//!
//! Failures survived: a registration that fails, for want of locked memory, of pages, or because a trim is dropping
//! them: the section goes through the bounce buffer and is tried again much later, and want of memory lowers the limit.

use super::bounce::{self, BounceBuffer};
use super::endpoint::{Piece, Registrar};
use costandby_ffi::mapping::{Mapping, Span};
use std::io;
use std::sync::Arc;

mod cache;
mod memory;
mod registry;

use cache::Cache;
pub use memory::{Machine, disk_memory};
use registry::Registry;

/// The next bytes of a change, ready to be named by a work request.
#[derive(Debug)]
pub enum Source<'a, Region> {
    /// Where they are: in a registered section of the disk.
    Direct(Piece<'a, Region>),
    /// A copy, in the bounce buffer.
    Bounced(Piece<'a, Region>),
    /// Neither now: ask again after [`Registrations::done_up_to`] was told of more. The work requests under way must have
    /// been signalled up to the last for that to come.
    Wait,
    /// The bytes were lost with the disk: zeroes stand in for them, which must not be sent.
    Medium,
}

/// What status and doctor show.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RegistrationCounters {
    /// Sections registered now.
    pub sections: u64,
    /// Bytes of the disk registered, or being registered, now.
    pub registered_bytes: u64,
    /// Bytes that may be registered: the configured limit, or less where the system refused more.
    pub limit_bytes: u64,
    /// Bytes that were copied through the bounce buffer.
    pub bounced_bytes: u64,
    /// Sections given up for others.
    pub evictions: u64,
    /// Registrations that failed.
    pub failures: u64,
}

/// The registrations of one link, and its bounce buffer.
#[derive(Debug)]
pub struct Registrations<R: Registrar> {
    bounce: BounceBuffer<R::Region>,
    registry: Registry<R::Region>,
    limit_bytes: u64,
    disk: Option<Disk<R::Region>>,
}

/// The mapping that is registered from.
#[derive(Debug)]
struct Disk<Region> {
    mapping: Arc<Mapping>,
    cache: Cache<Region>,
    /// A registration is under way.
    pending: bool,
}

impl<R: Registrar> Registrations<R> {
    /// Registers a bounce buffer, and starts the thread that registers sections: at most `limit_bytes` of the disk. Blocks while
    /// the bounce buffer's memory is brought in.
    ///
    /// # Errors
    /// When the bounce buffer cannot be registered, or the system gives no thread.
    pub fn new(registrar: &R, limit_bytes: u64) -> io::Result<Self> {
        Self::with_bounce(registrar, bounce::make(registrar)?, limit_bytes)
    }

    /// The same over memory for the bounce buffer that is registered already. Does not block.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn with_bounce(
        registrar: &R,
        bounce: (Span, R::Region),
        limit_bytes: u64,
    ) -> io::Result<Self> {
        let registry = Registry::start(registrar.clone())?;
        Ok(Self { bounce: BounceBuffer::new(bounce), registry, limit_bytes, disk: None })
    }

    /// Where to send `span`'s bytes from `from` on, at most `len_max` of them and perhaps fewer, with the work request
    /// `id` (counted from 1) that is posted next. `resync`: a step of the background copy, for which nothing is registered.
    ///
    /// # Panics
    /// When nothing is left of the span or `len_max` is 0, or when ids go backwards.
    pub fn source(
        &mut self,
        span: &Span,
        from: usize,
        len_max: usize,
        resync: bool,
        id: u64,
    ) -> Source<'_, R::Region> {
        let mut len = (span.len() - from).min(len_max);
        assert!(len > 0, "nothing to send");
        if span.is_lost() {
            return Source::Medium;
        }
        let mapping = span.mapping();
        let direct = !mapping.is_replaced() && !mapping.is_poisoned();
        if mapping.is_replaced() {
            self.forget(mapping);
        } else if direct && self.disk.is_none() && !resync {
            self.adopt(mapping);
        }
        if direct && let Some(disk) = self.disk.as_mut().filter(|disk| Arc::ptr_eq(&disk.mapping, mapping)) {
            if disk.pending {
                disk.settle(self.registry.poll());
            }
            let at = span.offset() + from;
            let section = disk.cache.section_of(at);
            len = len.min(disk.cache.bytes(section).end - at);
            let slot = disk.cache.touch(section, !resync, id);
            if slot.is_none() && !resync {
                disk.ask(section, &self.registry);
            }
            if let Some(slot) = slot {
                let disk = self.disk.as_ref().expect("looked up above");
                let (region, start) = disk.cache.region(slot);
                return Source::Direct(Piece { region, offset: at - start, len });
            }
        }
        match self.bounce.copy(&span.sub(from, len), id) {
            // The copy may have been what met the failing medium.
            Some(_) if span.is_lost() => Source::Medium,
            Some(piece) => Source::Bounced(piece),
            None => Source::Wait,
        }
    }

    fn adopt(&mut self, mapping: &Arc<Mapping>) {
        let limit = usize::try_from(self.limit_bytes).unwrap_or(usize::MAX);
        let cache = Cache::new(mapping.len(), limit);
        self.disk = Some(Disk { mapping: Arc::clone(mapping), cache, pending: false });
    }

    /// Ends what is registered of the mapping, whose pages are others now, as soon as none of it is in the making.
    fn forget(&mut self, mapping: &Arc<Mapping>) {
        let Some(disk) = self.disk.as_mut().filter(|disk| Arc::ptr_eq(&disk.mapping, mapping)) else {
            return;
        };
        if disk.pending {
            disk.settle(self.registry.poll());
        }
        if !disk.pending {
            self.registry.end(disk.cache.take_all());
            self.disk = None;
        }
    }

    /// The work requests up to `id` are done: what they named may be used again.
    pub fn done_up_to(&mut self, id: u64) {
        self.bounce.done_up_to(id);
        if let Some(disk) = &mut self.disk {
            disk.cache.done_up_to(id);
        }
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> RegistrationCounters {
        let bounced = RegistrationCounters {
            limit_bytes: self.limit_bytes,
            bounced_bytes: self.bounce.bounced_bytes(),
            ..RegistrationCounters::default()
        };
        let Some(Disk { cache, .. }) = &self.disk else { return bounced };
        RegistrationCounters {
            sections: cache.sections() as u64,
            registered_bytes: cache.registered_bytes() as u64,
            limit_bytes: cache.limit() as u64,
            evictions: cache.evictions(),
            failures: cache.failures(),
            ..bounced
        }
    }
}

impl<Region: Send + 'static> Disk<Region> {
    /// Takes in what a registration came to, if it has come.
    fn settle(&mut self, result: Option<io::Result<Region>>) {
        let Some(result) = result else { return };
        self.pending = false;
        if let Err(error) = &result {
            tracing::debug!(%error, "a section of the disk cannot be registered; it goes through the bounce buffer");
        }
        self.cache.registered(result);
    }

    /// Has the section registered, if it is worth it.
    #[cold]
    fn ask(&mut self, section: u32, registry: &Registry<Region>) {
        let Some(end) = self.cache.wants(section) else { return };
        let bytes = self.cache.bytes(section);
        registry.register(end, self.mapping.span(bytes.start, bytes.len()));
        self.pending = true;
    }
}

impl<R: Registrar> Drop for Registrations<R> {
    /// Leaves the registrations to the thread: ending many takes long, and the reactor has a promotion to see to.
    fn drop(&mut self) {
        if let Some(disk) = &mut self.disk {
            self.registry.end(disk.cache.take_all());
        }
    }
}

#[cfg(test)]
mod tests;
