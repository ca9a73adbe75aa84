//! Integration tests of costandby.
#![forbid(unsafe_code)]
