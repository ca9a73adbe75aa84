//! What is on record about a disk besides its superblock: the activity log and the dirty map, and where they are stored.
//!
//! A [`Record`] goes into the reactor with its volume ([`crate::reactor::command::VolumeSpec`]); what it wants stored is
//! carried out on a thread of its own through a [`RecordStore`].

use super::activity_log::{ActivityLog, Transaction};
use super::dirty_map::{DirtyBlock, DirtyMap};
use super::metadata::layout::Geometry;
use super::metadata::medium::Medium;
use super::metadata::{AreaStore, Opened, SuperblockStore};
use super::superblock::SuperblockError;
use std::sync::Arc;

/// Where log and map are stored. Blocking; never on the reactor's thread.
pub trait RecordStore: Send + Sync + std::fmt::Debug {
    /// As [`AreaStore::commit`].
    ///
    /// # Errors
    /// As there.
    fn commit(&self, transaction: &Transaction) -> Result<(), SuperblockError>;

    /// As [`AreaStore::store_dirty`].
    ///
    /// # Errors
    /// As there.
    fn store_dirty(&self, blocks: &[DirtyBlock]) -> Result<(), SuperblockError>;
}

impl<M: Medium> RecordStore for AreaStore<M> {
    fn commit(&self, transaction: &Transaction) -> Result<(), SuperblockError> {
        AreaStore::commit(self, transaction)
    }

    fn store_dirty(&self, blocks: &[DirtyBlock]) -> Result<(), SuperblockError> {
        AreaStore::store_dirty(self, blocks)
    }
}

/// A disk's activity log and dirty map, recovered.
#[derive(Debug)]
pub struct Record {
    /// What the peer may lack.
    pub dirty: DirtyMap,
    /// What is being written.
    pub activity: ActivityLog,
    /// Where they are stored; `None`: nowhere, and nothing waits for it (a memory disk, which is new at each start).
    pub store: Option<Arc<dyn RecordStore>>,
}

impl Record {
    /// Of a disk of `size` bytes whose content does not outlive the daemon. All clean.
    ///
    /// # Panics
    /// When no volume can have that size.
    #[must_use]
    pub fn in_memory(size: u64) -> Self {
        let geometry = Geometry::for_volume(size).expect("the configuration bounds a volume's size");
        Self { dirty: DirtyMap::new(geometry), activity: ActivityLog::new(geometry, 0, 0), store: None }
    }

    /// Of an area that was opened and recovered; gives back control's half.
    #[must_use]
    pub fn of<M: Medium + 'static>(opened: Opened<M>) -> (Self, SuperblockStore<M>) {
        let Opened { superblocks, area, dirty, activity, .. } = opened;
        (Self { dirty, activity, store: Some(Arc::new(area)) }, superblocks)
    }
}
