//! Values from the kernel: random numbers and the boot id.
//!
//! Generations, volume ids and metadata areas are named by random numbers, which must not repeat across nodes and
//! restarts. The boot's id tells a daemon whether the machine lost power since a mark was put on record, or only the
//! process ended.
//!
//! Survives: nothing; a system without `/dev/urandom` and `/proc` is refused with the system's words.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::OnceLock;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A giver of random numbers.
///
/// # Errors
/// The system's, where it has no `/dev/urandom`.
pub fn random_source() -> io::Result<crate::role::Random> {
    // One descriptor for the whole process, where each volume has a source.
    static SOURCE: OnceLock<File> = OnceLock::new();
    let source = match SOURCE.get() {
        Some(source) => source,
        None => {
            let opened = File::open("/dev/urandom")?;
            SOURCE.get_or_init(|| opened)
        }
    };
    Ok(Box::new(move || {
        let (mut bytes, mut source) = ([0; 8], source);
        source.read_exact(&mut bytes).expect("/dev/urandom never ends");
        u64::from_le_bytes(bytes)
    }))
}

/// One random number.
///
/// # Errors
/// As [`random_source`].
pub fn random_number() -> io::Result<u64> {
    Ok(random_source()?())
}

/// The kernel's boot: another one after each loss of power or restart of the machine.
///
/// # Errors
/// The system's, and `InvalidData` where it says something else than 32 hexadecimal digits and dashes.
pub fn boot_id() -> io::Result<[u8; 16]> {
    parse(&std::fs::read_to_string(Path::new(BOOT_ID))?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().chars().filter(|&digit| digit != '-').collect();
    (digits.len() == 32 && digits.is_ascii())
        .then(|| u128::from_str_radix(&digits, 16).ok())
        .flatten()
        .map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_has_a_name_that_stays() {
        let boot = boot_id().expect("Linux");
        assert_ne!(boot, [0; 16]);
        assert_eq!(boot_id().expect("Linux"), boot);
    }

    #[test]
    fn only_an_identifier_is_taken_for_one() {
        let text = "0a1b2c3d-0000-4000-8000-0000000000ff\n";
        assert_eq!(parse(text).map(|id| (id[0], id[3], id[15])), Some((0x0a, 0x3d, 0xff)));
        for text in
            ["", "0a1b", "+a1b2c3d-0000-4000-8000-0000000000ff0", "é1b2c3d-0000-4000-8000-0000000000ff"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
