//! `costandby dump-metadata`: what this node's disks say about themselves, for people and for scripts.
//!
//! Reads the metadata itself and asks no daemon, so it works on a node that does not start. It never writes, locks or
//! repairs; beside a running daemon it says that what it read may be in the middle of being written. Memory disks have
//! no metadata.
//!
//! Survives: anything that metadata can look like. What cannot be believed is named, with what the daemon would make of
//! it; the exit status is 1 where the daemon would not start.

use super::{CliError, print};
use crate::config::quantity::display_size;
use crate::config::{Config, Disk, Name};
use costandby_datapath::disk::metadata::header;
use costandby_datapath::disk::metadata::inspect::{Area, Inspection, inspect};
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::place;
use costandby_datapath::disk::superblock::{COPYING_WHOLE, Superblock, SuperblockError};
use costandby_datapath::units::{ByteRange, Generation};
use serde_json::{Value, json};
use std::fmt::Write as _;

#[cfg(test)]
mod tests;

/// Text under `dump-metadata --help`.
pub(super) const EXAMPLES: &str = "\
Examples:
  costandby --node alpha dump-metadata
  costandby --node alpha dump-metadata db --json | jq '.volumes[].area.hot_extents'

Reads only, also beside a running daemon. Exit status 1 where the daemon would refuse what it finds.";

/// Runs of dirty bytes and hot extents that are named one by one for people.
const RUNS_SHOWN: usize = 8;

/// The same for scripts.
const RUNS_LISTED: usize = 1024;

/// What a look at one disk gave.
struct Look {
    volume: Name,
    place: String,
    /// Somebody has it locked.
    in_use: bool,
    /// Absent for a disk in memory.
    found: Option<Result<Inspection, SuperblockError>>,
    /// The configuration expects this of it.
    expected: Expected,
}

struct Expected {
    volume: String,
    node: String,
    size: u64,
}

/// Prints what the metadata of `volume`, or of every volume of `node`, says.
///
/// # Errors
/// [`CliError::Config`] for a volume that is not there, [`CliError::Metadata`] where a daemon would refuse what was
/// found; it has been printed by then.
pub(super) fn run(config: &Config, node: &Name, volume: Option<&Name>, json: bool) -> Result<(), CliError> {
    if let Some(name) = volume {
        config.volume(name.as_str())?;
    }
    let looks: Vec<_> = config
        .volumes_of(node.as_str())
        .filter(|(candidate, _)| volume.is_none_or(|name| candidate.name == *name))
        .map(|(candidate, disk)| look(node, &candidate.name, candidate.size, disk))
        .collect();
    if json {
        let volumes: Vec<_> = looks.iter().map(to_json).collect();
        let text = serde_json::to_string_pretty(&json!({ "node": node.as_str(), "volumes": volumes }))
            .map_err(|error| CliError::Io { doing: "writing the metadata", source: error.into() })?;
        print(&format!("{text}\n"))?;
    } else if looks.is_empty() {
        print(&format!("node {node}: no such disk here; the configuration gives it none\n"))?;
    } else {
        let texts: Vec<_> = looks.iter().map(render).collect();
        print(&texts.join("\n"))?;
    }
    let refused = looks.iter().filter_map(|look| Some((look, refusal(look)?))).next();
    refused.map_or(Ok(()), |(look, text)| Err(CliError::Metadata { volume: look.volume.clone(), text }))
}

fn look(node: &Name, volume: &Name, size: u64, disk: &Disk) -> Look {
    let expected = Expected { volume: volume.to_string(), node: node.to_string(), size };
    let Disk::Path(path) = disk else {
        let place = "in memory".to_owned();
        return Look { volume: volume.clone(), place, in_use: false, found: None, expected };
    };
    let read = || {
        let location = place::find(path, size)?;
        let (medium, in_use) = FileMedium::look(&location.path)?;
        let found = inspect(&medium, location.offset, RUNS_LISTED);
        Ok((location, in_use, found))
    };
    let (place, in_use, found) = match read() {
        Ok((location, in_use, found)) if location.offset == 0 => {
            (location.path.display().to_string(), in_use, found)
        }
        Ok((location, in_use, found)) => {
            (format!("{} from byte {}", location.path.display(), location.offset), in_use, found)
        }
        Err(error) => (path.display().to_string(), false, Err(error)),
    };
    Look { volume: volume.clone(), place, in_use, found: Some(found), expected }
}

/// Why a daemon would not start on it.
fn refusal(look: &Look) -> Option<String> {
    match look.found.as_ref()? {
        Err(error) => Some(error.to_string()),
        Ok(Inspection { newest: Err(error), .. }) => Some(error.to_string()),
        Ok(Inspection { area: Some(Err(error)), .. }) => Some(error.to_string()),
        Ok(Inspection { newest: Ok((_, superblock)), .. }) => foreign(superblock, &look.expected),
    }
}

fn foreign(found: &Superblock, expected: &Expected) -> Option<String> {
    let same = found.volume == expected.volume && found.node == expected.node && found.size == expected.size;
    (!same).then(|| {
        format!(
            "this is the metadata of volume {} on node {} with {} bytes, the configuration says {} on {} with {}",
            found.volume, found.node, found.size, expected.volume, expected.node, expected.size
        )
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn flags(superblock: &Superblock) -> Vec<&'static str> {
    let flags = [
        (superblock.primary, "primary"),
        (superblock.clean, "clean"),
        (superblock.applying, "applying"),
        (superblock.peer_has_current, "peer_has_current"),
        (superblock.zeroed, "zeroed"),
    ];
    flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect()
}

fn history(superblock: &Superblock) -> Vec<String> {
    let known = superblock.generations.history.into_iter().filter(|&past| past != Generation::ZERO);
    known.map(|past| format!("{:016x}", past.0)).collect()
}

fn render(look: &Look) -> String {
    let mut out = format!("volume {}: {}\n", look.volume, look.place);
    let mut line = |key: &str, text: &str| {
        let _ = writeln!(out, "  {key:<14}{text}");
    };
    if look.in_use {
        line("in use", "by a daemon; what is read here may be in the middle of being written");
    }
    let inspection = match &look.found {
        None => {
            line("metadata", "none: the disk is in memory and new at each start");
            return out;
        }
        Some(Err(error)) => {
            line("refused", &error.to_string());
            return out;
        }
        Some(Ok(inspection)) => inspection,
    };
    for (at, copy) in inspection.copies.iter().enumerate() {
        let text = match copy {
            Ok((_, sequence)) => {
                let newest = matches!(&inspection.newest, Ok((newest, _)) if *newest == at);
                let mark = if newest { ", the newest" } else { "" };
                format!("good, format {}, sequence {sequence}{mark}", header::FORMAT)
            }
            Err(error) => format!("not good: {error}"),
        };
        line(&format!("superblock {at}"), &text);
    }
    match &inspection.newest {
        Ok((_, superblock)) => superblock_lines(superblock, &mut line),
        Err(error) => line("refused", &error.to_string()),
    }
    match &inspection.area {
        Some(Ok(area)) => area_lines(area, &mut line),
        Some(Err(error)) => line("refused", &error.to_string()),
        None => {}
    }
    if let Ok((_, superblock)) = &inspection.newest
        && let Some(text) = foreign(superblock, &look.expected)
    {
        line("refused", &text);
    }
    out
}

fn superblock_lines(superblock: &Superblock, line: &mut impl FnMut(&str, &str)) {
    let generations = &superblock.generations;
    let generation = |generation: Generation, none: &str| {
        if generation == Generation::ZERO { none.to_owned() } else { format!("{:016x}", generation.0) }
    };
    line("volume", &format!("{} (id {})", superblock.volume, hex(&superblock.volume_id)));
    line("node", &superblock.node);
    line("size", &format!("{} ({} bytes)", display_size(superblock.size), superblock.size));
    line("disk state", superblock.disk_state.as_str());
    line("flags", &flags(superblock).join(", "));
    line("epoch", &superblock.epoch.to_string());
    line("generation", &generation(generations.current, "none: never met a peer nor was promoted"));
    line("base", &generation(generations.base, "none: the peer is not behind"));
    match superblock.copying {
        Generation::ZERO => {}
        COPYING_WHOLE => line("copying", "everything, from the start"),
        from => line("copying", &format!("from generation {:016x}", from.0)),
    }
    if superblock.sessions_offered > 0 {
        let (begun, offered) = (superblock.sessions_begun, superblock.sessions_offered);
        line("sessions", &format!("{begun} (ready for {offered})"));
    }
    if superblock.boot != [0; 16] {
        line("boot", &format!("{} (the kernel's, when it last took part)", hex(&superblock.boot)));
    }
    let past = history(superblock);
    line("history", if past.is_empty() { "none" } else { "" });
    for past in past {
        line("", &past);
    }
}

fn area_lines(area: &Area, line: &mut impl FnMut(&str, &str)) {
    let geometry = area.shape.geometry;
    let text = format!(
        "{} a bit, {} blocks from byte {}, {} marked",
        display_size(geometry.grain_len()),
        geometry.dirty_blocks(),
        area.layout.dirty_at,
        display_size(area.bitmap_dirty_bytes)
    );
    line("bitmap", &text);
    let torn = if area.torn_transaction { ", the one after it was torn" } else { "" };
    let text = format!(
        "{} an extent, {} of {} hot, last transaction {}{torn}",
        display_size(geometry.extent_len()),
        area.hot_extents.len(),
        geometry.slots(),
        area.last_transaction
    );
    line("activity log", &text);
    ranges(&area.hot_extents, area.hot_extents.len(), line);
    if let Some(damage) = &area.activity_damage {
        line("damaged", &format!("activity log: {damage}; everything counts as dirty"));
    }
    let damage = &area.dirty_damage;
    if damage.sectors > 0 {
        let text = format!("bitmap: {} sectors; what they stand for counts as dirty", damage.sectors);
        line("damaged", &text);
        for (range, fault) in damage.first.iter().take(RUNS_SHOWN) {
            line("", &format!("bytes {range}: {fault}"));
        }
    }
    line("dirty", &format!("{} at the next start", display_size(area.dirty_bytes)));
    ranges(&area.dirty_first, area.dirty_first.len(), line);
}

fn ranges(all: &[ByteRange], total: usize, line: &mut impl FnMut(&str, &str)) {
    for range in all.iter().take(RUNS_SHOWN) {
        line("", &format!("bytes {range}"));
    }
    if total > RUNS_SHOWN {
        line("", &format!("and {} more: see --json", total - RUNS_SHOWN));
    }
}

fn to_json(look: &Look) -> Value {
    let mut value = json!({
        "name": look.volume.as_str(),
        "place": look.place,
        "in_use": look.in_use,
        "refused": refusal(look),
    });
    if let Some(Ok(inspection)) = &look.found {
        let copies: Vec<_> = inspection.copies.iter().map(copy_to_json).collect();
        value["superblocks"] = copies.into();
        value["newest"] = inspection.newest.as_ref().ok().map(|(newest, _)| *newest).into();
        value["area"] = match &inspection.area {
            Some(Ok(area)) => area_to_json(area),
            Some(Err(_)) | None => Value::Null,
        };
    }
    value
}

fn copy_to_json(copy: &header::Copy) -> Value {
    let (header, sequence) = match copy {
        Ok(good) => good,
        Err(error) => return json!({ "good": false, "error": error.to_string() }),
    };
    let superblock = &header.superblock;
    let generations = &superblock.generations;
    json!({
        "good": true,
        "format": header::FORMAT,
        "sequence": sequence,
        "volume_id": hex(&superblock.volume_id),
        "volume": superblock.volume,
        "node": superblock.node,
        "size": superblock.size,
        "epoch": superblock.epoch.0,
        "disk_state": superblock.disk_state.as_str(),
        "flags": flags(superblock),
        "generation": format!("{:016x}", generations.current.0),
        "base": format!("{:016x}", generations.base.0),
        "history": history(superblock),
        "copying": format!("{:016x}", superblock.copying.0),
        "sessions_offered": superblock.sessions_offered,
        "sessions_begun": superblock.sessions_begun,
        "boot": hex(&superblock.boot),
    })
}

fn area_to_json(area: &Area) -> Value {
    let geometry = area.shape.geometry;
    let pair = |range: &ByteRange| json!({ "start": range.start, "len": range.len });
    let damaged: Vec<_> = area
        .dirty_damage
        .first
        .iter()
        .map(|(range, fault)| json!({ "start": range.start, "len": range.len, "fault": fault.to_string() }))
        .collect();
    json!({
        "area_id": format!("{:016x}", area.shape.area),
        "grain": geometry.grain_len(),
        "bitmap_at": area.layout.dirty_at,
        "bitmap_blocks": geometry.dirty_blocks(),
        "bitmap_dirty_bytes": area.bitmap_dirty_bytes,
        "bitmap_damaged_sectors": area.dirty_damage.sectors,
        "bitmap_damage": damaged,
        "extent": geometry.extent_len(),
        "slots": geometry.slots(),
        "activity_log_at": area.layout.activity_at,
        "last_transaction": area.last_transaction,
        "torn_transaction": area.torn_transaction,
        "activity_log_damage": area.activity_damage.as_ref().map(ToString::to_string),
        "hot_extents": area.hot_extents.iter().map(pair).collect::<Vec<_>>(),
        "dirty_bytes": area.dirty_bytes,
        "dirty": area.dirty_first.iter().map(pair).collect::<Vec<_>>(),
    })
}
