//! Metadata that forgets: the production format 2 on a medium in memory, and a shadow of what is on stable storage.
//!
//! A [`SimMedium`] stands in for the file beside a disk. What is written can be read back at once; a sync brings it to the
//! shadow, but only when the simulated call ends ([`SimMeta::end_call`]). A call that is cut off before has some of its
//! syncs behind it; of what it wrote after them a loss of power leaves of each 512-byte sector the old one or any version
//! written since, and the end of the process leaves what it had handed to the system.
//! One call is under way at a time, as the production code has one lock for a whole area.
//!
//! A start may be cut off in the middle (`cut_after`), so that recovery is interrupted too.

use super::coverage::Coverage;
use crate::Rng;
use costandby_datapath::disk::metadata::layout::Geometry;
use costandby_datapath::disk::metadata::medium::Medium;
use costandby_datapath::disk::metadata::{self, Opened};
use costandby_datapath::disk::superblock::{DiskState, SUPERBLOCK_LEN, Superblock};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::network::lock;
use super::storage::SECTOR_LEN;

type SectorBytes = [u8; SECTOR_LEN];

/// A sector that the call under way has written, after so many of its syncs.
#[derive(Debug)]
struct Written {
    syncs: u64,
    sector: usize,
    before: SectorBytes,
    after: SectorBytes,
}

#[derive(Debug, Default)]
struct Content {
    /// What is read back.
    seen: Vec<u8>,
    /// What is on stable storage.
    shadow: Vec<u8>,
    /// Versions of a sector that were written and not synced.
    pending: BTreeMap<usize, Vec<SectorBytes>>,
    /// What the call under way has written, the oldest first.
    written: Vec<Written>,
    /// Syncs of that call.
    syncs: u64,
    /// A call is under way: whether its syncs have taken effect shows when it ends.
    in_call: bool,
    /// The next sync fails.
    sync_fails: bool,
    /// Sectors and syncs until whoever writes is cut off.
    budget: Option<u64>,
}

impl Content {
    fn settle(&mut self) {
        for sector in std::mem::take(&mut self.pending).into_keys() {
            let at = sector * SECTOR_LEN..(sector + 1) * SECTOR_LEN;
            self.shadow[at.clone()].copy_from_slice(&self.seen[at]);
        }
    }

    /// The call under way is cut off, some of its syncs done, and everything before them.
    fn cut_call(&mut self, rng: &mut Rng) {
        (self.in_call, self.sync_fails) = (false, false);
        let synced = rng.below(self.syncs + 1);
        let of_last = self.written.iter().filter(|written| written.syncs == synced).count();
        let mut left = usize::try_from(rng.below(2 * of_last as u64 + 1)).expect("small").min(of_last);
        let mut undone = Vec::new();
        for written in std::mem::take(&mut self.written) {
            if written.syncs < synced {
                self.shadow[written.sector * SECTOR_LEN..][..SECTOR_LEN].copy_from_slice(&written.after);
                self.pending.remove(&written.sector);
            } else if written.syncs == synced && left > 0 {
                left -= 1;
                self.pending.entry(written.sector).or_default().push(written.after);
            } else {
                undone.push(written);
            }
        }
        for Written { sector, before, .. } in undone.into_iter().rev() {
            self.seen[sector * SECTOR_LEN..][..SECTOR_LEN].copy_from_slice(&before);
        }
    }

    fn spend(&mut self) -> io::Result<()> {
        match &mut self.budget {
            Some(0) => Err(io::Error::other("cut off")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The medium; clones are the same one.
#[derive(Clone, Debug, Default)]
pub(super) struct SimMedium(Arc<Mutex<Content>>);

impl Medium for SimMedium {
    fn path(&self) -> &Path {
        Path::new("/simulated.meta")
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0).seen.len() as u64)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        let mut content = lock(&self.0);
        let len = usize::try_from(len).expect("small").max(content.seen.len()).next_multiple_of(SECTOR_LEN);
        content.seen.resize(len, 0);
        content.shadow.resize(len, 0);
        Ok(())
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let content = lock(&self.0);
        let at = usize::try_from(at).expect("small");
        let found = content.seen.get(at..at + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut content = lock(&self.0);
        let at = usize::try_from(at).expect("small");
        assert!(at.is_multiple_of(SECTOR_LEN) && bytes.len().is_multiple_of(SECTOR_LEN), "whole sectors");
        if at + bytes.len() > content.seen.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        for (sector, bytes) in (at / SECTOR_LEN..).zip(bytes.chunks_exact(SECTOR_LEN)) {
            content.spend()?;
            let place = &mut content.seen[sector * SECTOR_LEN..][..SECTOR_LEN];
            let before: SectorBytes = (&*place).try_into().expect("a sector");
            place.copy_from_slice(bytes);
            let after: SectorBytes = bytes.try_into().expect("a sector");
            if content.in_call {
                let syncs = content.syncs;
                content.written.push(Written { syncs, sector, before, after });
            } else {
                content.pending.entry(sector).or_default().push(after);
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut content = lock(&self.0);
        content.spend()?;
        if std::mem::take(&mut content.sync_fails) {
            return Err(io::Error::other("simulated input/output error"));
        }
        if content.in_call {
            content.syncs += 1;
        } else {
            content.settle();
        }
        Ok(())
    }
}

/// How a start went.
pub(super) enum Start {
    /// The area, recovered.
    Open(Box<Opened<SimMedium>>),
    /// It was cut off in the middle.
    CutOff,
}

/// A disk's metadata.
#[derive(Debug)]
pub(super) struct SimMeta {
    medium: SimMedium,
    geometry: Geometry,
    record: Record,
    coverage: Coverage,
}

impl SimMeta {
    pub(super) fn new(superblock: &Superblock, geometry: Geometry, area: u64) -> Self {
        let (record, coverage) = (Record::default(), Coverage::default());
        let mut meta = Self { medium: SimMedium::default(), geometry, record, coverage };
        meta.recreate(superblock, area);
        meta
    }

    /// As `costandby create --force` does.
    pub(super) fn recreate(&mut self, superblock: &Superblock, area: u64) {
        metadata::create(&self.medium, 0, superblock, self.geometry, area, true).expect("memory holds it");
        self.look();
    }

    /// As a daemon opens it. With `cut_after`, it is cut off after so many sectors and syncs.
    pub(super) fn open(&mut self, node: &str, size: u64, cut_after: Option<u64>) -> Result<Start, String> {
        lock(&self.medium.0).budget = cut_after;
        let opened = metadata::open(self.medium.clone(), 0, "db", node, size);
        let opened = opened.map_err(|error| error.to_string()).and_then(|mut opened| {
            opened.recover().map_err(|error| error.to_string())?;
            Ok(opened)
        });
        let cut_off = lock(&self.medium.0).budget.take() == Some(0) && opened.is_err();
        self.look();
        if cut_off { Ok(Start::CutOff) } else { opened.map(|opened| Start::Open(Box::new(opened))) }
    }

    /// A call begins; with `fails`, its sync will.
    pub(super) fn begin_call(&mut self, fails: bool) {
        let mut content = lock(&self.medium.0);
        assert!(!std::mem::replace(&mut content.in_call, true), "one call at a time");
        content.sync_fails = fails;
        content.syncs = 0;
    }

    /// The call ends; what it synced is on stable storage.
    pub(super) fn end_call(&mut self, failed: bool) {
        let mut content = lock(&self.medium.0);
        content.in_call = false;
        content.sync_fails = false;
        for Written { sector, after, .. } in std::mem::take(&mut content.written) {
            content.pending.entry(sector).or_default().push(after);
        }
        if !failed {
            content.settle();
        }
        drop(content);
        self.look();
    }

    /// The process ends in the middle of a call.
    pub(super) fn abandon_call(&mut self, rng: &mut Rng) {
        lock(&self.medium.0).cut_call(rng);
        self.look();
    }

    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        let mut content = lock(&self.medium.0);
        content.cut_call(rng);
        for (sector, versions) in std::mem::take(&mut content.pending) {
            let pick = usize::try_from(rng.below(versions.len() as u64 + 1)).expect("small");
            if let Some(version) = versions.get(pick) {
                content.shadow[sector * SECTOR_LEN..][..SECTOR_LEN].copy_from_slice(version);
            }
        }
        content.seen = content.shadow.clone();
        drop(content);
        self.look();
    }

    /// What the newest good copy on the medium says.
    pub(super) fn durable(&self) -> Record {
        self.record
    }

    /// What is on record as possibly different from the peer.
    pub(super) fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    fn look(&mut self) {
        let content = lock(&self.medium.0);
        let found = Record::newest(&content.shadow);
        self.coverage.look(&content.shadow, self.geometry.size());
        drop(content);
        // A start that was cut off while it made an area anew leaves none.
        self.record = found.unwrap_or(self.record);
    }
}

/// What rules need to know of a superblock.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Record {
    pub(super) epoch: u64,
    pub(super) generation: u64,
    pub(super) primary: bool,
    /// Stopped with all it had on stable storage.
    pub(super) clean: bool,
    pub(super) applying: bool,
    /// Going on alone is not on record: the peer counts as equal.
    pub(super) peer_has_current: bool,
    /// The content is one state of the volume, not a mixture.
    pub(super) up_to_date: bool,
    /// The same, and possibly an old one, or one with parts that differ from the peer's.
    pub(super) unmixed: bool,
}

impl Record {
    fn newest(area: &[u8]) -> Option<Self> {
        use costandby_datapath::disk::metadata::header::Header;
        let copies = [0, SUPERBLOCK_LEN].map(|at| Header::decode(&area[at..at + SUPERBLOCK_LEN]).ok());
        let newest = copies.into_iter().flatten().max_by_key(|(_, sequence)| *sequence);
        let (Header { superblock, .. }, _) = newest?;
        Some(Self {
            epoch: superblock.epoch.0,
            generation: superblock.generations.current.0,
            primary: superblock.primary,
            clean: superblock.clean,
            applying: superblock.applying,
            peer_has_current: superblock.peer_has_current,
            up_to_date: superblock.disk_state == DiskState::UpToDate,
            unmixed: matches!(superblock.disk_state, DiskState::UpToDate | DiskState::Outdated),
        })
    }
}
