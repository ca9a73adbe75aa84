//! Other people's programs: our client on `qemu-nbd`, and `nbdinfo`, `nbdcopy`, `qemu-io` on our protocol.
//!
//! A program that is not installed is skipped, and says so.

use super::server::{self, SIZE};
use super::{PLAIN, at, exercise, pattern};
use crate::nbd_client::{NbdClient, Options};
use costandby_ffi::testing::skip;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A child process that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program, or says that it is missing.
fn start(command: &mut Command) -> Option<Killed> {
    match command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(child) => Some(Killed(child)),
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{command:?}: {error}");
            skip(format_args!("{} is not installed", command.get_program().display()));
            None
        }
    }
}

/// Runs a program to its end, at most 30 s.
fn run(command: &mut Command) -> Option<Output> {
    let mut killed = start(command)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while killed.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "{command:?} does not end");
        thread::sleep(Duration::from_millis(10));
    }
    let mut output = Output { status: killed.0.wait().unwrap(), stdout: Vec::new(), stderr: Vec::new() };
    std::io::copy(killed.0.stdout.as_mut().unwrap(), &mut output.stdout).unwrap();
    std::io::copy(killed.0.stderr.as_mut().unwrap(), &mut output.stderr).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
    Some(output)
}

#[test]
fn our_client_works_on_qemu_nbd() {
    for options in [PLAIN, Options { structured: true, ..PLAIN }, Options::default()] {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) = (directory.path().join("image"), directory.path().join("qemu.sock"));
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let mut command = Command::new("qemu-nbd");
        command.args(["--format=raw", "--persistent", "--discard=unmap", "--export-name=db"]);
        command.arg("--socket").arg(&socket).arg(&image);
        let Some(_server) = start(&mut command) else { return };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "qemu-nbd does not listen");
            thread::sleep(Duration::from_millis(10));
        }
        exercise(&at(&socket, "db"), &options, 16 << 20);
        let refused = NbdClient::connect(&at(&socket, "other"), &options);
        assert!(matches!(refused, Err(crate::nbd_client::NbdError::Refused { .. })), "{refused:?}");
    }
}

#[test]
fn nbdinfo_reads_our_handshake() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    let uri = at(&socket, "db").to_string();
    let Some(output) = run(Command::new("nbdinfo").arg("--json").arg(&uri)) else { return };
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let export = &json["exports"][0];
    assert_eq!(json["protocol"], "newstyle-fixed");
    assert_eq!(json["structured"], true);
    assert_eq!(export["export-size"], SIZE);
    assert_eq!(export["description"], "a volume for tests");
    assert_eq!(export["contexts"][0], "base:allocation");
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    for flag in ["can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
        assert_eq!(export[flag], true, "{flag}");
    }
    assert_eq!(export["can_fast_zero"], false);
    assert_eq!(export["is_read_only"], false);

    let output = run(Command::new("nbdinfo").arg("--list").arg(at(&socket, "").to_string())).unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("export=\"db\""));
}

#[test]
fn nbdcopy_moves_an_image_in_and_out() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    let uri = at(&socket, "db").to_string();
    let (source, target) = (directory.path().join("in"), directory.path().join("out"));
    let mut image = pattern(11, 8 << 20);
    image.resize(SIZE, 0);
    image[40 << 20..41 << 20].copy_from_slice(&pattern(12, 1 << 20));
    std::fs::write(&source, &image).unwrap();
    if run(Command::new("nbdcopy").arg("--flush").arg(&source).arg(&uri)).is_none() {
        return;
    }
    run(Command::new("nbdcopy").arg(&uri).arg(&target)).unwrap();
    assert!(std::fs::read(&target).unwrap() == image, "what came out is not what went in");
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    let directory = tempfile::tempdir().unwrap();
    let socket = server::start(directory.path());
    let uri = at(&socket, "db").to_string();
    let mut command = Command::new("qemu-io");
    command.args(["--format", "raw", "--discard", "unmap"]);
    for step in ["write -P 7 0 1M", "write -f -P 8 1M 512", "write -z 4k 4k", "discard 512k 64k", "flush"] {
        command.args(["-c", step]);
    }
    for check in ["read -P 7 0 4k", "read -P 0 4k 4k", "read -P 0 512k 64k", "read -P 8 1M 512", "map"] {
        command.args(["-c", check]);
    }
    let Some(output) = run(command.arg(&uri)) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("verification failed"), "{text}");
    let mut head = [0; 8];
    NbdClient::connect(&at(&socket, "db"), &PLAIN).unwrap().read(4092, &mut head).unwrap();
    assert_eq!(head, [7, 7, 7, 7, 0, 0, 0, 0]);
}
