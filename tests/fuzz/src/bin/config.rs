//! Fuzzes the configuration file: written by hand, by scripts, or not a configuration at all.
//!
//! What must hold: no text panics the reader; every complaint is one that a person can act on, in one line that
//! names the file; and what is accepted holds together: each volume's primary and disks are on nodes that exist.
#![no_main]

use costandby_control::config::Config;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

const FILE: &str = "pair.toml";

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text, Path::new(FILE)) {
        Ok(config) => {
            for volume in config.volumes.values() {
                assert!(volume.disks.contains_key(&volume.primary), "the primary has no disk");
                assert_eq!(volume.disks.len(), 2, "a volume has two nodes");
                assert!(volume.disks.keys().all(|node| config.nodes.contains_key(node)), "a disk on no node");
            }
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(FILE), "does not say where: {message}");
            assert!(!message.contains('\n'), "more than a line: {message:?}");
        }
    }
});
