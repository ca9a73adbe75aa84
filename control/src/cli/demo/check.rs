//! The proof: every block read back and judged, and two disks compared byte for byte.
//!
//! Runs while nothing is written. Invariant: every block of the volume is looked at, acknowledged or not. Survives disks
//! and servers that fail (an error, never a clean bill).

use super::block::{BLOCK_LEN, BLOCK_LEN_U64};
use super::ledger::{Ledger, Verdict};
use super::writer::options;
use crate::nbd_client::{NbdClient, NbdError, NbdUri};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Blocks read in one request: 1 MiB.
const PIECE_BLOCKS: usize = 256;

/// What a check found.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Findings {
    /// Blocks whose last acknowledged write is gone.
    pub lost: u64,
    /// Blocks that hold no whole write of their own.
    pub torn: u64,
    /// The first of either, for people.
    pub first: Option<String>,
}

impl Findings {
    /// Whether nothing was wrong.
    pub(super) fn is_clean(&self) -> bool {
        self.lost == 0 && self.torn == 0
    }

    fn add(&mut self, block: u64, verdict: Verdict) {
        let text = match verdict {
            Verdict::Good => return,
            Verdict::Lost { found, acked } => {
                self.lost += 1;
                format!("block {block} holds write {found}, but write {acked} was acknowledged")
            }
            Verdict::Torn => {
                self.torn += 1;
                format!("block {block} holds no whole write")
            }
            Verdict::Stray { found } => {
                self.torn += 1;
                format!("block {block} holds a write that never went there: {found:?}")
            }
        };
        self.first.get_or_insert(text);
    }
}

/// Reads a whole volume through NBD and judges it; `seen` is told the share done, from 0 to 1.
///
/// # Errors
/// [`NbdError`] where it cannot be read.
pub(super) fn read_back(
    uri: &NbdUri,
    ledger: &mut Ledger,
    mut seen: impl FnMut(f64),
) -> Result<Findings, NbdError> {
    let mut client = NbdClient::connect(uri, &options())?;
    let findings = judge_all(ledger, |offset, bytes| {
        client.read(offset, bytes)?;
        #[expect(clippy::cast_precision_loss, reason = "for a progress bar")]
        seen(offset as f64 / client.info().size.max(1) as f64);
        Ok::<(), NbdError>(())
    })?;
    client.disconnect()?;
    Ok(findings)
}

fn judge_all<E>(
    ledger: &mut Ledger,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Findings, E> {
    let mut findings = Findings::default();
    let mut bytes = vec![0; PIECE_BLOCKS * BLOCK_LEN];
    let blocks = ledger.blocks();
    for first in (0..blocks).step_by(PIECE_BLOCKS) {
        let count = PIECE_BLOCKS.min(blocks - first);
        let piece = &mut bytes[..count * BLOCK_LEN];
        read(first as u64 * BLOCK_LEN_U64, piece)?;
        for (at, block) in piece.as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
            let at = (first + at) as u64;
            let verdict = ledger.judge(at, block);
            findings.add(at, verdict);
        }
    }
    Ok(findings)
}

/// Where two files differ first, `None` where they are the same to the last byte.
///
/// # Errors
/// The operating system's, where one cannot be read.
pub(super) fn first_difference(left: &Path, right: &Path) -> io::Result<Option<u64>> {
    let (mut left, mut right) = (File::open(left)?, File::open(right)?);
    let (left_len, right_len) = (left.metadata()?.len(), right.metadata()?.len());
    if left_len != right_len {
        return Ok(Some(left_len.min(right_len)));
    }
    let mut pieces = [vec![0; PIECE_BLOCKS * BLOCK_LEN], vec![0; PIECE_BLOCKS * BLOCK_LEN]];
    let mut offset = 0;
    while offset < left_len {
        let len =
            usize::try_from(left_len - offset).map_or(pieces[0].len(), |left| left.min(pieces[0].len()));
        let [a, b] = &mut pieces;
        let (a, b) = (&mut a[..len], &mut b[..len]);
        left.read_exact(a)?;
        right.read_exact(b)?;
        if a != b {
            let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or_default();
            return Ok(Some(offset + at as u64));
        }
        offset += len as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// A volume of several pieces and a rest, every block written twice and acknowledged.
    fn written() -> (Ledger, Vec<u8>, Vec<u8>) {
        let blocks = 2 * PIECE_BLOCKS + 5;
        let mut ledger = Ledger::new(5, 0, blocks);
        let mut disks = [vec![0; blocks * BLOCK_LEN], vec![0; blocks * BLOCK_LEN]];
        for disk in &mut disks {
            for (at, bytes) in disk.as_chunks_mut::<BLOCK_LEN>().0.iter_mut().enumerate() {
                let block = ledger.begin(at as u64).expect("free");
                block.encode(bytes);
                ledger.acknowledge(at as u64, block.number);
            }
        }
        let [old, new] = disks;
        (ledger, old, new)
    }

    fn judged(ledger: &mut Ledger, disk: &[u8]) -> Findings {
        let read = |offset: u64, bytes: &mut [u8]| {
            let offset = usize::try_from(offset).expect("small");
            bytes.copy_from_slice(&disk[offset..offset + bytes.len()]);
            Ok::<(), Infallible>(())
        };
        judge_all(ledger, read).expect("cannot fail")
    }

    #[test]
    fn a_disk_with_every_acknowledged_write_is_clean() {
        let (mut ledger, _, new) = written();
        assert_eq!(judged(&mut ledger, &new), Findings::default());
    }

    #[test]
    fn old_and_torn_blocks_are_counted_to_the_last_block() {
        let (mut ledger, old, mut disk) = written();
        let last = ledger.blocks() - 1;
        let range = last * BLOCK_LEN..;
        disk[range.clone()].copy_from_slice(&old[range]);
        disk[PIECE_BLOCKS * BLOCK_LEN + 17] ^= 1;
        let findings = judged(&mut ledger, &disk);
        assert_eq!((findings.lost, findings.torn), (1, 1), "{findings:?}");
        assert!(!findings.is_clean());
        assert!(findings.first.is_some_and(|text| text.contains(&format!("block {PIECE_BLOCKS} "))));
    }

    #[test]
    fn files_differ_at_their_first_different_byte_or_where_one_ends() {
        let dir = tempfile::tempdir().expect("a directory");
        let (left, right) = (dir.path().join("left"), dir.path().join("right"));
        let mut bytes = vec![7; PIECE_BLOCKS * BLOCK_LEN + 100];
        std::fs::write(&left, &bytes).expect("written");
        std::fs::write(&right, &bytes).expect("written");
        assert_eq!(first_difference(&left, &right).expect("readable"), None);
        let at = PIECE_BLOCKS * BLOCK_LEN + 50;
        bytes[at] ^= 1;
        std::fs::write(&right, &bytes).expect("written");
        assert_eq!(first_difference(&left, &right).expect("readable"), Some(at as u64));
        std::fs::write(&right, &bytes[..at]).expect("written");
        assert_eq!(first_difference(&left, &right).expect("readable"), Some(at as u64));
    }
}
