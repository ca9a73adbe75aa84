//! Sets the log up as a daemon does, logs a line, and panics on a thread called `worker`: for the tests of the last words of
//! a daemon. `log-panic logging|json|bare`, where `bare` has no log.
#![forbid(unsafe_code)]

use costandby_control::logging::{self, Settings};
use std::ffi::OsStr;

fn main() {
    logging::end_on_panic();
    let how = std::env::args().nth(1).unwrap_or_default();
    let format = if how == "json" { "json" } else { "text" };
    let _log = (how != "bare").then(|| {
        let settings = Settings::parse(OsStr::new("info"), OsStr::new(format)).expect("valid");
        logging::start(settings, false).expect("a log")
    });
    tracing::info!("a line before");
    let worker = std::thread::Builder::new().name("worker".into()).spawn(|| panic!("the cause of it"));
    let _ = worker.expect("a thread").join();
}
