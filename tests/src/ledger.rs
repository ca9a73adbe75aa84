//! A writer that knows what a volume must hold: blocks that describe themselves, and a ledger of what was acknowledged.
//!
//! Each 4 KiB block carries its number, a version and bytes that follow from both. A block read back is right if it is
//! whole and its version lies between the last acknowledged and the last sent one: an acknowledged write is never lost,
//! an unacknowledged one is there or not, and nothing is ever torn. Where every node has lost power, the last version that
//! a flush covered takes the place of the last acknowledged one, and what no flush covered may be torn as on any disk.

use crate::{Rng, scaled};
use costandby_control::nbd_client::{NbdClient, NbdError, NbdUri, Options};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a block.
pub const BLOCK_LEN: usize = 4096;

/// Writers, each with blocks and a connection of its own.
const WRITERS: u64 = 3;

/// How long a write may go without an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most blocks a single write covers.
const WRITE_BLOCKS_MAX: u64 = 16;

/// Versions of one block; 0 is the zeros it began with. No version is sent twice.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    acked: u64,
    /// The last one that a flush, or FUA, covered.
    flushed: u64,
    /// What had been sent at the last check: what was not there then is gone for good.
    gone: u64,
    sent: u64,
}

/// What is known of a part of a volume's blocks.
#[derive(Clone, Debug)]
struct Part {
    first: u64,
    entries: Vec<Entry>,
}

/// What is known of all blocks of a volume.
#[derive(Clone, Debug)]
pub struct Ledger {
    parts: Vec<Part>,
}

/// A volume's content of `block` at `version`.
#[must_use]
pub fn content(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK_LEN];
    }
    let mut bytes = Vec::with_capacity(BLOCK_LEN);
    bytes.extend_from_slice(&block.to_le_bytes());
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&Rng::new(block << 32 ^ version).bytes(BLOCK_LEN - 16));
    bytes
}

/// The version a block claims to be.
fn version_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"))
}

impl Ledger {
    /// Of a volume of zeros.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let blocks = size / BLOCK_LEN as u64 / WRITERS;
        let count = usize::try_from(blocks).expect("a small volume");
        let part = |n| Part { first: n * blocks, entries: vec![Entry::default(); count] };
        Self { parts: (0..WRITERS).map(part).collect() }
    }

    /// Writes at random until told to stop or until the server goes away.
    #[must_use]
    pub fn write(self, uri: &NbdUri, seed: u64) -> Writing {
        self.write_within(uri, seed, PATIENCE)
    }

    /// The same; a server that leaves a write without an answer for `patience` counts as gone, for one whose machine
    /// dies closes no connection.
    #[must_use]
    pub fn write_within(self, uri: &NbdUri, seed: u64, patience: Duration) -> Writing {
        self.start(uri, seed, patience, Duration::ZERO)
    }

    /// The same as [`Ledger::write`] with a pause after each write, for a load that leaves the machine time for others.
    #[must_use]
    pub fn write_slowly(self, uri: &NbdUri, seed: u64, pause: Duration) -> Writing {
        self.start(uri, seed, PATIENCE, pause)
    }

    fn start(self, uri: &NbdUri, seed: u64, patience: Duration, pause: Duration) -> Writing {
        let stop = Arc::new(AtomicBool::new(false));
        let acked = Arc::new(AtomicU64::new(0));
        let start = |(n, part): (u64, Part)| {
            let (uri, stop, acked) = (uri.clone(), Arc::clone(&stop), Arc::clone(&acked));
            std::thread::spawn(move || {
                write_part(part, &uri, [patience, pause], Rng::new(seed ^ (n << 56)), &stop, &acked)
            })
        };
        let threads = (0..).zip(self.parts).map(start).collect();
        Writing { threads, stop, acked }
    }

    /// Looks at a disk that may be behind: every block must be whole and of a version that was sent.
    ///
    /// # Errors
    /// What is torn, in a sentence.
    pub fn check_whole(&self, disk: &[u8]) -> Result<(), String> {
        for part in &self.parts {
            for (block, entry) in (part.first..).zip(&part.entries) {
                let at = usize::try_from(block).expect("a small volume") * BLOCK_LEN;
                check_block(
                    block,
                    Entry { sent: entry.sent, ..Entry::default() },
                    &disk[at..at + BLOCK_LEN],
                )?;
            }
        }
        Ok(())
    }

    /// Reads every block and takes what is there as the new state of the ones not acknowledged.
    ///
    /// # Errors
    /// What is lost or torn, in a sentence.
    pub fn check(&mut self, client: &mut NbdClient) -> Result<(), String> {
        self.for_each_block(client, |block, entry, bytes| {
            check_block(block, *entry, bytes)?;
            *entry = Entry { acked: version_of(bytes), gone: entry.sent, ..*entry };
            Ok(())
        })
    }

    /// The same after all nodes lost power: what was flushed must be there, what was not may have fallen back or be torn.
    /// Torn blocks are written anew. At the end everything is flushed.
    ///
    /// # Errors
    /// What is lost or torn, in a sentence.
    pub fn check_flushed(&mut self, client: &mut NbdClient) -> Result<Unflushed, String> {
        let (mut unflushed, mut torn) = (Unflushed::default(), Vec::new());
        self.for_each_block(client, |block, entry, bytes| {
            let acked = entry.acked;
            let relaxed = Entry { acked: entry.flushed, gone: 0, ..*entry };
            let version = version_of(bytes);
            if let Err(error) = check_block(block, relaxed, bytes) {
                if version < entry.flushed && bytes == content(block, version)
                    || !is_mixture(block, *entry, bytes)
                {
                    return Err(format!("{error} (as the last flushed one)"));
                }
                torn.push(block);
                return Ok(());
            }
            unflushed.fell_back += u64::from(version < acked);
            *entry = Entry { acked: version, flushed: version, gone: entry.sent, sent: entry.sent };
            Ok(())
        })?;
        unflushed.torn = torn.len() as u64;
        for block in torn {
            let part = self.parts.iter_mut().rfind(|part| part.first <= block).expect("it is of one part");
            let entry = &mut part.entries[usize::try_from(block - part.first).expect("a small volume")];
            let version = entry.sent + 1;
            let written = client.write(block * BLOCK_LEN as u64, &content(block, version), false);
            written.map_err(|error| format!("writing: {error}"))?;
            *entry = Entry { acked: version, flushed: version, gone: version, sent: version };
        }
        client.flush().map_err(|error| format!("flushing: {error}"))?;
        Ok(unflushed)
    }

    fn for_each_block(
        &mut self,
        client: &mut NbdClient,
        mut check: impl FnMut(u64, &mut Entry, &[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut bytes = vec![0; BLOCK_LEN * 256];
        for part in &mut self.parts {
            let mut block = part.first;
            for entries in part.entries.chunks_mut(256) {
                let bytes = &mut bytes[..entries.len() * BLOCK_LEN];
                client.read(block * BLOCK_LEN as u64, bytes).map_err(|error| format!("reading: {error}"))?;
                for (entry, bytes) in entries.iter_mut().zip(bytes.chunks(BLOCK_LEN)) {
                    check(block, entry, bytes)?;
                    block += 1;
                }
            }
        }
        Ok(())
    }
}

/// What a loss of power took of what no flush had covered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Unflushed {
    /// Blocks that were acknowledged at a later version than the one found.
    pub fell_back: u64,
    /// Blocks found half of one version and half of another.
    pub torn: u64,
}

/// Whether every word of a block is of some version from the last flushed to the last sent one.
fn is_mixture(block: u64, entry: Entry, bytes: &[u8]) -> bool {
    let versions: Vec<_> = (entry.flushed..=entry.sent).map(|version| content(block, version)).collect();
    let words = |at: usize| at..at + 8;
    (0..BLOCK_LEN).step_by(8).all(|at| versions.iter().any(|version| version[words(at)] == bytes[words(at)]))
}

fn check_block(block: u64, entry: Entry, bytes: &[u8]) -> Result<(), String> {
    let version = version_of(bytes);
    let Entry { acked, gone, sent, .. } = entry;
    if version < acked {
        return Err(format!("block {block} is back at version {version}, {acked} was acknowledged"));
    }
    if version > acked && version <= gone {
        return Err(format!(
            "block {block} has version {version} again, which was lost before it was acknowledged"
        ));
    }
    if version > sent {
        return Err(format!("block {block} has version {version}, only {sent} was ever sent"));
    }
    if bytes != content(block, version) {
        return Err(format!(
            "block {block} is torn at version {version} ({acked} acknowledged, {sent} sent)"
        ));
    }
    Ok(())
}

/// Writers at work.
#[derive(Debug)]
pub struct Writing {
    threads: Vec<JoinHandle<(Part, Option<NbdError>)>>,
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
}

impl Writing {
    /// Writes acknowledged so far.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    /// Stops the writers and returns the ledger, with the first error that any of them met.
    ///
    /// # Panics
    /// When a writer panicked.
    #[must_use]
    pub fn finish(self) -> (Ledger, Option<NbdError>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut parts = Vec::new();
        let mut first = None;
        for thread in self.threads {
            let (part, error) = thread.join().expect("a writer does not panic");
            parts.push(part);
            first = first.or(error);
        }
        (Ledger { parts }, first)
    }

    /// Stops the writers and returns the ledger; none may have met an error.
    ///
    /// # Panics
    /// When one did.
    #[must_use]
    pub fn finish_ok(self) -> Ledger {
        let (ledger, error) = self.finish();
        assert!(error.is_none(), "a writer met an error: {error:?}");
        ledger
    }
}

fn write_part(
    mut part: Part,
    uri: &NbdUri,
    [patience, pause]: [Duration; 2],
    mut rng: Rng,
    stop: &AtomicBool,
    acked: &AtomicU64,
) -> (Part, Option<NbdError>) {
    let options = Options { timeout: scaled(patience), ..Options::default() };
    let mut client = match NbdClient::connect(uri, &options) {
        Ok(client) => client,
        Err(error) => return (part, Some(error)),
    };
    let total = part.entries.len() as u64;
    while !stop.load(Ordering::Relaxed) {
        let len = 1 + rng.below(WRITE_BLOCKS_MAX);
        let at = rng.below(total - len);
        let range = usize::try_from(at).expect("small")..usize::try_from(at + len).expect("small");
        let first = part.first + at;
        let mut bytes = Vec::with_capacity(range.len() * BLOCK_LEN);
        for (block, entry) in (first..).zip(&mut part.entries[range.clone()]) {
            entry.sent += 1;
            bytes.extend_from_slice(&content(block, entry.sent));
        }
        let fua = rng.below(64) == 0;
        if let Err(error) = client.write(first * BLOCK_LEN as u64, &bytes, fua) {
            return (part, Some(error));
        }
        for entry in &mut part.entries[range] {
            entry.acked = entry.sent;
            if fua {
                entry.flushed = entry.sent;
            }
        }
        acked.fetch_add(1, Ordering::Relaxed);
        if rng.below(128) == 0 {
            if let Err(error) = client.flush() {
                return (part, Some(error));
            }
            for entry in &mut part.entries {
                entry.flushed = entry.acked;
            }
        }
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    (part, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_is_of_versions_that_may_be_there() {
        let entry = Entry { acked: 5, flushed: 3, gone: 0, sent: 6 };
        let mut bytes = content(7, 4);
        bytes[2048..].copy_from_slice(&content(7, 6)[2048..]);
        assert!(is_mixture(7, entry, &bytes));
        bytes[1000..1008].copy_from_slice(&content(7, 2)[1000..1008]);
        assert!(!is_mixture(7, entry, &bytes), "a word of a version before the last flushed one");
    }
}
