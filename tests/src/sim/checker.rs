//! What must be true of every run, whatever the production code thinks of itself.
//!
//! Each write carries its own number in every sector it fills, so a sector of any disk tells which write it holds; zeroes
//! stand for the beginning, a trim or a write of zeroes. The checker keeps a history of requests (asked, ended,
//! acknowledged) and, of each disk and sector, a *floor*: the latest moment at which a write was asked for that this disk
//! has to hold. A sector violates its floor when the write it holds had ended before that moment. It looks at bytes on
//! disks and media, at answers to clients and at the few durable facts of [`Record`], and at nothing else.
//!
//! The rules, by name:
//! - `torn`: a sector holds half of something, or what was never written there;
//! - `acked-here`, `acked-there`: an acknowledged write is in this disk's memory and, unless going alone is on record, in
//!   the peer's (levels `memory` and `durable`); `freeze` adds that the peer is whole, or an operator forced it;
//! - `durable-here`, `durable-there`: after a flush everything acknowledged before it was asked is on the media of both,
//!   alone on record aside; a FUA write and the level `durable` promise it of the write itself;
//! - `answered-or-closed`: a client is told of an error only where the disk has failed; where a node does not serve, or
//!   stops serving, its connection ends instead;
//! - `stale-read`: a read shows nothing older than what was acknowledged on this disk, or was read from it, before;
//! - `read-there`: of a write that is not acknowledged yet a read shows only what the peer has too, so that a failover
//!   takes nothing back that was seen;
//! - `prefix`: a disk that holds a write holds all that was acknowledged before that write was asked for;
//! - `lost`: what a settled disk has to hold is there after a power failure, and no copy overwrites a disk that has to hold
//!   more than its source, but where an operator said so;
//! - `unmarked`: a disk is on record as a mixture before the first byte of a copy may reach it;
//! - `serving`: answers come only from a disk on record as up to date and primary, and not from a standby's that lost power
//!   while it applied, until that is made good; writes under one pair of generation and epoch are acknowledged by one node;
//! - `uncovered`: what is on record on neither side as possibly different is the same on both media (see `coverage`);
//! - `idle`: a volume that was idle for long has nothing on record, so that a crash then costs no copy;
//! - `copied-needlessly`: a copy of what differs sends only grains that some record names, and where no process ended since
//!   the disks were equal, only those that were written to since no record named them;
//! - `found-to-differ`: a standby that was found to differ is not trusted before it is repaired (see `rot`);
//! - `empty-over-data`: of two new disks an empty one is not copied over one with data (see `new_disks`);
//! - `copied-after-a-reset`: no copy follows where a session in sync lost its link and nothing else happened;
//! - `unequal`: disks that call themselves in sync with nothing under way are equal, byte for byte.

use super::clock::{Nanos, seconds};
use super::coverage::Coverage;
use super::metadata::Record;
use super::rot::Rot;
use super::storage::{SECTOR_LEN, SimDisk, pattern};
use costandby_datapath::units::{AckLevel, ByteRange, OnPeerLoss};
use std::collections::BTreeMap;

/// A rule that was broken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Which, as in the list above.
    pub rule: &'static str,
    /// By what.
    pub text: String,
}

pub(super) type Verdict = Result<(), Violation>;

pub(super) fn broken(rule: &'static str, text: String) -> Verdict {
    Err(Violation { rule, text })
}

/// What a request does to its range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// Sectors take the request's number.
    Write,
    /// Sectors become zero.
    Zero,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    node: usize,
    effect: Effect,
    range: ByteRange,
    asked: Nanos,
    /// `Nanos::MAX` while its effect may still come.
    ended: Nanos,
    acked: bool,
    fua: bool,
}

/// Number of a change in the history, and in the sectors it writes.
pub(super) type ChangeId = u64;

#[derive(Clone, Copy, Default, Debug)]
struct Zeroes {
    pending: u32,
    ended: Nanos,
}

/// What one disk has to hold.
#[derive(Clone, Debug, Default)]
struct Duty {
    /// In memory, by sector.
    floor: Vec<Nanos>,
    /// On the medium.
    durable: Vec<Nanos>,
    /// On the medium for a flush that no client asked for, such as the one at the end of a session. A copy of this disk
    /// need not have that on its medium.
    flushed: Vec<Nanos>,
    /// What reads have shown.
    seen: Vec<Nanos>,
    /// When its content was last lost in part or given up; 0 once a copy has made it whole again.
    upset: Nanos,
    /// When anything but requests last changed its content.
    since: Nanos,
    /// When its host last lost power.
    lost_power: Nanos,
    /// When its host last lost power while it was on record as going on without its peer: what it had not flushed was
    /// nowhere else, and its peer is behind for good.
    lost_alone: Nanos,
    /// An operator made it serve content of unknown worth, or gave it up: what it lacks is the operator's loss.
    excused: bool,
    /// It lost power while it applied what a primary sent, and nothing has made it whole since.
    torn: bool,
    /// Its daemon died while it applied what a primary sent, or an operator invalidated it: until something has made it
    /// whole, nobody may read from it.
    behind: bool,
    /// An operator forced it to acknowledge alone.
    forced_alone: bool,
}

/// A flush that was asked for.
#[derive(Clone, Debug)]
pub(super) struct FlushAsked {
    node: usize,
    asked: Nanos,
    floor: Vec<Nanos>,
}

/// What a copy may send.
#[derive(Clone, Debug)]
struct CopyBound {
    began: Nanos,
    grain_sectors: usize,
    /// By sector.
    allowed: Vec<bool>,
}

/// The history and the rules.
#[derive(Debug)]
pub(super) struct Checker {
    ack: AckLevel,
    on_loss: OnPeerLoss,
    changes: Vec<Asked>,
    zeroes: Vec<Zeroes>,
    duties: [Duty; 2],
    servers: BTreeMap<(u64, u64), usize>,
    /// When neither record last named a sector: what was asked for since may have to be copied.
    unnamed_at: Vec<Nanos>,
    /// Since the disks were equal a process ended, a disk was given up or a copy of everything began: more may have to be.
    crashed: bool,
    /// What the copy of each node may send; `None`: everything.
    copies: [Option<CopyBound>; 2],
    /// The disks were equal once, and since then each side's record says what it changed.
    pub(super) related: bool,
    /// How often each rule was applied, so that a run can show what it covered.
    pub(super) applied: BTreeMap<&'static str, u64>,
    pub(super) rot: Rot,
}

pub(super) fn sectors(range: ByteRange) -> std::ops::Range<usize> {
    let index = |n: u64| usize::try_from(n).expect("small") / SECTOR_LEN;
    index(range.start)..index(range.end())
}

/// The bytes that change `id` writes to `range`.
pub(super) fn payload(id: ChangeId, range: ByteRange) -> Vec<u8> {
    sectors(range).flat_map(|sector| pattern(id, sector)).collect()
}

impl Checker {
    pub(super) fn new(size: u64, ack: AckLevel, on_loss: OnPeerLoss) -> Self {
        let count = sectors(ByteRange::new(0, size)).len();
        let duty = || Duty {
            floor: vec![0; count],
            durable: vec![0; count],
            flushed: vec![0; count],
            seen: vec![0; count],
            ..Duty::default()
        };
        let nothing = Asked {
            node: 0,
            effect: Effect::Zero,
            range: ByteRange::new(0, size),
            asked: 0,
            ended: 0,
            acked: false,
            fua: false,
        };
        Self {
            ack,
            on_loss,
            changes: vec![nothing],
            zeroes: vec![Zeroes::default(); count],
            duties: [duty(), duty()],
            servers: BTreeMap::new(),
            related: false,
            unnamed_at: vec![0; count],
            crashed: true,
            copies: [None, None],
            applied: BTreeMap::new(),
            rot: Rot::default(),
        }
    }

    pub(super) fn count(&mut self, rule: &'static str) {
        *self.applied.entry(rule).or_default() += 1;
    }

    /// A change is asked for.
    pub(super) fn ask(
        &mut self,
        now: Nanos,
        node: usize,
        effect: Effect,
        range: ByteRange,
        fua: bool,
    ) -> ChangeId {
        if effect == Effect::Zero {
            for zero in &mut self.zeroes[sectors(range)] {
                zero.pending += 1;
            }
        }
        self.changes.push(Asked { node, effect, range, asked: now, ended: Nanos::MAX, acked: false, fua });
        self.changes.len() as u64 - 1
    }

    /// Content from before the first request: one write over all.
    pub(super) fn beginning(&mut self, node: usize, size: u64) -> ChangeId {
        let id = self.ask(0, node, Effect::Write, ByteRange::new(0, size), false);
        self.changes[usize::try_from(id).expect("few")].ended = 0;
        id
    }

    /// A change can take no effect any more that it has not taken.
    pub(super) fn end(&mut self, now: Nanos, id: ChangeId) {
        let change = &mut self.changes[usize::try_from(id).expect("few")];
        if change.ended != Nanos::MAX {
            return;
        }
        change.ended = now;
        if change.effect == Effect::Zero {
            for zero in &mut self.zeroes[sectors(change.range)] {
                zero.pending -= 1;
                zero.ended = now;
            }
        }
    }

    /// When what `bytes` show of `sector` ended, and when it was asked for (zeroes: unknown, so the beginning).
    fn age(&self, bytes: &[u8], sector: usize) -> Result<(Nanos, Nanos, ChangeId), Violation> {
        let bytes = self.rot.truth(sector, bytes);
        let id = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        if bytes.iter().all(|&byte| byte == 0) {
            let zero = self.zeroes[sector];
            return Ok((if zero.pending > 0 { Nanos::MAX } else { zero.ended }, 0, 0));
        }
        let known = usize::try_from(id).ok().and_then(|at| self.changes.get(at)).filter(|change| {
            change.effect == Effect::Write
                && sectors(change.range).contains(&sector)
                && bytes == pattern(id, sector)
        });
        match known {
            Some(change) => Ok((change.ended, change.asked, id)),
            None => {
                let text = format!("sector {sector} holds no write's bytes: {:02x?}…", &bytes[..16]);
                Err(Violation { rule: "torn", text })
            }
        }
    }

    /// Every sector of `bytes`, which begin at `first`, is as young as `floor` says.
    fn hold(&self, rule: &'static str, whose: &str, bytes: &[u8], first: usize, floor: &[Nanos]) -> Verdict {
        for (at, sector) in bytes.chunks(SECTOR_LEN).enumerate() {
            let (ended, _, id) = self.age(sector, first + at)?;
            if ended < floor[at] {
                let text = format!(
                    "sector {} {whose} holds change {id}, which ended at {}, but must hold one asked for at {} or later{}",
                    first + at,
                    seconds(ended),
                    seconds(floor[at]),
                    self.named(first + at, floor[at]),
                );
                return broken(rule, text);
            }
        }
        Ok(())
    }

    fn named(&self, sector: usize, asked: Nanos) -> String {
        let found = self
            .changes
            .iter()
            .enumerate()
            .rev()
            .find(|(_, c)| c.asked == asked && sectors(c.range).contains(&sector));
        found.map_or_else(String::new, |(id, _)| format!(" (change {id})"))
    }

    /// The client hears that change `id` is done.
    pub(super) fn acked(
        &mut self,
        now: Nanos,
        id: ChangeId,
        disks: [&SimDisk; 2],
        records: [Record; 2],
    ) -> Verdict {
        let change = self.changes[usize::try_from(id).expect("few")];
        let (here, there) = (change.node, 1 - change.node);
        self.end(now, id);
        self.changes[usize::try_from(id).expect("few")].acked = true;
        self.serves(here, true, records[here])?;
        let span = sectors(change.range);
        let floor = vec![change.asked; span.len()];
        self.count("acked-here");
        self.hold("acked-here", NAMES[here], &disks[here].read(change.range), span.start, &floor)?;
        raise(&mut self.duties[here].floor[span.clone()], change.asked);
        let durable = change.fua || self.ack == AckLevel::Durable;
        let bytes = span.start * SECTOR_LEN..span.end * SECTOR_LEN;
        if durable {
            self.count("durable-here");
            let medium = &disks[here].shadow[bytes.clone()];
            self.hold("durable-here", NAMES[here], medium, span.start, &floor)?;
            raise(&mut self.duties[here].durable[span.clone()], change.asked);
        }
        let alone = !records[here].peer_has_current;
        if alone && self.on_loss == OnPeerLoss::Freeze && !self.duties[here].forced_alone {
            return broken(
                "acked-there",
                format!(
                    "{} acknowledged change {id} alone, and nobody had released it from `freeze`",
                    NAMES[here]
                ),
            );
        }
        if alone || (self.ack == AckLevel::Async && !durable) || self.duties[there].upset >= change.asked {
            return Ok(());
        }
        self.count("acked-there");
        self.hold("acked-there", NAMES[there], &disks[there].read(change.range), span.start, &floor)?;
        raise(&mut self.duties[there].floor[span.clone()], change.asked);
        if durable {
            self.count("durable-there");
            let medium = &disks[there].shadow[bytes];
            self.hold("durable-there", NAMES[there], medium, span.start, &floor)?;
            raise(&mut self.duties[there].durable[span], change.asked);
        }
        Ok(())
    }

    /// An operator wants everything copied.
    pub(super) fn invalidation_asked(&mut self) {
        self.crashed = true;
    }

    /// An operator has given up what `node` holds: only its peer holds all of it from now on.
    pub(super) fn invalidated(&mut self, node: usize) {
        self.duties[node].behind = true;
    }

    /// A copy begins. `undisturbed`: the disks were in sync, and nothing but links ended since.
    pub(super) fn copies_after(&mut self, undisturbed: bool) -> Verdict {
        self.count("copied-after-a-reset");
        let text = || "a copy begins where only a link was lost".to_owned();
        if undisturbed { broken("copied-after-a-reset", text()) } else { Ok(()) }
    }

    /// A flush is asked for.
    pub(super) fn ask_flush(&self, now: Nanos, node: usize) -> FlushAsked {
        FlushAsked { node, asked: now, floor: self.duties[node].floor.clone() }
    }

    /// The client hears that the flush is done.
    pub(super) fn flushed(
        &mut self,
        flush: &FlushAsked,
        disks: [&SimDisk; 2],
        records: [Record; 2],
    ) -> Verdict {
        let (here, there) = (flush.node, 1 - flush.node);
        self.serves(here, false, records[here])?;
        self.count("durable-here");
        self.hold("durable-here", NAMES[here], &disks[here].shadow, 0, &flush.floor)?;
        raise_all(&mut self.duties[here].durable, &flush.floor);
        // A peer that is being copied to is no replica before this node vouches for it; its own record follows.
        let whole = records[there].up_to_date || self.duties[there].upset == 0;
        let replica = records[here].peer_has_current && whole;
        if !replica || self.duties[there].upset >= flush.asked {
            return Ok(());
        }
        self.count("durable-there");
        self.hold("durable-there", NAMES[there], &disks[there].shadow, 0, &flush.floor)?;
        raise_all(&mut self.duties[there].floor, &flush.floor);
        raise_all(&mut self.duties[there].durable, &flush.floor);
        Ok(())
    }

    /// A start has flushed the disk of `node`.
    pub(super) fn flushed_at_start(&mut self, node: usize) {
        // With `async` that promises nothing: a peer that took over need not have it.
        if self.ack != AckLevel::Async {
            let duty = &mut self.duties[node];
            duty.durable = duty.floor.clone();
        }
    }

    /// What the flush that begins now at `node` will have made durable. Nothing that anybody may count on while the disk
    /// is a mixture.
    pub(super) fn flush_begins(&self, now: Nanos, node: usize, record: Record) -> Option<FlushAsked> {
        record.up_to_date.then(|| self.ask_flush(now, node))
    }

    /// A flush of the disk has ended well, whoever asked for it.
    pub(super) fn flush_ended(&mut self, flush: Option<&FlushAsked>) {
        let Some(flush) = flush else { return };
        let duty = &mut self.duties[flush.node];
        // With `async` that promises nothing: a peer that took over need not have it.
        if self.ack != AckLevel::Async && duty.upset < flush.asked {
            raise_all(&mut duty.flushed, &flush.floor);
        }
    }

    /// A client reads these bytes.
    pub(super) fn read(
        &mut self,
        node: usize,
        range: ByteRange,
        bytes: &[u8],
        disks: [&SimDisk; 2],
        records: [Record; 2],
    ) -> Verdict {
        self.serves(node, false, records[node])?;
        self.read_there(node, range, bytes, disks[1 - node], records[node])?;
        self.count("stale-read");
        let span = sectors(range);
        self.hold("stale-read", NAMES[node], bytes, span.start, &self.duties[node].floor[span.clone()])?;
        self.hold("stale-read", NAMES[node], bytes, span.start, &self.duties[node].seen[span.clone()])?;
        for (sector, bytes) in span.zip(bytes.chunks(SECTOR_LEN)) {
            let (_, asked, _) = self.age(bytes, sector)?;
            let seen = &mut self.duties[node].seen[sector];
            *seen = asked.max(*seen);
        }
        Ok(())
    }

    /// What a client was shown of a write that is still under way is not lost with this node.
    fn read_there(
        &mut self,
        node: usize,
        range: ByteRange,
        bytes: &[u8],
        peer: &SimDisk,
        record: Record,
    ) -> Verdict {
        if !record.peer_has_current || self.ack == AckLevel::Async {
            return Ok(());
        }
        self.count("read-there");
        let there = peer.read(range);
        let pairs = bytes.chunks(SECTOR_LEN).zip(there.chunks(SECTOR_LEN));
        for (sector, (shown, held)) in sectors(range).zip(pairs) {
            let (ended, asked, id) = self.age(shown, sector)?;
            if id > 0 && ended == Nanos::MAX && self.duties[1 - node].upset < asked {
                self.hold("read-there", NAMES[1 - node], held, sector, &[asked])?;
            }
        }
        Ok(())
    }

    fn serves(&mut self, node: usize, acks: bool, record: Record) -> Verdict {
        self.count("serving");
        self.rot.is_trusted(node, "answers")?;
        if !record.up_to_date || !record.primary || self.duties[node].torn {
            let torn = if self.duties[node].torn { " and it is torn" } else { "" };
            return broken(
                "serving",
                format!("{} answers while its record says {record:?}{torn}", NAMES[node]),
            );
        }
        if acks {
            let first = *self.servers.entry((record.generation, record.epoch)).or_insert(node);
            if first != node {
                let (generation, epoch) = (record.generation, record.epoch);
                return broken(
                    "serving",
                    format!("both nodes acknowledged writes in generation {generation:016x}, epoch {epoch}"),
                );
            }
        }
        Ok(())
    }

    /// What `disk` holds is a prefix: nothing is missing that was acknowledged before something it has was asked for.
    pub(super) fn prefix(&mut self, node: usize, disk: &SimDisk) -> Verdict {
        self.count("prefix");
        let content = disk.content();
        let mut newest = (0, 0);
        for (sector, bytes) in content.chunks(SECTOR_LEN).enumerate() {
            let (_, asked, id) = self.age(bytes, sector)?;
            newest = newest.max((asked, id));
        }
        // The youngest acknowledged write of each sector that had ended before the newest one held was asked for.
        let mut floor = vec![0; content.len() / SECTOR_LEN];
        // What was acknowledged before a disk was upset may be lost or have been given up.
        let since = self.duties[0].since.max(self.duties[1].since);
        for change in self.changes.iter().filter(|c| c.acked && c.asked > since && c.ended < newest.0) {
            raise(&mut floor[sectors(change.range)], change.asked);
        }
        let whose = format!("{}, which has change {} already,", NAMES[node], newest.1);
        self.hold("prefix", &whose, &content, 0, &floor)
    }

    /// `node`'s host lost power. Its record says whether it vouches for its disk.
    pub(super) fn lost_power(&mut self, now: Nanos, node: usize, disk: &SimDisk, record: Record) -> Verdict {
        let duty = &mut self.duties[node];
        duty.upset = now;
        duty.since = now;
        duty.seen.fill(0);
        duty.lost_power = now;
        if record.primary && !record.peer_has_current {
            duty.lost_alone = now;
        }
        let settled = record.up_to_date && (record.clean || !record.primary) && !record.applying;
        if !settled {
            duty.floor = duty.durable.clone();
            raise_all(&mut duty.floor, &duty.flushed);
            duty.torn = record.applying;
        }
        if !record.up_to_date {
            return Ok(());
        }
        self.count("lost");
        let floor = self.duties[node].floor.clone();
        self.hold("lost", NAMES[node], &disk.content(), 0, &floor)
    }

    /// A process ended: what was asked of it has no further effect.
    pub(super) fn ended(&mut self, now: Nanos, node: usize, record: Record) {
        self.duties[node].behind |= record.applying;
        let open: Vec<u64> = (0..)
            .zip(&self.changes)
            .filter(|(_, c)| c.node == node && c.ended == Nanos::MAX)
            .map(|(id, _)| id)
            .collect();
        for id in open {
            self.end(now, id);
        }
        self.duties[node].seen.fill(0);
        self.crashed = true;
    }

    /// The disk of `node` is being overwritten from its peer's from now on.
    pub(super) fn overwritten(&mut self, now: Nanos, node: usize) -> Verdict {
        self.count("lost");
        let (target, source) = (&self.duties[node], &self.duties[1 - node]);
        let excused = source.excused || target.excused;
        // With `async` a failover may lose what was acknowledged, but not what was flushed.
        let must = if self.ack == AckLevel::Async { &target.durable } else { &target.floor };
        // Two failures at once: what the source had not flushed was only in the memory of a node that had gone, too, or
        // of none.
        let gone = |asked: Nanos| asked < source.lost_alone || (target.behind && asked < source.lost_power);
        let lost = must.iter().zip(&source.floor).position(|(must, has)| must > has && !gone(*must));
        if let Some(sector) = lost.filter(|_| !excused) {
            let text = format!(
                "{} must hold of sector {sector} what was asked for at {}{} and is overwritten by {}, which only has to hold {}",
                NAMES[node],
                seconds(must[sector]),
                self.named(sector, must[sector]),
                NAMES[1 - node],
                seconds(source.floor[sector]),
            );
            return broken("lost", text);
        }
        let duty = &mut self.duties[node];
        duty.upset = now;
        duty.since = now;
        for list in [&mut duty.floor, &mut duty.durable, &mut duty.flushed, &mut duty.seen] {
            list.fill(0);
        }
        Ok(())
    }

    /// `source` is about to send the first byte of a copy to a peer with this record.
    pub(super) fn copies(&mut self, source: usize, target: Record) -> Verdict {
        self.count("unmarked");
        self.rot.is_trusted(source, "is copied from")?;
        // A target is no primary; one that is has restarted since, and been promoted: the connection is dead.
        if target.up_to_date && !target.primary && target.generation != 0 {
            let text =
                format!("{} is about to be copied over and its record says {target:?}", NAMES[1 - source]);
            return broken("unmarked", text);
        }
        Ok(())
    }

    /// The copy from `source` begins; with `delta` only what is on record as possibly different needs to be sent, and
    /// where no process ended since the disks were equal, only what was asked for since no record named it.
    pub(super) fn begin_copy(&mut self, now: Nanos, source: usize, delta: bool, coverages: [&Coverage; 2]) {
        if !delta {
            self.copies[source] = None;
            self.crashed = true;
            return;
        }
        let grain_sectors = usize::try_from(coverages[source].grain_len).expect("small") / SECTOR_LEN;
        let count = self.zeroes.len();
        let mut allowed: Vec<bool> = (0..count).map(|s| coverages.iter().any(|c| c.names(s))).collect();
        if !self.crashed {
            let asked = self.grains_asked(|at| self.unnamed_at[at], grain_sectors);
            for (allowed, asked) in allowed.iter_mut().zip(asked) {
                *allowed &= asked;
            }
        }
        self.copies[source] = Some(CopyBound { began: now, grain_sectors, allowed });
    }

    /// Sectors of grains that some change was asked for that had not ended before `since`, a moment for each sector.
    fn grains_asked(&self, since: impl Fn(usize) -> Nanos, grain_sectors: usize) -> Vec<bool> {
        let mut asked = vec![false; self.zeroes.len()];
        for change in self.changes.iter().skip(1) {
            let span = sectors(change.range);
            let start = span.start / grain_sectors * grain_sectors;
            let end = span.end.next_multiple_of(grain_sectors).min(asked.len());
            for (asked, sector) in asked[start..end].iter_mut().zip(start..) {
                *asked |= change.ended >= since(sector);
            }
        }
        asked
    }

    /// The copy from `source` sends this.
    pub(super) fn copies_range(&mut self, source: usize, range: ByteRange) -> Verdict {
        self.count("copied-needlessly");
        let Some(bound) = &self.copies[source] else { return Ok(()) };
        let span = sectors(range);
        let Some(sector) = span.clone().find(|&sector| !bound.allowed[sector]) else { return Ok(()) };
        let since = self.grains_asked(|_| bound.began, bound.grain_sectors);
        if span.into_iter().all(|sector| bound.allowed[sector] || since[sector]) {
            return Ok(());
        }
        let text = format!(
            "the copy from {} sends {range}, and nothing says that sector {sector} differs",
            NAMES[source]
        );
        broken("copied-needlessly", text)
    }

    /// `source` has it on record, and tells its peer, that the peer holds what it holds itself.
    pub(super) fn vouched(&mut self, source: usize) {
        self.crashed = false;
        let had = self.duties[source].clone();
        let duty = &mut self.duties[1 - source];
        // With `async`, what was acknowledged may still be on its way.
        duty.floor = if self.ack == AckLevel::Async { had.durable.clone() } else { had.floor };
        duty.durable = had.durable;
        duty.flushed.fill(0);
        duty.upset = 0;
        (duty.torn, duty.behind) = (false, false);
    }

    /// `node` has put on record that it holds what its peer vouched for. The peer may have gone on since.
    pub(super) fn copied(&mut self, now: Nanos, node: usize, disk: &SimDisk) -> Verdict {
        self.count("lost");
        for duty in &mut self.duties {
            duty.since = now;
            duty.excused = false;
        }
        self.duties[node].behind = false;
        let duty = &self.duties[node];
        self.hold("lost", NAMES[node], &disk.content(), 0, &duty.floor)?;
        self.hold("lost", &format!("{}'s medium", NAMES[node]), &disk.shadow, 0, &duty.durable)
    }

    /// An operator gave up what `node` holds (`create --force`), or its medium failed.
    pub(super) fn gave_up(&mut self, now: Nanos, node: usize) {
        self.crashed = true;
        let duty = &mut self.duties[node];
        duty.upset = now;
        duty.since = now;
        duty.excused = true;
        (duty.torn, duty.behind) = (false, false);
        self.rot.decided(node);
        for list in [&mut duty.floor, &mut duty.durable, &mut duty.flushed, &mut duty.seen] {
            list.fill(0);
        }
    }

    /// An operator said `promote --force` on `node`, which does not serve.
    pub(super) fn forced(&mut self, node: usize, record: Record) {
        if !record.up_to_date || record.applying {
            self.rot.decided(node);
            self.duties[node].excused = true;
            (self.duties[node].torn, self.duties[node].behind) = (false, false);
            self.duties[node].floor.fill(0);
            self.duties[node].durable.fill(0);
            self.duties[node].flushed.fill(0);
        }
    }

    /// An operator has `node` serve without its peer, or released it from `freeze`.
    pub(super) fn released(&mut self, node: usize) {
        self.duties[node].forced_alone = true;
    }

    /// Both are in sync again: a word of force is used up.
    pub(super) fn in_sync(&mut self) {
        self.related = true;
        for duty in &mut self.duties {
            duty.forced_alone = false;
        }
    }

    /// A session of two equal disks begins.
    pub(super) fn in_session(&mut self) {
        self.in_sync();
        self.crashed = false;
    }

    /// A disk that calls itself in sync holds all it has to.
    pub(super) fn whole(&mut self, node: usize, disk: &SimDisk) -> Verdict {
        self.count("lost");
        self.hold("lost", NAMES[node], &disk.content(), 0, &self.duties[node].floor)
    }

    /// Two disks that should be equal but for what is under way.
    pub(super) fn equal(&mut self, when: &str, disks: [&SimDisk; 2]) -> Verdict {
        self.count("unequal");
        let contents = disks.map(SimDisk::content);
        let pairs = contents[0].chunks(SECTOR_LEN).zip(contents[1].chunks(SECTOR_LEN));
        for (sector, (one, other)) in pairs.enumerate().filter(|(_, (one, other))| one != other) {
            let same = self.rot.truth(sector, one) == self.rot.truth(sector, other);
            if !same && !self.is_under_way(sector) {
                let (one, other) = (self.age(one, sector)?.2, self.age(other, sector)?.2);
                let text = format!(
                    "{when}, sector {sector} holds change {one} on {} and {other} on {}",
                    NAMES[0], NAMES[1]
                );
                return broken("unequal", text);
            }
        }
        Ok(())
    }

    /// Some record has changed.
    pub(super) fn look_at_records(&mut self, now: Nanos, coverages: [&Coverage; 2]) {
        for (sector, unnamed_at) in self.unnamed_at.iter_mut().enumerate() {
            if coverages.iter().all(|coverage| !coverage.names(sector)) {
                *unnamed_at = now;
            }
        }
    }

    /// What neither record names is the same in these two pictures of the disks.
    pub(super) fn uncovered(
        &mut self,
        when: &str,
        pictures: [&[u8]; 2],
        coverages: [&Coverage; 2],
    ) -> Verdict {
        if !self.related {
            return Ok(());
        }
        self.count("uncovered");
        let pairs = pictures[0].chunks(SECTOR_LEN).zip(pictures[1].chunks(SECTOR_LEN));
        for (sector, (one, other)) in pairs.enumerate().filter(|(_, (one, other))| one != other) {
            let same = self.rot.truth(sector, one) == self.rot.truth(sector, other);
            if !same && coverages.iter().all(|coverage| !coverage.names(sector)) {
                let (one, other) = (self.age(one, sector)?.2, self.age(other, sector)?.2);
                let text = format!(
                    "{when}, sector {sector} holds change {one} on {} and {other} on {}, and neither side's record says so",
                    NAMES[0], NAMES[1]
                );
                return broken("uncovered", text);
            }
        }
        Ok(())
    }

    pub(super) fn is_under_way(&self, sector: usize) -> bool {
        self.changes.iter().any(|c| c.ended == Nanos::MAX && sectors(c.range).contains(&sector))
    }

    /// The oldest change whose end is not known, for a stuck run's story.
    pub(super) fn open(&self) -> Option<ChangeId> {
        self.changes.iter().position(|change| change.ended == Nanos::MAX).map(|at| at as u64)
    }
}

/// The nodes' names, by index.
pub(super) const NAMES: [&str; 2] = ["alpha", "beta"];

fn raise(floor: &mut [Nanos], to: Nanos) {
    for at in floor {
        *at = to.max(*at);
    }
}

fn raise_all(floor: &mut [Nanos], to: &[Nanos]) {
    for (at, to) in floor.iter_mut().zip(to) {
        *at = (*to).max(*at);
    }
}
