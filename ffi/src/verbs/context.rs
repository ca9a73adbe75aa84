//! An open device and a protection domain on it.
//!
//! Every connection opens the device for itself. So its asynchronous events (queue pair in trouble, port down, device
//! gone) arrive on a descriptor of its own and need no sorting out among connections and threads, and closing the
//! context is the last of many steps that give back what the connection had. A protection domain holds one
//! connection's regions and its queue pair and nothing else: a key of one is void on every other.

use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::device::{Limits, name_of};
use super::error::VerbsError;
use super::sys;

/// Addresses of a device that are looked at: more than any port table shows in use at a time.
const GIDS_MAX: usize = 256;

/// An open device.
pub(super) struct Context {
    raw: *mut sys::ibv_context,
    verbs: &'static sys::Verbs,
}

// SAFETY: the library's calls on a context may come from any thread at any time (ibv_open_device(3), libibverbs is
// thread-safe); the fields read here are constant. Who calls `async_event` takes `&self` and the kernel serialises it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens `device`, which the caller's list or connection keeps valid.
    pub(super) fn open(device: *mut sys::ibv_device) -> Result<Self, VerbsError> {
        let verbs = &sys::libraries()?.verbs;
        // SAFETY: the caller keeps `device` valid for the call; an open context keeps it from then on.
        let raw = unsafe { verbs.ibv_open_device(device) };
        if raw.is_null() {
            let error = std::io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => VerbsError::Permission { path: device_file(device) },
                Some(libc::ENOENT) => {
                    VerbsError::NoModule { missing: "/dev/infiniband/uverbs*", modules: "ib_uverbs" }
                }
                Some(libc::ENODEV | libc::ENXIO) => VerbsError::Removed,
                _ => VerbsError::of("ibv_open_device", error),
            });
        }
        let context = Self { raw, verbs };
        let events = context.events();
        // Events are looked for, never waited for.
        let flags = rustix::fs::fcntl_getfl(events).map_err(|e| VerbsError::of("fcntl", e.into()))?;
        rustix::fs::fcntl_setfl(events, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| VerbsError::of("fcntl", e.into()))?;
        Ok(context)
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_context {
        self.raw
    }

    /// The library's calls, which take [`Context::as_ptr`] and what is made on it.
    pub(super) fn verbs(&self) -> &'static sys::Verbs {
        self.verbs
    }

    pub(super) fn device_name(&self) -> String {
        // SAFETY: a context's device is set when it is opened and constant.
        name_of(unsafe { (*self.raw).device })
    }

    /// Readable when [`Context::next_event`] has something.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the context and is closed with it, which the borrow outlives not.
        unsafe { BorrowedFd::borrow_raw((*self.raw).async_fd) }
    }

    pub(super) fn attributes(&self) -> Result<sys::ibv_device_attr, VerbsError> {
        let mut attributes = MaybeUninit::zeroed();
        // SAFETY: the call writes at most the structure it is given.
        let code = unsafe { self.verbs.ibv_query_device(self.raw, attributes.as_mut_ptr()) };
        if code != 0 {
            return Err(VerbsError::code("ibv_query_device", code.abs()));
        }
        // SAFETY: a plain C structure for which zeroes are valid, filled by the call.
        Ok(unsafe { attributes.assume_init() })
    }

    pub(super) fn limits(&self, attributes: &sys::ibv_device_attr) -> Limits {
        let count = |number: i32| u32::try_from(number).unwrap_or(0);
        Limits {
            queue_pairs: count(attributes.max_qp),
            work_requests: count(attributes.max_qp_wr),
            pieces: count(attributes.max_sge),
            completions: count(attributes.max_cqe),
            regions: count(attributes.max_mr),
            region_len: attributes.max_mr_size,
        }
    }

    pub(super) fn port(&self, number: u8) -> Result<sys::ibv_port_attr, VerbsError> {
        let mut attributes = MaybeUninit::zeroed();
        // SAFETY: the call writes at most the structure it is given.
        let code = unsafe { self.verbs.ibv_query_port(self.raw, number, attributes.as_mut_ptr()) };
        if code != 0 {
            return Err(VerbsError::code("ibv_query_port", code.abs()));
        }
        // SAFETY: a plain C structure for which zeroes are valid, filled by the call.
        Ok(unsafe { attributes.assume_init() })
    }

    pub(super) fn gids(&self) -> Result<Vec<sys::ibv_gid_entry>, VerbsError> {
        const ENTRY_SIZE: usize = size_of::<sys::ibv_gid_entry>();
        let mut entries = Vec::with_capacity(GIDS_MAX);
        // SAFETY: room for GIDS_MAX entries was made and the call writes no more than it is told of.
        let found = unsafe {
            self.verbs._ibv_query_gid_table(self.raw, entries.as_mut_ptr(), GIDS_MAX, 0, ENTRY_SIZE)
        };
        match usize::try_from(found) {
            Ok(found) => {
                // SAFETY: the call has written as many entries as it returned, at most GIDS_MAX.
                unsafe { entries.set_len(found.min(GIDS_MAX)) };
                Ok(entries)
            }
            // A library or kernel too old for the call: the addresses are only shown, never needed.
            Err(_) => Ok(Vec::new()),
        }
    }

    /// The next asynchronous event that ends a connection on `port`, if there is one. Others are taken and forgotten.
    pub(super) fn next_event(&self, port: u8) -> Option<&'static str> {
        // SAFETY: zeroes are valid for this plain C structure.
        let mut event: sys::ibv_async_event = unsafe { std::mem::zeroed() };
        loop {
            // SAFETY: the call fills the structure; the descriptor does not block.
            let code = unsafe { self.verbs.ibv_get_async_event(self.raw, &raw mut event) };
            if code != 0 {
                return None;
            }
            // SAFETY: the event was just taken and is acknowledged once, at once, so no later destroy waits for it.
            // Every object it may name belongs to this context and is destroyed after this by who calls us.
            unsafe { self.verbs.ibv_ack_async_event(&raw mut event) };
            let fatal = match event.event_type {
                sys::IBV_EVENT_CQ_ERR => Some("the completion queue overran"),
                sys::IBV_EVENT_QP_FATAL => Some("the queue pair failed"),
                sys::IBV_EVENT_QP_REQ_ERR => Some("the queue pair got an invalid request"),
                sys::IBV_EVENT_QP_ACCESS_ERR => Some("the peer asked for what it has no access to"),
                sys::IBV_EVENT_DEVICE_FATAL => Some("the device failed or was removed"),
                sys::IBV_EVENT_PORT_ERR if event.port_num == i32::from(port) => Some("the port went down"),
                _ => None,
            };
            if fatal.is_some() {
                return fatal;
            }
        }
    }
}

fn device_file(device: *mut sys::ibv_device) -> String {
    // SAFETY: valid as in `open`; the name is constant and ends with a zero.
    let name = unsafe { std::ffi::CStr::from_ptr((*device).dev_name.as_ptr()) };
    format!("/dev/infiniband/{}", name.to_string_lossy())
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once; everything made on it holds it by an Arc and is gone. Should the call
        // fail the kernel still takes everything back when the process ends.
        unsafe { self.verbs.ibv_close_device(self.raw) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.device_name()).finish()
    }
}

/// A protection domain: what is registered in it only a queue pair of the same domain can reach. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Domain {
    inner: Arc<Inner>,
}

struct Inner {
    raw: *mut sys::ibv_pd,
    context: Context,
}

// SAFETY: as for `Context`; the domain's pointer is only handed to calls that may come from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Domain {
    pub(super) fn new(context: Context) -> Result<Self, VerbsError> {
        // SAFETY: the context is open and `Inner` keeps it so for as long as the domain exists.
        let raw = unsafe { context.verbs.ibv_alloc_pd(context.as_ptr()) };
        if raw.is_null() {
            return Err(VerbsError::last("ibv_alloc_pd"));
        }
        Ok(Self { inner: Arc::new(Inner { raw, context }) })
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_pd {
        self.inner.raw
    }

    pub(super) fn context(&self) -> &Context {
        &self.inner.context
    }

    /// The device's name.
    #[must_use]
    pub fn device_name(&self) -> String {
        self.inner.context.device_name()
    }

    /// What its device can do.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn limits(&self) -> Result<Limits, VerbsError> {
        let context = &self.inner.context;
        Ok(context.limits(&context.attributes()?))
    }

    /// Whether the other is this one.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: allocated once and freed once; regions and queue pairs of the domain hold it by an Arc and are gone,
        // or were leaked because a device did not let go of them: then the call fails and nothing happens.
        unsafe { self.context.verbs.ibv_dealloc_pd(self.raw) };
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("context", &self.context).finish_non_exhaustive()
    }
}
