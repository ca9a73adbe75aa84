//! Which of two disks holds the volume's data: the decision at every handshake.
//!
//! Both controllers exchange a [`View`] of their disk in the hello and each runs [`compare`] and [`agree`] for itself;
//! nothing is negotiated. That only works because both are pure and symmetric: what A decides about (A, B) is the mirror
//! image of what B decides about (B, A). Property tests hold that.
//!
//! Forbidden outcomes, in this order: data that a client was told is safe is overwritten without an operator's word;
//! an inconsistent or torn disk is taken as a source; both nodes serve; a copy leaves out what differs. Where the histories
//! leave a doubt the verdict is [`Verdict::SplitBrain`] or [`Verdict::NoUsableDisk`] and both disks stay as they are;
//! where they leave one about what differs, everything is copied ([`Scope::Full`]).

use costandby_datapath::disk::superblock::{COPYING_WHOLE, DiskState, Generations};
use costandby_datapath::units::{Epoch, Generation};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// Whether a node serves the volume at the moment of the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServingRole {
    /// Does not serve, whatever it was before.
    Standby,
    /// Serves now.
    Primary,
}

/// A volume's identity and first generation, offered by each node and taken from the configured primary when both
/// disks are fresh.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lineage {
    /// Random, never all zeros.
    pub volume_id: [u8; 16],
    /// Random, never 0.
    pub generation: u64,
}

/// What a node remembers of the session whose link broke last. In memory only: who remembers was not restarted since, and
/// has what its disk had then, written or only in its cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recall {
    /// The session: the nonces of the hellos it began with, the one of the smaller name first.
    pub session: [u64; 2],
    /// Its epoch.
    pub epoch: u64,
    /// The generation of the data it was about.
    pub generation: u64,
    /// This node sent the changes.
    pub source: bool,
    /// Source: the target has said that it applied up to here. Target: it has applied up to here.
    pub applied: u64,
    /// Source: the last change that the target may have. Target: the same as `applied`.
    pub numbered: u64,
    /// Source: it has heard all of the target's map.
    pub map_told: bool,
    /// Source: it went on without the target since.
    pub alone: bool,
    /// The source's disk failed, and the target's stands in for it.
    #[serde(default)]
    pub diskless: bool,
}

impl Recall {
    /// Whether this is a source's and `other` a target's end of one session, with numbers that can be.
    fn meets(&self, other: &Self) -> bool {
        self.source
            && !other.source
            && self.session == other.session
            && self.epoch == other.epoch
            && self.generation == other.generation
            && self.diskless == other.diskless
            && (self.applied..=self.numbered).contains(&other.applied)
    }
}

/// Whether the target still has all that it had applied in the session that both remember, so that what was written here
/// since is all that differs, besides what either map has.
#[must_use]
pub fn knows(source: &View, target: &View) -> bool {
    let (Some(mine), Some(theirs)) = (&source.recall, &target.recall) else { return false };
    let same_epoch = mine.epoch == source.epoch.0 && theirs.epoch == target.epoch.0;
    mine.meets(theirs) && same_epoch && target.disk_state != DiskState::Failed && !target.is_serving()
}

/// Where the session goes on that both nodes remember: the last change that its target has applied. `None` where either
/// daemon was restarted, or anything happened since that is not in that session: the source went on alone, a promotion.
fn goes_on(mine: &View, theirs: &View) -> Option<u64> {
    let i_am_source = mine.recall.is_some_and(|recall| recall.source);
    let (source, target) = if i_am_source { (mine, theirs) } else { (theirs, mine) };
    if !knows(source, target) || source.size != target.size || source.volume_id != target.volume_id {
        return None;
    }
    let (sent, got) = (source.recall?, target.recall?);
    let holds = |view: &View| view.generations.current.0 == sent.generation;
    if sent.diskless {
        // The target's record that the source's disk is behind is a generation of its own.
        let stands_in = target.is_usable() && target.generations.descends_from(Generation(sent.generation));
        let serves = source.disk_state == DiskState::Failed && source.is_serving() && holds(source);
        return (stands_in && serves && !target.was_primary_unclean).then_some(got.applied);
    }
    let in_sync = target.disk_state == DiskState::UpToDate && holds(target);
    let in_copy = target.disk_state == DiskState::Inconsistent && target.copying.0 == sent.generation;
    let whole = source.is_usable() && !source.is_fresh() && holds(source) && !sent.alone;
    let serves = source.is_serving() || in_copy;
    (whole && serves && (in_sync || in_copy) && !target.was_primary_unclean).then_some(got.applied)
}

/// One node's disk as far as the decision needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// The volume's identity; zeros while not known.
    pub volume_id: [u8; 16],
    /// Bytes of the volume.
    pub size: u64,
    /// The highest fencing number this node has agreed to.
    pub epoch: Epoch,
    /// The data lineage.
    pub generations: Generations,
    /// What the content is worth.
    pub disk_state: DiskState,
    /// All zeros and never written.
    pub zeroed: bool,
    /// This node was primary when it stopped, and would be again.
    pub was_primary: bool,
    /// The disk may hold writes that the peer lacks although their generations are equal: a primary that crashed, or one
    /// that froze with writes in flight.
    pub was_primary_unclean: bool,
    /// A standby that died while applying: its last writes may be torn.
    pub applying_unclean: bool,
    /// A primary whose machine lost power: the disk may lack writes that were acknowledged on the strength of the peer's
    /// memory. Never where an acknowledgement promises nothing about the peer (`async`).
    pub lost_power: bool,
    /// The map of what may differ from the peer is not empty.
    pub dirty: bool,
    /// As on record, see [`Superblock::copying`](costandby_datapath::disk::superblock::Superblock::copying).
    pub copying: Generation,
    /// As on record, see [`Superblock::sessions_offered`](costandby_datapath::disk::superblock::Superblock::sessions_offered).
    pub sessions_offered: u64,
    /// As on record, see [`Superblock::sessions_begun`](costandby_datapath::disk::superblock::Superblock::sessions_begun).
    pub sessions_begun: u64,
    /// Whether it serves now.
    pub role: ServingRole,
    /// The configuration names this node as the volume's first primary.
    pub configured_primary: bool,
    /// What this node offers as the volume's beginning.
    pub proposed: Lineage,
    /// The session that this node remembers.
    pub recall: Option<Recall>,
}

impl View {
    fn is_fresh(&self) -> bool {
        self.generations.current == Generation::ZERO
    }

    /// Whether this is a new disk that may hold data and cannot be read from: it failed before it had met the peer's.
    #[must_use]
    pub fn is_lost_while_new(&self) -> bool {
        self.is_fresh() && !self.is_usable() && self.may_hold_data()
    }

    /// Whether something is on this new disk that is in no other place. `zeroed` is a proof that nothing is, and nothing proves
    /// the contrary. A disk whose content was given up, or that another one was being copied to, holds nothing in that sense.
    fn may_hold_data(&self) -> bool {
        let given_up = self.disk_state == DiskState::Inconsistent || self.copying != Generation::ZERO;
        !self.zeroed && !given_up
    }

    fn is_serving(&self) -> bool {
        self.role == ServingRole::Primary
    }

    /// Whether the disk may be read from, by clients or by a resync.
    fn is_usable(&self) -> bool {
        self.disk_state == DiskState::UpToDate && !self.applying_unclean
    }

    /// What the disk is, in a few words for an operator.
    #[must_use]
    pub fn disk_state_shown(&self) -> &'static str {
        match self.disk_state {
            DiskState::Failed if self.is_fresh() => "new and failed",
            _ if self.is_fresh() => "new",
            DiskState::UpToDate if self.applying_unclean => "torn in the middle of a write",
            state => state.as_str(),
        }
    }

    /// Whether a session began at `other` that this node, which was ready for it on record before, does not know: its disk
    /// and metadata are those of an earlier time.
    #[must_use]
    pub fn is_rolled_back(&self, other: &Self) -> bool {
        self.sessions_offered < other.sessions_begun
    }

    fn descends_from(&self, other: &Self) -> bool {
        self.generations.descends_from(other.generations.current)
    }
}

/// One of the two nodes, seen from where the decision is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The node that decides.
    Mine,
    /// Its peer.
    Theirs,
}

impl Side {
    /// The same node, seen from the peer.
    #[must_use]
    pub fn mirrored(self) -> Self {
        match self {
            Self::Mine => Self::Theirs,
            Self::Theirs => Self::Mine,
        }
    }
}

/// Why a disk has to be brought up to date.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Both disks are new and not known to be equal: the one that is not known to be empty is the one, or, where both are
    /// empty, the configured primary's.
    BothFresh,
    /// The target is a new disk.
    TargetFresh,
    /// The target's content is inconsistent, outdated or failed.
    TargetNotUpToDate,
    /// The source went on alone from what the target has.
    TargetBehind,
    /// The source crashed as primary, or froze: its disk may hold writes that were on their way.
    SourceHasInFlight,
    /// The target stopped while applying, or was primary before the one that serves now.
    TargetMayBeTorn,
    /// The target lost power while it was primary: the source has every write that it acknowledged, it may not.
    TargetLostPower,
    /// The target's disk and metadata are those of an earlier time (a snapshot, a backup): no record of its own tells what it
    /// lacks.
    TargetRolledBack,
    /// Generations are equal and both stopped in order, but one has parts on record that may differ.
    PartsMayDiffer,
}

impl Why {
    /// The reason in words, for the log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BothFresh => "both disks are new",
            Self::TargetFresh => "the target's disk is new",
            Self::TargetNotUpToDate => "the target's disk is not up to date",
            Self::TargetBehind => "the source went on while the target was away",
            Self::SourceHasInFlight => "writes were on their way when the source stopped",
            Self::TargetMayBeTorn => "the target stopped in the middle of a write",
            Self::TargetLostPower => {
                "the target lost power while it was primary and may lack acknowledged writes"
            }
            Self::TargetRolledBack => "the target's disk and metadata are older than its last session",
            Self::PartsMayDiffer => "parts of the disks are on record as differing",
        }
    }
}

/// How much of a disk has to be copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// What either node's map has: nothing else differs.
    Delta,
    /// Everything. The source has to mark that on record before the target may be overwritten.
    Full,
}

/// What two disks are to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Equal, byte for byte. With `adopt`, both take this lineage as their beginning.
    InSync {
        /// The configured primary's proposal, where both disks are new.
        adopt: Option<Lineage>,
    },
    /// One is to be overwritten with the other.
    Resync {
        /// Whose disk is read.
        source: Side,
        /// Why.
        why: Why,
        /// How much is copied.
        scope: Scope,
    },
    /// Both went on from a common past, each without the other.
    SplitBrain,
    /// Two different volumes, or no common past.
    Unrelated,
    /// Not the same number of bytes.
    SizeDiffers,
    /// Neither disk may be read from, or the newer one may not.
    NoUsableDisk,
    /// Both disks are new, and each may hold data: which of the two the volume begins with takes an operator's word.
    TwoWithData,
}

impl Verdict {
    /// The same verdict, seen from the peer.
    #[must_use]
    pub fn mirrored(self) -> Self {
        match self {
            Self::Resync { source, why, scope } => Self::Resync { source: source.mirrored(), why, scope },
            same => same,
        }
    }
}

/// Compares two disks. See the module's doc for what it guarantees.
#[must_use]
pub fn compare(mine: &View, theirs: &View) -> Verdict {
    if mine.size != theirs.size {
        return Verdict::SizeDiffers;
    }
    let id_unknown = |view: &View| view.is_fresh() && view.volume_id == [0; 16];
    if mine.volume_id != theirs.volume_id && !id_unknown(mine) && !id_unknown(theirs) {
        return Verdict::Unrelated;
    }
    match (mine.is_fresh(), theirs.is_fresh()) {
        (true, true) => both_fresh(mine, theirs),
        (true, false) => from_usable(mine, theirs, Side::Theirs, Why::TargetFresh),
        (false, true) => from_usable(mine, theirs, Side::Mine, Why::TargetFresh),
        (false, false) if mine.is_rolled_back(theirs) => rolled_back(mine, theirs, Side::Mine),
        (false, false) if theirs.is_rolled_back(mine) => rolled_back(mine, theirs, Side::Theirs),
        (false, false) => by_usability(mine, theirs),
    }
}

fn by_usability(mine: &View, theirs: &View) -> Verdict {
    match (mine.is_usable(), theirs.is_usable()) {
        (true, true) => both_usable(mine, theirs),
        (true, false) => one_usable(mine, theirs, Side::Mine),
        (false, true) => one_usable(mine, theirs, Side::Theirs),
        (false, false) => neither_usable(mine, theirs),
    }
}

/// The disk at `side` is of an earlier time than the other knows of, whatever its generation says: it is copied to, unless it
/// went on from there, which an operator has to look at.
fn rolled_back(mine: &View, theirs: &View, side: Side) -> Verdict {
    let (old, new) = match side {
        Side::Mine => (mine, theirs),
        Side::Theirs => (theirs, mine),
    };
    let same = old.generations.current == new.generations.current;
    if new.disk_state == DiskState::Inconsistent {
        // Its content is given up already; what the other one holds is all that there is.
        by_usability(mine, theirs)
    } else if old.is_serving() || (!same && old.descends_from(new)) {
        Verdict::SplitBrain
    } else if !new.is_usable() {
        Verdict::NoUsableDisk
    } else if same || new.descends_from(old) {
        resync(mine, theirs, side.mirrored(), Why::TargetRolledBack)
    } else {
        diverged(mine, theirs)
    }
}

fn resync(mine: &View, theirs: &View, source: Side, why: Why) -> Verdict {
    let (from, to) = match source {
        Side::Mine => (mine, theirs),
        Side::Theirs => (theirs, mine),
    };
    Verdict::Resync { source, why, scope: scope(from, to) }
}

/// Whether the two maps together say where the disks differ.
///
/// A map is relative to a generation: its own disk's, and that disk's base. So they do where the target holds the
/// source's generation or base but for what its own map says; where both sides left the same base, each on record with
/// what it did since; and in the middle of a copy, whose source had the union of both maps on record before the target
/// stored whom it copies.
fn scope(source: &View, target: &View) -> Scope {
    if target.is_rolled_back(source) || source.is_rolled_back(target) {
        // The maps are relative to a disk that one of the two had.
        return Scope::Full;
    }
    let (from, to) = (&source.generations, &target.generations);
    let is_known = |generation: Generation| generation != Generation::ZERO && generation != COPYING_WHOLE;
    let related = match target.disk_state {
        // What a failing medium lost stands in no map.
        DiskState::Failed | DiskState::Diskless => false,
        // It found itself to differ, and the source did not live to put on record where.
        DiskState::Outdated if target.copying == COPYING_WHOLE => false,
        DiskState::Inconsistent if target.copying != Generation::ZERO => {
            is_known(target.copying) && (target.copying == from.current || from.descends_from(target.copying))
        }
        state => {
            let same_past = is_known(to.base) && to.base == from.base;
            is_known(to.current)
                && (to.current == from.current
                    || to.current == from.base
                    || (state == DiskState::Inconsistent && same_past))
        }
    };
    if related { Scope::Delta } else { Scope::Full }
}

fn from_usable(mine: &View, theirs: &View, side: Side, why: Why) -> Verdict {
    let source = if side == Side::Mine { mine } else { theirs };
    if source.is_usable() { resync(mine, theirs, side, why) } else { Verdict::NoUsableDisk }
}

/// An empty disk is never the source of one that may hold data, whomever the configuration names, and also where that one has
/// failed: then nothing is copied and nobody serves before an operator says so.
fn both_fresh(mine: &View, theirs: &View) -> Verdict {
    if mine.is_lost_while_new() || theirs.is_lost_while_new() {
        return Verdict::NoUsableDisk;
    }
    let holds_data = |view: &View| view.is_usable() && view.may_hold_data();
    if holds_data(mine) && holds_data(theirs) {
        return Verdict::TwoWithData;
    }
    if let Some(side) = only(holds_data(mine), holds_data(theirs)) {
        return resync(mine, theirs, side, Why::BothFresh);
    }
    let (first, side) = match configured(mine, theirs) {
        Some(Side::Mine) => (mine, Side::Mine),
        Some(Side::Theirs) => (theirs, Side::Theirs),
        // The two configurations differ; picking either disk would be a guess.
        None => return Verdict::NoUsableDisk,
    };
    let untouched = |view: &View| view.is_usable() && !view.dirty;
    if untouched(mine) && untouched(theirs) {
        return Verdict::InSync { adopt: Some(first.proposed) };
    }
    match only(mine.is_usable(), theirs.is_usable()) {
        Some(side) => resync(mine, theirs, side, Why::BothFresh),
        None => from_usable(mine, theirs, side, Why::BothFresh),
    }
}

/// The one that the configuration names as the first primary, where both nodes' agree on it.
fn configured(mine: &View, theirs: &View) -> Option<Side> {
    only(mine.configured_primary, theirs.configured_primary)
}

fn only(mine: bool, theirs: bool) -> Option<Side> {
    match (mine, theirs) {
        (true, false) => Some(Side::Mine),
        (false, true) => Some(Side::Theirs),
        _ => None,
    }
}

fn both_usable(mine: &View, theirs: &View) -> Verdict {
    if mine.generations.current == theirs.generations.current {
        return equal_generations(mine, theirs);
    }
    match (theirs.descends_from(mine), mine.descends_from(theirs)) {
        (true, false) => resync(mine, theirs, Side::Theirs, Why::TargetBehind),
        (false, true) => resync(mine, theirs, Side::Mine, Why::TargetBehind),
        // Each in the other's past cannot come about; whoever made it so, no disk is safe to discard.
        (true, true) => Verdict::SplitBrain,
        (false, false) => diverged(mine, theirs),
    }
}

fn equal_generations(mine: &View, theirs: &View) -> Verdict {
    let serving = (mine.is_serving(), theirs.is_serving());
    match (mine.was_primary_unclean, theirs.was_primary_unclean) {
        (true, true) => Verdict::SplitBrain,
        _ if serving == (true, true) => Verdict::SplitBrain,
        (true, false) => one_crashed(mine, theirs, Side::Mine),
        (false, true) => one_crashed(mine, theirs, Side::Theirs),
        (false, false) if mine.dirty || theirs.dirty => parts_differ(mine, theirs),
        (false, false) => Verdict::InSync { adopt: None },
    }
}

/// Both are usable and of one generation, and the one at `side` crashed as primary or froze.
fn one_crashed(mine: &View, theirs: &View, side: Side) -> Verdict {
    let (crashed, other) = match side {
        Side::Mine => (mine, theirs),
        Side::Theirs => (theirs, mine),
    };
    if other.is_serving() {
        resync(mine, theirs, side.mirrored(), Why::TargetMayBeTorn)
    } else if crashed.lost_power && !other.lost_power {
        // What it had acknowledged was in two memories, and one of them still has it.
        resync(mine, theirs, side.mirrored(), Why::TargetLostPower)
    } else {
        resync(mine, theirs, side, Why::SourceHasInFlight)
    }
}

/// Nothing was in flight on either, so either may be the source; the one whose clients would notice is, and else the one
/// that says where they differ.
fn parts_differ(mine: &View, theirs: &View) -> Verdict {
    let serves = only(mine.is_serving(), theirs.is_serving());
    let source = serves.or_else(|| only(mine.was_primary, theirs.was_primary));
    let says = || only(mine.dirty, theirs.dirty);
    match source.or_else(says).or_else(|| configured(mine, theirs)) {
        Some(side) => resync(mine, theirs, side, Why::PartsMayDiffer),
        None => Verdict::NoUsableDisk,
    }
}

/// The disk at `side` may be read from, the other may not.
fn one_usable(mine: &View, theirs: &View, side: Side) -> Verdict {
    let (good, bad) = match side {
        Side::Mine => (mine, theirs),
        Side::Theirs => (theirs, mine),
    };
    let same = good.generations.current == bad.generations.current;
    // An inconsistent disk has given up its content already, so its lineage no longer protects anything.
    if same || good.descends_from(bad) || bad.disk_state == DiskState::Inconsistent {
        let why =
            if bad.disk_state == DiskState::UpToDate { Why::TargetMayBeTorn } else { Why::TargetNotUpToDate };
        return resync(mine, theirs, side, why);
    }
    if bad.descends_from(good) {
        // The unusable disk holds acknowledged writes that the usable one lacks: an operator's word is needed.
        return Verdict::NoUsableDisk;
    }
    diverged(good, bad)
}

fn neither_usable(mine: &View, theirs: &View) -> Verdict {
    let torn = |view: &View| view.disk_state == DiskState::UpToDate && !view.was_primary_unclean;
    let same = mine.generations.current == theirs.generations.current;
    // Two standbys that were told to expect a primary and never had one: a primary would be on record as such, so
    // nothing was written. A copy from either makes certain.
    match configured(mine, theirs) {
        Some(side) if same && torn(mine) && torn(theirs) => resync(mine, theirs, side, Why::TargetMayBeTorn),
        _ => Verdict::NoUsableDisk,
    }
}

/// Neither current generation is known to the other side.
fn diverged(mine: &View, theirs: &View) -> Verdict {
    let past = &mine.generations;
    let common = |generation: Generation| theirs.generations.descends_from(generation);
    if common(past.base) || past.history.iter().copied().any(common) {
        Verdict::SplitBrain
    } else {
        Verdict::Unrelated
    }
}

/// What the two nodes do about the verdict: the same on both, seen from either.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Agreement {
    /// What the disks are to each other.
    pub verdict: Verdict,
    /// Who serves once the session is up; nobody where neither did nor would.
    pub primary: Option<Side>,
    /// The fencing number both store before the session.
    pub epoch: u64,
    /// The session before goes on: its target has applied up to here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goes_on: Option<u64>,
}

impl Agreement {
    /// The same agreement, seen from the peer.
    #[must_use]
    pub fn mirrored(self) -> Self {
        Self {
            verdict: self.verdict.mirrored(),
            primary: self.primary.map(Side::mirrored),
            epoch: self.epoch,
            goes_on: self.goes_on,
        }
    }

    /// Whether it has one disk overwritten whose node serves: no node lets that happen unasked, so there is no session. Both
    /// see that, in the views that they decide on.
    #[must_use]
    pub fn overwrites_a_primary(&self, mine: &View, theirs: &View) -> bool {
        let Verdict::Resync { source, .. } = self.verdict else { return false };
        let target = if source == Side::Mine { theirs } else { mine };
        target.is_serving()
    }

    /// Whether a session follows.
    #[must_use]
    pub fn allows_session(&self) -> bool {
        matches!(self.verdict, Verdict::InSync { .. } | Verdict::Resync { .. })
    }
}

/// [`compare`], who serves afterwards, and under which epoch.
///
/// A serving primary stays; where its disk would become a target both controllers refuse ([`Agreement::overwrites_a_primary`]). A node that was primary when it
/// stopped resumes unless somebody else took over. On two fresh disks the configured primary begins, with a new epoch, unless
/// only the other's may hold data: then that one does.
#[must_use]
pub fn agree(mine: &View, theirs: &View) -> Agreement {
    let goes_on = goes_on(mine, theirs);
    let verdict = if goes_on.is_some() { as_before(mine, theirs) } else { compare(mine, theirs) };
    let epoch = mine.epoch.max(theirs.epoch);
    let may_serve = |side: Side| match verdict {
        Verdict::InSync { .. } => true,
        Verdict::Resync { source, .. } => source == side,
        _ => false,
    };
    let both_new = mine.is_fresh() && theirs.is_fresh();
    let pick = |claims: fn(&View) -> bool| match (
        claims(mine) && may_serve(Side::Mine),
        claims(theirs) && may_serve(Side::Theirs),
    ) {
        (true, false) => Some(Side::Mine),
        (false, true) => Some(Side::Theirs),
        (true, true) if mine.configured_primary != theirs.configured_primary => {
            Some(if mine.configured_primary { Side::Mine } else { Side::Theirs })
        }
        _ => None,
    };
    let first = || match verdict {
        Verdict::Resync { source, .. } if both_new => Some(source),
        _ if both_new => pick(|view| view.configured_primary),
        _ => None,
    };
    let primary = pick(View::is_serving).or_else(first).or_else(|| pick(|view| view.was_primary));
    let begins = both_new && primary.is_some();
    Agreement { verdict, primary, epoch: if begins { epoch.next().0 } else { epoch.0 }, goes_on }
}

/// The verdict of a session that goes on: what it was, or what its copy has come to.
fn as_before(mine: &View, theirs: &View) -> Verdict {
    let source = if mine.recall.is_some_and(|recall| recall.source) { Side::Mine } else { Side::Theirs };
    let target = if source == Side::Mine { theirs } else { mine };
    if target.disk_state == DiskState::UpToDate {
        return Verdict::InSync { adopt: None };
    }
    Verdict::Resync { source, why: Why::TargetNotUpToDate, scope: Scope::Delta }
}
