//! Says whether the peer has the content of a disk, as far as the disk's metadata tells. Shown wherever `create
//! --force`, which gives up the content, is named.

use costandby_datapath::disk::superblock::{DiskState, Superblock};

/// What giving up a disk that says `found` costs, towards `peer`. `None`: nothing can be read.
#[must_use]
pub fn worth(peer: &str, found: Option<&Superblock>) -> String {
    match found {
        None => format!(
            "only if {peer} has all of the data, which cannot be told from here: `status` there says whether it is primary, \
             or was in sync"
        ),
        Some(found) if found.is_fresh() => "it never held data of this pair".to_owned(),
        Some(found) if found.disk_state == DiskState::Inconsistent => {
            format!("it holds part of a copy of {peer}'s data only")
        }
        Some(found) if found.peer_has_current => {
            format!("by this disk's metadata {peer} has the data that it holds")
        }
        Some(_) => format!(
            "by its metadata it may hold writes that {peer} lacks, AND THEY ARE LOST WITH IT: save the disk first"
        ),
    }
}
