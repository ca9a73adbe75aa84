//! Looks now and then whether the files that a volume was opened from still stand at their paths.
//!
//! A file that is deleted or replaced while the daemon has it open goes on being served, and is gone, with all that it holds,
//! when the daemon ends; nothing else tells an operator of that. One task a volume, started when its disk is open; it says
//! what it sees in `status` and, when that changes, in the log. It changes nothing.
//!
//! Survives: a file system that hangs (its look waits, in a thread of its own, and no other does).

use super::registry::{Shared, Source};
use crate::users::{Identity, identity};
use costandby_datapath::disk::superblock::Location;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often: two calls to the system each time, and nobody acts faster than this.
const EVERY: Duration = Duration::from_secs(2);

/// A volume's files as they were when its disk was opened.
#[derive(Clone)]
pub(super) struct Watch {
    volume: String,
    peer: String,
    files: Vec<(&'static str, PathBuf, Identity)>,
}

impl Watch {
    /// Of the disk at `path`, which is open.
    pub(super) fn new(volume: &str, peer: &str, path: &Path) -> Self {
        let metadata = Location::beside(path).path;
        let both = [("disk", path.to_owned()), ("metadata", metadata)];
        let files = both.into_iter().filter_map(|(what, path)| {
            let identity = identity(&path)?;
            Some((what, path, identity))
        });
        Self { volume: volume.into(), peer: peer.into(), files: files.collect() }
    }

    /// What is wrong, one sentence each. Blocks.
    fn look(&self) -> Vec<String> {
        let wrong = self.files.iter().filter_map(|(what, path, was)| {
            let now = identity(path);
            let how = match now {
                Some(now) if now == *was => return None,
                Some(_) => "is another one than this daemon has open",
                None => "was deleted or renamed, or its directory was unmounted",
            };
            let Self { volume, peer, .. } = self;
            Some(format!(
                "{what} {} {how}: the daemon goes on with the one it opened, which is lost when the daemon ends. Do not restart this \
                 daemon: put the file back under its name; or, with {peer} UpToDate, let {peer} serve (`costandby demote {volume}` \
                 here, `costandby promote {volume}` there), and make this disk anew then: stop this daemon, `costandby create \
                 {volume}`, start it",
                path.display()
            ))
        });
        wrong.collect()
    }

    /// Looks for as long as the volume is there.
    pub(super) async fn run(self, shared: Weak<Shared>) {
        loop {
            tokio::time::sleep(EVERY).await;
            let looker = self.clone();
            let seen = tokio::task::spawn_blocking(move || looker.look()).await.unwrap_or_default();
            let Some(shared) = shared.upgrade() else { return };
            let over = seen.is_empty();
            if Arc::clone(&shared).warn(Source::Files, seen.clone()) {
                let volume = self.volume.as_str();
                for text in seen {
                    tracing::error!(volume, "{text}");
                }
                if over {
                    tracing::info!(volume, "the disk's files stand at their paths again");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn files_that_go_or_change_are_seen_and_seen_to_return() {
        let dir = tempfile::tempdir().expect("a directory");
        let (disk, meta, aside) = (dir.path().join("d"), dir.path().join("d.meta"), dir.path().join("aside"));
        fs::write(&disk, "x").expect("written");
        fs::write(&meta, "x").expect("written");
        let watch = Watch::new("db", "beta", &disk);
        assert!(watch.look().is_empty());
        fs::rename(&disk, &aside).expect("renamed");
        let seen = watch.look();
        assert!(seen.len() == 1 && seen[0].contains("disk ") && seen[0].contains("deleted"), "{seen:?}");
        fs::write(&disk, "y").expect("written");
        assert!(watch.look()[0].contains("another one"), "{:?}", watch.look());
        fs::rename(&aside, &disk).expect("renamed");
        assert!(watch.look().is_empty(), "it is back");
        fs::remove_file(&meta).expect("removed");
        assert!(watch.look()[0].starts_with("metadata "), "{:?}", watch.look());
    }
}
