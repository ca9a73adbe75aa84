//! Signals that a daemon ignores.
//!
//! By default most signals end a process at once, also those that nobody sends a daemon on purpose: a timer's, a terminal's, or
//! SIGXFSZ, which a write beyond a limit to the size of files raises *before* it fails. The daemon calls [`ignore`] once, at
//! its start; what fails then fails as an error of its system call.
//!
//! Ignored, not handled: a handler would interrupt system calls of whatever thread it runs on. Signals that programs send on
//! purpose to end, stop or dump a process (SIGTERM, SIGINT, SIGQUIT, SIGTSTP), and those of faults, stay as they are.

/// Signals without meaning to a daemon, beside the real-time ones. SIGTTOU: with `stty tostop` the terminal stops a background job that
/// writes to it, all threads of it. SIGHUP: until its handler is there.
const MEANINGLESS: [libc::c_int; 13] = [
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGTTOU,
];

/// Has this process ignore SIGHUP, SIGUSR1, SIGUSR2, SIGPIPE, SIGXFSZ and the others that would end it and mean nothing to it. A
/// handler that is installed later takes the place of this.
pub fn ignore() {
    for signal in MEANINGLESS.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        // SAFETY: SIG_IGN runs no code of ours, so nothing has to be safe in a signal's context, and none of these signals is
        // in use by this process when it starts. An error, for a number that this system does not have, changes nothing.
        unsafe {
            libc::signal(signal, libc::SIG_IGN);
        }
    }
}
