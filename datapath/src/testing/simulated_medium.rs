//! A medium in memory that tears and loses what was not synced, for tests: any subset of un-synced sectors survives a
//! loss of power, and each in any of the versions written since the last sync. A sync that fails leaves as little on it, but
//! what was written is read back until the power goes, and no later sync brings it there: so Linux keeps its pages.

use crate::disk::metadata::medium::Medium;
use crate::disk::metadata::sector::SECTOR_LEN;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A sequence of numbers that a seed gives, the same each time.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

#[derive(Debug, Default)]
struct State {
    /// What is read back.
    seen: BTreeMap<u64, [u8; SECTOR_LEN]>,
    /// What a loss of power leaves at least.
    synced: BTreeMap<u64, [u8; SECTOR_LEN]>,
    /// Versions written since the last sync.
    pending: BTreeMap<u64, Vec<[u8; SECTOR_LEN]>>,
    len: u64,
    /// After so many more syncs one fails; picks what that brings to stable storage nevertheless.
    sync_fails: Option<(u64, Dice)>,
    /// It did.
    sync_failed: bool,
    /// Sectors and syncs until the power is cut.
    budget: Option<u64>,
    syncs: u64,
    written: u64,
}

impl State {
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.budget {
            Some(0) => Err(io::Error::other("the power is cut")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Of what was written since the last sync, any part comes to stable storage.
    fn settle_some(&mut self, dice: &mut Dice) {
        for (sector, versions) in std::mem::take(&mut self.pending) {
            let pick = dice.below(versions.len() as u64 + 1);
            if let Some(version) = usize::try_from(pick).ok().and_then(|pick| versions.get(pick)) {
                self.synced.insert(sector, *version);
            }
        }
    }
}

/// The medium; clones are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Simulated(Arc<Mutex<State>>);

impl Simulated {
    pub(crate) fn with_len(len: u64) -> Self {
        let this = Self::default();
        this.0.lock().expect("not poisoned").len = len;
        this
    }

    /// The power is cut after this many sectors and syncs.
    pub(crate) fn cut_after(&self, steps: u64) {
        self.0.lock().expect("not poisoned").budget = Some(steps);
    }

    /// A sync fails, after so many that do not.
    pub(crate) fn fail_sync(&self, after: u64, dice: &mut Dice) {
        let seed = dice.below(u64::MAX >> 11);
        self.0.lock().expect("not poisoned").sync_fails = Some((after, Dice::new(seed)));
    }

    /// Whether one did since the last restart.
    pub(crate) fn sync_failed(&self) -> bool {
        self.0.lock().expect("not poisoned").sync_failed
    }

    /// What a restart finds; after a loss of power not all of it was there to stay.
    pub(crate) fn restart(&self, power_lost: bool, dice: &mut Dice) {
        let mut state = self.0.lock().expect("not poisoned");
        state.budget = None;
        state.sync_fails = None;
        state.sync_failed = false;
        if !power_lost {
            return;
        }
        state.settle_some(dice);
        state.seen = state.synced.clone();
    }

    /// Bytes written and syncs so far.
    pub(crate) fn cost(&self) -> (u64, u64) {
        let state = self.0.lock().expect("not poisoned");
        (state.written, state.syncs)
    }

    /// Sectors that were ever written.
    pub(crate) fn sectors(&self) -> usize {
        self.0.lock().expect("not poisoned").seen.len()
    }

    pub(crate) fn flip(&self, at: u64, mask: u8) {
        let mut byte = [0];
        self.read(at, &mut byte).expect("inside");
        self.write(at, &[byte[0] ^ mask]).expect("inside");
        self.sync().expect("simulated");
    }

    pub(crate) fn truncate(&self, len: u64) {
        self.0.lock().expect("not poisoned").len = len;
    }

    /// Copies `len` bytes from one place to another.
    pub(crate) fn copy(&self, from: u64, to: u64, len: usize) {
        let mut bytes = vec![0; len];
        self.read(from, &mut bytes).expect("inside");
        self.write(to, &bytes).expect("inside");
        self.sync().expect("simulated");
    }
}

impl Medium for Simulated {
    fn path(&self) -> &Path {
        Path::new("/simulated.meta")
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("not poisoned").len)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        let mut state = self.0.lock().expect("not poisoned");
        state.len = state.len.max(len);
        Ok(())
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let state = self.0.lock().expect("not poisoned");
        if at + bytes.len() as u64 > state.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.fill(0);
        let (start, end) = (at, at + bytes.len() as u64);
        let len = SECTOR_LEN as u64;
        for (sector, content) in state.seen.range(start / len..end.div_ceil(len)) {
            let first = (sector * len).max(start);
            let last = ((sector + 1) * len).min(end);
            let index = |n: u64| usize::try_from(n).expect("small");
            bytes[index(first - start)..index(last - start)]
                .copy_from_slice(&content[index(first - sector * len)..index(last - sector * len)]);
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock().expect("not poisoned");
        if at + bytes.len() as u64 > state.len {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = SECTOR_LEN as u64;
        let mut done = 0;
        while done < bytes.len() {
            state.spend()?;
            let here = at + done as u64;
            let offset = usize::try_from(here % len).expect("small");
            let step = (SECTOR_LEN - offset).min(bytes.len() - done);
            let mut content = state.seen.get(&(here / len)).copied().unwrap_or([0; SECTOR_LEN]);
            content[offset..offset + step].copy_from_slice(&bytes[done..done + step]);
            state.seen.insert(here / len, content);
            state.pending.entry(here / len).or_default().push(content);
            done += step;
        }
        state.written += bytes.len() as u64;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.0.lock().expect("not poisoned");
        state.spend()?;
        state.syncs += 1;
        match state.sync_fails.take() {
            Some((0, mut dice)) => {
                state.settle_some(&mut dice);
                state.sync_failed = true;
                return Err(io::Error::other("the medium failed"));
            }
            left => state.sync_fails = left.map(|(syncs, dice)| (syncs - 1, dice)),
        }
        for (sector, versions) in std::mem::take(&mut state.pending) {
            let last = versions.last().expect("an entry has a version");
            state.synced.insert(sector, *last);
        }
        Ok(())
    }
}
