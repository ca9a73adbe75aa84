//! What becomes of a machine whose libraries are missing, unusable or too old.

use super::load::load;
use super::{Manager, Verbs, libraries};
use crate::verbs::VerbsError;

/// What is said when `library` is opened in libibverbs' place.
fn refusal(library: &'static str) -> VerbsError {
    // SAFETY: none of the libraries that are asked for here has the table's first function, so there is no table and
    // nothing of it is called.
    match unsafe { load(library, "libibverbs1", Verbs::find) } {
        Ok(_) => panic!("{library} is no libibverbs"),
        Err(error) => error,
    }
}

#[test]
fn a_library_that_is_not_there_names_the_packages() {
    let error = refusal("libibverbs-of-no-machine.so.1");
    assert!(matches!(error, VerbsError::NoLibrary { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("libibverbs-of-no-machine.so.1") && text.contains("libibverbs1 librdmacm1"),
        "{text}"
    );
}

#[test]
fn a_library_without_a_function_names_the_function_and_the_package() {
    let error = refusal("libc.so.6");
    assert!(matches!(error, VerbsError::BadLibrary { .. }), "{error:?}");
    let text = error.to_string();
    for part in ["libc.so.6", "it has no ibv_get_device_list", "package libibverbs1; version 32"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(error.io_kind(), std::io::ErrorKind::Unsupported);
}

#[test]
fn a_file_that_is_no_library_is_told_apart_from_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("libibverbs.so.1");
    std::fs::write(&path, "not a library\n").unwrap();
    let error = refusal(path.to_str().unwrap().to_owned().leak());
    assert!(matches!(&error, VerbsError::BadLibrary { cause, .. } if !cause.is_empty()), "{error:?}");
}

#[test]
fn both_libraries_are_opened_once_or_the_missing_one_is_named() {
    match (libraries(), libraries()) {
        (Ok(first), Ok(second)) => assert!(std::ptr::eq(first, second)),
        (Err(VerbsError::NoLibrary { library, .. }), Err(_)) => {
            assert!(["libibverbs.so.1", "librdmacm.so.1"].contains(&library), "{library}");
        }
        (first, _) => panic!("{:?}", first.err()),
    }
}

#[test]
fn a_table_of_the_wrong_library_is_refused() {
    // SAFETY: as in `refusal`.
    let refused = unsafe { load("libc.so.6", "librdmacm1", Manager::find) };
    let text = refused.err().expect("the C library makes no connections").to_string();
    assert!(text.contains("rdma_create_event_channel") && text.contains("librdmacm1"), "{text}");
}
