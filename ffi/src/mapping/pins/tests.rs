//! The table against a plain model, and what the ends of a range come to.

use super::*;
use proptest::prelude::*;

const PAGE: usize = 4096;
const PAGES: usize = 16;

fn free(held: &Unpinned) -> Vec<(usize, usize)> {
    held.free().collect()
}

fn pinned(held: &Unpinned) -> Vec<(usize, usize)> {
    held.pinned().collect()
}

#[test]
fn a_pin_keeps_its_pages_and_a_hold_keeps_pins_away() {
    let mapping = Mapping::anonymous(PAGES * PAGE).expect("memory");
    let pin = mapping.pin(2 * PAGE + 1, PAGE).expect("nothing is held");
    let held = mapping.hold_unpinned(100, 5 * PAGE);
    // The pin touches pages 2 and 3.
    assert_eq!(free(&held), [(100, 2 * PAGE - 100), (4 * PAGE, PAGE + 100)]);
    assert_eq!(pinned(&held), [(2 * PAGE, 2 * PAGE)]);
    for (offset, len) in [(0, 1), (PAGE, PAGE + 1), (4 * PAGE, 1), (5 * PAGE + 4000, 1), (0, PAGES * PAGE)] {
        let busy = mapping.pin(offset, len).expect_err("held");
        assert_eq!(busy, PinBusy::Dropping { offset, len });
        assert_eq!(io::Error::from(busy).kind(), io::ErrorKind::WouldBlock);
    }
    drop(mapping.pin(2 * PAGE, 2 * PAGE).expect("what is pinned may be pinned again"));
    drop(mapping.pin(6 * PAGE, PAGE).expect("beside it"));
    drop(held);
    let whole = mapping.pin(0, PAGES * PAGE).expect("the hold has ended");
    assert_eq!(mapping.pins_len(), 2);
    let held = mapping.hold_unpinned(0, PAGES * PAGE);
    assert_eq!((free(&held), pinned(&held)), (vec![], vec![(0, PAGES * PAGE)]));
    drop((held, whole, pin));
    assert_eq!(mapping.pins_len(), 0);
    let held = mapping.hold_unpinned(7, 9);
    assert_eq!((free(&held), pinned(&held)), (vec![(7, 9)], vec![]));
    assert_eq!(free(&mapping.hold_unpinned(5, 0)), []);
}

#[test]
fn pages_are_the_mappings_own() {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(8 * PAGE as u64).expect("sized");
    // Starts 1000 bytes before the end of the file's first page.
    let mapping = Mapping::map_file(&file, PAGE as u64 - 1000, 4 * PAGE).expect("mapped");
    let _pin = mapping.pin(1000, 1).expect("free");
    let held = mapping.hold_unpinned(0, 4 * PAGE);
    assert_eq!(pinned(&held), [(1000, PAGE)]);
    assert_eq!(free(&held), [(0, 1000), (1000 + PAGE, 3 * PAGE - 1000)]);
}

#[test]
fn too_many_parts_count_as_pinned() {
    let mapping = Mapping::anonymous(2 * (PARTS_MAX + 10) * PAGE).expect("memory");
    let every_second = |i: usize| mapping.pin(2 * i * PAGE, 1).expect("free");
    let pins: Vec<_> = (0..PARTS_MAX + 10).map(every_second).collect();
    let held = mapping.hold_unpinned(0, mapping.len());
    assert_eq!(held.free().count(), PARTS_MAX);
    let (start, len) = held.pinned().last().expect("the rest");
    assert_eq!((start, start + len), (2 * PARTS_MAX * PAGE, mapping.len()));
    // And nothing of that rest is held.
    mapping.pin(start, len).expect("not held");
    drop(pins);
}

#[derive(Clone, Debug)]
enum Step {
    Pin(usize, usize),
    Unpin(usize),
    Hold(usize, usize),
    Release(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let range =
        (0..PAGES * PAGE - 1, 1..4 * PAGE).prop_map(|(offset, len)| (offset, len.min(PAGES * PAGE - offset)));
    prop_oneof![
        range.clone().prop_map(|(offset, len)| Step::Pin(offset, len)),
        any::<usize>().prop_map(Step::Unpin),
        range.prop_map(|(offset, len)| Step::Hold(offset, len)),
        any::<usize>().prop_map(Step::Release),
    ]
}

proptest! {
    /// Counted page by page: a pin is refused exactly where pages are held, and a hold names exactly the bytes whose
    /// pages nobody has pinned.
    #[test]
    fn it_agrees_with_counting_pages(steps in prop::collection::vec(step(), 1..60)) {
        let mapping = Mapping::anonymous(PAGES * PAGE).expect("memory");
        let (mut pins, mut holds): (Vec<(Pin, Range<usize>)>, Vec<Unpinned>) = Default::default();
        for step in steps {
            match step {
                Step::Pin(offset, len) => {
                    let pages = offset / PAGE..(offset + len).div_ceil(PAGE);
                    let meets = |(start, len): (usize, usize)| start < pages.end * PAGE && pages.start * PAGE < start + len;
                    let held = holds.iter().any(|hold| hold.free().any(meets));
                    match mapping.pin(offset, len) {
                        Ok(pin) => { prop_assert!(!held); pins.push((pin, pages)); }
                        Err(_) => prop_assert!(held),
                    }
                }
                Step::Unpin(n) if !pins.is_empty() => drop(pins.swap_remove(n % pins.len())),
                Step::Hold(offset, len) => {
                    let hold = mapping.hold_unpinned(offset, len);
                    let mut named = vec![0; len];
                    for (start, len) in hold.free() { named[start - offset..][..len].fill(1); }
                    for (start, len) in hold.pinned() { named[start - offset..][..len].fill(2); }
                    for (at, named) in named.into_iter().enumerate() {
                        let page = (offset + at) / PAGE;
                        let wanted = if pins.iter().any(|(_, pages)| pages.contains(&page)) { 2 } else { 1 };
                        prop_assert_eq!(named, wanted, "byte {}", offset + at);
                    }
                    holds.push(hold);
                }
                Step::Release(n) if !holds.is_empty() => drop(holds.swap_remove(n % holds.len())),
                _ => {}
            }
            prop_assert_eq!(mapping.pins_len(), pins.len());
        }
    }
}
