//! Why a handshake ended without a session, in words: what the two disks are, and what an operator can do on which node.
//!
//! Called for the verdicts of [`agree`](crate::generation::agree) that a controller refuses. The text goes to the peer, the
//! log and `status`. Each command that a text suggests stands with what it gives up.

use super::VolumeSettings;
use crate::generation::{Side, Verdict, View};
use costandby_datapath::disk::superblock::Generations;
use costandby_datapath::units::Generation;

pub(super) fn explain(verdict: Verdict, mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let VolumeSettings { volume, node, peer, .. } = settings;
    let commands = settings.commands();
    let either = |command| format!("{} or {}", commands.here(command), commands.there(command));
    let both =
        || format!("on {node} {}; on {peer} {}", history(&mine.generations), history(&theirs.generations));
    match verdict {
        Verdict::SizeDiffers => format!(
            "the volume has {} bytes on {node} and {} on {peer}: one disk was made with another `size`. Correct that in its \
             node's configuration, and make that disk anew, with its daemon stopped: {}, which gives up what the disk holds",
            mine.size,
            theirs.size,
            either("create --force")
        ),
        Verdict::SplitBrain => format!(
            "split brain: both nodes went on without the other ({}); nothing was changed. On the node whose data is not \
             wanted, and only there: `demote` if it serves, then {}, which gives up what that node wrote alone; then `connect \
             {volume}` on the other{}",
            both(),
            either("connect --discard-my-data"),
            put_back(mine, theirs, settings)
        ),
        Verdict::TwoWithData => format!(
            "both disks are new and neither is known to be empty, so each may hold data; nothing was changed. Choose whose data \
             the volume begins with, and say it on that node only: {}; the other one's disk is then overwritten with it",
            either("promote --force")
        ),
        Verdict::NoUsableDisk if mine.is_lost_while_new() || theirs.is_lost_while_new() => {
            lost_while_new(mine, theirs, settings)
        }
        Verdict::NoUsableDisk => format!(
            "neither disk can be copied from ({node}'s is {}, {peer}'s {}{}); nothing was changed. One of {} serves what that \
             node's disk holds, and gives up the other one's data: say it only on the node whose data is wanted",
            mine.disk_state_shown(),
            theirs.disk_state_shown(),
            newer(mine, theirs, settings),
            either("promote --force")
        ),
        _ => format!(
            "the disk of {node} and the one of {peer} have no common past ({}), so they may be two volumes': correct their \
             paths. If they are one volume's, on the node whose data is not wanted: stop its daemon, {}, which gives up what its \
             disk holds, and start it; then `connect {volume}` on the other",
            both(),
            either("create --force")
        ),
    }
}

/// What to do about two new disks of which one failed, or both, before the volume began.
fn lost_while_new(mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let VolumeSettings { node, peer, .. } = settings;
    let serve = |node: &str| settings.commands().on(node, "promote --force");
    let (failed, other) = match (mine.is_lost_while_new(), theirs.is_lost_while_new()) {
        (true, true) => {
            return format!(
                "neither disk can be copied from: the disks of {node} and of {peer} both failed before the volume began, and neither \
                 is known to be empty, so each may hold data; nothing was changed. Save what can be read of them first. One of {} \
                 and {} begins the volume with what that node's medium still gives, and gives up the other one's data",
                serve(node),
                serve(peer)
            );
        }
        (true, false) => ((node, mine), (peer, theirs)),
        (false, _) => ((peer, theirs), (node, mine)),
    };
    let ((failed, lost), (other, view)) = (failed, other);
    format!(
        "neither disk can be copied from unasked: the disk of {failed} ({}) is not known to be empty, so it MAY HOLD DATA, and \
         failed before the volume began; {other}'s is {}{}. Nothing was changed. If {failed}'s data is wanted, save what can be read of \
         it first; {} then begins the volume with what its medium still gives, and {other}'s disk is overwritten. {} begins it with \
         {other}'s disk, and gives {failed}'s data up",
        lost.disk_state_shown(),
        view.disk_state_shown(),
        if view.zeroed { " and known to be empty" } else { "" },
        serve(failed),
        serve(other)
    )
}

/// Which of two disks is of an earlier time, where one is.
fn put_back(mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let old = match (mine.is_rolled_back(theirs), theirs.is_rolled_back(mine)) {
        (true, _) => &settings.node,
        (_, true) => &settings.peer,
        _ => return String::new(),
    };
    format!(
        ". The disk of {old} and its metadata are older than its last session (a snapshot that was put back?), and it went on \
         from there"
    )
}

/// Why neither node has a session, where one went on from what the other one has, which serves: the same text on both.
/// `ahead` is the one that went on.
pub(super) fn overtaken(ahead: Side, mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let VolumeSettings { node, peer, .. } = settings;
    let ((ahead, its), (serves, other)) = match ahead {
        Side::Mine => ((node, mine), (peer, theirs)),
        Side::Theirs => ((peer, theirs), (node, mine)),
    };
    let commands = settings.commands();
    format!(
        "split brain: {ahead} went on without {serves}, which serves ({ahead}: {}; {serves}: {}). Nothing was changed, and each \
         node goes on as it is until an operator chooses. For the data of {ahead}: {} makes {serves} a copy of {ahead}, and what only \
         {serves} holds is lost. For the data of {serves}: {}, then {}, makes {ahead} a copy of {serves}, and what {ahead} wrote since \
         they parted is lost",
        history(&its.generations),
        history(&other.generations),
        commands.on(serves, "demote"),
        commands.on(ahead, "demote"),
        commands.on(ahead, "connect --discard-my-data"),
    )
}

/// Which of two disks went on from what the other one has, where that is known.
fn newer(mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let went_on = |one: &View, other: &View| one.generations.descends_from(other.generations.current);
    match (went_on(mine, theirs), went_on(theirs, mine)) {
        (true, false) => format!("; {}'s holds the newer data", settings.node),
        (false, true) => format!("; {}'s holds the newer data", settings.peer),
        _ => String::new(),
    }
}

fn history(generations: &Generations) -> String {
    let past = [generations.current, generations.base].into_iter().chain(generations.history);
    let mut known: Vec<_> = past.filter(|&generation| generation != Generation::ZERO).collect();
    // The base is the first of the history as well, or stands in it.
    known.dedup();
    let shown: Vec<_> = known.iter().map(|generation| format!("{:016x}", generation.0)).collect();
    if shown.is_empty() { "new".to_owned() } else { shown.join(" ← ") }
}
