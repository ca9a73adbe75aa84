//! The table against planted marks, and against what real programs make.

use super::*;
use std::process::Command;

const MIB: u64 = 1 << 20;

fn medium(len: u64, writes: &[(u64, &[u8])]) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(len).expect("sized");
    for (at, bytes) in writes {
        file.write_all_at(bytes, *at).expect("written");
    }
    file
}

#[test]
fn a_blank_medium_of_any_length_holds_nothing() {
    for len in [0, 1, 511, 4096, MIB - 1, MIB, 3 * MIB + 512] {
        assert_eq!(look(&medium(len, &[]), len).expect("readable"), [], "{len}");
    }
}

#[test]
fn each_mark_is_found_at_each_of_its_places_and_nowhere_beside() {
    let len = 8 * MIB + 12_288 + 512;
    for format in FORMATS {
        for &place in format.places {
            let mut places = Vec::new();
            // Each place in turn, the last of a series included.
            let _ = at(place, len, |at| {
                places.push(at);
                false
            });
            assert!(!places.is_empty(), "{}", format.name);
            for at in [places[0], *places.last().expect("some")] {
                let found = look(&medium(len, &[(at, format.mark)]), len).expect("readable");
                assert!(
                    found.contains(&Finding { name: format.name, at }),
                    "{} at {at}: {found:?}",
                    format.name
                );
                let found = look(&medium(len, &[(at + 1, format.mark)]), len).expect("readable");
                let beside = Finding { name: format.name, at };
                assert!(
                    !found.contains(&beside) && !found.is_empty(),
                    "{} beside {at}: {found:?}",
                    format.name
                );
            }
        }
    }
}

#[test]
fn an_unknown_byte_at_either_end_is_found_and_in_the_middle_is_not() {
    let len = 4 * MIB;
    let at = |at: u64| look(&medium(len, &[(at, b"x")]), len).expect("readable");
    assert_eq!(at(MIB - 1), [Finding { name: "a first MiB that is not blank", at: MIB - 1 }]);
    assert_eq!(at(3 * MIB), [Finding { name: "a last MiB that is not blank", at: 3 * MIB }]);
    assert_eq!(at(2 * MIB), []);
    let short = look(&medium(700, &[(600, b"x")]), 700).expect("readable");
    assert_eq!(
        short,
        [Finding { name: "a first MiB that is not blank", at: 600 }],
        "shorter than a MiB, once"
    );
}

/// Runs a program that makes a file system; says aloud where there is none.
fn made_by(program: &str, args: &[&str], len: u64) -> Option<String> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(len).expect("sized");
    let path = ["/usr/sbin/", "/sbin/", "/usr/bin/"].map(|dir| format!("{dir}{program}"));
    let Some(path) = path.iter().find(|path| std::path::Path::new(path.as_str()).exists()) else {
        eprintln!("left out: there is no {program} on this machine");
        return None;
    };
    let made = Command::new(path).args(args).arg(file.path()).output().expect("runs");
    assert!(made.status.success(), "{program}: {made:?}");
    Some(named(&look(file.as_file(), len).expect("readable")))
}

#[test]
fn what_real_programs_make_is_named() {
    let table: [(&str, &[&str], u64, &str); 6] = [
        ("mkfs.ext4", &["-q", "-F"], 16, "an ext2, ext3 or ext4 file system (at byte 1080)"),
        ("mkfs.ext2", &["-q", "-F"], 16, "an ext2, ext3 or ext4 file system"),
        ("mkfs.xfs", &["-q", "-f"], 512, "an XFS file system (at byte 0)"),
        ("mkfs.btrfs", &["-q", "-f"], 256, "a Btrfs file system (at byte 65600)"),
        ("mkfs.vfat", &[], 64, "a FAT file system"),
        ("mkswap", &[], 16, "swap space (at byte 4086)"),
    ];
    for (program, args, mib, expected) in table {
        if let Some(named) = made_by(program, args, mib * MIB) {
            assert!(named.contains(expected), "{program}: {named}");
        }
    }
}
