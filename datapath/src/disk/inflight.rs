//! Range locks: overlapping requests take effect one after the other. Called by `volume` for each request.
//!
//! A change locks its range from admission (before its payload touches the mapping) until the peer has applied it, so
//! that the transport may read the bytes again, and so that a read never returns bytes that a failover could take
//! back. Reads hold no lock; they wait for the changes in flight. A read that had to wait is pinned when its turn
//! comes, so that the change behind it does not overwrite the bytes before they are read. Waiters are served in
//! order of arrival.
//!
//! Invariant: locked ranges never overlap. Sans-IO; allocates only when made.

use crate::units::{ByteRange, Token};
use std::collections::VecDeque;

/// What a request wants of its range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Look at it: waits for changes in flight, locks nothing.
    Read,
    /// Change it: waits for changes in flight and for changes that wait longer, then locks.
    Change,
}

/// Answer to [`Inflight::request`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// Go on (a change now holds its lock).
    Granted,
    /// [`Inflight::release`] will grant it later.
    Waits,
    /// No room to wait: the caller asks again later and reads no further requests meanwhile.
    Full,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    token: Token,
    range: ByteRange,
    access: Access,
}

/// The lock table of one volume.
#[derive(Debug)]
pub struct Inflight {
    /// Sorted by start; disjoint, hence sorted by end as well.
    locked: Vec<(ByteRange, Token)>,
    waiting: VecDeque<Waiter>,
    /// Ranges whose bytes are on their way out of the mapping: a change waits for them, a read does not.
    pinned: Vec<(ByteRange, Token)>,
    locked_max: usize,
    waiting_max: usize,
    /// Nothing is granted.
    held: bool,
}

impl Inflight {
    /// A table for `locked_max` changes in flight and `waiting_max` waiters, allocated once.
    #[must_use]
    pub fn new(locked_max: usize, waiting_max: usize) -> Self {
        Self {
            locked: Vec::with_capacity(locked_max),
            waiting: VecDeque::with_capacity(waiting_max),
            pinned: Vec::new(),
            locked_max,
            waiting_max,
            held: false,
        }
    }

    /// Grants nothing from now on: every request waits, until [`Inflight::resume`].
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// Grants again. Appends the waiters that may now go on.
    pub fn resume(&mut self, granted: &mut impl Extend<Token>) {
        self.held = false;
        self.grant_waiters(granted);
    }

    /// The ranges that changes hold.
    pub fn locked(&self) -> impl Iterator<Item = (ByteRange, Token)> {
        self.locked.iter().copied()
    }

    /// The ranges that replies are made of, and whose.
    pub fn pinned(&self) -> impl Iterator<Item = (ByteRange, Token)> {
        self.pinned.iter().copied()
    }

    /// Whether a change holds part of `range`, or a reply is made of it.
    #[must_use]
    pub fn is_in_use(&self, range: ByteRange) -> bool {
        self.conflicts(range, Access::Change)
    }

    /// Asks for `range` on behalf of `token`.
    pub fn request(&mut self, token: Token, range: ByteRange, access: Access) -> Admission {
        let blocked = self.held
            || self.conflicts(range, access)
            || self.waiting.iter().any(|w| w.access == Access::Change && w.range.overlaps(range));
        let no_lock_left = access == Access::Change && self.locked.len() == self.locked_max;
        if !blocked && !no_lock_left {
            self.grant(token, range, access);
            return Admission::Granted;
        }
        if self.waiting.len() == self.waiting_max {
            return Admission::Full;
        }
        self.waiting.push_back(Waiter { token, range, access });
        Admission::Waits
    }

    /// Frees the lock of `token` on the range that starts at `start`, and appends the waiters that may now go on.
    ///
    /// # Panics
    /// When `token` does not hold that lock: our own bookkeeping is broken.
    pub fn release(&mut self, token: Token, start: u64, granted: &mut impl Extend<Token>) {
        let at = self.locked.partition_point(|(held, _)| held.start < start);
        let held = self.locked.get(at).filter(|(range, holder)| range.start == start && *holder == token);
        assert!(held.is_some(), "{token:?} releases a lock at {start} that it does not hold");
        self.locked.remove(at);
        if !self.waiting.is_empty() {
            self.grant_waiters(granted);
        }
    }

    /// Forgets a waiter (its client is gone). Appends the waiters that may now go on.
    pub fn cancel(&mut self, token: Token, granted: &mut impl Extend<Token>) {
        self.waiting.retain(|w| w.token != token);
        self.grant_waiters(granted);
    }

    /// Keeps changes out of `range` while a reply made of its bytes is stuck half-way to a slow client. The holder is
    /// expected to copy the rest out and [`Inflight::unpin`] as soon as [`Inflight::pin_in_the_way`] names it.
    pub fn pin(&mut self, token: Token, range: ByteRange) {
        if !self.has_pin(token) {
            self.pinned.push((range, token));
        }
    }

    /// Whether `token` pins a range.
    #[must_use]
    pub fn has_pin(&self, token: Token) -> bool {
        self.pinned.iter().any(|(_, holder)| *holder == token)
    }

    /// Takes a pinned read back to the waiters, behind all of them: its client is not taking replies, and a change wants
    /// the range. Appends the waiters that may now go on.
    pub fn put_back(&mut self, token: Token, range: ByteRange, granted: &mut impl Extend<Token>) {
        self.pinned.retain(|(_, holder)| *holder != token);
        self.waiting.push_back(Waiter { token, range, access: Access::Read });
        self.grant_waiters(granted);
    }

    /// Ends a pin. Appends the waiters that may now go on.
    pub fn unpin(&mut self, token: Token, granted: &mut impl Extend<Token>) {
        self.pinned.retain(|(_, holder)| *holder != token);
        self.grant_waiters(granted);
    }

    /// A pin that a waiting change would like to see gone.
    #[must_use]
    pub fn pin_in_the_way(&self) -> Option<Token> {
        let wanted = |pin: &ByteRange| {
            self.waiting.iter().any(|w| w.access == Access::Change && w.range.overlaps(*pin))
        };
        self.pinned.iter().find(|(pin, _)| wanted(pin)).map(|(_, holder)| *holder)
    }

    /// Gives up every waiter (the volume stops serving).
    pub fn cancel_all(&mut self, cancelled: &mut Vec<Token>) {
        cancelled.extend(self.waiting.drain(..).map(|w| w.token));
    }

    /// Locks held.
    #[must_use]
    pub fn locked_len(&self) -> usize {
        self.locked.len()
    }

    /// Requests waiting.
    #[must_use]
    pub fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    fn conflicts(&self, range: ByteRange, access: Access) -> bool {
        if access == Access::Change && self.pinned.iter().any(|(pin, _)| pin.overlaps(range)) {
            return true;
        }
        let after = self.locked.partition_point(|(held, _)| held.start < range.end());
        after > 0 && self.locked[after - 1].0.end() > range.start
    }

    fn grant(&mut self, token: Token, range: ByteRange, access: Access) {
        if access == Access::Change {
            let at = self.locked.partition_point(|(held, _)| held.start < range.start);
            self.locked.insert(at, (range, token));
        }
    }

    fn grant_waiters(&mut self, granted: &mut impl Extend<Token>) {
        if self.held {
            return;
        }
        let mut at = 0;
        while at < self.waiting.len() {
            let waiter = self.waiting[at];
            let no_lock_left = waiter.access == Access::Change && self.locked.len() == self.locked_max;
            let behind_earlier = || {
                let earlier = self.waiting.iter().take(at);
                earlier.filter(|w| w.access == Access::Change).any(|w| w.range.overlaps(waiter.range))
            };
            // The cheap questions first: a crowd that waits for one block or for a lock must not cost its square.
            if no_lock_left || self.conflicts(waiter.range, waiter.access) || behind_earlier() {
                at += 1;
                continue;
            }
            self.waiting.remove(at);
            self.grant(waiter.token, waiter.range, waiter.access);
            if waiter.access == Access::Read {
                self.pin(waiter.token, waiter.range);
            }
            granted.extend([waiter.token]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, len)
    }

    #[test]
    fn overlapping_changes_go_in_order_and_others_pass() {
        let mut table = Inflight::new(8, 8);
        assert_eq!(table.request(Token(1), range(0, 4096), Access::Change), Admission::Granted);
        assert_eq!(table.request(Token(2), range(4095, 2), Access::Change), Admission::Waits);
        assert_eq!(
            table.request(Token(3), range(4096, 10), Access::Change),
            Admission::Waits,
            "behind the waiter"
        );
        assert_eq!(table.request(Token(4), range(9000, 10), Access::Change), Admission::Granted);
        assert_eq!(table.request(Token(5), range(0, 1), Access::Read), Admission::Waits);
        let mut granted = Vec::new();
        table.release(Token(1), 0, &mut granted);
        assert_eq!(granted, [Token(2), Token(5)]);
        granted.clear();
        table.release(Token(2), 4095, &mut granted);
        assert_eq!(granted, [Token(3)]);
    }

    #[test]
    fn a_full_table_makes_changes_wait_and_reads_pass() {
        let mut table = Inflight::new(1, 1);
        assert_eq!(table.request(Token(1), range(0, 1), Access::Change), Admission::Granted);
        assert_eq!(table.request(Token(2), range(5, 1), Access::Change), Admission::Waits);
        assert_eq!(table.request(Token(3), range(9, 1), Access::Change), Admission::Full);
        assert_eq!(table.request(Token(4), range(9, 1), Access::Read), Admission::Granted);
        let mut granted = Vec::new();
        table.cancel(Token(2), &mut granted);
        table.release(Token(1), 0, &mut granted);
        assert!(granted.is_empty());
        assert_eq!((table.locked_len(), table.waiting_len()), (0, 0));
    }

    #[test]
    fn a_pin_holds_off_changes_only_and_is_named() {
        let mut table = Inflight::new(8, 8);
        table.pin(Token(1), range(0, 4096));
        assert_eq!(table.request(Token(2), range(0, 10), Access::Read), Admission::Granted);
        assert_eq!(table.pin_in_the_way(), None);
        assert_eq!(table.request(Token(3), range(0, 10), Access::Change), Admission::Waits);
        assert_eq!(table.pin_in_the_way(), Some(Token(1)));
        let mut granted = Vec::new();
        table.unpin(Token(1), &mut granted);
        assert_eq!(granted, [Token(3)]);
    }

    #[test]
    fn a_read_that_waited_is_read_before_the_change_behind_it() {
        let mut table = Inflight::new(8, 8);
        assert_eq!(table.request(Token(1), range(0, 10), Access::Change), Admission::Granted);
        assert_eq!(table.request(Token(2), range(0, 10), Access::Read), Admission::Waits);
        assert_eq!(table.request(Token(3), range(0, 10), Access::Change), Admission::Waits);
        let mut granted = Vec::new();
        table.release(Token(1), 0, &mut granted);
        assert_eq!(granted, [Token(2)], "the change waits until the read is done");
        assert_eq!(table.pin_in_the_way(), Some(Token(2)));
        granted.clear();
        table.put_back(Token(2), range(0, 10), &mut granted);
        assert_eq!(granted, [Token(3)], "a client that takes no replies does not hold writers up");
        granted.clear();
        table.release(Token(3), 0, &mut granted);
        assert_eq!(granted, [Token(2)]);
    }

    proptest! {
        /// Against a plain model: no two granted changes ever overlap, each waiter is granted in the end, and of two
        /// overlapping changes the earlier goes first.
        #[test]
        fn locks_never_overlap_and_everyone_is_served(
            requests in proptest::collection::vec((0..64u64, 1..16u64, any::<bool>()), 1..60),
            releases in proptest::collection::vec(any::<prop::sample::Index>(), 60),
        ) {
            let mut table = Inflight::new(16, 64);
            let mut held: Vec<(Token, ByteRange)> = Vec::new();
            let mut order: Vec<(Token, ByteRange, Access)> = Vec::new();
            let mut served: Vec<Token> = Vec::new();
            let mut granted = Vec::new();
            for (i, (start, len, change)) in requests.iter().enumerate() {
                let (token, r) = (Token(i as u64), range(*start, *len));
                let access = if *change { Access::Change } else { Access::Read };
                order.push((token, r, access));
                if table.request(token, r, access) == Admission::Granted {
                    granted.push(token);
                }
                if i % 3 == 2 && !held.is_empty() {
                    let (t, r) = held.remove(releases[i % 60].index(held.len()));
                    table.release(t, r.start, &mut granted);
                }
                settle(&mut table, &mut granted, &mut held, &order, &mut served)?;
            }
            while !held.is_empty() {
                let (t, r) = held.remove(0);
                table.release(t, r.start, &mut granted);
                settle(&mut table, &mut granted, &mut held, &order, &mut served)?;
            }
            prop_assert_eq!(served.len(), order.len());
            for (i, (a, ra, aa)) in order.iter().enumerate() {
                for (b, rb, ab) in &order[i + 1..] {
                    if *aa == Access::Change && *ab == Access::Change && ra.overlaps(*rb) {
                        let place = |t: &Token| served.iter().position(|s| s == t);
                        prop_assert!(place(a) < place(b), "{:?} must precede {:?}", a, b);
                    }
                }
            }
        }
    }

    fn settle(
        table: &mut Inflight,
        granted: &mut Vec<Token>,
        held: &mut Vec<(Token, ByteRange)>,
        order: &[(Token, ByteRange, Access)],
        served: &mut Vec<Token>,
    ) -> Result<(), TestCaseError> {
        while let Some(token) = (!granted.is_empty()).then(|| granted.remove(0)) {
            let (_, r, access) = order[usize::try_from(token.0).expect("small")];
            served.push(token);
            prop_assert!(held.iter().all(|(_, other)| !other.overlaps(r)), "granted over a lock");
            if access == Access::Change {
                held.push((token, r));
            } else {
                table.unpin(token, granted);
            }
        }
        Ok(())
    }
}
