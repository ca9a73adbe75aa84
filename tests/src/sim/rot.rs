//! Sectors that differ silently, verifications that find them, and the rule `found-to-differ`.
//!
//! A rotten sector has other bytes in the cache and on the medium of one node. No rule but this one sees them: for the
//! others the checker takes a rotten sector for what it was ([`Rot::truth`]), wherever a copy carries it. The rule says:
//! - a standby that a verification found to differ neither serves nor is a source, until it is repaired or an operator says so
//!   by force, whatever becomes of either node;
//! - a standby is up to date again only when the sectors that rotted are what its peer holds;
//! - a verification that found nothing was of two disks without a difference.

use super::checker::{NAMES, Verdict, Violation, broken};
use super::clock::{Nanos, S};
use super::storage::SECTOR_LEN;
use super::world::World;
use costandby_control::role::{Connection, Role};
use costandby_datapath::disk::superblock::DiskState;
use costandby_datapath::reactor::command::Event as ReactorEvent;
use costandby_datapath::units::{AckLevel, ByteRange};
use std::collections::BTreeMap;

/// Longest that a daemon takes to put on record what it was told: one that ends before may have forgotten it.
const ON_RECORD: Nanos = 3 * S;

type SectorBytes = [u8; SECTOR_LEN];

/// What has rotted, and what was found.
#[derive(Debug, Default)]
pub(super) struct Rot {
    sectors: BTreeMap<usize, Vec<(SectorBytes, SectorBytes)>>,
    /// When a verification found the node's disk to differ.
    found: [Option<Nanos>; 2],
    /// A rule that was broken where nobody could say so.
    broken: Option<Violation>,
}

impl Rot {
    /// What `bytes` of `sector` would be had nothing rotted.
    pub(super) fn truth<'a>(&'a self, sector: usize, bytes: &'a [u8]) -> &'a [u8] {
        let known =
            self.sectors.get(&sector).and_then(|list| list.iter().find(|(rotten, _)| rotten == bytes));
        known.map_or(bytes, |(_, truth)| truth)
    }

    /// `node` answers a client, or is about to be copied from.
    pub(super) fn is_trusted(&self, node: usize, what: &str) -> Verdict {
        if self.found[node].is_some() {
            let text = format!("{} {what}, and a verification found its disk to differ", NAMES[node]);
            return broken("found-to-differ", text);
        }
        Ok(())
    }

    /// What was found on `node` counts no more: an operator said so, or its content was given up.
    pub(super) fn decided(&mut self, node: usize) {
        self.found[node] = None;
    }

    /// A rule that was broken since the last look.
    pub(super) fn verdict(&mut self) -> Verdict {
        self.broken.take().map_or(Ok(()), Err)
    }
}

impl World {
    /// A sector of `at` differs from now on. `None` where no verification could tell when that was.
    pub(super) fn rot(&mut self, at: usize) -> Option<&'static str> {
        let compares = self.nodes.iter().flat_map(|node| &node.process).any(|process| {
            let verifying = process.reactor.volume.counters();
            verifying.verifying.load(std::sync::atomic::Ordering::Relaxed)
                || process.driver.controller.status().verification.running
        });
        if compares || self.checker.rot.found != [None; 2] || self.nodes[at].disk.image.is_failed() {
            return None;
        }
        let sector = usize::try_from(self.rng.below(self.config.size)).expect("small") / SECTOR_LEN;
        let span = ByteRange::new((sector * SECTOR_LEN) as u64, SECTOR_LEN as u64);
        let held: SectorBytes = self.nodes[at].disk.read(span).try_into().expect("a sector");
        let medium = &mut self.nodes[at].disk.shadow[sector * SECTOR_LEN..][..SECTOR_LEN];
        if *medium != held {
            return None;
        }
        let mut rotten = held;
        rotten[256..264].copy_from_slice(&self.rng.next_u64().to_le_bytes());
        medium.copy_from_slice(&rotten);
        self.nodes[at].disk.image.span(span).write_from(&rotten);
        let rot = &mut self.checker.rot;
        let truth = rot.truth(sector, &held).try_into().expect("a sector");
        rot.sectors.entry(sector).or_default().push((rotten, truth));
        self.tell(at, format_args!("sector {sector} rots"));
        Some("a sector rots")
    }

    /// The volume of `at` tells this.
    pub(super) fn note_event(&mut self, at: usize, event: &ReactorEvent) {
        match event {
            ReactorEvent::FoundDifferent { .. } => {
                let Some(process) = &self.nodes[at].process else { return };
                let status = process.driver.controller.status();
                let in_sync = status.connection == Connection::Connected
                    && status.role == Role::Standby
                    && status.peer_primary == Some(true)
                    && status.disk_state == DiskState::UpToDate;
                if in_sync && self.checker.rot.found[at].is_none() {
                    self.seen.insert("a difference was found");
                    self.tell(at, format_args!("is found to differ"));
                    self.checker.rot.found[at] = Some(self.now());
                    self.undisturbed = false;
                    self.checker.invalidation_asked();
                    self.checker.invalidated(at);
                }
            }
            ReactorEvent::Verified { outcome, .. } => {
                if outcome.findings.differing > 0 {
                    self.undisturbed = false;
                    self.checker.invalidation_asked();
                } else if outcome.unfinished.is_none() && self.config.ack != AckLevel::Async {
                    self.seen.insert("a verification found nothing");
                    self.checker.rot.broken =
                        self.still_differs("after a verification that found nothing").err();
                }
                if outcome.repaired {
                    self.seen.insert("a difference was repaired");
                }
            }
            _ => {}
        }
    }

    /// What rotted is the same on both nodes, but for what is under way.
    fn still_differs(&mut self, when: &str) -> Verdict {
        self.checker.count("found-to-differ");
        for &sector in self.checker.rot.sectors.keys() {
            let span = ByteRange::new((sector * SECTOR_LEN) as u64, SECTOR_LEN as u64);
            let [one, other] = [0, 1].map(|at| self.nodes[at].disk.read(span));
            let is_rotten = |bytes: &[u8]| self.checker.rot.truth(sector, bytes) != bytes;
            if one != other && (is_rotten(&one) || is_rotten(&other)) && !self.checker.is_under_way(sector) {
                return broken("found-to-differ", format!("{when}, sector {sector} differs"));
            }
        }
        Ok(())
    }

    /// The disk of `at` is on record as up to date again.
    pub(super) fn differs_no_more(&mut self, at: usize) -> Verdict {
        if self.checker.rot.found[at].take().is_some() {
            self.still_differs("as a standby that was found to differ is up to date again")?;
        }
        Ok(())
    }

    /// The process of `at` ends. What it had no time to put on record it never knew.
    pub(super) fn forget_found(&mut self, at: usize) {
        let (now, whole) = (self.now(), self.record(at).up_to_date);
        let rot = &mut self.checker.rot;
        rot.found[at] = rot.found[at].filter(|found| !whole || now - found > ON_RECORD);
    }

    /// Both disks are up to date, as their nodes say.
    pub(super) fn is_repaired(&self) -> bool {
        let whole = |status: costandby_control::role::Status| status.disk_state == DiskState::UpToDate;
        let mut processes = self.nodes.iter().flat_map(|node| &node.process);
        processes.all(|process| whole(process.driver.controller.status()))
    }
}
