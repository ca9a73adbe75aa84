//! Fuzzes the NBD handshake: everything a client may say before its export is open.
//!
//! What must hold: no input panics it; it always makes progress; one option draws a bounded reply; and how the network
//! cuts the bytes into pieces changes neither the answers nor the end. The input's first byte is the size of the pieces.
#![no_main]

use costandby_datapath::front::nbd::export::{Export, ExportDirectory, ListedExport, Lookup};
use costandby_datapath::front::nbd::handshake::{Handshake, HandshakeError, Outcome};
use costandby_datapath::limits::NBD_OPTION_LEN_MAX;
use libfuzzer_sys::fuzz_target;

/// The longest answer quotes what one option held, a few times over.
const REPLY_LEN_MAX: usize = 4 * NBD_OPTION_LEN_MAX as usize;

struct Directory;

impl ExportDirectory for Directory {
    fn lookup(&self, name: &str) -> Lookup {
        match name {
            "db" => Lookup::Found(Export { size: 1 << 30, read_only: false, description: "a volume".into() }),
            "log" => Lookup::Refused { message: "served by the other node".into() },
            _ => Lookup::Unknown,
        }
    }

    fn list(&self) -> Vec<ListedExport> {
        ["db", "log"].map(|name| ListedExport { name: name.into(), description: String::new() }).into()
    }
}

/// A whole session: what was sent back, how it ended, and how many bytes of the input belong to it.
fn session(input: &[u8], piece_len: usize) -> (Vec<u8>, Result<Outcome, HandshakeError>, usize) {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(&mut out);
    let mut at = 0;
    while at < input.len() {
        let piece = &input[at..input.len().min(at + piece_len)];
        let before = out.len();
        let step = match handshake.feed(piece, &mut out, &Directory) {
            Ok(step) => step,
            // Where in the piece the error stood is not told, and the connection closes anyway.
            Err(error) => return (out, Err(error), 0),
        };
        assert!((1..=piece.len()).contains(&step.consumed), "no progress, or more than there was");
        assert!(out.len() - before <= REPLY_LEN_MAX, "a reply of {} bytes", out.len() - before);
        at += step.consumed;
        if step.outcome != Outcome::NeedMore {
            return (out, Ok(step.outcome), at);
        }
    }
    (out, Ok(Outcome::NeedMore), at)
}

fuzz_target!(|data: &[u8]| {
    let Some((&piece_len, input)) = data.split_first() else { return };
    let whole = session(input, usize::MAX / 2);
    assert_eq!(session(input, usize::from(piece_len).max(1)), whole, "the pieces made a difference");
});
