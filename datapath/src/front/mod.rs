//! Front ends: where requests come in and completions go out.
//!
//! A front end turns a client's protocol into checked requests on byte ranges, hands them to the volume, and turns
//! completions into replies. A malformed request gets an error of that protocol and disturbs no other connection.

pub mod nbd;
pub mod queue;
