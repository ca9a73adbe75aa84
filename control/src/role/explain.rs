//! Why a handshake ended without a session, in words: what the two disks are, and what an operator can do on which node.
//!
//! Called for the verdicts of [`agree`](crate::generation::agree) that a controller refuses. The text goes to the peer, the
//! log and `status`. Each command that a text suggests stands with what it gives up.

use super::VolumeSettings;
use crate::generation::{Verdict, View};
use costandby_datapath::disk::superblock::Generations;
use costandby_datapath::units::Generation;

pub(super) fn explain(verdict: Verdict, mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let VolumeSettings { volume, node, peer, .. } = settings;
    let both =
        || format!("on {node} {}; on {peer} {}", history(&mine.generations), history(&theirs.generations));
    match verdict {
        Verdict::SizeDiffers => format!(
            "the volume has {} bytes on {node} and {} on {peer}: one disk was made with another `size`. Correct that in its \
             node's configuration, and make that disk anew (with its daemon stopped, `costandby create {volume} --force`, which \
             gives up what it holds)",
            mine.size, theirs.size
        ),
        Verdict::SplitBrain => format!(
            "split brain: both nodes went on without the other ({}); nothing was changed. On the node whose data is not \
             wanted, and only there: `costandby connect {volume} --discard-my-data` (after `demote`, if it serves), which gives \
             up what it wrote alone; then `costandby connect {volume}` on the other{}",
            both(),
            put_back(mine, theirs, settings)
        ),
        Verdict::TwoWithData => format!(
            "both disks are new and neither is known to be empty, so each may hold data; nothing was changed. Choose whose data \
             the volume begins with: `costandby promote {volume} --force` on that node, {node} or {peer}, and on that one only; \
             the other one's disk is then overwritten with it"
        ),
        Verdict::NoUsableDisk if mine.is_lost_while_new() || theirs.is_lost_while_new() => {
            lost_while_new(mine, theirs, settings)
        }
        Verdict::NoUsableDisk => format!(
            "neither disk can be copied from ({node}'s is {}, {peer}'s {}{}); nothing was changed. `costandby promote {volume} \
             --force` serves what one of them holds, and gives up the other one's data: say it only on the node whose data is \
             wanted",
            mine.disk_state_shown(),
            theirs.disk_state_shown(),
            newer(mine, theirs, settings)
        ),
        _ => format!(
            "the disk of {node} and the one of {peer} have no common past ({}), so they may be two volumes': correct their \
             paths. If they are one volume's, on the node whose data is not wanted: stop its daemon, `costandby create {volume} \
             --force`, which gives up what its disk holds, and start it; then `costandby connect {volume}` on the other",
            both()
        ),
    }
}

/// What to do about two new disks of which one failed, or both, before the volume began.
fn lost_while_new(mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let VolumeSettings { volume, node, peer, .. } = settings;
    let serve = format!("`costandby promote {volume} --force`");
    let (failed, other) = match (mine.is_lost_while_new(), theirs.is_lost_while_new()) {
        (true, true) => {
            return format!(
                "neither disk can be copied from: the disks of {node} and of {peer} both failed before the volume began, and neither \
                 is known to be empty, so each may hold data; nothing was changed. Save what can be read of them first. {serve} on \
                 one node, and only there, begins the volume with what that node's medium still gives, and gives up the other \
                 one's data"
            );
        }
        (true, false) => ((node, mine), (peer, theirs)),
        (false, _) => ((peer, theirs), (node, mine)),
    };
    let ((failed, lost), (other, view)) = (failed, other);
    format!(
        "neither disk can be copied from unasked: the disk of {failed} ({}) is not known to be empty, so it MAY HOLD DATA, and \
         failed before the volume began; {other}'s is {}{}. Nothing was changed. If {failed}'s data is wanted, save what can be read of \
         it first; {serve} on {failed} then begins the volume with what its medium still gives, and {other}'s disk is overwritten. \
         {serve} on {other} begins it with {other}'s disk, and gives {failed}'s data up",
        lost.disk_state_shown(),
        view.disk_state_shown(),
        if view.zeroed { " and known to be empty" } else { "" }
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

/// Why a node that serves is not overwritten, whatever its peer says of itself, and what an operator can do.
pub(super) fn serving_is_kept(mine: &View, theirs: &View, settings: &VolumeSettings) -> String {
    let VolumeSettings { volume, node, peer, .. } = settings;
    format!(
        "split brain: {peer} went on without {node}, which serves (on {node} {}; on {peer} {}); a node that serves is not \
         overwritten unasked, and nothing was changed. If {peer}'s data is wanted: `costandby demote {volume}` on {node}, which is \
         then copied from {peer} and gives up what {peer} lacks. If {node}'s data is: on {peer} `costandby demote {volume}` if it \
         serves, then stop its daemon, `costandby create {volume} --force`, which gives up what its disk holds, and start it",
        history(&mine.generations),
        history(&theirs.generations)
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
    let mut text = format!("{:016x}", generations.current.0);
    let past = [generations.base].into_iter().chain(generations.history);
    for generation in past.filter(|&generation| generation != Generation::ZERO) {
        text.push_str(&format!(" ← {:016x}", generation.0));
    }
    text
}
