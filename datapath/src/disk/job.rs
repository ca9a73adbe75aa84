//! The blocking calls on a disk, as jobs for other threads, so that the reactor never waits for a medium.

use super::activity_log::Transaction;
use super::dirty_bitmap::DirtyBlock;
use super::image::{DiskError, DiskImage};
use super::record_store::RecordStore;
use crate::units::{ByteRange, Token};

/// A blocking call to make.
#[derive(Clone)]
pub enum JobKind {
    /// [`DiskImage::flush`].
    Flush,
    /// [`DiskImage::punch`].
    Punch(ByteRange),
    /// [`DiskImage::zero`].
    Zero(ByteRange),
    /// [`RecordStore::commit`].
    Commit(Transaction),
    /// [`RecordStore::store_dirty`].
    StoreDirty(Vec<DirtyBlock>),
}

impl JobKind {
    /// Whether it goes to the record's store and not to the disk.
    #[must_use]
    pub fn is_of_record(&self) -> bool {
        matches!(self, Self::Commit(_) | Self::StoreDirty(_))
    }

    /// Makes the call. Blocks.
    ///
    /// # Errors
    /// The disk, or its record, is to be taken as failed.
    ///
    /// # Panics
    /// On a job for a store where there is none.
    pub fn carry_out(&self, disk: &DiskImage, store: Option<&dyn RecordStore>) -> Result<(), DiskError> {
        let stored = || store.expect("a record that is stored nowhere asks for no stores");
        match self {
            Self::Flush => disk.flush(),
            Self::Punch(range) => disk.punch(*range),
            Self::Zero(range) => disk.zero(*range),
            Self::Commit(transaction) => Ok(stored().commit(transaction)?),
            Self::StoreDirty(blocks) => Ok(stored().store_dirty(blocks)?),
        }
    }
}

impl std::fmt::Debug for JobKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flush => write!(f, "Flush"),
            Self::Punch(range) => write!(f, "Punch({range})"),
            Self::Zero(range) => write!(f, "Zero({range})"),
            Self::Commit(transaction) => write!(f, "Commit({})", transaction.ticket.0),
            Self::StoreDirty(blocks) => {
                f.write_str("StoreDirty")?;
                f.debug_list().entries(blocks.iter().map(|block| block.index)).finish()
            }
        }
    }
}

/// A call and who wants to know.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub kind: JobKind,
    /// Handed back with the result.
    pub token: Token,
}

/// The result of a job.
#[derive(Debug)]
pub struct JobDone {
    /// Of which volume of the reactor.
    pub volume: usize,
    /// What was done.
    pub kind: JobKind,
    /// As given.
    pub token: Token,
    /// How it ended.
    pub result: Result<(), DiskError>,
}
