//! The `costandby` program: hands its arguments to the library's command line and its exit status to the system.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    costandby_control::cli::main(std::env::args_os())
}
