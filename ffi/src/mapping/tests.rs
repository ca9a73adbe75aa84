//! What spans and rings promise.

use std::io::{Read, Seek, SeekFrom};

use super::*;

const PAGE: usize = 4096;

fn counting(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).expect("small")).collect()
}

#[test]
fn bytes_go_in_and_out() {
    let mapping = Mapping::anonymous(3 * PAGE).expect("memory");
    let span = mapping.span(5, 2 * PAGE);
    assert!(span.is_zero());
    let bytes = counting(span.len());
    span.write_from(&bytes);
    let mut read = vec![0; span.len()];
    span.read_into(&mut read);
    assert_eq!(read, bytes);
    assert_eq!(span.crc32c(), ::crc32c::crc32c(&bytes));

    let part = span.sub(10, 20);
    assert_eq!((part.offset(), part.len(), part.is_empty()), (15, 20, false));
    part.fill_zero();
    assert!(part.is_zero());
    assert!(!span.sub(9, 20).is_zero());

    let target = mapping.span(2 * PAGE + 5, 10);
    span.sub(0, 10).copy_to(&target);
    let mut read = [0; 10];
    target.read_into(&mut read);
    assert_eq!(read, bytes[..10]);
    assert!(!mapping.is_poisoned());
}

/// How many pages of the span are in memory and in this process's table: what the system's own account says.
fn resident(span: &Span) -> usize {
    let mut pages = vec![0_u8; span.len() / PAGE];
    // SAFETY: the span's pages are mapped, and there is a byte for each.
    let code = unsafe { libc::mincore(span.as_ptr().cast(), span.len(), pages.as_mut_ptr()) };
    assert_eq!(code, 0);
    pages.iter().filter(|&&page| page & 1 != 0).count()
}

#[test]
fn pages_are_made_resident_and_keep_their_bytes() {
    const PAGES: usize = 64;
    let ring = Mapping::ring(PAGES * PAGE).expect("memory");
    if ring.page_len() > PAGE {
        return crate::testing::skip("huge pages are resident as a whole");
    }
    let lap = ring.span(0, PAGES * PAGE);
    let (part, bytes) = (lap.sub(5 * PAGE + 7, 20), [7; 20]);
    part.write_from(&bytes);
    assert_eq!(resident(&lap), 1);
    // A part of two pages counts as both.
    lap.sub(PAGE - 1, 2).make_resident().expect("resident");
    assert_eq!(resident(&lap), 3);
    lap.make_resident().expect("resident");
    assert_eq!(resident(&lap), PAGES);
    let mut read = [0; 20];
    part.read_into(&mut read);
    assert_eq!(read, bytes);
}

#[test]
fn a_file_holds_what_its_mapping_was_given() {
    let mut file = tempfile::tempfile().expect("temporary file");
    file.set_len(4 * PAGE as u64).expect("sized");
    let mapping = Mapping::map_file(&file, PAGE as u64, 2 * PAGE).expect("mapped");
    assert_eq!(mapping.len(), 2 * PAGE);
    mapping.span(1, 100).write_from(&counting(100));
    let mut read = [0; 100];
    file.seek(SeekFrom::Start(PAGE as u64 + 1)).expect("seek");
    file.read_exact(&mut read).expect("read");
    assert_eq!(read[..], counting(100));
}

#[test]
fn a_ring_never_wraps() {
    let ring = Mapping::ring(2 * PAGE).expect("ring");
    assert_eq!((ring.len(), ring.page_len()), (4 * PAGE, PAGE));
    let across = ring.span(2 * PAGE - 10, 20);
    across.write_from(&counting(20));
    let mut read = [0; 10];
    ring.span(0, 10).read_into(&mut read);
    assert_eq!(read[..], counting(20)[10..], "the second half is the first again");
    ring.span(4 * PAGE - 10, 10).read_into(&mut read);
    assert_eq!(read[..], counting(20)[..10], "and the first is the second");
}

/// Huge pages nobody has taken, and their length.
fn huge_pages_free() -> (usize, usize) {
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("/proc is there");
    let number = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("0");
        line.trim().trim_end_matches("kB").trim().parse::<usize>().expect("a number")
    };
    (number("HugePages_Free:"), number("Hugepagesize:") << 10)
}

#[test]
fn a_ring_takes_huge_pages_where_they_are_free() {
    let (free, huge) = huge_pages_free();
    if free < 4 {
        return eprintln!("skipped: {free} huge pages are free, 4 are needed (/proc/sys/vm/nr_hugepages)");
    }
    let ring = Mapping::ring(2 * huge).expect("ring");
    assert_eq!((ring.page_len(), ring.len()), (huge, 4 * huge));
    assert_eq!(huge_pages_free().0, free - 2, "the two laps are the same pages, taken at once");
    let across = ring.span(2 * huge - 10, 20);
    across.write_from(&counting(20));
    let mut read = [0; 10];
    ring.span(0, 10).read_into(&mut read);
    assert_eq!(read[..], counting(20)[10..], "the second half is the first again");
    ring.span(4 * huge - 10, 10).read_into(&mut read);
    assert_eq!(read[..], counting(20)[..10], "and the first is the second");
    // A pin covers huge pages whole.
    let pin = ring.pin(huge + 1, 1).expect("nothing is held");
    assert_eq!(ring.hold_unpinned(0, 2 * huge).free().collect::<Vec<_>>(), [(0, huge)]);
    drop((pin, across));
    drop(ring);
    assert_eq!(huge_pages_free().0, free, "given back");
    // What is not whole huge pages, and what there are too few for, has ordinary ones.
    for len in [huge + PAGE, (free + 1) * huge] {
        let ring = Mapping::ring(len).expect("ring");
        assert_eq!(ring.page_len(), PAGE, "{len}");
        ring.span(2 * len - 10, 10).write_from(&counting(10));
    }
    assert_eq!(huge_pages_free().0, free);
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    for len in [0, 1, PAGE + 1, usize::MAX, 1 << 63] {
        let error = Mapping::ring(len).expect_err("not whole pages");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{len}");
        assert!(error.to_string().starts_with(&format!("a ring of {len} bytes")), "{error}");
    }
    assert_eq!(Mapping::anonymous(0).expect_err("empty").kind(), io::ErrorKind::InvalidInput);
    let read_only = tempfile::NamedTempFile::new().expect("temporary file");
    let read_only = std::fs::File::open(read_only.path()).expect("opened for reading");
    let error = Mapping::map_file(read_only, 0, PAGE).expect_err("not open for writing");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn part_of_a_huge_page_is_refused() {
    let file = match rustix::fs::memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) {
        Ok(file) => file,
        Err(error) => return eprintln!("skipped: no huge pages here ({error})"),
    };
    let error = Mapping::map_file(&file, 0, PAGE).expect_err("not a whole huge page");
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(error.to_string().contains("huge pages of"), "{error}");
}

#[test]
fn spans_stay_inside() {
    let mapping = Mapping::anonymous(PAGE).expect("memory");
    let span = mapping.span(100, 50);
    let panics = |f: &dyn Fn() -> Span| std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_err();
    assert!(panics(&|| mapping.span(PAGE - 1, 2)));
    assert!(panics(&|| mapping.span(usize::MAX, 2)));
    assert!(panics(&|| span.sub(40, 11)));
    assert!(panics(&|| span.sub(usize::MAX, 1)));
    assert!(!panics(&|| span.sub(40, 10)));
    assert!(!panics(&|| mapping.span(PAGE, 0)));
}

#[test]
fn a_span_keeps_its_mapping_and_poison_stays() {
    let mapping = Mapping::anonymous(PAGE).expect("memory");
    let span = mapping.span(0, PAGE);
    mapping.poison();
    drop(mapping);
    span.write_from(&[1; PAGE]);
    assert!(span.mapping().is_poisoned());
    assert!(!span.is_zero());
}
