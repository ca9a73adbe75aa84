//! Finds other users of a file or device on this machine: mounts, swap, holders such as device mapper or md, loop
//! devices.
//!
//! `costandby create` and the daemon ask after the kernel has refused them a device (`O_EXCL`), so that the refusal can name
//! where it is mounted, and before they use a file, which the kernel refuses nobody.
//!
//! Invariants: only reads, and only what the kernel says in `/proc` and `/sys`; each use is a few words that follow "it is".
//!
//! Survives: a kernel that says nothing (no use is known then; the device is refused all the same).

use rustix::fs::{major, makedev, minor};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Uses that a text names.
const NAMED_MAX: usize = 4;

/// A device's number: major and minor.
type Number = (u32, u32);

/// What uses the file or device at `path`, each in words: `mounted at /srv`. Empty where nothing is known.
#[must_use]
pub fn users_of(path: &Path) -> Vec<String> {
    let Ok(metadata) = fs::metadata(path) else { return Vec::new() };
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut users = Vec::new();
    if metadata.file_type().is_block_device() {
        let own = (major(metadata.rdev()), minor(metadata.rdev()));
        let numbers = with_partitions(own);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        users.extend(mounts_of(&mounts, &numbers, number_of));
        users.extend(swaps_of(&swaps, |used| number_of(used).is_some_and(|used| numbers.contains(&used))));
        users.extend(numbers.iter().flat_map(|number| holders_of(*number)));
    } else {
        let same = |other: &str| is_same(&metadata, Path::new(other));
        users.extend(swaps_of(&swaps, same));
        users.extend(loops_of(same));
    }
    users.dedup();
    users
}

/// The same as words that follow "it is", or nothing.
#[must_use]
pub fn named(users: &[String]) -> Option<String> {
    (!users.is_empty()).then(|| users.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", "))
}

fn is_same(metadata: &fs::Metadata, other: &Path) -> bool {
    fs::metadata(other).is_ok_and(|other| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino()))
}

fn number_of(path: &str) -> Option<Number> {
    let metadata = fs::metadata(path).ok().filter(|metadata| metadata.file_type().is_block_device())?;
    Some((major(metadata.rdev()), minor(metadata.rdev())))
}

fn directory_of((major, minor): Number) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// A device and, where it is a whole disk, its partitions.
fn with_partitions(own: Number) -> Vec<Number> {
    let entries = fs::read_dir(directory_of(own)).into_iter().flatten().flatten();
    let partitions = entries
        .filter(|entry| entry.path().join("partition").exists())
        .filter_map(|entry| parse_number(fs::read_to_string(entry.path().join("dev")).ok()?.trim()));
    [own].into_iter().chain(partitions).collect()
}

fn parse_number(text: &str) -> Option<Number> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Where devices are mounted, from `mountinfo`'s lines: by number, or by source where the file system has a number of its own
/// (Btrfs).
fn mounts_of(mountinfo: &str, numbers: &[Number], number_of: impl Fn(&str) -> Option<Number>) -> Vec<String> {
    let lines = mountinfo.lines().filter_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        let (number, point) = (parse_number(fields.next()?)?, fields.nth(1)?);
        let source = unescaped(source.split(' ').nth(1)?);
        let ours = numbers.contains(&number)
            || (source.starts_with('/')
                && number_of(&source).is_some_and(|number| numbers.contains(&number)));
        ours.then(|| format!("mounted at {}", unescaped(point)))
    });
    lines.collect()
}

fn swaps_of(swaps: &str, is_ours: impl Fn(&str) -> bool) -> Vec<String> {
    let used = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next().map(unescaped));
    used.filter(|used| is_ours(used)).map(|_| "in use as swap space".to_owned()).collect()
}

/// Device mapper, md and the like, by their names.
fn holders_of(number: Number) -> Vec<String> {
    let entries = fs::read_dir(directory_of(number).join("holders")).into_iter().flatten().flatten();
    let named = entries.map(|entry| {
        let device = entry.file_name().to_string_lossy().into_owned();
        let name = fs::read_to_string(format!("/sys/class/block/{device}/dm/name")).unwrap_or_default();
        match name.trim() {
            "" => format!("part of {device}"),
            name => format!("part of {device} ({name})"),
        }
    });
    named.collect()
}

fn loops_of(is_ours: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let used = entries.filter_map(|entry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        is_ours(file.trim_end_matches('\n'))
            .then(|| format!("in use as /dev/{}", entry.file_name().to_string_lossy()))
    });
    used.collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescaped(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        shown.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        let (letter, len) = code.map_or(('\\', 1), |code| (char::from(code), 4));
        shown.push(letter);
        rest = &rest[at + len..];
    }
    shown + rest
}

/// The numbers of a file and its file system or, for a device, of the device: two paths with the same are the same disk.
#[must_use]
pub fn identity(path: &Path) -> Option<Identity> {
    let metadata = fs::metadata(path).ok()?;
    Some(if metadata.file_type().is_block_device() {
        Identity::Device(makedev(major(metadata.rdev()), minor(metadata.rdev())))
    } else {
        Identity::File { device: metadata.dev(), inode: metadata.ino() }
    })
}

/// What a path leads to, whatever links it goes through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Identity {
    /// A block device, by its number.
    Device(u64),
    /// A file.
    File {
        /// Of its file system.
        device: u64,
        /// In it.
        inode: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
29 1 8:17 / /srv/my\\040data rw,relatime shared:2 master:1 - ext4 /dev/sdb1 rw
30 1 0:44 /root /mnt/b rw,relatime shared:3 - btrfs /dev/sdc rw,space_cache=v2
31 1 8:1 / / rw - ext4 /dev/root rw
";

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let number_of = |path: &str| (path == "/dev/sdc").then_some((8, 32));
        let of = |numbers: &[Number]| mounts_of(MOUNTINFO, numbers, number_of);
        assert_eq!(of(&[(8, 16), (8, 17)]), ["mounted at /srv/my data"], "a partition's");
        assert_eq!(of(&[(8, 32)]), ["mounted at /mnt/b"], "a file system with a number of its own");
        assert!(of(&[(8, 33), (0, 0)]).is_empty());
    }

    #[test]
    fn odd_lines_of_the_kernel_are_no_use() {
        assert!(mounts_of("x\n1 2\n - \n1 2 8:1 / - \n", &[(8, 1)], |_| None).is_empty());
        assert_eq!(unescaped("a\\134b\\011c\\9"), "a\\b\tc\\9");
        let swaps = "Filename Type Size Used Priority\n/swap\\040file file 4 0 -2\n";
        assert_eq!(swaps_of(swaps, |path| path == "/swap file"), ["in use as swap space"]);
        assert!(users_of(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn links_lead_to_the_same_disk() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "x").expect("written");
        fs::write(path("b"), "x").expect("written");
        fs::hard_link(path("a"), path("hard")).expect("linked");
        std::os::unix::fs::symlink(path("a"), path("soft")).expect("linked");
        let same = |one: &str, other: &str| identity(&path(one)) == identity(&path(other));
        assert!(same("a", "hard") && same("a", "soft") && !same("a", "b"));
        assert_eq!(identity(&path("none")), None);
    }
}
