//! The rule `empty-over-data`: before two new disks have met, a copy from one that is provably empty never goes to one that
//! may hold data, unless an operator gave that data up or chose the other disk.
//!
//! Beside the checker, which looks at requests: no client has written anything by then.

use super::checker::{NAMES, Verdict, broken};

/// What each disk was made as, until it is part of a volume or an operator spoke about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewDisks {
    empty: [Option<bool>; 2],
}

impl NewDisks {
    /// Two new disks, each made as zeros or holding data.
    pub(super) fn new(zeroed: [bool; 2]) -> Self {
        Self { empty: zeroed.map(Some) }
    }

    /// An operator chose the disk of `node`, or gave it up.
    pub(super) fn decided(&mut self, node: usize) {
        self.empty[node] = None;
    }

    /// A session begins at `node`, which copies its disk to the other.
    pub(super) fn copied_from(&mut self, node: usize) -> Verdict {
        if self.empty[node] == Some(true) && self.empty[1 - node] == Some(false) {
            let text = format!(
                "the new disk of {} is empty and is copied over that of {}, which holds data",
                NAMES[node],
                NAMES[1 - node]
            );
            return broken("empty-over-data", text);
        }
        self.empty = [None; 2];
        Ok(())
    }
}
