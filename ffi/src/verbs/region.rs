//! Registered memory: bytes of a mapping that a device may read from, or a peer write into.
//!
//! Invariant: a region deregisters before its mapping can be unmapped and before its pages may be dropped from the file
//! underneath, and deregistering returns only when the device has stopped using the memory. A device that refuses to let
//! go costs the mapping's address space, never its safety.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::context::Domain;
use super::error::{Memlock, VerbsError, memlock};
use super::sys;
use crate::mapping::{Pin, PinBusy, Span};

/// Registered bytes of a mapping. Cheap to clone; the last clone deregisters (a system call that unpins the pages).
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
}

struct Inner {
    raw: *mut sys::ibv_mr,
    local_key: u32,
    remote_key: u32,
    span: Span,
    /// Keeps the memory mapped and its pages in place; leaked should the device not let go of them.
    pin: ManuallyDrop<Pin>,
    domain: Domain,
}

// SAFETY: the pointer is handed to ibv_dereg_mr alone, once, from whichever thread drops the last clone; the library
// allows that. The other fields are Send and Sync themselves.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing is changed through a shared reference.
unsafe impl Sync for Inner {}

impl Region {
    /// Registers `span` to be sent from: the device may read it, nobody may write it. Blocks while pages are brought in
    /// and pinned (a sparse file's are allocated).
    ///
    /// # Errors
    /// [`VerbsError::Memlock`] over the limit on locked memory, [`VerbsError::Busy`] while pages of it are being dropped,
    /// [`VerbsError::Call`] otherwise.
    pub fn source(domain: &Domain, span: &Span) -> Result<Self, VerbsError> {
        Self::register(domain, span, 0)
    }

    /// Registers `span` for the peer to write into, and the device on its behalf. Memory-backed mappings only: kernels
    /// refuse file-backed ones.
    ///
    /// # Errors
    /// As [`Region::source`].
    pub fn ring(domain: &Domain, span: &Span) -> Result<Self, VerbsError> {
        Self::register(domain, span, sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE)
    }

    /// Registers `span` for the device to place messages in.
    pub(super) fn arena(domain: &Domain, span: &Span) -> Result<Self, VerbsError> {
        Self::register(domain, span, sys::IBV_ACCESS_LOCAL_WRITE)
    }

    fn register(domain: &Domain, span: &Span, access: u32) -> Result<Self, VerbsError> {
        let access = i32::try_from(access).expect("three low bits");
        // Before the device gets the pages, and until it has given them back, nobody punches holes there.
        let pin = span.mapping().pin(span.offset(), span.len()).map_err(|busy| match busy {
            PinBusy::Dropping { .. } => VerbsError::Busy,
            PinBusy::Full => VerbsError::Call { call: "pinning", source: busy.into() },
        })?;
        let verbs = domain.context().verbs();
        // SAFETY: the span's bytes stay mapped until the region is deregistered, by the pin that `Inner` holds. No
        // reference to them exists, so the device may read and write them from now on until then.
        let raw = unsafe { verbs.ibv_reg_mr(domain.as_ptr(), span.as_ptr().cast(), span.len(), access) };
        if raw.is_null() {
            return Err(refused(span.len()));
        }
        // SAFETY: the call returned a region, whose keys are constant.
        let (local_key, remote_key) = unsafe { ((*raw).lkey, (*raw).rkey) };
        let (span, pin, domain) = (span.clone(), ManuallyDrop::new(pin), domain.clone());
        let inner = Inner { raw, local_key, remote_key, span, pin, domain };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What is registered.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.inner.span
    }

    /// Where it starts, as the peer has to name it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.inner.span.as_ptr().addr() as u64
    }

    /// What the peer has to show to write here.
    #[must_use]
    pub fn remote_key(&self) -> u32 {
        self.inner.remote_key
    }

    pub(super) fn local_key(&self) -> u32 {
        self.inner.local_key
    }

    pub(super) fn domain(&self) -> &Domain {
        &self.inner.domain
    }
}

fn refused(asked: usize) -> VerbsError {
    let error = std::io::Error::last_os_error();
    let (limit, pinned) = memlock();
    match (error.raw_os_error(), limit) {
        (Some(libc::ENOMEM), Memlock(Some(bytes))) if pinned.saturating_add(asked as u64) > bytes => {
            VerbsError::Memlock { asked, limit, pinned }
        }
        _ => VerbsError::of("ibv_reg_mr", error),
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: registered once and deregistered once. When the call returns 0 the device uses the memory no more:
        // requests that still name it complete in error.
        let code = unsafe { self.domain.context().verbs().ibv_dereg_mr(self.raw) };
        if code == 0 {
            // SAFETY: dropped here and nowhere else, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.pin) };
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("span", &self.inner.span).finish_non_exhaustive()
    }
}
