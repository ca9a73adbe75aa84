//! What can be tested without a device. The rest is in [`device`].

use std::fs;
use std::path::Path;

use super::device::why_none;
use super::*;

mod device;

#[test]
fn a_machine_without_devices_is_told_what_it_lacks() {
    if std::env::var_os("COSTANDBY_RDMA_DEVICE").is_some() {
        return;
    }
    // With or without libraries, modules and devices: an answer, no panic, and if it is an error, one with advice.
    match devices() {
        Ok(devices) => assert!(!devices.is_empty()),
        Err(error) => {
            let text = error.to_string();
            assert!(
                text.contains("install") || text.contains("modprobe") || text.contains("/dev/"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_missing_device_module_or_provider_are_told_apart() {
    let class = tempfile::tempdir().unwrap();
    let make = |path: &str| fs::create_dir_all(class.path().join(path)).unwrap();
    assert!(matches!(why_none(Path::new("/nonexistent")), VerbsError::NoDevice));
    make("infiniband_verbs/abi_version");
    assert!(matches!(why_none(class.path()), VerbsError::NoDevice));
    make("infiniband/mlx5_0");
    assert!(matches!(why_none(class.path()), VerbsError::NoModule { .. }));
    make("infiniband_verbs/uverbs0");
    assert!(matches!(why_none(class.path()), VerbsError::NoProvider { device } if device == "mlx5_0"));
}

#[test]
fn the_memlock_text_says_what_was_asked_and_how_to_raise_it() {
    let error = VerbsError::Memlock { asked: 7 << 20, limit: Memlock(Some(8 << 20)), pinned: 4096 };
    let text = error.to_string();
    assert!(text.contains("7340032") && text.contains("8388608") && text.contains("LimitMEMLOCK"), "{text}");
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::OutOfMemory);
    assert!(memlock().0.to_string().contains('t'), "{}", memlock().0);
}
