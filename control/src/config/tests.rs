//! Tests of the configuration: what is accepted, and that each mistake gets its line and its remedy.

use super::quantity::{QuantityError, display_size, parse_duration, parse_size};
use super::*;
use proptest::prelude::*;

/// DESIGN's own example, as it stands there but for `insecure`.
const EXAMPLE: &str = r#"insecure = true
peer_timeout = "750ms"

[nodes.alpha]
listen  = "10.9.0.1:7790"
admin   = "/run/costandby/alpha.sock"
nbd     = ["unix:/run/costandby/alpha.nbd", "tcp:10.9.0.1:10809"]
metrics = "10.9.0.1:9790"
poll    = "busy"

[nodes.beta]
listen  = "10.9.0.2:7790"
admin   = "/run/costandby/beta.sock"
nbd     = ["unix:/run/costandby/beta.nbd"]
rdma_memory = "256MiB"

[volumes.db]
size    = "64GiB"
primary = "alpha"
link    = "tcp"
ack     = "durable"
on_peer_loss = "freeze"
disk.alpha = "/srv/costandby/db.img"
disk.beta  = "memory:"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("c.toml"))
}

/// The example with one text replaced, as one line of complaint.
fn complaint(from: &str, to: &str) -> String {
    assert!(EXAMPLE.contains(from), "{from:?} is not in the example");
    match parse(&EXAMPLE.replacen(from, to, 1)) {
        Ok(_) => panic!("{to:?} for {from:?} was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_designs_example_means_what_it_says() {
    let config = parse(EXAMPLE).expect("the example is good");
    assert!(config.insecure);
    assert_eq!(config.peer_timeout, Duration::from_millis(750));
    let alpha = config.node("alpha").expect("alpha is there");
    assert_eq!(alpha.listen, "10.9.0.1:7790".parse().expect("an address"));
    assert_eq!(alpha.metrics, Some("10.9.0.1:9790".parse().expect("an address")));
    assert_eq!((alpha.poll, alpha.rdma_memory), (PollMode::Busy, None));
    assert_eq!(config.node("beta").expect("beta is there").rdma_memory, Some(256 << 20));
    assert_eq!(
        alpha.nbd,
        [
            Endpoint::Unix("/run/costandby/alpha.nbd".into()),
            Endpoint::Tcp("10.9.0.1:10809".parse().expect("an address"))
        ]
    );
    let db = config.volume("db").expect("db is there");
    assert_eq!((db.size, db.primary.as_str()), (64 << 30, "alpha"));
    assert_eq!((db.link, db.ack, db.on_peer_loss), (LinkKind::Tcp, AckLevel::Durable, OnPeerLoss::Freeze));
    assert_eq!(db.disks["alpha"], Disk::Path("/srv/costandby/db.img".into()));
    assert_eq!(db.disks["beta"], Disk::Memory);
    assert_eq!(db.peer_of("alpha").map(Name::as_str), Some("beta"));
    assert_eq!(db.peer_of("gamma"), None);
    assert_eq!(config.volumes_of("beta").count(), 1);
}

#[test]
fn what_is_not_said_has_the_documented_default() {
    let text = r#"
        nodes.a = { listen = "127.0.0.1:1", admin = "/a" }
        nodes.b = { listen = "127.0.0.1:2", admin = "/b" }
        volumes.v = { size = 8192, primary = "b", disk.a = "/d1", disk.b = "/d2" }
    "#;
    let config = parse(text).expect("good");
    assert!(!config.insecure);
    assert_eq!(config.peer_timeout, Duration::from_millis(500));
    let node = config.node("a").expect("there");
    assert_eq!((node.poll, node.nbd.len(), node.metrics), (PollMode::Adaptive, 0, None));
    assert_eq!(node.rdma_memory, None);
    let volume = config.volume("v").expect("there");
    assert_eq!(volume.size, 8192);
    assert_eq!(
        (volume.link, volume.ack, volume.on_peer_loss),
        (LinkKind::Auto, AckLevel::Memory, OnPeerLoss::Continue)
    );
}

/// (replace, by, what the complaint must contain)
const MISTAKES: &[(&str, &str, &[&str])] = &[
    ("poll    =", "pol =", &["c.toml:9: unknown key \"pol\" in [nodes.alpha]", "did you mean \"poll\"?"]),
    ("peer_timeout", "peer_timeot", &["c.toml:2:", "did you mean \"peer_timeout\"?"]),
    (
        "on_peer_loss",
        "zzzzzzzz",
        &["c.toml:22:", "there are size, primary, link, ack, on_peer_loss, checksum_first, disk"],
    ),
    (
        "insecure = true",
        "insecure = 1",
        &["c.toml:1:", "insecure at the top of the file is an integer", "true or false"],
    ),
    ("\"750ms\"", "750", &["c.toml:2:", "is an integer", "500ms"]),
    ("\"750ms\"", "\"750\"", &["c.toml:2:", "us, ms, s, m, h"]),
    ("\"750ms\"", "\"1ms\"", &["between 50ms and 300s"]),
    ("listen  = \"10.9.0.1:7790\"", "", &["c.toml:4:", "[nodes.alpha] has no listen", "add listen ="]),
    ("admin   = \"/run/costandby/beta.sock\"", "", &["c.toml:11:", "[nodes.beta] has no admin"]),
    ("10.9.0.1:7790", "alpha:7790", &["c.toml:5:", "IP address and a port"]),
    ("10.9.0.1:7790", "10.9.0.1:0", &["port 0"]),
    ("10.9.0.1:7790", "10.9.0.1:99999", &["c.toml:5:", "from 1 to 65535"]),
    ("10.9.0.1:7790", "0.0.0.0:7790", &["the peer connects to this address"]),
    ("10.9.0.2:7790", "10.9.0.1:7790", &["c.toml:12:", "used by listen of [nodes.alpha] and by listen of"]),
    ("10.9.0.1:9790", "10.9.0.1:10809", &["c.toml:8:", "nbd of [nodes.alpha]", "metrics of [nodes.alpha]"]),
    ("beta.sock", "alpha.sock", &["c.toml:13:", "admin of [nodes.alpha] and by admin of [nodes.beta]"]),
    ("/alpha.nbd", "/./alpha.sock", &["c.toml:7:", "admin of [nodes.alpha] and by nbd of [nodes.alpha]"]),
    ("\"/run/costandby/alpha.sock\"", "\"alpha.sock\"", &["c.toml:6:", "whole path"]),
    ("/run/costandby/beta.nbd", "/run/", &["c.toml:14:", "not a directory"]),
    ("unix:/run/costandby/beta.nbd", "/run/beta.nbd", &["c.toml:14:", "unix:/run"]),
    ("[\"unix:/run/costandby/beta.nbd\"]", "\"unix:/b\"", &["c.toml:14:", "is a string", "a list such as"]),
    ("\"busy\"", "\"bussy\"", &["c.toml:9:", "did you mean \"busy\"?"]),
    ("\"busy\"", "\"quick\"", &["is \"quick\": there are \"busy\" (keeps a core to itself), \"adaptive\" ("]),
    (
        "rdma_memory",
        "rdma_memry",
        &["c.toml:15: unknown key", "[nodes.beta]", "did you mean \"rdma_memory\"?"],
    ),
    ("\"256MiB\"", "\"256M\"", &["c.toml:15:", "256MiB", "256MB"]),
    ("\"256MiB\"", "[]", &["c.toml:15:", "rdma_memory of [nodes.beta] is an array", "such as \"256MiB\""]),
    (
        "\"256MiB\"",
        "4096",
        &["c.toml:15:", "0, to copy everything that is sent, or between 1 MiB and 64 TiB"],
    ),
    ("\"256MiB\"", "\"256PiB\"", &["c.toml:15:", "between 1 MiB and 64 TiB"]),
    (
        "\"durable\"",
        "\"sync\"",
        &["c.toml:21:", "is \"sync\": there are \"async\" (a write is answered when"],
    ),
    ("\"durable\"", "\"durble\"", &["did you mean \"durable\"? there are"]),
    ("\"durable\"", "\"C\"", &["\"durable\" (when it is on stable storage on both nodes, as with C)"]),
    ("\"64GiB\"", "\"64G\"", &["c.toml:18:", "64GiB", "64GB"]),
    ("\"64GiB\"", "\"lots\"", &["c.toml:18:", "\"64GiB\""]),
    ("\"64GiB\"", "4097", &["c.toml:18:", "a multiple of 512"]),
    ("\"64GiB\"", "512", &["from 4096 to"]),
    ("\"64GiB\"", "-4096", &["c.toml:18:", "not a size"]),
    ("\"64GiB\"", "64.5", &["is a float"]),
    ("\"64GiB\"", "\"16EiB\"", &["too large"]),
    ("\"64GiB\"", "\"8EiB\"", &["a multiple of 512 from"]),
    ("primary = \"alpha\"", "primary = \"alpa\"", &["c.toml:19:", "did you mean \"alpha\"?"]),
    ("primary = \"alpha\"", "", &["[volumes.db] has no primary", "\"alpha\" or \"beta\""]),
    ("disk.beta ", "disk.gamma ", &["c.toml:24:", "names node \"gamma\"", "there are alpha, beta"]),
    (
        "disk.alpha = \"/srv/costandby/db.img\"",
        "disk.alpha = \"memory:\"",
        &["c.toml:23:", "both disks of [volumes.db] are in memory", "give at least one node a file"],
    ),
    ("[nodes.alpha]", "[nodes.a.example.com]", &["c.toml:4:", "in quotes, as in [nodes.\"a.example.com\"]"]),
    ("[volumes.db]", "[volumes.db.v2]", &["c.toml:17:", "[volumes.db.v2]:", "in [volumes.\"db.v2\"]"]),
    ("disk.beta ", "disk.beta.lan ", &["c.toml:24:", "in quotes, as in \"beta.lan\""]),
    ("disk.beta  = \"memory:\"", "", &["has 1 disks", "exactly two"]),
    ("memory:", "memory:4GiB", &["c.toml:24:", "just \"memory:\""]),
    ("memory:", "db.img", &["c.toml:24:", "whole path"]),
    ("[volumes.db]", "[volumes.\"a/b\"]", &["c.toml:17:", "\"a/b\" is no name for a volume", "letters"]),
    ("[volumes.db]", "[volumes.\".db\"]", &["begin with a letter or a digit"]),
    ("[volumes.db]", "[volumes.\"\"]", &["it is empty"]),
    ("[volumes.db]", "[volumes]", &["is a string", "[volumes.db]"]),
    ("poll    = \"busy\"", "poll = ", &["c.toml:9: not valid TOML"]),
    ("poll    = \"busy\"", "admin = \"/x\"", &["c.toml:9: not valid TOML", "duplicate"]),
    ("insecure = true", "", &["c.toml:5:", "listen of [nodes.alpha] is 10.9.0.1:7790", "`insecure = true`"]),
];

#[test]
fn each_mistake_gets_its_place_and_its_remedy() {
    for (from, to, wanted) in MISTAKES {
        let complaint = complaint(from, to);
        for part in *wanted {
            assert!(complaint.contains(part), "{to:?} for {from:?}: {part:?} is not in: {complaint}");
        }
        assert_eq!(complaint.lines().count(), 1, "more than a line: {complaint}");
    }
}

/// (replace, by): what was written means the opposite of the known word that is nearest, or something else.
const NO_SUGGESTIONS: &[(&str, &str)] = &[
    ("\"durable\"", "\"sync\""),
    ("\"freeze\"", "\"unfreeze\""),
    ("\"freeze\"", "\"discontinue\""),
    ("\"tcp\"", "\"udp\""),
    ("\"tcp\"", "\"roce\""),
    ("\"busy\"", "\"lazy\""),
    ("insecure = true", "secure = true"),
];

#[test]
fn no_word_is_suggested_that_means_the_opposite() {
    for (from, to) in NO_SUGGESTIONS {
        let complaint = complaint(from, to);
        assert!(!complaint.contains("did you mean"), "{complaint}");
        assert!(complaint.contains("there are "), "{complaint}");
    }
}

#[test]
fn names_with_dots_are_good_in_quotes() {
    let text = EXAMPLE
        .replace("[nodes.alpha]", "[nodes.\"a.example.com\"]")
        .replace("\"alpha\"", "\"a.example.com\"")
        .replace("disk.alpha", "disk.\"a.example.com\"");
    let config = parse(&text).expect("good");
    assert_eq!(config.volume("db").expect("there").primary.as_str(), "a.example.com");
    assert_eq!(config.command_line("beta"), "costandby --config c.toml --node beta");
}

#[test]
fn a_long_list_of_names_is_cut() {
    let names: Vec<_> = (0..300).map(|number| format!("volume{number:03}")).collect();
    let hint = nearest("archive", names.iter().map(String::as_str));
    assert!(hint.ends_with("volume019 and 280 more"), "{hint}");
}

#[test]
fn registering_nothing_can_be_asked_for() {
    for (text, bytes) in [("0", 0), ("\"0\"", 0), ("1048576", 1 << 20), ("\"64TiB\"", 64 << 40)] {
        let config = parse(&EXAMPLE.replace("\"256MiB\"", text)).expect(text);
        assert_eq!(config.node("beta").expect("there").rdma_memory, Some(bytes), "{text}");
    }
}

#[test]
fn nbd_beyond_loopback_needs_insecure_too() {
    let text = EXAMPLE
        .replace("insecure = true\n", "")
        .replace("listen  = \"10.9.0.1", "listen  = \"127.0.0.1")
        .replace("listen  = \"10.9.0.2", "listen  = \"127.0.0.2");
    let error = parse(&text).expect_err("nbd listens to the world").to_string();
    assert!(error.contains("nbd of [nodes.alpha]") && error.contains("insecure"), "{error}");
    parse(&text.replace(", \"tcp:10.9.0.1:10809\"", "")).expect("nothing else is reachable");
}

#[test]
fn with_a_key_no_word_is_needed_to_listen_and_without_one_no_daemon_starts() {
    let keyed = EXAMPLE.replace("insecure = true", "key = \"/etc/costandby/../costandby/pair.key\"");
    let config = parse(&keyed).expect("listens beyond loopback");
    assert_eq!(config.key, Some("/etc/costandby/pair.key".into()));
    assert!(!config.insecure);
    config.check_supported("alpha").expect("it has a key");
    let config = parse(EXAMPLE).expect("good");
    assert_eq!(config.key, None);
    config.check_supported("alpha").expect("insecure is wanted");
    let local = EXAMPLE.replace("insecure = true\n", "").replace("10.9.0.", "127.0.0.");
    let error = parse(&local).expect("good").check_supported("alpha").expect_err("no key").to_string();
    for word in ["costandby keygen", "insecure = true", "key = "] {
        assert!(error.contains(word), "{error}");
    }
    for (value, word) in
        [("\"pair.key\"", "whole path"), ("true", "is a boolean"), ("\"/etc/\"", "not a directory")]
    {
        let error = parse(&EXAMPLE.replace("insecure = true", &format!("key = {value}")))
            .expect_err(value)
            .to_string();
        assert!(error.contains("c.toml:1: key at the top of the file") && error.contains(word), "{error}");
    }
}

#[test]
fn a_disk_has_one_user_on_a_machine() {
    let second = "[volumes.web]\nsize = \"1GiB\"\nprimary = \"alpha\"\n";
    let same =
        format!("{EXAMPLE}{second}disk.alpha = \"/srv/x/../costandby/db.img\"\ndisk.beta = \"/srv/o\"\n");
    let error = parse(&same).expect_err("db and web share a disk").to_string();
    assert!(error.contains("volume db on node alpha and by volume web on node alpha"), "{error}");
    assert!(error.starts_with("c.toml:28:"), "{error}");

    let meta =
        format!("{EXAMPLE}{second}disk.alpha = \"/srv/costandby/db.img.meta\"\ndisk.beta = \"/srv/o\"\n");
    let error = parse(&meta).expect_err("web is db's metadata").to_string();
    assert!(error.contains("metadata of volume db on node alpha"), "{error}");

    // The same path on two machines is two disks, on one machine (all of loopback is one) it is one.
    let both = EXAMPLE.replace("memory:", "/srv/costandby/db.img");
    parse(&both).expect("two machines");
    let local = both.replace("10.9.0.1", "127.0.0.1").replace("10.9.0.2", "127.0.0.2");
    let error = parse(&local).expect_err("one machine").to_string();
    assert!(error.contains("volume db on node alpha and by volume db on node beta"), "{error}");
}

#[test]
fn a_third_node_may_be_there_but_not_in_the_same_volume() {
    let third = "[nodes.gamma]\nlisten = \"10.9.0.3:7790\"\nadmin = \"/run/g.sock\"\n";
    let config = parse(&format!("{EXAMPLE}{third}")).expect("a cluster of three");
    assert_eq!(config.volumes_of("gamma").count(), 0);
    let with_disk = format!("{EXAMPLE}disk.gamma = \"/srv/g\"\n{third}");
    let error = parse(&with_disk).expect_err("three disks").to_string();
    assert!(error.contains("has 3 disks"), "{error}");
    let elsewhere = format!("{EXAMPLE}{third}").replace("primary = \"alpha\"", "primary = \"gamma\"");
    let error = parse(&elsewhere).expect_err("no disk on gamma").to_string();
    assert!(error.contains("its disks are on alpha and beta"), "{error}");
}

#[test]
fn rdma_alone_is_refused_by_a_build_without_it() {
    let config = parse(&EXAMPLE.replace("\"tcp\"", "\"rdma\"")).expect("well-formed");
    let checked = config.check_supported("alpha").map_err(|error| error.to_string());
    if cfg!(feature = "rdma") {
        checked.expect("built in");
    } else {
        let error = checked.expect_err("not built in");
        assert!(error.contains("volume db") && error.contains("use \"auto\""), "{error}");
    }
    parse(EXAMPLE).expect("good").check_supported("alpha").expect("tcp is built in");
}

#[test]
fn files_that_cannot_be_read_say_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("nix.toml");
    let error = Config::load(&missing).expect_err("not there").to_string();
    assert!(error.contains("nix.toml") && error.contains("--config"), "{error}");
    let binary = directory.path().join("binary");
    std::fs::write(&binary, [0xff, 0xfe, 0]).expect("written");
    assert!(Config::load(&binary).expect_err("no text").to_string().contains("cannot be read"));
    let huge = directory.path().join("huge");
    std::fs::File::create(&huge).and_then(|file| file.set_len(CONFIG_LEN_MAX + 1)).expect("written");
    assert!(Config::load(&huge).expect_err("too long").to_string().contains("is this the right file?"));
    let good = directory.path().join("good");
    std::fs::write(&good, EXAMPLE).expect("written");
    assert_eq!(Config::load(&good).expect("good").volumes.len(), 1);
}

#[test]
fn sizes_and_durations_are_exact() {
    let sizes = [("0", 0), ("4096", 4096), ("1 KiB", 1024), ("2mib", 2 << 20), ("10GB", 10_000_000_000)];
    for (text, bytes) in sizes {
        assert_eq!(parse_size(text), Ok(bytes), "{text}");
    }
    assert!(matches!(parse_size("1.5GiB"), Err(QuantityError::Number { .. })));
    assert!(matches!(parse_size("99999999999999999999"), Err(QuantityError::Overflow { .. })));
    assert!(matches!(parse_size("7t"), Err(QuantityError::Ambiguous { letter: 'T', .. })));
    assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
    assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
    assert!(matches!(parse_duration("30"), Err(QuantityError::Unit { .. })));
    let shown = [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1 KiB"),
        (64 << 30, "64 GiB"),
        ((1 << 30) - 1, "1023.9 MiB"),
        (1536, "1.5 KiB"),
        (u64::MAX, "15.9 EiB"),
    ];
    for (bytes, text) in shown {
        assert_eq!(display_size(bytes), text);
    }
}

/// A TOML value of any kind, right or wrong where it will stand.
fn value() -> impl Strategy<Value = String> {
    const ODD: &[&str] = &[
        "1",
        "-1",
        "0x10",
        "1.5",
        "inf",
        "true",
        "2026-11-22",
        "[]",
        "[1]",
        "[\"unix:/a\", 2]",
        "{}",
        "{ a = 1 }",
        "\"\"",
        "\"unix:\"",
        "\"tcp:\"",
        "\"/\"",
        "\"//..\"",
        "\"\\u0000\"",
        "\"[::1]:1\"",
        "\"memory:\"",
        "99999999999999999999",
    ];
    prop_oneof![
        proptest::sample::select(ODD).prop_map(str::to_owned),
        any::<String>().prop_map(|text| format!("{text:?}")),
    ]
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>()) {
        let _ = parse(&text);
        let _ = parse_size(&text);
        let _ = parse_duration(&text);
        let _ = Name::new(&text);
    }

    /// Damage to a good file gets further into the checks than noise does.
    #[test]
    fn no_damage_panics(at in 0..EXAMPLE.len(), len in 0..12_usize, patch in "[ -~\n]{0,6}") {
        let end = (at + len).min(EXAMPLE.len());
        let text = format!("{}{patch}{}", &EXAMPLE[..at], &EXAMPLE[end..]);
        if let Err(error) = parse(&text) {
            prop_assert_eq!(error.to_string().lines().count(), 1);
        }
    }

    /// Every value of the good file in turn becomes one of another kind.
    #[test]
    fn no_value_panics(line in 0..EXAMPLE.lines().count(), value in value()) {
        let damaged = EXAMPLE.lines().enumerate().map(|(at, text)| match text.split_once('=') {
            Some((key, _)) if at == line => format!("{key}= {value}"),
            _ => text.to_owned(),
        });
        let text = damaged.collect::<Vec<_>>().join("\n");
        if let Err(error) = parse(&text) {
            prop_assert_eq!(error.to_string().lines().count(), 1);
        }
    }

    #[test]
    fn no_quantity_panics(text in "[0-9]{0,21} ?(EiB|PB|kB|h|m|us|[a-zA-Z]{0,3})") {
        let _ = parse_size(&text);
        let _ = parse_duration(&text);
    }

    #[test]
    fn any_size_shown_reads_as_no_more(bytes in any::<u64>()) {
        let shown = display_size(bytes);
        if let Ok(read) = parse_size(&shown) {
            prop_assert_eq!(read, bytes);
        } else {
            prop_assert!(shown.contains('.'), "{}", shown);
        }
    }
}
