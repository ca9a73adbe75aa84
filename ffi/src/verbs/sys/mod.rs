//! What this program declares of libibverbs and librdmacm, and how the two libraries are loaded.
//!
//! Called by the other files of `verbs` only, which make safe calls of these. Nothing here is generated and nothing is
//! linked: the declarations are ours, and the libraries are opened while the program runs. So a build needs neither
//! their headers nor libclang, cmake or a C compiler, and a machine without the libraries runs the same program.
//!
//! - `structures`: what is handed to the libraries, or got from them
//! - `constants`: the numbers that go into it
//! - `functions`: one table of function pointers a library
//! - `inline`: the four calls of a write's way, which no library exports: they go through pointers in the device's context
//! - `load`: [`libraries`], which opens both libraries once a process
//!
//! # What keeps the declarations right
//! - Each structure says its size, and where each field stands; both are asserted when this crate is compiled. That
//!   holds a declaration to what is written beside it.
//! - `tests/rdma-oracle` compares what is written with the real headers: structures, fields, constants and prototypes,
//!   each one that is declared here. It reads the files of this directory with macros of its own instead of `declare`'s, so
//!   nothing can be declared and not be compared.
//! - The libraries keep their binary interface since rdma-core 32 at the latest (`debian/lib*.symbols` there names the
//!   version of each symbol): structures that programs allocate do not grow.
//!
//! Names are the C ones, so that manual pages and headers can be searched for them.

#[macro_use]
mod declare;

mod constants;
mod functions;
mod inline;
mod load;
mod structures;

pub(super) use constants::*;
pub(super) use functions::{Manager, Verbs};
pub(super) use inline::*;
pub(super) use load::{Libraries, libraries};
pub(super) use structures::*;

#[cfg(not(target_pointer_width = "64"))]
compile_error!(
    "the RDMA structures are declared for 64-bit systems only: build with --no-default-features, without `rdma`"
);

#[cfg(test)]
mod tests;
