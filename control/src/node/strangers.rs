//! Limits for connections that have not proved the key yet: how many at a time, and how often the log names them.
//! Sans-IO: time comes in.
//!
//! Used by [`super::peers`], which accepts every connection at once and keeps it here until its first sealed message has
//! come. So nobody who holds connections open keeps the peer from coming in: when the places are taken, the oldest
//! connection of the address that has most gives way. The first refusal of a kind from an address is logged, the next ones
//! are counted.
//!
//! Survives any number of connections, from any number of addresses.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

/// Connections at one time that have not proved who they are: more than two nodes with a hundred volumes make at once, few
/// enough to be harmless.
pub(super) const STRANGERS_MAX: usize = 128;

/// Kinds of refusal that are remembered as told, by address: more than a cluster has volumes that only one of two nodes knows.
const TOLD_MAX: usize = 256;

/// After how long a refusal that goes on is told again, with how often it came.
const TELL_AGAIN: Duration = Duration::from_secs(600);

/// Lines on refusals in one [`SPAN`], whatever and whoever they are about: enough to see what goes on, and less than a
/// megabyte of log a day.
const LINES_MAX: u32 = 10;

/// See [`LINES_MAX`].
const SPAN: Duration = Duration::from_secs(60);

/// Connections that have proved nothing, oldest first, each with what ends it.
pub(super) struct Strangers<T> {
    here: VecDeque<(u64, IpAddr, T)>,
    next: u64,
}

impl<T> Default for Strangers<T> {
    fn default() -> Self {
        Self { here: VecDeque::new(), next: 0 }
    }
}

impl<T> Strangers<T> {
    /// The number of the connection that comes next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Takes one in, as the number that [`Self::next`] gave. Gives back what has to go for it.
    pub(super) fn enter(&mut self, from: IpAddr, end: T) -> Option<(IpAddr, T)> {
        let gone = (self.here.len() == STRANGERS_MAX).then(|| self.take_one_of_most()).flatten();
        self.here.push_back((self.next, from, end));
        self.next += 1;
        gone
    }

    /// This one has proved who it is, or is gone.
    pub(super) fn leave(&mut self, number: u64) {
        self.here.retain(|(other, ..)| *other != number);
    }

    fn take_one_of_most(&mut self) -> Option<(IpAddr, T)> {
        let count = |of: &IpAddr| self.here.iter().filter(|(_, from, _)| from == of).count();
        // The first of the greatest, for `max_by_key` would give the last.
        let oldest = (0..self.here.len()).rev().max_by_key(|&at| count(&self.here[at].1))?;
        self.here.remove(oldest).map(|(_, from, end)| (from, end))
    }
}

/// A kind of refusal from an address.
struct Told {
    from: IpAddr,
    text: String,
    last: Duration,
    /// Since then.
    more: u64,
}

/// What was refused, and when the log heard of it.
#[derive(Default)]
pub(super) struct Refusals {
    told: VecDeque<Told>,
    span_began: Duration,
    lines: u32,
    /// Refusals that found no line left in their span.
    unsaid: u64,
}

impl Refusals {
    /// Notes a refusal. Gives the line for the log, where it is time for one.
    pub(super) fn note(&mut self, now: Duration, from: IpAddr, text: &str) -> Option<String> {
        let known = self.told.iter().position(|told| told.from == from && told.text == text);
        let more = match known.map(|at| &mut self.told[at]) {
            Some(told) if now.saturating_sub(told.last) < TELL_AGAIN => {
                told.more += 1;
                return None;
            }
            Some(told) => {
                told.last = now;
                std::mem::take(&mut told.more)
            }
            None => {
                if self.told.len() == TOLD_MAX {
                    self.told.pop_front();
                }
                self.told.push_back(Told { from, text: text.to_owned(), last: now, more: 0 });
                0
            }
        };
        if now.saturating_sub(self.span_began) >= SPAN {
            self.span_began = now;
            self.lines = 0;
        }
        if self.lines == LINES_MAX {
            self.unsaid += 1;
            return None;
        }
        self.lines += 1;
        let mut line = format!("refused a connection from {from}: {text}");
        if more > 0 {
            line.push_str(&format!(" ({more} more times since the last such line)"));
        }
        match std::mem::take(&mut self.unsaid) {
            0 => {}
            unsaid => {
                line.push_str(&format!(
                    " ({unsaid} other refusals were not logged because there were too many)"
                ));
            }
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [10, 9, 0, last].into()
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn who_holds_many_connections_gives_way_to_who_has_few() {
        let mut strangers = Strangers::default();
        let number = strangers.next();
        assert!(strangers.enter(ip(1), "the peer").is_none());
        for _ in 1..STRANGERS_MAX {
            assert!(strangers.enter(ip(66), "an attacker's").is_none());
        }
        for _ in 0..3 * STRANGERS_MAX {
            assert_eq!(strangers.enter(ip(66), "an attacker's"), Some((ip(66), "an attacker's")));
            assert_eq!(strangers.here.len(), STRANGERS_MAX);
        }
        strangers.leave(number);
        assert!(strangers.enter(ip(1), "the peer again").is_none());
        assert!(strangers.here.iter().any(|(_, from, _)| *from == ip(1)));
    }

    #[test]
    fn of_one_address_the_oldest_goes() {
        let mut strangers = Strangers::default();
        for number in 0..STRANGERS_MAX {
            assert!(strangers.enter(ip(66), number).is_none());
        }
        assert_eq!(strangers.enter(ip(66), 1000), Some((ip(66), 0)));
        assert_eq!(strangers.enter(ip(66), 1001), Some((ip(66), 1)));
    }

    #[test]
    fn a_refusal_is_told_once_then_counted() {
        let mut refusals = Refusals::default();
        let line = refusals.note(s(1), ip(1), "no key").expect("told");
        assert_eq!(line, "refused a connection from 10.9.0.1: no key");
        for second in 2..600 {
            assert_eq!(refusals.note(s(second), ip(1), "no key"), None);
        }
        assert!(refusals.note(s(3), ip(2), "no key").is_some(), "another address");
        assert!(refusals.note(s(3), ip(1), "no volume").is_some(), "another reason");
        let line = refusals.note(s(601), ip(1), "no key").expect("told again");
        assert!(line.ends_with("no key (598 more times since the last such line)"), "{line}");
    }

    #[test]
    fn no_number_of_addresses_and_reasons_fills_a_log() {
        let mut refusals = Refusals::default();
        let (mut lines, seconds) = (0, 600);
        for at in 0..seconds * 100 {
            let from = IpAddr::from(std::net::Ipv6Addr::from(u128::from(at)));
            lines += u64::from(refusals.note(s(at / 100), from, "no key").is_some());
            assert!(refusals.told.len() <= TOLD_MAX);
        }
        assert_eq!(lines, seconds / SPAN.as_secs() * u64::from(LINES_MAX));
        let line = refusals.note(s(seconds), ip(1), "no key").expect("a new span");
        assert!(line.contains("other refusals were not logged"), "{line}");
    }
}
