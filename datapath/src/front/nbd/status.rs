//! What a disk can tell about a range before any of it is sent: which parts are holes, and whether all of it can be read.
//!
//! The connection asks for the reply to a block status request, and before the reply to a read.

use super::proto::{NBD_STATE_HOLE, NBD_STATE_ZERO};
use super::reply::BlockStatus;
use crate::disk::image::DiskImage;
use crate::units::ByteRange;
use costandby_ffi::mapping::Span;

/// The extents of `range`, or only the first.
pub(super) fn block_status(disk: &DiskImage, range: ByteRange, one: bool) -> BlockStatus {
    let mut status = BlockStatus::new(range, one);
    let mut at = range.start;
    loop {
        let extent = disk.extent_at(at, range.end());
        let flags = if extent.hole { NBD_STATE_HOLE | NBD_STATE_ZERO } else { 0 };
        at = extent.range.end();
        if !status.push(extent.range.len, flags) {
            return status;
        }
    }
}

/// Loads a byte of every page, so that a page that cannot be had poisons the mapping now.
pub(super) fn touch_pages(span: &Span) {
    const PAGE_LEN: usize = 4096;
    let mut byte = [0];
    let mut at = 0;
    while at < span.len() {
        span.sub(at, 1).read_into(&mut byte);
        at = (span.offset() + at + PAGE_LEN) / PAGE_LEN * PAGE_LEN - span.offset();
    }
}
