//! Two disks and their metadata through random work and losses of power at every point: whatever differs between them is
//! dirty after a restart.
//!
//! The model keeps to what the activity log's doc asks of its caller and to nothing more, and knows the truth: which
//! version of each grain either disk has in memory and on stable storage.

use super::super::{Opened, create, open};
use crate::disk::activity_log::Touch;
use crate::disk::metadata::layout::Geometry;
use crate::disk::superblock::{Superblock, SuperblockError};
use crate::testing::simulated_medium::{Dice, Simulated};
use crate::units::{ByteRange, Epoch};
use proptest::prelude::*;
use std::collections::HashMap;

const GRAIN: u64 = 4096;
const EXTENT: u64 = 1 << 20;
const EXTENTS: u64 = 300;
const GRAINS: u64 = EXTENTS * EXTENT / GRAIN;

#[derive(Clone, Debug)]
enum Op {
    /// Some changes in a row, each of a few grains, a stride apart.
    Write {
        grain: u64,
        len: u64,
        count: u64,
        stride: u64,
    },
    /// A change that the peer does not answer for now.
    Half {
        grain: u64,
    },
    /// The peer answers for all of those.
    Finish,
    /// One step of a checkpoint with the peer: begin, flush here, flush there, end.
    Checkpoint,
    LinkDown {
        peer_loses_power: bool,
    },
    LinkUp,
    Resync {
        runs: u64,
    },
    StoreLagging,
    StoreSuperblock,
    Retire,
    Crash {
        power: bool,
        peer_power: bool,
    },
    /// The power goes in the middle of some store to come.
    CutAfter {
        steps: u64,
    },
    /// Some sync to come fails, and the daemon starts again without a loss of power.
    FailSync {
        after: u64,
    },
    /// The power goes during the start to come.
    CutRecovery {
        steps: u64,
    },
}

fn any_op() -> impl Strategy<Value = Op> {
    let grain = prop_oneof![0..GRAINS, 0..GRAINS / 20];
    prop_oneof![
        8 => (grain, 1..400u64, 1..60u64, 1..600u64)
            .prop_map(|(grain, len, count, stride)| Op::Write { grain, len, count, stride }),
        3 => (0..GRAINS).prop_map(|grain| Op::Half { grain }),
        2 => Just(Op::Finish),
        8 => Just(Op::Checkpoint),
        2 => any::<bool>().prop_map(|peer_loses_power| Op::LinkDown { peer_loses_power }),
        2 => Just(Op::LinkUp),
        3 => (1..200u64).prop_map(|runs| Op::Resync { runs }),
        1 => Just(Op::StoreLagging),
        1 => Just(Op::StoreSuperblock),
        1 => Just(Op::Retire),
        2 => any::<(bool, bool)>().prop_map(|(power, peer_power)| Op::Crash { power, peer_power }),
        3 => (0..60u64).prop_map(|steps| Op::CutAfter { steps }),
        2 => (0..6u64).prop_map(|after| Op::FailSync { after }),
        1 => (0..300u64).prop_map(|steps| Op::CutRecovery { steps }),
    ]
}

/// A disk's content: a version a grain.
#[derive(Default)]
struct Disk {
    seen: HashMap<u64, u64>,
    stable: HashMap<u64, u64>,
}

impl Disk {
    fn flush(&mut self) {
        self.stable.clone_from(&self.seen);
    }

    fn lose_power(&mut self, dice: &mut Dice) {
        for (grain, version) in &self.seen {
            if dice.below(2) == 0 {
                self.stable.insert(*grain, *version);
            }
        }
        self.seen.clone_from(&self.stable);
    }
}

struct World {
    medium: Simulated,
    meta: Opened<Simulated>,
    here: Disk,
    there: Disk,
    live: bool,
    half: Vec<ByteRange>,
    /// Of a checkpoint with the peer: flushed here, flushed there.
    flushed: Option<(bool, bool)>,
    version: u64,
    cut_recovery: Option<u64>,
    dice: Dice,
}

fn reopen(medium: &Simulated) -> Opened<Simulated> {
    open(medium.clone(), 0, "db", "alpha", EXTENTS * EXTENT).expect("opens after any loss of power")
}

impl World {
    fn new(seed: u64) -> Self {
        let medium = Simulated::default();
        let geometry = Geometry::new(EXTENTS * EXTENT, GRAIN, EXTENT, 136).expect("legal");
        let superblock = Superblock::fresh("db", "alpha", EXTENTS * EXTENT, true);
        create(&medium, 0, &superblock, geometry, 0xa3ea, false).expect("made");
        let mut meta = reopen(&medium);
        meta.recover().expect("nothing to recover");
        Self {
            medium,
            meta,
            here: Disk::default(),
            there: Disk::default(),
            live: true,
            half: Vec::new(),
            flushed: None,
            version: 0,
            cut_recovery: None,
            dice: Dice::new(seed),
        }
    }

    fn pump(&mut self) -> Result<(), SuperblockError> {
        while let Some(transaction) = self.meta.activity.next_transaction() {
            self.meta.area.commit(&transaction)?;
            self.meta.activity.committed(transaction.ticket);
        }
        Ok(())
    }

    /// Makes `range` hot. A peer that does not answer stands in the way of a checkpoint only by what it holds up.
    fn touch(&mut self, range: ByteRange) -> Result<bool, SuperblockError> {
        for _ in 0..3 {
            match self.meta.activity.touch(range) {
                Touch::Hot => return Ok(true),
                Touch::Wait(ticket) => {
                    self.pump()?;
                    assert!(self.meta.activity.is_committed(ticket));
                    return Ok(true);
                }
                Touch::Full => {
                    self.pump()?;
                    self.checkpoint()?;
                }
                Touch::TooLong => panic!("{range} is short"),
            }
        }
        Ok(false)
    }

    fn checkpoint(&mut self) -> Result<(), SuperblockError> {
        self.meta.activity.abort_checkpoint();
        self.flushed = None;
        self.meta.activity.begin_checkpoint();
        if self.live {
            self.here.flush();
            self.there.flush();
        } else {
            self.meta.activity.for_each_unconfirmed(|range| {
                let _ = self.meta.dirty.set(range);
            });
        }
        self.meta.area.store_unsaved(&mut self.meta.dirty)?;
        self.meta.activity.end_checkpoint();
        Ok(())
    }

    fn land(&mut self, range: ByteRange, answered: bool) {
        self.version += 1;
        for grain in range.start / GRAIN..range.end() / GRAIN {
            self.here.seen.insert(grain, self.version);
            if answered && self.live {
                self.there.seen.insert(grain, self.version);
            }
        }
        if answered {
            if !self.live {
                let _ = self.meta.dirty.set(range);
            }
            self.meta.activity.written(range);
        } else {
            self.half.push(range);
        }
    }

    fn free(&self, range: ByteRange) -> bool {
        !self.half.iter().any(|half| half.overlaps(range))
    }

    fn finish(&mut self) {
        for range in std::mem::take(&mut self.half) {
            if self.live {
                for grain in range.start / GRAIN..range.end() / GRAIN {
                    let version = self.here.seen[&grain];
                    self.there.seen.insert(grain, version);
                }
            } else {
                let _ = self.meta.dirty.set(range);
            }
            self.meta.activity.written(range);
        }
    }

    fn link_down(&mut self, peer_loses_power: bool) -> Result<(), SuperblockError> {
        if !std::mem::take(&mut self.live) {
            return Ok(());
        }
        self.meta.activity.abort_checkpoint();
        self.flushed = None;
        self.finish();
        self.meta.activity.for_each_unconfirmed(|range| {
            let _ = self.meta.dirty.set(range);
        });
        if peer_loses_power {
            self.there.lose_power(&mut self.dice);
        }
        self.store_superblock()
    }

    fn store_superblock(&mut self) -> Result<(), SuperblockError> {
        self.meta.superblock.epoch = Epoch(self.meta.superblock.epoch.0 + 1);
        self.meta.superblocks.store(&self.meta.superblock)
    }

    fn resync(&mut self, runs: u64) {
        for _ in 0..runs {
            let from = self.dice.below(EXTENTS * EXTENT);
            let Some(run) = self.meta.dirty.next_dirty(from, 64 * GRAIN) else { continue };
            if !self.live || !self.free(run) {
                continue;
            }
            for grain in run.start / GRAIN..run.end().div_ceil(GRAIN) {
                if let Some(&version) = self.here.seen.get(&grain) {
                    self.there.seen.insert(grain, version);
                } else {
                    self.there.seen.remove(&grain);
                    self.there.stable.remove(&grain);
                }
            }
            self.here.flush();
            self.there.flush();
            self.meta.dirty.clear(run);
        }
    }

    fn checkpoint_step(&mut self) -> Result<(), SuperblockError> {
        if !self.live {
            return Ok(());
        }
        match self.flushed {
            None => {
                self.meta.activity.begin_checkpoint();
                self.flushed = Some((false, false));
            }
            Some((false, there)) => {
                self.here.flush();
                self.flushed = Some((true, there));
            }
            Some((true, false)) => {
                self.there.flush();
                self.flushed = Some((true, true));
            }
            Some((true, true)) => {
                self.meta.area.store_unsaved(&mut self.meta.dirty)?;
                self.meta.activity.end_checkpoint();
                self.flushed = None;
            }
        }
        Ok(())
    }

    fn run(&mut self, op: &Op) -> Result<(), SuperblockError> {
        match *op {
            Op::Write { grain, len, count, stride } => {
                for step in 0..count {
                    let first = (grain + step * stride) % GRAINS;
                    let len = len.min(GRAINS - first);
                    let range = ByteRange::new(first * GRAIN, len * GRAIN);
                    if self.free(range) && self.touch(range)? {
                        self.land(range, true);
                    }
                }
            }
            Op::Half { grain } => {
                let range = ByteRange::new(grain * GRAIN, GRAIN);
                if self.half.len() < 20 && self.live && self.free(range) && self.touch(range)? {
                    self.land(range, false);
                }
            }
            Op::Finish => self.finish(),
            Op::Checkpoint => self.checkpoint_step()?,
            Op::LinkDown { peer_loses_power } => self.link_down(peer_loses_power)?,
            Op::LinkUp => self.live = true,
            Op::Resync { runs } => self.resync(runs),
            Op::StoreLagging => {
                let blocks = self.meta.dirty.take_lagging(2);
                self.meta.area.store_dirty(&blocks)?;
                blocks.iter().for_each(|block| self.meta.dirty.stored(block.index));
            }
            Op::StoreSuperblock => self.store_superblock()?,
            Op::Retire => {
                self.checkpoint()?;
                self.meta.activity.retire_idle();
                self.pump()?;
            }
            Op::Crash { power, peer_power } => self.crash(power, peer_power),
            Op::CutAfter { steps } => self.medium.cut_after(steps),
            Op::FailSync { after } => self.medium.fail_sync(after, &mut self.dice),
            Op::CutRecovery { steps } => self.cut_recovery = Some(steps),
        }
        Ok(())
    }

    fn crash(&mut self, power: bool, peer_power: bool) {
        self.live = false;
        self.half.clear();
        self.flushed = None;
        self.medium.restart(power, &mut self.dice);
        if power {
            self.here.lose_power(&mut self.dice);
        }
        if peer_power {
            self.there.lose_power(&mut self.dice);
        }
        if let Some(steps) = self.cut_recovery.take() {
            self.medium.cut_after(steps);
            let started = open(self.medium.clone(), 0, "db", "alpha", EXTENTS * EXTENT);
            let cut = started.map_or(true, |mut meta| meta.recover().is_err());
            self.medium.restart(cut, &mut self.dice);
        }
        self.meta = reopen(&self.medium);
        self.check("after a crash");
        assert_eq!(self.meta.report.activity_damage, None, "a crash is not damage");
        assert_eq!(self.meta.report.dirty_damage.sectors, 0, "a crash is not damage");
        self.meta.recover().expect("the power is back");
        self.meta = reopen(&self.medium);
        self.check("after a recovery");
        assert_eq!(self.meta.report.hot_extents, 0);
    }

    /// What differs between the disks is dirty.
    fn check(&self, when: &str) {
        for grain in self.here.seen.keys().chain(self.there.seen.keys()) {
            let at = ByteRange::new(grain * GRAIN, GRAIN);
            let differs = self.here.seen.get(grain) != self.there.seen.get(grain);
            let dirty = self.meta.dirty.next_dirty(at.start, GRAIN).is_some_and(|run| run.start == at.start);
            assert!(dirty || !differs, "grain {grain} differs {when} and is not dirty");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn what_differs_is_dirty_after_any_loss_of_power(
        seed in any::<u64>(),
        ops in proptest::collection::vec(any_op(), 1..120),
    ) {
        let mut world = World::new(seed);
        for op in &ops {
            if world.run(op).is_err() {
                let power = !world.medium.sync_failed();
                world.crash(power, seed.is_multiple_of(2));
            }
        }
        world.crash(true, true);
    }
}
