//! Recognizes the content of a file or device before it becomes a disk: known formats by their magic, and whether
//! both ends are blank.
//!
//! `costandby create` asks this before it takes anything over, and names what was found and where. A mark is a few bytes at
//! a fixed place from the start or the end; [`FORMATS`] is the whole table.
//!
//! Invariants: only reads; [`look`] finds everything non-blank in the first and the last MiB, known or not, so that an
//! unknown format is reported as well. What it cannot see is data in the middle of a medium whose two ends are blank.
//!
//! Survives: media of any length, also shorter than a mark's place; a mark of two bytes that stands there by chance (it is
//! reported under a wrong name, of bytes that are not blank all the same).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

#[cfg(test)]
mod tests;

/// Bytes looked at on each end: every format below has its mark there, and what a volume manager or partitioning tool leaves
/// in front of and behind a disk's content does not exceed it.
const END_LEN: u64 = 1 << 20;

/// Findings that a text names: more say nothing new.
const NAMED_MAX: usize = 4;

/// Where a mark stands.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// From the first byte on.
    Start(u64),
    /// At each of `count` places from `first` on, `step` bytes apart.
    Series { first: u64, step: u64, count: u64 },
    /// This many bytes in front of the end.
    End(u64),
    /// In the two labels of 256 KiB that ZFS has at a multiple of that in front of the end, at each uberblock.
    ZfsEnd,
    /// `back` bytes in front of the last multiple of `align` that is not behind the end, then `on` bytes further.
    AlignedEnd { align: u64, back: u64, on: u64 },
}

/// A format that is known by a mark.
struct Format {
    name: &'static str,
    places: &'static [Place],
    mark: &'static [u8],
}

const fn format(name: &'static str, places: &'static [Place], mark: &'static [u8]) -> Format {
    Format { name, places, mark }
}

use Place::{AlignedEnd, End, Series, Start, ZfsEnd};

const KIB: u64 = 1 << 10;

/// Every format that is told by name. Sources: each format's own header files, as in Linux (`fs/`, `drivers/md`,
/// `drivers/block/drbd`), LVM2, LUKS's on-disk specification, UEFI's chapter on GPT, OpenZFS.
const FORMATS: &[Format] = &[
    format("costandby's metadata", &[Start(0), Start(4096)], b"costndSB"),
    format("an ext2, ext3 or ext4 file system", &[Start(0x438)], b"\x53\xef"),
    format("an XFS file system", &[Start(0)], b"XFSB"),
    format("a Btrfs file system", &[Start(0x1_0040)], b"_BHRfS_M"),
    format("an F2FS file system", &[Start(1024)], b"\x10\x20\xf5\xf2"),
    format("an EROFS file system", &[Start(1024)], b"\xe2\xe1\xf5\xe0"),
    format("a bcachefs file system", &[Start(4096 + 24)], b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    format("a JFS file system", &[Start(0x8000)], b"JFS1"),
    format("a ReiserFS file system", &[Start(0x1_0034)], b"ReIsEr"),
    format("a NILFS2 file system", &[Start(0x406)], b"\x34\x34"),
    format("a GFS2 file system", &[Start(0x1_0000)], b"\x01\x16\x19\x70"),
    format("an OCFS2 file system", &[Series { first: 1024, step: 1024, count: 8 }], b"OCFSV2"),
    format("an NTFS file system", &[Start(3)], b"NTFS    "),
    format("an exFAT file system", &[Start(3)], b"EXFAT   "),
    format("a FAT file system", &[Start(54)], b"FAT1"),
    format("a FAT file system", &[Start(82)], b"FAT32"),
    format("an APFS container", &[Start(32)], b"NXSB"),
    format("an HFS+ file system", &[Start(1024)], b"H+\x00\x04"),
    format("an ISO 9660 image", &[Start(0x8001)], b"CD001"),
    format("a UDF file system", &[Start(0x8001), Start(0x8801)], b"BEA01"),
    format("a SquashFS image", &[Start(0)], b"hsqs"),
    format("a CramFS image", &[Start(0)], b"\x45\x3d\xcd\x28"),
    format("a qcow2 image", &[Start(0)], b"QFI\xfb"),
    format("a VMDK image", &[Start(0)], b"KDMV"),
    format("a VHDX image", &[Start(0)], b"vhdxfile"),
    format("swap space", &[Start(4086), Start(8182), Start(16_374), Start(65_526)], b"SWAPSPACE2"),
    format("swap space", &[Start(4086), Start(8182), Start(16_374), Start(65_526)], b"SWAP-SPACE"),
    format("a suspended system", &[Start(4086), Start(65_526)], b"S1SUSPEND"),
    format("an LVM physical volume", &[Series { first: 0, step: 512, count: 4 }], b"LABELONE"),
    format("an md array member (metadata 1.1)", &[Start(0)], b"\xfc\x4e\x2b\xa9\x01\x00\x00\x00"),
    format("an md array member (metadata 1.2)", &[Start(4096)], b"\xfc\x4e\x2b\xa9\x01\x00\x00\x00"),
    format(
        "an md array member (metadata 1.0)",
        &[AlignedEnd { align: 4096, back: 8 * KIB, on: 0 }],
        b"\xfc\x4e\x2b\xa9\x01\x00\x00\x00",
    ),
    format(
        "an md array member (metadata 0.90)",
        &[AlignedEnd { align: 64 * KIB, back: 64 * KIB, on: 0 }],
        b"\xfc\x4e\x2b\xa9\x00\x00\x00\x00",
    ),
    format(
        "an md array member (metadata 0.90)",
        &[AlignedEnd { align: 64 * KIB, back: 64 * KIB, on: 0 }],
        b"\xa9\x2b\x4e\xfc\x00\x00\x00\x00",
    ),
    format("a member of an Intel firmware RAID", &[End(1024)], b"Intel Raid ISM Cfg Sig. "),
    format("a member of a DDF firmware RAID", &[End(512)], b"\xde\x11\xde\x11"),
    format("a LUKS encrypted volume", &[Start(0)], b"LUKS\xba\xbe"),
    format(
        "a LUKS encrypted volume (its second header)",
        &[
            Start(16 * KIB),
            Start(32 * KIB),
            Start(64 * KIB),
            Start(128 * KIB),
            Start(256 * KIB),
            Start(512 * KIB),
        ],
        b"SKUL\xba\xbe",
    ),
    format("a BitLocker volume", &[Start(3)], b"-FVE-FS-"),
    format("a dm-verity hash tree", &[Start(0)], b"verity\x00\x00"),
    format("a dm-integrity device", &[Start(0)], b"integrt\x00"),
    format("a VDO volume", &[Start(0)], b"dmvdo001"),
    format("a Stratis pool member", &[Start(516)], b"!Stra0tis\x86\xff\x02"),
    format("a bcache device", &[Start(4096 + 24)], b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    format("a Ceph BlueStore device", &[Start(0)], b"bluestore block device"),
    format("an Oracle ASM disk", &[Start(32)], b"ORCLDISK"),
    // One of the 128 and more uberblocks of each of the four labels is written soon after a pool is made.
    format("a ZFS pool member", &[Series { first: 128 * KIB, step: KIB, count: 128 }], ZFS),
    format("a ZFS pool member", &[Series { first: 384 * KIB, step: KIB, count: 128 }], ZFS),
    format("a ZFS pool member (labels at its end)", &[ZfsEnd], ZFS),
    format("DRBD's metadata", &[AlignedEnd { align: 4096, back: 4096, on: 60 }], b"\x83\x74\x02\x6b"),
    format("DRBD's metadata", &[AlignedEnd { align: 4096, back: 4096, on: 60 }], b"\x83\x74\x02\x6c"),
    format("DRBD's metadata", &[AlignedEnd { align: 4096, back: 4096, on: 60 }], b"\x83\x74\x02\x6d"),
    format("a GPT partition table", &[Start(512), Start(4096)], b"EFI PART"),
    format("a GPT partition table (its second copy)", &[End(512), End(4096)], b"EFI PART"),
    format("a boot sector or an MBR partition table", &[Start(510)], b"\x55\xaa"),
];

/// An uberblock of ZFS, little-endian.
const ZFS: &[u8] = b"\x0c\xb1\xba\x00\x00\x00\x00\x00";

/// Something that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What it is.
    pub name: &'static str,
    /// Where its mark stands, or the first byte that is not blank.
    pub at: u64,
}

/// What a medium of `len` bytes holds: known formats first, then which end is not blank. Nothing: both ends are zeros.
///
/// # Errors
/// The system's.
pub fn look(medium: &File, len: u64) -> io::Result<Vec<Finding>> {
    let start = read(medium, 0, len.min(END_LEN))?;
    let tail_at = len.saturating_sub(END_LEN);
    let tail = read(medium, tail_at, len - tail_at)?;
    let holds = |at: u64, mark: &[u8]| holds(&start, 0, at, mark) || holds(&tail, tail_at, at, mark);
    let mut found: Vec<Finding> = Vec::new();
    for format in FORMATS {
        let at = format.places.iter().find_map(|place| at(*place, len, |at| holds(at, format.mark)));
        if let Some(at) = at.filter(|_| found.iter().all(|finding| finding.name != format.name)) {
            found.push(Finding { name: format.name, at });
        }
    }
    if let Some(at) = first_used(&start) {
        found.push(Finding { name: "a first MiB that is not blank", at });
    }
    if let Some(at) = first_used(&tail).map(|at| tail_at + at).filter(|_| tail_at >= END_LEN) {
        found.push(Finding { name: "a last MiB that is not blank", at });
    }
    Ok(found)
}

/// The findings in words, for an operator.
#[must_use]
pub fn named(found: &[Finding]) -> String {
    let shown: Vec<_> =
        found.iter().take(NAMED_MAX).map(|Finding { name, at }| format!("{name} (at byte {at})")).collect();
    shown.join(", ")
}

fn read(medium: &File, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).expect("a MiB")];
    medium.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn holds(bytes: &[u8], bytes_at: u64, at: u64, mark: &[u8]) -> bool {
    let from = at.checked_sub(bytes_at).and_then(|from| usize::try_from(from).ok());
    from.and_then(|from| bytes.get(from..)).is_some_and(|rest| rest.starts_with(mark))
}

/// The first of `place`'s bytes at which `holds` says yes.
fn at(place: Place, len: u64, mut holds: impl FnMut(u64) -> bool) -> Option<u64> {
    let mut one = |at: Option<u64>| at.filter(|at| holds(*at));
    match place {
        Start(at) => one(Some(at)),
        Series { first, step, count } => (0..count).map(|index| first + index * step).find(|at| holds(*at)),

        ZfsEnd => {
            let end = len / (256 * KIB) * (256 * KIB);
            let labels = [512 * KIB, 256 * KIB].into_iter().filter_map(|back| end.checked_sub(back));
            labels
                .flat_map(|label| (0..128).map(move |slot| label + (128 + slot) * KIB))
                .find(|at| holds(*at))
        }
        End(back) => one(len.checked_sub(back)),
        AlignedEnd { align, back, on } => {
            one((len / align * align).checked_sub(back).map(|start| start + on))
        }
    }
}

fn first_used(bytes: &[u8]) -> Option<u64> {
    bytes.iter().position(|byte| *byte != 0).map(|at| at as u64)
}
