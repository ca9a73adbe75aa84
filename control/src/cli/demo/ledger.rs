//! What the demo's writer wrote, and what of it was acknowledged: the judge of every block read back.
//!
//! Sans-IO. The writer tells it of every write begun and acknowledged; the check hands it what a disk holds.
//!
//! Invariants: numbers only grow; a block has at most one write in flight, so acknowledged writes of a block have one
//! order; what a check has accepted once is the least that a later one accepts.

use super::block::{BLOCK_LEN, Block};
use std::collections::{HashMap, HashSet};

/// What a block's bytes mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// The last acknowledged write, or a later one that was under way.
    Good,
    /// Whole, but older than the last acknowledged write; 0 where nothing was ever written.
    Lost {
        /// The number of the write that is there.
        found: u64,
        /// The number of the last acknowledged one.
        acked: u64,
    },
    /// No whole write: a broken checksum, or something else's bytes.
    Torn,
    /// A whole write, but one that never went there.
    Stray {
        /// What it says it is.
        found: Block,
    },
}

/// The writes of one volume.
#[derive(Debug)]
pub(super) struct Ledger {
    nonce: u64,
    volume: u32,
    last: u64,
    /// By block, the last acknowledged number, 0 where there is none.
    acked: Vec<u64>,
    /// By block, the numbers begun after the last acknowledged one.
    open: HashMap<u64, Vec<u64>>,
    /// Blocks with a write in flight.
    busy: HashSet<u64>,
    acked_writes: u64,
}

impl Ledger {
    /// A ledger of a volume of zeros with `blocks` blocks.
    pub(super) fn new(nonce: u64, volume: u32, blocks: usize) -> Self {
        Self {
            nonce,
            volume,
            last: 0,
            acked: vec![0; blocks],
            open: HashMap::new(),
            busy: HashSet::new(),
            acked_writes: 0,
        }
    }

    /// Blocks of the volume.
    pub(super) fn blocks(&self) -> usize {
        self.acked.len()
    }

    /// Writes acknowledged so far.
    pub(super) fn acked_writes(&self) -> u64 {
        self.acked_writes
    }

    /// Begins a write, unless the block has one in flight.
    pub(super) fn begin(&mut self, block: u64) -> Option<Block> {
        if !self.busy.insert(block) {
            return None;
        }
        self.last += 1;
        self.open.entry(block).or_default().push(self.last);
        Some(Block { nonce: self.nonce, volume: self.volume, block, number: self.last })
    }

    /// The write in flight on `block` was acknowledged.
    ///
    /// # Panics
    /// When `number` is not in flight there.
    pub(super) fn acknowledge(&mut self, block: u64, number: u64) {
        assert!(self.busy.remove(&block), "block {block} has no write in flight");
        let open = self.open.remove(&block).unwrap_or_default();
        assert_eq!(open.last(), Some(&number), "block {block} has another write in flight");
        *self.slot(block) = number;
        self.acked_writes += 1;
    }

    /// The connection is gone: what was in flight may or may not have been written. Returns how many that were.
    pub(super) fn give_up(&mut self) -> usize {
        let count = self.busy.len();
        self.busy.clear();
        count
    }

    /// Judges what a disk holds at `block` while nothing is in flight, and takes a good block for the least that counts
    /// from now on: a write that was read once must stay, and one that was not there must not appear.
    pub(super) fn judge(&mut self, block: u64, bytes: &[u8; BLOCK_LEN]) -> Verdict {
        let acked = *self.slot(block);
        let open = self.open.get(&block).map_or(&[][..], Vec::as_slice);
        let found = match Block::decode(bytes) {
            Some(found) => {
                let of_this = (found.nonce, found.volume, found.block) == (self.nonce, self.volume, block);
                let newer = found.number > acked && !open.contains(&found.number);
                if !of_this || found.number == 0 || newer {
                    return Verdict::Stray { found };
                }
                found.number
            }
            None if bytes.iter().all(|&byte| byte == 0) => 0,
            None => return Verdict::Torn,
        };
        if found < acked {
            return Verdict::Lost { found, acked };
        }
        *self.slot(block) = found;
        self.open.remove(&block);
        Verdict::Good
    }

    fn slot(&mut self, block: u64) -> &mut u64 {
        let index = usize::try_from(block).expect("a block of this volume");
        &mut self.acked[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 3;

    fn ledger() -> Ledger {
        Ledger::new(99, 0, 8)
    }

    fn bytes_of(block: Block) -> [u8; BLOCK_LEN] {
        let mut bytes = [0; BLOCK_LEN];
        block.encode(&mut bytes);
        bytes
    }

    /// A write that was acknowledged.
    fn write(ledger: &mut Ledger) -> Block {
        let block = ledger.begin(AT).expect("free");
        ledger.acknowledge(AT, block.number);
        block
    }

    #[test]
    fn the_last_acknowledged_write_is_good_and_the_one_before_is_lost() {
        let mut ledger = ledger();
        let (old, new) = (write(&mut ledger), write(&mut ledger));
        assert_eq!(ledger.judge(AT, &bytes_of(new)), Verdict::Good);
        let lost = Verdict::Lost { found: old.number, acked: new.number };
        assert_eq!(ledger.judge(AT, &bytes_of(old)), lost);
        assert_eq!(ledger.acked_writes(), 2);
    }

    #[test]
    fn zeros_are_lost_once_a_write_was_acknowledged_and_good_before() {
        let mut ledger = ledger();
        assert_eq!(ledger.judge(AT, &[0; BLOCK_LEN]), Verdict::Good);
        let number = write(&mut ledger).number;
        assert_eq!(ledger.judge(AT, &[0; BLOCK_LEN]), Verdict::Lost { found: 0, acked: number });
    }

    #[test]
    fn an_unacknowledged_write_may_be_there_or_not_but_not_come_and_go() {
        for there in [true, false] {
            let mut ledger = ledger();
            let acked = write(&mut ledger);
            let open = ledger.begin(AT).expect("free");
            assert_eq!(ledger.give_up(), 1);
            let (seen, other) = if there { (open, acked) } else { (acked, open) };
            assert_eq!(ledger.judge(AT, &bytes_of(seen)), Verdict::Good);
            assert_ne!(ledger.judge(AT, &bytes_of(other)), Verdict::Good, "there: {there}");
        }
    }

    #[test]
    fn a_mixed_block_is_torn() {
        let mut ledger = ledger();
        let (old, new) = (bytes_of(write(&mut ledger)), bytes_of(write(&mut ledger)));
        let mut mixed = new;
        mixed[2048..].copy_from_slice(&old[2048..]);
        assert_eq!(ledger.judge(AT, &mixed), Verdict::Torn);
    }

    #[test]
    fn whole_writes_of_elsewhere_are_strays() {
        let mut ledger = ledger();
        let good = write(&mut ledger);
        let elsewhere = [
            Block { nonce: 98, ..good },
            Block { volume: 1, ..good },
            Block { block: AT + 1, ..good },
            Block { number: good.number + 1, ..good },
        ];
        for found in elsewhere {
            assert_eq!(ledger.judge(AT, &bytes_of(found)), Verdict::Stray { found });
        }
    }

    #[test]
    fn a_block_has_one_write_in_flight() {
        let mut ledger = ledger();
        let first = ledger.begin(AT).expect("free");
        assert_eq!(ledger.begin(AT), None);
        ledger.acknowledge(AT, first.number);
        assert!(ledger.begin(AT).is_some());
    }
}
