//! Where the activity log and the dirty bitmap are stored: the calls of the threads that store them.

use super::activity_log::Transaction;
use super::dirty_bitmap::DirtyBlock;
use super::metadata::AreaStore;
use super::metadata::medium::Medium;
use super::superblock::SuperblockError;

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
