//! Opens libibverbs and librdmacm, once a process, when they are first needed.
//!
//! This is the only place that does. Whoever holds what the libraries gave out (a list, a context, a channel) got it by
//! the tables of [`libraries`], and keeps them at hand: no call looks for a library or a symbol again.
//!
//! Invariant: once opened, both stay loaded until the process ends, so the tables' pointers are good for ever. The
//! libraries keep threads and devices of their own and are not made to be unloaded.
//!
//! A library that is not there is looked for again with the next call, so one that is installed meanwhile is found without
//! a restart.

use std::error::Error as _;
use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::{Manager, Verbs};
use crate::verbs::error::VerbsError;

/// The functions of both libraries.
pub(in crate::verbs) struct Libraries {
    /// libibverbs.
    pub(in crate::verbs) verbs: Verbs,
    /// librdmacm.
    pub(in crate::verbs) manager: Manager,
}

static LIBRARIES: OnceLock<Libraries> = OnceLock::new();

/// Both libraries, which are opened with the first call. Blocks for that.
///
/// # Errors
/// [`VerbsError::NoLibrary`] where one is not installed, [`VerbsError::BadLibrary`] where one cannot be used.
pub(in crate::verbs) fn libraries() -> Result<&'static Libraries, VerbsError> {
    if let Some(libraries) = LIBRARIES.get() {
        return Ok(libraries);
    }
    // SAFETY: each table is searched in the library that it is declared for.
    let libraries = unsafe {
        Libraries {
            verbs: load("libibverbs.so.1", "libibverbs1", Verbs::find)?,
            manager: load("librdmacm.so.1", "librdmacm1", Manager::find)?,
        }
    };
    // Of two threads that come here at once, one's tables are kept; they are the same.
    Ok(LIBRARIES.get_or_init(|| libraries))
}

/// Opens the library of this file name, which a Debian package brings, and finds a table's functions in it. It stays
/// loaded until the process ends, also where a function is missing.
///
/// # Safety
/// The table is declared for this library.
pub(super) unsafe fn load<Table>(
    library: &'static str,
    package: &'static str,
    find: unsafe fn(&Library) -> Result<Table, &'static str>,
) -> Result<Table, VerbsError> {
    // SAFETY: opening runs the library's initialisation. It is the system's library of that name, found where the
    // dynamic linker looks, as if the program were linked with it. Everything it needs is resolved now: what is missing
    // is an error here, and not the end of the process when it is called.
    let opened = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        // The linker's own words stand in the source.
        let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        // Its own file, and not that of a library it needs.
        if cause.contains(library) && cause.contains("No such file") {
            VerbsError::no_library(library)
        } else {
            VerbsError::BadLibrary { library, package, cause }
        }
    })?;
    let opened = ManuallyDrop::new(opened);
    // SAFETY: the caller says that the table is the library's, and it is never unloaded.
    unsafe { find(&opened) }.map_err(|symbol| VerbsError::BadLibrary {
        library,
        package,
        cause: format!("it has no {symbol}"),
    })
}
