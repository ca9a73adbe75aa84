//! The calls that store metadata, in virtual time: superblocks for control, transactions and bitmap blocks for the volume.
//!
//! One at a time, in the order they were asked for, as the production code has one lock for a whole area; beside the disk's
//! own calls, which may be slower or quicker. What a call syncs counts from its end on.

use super::checker::{NAMES, Verdict};
use super::clock::US;
use super::driver::named;
use super::world::{Event, World};
use costandby_datapath::disk::image::DiskError;
use costandby_datapath::disk::record_store::RecordStore;
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::disk::worker::{Job, JobDone};
use std::collections::VecDeque;
use std::sync::Arc;

/// What is to be stored.
pub(super) enum MetadataCall {
    Superblock(Box<Superblock>),
    Record(Job),
}

/// The calls of one process.
pub(super) struct MetadataCalls {
    store: Option<Arc<dyn RecordStore>>,
    queue: VecDeque<MetadataCall>,
    under_way: Option<(MetadataCall, Option<DiskError>)>,
}

impl MetadataCalls {
    pub(super) fn new(store: Option<Arc<dyn RecordStore>>) -> Self {
        Self { store, queue: VecDeque::new(), under_way: None }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_none() && self.queue.is_empty()
    }
}

impl World {
    fn metadata(&mut self, at: usize) -> &mut MetadataCalls {
        let process = self.nodes[at].process.as_mut();
        &mut process.unwrap_or_else(|| panic!("{} is up", NAMES[at])).metadata
    }

    pub(super) fn call_metadata(&mut self, at: usize, call: MetadataCall) {
        self.metadata(at).queue.push_back(call);
        self.begin_metadata_call(at);
    }

    /// Takes a job that is about metadata; gives back any other.
    pub(super) fn metadata_job(&mut self, at: usize, job: Job) -> Option<Job> {
        if !job.kind.is_of_record() {
            return Some(job);
        }
        self.call_metadata(at, MetadataCall::Record(job));
        None
    }

    fn begin_metadata_call(&mut self, at: usize) {
        if self.metadata(at).under_way.is_some() {
            return;
        }
        let Some(call) = self.metadata(at).queue.pop_front() else { return };
        let fails = std::mem::take(&mut self.nodes[at].store_fails);
        let takes = self.store_takes(at);
        self.nodes[at].meta.begin_call(fails);
        let failure = match &call {
            MetadataCall::Superblock(superblock) => {
                self.tell(at, format_args!("stores {} ({} µs)", named(superblock), takes / US));
                self.driver(at).store.store(superblock).err().map(DiskError::from)
            }
            MetadataCall::Record(job) => {
                self.tell(at, format_args!("stores {:?} ({} µs)", job.kind, takes / US));
                let image = Arc::clone(&self.nodes[at].disk.image);
                let store = self.metadata(at).store.clone();
                job.kind.carry_out(&image, store.as_deref()).err()
            }
        };
        self.metadata(at).under_way = Some((call, failure));
        let life = self.nodes[at].life;
        self.agenda.at(self.now() + takes, Event::MetadataCall { at, life });
    }

    /// What the call under way stored is on stable storage, or is not.
    pub(super) fn metadata_call_ends(&mut self, at: usize) -> Verdict {
        let (call, failure) = self.metadata(at).under_way.take().expect("a call is under way");
        let before = self.nodes[at].meta.durable();
        self.nodes[at].meta.end_call(failure.is_some());
        self.begin_metadata_call(at);
        match call {
            MetadataCall::Superblock(superblock) => {
                let failure = failure.map(|error| error.to_string());
                self.superblock_stored(at, before, &superblock, failure)
            }
            MetadataCall::Record(Job { kind, token }) => {
                let result = failure.map_or(Ok(()), Err);
                self.live(at).jobs_done.push_back(JobDone { volume: 0, kind, token, result });
                let now = self.now();
                self.wake(at, now);
                self.check_coverage("after a store")
            }
        }
    }

    /// The process ends: a call under way may be half done.
    pub(super) fn abandon_metadata_call(&mut self, at: usize) {
        if self.metadata(at).under_way.is_some() && !self.nodes[at].dark {
            let mut rng = crate::Rng::new(self.rng.next_u64());
            self.nodes[at].meta.abandon_call(&mut rng);
        }
    }
}
