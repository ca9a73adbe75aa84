//! Whether whoever gave a command still waits for it: until when, and whether the connection is still there.
//!
//! A daemon may come to a command late: it was stopped, its machine was suspended, a store of the volume hung. The operator or
//! cluster manager who gave the command has then long been told that it failed, and may have promoted the other node. So the
//! daemon asks again right before it carries a command out, and does not where nobody waits.
//!
//! Invariants: a deadline is a moment on the machine's boot clock, which goes on while the machine sleeps and is the same for
//! all its processes; a caller that says none waits for as long as its connection lives.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, Timespec, clock_gettime};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// The request's header: milliseconds on the boot clock (`CLOCK_BOOTTIME`) from which on the command must not be carried out.
pub const DEADLINE_HEADER: &str = "costandby-deadline";

/// Who waits for a command.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    until: Option<Duration>,
    connection: Option<Arc<OwnedFd>>,
}

impl Asked {
    /// By the other end of `connection`, until `until` on the boot clock where that is said.
    #[must_use]
    pub fn new(until: Option<Duration>, connection: Option<Arc<OwnedFd>>) -> Self {
        Self { until, connection }
    }

    /// Why nobody waits any more; `None` where somebody does.
    #[must_use]
    pub fn void(&self) -> Option<&'static str> {
        if self.until.is_some_and(|until| boot_clock() >= until) {
            return Some("the command came too late: its deadline had passed before this node could begin");
        }
        let gone = self.connection.as_ref().is_some_and(|connection| hung_up(connection));
        gone.then_some("the caller had hung up before this node could begin")
    }
}

/// The boot clock now.
#[must_use]
pub fn boot_clock() -> Duration {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(tv_sec), u32::try_from(tv_nsec));
    Duration::new(seconds.expect("a clock that began at boot"), nanoseconds.expect("less than a second"))
}

/// Whether the other end was closed, not only for sending.
fn hung_up(connection: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(connection, PollFlags::empty())];
    // An error says nothing about the other end.
    poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_caller_waits_until_its_deadline_and_while_its_connection_lives() {
        assert_eq!(Asked::default().void(), None);
        let by = |until| Asked::new(Some(until), None).void();
        assert_eq!(by(boot_clock() + Duration::from_secs(60)), None);
        assert!(by(boot_clock()).is_some_and(|why| why.contains("deadline")));

        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let asked = Asked::new(None, Some(Arc::new(OwnedFd::from(ours))));
        assert_eq!(asked.void(), None);
        theirs.shutdown(Shutdown::Write).expect("shut");
        assert_eq!(asked.void(), None, "it sends no more and still listens");
        drop(theirs);
        assert!(asked.void().is_some_and(|why| why.contains("hung up")));
    }
}
