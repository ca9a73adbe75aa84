//! Runs the whole benchmark tiny, so that it cannot rot: every case measures and checks its result, and the record says
//! so.

use costandby_ffi::testing::skip;
use std::process::Command;

#[test]
fn the_whole_benchmark_runs_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let disks = directory.path().join("disks");
    std::fs::create_dir(&disks).expect("a directory");
    let record = directory.path().join("record.json");
    let output = Command::new(env!("CARGO_BIN_EXE_costandby-bench"))
        .args(["run", "--quick", "--dir"])
        .arg(&disks)
        .arg("--json")
        .arg(&record)
        .output()
        .expect("the program starts");
    let (table, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{table}");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&record).expect("a record")).expect("JSON");
    assert!(record["machine"]["cores"].as_u64() >= Some(1), "{}", record["machine"]);
    let cases = record["cases"].as_array().expect("a list of cases");
    let mut wanted = vec!["floor-busy-4k-1", "inproc-busy-4k-1", "inproc-adaptive-4k-32", "inproc-busy-1m-8"];
    let skipped = record["skipped"].as_array().expect("a list");
    for skipped in skipped {
        skip(format_args!("a part of it, {}", skipped.as_str().expect("a reason")));
    }
    if skipped.is_empty() {
        wanted.extend(["qemu-unix-threads-4k-1", "nbd-adaptive-4k-1", "nbd-adaptive-4k-32"]);
        wanted.extend(["resync-all", "resync-before", "resync-during"]);
        let figures = record["figures"].as_array().expect("a list");
        assert_eq!(figures.len(), 3, "bytes sent for bytes changed: {figures:?}");
        for figure in figures {
            // Less than what changed cannot be: each grain that was written to holds a new piece of 4 KiB.
            assert!(figure["value"].as_f64() > Some(1.0 / 16.0), "{figure}");
        }
        let idle = record["idle"].as_array().expect("a list");
        assert!(!idle.is_empty(), "nothing was idle");
        for idle in idle {
            let own_mib = idle["own_mib"].as_f64().expect("a number");
            assert!(own_mib > 0.0 && own_mib < idle["own_mib_max"].as_f64().expect("a number"), "{idle}");
        }
    }
    for id in wanted {
        let case = cases.iter().find(|case| case["id"] == id).unwrap_or_else(|| panic!("no case {id}"));
        assert!(case["requests"].as_u64() > Some(0), "{case}");
        assert!(table.contains(case["title"].as_str().expect("a title")), "{table}");
    }
    assert_eq!(std::fs::read_dir(&disks).expect("readable").count(), 0, "files were left behind");
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    let run = |args: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_costandby-bench")).args(args).output().expect("it starts");
        output.status.code()
    };
    assert_eq!(run(&["run", "--nonsense"]), Some(2));
    assert_eq!(run(&["run", "--quick", "--dir", "/nonexistent"]), Some(1));
}
