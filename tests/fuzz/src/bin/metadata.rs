//! Fuzzes a whole metadata area: superblocks with the shape of the area, activity log, dirty bitmap, written over in any
//! places by raw bytes and by sectors, transactions and superblocks whose checksums hold.
//!
//! What must hold: nothing panics; what opens can be recovered, and is then without damage, with nothing hot and with
//! no less dirty than before; a look changes nothing.
#![no_main]

use costandby_datapath::disk::activity_log::ring::cycle_len;
use costandby_datapath::disk::metadata::header::{Header, Shape};
use costandby_datapath::disk::metadata::layout::{Geometry, Layout};
use costandby_datapath::disk::metadata::medium::Medium;
use costandby_datapath::disk::metadata::sector::{PAYLOAD_LEN, Place, SECTOR_LEN, SectorKind};
use costandby_datapath::disk::metadata::{create, inspect, open};
use costandby_datapath::disk::superblock::{SUPERBLOCK_LEN, Superblock};
use libfuzzer_sys::fuzz_target;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

const SIZE: u64 = (2 << 30) + 4096;
const AREA: u64 = 7;
const SHAPE_AT: usize = 651;

#[derive(Clone, Debug, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn range(at: u64, len: usize, end: usize) -> io::Result<std::ops::Range<usize>> {
        let at = usize::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let range = at..at.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        if range.end > end { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(range) }
    }
}

impl Medium for Memory {
    fn path(&self) -> &Path {
        Path::new("fuzzed.meta")
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("one thread").len() as u64)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        if len > 1 << 26 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut bytes = self.0.lock().expect("one thread");
        let len = bytes.len().max(usize::try_from(len).expect("checked"));
        bytes.resize(len, 0);
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().expect("one thread");
        into.copy_from_slice(&bytes[Self::range(at, into.len(), bytes.len())?]);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("one thread");
        let range = Self::range(at, from.len(), bytes.len())?;
        bytes[range].copy_from_slice(from);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes bytes off the input's front; zeros once it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn number(&mut self, len: usize) -> u64 {
        let mut bytes = [0; 8];
        let len = len.min(self.0.len());
        bytes[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        u64::from_le_bytes(bytes)
    }

    fn fill(&mut self, into: &mut [u8]) {
        let len = usize::try_from(self.number(1)).expect("a byte").min(into.len()).min(self.0.len());
        into[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
    }
}

fn superblock() -> Superblock {
    Superblock::fresh("db", "alpha", SIZE, true)
}

fn header(input: &mut Input<'_>, shape: &Shape) -> [u8; SUPERBLOCK_LEN] {
    let mut block = Header::encode(&superblock(), shape, input.number(8));
    let mut patch = [0; 44];
    patch.copy_from_slice(&block[SHAPE_AT..SHAPE_AT + 44]);
    let at = usize::try_from(input.number(1)).expect("a byte") % 44;
    input.fill(&mut patch[at..]);
    block[SHAPE_AT..SHAPE_AT + 44].copy_from_slice(&patch);
    block[8] = input.number(1).to_le_bytes()[0] % 4;
    let crc = crc32c::crc32c(&block[..SUPERBLOCK_LEN - 4]);
    block[SUPERBLOCK_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    block
}

/// A transaction whose checksums hold, whatever it says.
fn transaction(input: &mut Input<'_>) -> (u64, Vec<u8>) {
    let number = input.number(1) | input.number(8) & (0xff << 56);
    let mut entries = vec![0xff; 8 * (PAYLOAD_LEN - 8)];
    for _ in 0..input.number(1) % 8 {
        let at = usize::try_from(input.number(2)).expect("two bytes") % entries.len() / 8 * 8;
        let entry = input.number(2) << 48 | input.number(3);
        entries[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    let crc = crc32c::crc32c(&entries);
    let place = number % 32;
    let mut block = Vec::new();
    for (part, entries) in (0..).zip(entries.chunks_exact(PAYLOAD_LEN - 8)) {
        let mut payload = [0; PAYLOAD_LEN];
        payload[..4].copy_from_slice(&crc.to_le_bytes());
        payload[8..].copy_from_slice(entries);
        let index = place * 8 + part;
        block.extend(Place { kind: SectorKind::Activity, area: AREA, index }.seal(number, &payload));
    }
    (place * 4096, block)
}

fn mangle(memory: &Memory, layout: Layout, shape: &Shape, input: &mut Input<'_>) {
    let mut bytes = memory.0.lock().expect("one thread");
    for _ in 0..64 {
        if input.0.is_empty() {
            return;
        }
        let (at, new) = match input.number(1) % 5 {
            0 => {
                let mut raw = [0; 64];
                input.fill(&mut raw);
                (input.number(3), raw.to_vec())
            }
            1 => (input.number(1) % 2 * 4096, header(input, shape).to_vec()),
            2 => {
                let (at, block) = transaction(input);
                (layout.activity_at + at, block)
            }
            choice => {
                let kind = if choice == 3 { SectorKind::Activity } else { SectorKind::Dirty };
                let start = if choice == 3 { layout.activity_at } else { layout.dirty_at };
                let index = input.number(1);
                let place = Place { kind, area: AREA, index: index ^ (input.number(1) & 1) };
                let mut payload = [0; PAYLOAD_LEN];
                input.fill(&mut payload);
                (start + index * SECTOR_LEN as u64, place.seal(input.number(8), &payload).to_vec())
            }
        };
        if let Ok(range) = Memory::range(at, new.len(), bytes.len()) {
            bytes[range].copy_from_slice(&new);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let geometry = Geometry::for_volume(SIZE).expect("usual");
    let layout = Layout::new(geometry, 0).expect("a file");
    let memory = Memory::default();
    create(&memory, 0, &superblock(), geometry, AREA, false).expect("made");
    let shape = Shape {
        area: AREA,
        geometry,
        dirty_at: i64::try_from(layout.dirty_at).expect("small"),
        activity_known: 0,
    };
    mangle(&memory, layout, &shape, &mut Input(data));
    let before = memory.0.lock().expect("one thread").clone();
    let _ = inspect::inspect(&memory, 0, 8);
    assert_eq!(*memory.0.lock().expect("one thread"), before, "a look changed something");
    let Ok(mut opened) = open(memory.clone(), 0, "db", "alpha", SIZE) else { return };
    let dirty = opened.dirty.dirty_bytes();
    opened.recover().expect("memory does not fail");
    assert!(cycle_len(opened.activity.geometry()) < 32);
    let again = open(memory, 0, "db", "alpha", SIZE).expect("it opened before");
    assert!(again.report.activity_damage.is_none(), "{:?}", again.report);
    assert_eq!(again.report.hot_extents, 0);
    assert!(again.dirty.dirty_bytes() >= dirty);
    let damaged = opened.report.dirty_damage.sectors;
    assert!(again.report.dirty_damage.sectors <= damaged);
});
