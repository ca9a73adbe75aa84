//! The lock on a whole file that keeps other programs from it: an open file description lock, exclusive, over every byte.
//!
//! Chosen over `flock` because QEMU takes locks of this kind on its images (single bytes from 100 on): so either program
//! refuses what the other has open. It belongs to the open file, not to the process: nothing else that the process opens
//! and closes ends it, and a mapping of the file holds it on as the file itself.
//!
//! Invariants: never waits; ends with the last descriptor and mapping of that open file.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Locks all of `file`, which is open for writing. `false`: somebody else has a lock on part of it.
///
/// # Errors
/// The system's, on file systems without locks `ENOLCK`, `EOPNOTSUPP` or `EINVAL`.
pub fn lock_whole(file: impl AsFd) -> io::Result<bool> {
    let exclusive = libc::c_short::try_from(libc::F_WRLCK).expect("a small constant");
    let from_start = libc::c_short::try_from(libc::SEEK_SET).expect("a small constant");
    // A length of 0 is to the end, however far that moves; the kernel wants 0 for the process.
    let lock = libc::flock { l_type: exclusive, l_whence: from_start, l_start: 0, l_len: 0, l_pid: 0 };
    let descriptor = file.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `lock`, which outlives the call, as the `struct flock` that this command takes, and keeps no
    // reference; `file` keeps the descriptor open meanwhile. No device touches either.
    if unsafe { libc::fcntl(descriptor, libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn one_open_file_has_the_lock_until_it_is_closed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk");
        std::fs::write(&path, "x").expect("written");
        let open = || File::options().read(true).write(true).open(&path).expect("opens");
        let first = open();
        assert!(lock_whole(&first).expect("locks"));
        assert!(lock_whole(&first).expect("locks"), "again");
        let second = open();
        assert!(!lock_whole(&second).expect("asks"), "also within a process");
        drop(open());
        assert!(!lock_whole(&second).expect("asks"), "closing another descriptor of the file ends nothing");
        drop(first);
        assert!(lock_whole(&second).expect("locks"));
    }
}
