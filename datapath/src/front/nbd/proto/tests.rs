//! Requests: round trip, and which are let through.

use super::*;
use proptest::prelude::*;

const SIZE: u64 = 64 << 20;
const OPEN: Negotiated = Negotiated { size: SIZE, read_only: false, structured: true, base_allocation: true };

fn request(command: Command, flags: u16, offset: u64, len: u32) -> Request {
    Request { flags, command: command.to_wire(), cookie: 7, offset, len }
}

fn errno(request: &Request, negotiated: &Negotiated) -> Option<NbdErrno> {
    request.check(negotiated).err().map(|rejection| rejection.errno)
}

#[test]
fn header_stands_on_the_wire_as_specified() {
    let bytes = request(Command::Write, NBD_CMD_FLAG_FUA, 0x0102_0304_0506_0708, 0x1000).encode();
    assert_eq!(
        bytes,
        [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x10, 0]
    );
}

#[test]
fn wrong_magic_is_told_apart() {
    let mut bytes = request(Command::Read, 0, 0, 1).encode();
    bytes[0] = 0;
    assert_eq!(Request::decode(&bytes), Err(BadRequestMagic { found: 0x0060_9513 }));
}

#[test]
fn good_requests_become_operations() {
    let range = ByteRange::new(SIZE - 4096, 4096);
    let check = |command, flags| {
        let checked = request(command, flags, range.start, 4096).check(&OPEN).unwrap();
        assert_eq!(checked.cookie, 7);
        checked.operation
    };
    assert_eq!(check(Command::Read, NBD_CMD_FLAG_DF), Operation::Read { range });
    assert_eq!(check(Command::Write, 0), Operation::Write { range, fua: false });
    assert_eq!(check(Command::Write, NBD_CMD_FLAG_FUA), Operation::Write { range, fua: true });
    assert_eq!(check(Command::Trim, NBD_CMD_FLAG_FUA), Operation::Trim { range, fua: true });
    assert_eq!(check(Command::Cache, NBD_CMD_FLAG_FUA), Operation::Cache { range });
    assert_eq!(
        check(Command::WriteZeroes, NBD_CMD_FLAG_NO_HOLE),
        Operation::WriteZeroes { range, fua: false, no_hole: true }
    );
    assert_eq!(
        check(Command::BlockStatus, NBD_CMD_FLAG_REQ_ONE),
        Operation::BlockStatus { range, one: true }
    );
    assert_eq!(
        request(Command::Flush, NBD_CMD_FLAG_FUA, 0, 0).check(&OPEN).unwrap().operation,
        Operation::Flush
    );
    assert_eq!(request(Command::Disc, 0, 0, 0).check(&OPEN).unwrap().operation, Operation::Disconnect);
}

#[test]
fn the_end_of_the_export_is_a_wall() {
    for (command, expected) in [
        (Command::Read, NbdErrno::Inval),
        (Command::Write, NbdErrno::NoSpace),
        (Command::WriteZeroes, NbdErrno::NoSpace),
        (Command::Trim, NbdErrno::Inval),
        (Command::Cache, NbdErrno::Inval),
        (Command::BlockStatus, NbdErrno::Inval),
    ] {
        for offset in [SIZE - 4095, SIZE, u64::MAX - 4095, u64::MAX] {
            assert_eq!(
                errno(&request(command, 0, offset, 4096), &OPEN),
                Some(expected),
                "{command:?} at {offset}"
            );
        }
    }
}

#[test]
fn zero_length_and_unknown_flags_are_invalid() {
    for command in [
        Command::Read,
        Command::Write,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
    ] {
        assert_eq!(errno(&request(command, 0, 0, 0), &OPEN), Some(NbdErrno::Inval), "{command:?}");
        for flag in [NBD_CMD_FLAG_FAST_ZERO, 1 << 5, 1 << 15] {
            assert_eq!(
                errno(&request(command, flag, 0, 512), &OPEN),
                Some(NbdErrno::Inval),
                "{command:?} {flag}"
            );
        }
    }
    assert_eq!(errno(&request(Command::Write, NBD_CMD_FLAG_NO_HOLE, 0, 512), &OPEN), Some(NbdErrno::Inval));
    assert_eq!(errno(&request(Command::Flush, 0, 0, 512), &OPEN), Some(NbdErrno::Inval));
    assert_eq!(errno(&request(Command::Flush, 0, 512, 0), &OPEN), Some(NbdErrno::Inval));
    let unknown = Request { command: 8, ..request(Command::Read, 0, 0, 512) };
    assert_eq!(errno(&unknown, &OPEN), Some(NbdErrno::Inval));
}

#[test]
fn what_was_not_negotiated_is_invalid() {
    let plain = Negotiated { structured: false, base_allocation: false, ..OPEN };
    assert_eq!(errno(&request(Command::Read, NBD_CMD_FLAG_DF, 0, 512), &plain), Some(NbdErrno::Inval));
    assert_eq!(errno(&request(Command::BlockStatus, 0, 0, 512), &plain), Some(NbdErrno::Inval));
}

#[test]
fn read_only_exports_refuse_changes() {
    let frozen = Negotiated { read_only: true, ..OPEN };
    for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
        assert_eq!(errno(&request(command, 0, 0, 512), &frozen), Some(NbdErrno::Perm));
    }
    assert_eq!(errno(&request(Command::Read, 0, 0, 512), &frozen), None);
}

#[test]
fn oversized_requests_keep_the_stream_in_step() {
    let large = Negotiated { size: 1 << 40, ..OPEN };
    let after = |command, len| request(command, 0, 0, len).check(&large).unwrap_err().after;
    let over = PAYLOAD_LEN_MAX + 1;
    assert_eq!(errno(&request(Command::Write, 0, 0, over), &large), Some(NbdErrno::Inval));
    assert_eq!(after(Command::Write, over), AfterRejection::Drain { len: over });
    assert_eq!(after(Command::Write, PAYLOAD_DRAIN_LEN_MAX + 1), AfterRejection::Close);
    assert_eq!(errno(&request(Command::Read, 0, 0, over), &large), Some(NbdErrno::Overflow));
    assert_eq!(after(Command::Read, over), AfterRejection::Continue);
    let plain = Negotiated { structured: false, base_allocation: false, ..large };
    assert_eq!(errno(&request(Command::Read, 0, 0, over), &plain), Some(NbdErrno::Inval));
    for command in [Command::Trim, Command::WriteZeroes, Command::Cache, Command::BlockStatus] {
        assert_eq!(errno(&request(command, 0, 0, u32::MAX), &large), None, "{command:?} carries no payload");
    }
}

proptest! {
    #[test]
    fn decode_reads_back_what_encode_wrote(
        flags: u16, command: u16, cookie: u64, offset: u64, len: u32,
    ) {
        let request = Request { flags, command, cookie, offset, len };
        prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
    }

    #[test]
    fn what_passes_lies_inside_the_export(
        flags in 0_u16..32, command in 0_u16..10, offset in 0..SIZE * 2, len in 0..PAYLOAD_LEN_MAX * 2,
        read_only: bool, structured: bool,
    ) {
        let negotiated = Negotiated { size: SIZE, read_only, structured, base_allocation: structured };
        let request = Request { flags, command, cookie: 1, offset, len };
        match request.check(&negotiated) {
            Ok(CheckedRequest { operation, .. }) => {
                let (range, payload) = match operation {
                    Operation::Read { range } | Operation::Write { range, .. } => (range, true),
                    Operation::Trim { range, .. }
                    | Operation::Cache { range }
                    | Operation::WriteZeroes { range, .. }
                    | Operation::BlockStatus { range, .. } => (range, false),
                    Operation::Flush | Operation::Disconnect => return Ok(()),
                };
                prop_assert!(range.len > 0 && range.fits(SIZE));
                prop_assert!(!payload || range.len <= u64::from(PAYLOAD_LEN_MAX));
            }
            Err(rejection) => {
                let payload_len = if command == 1 { len } else { 0 };
                let expected = if payload_len == 0 {
                    AfterRejection::Continue
                } else {
                    AfterRejection::Drain { len }
                };
                prop_assert_eq!(rejection.after, expected);
            }
        }
    }
}
