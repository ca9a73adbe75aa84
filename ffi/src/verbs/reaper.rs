//! Ends connections in the background.
//!
//! Saying good-bye to a peer that is gone, and giving back the connection manager's identifier, may keep the caller
//! waiting in the kernel. By then the queue pair is destroyed and no memory is involved, so it can be done at leisure:
//! by one thread, which starts with the first connection that ends.
//!
//! While a port is down, its connections wait here. Nobody would hear the good-bye, and soft-RoCE's queue pair for
//! connection management takes in nothing any more once it could not send: until the device is made anew, no connection
//! could be made.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use super::channel::Identifier;

/// Connections that may wait for their end: a few a volume, should every link of a node fail over and over while the
/// first one's end is slow. Beyond it, who closes waits, and the longest held is ended.
const WAITING_MAX: usize = 1024;

/// How often ports that were down are looked at: each look is a system call.
const LOOK: Duration = Duration::from_millis(100);

static REAPER: OnceLock<Option<SyncSender<Identifier>>> = OnceLock::new();

/// Ends it, soon.
pub(super) fn end(identifier: Identifier) {
    let reaper = REAPER.get_or_init(|| {
        let (sender, receiver) = sync_channel::<Identifier>(WAITING_MAX);
        let thread = std::thread::Builder::new().name("rdma-reaper".to_owned()).spawn(move || run(&receiver));
        thread.is_ok().then_some(sender)
    });
    let left = match reaper {
        Some(sender) => match sender.try_send(identifier) {
            Ok(()) => None,
            Err(TrySendError::Full(identifier) | TrySendError::Disconnected(identifier)) => Some(identifier),
        },
        // No thread to be had: then here.
        None => Some(identifier),
    };
    left.into_iter().for_each(end_now);
}

fn run(receiver: &Receiver<Identifier>) {
    let mut held = VecDeque::new();
    loop {
        let next = match held.is_empty() {
            true => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => receiver.recv_timeout(LOOK),
        };
        match next {
            Ok(identifier) => held.push_back(identifier),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        for _ in 0..held.len() {
            let identifier: Identifier = held.pop_front().expect("as many as counted");
            if identifier.port_is_down() && held.len() < WAITING_MAX {
                held.push_back(identifier);
            } else {
                end_now(identifier);
            }
        }
    }
}

fn end_now(identifier: Identifier) {
    identifier.disconnect();
    drop(identifier);
}
