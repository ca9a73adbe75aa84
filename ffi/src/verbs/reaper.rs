//! Ends connections in the background.
//!
//! Saying good-bye to a peer that is gone, and giving back the connection manager's identifier, may keep the caller
//! waiting in the kernel. By then the queue pair is destroyed and no memory is involved, so it can be done at leisure:
//! by one thread, which starts with the first connection that ends.

use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use super::channel::Identifier;

/// Connections that may wait for their end: a few a volume, should every link of a node fail over and over while the
/// first one's end is slow. Beyond it, who closes waits.
const WAITING_MAX: usize = 1024;

static REAPER: OnceLock<Option<SyncSender<Identifier>>> = OnceLock::new();

/// Ends it, soon.
pub(super) fn end(identifier: Identifier) {
    let reaper = REAPER.get_or_init(|| {
        let (sender, receiver) = sync_channel::<Identifier>(WAITING_MAX);
        let run = move || receiver.into_iter().for_each(end_now);
        let thread = std::thread::Builder::new().name("rdma-reaper".to_owned()).spawn(run);
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

fn end_now(identifier: Identifier) {
    identifier.disconnect();
    drop(identifier);
}
