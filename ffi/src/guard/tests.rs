//! Media that fail under a mapping, and faults that are none of ours.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;

use super::*;
use crate::mapping::Mapping;

const PAGE: usize = 4096;
/// Names the fault that a child process is to raise.
const CHILD: &str = "COSTANDBY_FFI_TEST_CHILD";

/// Does something to a mapping, with the help of another.
type Access = fn(&Arc<Mapping>, &Arc<Mapping>);

fn mapped_file(pages: usize) -> (File, Arc<Mapping>) {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len((pages * PAGE) as u64).expect("sized");
    let mapping = Mapping::map_file(&file, 0, pages * PAGE).expect("mapped");
    (file, mapping)
}

#[test]
fn truncated_file_poisons_only_its_mapping() {
    let (file, mapping) = mapped_file(8);
    let (_other_file, other) = mapped_file(8);
    let whole = mapping.span(0, 8 * PAGE);
    whole.write_from(&[7; 8 * PAGE]);
    other.span(0, 8 * PAGE).write_from(&[9; 8 * PAGE]);
    file.set_len(2 * PAGE as u64).expect("truncated");
    assert!(!mapping.is_poisoned(), "nothing was touched yet");

    let mut bytes = vec![1; 8 * PAGE];
    whole.read_into(&mut bytes);
    assert!(mapping.is_poisoned());
    assert!(bytes[..2 * PAGE].iter().all(|b| *b == 7), "pages that are still there");
    assert!(bytes[2 * PAGE..].iter().all(|b| *b == 0), "zeroes in place of the others");
    assert_eq!(whole.crc32c(), ::crc32c::crc32c(&bytes));

    assert!(!other.is_poisoned());
    other.span(0, 8 * PAGE).read_into(&mut bytes);
    assert!(bytes.iter().all(|b| *b == 9));
}

#[test]
fn every_access_survives_a_truncated_file() {
    let source = Mapping::anonymous(8 * PAGE).expect("memory");
    source.span(0, 8 * PAGE).write_from(&[3; 8 * PAGE]);
    let accesses: [(&str, Access); 6] = [
        ("crc32c", |m, _| assert_ne!(m.span(0, 8 * PAGE).crc32c(), 1)),
        ("copy from", |m, other| m.span(1, 8 * PAGE - 1).copy_to(&other.span(0, 8 * PAGE - 1))),
        ("copy to", |m, other| other.span(0, 8 * PAGE).copy_to(&m.span(0, 8 * PAGE))),
        ("write", |m, _| m.span(0, 8 * PAGE).write_from(&[5; 8 * PAGE])),
        ("zero", |m, _| m.span(0, 8 * PAGE).fill_zero()),
        ("is zero", |m, _| assert!(m.span(0, 8 * PAGE).is_zero())),
    ];
    for (name, access) in accesses {
        let (file, mapping) = mapped_file(8);
        file.set_len(PAGE as u64).expect("truncated");
        let other = Mapping::anonymous(8 * PAGE).expect("memory");
        source.span(0, 8 * PAGE).copy_to(&other.span(0, 8 * PAGE));
        access(&mapping, &other);
        assert!(mapping.is_poisoned(), "{name}");
        assert!(!other.is_poisoned(), "{name}");
    }
}

#[test]
fn both_halves_of_a_copy_that_faults_are_complete() {
    let (file, mapping) = mapped_file(4);
    let span = mapping.span(100, 3 * PAGE);
    file.set_len(2 * PAGE as u64).expect("truncated");
    let bytes: Vec<u8> = (0..3 * PAGE).map(|i| u8::try_from(i % 251).expect("small")).collect();
    span.write_from(&bytes);
    let mut read = vec![0; 3 * PAGE];
    span.read_into(&mut read);
    assert_eq!(read, bytes, "the copy went on where the fault stopped it");
}

#[test]
fn a_mapping_that_starts_inside_a_page_is_guarded_whole() {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(4 * PAGE as u64).expect("sized");
    let mapping = Mapping::map_file(&file, 512, 3 * PAGE).expect("mapped");
    file.set_len(0).expect("truncated");
    for offset in [0, 3 * PAGE - 1] {
        assert!(mapping.span(offset, 1).is_zero());
    }
    assert!(mapping.is_poisoned());
}

#[test]
fn faults_on_many_threads_at_once() {
    let (file, mapping) = mapped_file(256);
    file.set_len(0).expect("truncated");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mapping = &mapping;
            scope.spawn(move || {
                for page in 0..256 {
                    let made = Mapping::anonymous(PAGE).expect("slots come and go meanwhile");
                    assert!(mapping.span((page * 7 + thread) % 256 * PAGE, PAGE).is_zero());
                    assert!(!made.is_poisoned());
                }
            });
        }
    });
    assert!(mapping.is_poisoned());
}

#[test]
fn slots_are_reused_and_come_back_clean() {
    for _ in 0..GUARDED_MAX + 10 {
        let guard = Guard::new(PAGE, PAGE, PAGE).expect("a slot is free again");
        assert!(!guard.is_poisoned());
        guard.poison();
        assert!(guard.is_poisoned());
    }
}

/// Bounds the life of a child whose fault is neither covered nor deadly, but raised for ever.
fn die_late() {
    // SAFETY: asks the kernel to end this process by a signal after 60 s.
    unsafe { libc::alarm(60) };
}

/// Runs the test `name` of this binary in a process of its own, which is to raise `fault`.
fn run_child(name: &str, fault: &str) -> ExitStatus {
    let binary = std::env::current_exe().expect("own path");
    let mut command = Command::new(binary);
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, fault);
    command.output().expect("child ran").status
}

#[test]
fn a_fault_outside_still_kills() {
    if std::env::var(CHILD).is_err() {
        let status = run_child("guard::tests::a_fault_outside_still_kills", "fault");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        // Not left out: the child has run it.
        return;
    }
    die_late();
    let (_file, guarded) = mapped_file(1);
    assert!(guarded.span(0, PAGE).is_zero());
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(PAGE as u64).expect("sized");
    let outside = memmap2::MmapOptions::new().len(PAGE).map_raw(&file).expect("mapped");
    file.set_len(0).expect("truncated");
    // SAFETY: the address is mapped; that the access faults is what is tested.
    let byte = unsafe { outside.as_ptr().read_volatile() };
    panic!("read {byte} from a page that is not there");
}

#[test]
fn a_signal_sent_still_kills() {
    if std::env::var(CHILD).is_err() {
        let status = run_child("guard::tests::a_signal_sent_still_kills", "signal");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        // Not left out: the child has run it.
        return;
    }
    die_late();
    // SAFETY: the default action replaces that of the standard library, which ignores the first signal sent.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    let (_file, guarded) = mapped_file(1);
    assert!(guarded.span(0, PAGE).is_zero());
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGBUS) };
    panic!("alive after SIGBUS");
}

#[test]
fn a_full_table_is_an_error() {
    if std::env::var(CHILD).is_err() {
        let status = run_child("guard::tests::a_full_table_is_an_error", "full");
        assert!(status.success(), "{status}");
        // Not left out: the child has run it.
        return;
    }
    die_late();
    let guards: Vec<Guard> =
        (0..GUARDED_MAX).map(|_| Guard::new(PAGE, PAGE, PAGE).expect("a free slot")).collect();
    let error = Guard::new(PAGE, PAGE, PAGE).expect_err("no slot is left");
    assert!(error.to_string().contains("4096"), "{error}");
    drop(guards);
    Guard::new(PAGE, PAGE, PAGE).expect("slots are free again");
}

#[test]
fn more_scattered_faults_than_the_kernel_keeps_mappings() {
    if std::env::var(CHILD).is_err() {
        let name = "guard::tests::more_scattered_faults_than_the_kernel_keeps_mappings";
        let status = run_child(name, "scattered");
        assert!(status.success(), "{status}");
        // Not left out: the child has run it.
        return;
    }
    die_late();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").expect("the kernel's limit");
    let limit: usize = limit.trim().parse().expect("a number");
    let pages = 2 * (limit + 64);
    let (file, mapping) = mapped_file(pages);
    file.set_len(0).expect("truncated");
    // Every other page, so that no two zero pages merge into one mapping.
    for page in (0..pages).step_by(2) {
        assert!(mapping.span(page * PAGE, 1).is_zero());
    }
    assert!(mapping.is_poisoned());
}
