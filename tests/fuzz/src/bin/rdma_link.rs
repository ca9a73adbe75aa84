//! Fuzzes one end of an RDMA link against a peer that does anything at all with its queue pair.
//!
//! What must hold, and what the bytes stand for, is said where the steps are played.
#![no_main]

use costandby_datapath::testing::hostile_rdma;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    hostile_rdma::play(data);
});
