//! An online verification: what to compare next, and what was found. Sans-IO.
//!
//! The cursor walks the disk once, a bounded number of steps at a time. Each step goes through the range locks and the
//! pipeline like a client's write, so both nodes look at its bytes at the same place in the write order, whatever clients
//! write meanwhile. A long step that finds a difference is taken apart into grains, and each grain is looked at again;
//! a grain that differs is a finding.
//!
//! Invariants: every byte is compared in steps of whole grains (or up to the disk's end); what is found is told once;
//! the list is bounded, the counts are not. A verification lives within one session, over as many links as that takes, and ends
//! with it, unfinished. A step whose outcome was lost with a link comes again.

use crate::limits::{VERIFY_LEN_MAX, VERIFY_RANGES_LISTED_MAX};
use crate::units::ByteRange;
use std::collections::VecDeque;

/// What a verification has found, so far or at its end.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Findings {
    /// Bytes compared.
    pub compared: u64,
    /// Bytes in grains that differ.
    pub differing: u64,
    /// Differing ranges, neighbours taken together.
    pub ranges: u64,
    /// The first of them, in order.
    pub listed: Vec<ByteRange>,
}

/// One verification, within one session.
#[derive(Debug)]
pub struct Verify {
    size: u64,
    grain: u64,
    cursor: u64,
    /// Grains to look at again, in order.
    again: VecDeque<ByteRange>,
    in_flight: usize,
    /// End of the last finding.
    last_end: Option<u64>,
    stopped: bool,
    findings: Findings,
}

impl Verify {
    /// Of a disk of `size` bytes whose dirty bitmap has grains of `grain` bytes.
    #[must_use]
    pub fn new(size: u64, grain: u64) -> Self {
        Self {
            size,
            grain,
            cursor: 0,
            again: VecDeque::new(),
            in_flight: 0,
            last_end: None,
            stopped: false,
            findings: Findings::default(),
        }
    }

    /// What to compare next, of `wanted` bytes or a little more, or `None` when all has been taken. The caller says with
    /// [`Verify::took`] that it is under way.
    #[must_use]
    pub fn next(&self, wanted: u64) -> Option<ByteRange> {
        if self.stopped {
            return None;
        }
        // First what is left of an earlier stretch: so findings come in order, and what waits stays little.
        if let Some(range) = self.again.front() {
            return Some(*range);
        }
        let len = wanted.clamp(self.grain, VERIFY_LEN_MAX) / self.grain * self.grain;
        let left = self.size - self.cursor;
        (left > 0).then(|| ByteRange::new(self.cursor, len.min(left)))
    }

    /// The step that [`Verify::next`] named is under way.
    pub fn took(&mut self, range: ByteRange) {
        self.in_flight += 1;
        if self.again.front() == Some(&range) {
            self.again.pop_front();
        } else {
            assert_eq!(range.start, self.cursor, "steps are taken in order");
            self.cursor = range.end();
        }
    }

    /// A step that was taken could not begin: it comes again.
    pub fn untake(&mut self, range: ByteRange) {
        self.in_flight -= 1;
        self.again.push_front(range);
    }

    /// A step ended. Returns whether it is a finding: its bytes differ, and it is as short as they get.
    pub fn compared(&mut self, range: ByteRange, equal: bool) -> bool {
        self.in_flight -= 1;
        if !equal && range.len > self.grain {
            let mut start = range.start;
            while start < range.end() {
                let len = self.grain.min(range.end() - start);
                self.again.push_back(ByteRange::new(start, len));
                start += len;
            }
            return false;
        }
        self.findings.compared += range.len;
        if equal {
            return false;
        }
        self.findings.differing += range.len;
        self.list(range);
        self.last_end = Some(range.end());
        true
    }

    /// Lists a finding, in order and as one with its neighbours: a short step may be answered before a long one in front
    /// of it was taken apart.
    fn list(&mut self, range: ByteRange) {
        let Findings { ranges, listed, .. } = &mut self.findings;
        let at = listed.partition_point(|held| held.end() < range.start);
        let joins_before = listed.get(at).is_some_and(|held| held.end() == range.start);
        let after = at + usize::from(joins_before);
        let joins_after = listed.get(after).is_some_and(|held| held.start == range.end());
        match (joins_before, joins_after) {
            (true, true) => {
                listed[at].len += range.len + listed[after].len;
                listed.remove(after);
                *ranges -= 1;
            }
            (true, false) => listed[at].len += range.len,
            (false, true) => listed[after] = ByteRange::new(range.start, range.len + listed[after].len),
            (false, false) if listed.len() < VERIFY_RANGES_LISTED_MAX => {
                listed.insert(at, range);
                *ranges += 1;
            }
            // Not listed, and so only known by where the last one ended.
            (false, false) => *ranges += u64::from(self.last_end != Some(range.start)),
        }
    }

    /// Begins no more steps.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Whether nothing is left and nothing under way.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.in_flight == 0 && (self.stopped || (self.cursor == self.size && self.again.is_empty()))
    }

    /// Whether all of the disk was compared.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.findings.compared == self.size
    }

    /// What was found so far.
    #[must_use]
    pub fn findings(&self) -> &Findings {
        &self.findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: u64 = 65536;

    /// Runs a whole verification with `depth` steps under way against a set of grains that differ.
    fn verify(
        size: u64,
        wanted: u64,
        depth: usize,
        differs: impl Fn(u64) -> bool,
    ) -> (Verify, Vec<ByteRange>) {
        let mut verify = Verify::new(size, G);
        let (mut under_way, mut found) = (VecDeque::new(), Vec::new());
        while !verify.is_done() {
            while under_way.len() < depth
                && let Some(range) = verify.next(wanted)
            {
                verify.took(range);
                under_way.push_back(range);
            }
            let range = under_way.pop_front().expect("a step, or it is done");
            let equal = !(range.start / G..range.end().div_ceil(G)).any(&differs);
            if verify.compared(range, equal) {
                found.push(range);
            }
        }
        (verify, found)
    }

    proptest! {
        #[test]
        fn it_finds_exactly_the_grains_that_differ(
            grains in 1..200_u64,
            tail in 0..G,
            differing in prop::collection::btree_set(0..200_u64, 0..40),
            wanted in 0..20 * G,
            depth in 1..9_usize,
        ) {
            let size = grains * G + tail;
            let (verify, mut found) = verify(size, wanted, depth, |grain| differing.contains(&grain));
            prop_assert!(verify.is_complete());
            found.sort_by_key(|range| range.start);
            let expected: Vec<u64> = differing.into_iter().filter(|grain| grain * G < size).collect();
            let starts: Vec<u64> = found.iter().map(|range| range.start / G).collect();
            prop_assert_eq!(&starts, &expected);
            let bytes: u64 = found.iter().map(|range| range.len).sum();
            prop_assert_eq!(verify.findings().differing, bytes);
            let listed: u64 = verify.findings().listed.iter().map(|range| range.len).sum();
            prop_assert_eq!(listed, bytes, "so few are all listed");
        }
    }

    #[test]
    fn neighbours_are_one_range_and_a_list_has_an_end() {
        let many = VERIFY_RANGES_LISTED_MAX as u64 + 10;
        let (run, _) = verify(4 * many * G, VERIFY_LEN_MAX, 4, |grain| grain % 4 < 2);
        let findings = run.findings();
        assert_eq!((findings.ranges, findings.differing), (many, 2 * many * G));
        assert_eq!(findings.listed.len(), VERIFY_RANGES_LISTED_MAX);
        assert!(
            findings.listed.iter().enumerate().all(|(i, r)| *r == ByteRange::new(4 * i as u64 * G, 2 * G))
        );
    }

    #[test]
    fn a_step_that_could_not_begin_comes_again_and_a_stop_waits_for_what_is_under_way() {
        let mut verify = Verify::new(10 * G, G);
        let first = verify.next(2 * G).expect("some");
        verify.took(first);
        verify.untake(first);
        assert_eq!(verify.next(8 * G), Some(first));
        verify.took(first);
        verify.stop();
        assert_eq!(verify.next(G), None);
        assert!(!verify.is_done());
        verify.compared(first, true);
        assert!(verify.is_done() && !verify.is_complete());
    }
}
