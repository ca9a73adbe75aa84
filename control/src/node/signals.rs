//! What the daemon does on a signal: SIGTERM and SIGINT stop it, once; SIGHUP is noted in the log; all others that would end it
//! and ask for nothing are ignored.
//!
//! Invariant: from [`Signals::watch`] on, none of the three ends the process by itself, also not a second one while it stops.

use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From here on only SIGTERM, SIGINT and SIGQUIT end this process, SIGKILL and its own faults aside. Called first of all; SIGHUP
/// gets its meaning with [`Signals::watch`].
pub(super) fn ignore_those_that_ask_for_nothing() {
    costandby_ffi::signal::ignore();
}

/// The signals that mean something.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Installs the handlers. They stay to the end of the process, so that a second SIGTERM ends nothing half-way.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn watch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    pub(super) async fn stop(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => tracing::warn!(
                    "SIGHUP: nothing is reloaded; this release reads its configuration at the start only: restart the daemon to \
                     read it again"
                ),
            }
        }
    }
}
