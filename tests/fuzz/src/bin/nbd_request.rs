//! Fuzzes the NBD request header and the judgement over it: what a client may say once its export is open.
//!
//! What must hold: no input panics it; a header is read back as it was sent; a request that passes is inside the export,
//! within the limits and allowed by what was negotiated; and one that is refused leaves the byte stream in step, so
//! that a write's payload is never taken for the next request. The input is a byte of negotiated flags, the export's
//! size, then the header.
#![no_main]

use costandby_datapath::front::nbd::proto::{
    AfterRejection, Command, Negotiated, Operation, REQUEST_LEN, Request,
};
use costandby_datapath::limits::PAYLOAD_LEN_MAX;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&flags, data)) = data.split_first() else { return };
    let Some((size, data)) = data.split_first_chunk::<8>() else { return };
    let Some(bytes) = data.first_chunk::<REQUEST_LEN>() else { return };
    let structured = flags & 2 != 0;
    let negotiated = Negotiated {
        size: u64::from_le_bytes(*size),
        read_only: flags & 1 != 0,
        structured,
        base_allocation: structured && flags & 4 != 0,
    };
    let Ok(request) = Request::decode(bytes) else { return };
    assert_eq!(&request.encode(), bytes, "the header lost something");

    match request.check(&negotiated) {
        Ok(checked) => {
            assert_eq!(checked.cookie, request.cookie);
            check_accepted(checked.operation, &negotiated);
        }
        Err(rejection) => {
            let payload_len = if request.command == Command::Write.to_wire() { request.len } else { 0 };
            match rejection.after {
                AfterRejection::Continue => assert_eq!(payload_len, 0, "payload taken for a request"),
                AfterRejection::Drain { len } => assert_eq!(payload_len, len, "out of step"),
                AfterRejection::Close => assert!(payload_len > PAYLOAD_LEN_MAX, "closed without need"),
            }
        }
    }
});

fn check_accepted(operation: Operation, negotiated: &Negotiated) {
    let (range, changes, has_payload) = match operation {
        Operation::Disconnect | Operation::Flush => return,
        Operation::Read { range } => (range, false, true),
        Operation::Write { range, .. } => (range, true, true),
        Operation::Trim { range, .. } | Operation::WriteZeroes { range, .. } => (range, true, false),
        Operation::Cache { range } => (range, false, false),
        Operation::BlockStatus { range, .. } => {
            assert!(negotiated.base_allocation, "block status of a context never agreed on");
            (range, false, false)
        }
    };
    assert!(range.len > 0 && range.fits(negotiated.size), "{range} of {}", negotiated.size);
    assert!(!(changes && negotiated.read_only), "a change of a read-only export");
    assert!(!has_payload || range.len <= PAYLOAD_LEN_MAX.into(), "payload of {} bytes", range.len);
}
