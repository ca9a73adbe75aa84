//! The requests of a volume that are under way: a place and a token for each, the lock on its range, and who may go on next.
//!
//! A request gets a place ([`RequestTable::add`]) and asks for its range ([`RequestTable::lock`]). One that has to wait is named by
//! [`RequestTable::next_granted`] once its range is free. A change keeps its range until [`RequestTable::unlock`], a read that had to
//! wait until [`RequestTable::end_read`].
//!
//! Invariants: a token names one request from `add` to `remove`; the locks on two changes never overlap; requests on one range go on in
//! the order of their arrival. Nothing here knows a disk, a link or a clock, and nothing allocates in the steady state.

use super::interface::{Op, Origin};
use crate::disk::inflight::{Access, Admission, Inflight};
use crate::disk::record::Touched;
use crate::limits::{WAITERS_LEN, WINDOW_LEN};
use crate::mirror::pipeline::Change;
use crate::mirror::throttle::Landed;
use crate::units::{ByteRange, Token};
use crate::wire::Kind;
use std::collections::VecDeque;

/// A request under way, and how far it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) origin: Origin,
    pub(super) op: Op,
    pub(super) range: ByteRange,
    pub(super) flags: u8,
    /// A change that was let go on with its range locked.
    pub(super) locked: bool,
    /// How the record let it through.
    pub(super) touched: Option<Touched>,
    /// The pipeline has it.
    pub(super) landed: bool,
    pub(super) completed: bool,
    /// Its bytes were lost with the disk.
    pub(super) lost: bool,
    /// A comparison, and the peer says that its bytes are others.
    pub(super) differs: bool,
    /// A comparison whose outcome was lost with the link.
    pub(super) untold: bool,
    /// When a client's change landed.
    pub(super) landed_at: Option<Landed>,
}

impl Request {
    /// A flush.
    pub(super) fn flush(origin: Origin) -> Self {
        Self {
            origin,
            op: Op::Flush,
            range: ByteRange::new(0, 0),
            flags: 0,
            locked: false,
            touched: None,
            landed: true,
            completed: false,
            lost: false,
            differs: false,
            untold: false,
            landed_at: None,
        }
    }

    /// A read or a change of `range`.
    pub(super) fn of(origin: Origin, op: Op, range: ByteRange, flags: u8) -> Self {
        Self { op, range, flags, landed: false, ..Self::flush(origin) }
    }

    /// What the pipeline is told of it.
    pub(super) fn change(&self, token: Token, kind: Kind) -> Change {
        Change { token, kind, range: self.range, flags: self.flags }
    }

    fn access(&self) -> Access {
        if matches!(self.op, Op::Change(_)) { Access::Change } else { Access::Read }
    }
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct RequestTable {
    places: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Changes that are being made on this disk: a payload is arriving, or a worker thread trims or zeroes.
    being_made: usize,
    locks: Inflight,
    /// May go on, in order.
    granted: VecDeque<Token>,
}

impl RequestTable {
    /// An empty table. Allocates its room once.
    pub(super) fn new() -> Self {
        Self {
            places: Vec::with_capacity(WINDOW_LEN),
            free: Vec::with_capacity(WINDOW_LEN),
            being_made: 0,
            locks: Inflight::new(WINDOW_LEN, WAITERS_LEN),
            granted: VecDeque::with_capacity(WINDOW_LEN),
        }
    }

    /// Gives a request its place and its token.
    pub(super) fn add(&mut self, request: Request) -> Token {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.places[at] = Some(request);
        Token(at as u64)
    }

    /// The request of a token.
    ///
    /// # Panics
    /// When the token names none: our own bookkeeping is broken.
    pub(super) fn get(&self, token: Token) -> &Request {
        self.places[place(token)].as_ref().unwrap_or_else(|| panic!("{token:?} names no request"))
    }

    /// The same, to be changed.
    pub(super) fn get_mut(&mut self, token: Token) -> &mut Request {
        self.places[place(token)].as_mut().unwrap_or_else(|| panic!("{token:?} names no request"))
    }

    /// Ends a request, which holds no lock any more. Its token is void.
    pub(super) fn remove(&mut self, token: Token) -> Request {
        let at = place(token);
        self.free.push(at);
        self.places[at].take().unwrap_or_else(|| panic!("{token:?} names no request"))
    }

    /// Asks for the range of a read or a change. After [`Admission::Waits`] the token comes from
    /// [`RequestTable::next_granted`]; after [`Admission::Full`] the request is gone.
    pub(super) fn lock(&mut self, token: Token) -> Admission {
        let (range, access) = (self.get(token).range, self.get(token).access());
        let admission = self.locks.request(token, range, access);
        if admission == Admission::Full {
            self.remove(token);
        }
        admission
    }

    /// Frees the range of a change. Others may go on then.
    pub(super) fn unlock(&mut self, token: Token) {
        let request = self.get_mut(token);
        request.locked = false;
        let start = request.range.start;
        self.locks.release(token, start, &mut self.granted);
    }

    /// The next request that may go on.
    pub(super) fn next_granted(&mut self) -> Option<Token> {
        self.granted.pop_front()
    }

    /// Takes back a request whose client is gone: a change, if it waited, holds no lock then. False for a change that was let go on
    /// already, of which the client has not heard yet.
    pub(super) fn take_back(&mut self, token: Token) -> bool {
        self.locks.cancel(token, &mut self.granted);
        let Some(at) = self.granted.iter().position(|granted| *granted == token) else {
            return !self.get(token).locked;
        };
        self.granted.remove(at);
        if self.get(token).access() == Access::Change {
            self.unlock(token);
        }
        true
    }

    /// Those of which `is_wanted` is true.
    pub(super) fn find(&self, is_wanted: impl Fn(&Request) -> bool) -> Vec<Token> {
        let places = self.places.iter().enumerate();
        let found = places.filter(|(_, request)| request.as_ref().is_some_and(&is_wanted));
        found.map(|(at, _)| Token(at as u64)).collect()
    }

    /// Takes back everything that waits, and appends it.
    pub(super) fn take_back_waiting(&mut self, tokens: &mut Vec<Token>) {
        self.locks.cancel_all(tokens);
    }

    /// Takes back the next one that may go on and has not heard of it.
    pub(super) fn take_back_granted(&mut self) -> Option<Token> {
        let token = self.granted.pop_front()?;
        match self.get(token).access() {
            Access::Change => self.unlock(token),
            Access::Read => self.unpin(token),
        }
        Some(token)
    }

    /// Keeps changes out of a read's range until [`RequestTable::end_read`].
    pub(super) fn pin(&mut self, token: Token) {
        let range = self.get(token).range;
        self.locks.pin(token, range);
    }

    /// Lets changes have a read's range.
    pub(super) fn unpin(&mut self, token: Token) {
        self.locks.unpin(token, &mut self.granted);
    }

    /// Ends a read. Returns the range that it read.
    pub(super) fn end_read(&mut self, token: Token) -> ByteRange {
        if self.locks.has_pin(token) {
            self.unpin(token);
        }
        self.remove(token).range
    }

    /// Lets a read that was granted wait again, behind the changes that want its range. Returns the range.
    pub(super) fn put_back(&mut self, token: Token) -> ByteRange {
        let range = self.get(token).range;
        self.locks.put_back(token, range, &mut self.granted);
        range
    }

    /// A read that a waiting change would like to see ended.
    pub(super) fn pin_in_the_way(&self) -> Option<Token> {
        self.locks.pin_in_the_way()
    }

    /// The reads whose ranges are pinned.
    pub(super) fn pinned(&self) -> impl Iterator<Item = Token> {
        self.locks.pinned().map(|(_, token)| token)
    }

    /// The changes that hold a lock, and on what.
    pub(super) fn locked(&self) -> impl Iterator<Item = (ByteRange, Token)> {
        self.locks.locked()
    }

    /// Whether a change holds part of `range`, or a reply is made of it.
    pub(super) fn is_in_use(&self, range: ByteRange) -> bool {
        self.locks.is_in_use(range)
    }

    /// Lets nothing go on until [`RequestTable::resume`].
    pub(super) fn hold(&mut self) {
        self.locks.hold();
    }

    /// Ends [`RequestTable::hold`].
    pub(super) fn resume(&mut self) {
        self.locks.resume(&mut self.granted);
    }

    /// Whether some request waits for its range.
    pub(super) fn has_waiting(&self) -> bool {
        self.locks.waiting_len() > 0
    }

    /// A change is being made from now on.
    pub(super) fn making_begins(&mut self) {
        self.being_made += 1;
    }

    /// A change stands on the disk, or is given up.
    pub(super) fn making_ends(&mut self) {
        self.being_made -= 1;
    }

    /// Whether a change is being made.
    pub(super) fn is_making(&self) -> bool {
        self.being_made > 0
    }

    /// Nobody hears any more of the end of what `origin` asked for.
    pub(super) fn disown(&mut self, origin: Origin) {
        for request in self.places.iter_mut().flatten().filter(|request| request.origin == origin) {
            request.origin = Origin::Nobody;
        }
    }

    /// What is under way waits for an absent peer: how long that takes says nothing about the load.
    pub(super) fn forget_landing_times(&mut self) {
        for request in self.places.iter_mut().flatten() {
            request.landed_at = None;
        }
    }
}

fn place(token: Token) -> usize {
    usize::try_from(token.0).expect("a token is an index")
}

#[cfg(test)]
impl RequestTable {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.places.iter().flatten()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    pub(super) fn locked_len(&self) -> usize {
        self.locks.locked_len()
    }

    pub(super) fn waiting_len(&self) -> usize {
        self.locks.waiting_len()
    }

    pub(super) fn assert_nothing_left(&self) {
        let open: Vec<_> = self.iter().collect();
        assert!(open.is_empty(), "requests left: {open:?}");
        assert_eq!(self.free.len(), self.places.len(), "a place was freed twice or never");
        let left = (self.locks.locked_len(), self.locks.waiting_len(), self.granted.len(), self.being_made);
        assert_eq!(left, (0, 0, 0, 0), "locked, waiting, granted, being made");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: Op = Op::Change(Kind::Write);

    fn origin(slot: u32) -> Origin {
        Origin::Queue { queue: 0, slot }
    }

    fn add(table: &mut RequestTable, op: Op, start: u64, len: u64) -> (Token, Admission) {
        let token = table.add(Request::of(origin(0), op, ByteRange::new(start, len), 0));
        (token, table.lock(token))
    }

    #[test]
    fn requests_on_one_range_go_on_in_the_order_of_their_arrival_and_leave_nothing() {
        let mut table = RequestTable::new();
        let (first, admission) = add(&mut table, WRITE, 0, 4096);
        assert_eq!(admission, Admission::Granted);
        let (read, admission) = add(&mut table, Op::Read, 4095, 1);
        assert_eq!(admission, Admission::Waits);
        let (second, admission) = add(&mut table, WRITE, 4000, 1000);
        assert_eq!(admission, Admission::Waits);
        let (apart, admission) = add(&mut table, WRITE, 5000, 10);
        assert_eq!(admission, Admission::Granted, "next to the others");
        assert_eq!(table.next_granted(), None);
        table.unlock(first);
        table.remove(first);
        assert_eq!(
            (table.next_granted(), table.next_granted()),
            (Some(read), None),
            "the read pins its range"
        );
        assert_eq!(table.pin_in_the_way(), Some(read));
        assert_eq!(table.end_read(read), ByteRange::new(4095, 1));
        assert_eq!((table.next_granted(), table.next_granted()), (Some(second), None));
        for token in [second, apart] {
            table.unlock(token);
            table.remove(token);
        }
        table.assert_nothing_left();
    }

    #[test]
    fn a_request_is_taken_back_at_each_point_before_it_goes_on_and_not_after() {
        let mut table = RequestTable::new();
        let (holder, _) = add(&mut table, WRITE, 0, 100);
        table.get_mut(holder).locked = true;
        assert!(!table.take_back(holder), "its change is being made");
        let (waits, _) = add(&mut table, WRITE, 50, 100);
        let (behind, _) = add(&mut table, WRITE, 120, 100);
        assert!(table.take_back(waits), "it waits");
        table.remove(waits);
        let next = add(&mut table, WRITE, 90, 20).0;
        table.unlock(holder);
        table.remove(holder);
        assert!(table.take_back(next), "it may go on, and has not heard of it");
        table.remove(next);
        assert_eq!(table.next_granted(), Some(behind), "nothing stands before it since");
        table.unlock(behind);
        table.remove(behind);
        table.assert_nothing_left();
    }

    #[test]
    fn all_that_waits_and_all_that_was_granted_can_be_given_up() {
        let mut table = RequestTable::new();
        let (holder, _) = add(&mut table, WRITE, 0, 100);
        let (read, _) = add(&mut table, Op::Read, 0, 10);
        let (change, _) = add(&mut table, WRITE, 50, 10);
        let (waits, _) = add(&mut table, WRITE, 50, 10);
        table.unlock(holder);
        table.remove(holder);
        let mut given_up = Vec::new();
        table.take_back_waiting(&mut given_up);
        assert_eq!(given_up, [waits]);
        while let Some(token) = table.take_back_granted() {
            given_up.push(token);
        }
        assert_eq!(given_up, [waits, read, change]);
        for token in given_up {
            table.remove(token);
        }
        table.assert_nothing_left();
    }

    #[test]
    fn a_held_table_lets_nothing_go_on_until_it_resumes() {
        let mut table = RequestTable::new();
        let (done, _) = add(&mut table, WRITE, 0, 10);
        table.hold();
        table.unlock(done);
        table.remove(done);
        let (read, admission) = add(&mut table, Op::Read, 0, 10);
        assert_eq!((admission, table.next_granted()), (Admission::Waits, None));
        table.resume();
        assert_eq!(table.next_granted(), Some(read));
        assert_eq!(table.put_back(read), ByteRange::new(0, 10));
        assert_eq!(table.next_granted(), Some(read), "no change wants its range");
        table.end_read(read);
        table.assert_nothing_left();
    }

    #[test]
    fn a_full_table_keeps_no_request_that_it_refused() {
        let mut table = RequestTable::new();
        let (holder, _) = add(&mut table, WRITE, 0, 10);
        let waiting: Vec<_> = (0..WAITERS_LEN).map(|_| add(&mut table, WRITE, 0, 10)).collect();
        assert!(waiting.iter().all(|(_, admission)| *admission == Admission::Waits));
        assert_eq!(add(&mut table, WRITE, 0, 10).1, Admission::Full);
        let mut tokens = Vec::new();
        table.take_back_waiting(&mut tokens);
        assert_eq!(tokens.len(), WAITERS_LEN);
        table.unlock(holder);
        tokens.push(holder);
        for token in tokens {
            table.remove(token);
        }
        table.assert_nothing_left();
    }

    #[test]
    fn what_a_quiesce_asked_for_is_disowned_and_nothing_else() {
        let mut table = RequestTable::new();
        let quiesce = table.add(Request::flush(Origin::Quiesce));
        let client = table.add(Request::flush(origin(1)));
        table.disown(Origin::Quiesce);
        assert_eq!(table.remove(quiesce).origin, Origin::Nobody);
        assert_eq!(table.remove(client).origin, origin(1));
    }

    #[test]
    #[should_panic(expected = "names no request")]
    fn a_token_is_void_after_its_request() {
        let mut table = RequestTable::new();
        let token = table.add(Request::flush(Origin::Nobody));
        table.remove(token);
        table.get(token);
    }
}
