//! Failing media, holes, and pages that must stay.

use super::*;

#[test]
fn a_truncated_file_fails_the_disk_and_its_flush() {
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(1 << 20).expect("set_len");
    let disk = DiskImage::open(file.path(), 1 << 20).expect("opens");
    disk.span(ByteRange::new(0, 4096)).write_from(&[7; 4096]);
    disk.flush().expect("flushes");
    file.as_file().set_len(0).expect("truncate");
    assert!(matches!(disk.flush(), Err(DiskError::TooSmall { found: 0, .. })));
    assert!(disk.is_failed());
    disk.span(ByteRange::new(0, 4096)).write_from(&[8; 4096]);
    assert!(disk.flush().is_err());
}

#[test]
fn a_short_or_missing_file_is_refused_by_name() {
    let file = tempfile::NamedTempFile::new().expect("temp file");
    let short = DiskImage::open(file.path(), 4096).expect_err("too small").to_string();
    assert!(short.contains("has 0 bytes") && short.contains("needs 4096"), "{short}");
    let missing = DiskImage::open(Path::new("/nonexistent/disk"), 4096).expect_err("missing").to_string();
    assert!(missing.contains("/nonexistent/disk"), "{missing}");
    assert!(matches!(DiskImage::open(Path::new("/dev/null"), 4096), Err(DiskError::WrongType { .. })));
}

#[test]
fn holes_are_punched_zeroed_and_seen() {
    let disk = DiskImage::memory("t", 1 << 20).expect("memory");
    disk.span(ByteRange::new(0, 1 << 20)).write_from(&vec![1; 1 << 20]);
    assert_eq!(disk.extent_at(0, 1 << 20), Extent { range: ByteRange::new(0, 1 << 20), hole: false });
    disk.punch(ByteRange::new(65536, 65536)).expect("punch");
    assert_eq!(disk.extent_at(0, 1 << 20), Extent { range: ByteRange::new(0, 65536), hole: false });
    assert_eq!(disk.extent_at(65536, 1 << 20), Extent { range: ByteRange::new(65536, 65536), hole: true });
    disk.zero(ByteRange::new(0, 4096)).expect("zero (filled: memory files cannot ZERO_RANGE)");
    assert!(disk.span(ByteRange::new(0, 4096)).is_zero());
    assert!(!disk.span(ByteRange::new(4096, 4096)).is_zero());
}

/// Files on the file system of this machine and in memory: each drops pages in its own way.
fn disks(size: u64) -> Vec<(Arc<DiskImage>, Option<tempfile::NamedTempFile>)> {
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(size).expect("set_len");
    let on_disk = DiskImage::open(file.path(), size).expect("opens");
    vec![(on_disk, Some(file)), (DiskImage::memory("t", size).expect("memory"), None)]
}

/// Holds the very page at `offset` as a device does, and shows later what stands in it: spliced out of the file by
/// reference, not copied.
struct Device {
    pipe: OwnedFd,
}

impl Device {
    const LEN: usize = 16;

    fn on(disk: &DiskImage, offset: u64) -> Self {
        let (pipe, into) = rustix::pipe::pipe().expect("a pipe");
        let mut offset = offset;
        let flags = rustix::pipe::SpliceFlags::empty();
        let taken = rustix::pipe::splice(&disk.file, Some(&mut offset), &into, None, Self::LEN, flags);
        assert_eq!(taken.expect("splices"), Self::LEN);
        Self { pipe }
    }

    fn sends(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        assert_eq!(rustix::io::read(&self.pipe, &mut bytes).expect("reads"), Self::LEN);
        bytes
    }
}

const PAGE: u64 = 4096;

#[test]
fn registered_pages_are_zeroed_where_they_are() {
    for (disk, _file) in disks(64 * PAGE) {
        for clear in [DiskImage::punch, DiskImage::zero] {
            let all = disk.span(ByteRange::new(0, 64 * PAGE));
            all.write_from(&vec![1; all.len()]);
            let index = |n: u64| usize::try_from(n).expect("64-bit");
            let pin = disk.mapping().pin(index(20 * PAGE), index(8 * PAGE)).expect("nothing is held");
            let devices: Vec<_> = (20..28).map(|page| Device::on(&disk, page * PAGE + 100)).collect();
            clear(&disk, ByteRange::new(10 * PAGE + 7, 30 * PAGE)).expect("clears");
            assert!(disk.span(ByteRange::new(10 * PAGE + 7, 30 * PAGE)).is_zero());
            let mut beside = [0; 2];
            disk.span(ByteRange::new(10 * PAGE + 6, 2)).read_into(&mut beside);
            assert_eq!(beside, [1, 0]);
            disk.span(ByteRange::new(40 * PAGE + 6, 2)).read_into(&mut beside);
            assert_eq!(beside, [0, 1]);
            // What is written next is what the device sends.
            disk.span(ByteRange::new(20 * PAGE, 8 * PAGE)).write_from(&vec![9; index(8 * PAGE)]);
            for device in devices {
                assert_eq!(
                    device.sends(),
                    [9; Device::LEN],
                    "{}: the page was replaced",
                    disk.path.display()
                );
            }
            drop(pin);
        }
    }
}

#[test]
fn pages_that_nobody_registered_go() {
    for (disk, _file) in disks(16 * PAGE) {
        disk.span(ByteRange::new(0, 16 * PAGE)).write_from(&[1; 16 * 4096]);
        let pin = disk.mapping().pin(4 * 4096, 4096).expect("nothing is held");
        let device = Device::on(&disk, 8 * PAGE);
        disk.punch(ByteRange::new(0, 16 * PAGE)).expect("punches");
        let pieces = [(0, 4, true), (4, 1, false), (5, 11, true)];
        for (start, len, hole) in pieces {
            let range = ByteRange::new(start * PAGE, len * PAGE);
            assert_eq!(disk.extent_at(range.start, range.end()), Extent { range, hole }, "page {start}");
        }
        disk.span(ByteRange::new(8 * PAGE, PAGE)).write_from(&[9; 4096]);
        assert_ne!(device.sends(), [9; Device::LEN], "the test's device would not notice a page that goes");
        drop(pin);
        disk.punch(ByteRange::new(0, 16 * PAGE)).expect("punches");
        let range = ByteRange::new(0, 16 * PAGE);
        assert_eq!(disk.extent_at(0, 16 * PAGE), Extent { range, hole: true });
    }
}

#[test]
fn a_range_being_punched_takes_no_registration() {
    let disk = DiskImage::memory("t", 16 * PAGE).expect("memory");
    let held = disk.mapping().hold_unpinned(0, 4096);
    let busy = disk.mapping().pin(0, 1).expect_err("held");
    assert_eq!(std::io::Error::from(busy).kind(), std::io::ErrorKind::WouldBlock);
    drop(held);
    let _pin = disk.mapping().pin(0, 1).expect("the hold has ended");
}

/// Registrations come and go while a worker punches: what is pinned is never a hole, whoever was first.
#[test]
fn punching_and_registering_race_safely() {
    const ROUNDS: u32 = 30_000;
    let disk = DiskImage::memory("t", 64 * PAGE).expect("memory");
    std::thread::scope(|scope| {
        let puncher = scope.spawn(|| {
            for _ in 0..ROUNDS {
                disk.punch(ByteRange::new(0, 64 * PAGE)).expect("punches");
            }
        });
        let mut round = 0_u8;
        while !puncher.is_finished() {
            round = round % 100 + 1;
            let at = usize::from(round % 60) * 4096;
            let Ok(pin) = disk.mapping().pin(at, 3 * 4096) else { continue };
            let span = disk.mapping().span(at, 3 * 4096);
            span.write_from(&[round; 3 * 4096]);
            let device = Device::on(&disk, at as u64);
            std::thread::yield_now();
            span.write_from(&[round + 100; 3 * 4096]);
            // Zeroed meanwhile or not; but what was written last is what the device has.
            let sent = device.sends();
            assert!(sent.iter().all(|byte| [0, round + 100].contains(byte)), "{sent:?} of {round}");
            drop(pin);
        }
    });
}

#[test]
fn a_detached_disk_is_memory_that_can_be_given_back_and_has_no_holes() {
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(1 << 20).expect("set_len");
    let disk = DiskImage::open(file.path(), 1 << 20).expect("opens");
    let span = disk.span(ByteRange::new(8192, 8192));
    span.write_from(&[5; 8192]);
    assert!(disk.is_detachable());
    disk.fail();
    assert_eq!(disk.detach(&[ByteRange::new(9000, 100)]).expect("memory"), [false]);
    assert!(disk.is_detached() && !disk.is_failed() && !disk.is_detachable() && !disk.is_sparse());
    let mut bytes = [0; 102];
    disk.span(ByteRange::new(8999, 102)).read_into(&mut bytes);
    assert_eq!((bytes[0], bytes[1], bytes[100], bytes[101]), (0, 5, 5, 0));
    let extent = disk.extent_at(0, 1 << 20);
    assert!(!extent.hole && extent.range.len == 1 << 20, "what is not here may be anything there");
    span.write_from(&[6; 8192]);
    disk.give_back(ByteRange::new(9000, 10));
    assert!(
        disk.span(ByteRange::new(8192, 4096)).is_zero() && !disk.span(ByteRange::new(12288, 4096)).is_zero()
    );
    disk.punch(ByteRange::new(12288, 4096)).expect("memory takes it");
    disk.flush().expect("nothing to do");
    let mut there = [0; 4];
    rustix::io::pread(file.as_file(), &mut there, 8192).expect("read");
    assert_eq!(there, [5; 4], "the file is left as it was");
    assert!(!DiskImage::memory("m", 4096).expect("memory").is_detachable());
}

#[test]
fn the_oldest_call_under_way_is_known_until_it_returns() {
    let disk = DiskImage::memory("calls", 1 << 20).expect("memory");
    assert_eq!(disk.oldest_call(), None);
    let first = disk.begin_call();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let second = disk.begin_call();
    assert!(disk.oldest_call().expect("two") >= std::time::Duration::from_millis(20));
    drop(first);
    assert!(disk.oldest_call().expect("one") < std::time::Duration::from_millis(20));
    drop(second);
    assert_eq!(disk.oldest_call(), None);
}
