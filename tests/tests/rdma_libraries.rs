//! The program on machines without the RDMA libraries, or with some that are of no use: it runs, and says what to install.

#![forbid(unsafe_code)]

use costandby_tests::process::{costandby_binary, run};
use std::fs;
use std::process::Command;

/// The dynamic linker lists what it would load, and the program does not run.
#[test]
fn the_program_is_not_linked_with_the_rdma_libraries() {
    let output = run(Command::new(costandby_binary()).env("LD_TRACE_LOADED_OBJECTS", "1")).ok();
    let needed = &output.stdout;
    assert!(needed.contains("libc.so"), "no list of libraries: {needed}");
    for library in ["ibverbs", "rdmacm"] {
        assert!(!needed.contains(library), "the program needs {library} to start: {needed}");
    }
}

/// As on a machine with a broken installation: the file is found, and is no library.
#[test]
fn doctor_says_what_to_install_where_a_library_is_of_no_use() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("libibverbs.so.1"), "not a library\n").expect("a file");
    let output =
        run(Command::new(costandby_binary()).arg("doctor").env("LD_LIBRARY_PATH", directory.path())).ok();
    let lines: Vec<_> = output.stdout.lines().filter(|line| line.contains("libibverbs.so.1")).collect();
    let [line] = lines[..] else { panic!("one line about the library: {}", output.stdout) };
    assert!(line.starts_with("warn") && line.contains("the Debian package libibverbs1"), "{line}");
}
