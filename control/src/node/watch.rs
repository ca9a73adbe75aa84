//! Looks now and then at a volume's disk from outside: whether the files that it was opened from still stand at their paths, and
//! whether calls on it return.
//!
//! A file that is deleted or replaced while the daemon has it open goes on being served, and is gone, with all that it holds,
//! when the daemon ends; nothing else tells an operator of that. A disk that hangs has clients wait without a word. One task a
//! volume, started when its disk is open; it says what it sees in `status` and, when that changes, in the log, and tells
//! the peer of a disk that hangs. It changes nothing.
//!
//! Not seen: a disk that hangs under the reactor's own access to a page that is not in memory.
//!
//! Survives: a file system that hangs (its look waits, in a thread of its own, and nothing else does).

use super::registry::{Shared, Source};
use crate::role::{VolumeSettings, code};
use crate::users::{Identity, identity};
use costandby_datapath::disk::image::DiskImage;
use costandby_datapath::disk::superblock::Location;
use costandby_datapath::limits::DISK_CALL_SLOW_S;
use costandby_datapath::reactor::ReactorHandle;
use costandby_datapath::reactor::command::Command;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How often: two calls to the system each time, and nobody acts faster than this.
const EVERY: Duration = Duration::from_secs(2);

/// A volume's files as they were when its disk was opened.
#[derive(Clone)]
pub(super) struct Watch {
    settings: VolumeSettings,
    files: Vec<(&'static str, PathBuf, Identity)>,
}

impl Watch {
    /// Of the disk at `path`, which is open.
    pub(super) fn new(settings: VolumeSettings, path: &Path) -> Self {
        let metadata = Location::beside(path).path;
        let both = [("disk", path.to_owned()), ("metadata", metadata)];
        let files = both.into_iter().filter_map(|(what, path)| {
            let identity = identity(&path)?;
            Some((what, path, identity))
        });
        Self { settings, files: files.collect() }
    }

    /// What is wrong, one sentence each. Blocks.
    fn look(&self) -> Vec<String> {
        let wrong = self.files.iter().filter_map(|(what, path, was)| {
            let now = identity(path);
            let how = match now {
                Some(now) if now == *was => return None,
                Some(_) => "is not the file that this daemon has open",
                None => "was deleted or renamed, or its directory was unmounted",
            };
            let (peer, commands) = (&self.settings.peer, self.settings.commands());
            Some(format!(
                "{what} {} {how}: the daemon goes on with the one it opened, which is lost when the daemon ends. Do not restart this \
                 daemon: put the file back under its name; or, with {peer} UpToDate, let {peer} serve ({}, {}), and make this disk \
                 anew then: stop this daemon, {}, start it",
                path.display(),
                commands.here("demote"),
                commands.there("promote"),
                commands.here("create")
            ))
        });
        wrong.collect()
    }

    /// Looks for as long as the volume and its disk are there.
    pub(super) async fn run(self, shared: Weak<Shared>, disk: Weak<DiskImage>, link: Link) {
        let mut looking: Option<JoinHandle<Vec<String>>> = None;
        let mut hangs = false;
        loop {
            tokio::time::sleep(EVERY).await;
            let (Some(shared), Some(disk)) = (shared.upgrade(), disk.upgrade()) else { return };
            self.note_calls(&shared, &disk, &link, &mut hangs);
            match looking.take_if(|looking| looking.is_finished()) {
                Some(looked) => self.note_files(&shared, looked.await.unwrap_or_default()),
                None if looking.is_some() => continue,
                None => {}
            }
            let looker = self.clone();
            looking = Some(tokio::task::spawn_blocking(move || looker.look()));
        }
    }

    fn note_files(&self, shared: &Shared, seen: Vec<String>) {
        let (volume, over) = (self.settings.volume.as_str(), seen.is_empty());
        if shared.warn(Source::Files, &seen) {
            for text in seen {
                tracing::error!(volume, "{text}");
            }
            if over {
                tracing::info!(volume, "the disk's files are at their paths again");
            }
        }
    }

    /// Shows a call that does not return, here and to the peer; in the log once, and when it is over.
    fn note_calls(&self, shared: &Shared, disk: &DiskImage, link: &Link, hung: &mut bool) {
        let slow = Duration::from_secs(DISK_CALL_SLOW_S);
        let age = disk.oldest_call().filter(|age| *age >= slow).map(|age| age.as_secs());
        let VolumeSettings { volume, node, .. } = &self.settings;
        let text = age.map(|age| hangs_text(&format!("the disk of {node}"), age));
        shared.warn(Source::Calls, text.as_slice());
        if age.is_some() || *hung {
            let (code, arg) = (code::DISK_HANGS, age.unwrap_or(0));
            link.reactor.send(Command::SendPeer { volume: link.index, code, arg });
        }
        let volume = volume.as_str();
        match (text, std::mem::replace(hung, age.is_some())) {
            (Some(text), false) => tracing::error!(volume, "{text}"),
            (None, true) => tracing::info!(volume, "the disk answers again"),
            _ => {}
        }
    }
}

/// Where the volume is in the reactor, by which its peer is told.
pub(super) struct Link {
    pub(super) reactor: ReactorHandle,
    pub(super) index: usize,
}

/// What is said of a disk that hangs, on either node.
pub(super) fn hangs_text(disk: &str, seconds: u64) -> String {
    format!(
        "{disk} has not answered a request for {seconds} s: requests that need this disk wait, on both nodes. Look in that \
         machine's kernel log, and check the connection to the disk"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use costandby_datapath::units::{AckLevel, OnPeerLoss};
    use std::fs;

    #[test]
    fn files_that_go_or_change_are_seen_and_seen_to_return() {
        let dir = tempfile::tempdir().expect("a directory");
        let (disk, meta, aside) = (dir.path().join("d"), dir.path().join("d.meta"), dir.path().join("aside"));
        fs::write(&disk, "x").expect("written");
        fs::write(&meta, "x").expect("written");
        let settings = VolumeSettings {
            config: "pair.toml".into(),
            volume: "db".into(),
            node: "alpha".into(),
            peer: "beta".into(),
            configured_primary: true,
            on_peer_loss: OnPeerLoss::Continue,
            ack: AckLevel::Memory,
            peer_timeout: Duration::from_secs(1),
        };
        let watch = Watch::new(settings, &disk);
        assert!(watch.look().is_empty());
        fs::rename(&disk, &aside).expect("renamed");
        let seen = watch.look();
        assert!(seen.len() == 1 && seen[0].contains("disk ") && seen[0].contains("deleted"), "{seen:?}");
        fs::write(&disk, "y").expect("written");
        assert!(watch.look()[0].contains("is not the file that this daemon has open"), "{:?}", watch.look());
        fs::rename(&aside, &disk).expect("renamed");
        assert!(watch.look().is_empty(), "it is back");
        fs::remove_file(&meta).expect("removed");
        assert!(watch.look()[0].starts_with("metadata "), "{:?}", watch.look());
    }
}
