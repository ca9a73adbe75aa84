//! Front ends: where requests come in and completions go out.
//!
//! First link of the flow: a front end turns what a client speaks into checked requests on byte ranges, hands them to
//! the disk and the mirror, and turns completions back into what the client understands. A malformed request ends in
//! the client's own kind of error and hurts no other connection.

pub mod nbd;
pub mod queue;
