//! The connection manager's side of a connected queue pair: tells when the connection ended, and ends it in the background.

use super::channel::Identifier;
use super::error::Failure;
use super::{reaper, sys};
use std::os::fd::BorrowedFd;

/// The connection manager's side of a queue pair's life. Its end is never waited for.
pub(super) struct Connection {
    /// `None` only while it is being closed.
    identifier: Option<Identifier>,
}

impl Connection {
    pub(super) fn new(identifier: Identifier) -> Self {
        Self { identifier: Some(identifier) }
    }

    pub(super) fn identifier(&self) -> &Identifier {
        self.identifier.as_ref().expect("only taken by drop")
    }

    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.identifier().channel().events()
    }

    /// Whether an event ended the connection, and how.
    pub(super) fn ended(&self) -> Option<Failure> {
        loop {
            match self.identifier().channel().next() {
                Ok(Some(event)) => match event.kind {
                    sys::RDMA_CM_EVENT_DISCONNECTED
                    | sys::RDMA_CM_EVENT_CONNECT_ERROR
                    | sys::RDMA_CM_EVENT_UNREACHABLE
                    | sys::RDMA_CM_EVENT_REJECTED => return Some(Failure::Closed),
                    sys::RDMA_CM_EVENT_DEVICE_REMOVAL => {
                        return Some(Failure::Device("it was removed"));
                    }
                    _ => {}
                },
                Ok(None) => return None,
                Err(error) => return Some(error.into()),
            }
        }
    }

    /// Tells the peer and gives everything back, in the background.
    pub(super) fn close(self) {
        drop(self);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(identifier) = self.identifier.take() {
            reaper::end(identifier);
        }
    }
}
