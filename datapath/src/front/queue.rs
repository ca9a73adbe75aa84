//! The in-process front end: a pair of bounded queues and two doorbells, for a program that embeds the datapath.
//!
//! The client pushes [`Operation`]s, the reactor answers each with one [`Completion`], in whatever order they finish. An
//! operation owns its buffer and the completion gives it back, so nothing is allocated in the steady state. A client may
//! run the reactor on its own thread ([`crate::reactor::Reactor::turn`]) and so pay for no hand-over at all.

use crate::error::IoError;
use crate::waker::Waker;
use crossbeam_queue::ArrayQueue;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::Arc;
use std::time::Duration;

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperationKind {
    /// Fill the buffer from the disk.
    Read,
    /// Put the buffer on the disk.
    Write,
    /// Make everything acknowledged before durable on every in-sync replica.
    Flush,
    /// Zero the range and give its blocks back.
    Trim,
    /// Zero the range and keep its blocks.
    WriteZeroes,
}

/// One request.
#[derive(Debug)]
pub struct Operation {
    /// Given back with the completion.
    pub tag: u64,
    /// What to do.
    pub kind: OperationKind,
    /// First byte.
    pub offset: u64,
    /// Bytes; for reads and writes the buffer's length. 0 for a flush.
    pub len: u64,
    /// Complete only when durable on every in-sync replica.
    pub fua: bool,
    /// Source or destination; empty where none is needed.
    pub buffer: Vec<u8>,
}

/// One answer.
#[derive(Debug)]
pub struct Completion {
    /// As given.
    pub tag: u64,
    /// How it ended. A write's `Ok` means what the volume's ack level says.
    pub result: Result<(), IoError>,
    /// The operation's buffer.
    pub buffer: Vec<u8>,
}

/// The queue is full: take completions first.
#[derive(Debug, thiserror::Error)]
#[error("the queue's depth is used up: take completions first")]
pub struct QueueFull(pub Operation);

/// The client's end. Send, not shared: one client, one queue.
#[derive(Debug)]
pub struct QueueClient {
    operations: Arc<ArrayQueue<Operation>>,
    completions: Arc<ArrayQueue<Completion>>,
    reactor: Waker,
    bell: Waker,
    open: usize,
}

/// The reactor's end; hand it over with [`crate::reactor::command::Command::Attach`].
#[derive(Debug)]
pub struct QueueServer {
    pub(crate) operations: Arc<ArrayQueue<Operation>>,
    completions: Arc<ArrayQueue<Completion>>,
    bell: Waker,
}

/// A queue of `depth` operations to the reactor behind `reactor`.
///
/// # Errors
/// When the system gives no doorbell.
///
/// # Panics
/// When `depth` is 0.
pub fn queue(depth: usize, reactor: &Waker) -> std::io::Result<(QueueClient, QueueServer)> {
    let operations = Arc::new(ArrayQueue::new(depth));
    let completions = Arc::new(ArrayQueue::new(depth));
    let bell = Waker::new()?;
    let client = QueueClient {
        operations: Arc::clone(&operations),
        completions: Arc::clone(&completions),
        reactor: reactor.clone(),
        bell: bell.clone(),
        open: 0,
    };
    Ok((client, QueueServer { operations, completions, bell }))
}

impl QueueClient {
    /// Hands an operation over. Does not block.
    ///
    /// # Errors
    /// [`QueueFull`] gives it back when `depth` operations are open.
    pub fn submit(&mut self, operation: Operation) -> Result<(), Box<QueueFull>> {
        if self.open == self.operations.capacity() {
            return Err(Box::new(QueueFull(operation)));
        }
        self.operations.push(operation).expect("fewer than its capacity are open");
        self.open += 1;
        self.reactor.wake();
        Ok(())
    }

    /// A completion, if there is one. Does not block.
    pub fn poll(&mut self) -> Option<Completion> {
        let completion = self.completions.pop()?;
        self.open -= 1;
        Some(completion)
    }

    /// Sleeps until a completion comes, at most `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Option<Completion> {
        if let Some(completion) = self.poll() {
            return Some(completion);
        }
        self.bell.prepare_sleep();
        if self.completions.is_empty() {
            let timeout = Timespec::try_from(timeout).ok();
            // Interrupted or timed out: the queue tells.
            let _ = poll(&mut [PollFd::new(&self.bell, PollFlags::IN)], timeout.as_ref());
        }
        self.bell.awake();
        self.poll()
    }

    /// Operations not completed yet.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }
}

impl QueueServer {
    /// Answers. The completion queue always has room: the client never has more open than its depth.
    pub(crate) fn complete(&self, operation: Operation, result: Result<(), IoError>) {
        let completion = Completion { tag: operation.tag, result, buffer: operation.buffer };
        assert!(self.completions.push(completion).is_ok(), "one completion an operation");
        self.bell.wake();
    }
}
