//! The handshake as clients speak it, and as they should not.

use super::*;
use crate::front::nbd::export::*;
use crate::front::nbd::proto::*;
use proptest::prelude::*;

/// Two volumes served here, one on the other node.
struct Node;

impl ExportDirectory for Node {
    fn lookup(&self, name: &str) -> Lookup {
        match name {
            "db" => Lookup::Found(Export { size: 1 << 30, read_only: false, description: "data".to_owned() }),
            "log" => Lookup::Found(Export { size: 4096, read_only: true, description: String::new() }),
            "far" => Lookup::Refused { message: "volume far is served by beta".to_owned() },
            _ => Lookup::Unknown,
        }
    }

    fn list(&self) -> Vec<ListedExport> {
        ["db", "log"].map(|name| ListedExport { name: name.to_owned(), description: String::new() }).to_vec()
    }
}

/// Only one volume.
struct Single;

impl ExportDirectory for Single {
    fn lookup(&self, name: &str) -> Lookup {
        Node.lookup(name)
    }

    fn list(&self) -> Vec<ListedExport> {
        Node.list().into_iter().take(1).collect()
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [&NBD_OPTS_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat()
}

fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

/// What a whole session came to.
#[derive(PartialEq, Eq, Debug)]
struct Session {
    out: Vec<u8>,
    consumed: usize,
    end: Result<Outcome, HandshakeError>,
}

/// Feeds `input` cut at the given places.
fn run(input: &[u8], cuts: &[usize], directory: &dyn ExportDirectory) -> Session {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(&mut out);
    let mut consumed = 0;
    let mut bounds: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    bounds.push(input.len());
    bounds.sort_unstable();
    for bound in bounds {
        while consumed < bound {
            let before = out.len();
            let step = match handshake.feed(&input[consumed..bound], &mut out, directory) {
                Ok(step) => step,
                Err(error) => return Session { out, consumed: 0, end: Err(error) },
            };
            assert!(step.consumed > 0, "feeding must make progress");
            assert!(out.len() - before < 64 << 10, "one call answers at most one option");
            assert!(handshake.piece.capacity() <= 2 * NBD_OPTION_LEN_MAX as usize);
            consumed += step.consumed;
            if step.outcome != Outcome::NeedMore {
                return Session { out, consumed, end: Ok(step.outcome) };
            }
        }
    }
    Session { out, consumed, end: Ok(Outcome::NeedMore) }
}

/// Client flags and options in one piece.
fn talk(options: &[Vec<u8>], directory: &dyn ExportDirectory) -> Session {
    let mut input = 3_u32.to_be_bytes().to_vec();
    input.extend(options.concat());
    run(&input, &[], directory)
}

/// Splits what the server sent behind the greeting into (option, reply type, data).
fn replies(out: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut rest = &out[18..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        assert_eq!(rest[..8], NBD_REP_MAGIC.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        let end = 20 + word(16) as usize;
        found.push((word(8), word(12), rest[20..end].to_vec()));
        rest = &rest[end..];
    }
    found
}

fn only_reply(options: &[Vec<u8>]) -> (u32, String) {
    let session = talk(options, &Node);
    assert_eq!(session.end, Ok(Outcome::NeedMore), "the session stays alive");
    let (_, kind, data) = replies(&session.out).pop().unwrap();
    (kind, String::from_utf8(data).unwrap())
}

#[test]
fn greeting() {
    let mut out = Vec::new();
    let _ = Handshake::start(&mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn go_tells_all_and_leaves_the_first_request_alone() {
    let go = option(NBD_OPT_GO, &go_data("db", &[3, 77, 1, 2]));
    let pipelined = vec![0x25; 100];
    let session = talk(&[go.clone(), pipelined], &Node);
    assert_eq!(session.consumed, 4 + go.len());
    let negotiated =
        Negotiated { size: 1 << 30, read_only: false, structured: false, base_allocation: false };
    assert_eq!(session.end, Ok(Outcome::Transmission(Opened { name: "db".to_owned(), negotiated })));
    let flags = 0b101_0110_1101_u16;
    let sizes = [1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    let expected = [
        (7, NBD_REP_INFO, [&[0, 0][..], &(1_u64 << 30).to_be_bytes(), &flags.to_be_bytes()].concat()),
        (7, NBD_REP_INFO, b"\x00\x01db".to_vec()),
        (7, NBD_REP_INFO, b"\x00\x02data".to_vec()),
        (7, NBD_REP_INFO, [&[0, 3][..], &sizes].concat()),
        (7, NBD_REP_ACK, vec![]),
    ];
    assert_eq!(replies(&session.out), expected);
}

#[test]
fn info_describes_without_opening() {
    let session = talk(&[option(NBD_OPT_INFO, &go_data("log", &[]))], &Node);
    assert_eq!(session.end, Ok(Outcome::NeedMore));
    let found = replies(&session.out);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].2[10..], (0b101_0110_1111_u16).to_be_bytes(), "read-only is flagged");
}

#[test]
fn export_name_ends_in_zeroes_unless_waived() {
    for (client_flags, zeroes_len) in [(1_u32, 124), (3, 0)] {
        let input = [&client_flags.to_be_bytes()[..], &option(NBD_OPT_EXPORT_NAME, b"db")].concat();
        let session = run(&input, &[], &Node);
        assert!(matches!(session.end, Ok(Outcome::Transmission(_))));
        assert_eq!(session.out.len(), 18 + 10 + zeroes_len);
        assert_eq!(session.out[18..26], (1_u64 << 30).to_be_bytes());
    }
}

#[test]
fn export_name_cannot_be_refused_but_by_closing() {
    for name in ["far", "nowhere", "a\0b", ""] {
        let session = talk(&[option(NBD_OPT_EXPORT_NAME, name.as_bytes())], &Node);
        assert!(matches!(session.end, Err(HandshakeError::ExportName { .. })), "{name:?}");
    }
}

#[test]
fn a_volume_served_elsewhere_says_where() {
    let (kind, message) = only_reply(&[option(NBD_OPT_GO, &go_data("far", &[]))]);
    assert_eq!((kind, message.as_str()), (NBD_REP_ERR_POLICY, "volume far is served by beta"));
}

#[test]
fn an_unknown_name_is_answered_by_the_known_ones() {
    let (kind, message) = only_reply(&[option(NBD_OPT_GO, &go_data("bd", &[]))]);
    assert_eq!((kind, message.as_str()), (NBD_REP_ERR_UNKNOWN, "no export \"bd\" here; there are: db, log"));
}

#[test]
fn the_empty_name_means_the_only_export() {
    let go = option(NBD_OPT_GO, &go_data("", &[]));
    let session = talk(std::slice::from_ref(&go), &Single);
    assert!(matches!(session.end, Ok(Outcome::Transmission(Opened { name, .. })) if name == "db"));
    let (kind, message) = only_reply(&[go]);
    assert_eq!((kind, message.as_str()), (NBD_REP_ERR_UNKNOWN, "no default export here; there are: db, log"));
}

#[test]
fn list_names_each_export() {
    let session = talk(&[option(NBD_OPT_LIST, &[])], &Node);
    let expected =
        [(3, NBD_REP_SERVER, string("db")), (3, NBD_REP_SERVER, string("log")), (3, NBD_REP_ACK, vec![])];
    assert_eq!(replies(&session.out), expected);
}

#[test]
fn abort_is_acknowledged() {
    for data_len in [0, 10, NBD_OPTION_LEN_MAX as usize + 1] {
        let session = talk(&[option(NBD_OPT_ABORT, &vec![0; data_len])], &Node);
        assert_eq!(session.end, Ok(Outcome::Close));
        assert_eq!(replies(&session.out), [(2, NBD_REP_ACK, vec![])]);
    }
}

#[test]
fn contexts_need_structured_replies_and_the_same_export() {
    let structured = option(NBD_OPT_STRUCTURED_REPLY, &[]);
    let set = |name| option(NBD_OPT_SET_META_CONTEXT, &context_data(name, &["qemu:x", BASE_ALLOCATION]));
    let go = option(NBD_OPT_GO, &go_data("db", &[]));
    assert_eq!(only_reply(&[set("db")]).0, NBD_REP_ERR_INVALID);

    let opened = |options: &[Vec<u8>]| match talk(options, &Node).end {
        Ok(Outcome::Transmission(opened)) => opened.negotiated,
        other => panic!("{other:?}"),
    };
    let both = opened(&[structured.clone(), set("db"), go.clone()]);
    assert!(both.structured && both.base_allocation);
    let other = opened(&[structured.clone(), set("log"), go.clone()]);
    assert!(other.structured && !other.base_allocation, "chosen for another export");
    let failed = opened(&[structured.clone(), set("db"), set("nowhere"), go.clone()]);
    assert!(!failed.base_allocation, "a failed choice takes back the one before");
    let none = option(NBD_OPT_SET_META_CONTEXT, &context_data("db", &[]));
    assert!(!opened(&[structured.clone(), set("db"), none, go.clone()]).base_allocation);

    let session = talk(&[structured, set("db"), go], &Node);
    let context = [&BASE_ALLOCATION_ID.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
    assert_eq!(replies(&session.out)[1], (10, NBD_REP_META_CONTEXT, context));
    let flags = &replies(&session.out)[3].2[10..];
    assert_eq!(flags, (0b101_1110_1101_u16).to_be_bytes(), "DF is offered");
}

#[test]
fn contexts_are_listed_by_query() {
    for (queries, count) in
        [(&[][..], 1), (&["base:"], 1), (&[BASE_ALLOCATION], 1), (&["base:other"], 0), (&["x-y:"], 0)]
    {
        let list = option(NBD_OPT_LIST_META_CONTEXT, &context_data("db", queries));
        let session = talk(&[option(NBD_OPT_STRUCTURED_REPLY, &[]), list], &Node);
        assert_eq!(replies(&session.out).len(), 2 + count, "{queries:?}");
    }
}

#[test]
fn malformed_options_are_told_so_and_the_session_lives() {
    let structured = || option(NBD_OPT_STRUCTURED_REPLY, &[]);
    let mut long_name = go_data("db", &[]);
    long_name[3] = 200;
    let mut many_infos = go_data("db", &[]);
    *many_infos.last_mut().unwrap() = 9;
    let mut many_queries = context_data("db", &[]);
    *many_queries.last_mut().unwrap() = 0xff;
    for (what, bad) in [
        ("list with data", option(NBD_OPT_LIST, b"x")),
        ("structured with data", option(NBD_OPT_STRUCTURED_REPLY, b"x")),
        ("starttls with data", option(NBD_OPT_STARTTLS, b"x")),
        ("go without data", option(NBD_OPT_GO, &[])),
        ("go with a name past its end", option(NBD_OPT_GO, &long_name)),
        ("go with infos past its end", option(NBD_OPT_GO, &many_infos)),
        ("go with a tail", option(NBD_OPT_GO, &[go_data("db", &[]), vec![0]].concat())),
        ("go with bytes that are no text", option(NBD_OPT_GO, b"\x00\x00\x00\x01\xff\x00\x00")),
        ("set with queries past its end", option(NBD_OPT_SET_META_CONTEXT, &many_queries)),
        ("query without colon", option(NBD_OPT_SET_META_CONTEXT, &context_data("db", &["base"]))),
    ] {
        let (kind, message) = only_reply(&[structured(), bad]);
        assert_eq!(kind, NBD_REP_ERR_INVALID, "{what}");
        assert!(!message.is_empty(), "{what}");
    }
}

#[test]
fn unsupported_and_oversized_options_are_answered() {
    for number in [NBD_OPT_STARTTLS, NBD_OPT_EXTENDED_HEADERS, 4, 0, 12, u32::MAX] {
        assert_eq!(only_reply(&[option(number, &[])]).0, NBD_REP_ERR_UNSUP, "{number}");
    }
    let over = vec![0; NBD_OPTION_LEN_MAX as usize + 1];
    assert_eq!(only_reply(&[option(NBD_OPT_GO, &over)]).0, NBD_REP_ERR_TOO_BIG);
    assert_eq!(only_reply(&[option(NBD_OPT_GO, &over), option(99, &over)]).0, NBD_REP_ERR_UNSUP);
    assert_eq!(only_reply(&[option(NBD_OPT_GO, &go_data(&"x".repeat(4097), &[]))]).0, NBD_REP_ERR_TOO_BIG);
}

#[test]
fn what_cannot_be_read_on_closes() {
    let end = |input: &[u8]| run(input, &[], &Node).end.unwrap_err();
    assert_eq!(end(&4_u32.to_be_bytes()), HandshakeError::ClientFlags { flags: 4 });
    assert_eq!(end(&[0; 20]), HandshakeError::OptionMagic { found: 0 });
    let mut absurd = vec![0, 0, 0, 3];
    absurd.extend(&option(NBD_OPT_LIST, &[])[..12]);
    absurd.extend(u32::MAX.to_be_bytes());
    assert_eq!(end(&absurd), HandshakeError::OptionLen { option: 3, len: u32::MAX });
}

/// An option a client might send, well-formed or not.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("db"), Just("log"), Just("far"), Just(""), Just("x")];
    let query = prop_oneof![Just(BASE_ALLOCATION), Just("base:"), Just("qemu:y"), Just("plain")];
    prop_oneof![
        (6_u32..8, name.clone(), prop::collection::vec(0_u16..5, 0..5))
            .prop_map(|(number, name, infos)| option(number, &go_data(name, &infos))),
        (9_u32..11, name, prop::collection::vec(query, 0..3))
            .prop_map(|(number, name, queries)| option(number, &context_data(name, &queries))),
        Just(option(NBD_OPT_STRUCTURED_REPLY, &[])),
        (0_u32..13, prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(number, data)| option(number, &data)),
        (0_u32..13, 16_000_usize..18_000).prop_map(|(number, len)| option(number, &vec![0; len])),
    ]
}

fn any_session() -> impl Strategy<Value = Vec<u8>> {
    (0_u32..4, prop::collection::vec(any_option(), 0..8), prop::collection::vec(any::<u8>(), 0..80))
        .prop_map(|(flags, options, tail)| [flags.to_be_bytes().to_vec(), options.concat(), tail].concat())
}

proptest! {
    #[test]
    fn splitting_the_input_changes_nothing(
        input in any_session(), cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        prop_assert_eq!(run(&input, &cuts, &Node), run(&input, &[], &Node));
    }

    #[test]
    fn any_bytes_are_survived(
        head in prop::collection::vec(any::<u8>(), 0..4096), cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let _ = run(&head, &cuts, &Node);
        let behind_the_flags = [&[0, 0, 0, 3][..], &head].concat();
        let _ = run(&behind_the_flags, &cuts, &Node);
        let (number, data) = head.split_at(head.len().min(1));
        let as_an_option = option(u32::from(number.first().copied().unwrap_or(0) % 13), data);
        let _ = run(&[&[0, 0, 0, 3][..], &as_an_option].concat(), &cuts, &Node);
    }
}
