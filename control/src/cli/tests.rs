//! Tests of the command line: what parses, what each subcommand prints and makes, and its exit status.

use super::*;
use crate::admin::{
    AdminBackend, AdminServer, Answer, Asked, CONNECTED, Command as Wish, CommandError, NotListening,
    SYNC_SOURCE, Status, UP_TO_DATE, VolumeStatus,
};
use costandby_datapath::disk::metadata::inspect::inspect;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::superblock::{Location, Superblock};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([&["costandby"], args].concat())
}

#[test]
fn the_fixed_command_lines_parse() {
    Cli::command().debug_assert();
    let cli = parse(&["-c", "/x", "--node", "beta", "promote", "db", "--force"]).expect("good");
    assert_eq!((cli.config.to_str(), cli.node.as_deref()), (Some("/x"), Some("beta")));
    assert!(matches!(cli.command, Command::Promote { volume, force: true } if volume.as_str() == "db"));
    let cli = parse(&["wait-sync", "db", "--timeout", "30s", "--config", "/y"]).expect("globals go anywhere");
    assert_eq!(cli.config, Path::new("/y"));
    assert!(
        matches!(cli.command, Command::WaitSync { timeout: Some(t), .. } if t == Duration::from_secs(30))
    );
    let cli = parse(&["create", "db", "web", "--sparse"]).expect("good");
    assert!(
        matches!(cli.command, Command::Create(args) if args.volumes.len() == 2 && args.sparse && !args.force)
    );
    let cli = parse(&["demo", "--seconds", "3", "--link", "tcp", "--json"]).expect("good");
    assert!(
        matches!(cli.command, Command::Demo(args) if args.seconds == 3 && args.link == LinkArg::Tcp && args.json)
    );
    for args in [
        &["up"][..],
        &["status", "--json"],
        &["demote", "db"],
        &["connect", "db"],
        &["disconnect", "db"],
        &["wait-sync", "db"],
        &["doctor"],
        &["soft-roce", "up", "eth0"],
        &["soft-roce", "down", "eth0"],
        &["completions", "bash"],
    ] {
        parse(args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
    }
}

#[test]
fn wrong_usage_is_told_from_help() {
    for args in [
        &["promote"][..],
        &["promote", "a/b"],
        &["verify"],
        &["verify", "db", "--repair", "--stop"],
        &["wait-sync", "db", "--timeout", "30"],
        &["demo", "--seconds", "0"],
        &["soft-roce", "up"],
        &["soft-roce", "eth0"],
        &["explode"],
        &["status", "--yaml"],
    ] {
        let error = parse(args).expect_err("wrong");
        assert!(error.use_stderr(), "{args:?} would exit 0");
    }
    let help = parse(&["--help"]).expect_err("help");
    assert!(!help.use_stderr());
    for later in ["attach", "events", "top"] {
        assert!(parse(&[later, "db"]).is_err(), "{later} is not there yet");
    }
}

#[test]
fn no_subcommand_is_suggested_that_means_the_opposite() {
    let said = |word: &str| without_opposite(parse(&[word, "db"]).expect_err("no subcommand")).to_string();
    for word in ["validate", "reconnect", "undemote"] {
        assert!(!said(word).contains("similar"), "{}", said(word));
    }
    assert!(said("promte").contains("'promote'"), "{}", said("promte"));
}

#[test]
fn every_subcommand_shows_an_example() {
    for subcommand in Cli::command().get_subcommands() {
        let help = subcommand.get_after_help().map(ToString::to_string).unwrap_or_default();
        let name = subcommand.get_name();
        assert!(help.contains("Example") && help.contains(name), "{name}: {help:?}");
    }
}

#[test]
fn colours_mark_and_one_line_is_one() {
    assert_eq!(Colour::Bad.paint("x", false), "x");
    assert_eq!(Colour::Bad.paint("x", true), "\x1b[31mx\x1b[0m");
    assert!(!colours_wanted(false));
    assert_eq!(one_line("a\n  b\n\nc"), "a; b; c");
}

fn db() -> VolumeStatus {
    VolumeStatus {
        name: "db".into(),
        role: "primary".into(),
        disk_state: UP_TO_DATE.into(),
        peer_state: UP_TO_DATE.into(),
        link: "tcp".into(),
        verify: None,
        link_note: None,
        ack: "memory".into(),
        epoch: 3,
        generation: "f00dfacecafebeef".into(),
        size: 64 << 30,
        dirty_bytes: 0,
        resync_percent: 100.0,
        resync_rate: None,
        resync_eta_s: None,
        connection: CONNECTED.into(),
        peer: "beta".into(),
        parted: false,
        advice: None,
        warnings: Vec::new(),
        in_flight: 0,
        frozen: false,
        violations: 0,
    }
}

fn catching_up() -> VolumeStatus {
    VolumeStatus {
        name: "archive".into(),
        peer_state: "Inconsistent".into(),
        dirty_bytes: 3 << 29,
        resync_percent: 97.69,
        resync_rate: Some(120 << 20),
        resync_eta_s: Some(13),
        connection: SYNC_SOURCE.into(),
        advice: Some("give it time".into()),
        verify: None,
        link_note: Some("alpha has no RDMA: no device".into()),
        ack: "durable".into(),
        violations: 2,
        ..db()
    }
}

fn alone() -> VolumeStatus {
    VolumeStatus {
        name: "web".into(),
        role: "standby".into(),
        peer_state: "Unknown".into(),
        connection: "connecting".into(),
        advice: Some("waiting for beta".into()),
        frozen: true,
        ..db()
    }
}

#[test]
fn status_is_a_table_read_at_a_glance() {
    let status = Status {
        node: "alpha".into(),
        volumes: vec![catching_up(), db(), alone()],
        log_lines_dropped: 0,
        log_dropping: false,
        not_listening: vec![],
    };
    let expected = "\
node alpha
VOLUME   ROLE              DISK      PEER               LINK             ACK      EPOCH  SIZE    BEHIND
archive  primary           UpToDate  beta Inconsistent  tcp sync-source  durable  3      64 GiB  1.5 GiB
  copy to beta [=============================>] 97.6%, 120 MiB/s, 13 s left
  protocol: links closed because of what beta sent: 2; the log says what
  -> give it time
db       primary           UpToDate  beta UpToDate      tcp connected    memory   3      64 GiB  -
web      standby (frozen)  UpToDate  beta Unknown       tcp connecting   memory   3      64 GiB  -
  -> waiting for beta
link of archive: no RDMA on alpha (no device); see `costandby doctor`
";
    assert_eq!(status::render_within(&status, false, 120), expected);
    let coloured = status::render_within(&status, true, 120);
    let mut plain = coloured.clone();
    for code in ["\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"] {
        assert!(coloured.contains(code), "no {code:?}");
        plain = plain.replace(code, "");
    }
    assert_eq!(plain, expected, "colours must not move a column");
}

#[test]
fn the_table_fits_80_columns_in_any_state() {
    let table = |volumes: Vec<VolumeStatus>| {
        let text = status::render(
            &Status {
                node: "alpha".into(),
                volumes,
                log_lines_dropped: 0,
                log_dropping: false,
                not_listening: vec![],
            },
            false,
        );
        let lines: Vec<_> = text.lines().skip(1).map(str::to_owned).collect();
        let rows = lines.into_iter().filter(|line| !line.starts_with("  ") && !line.starts_with("link"));
        rows.collect::<Vec<_>>()
    };
    let rows = table(vec![db()]);
    assert_eq!(
        rows,
        [
            "VOLUME  ROLE     DISK      PEER           LINK           ACK     SIZE    BEHIND",
            "db      primary  UpToDate  beta UpToDate  tcp connected  memory  64 GiB  -",
        ]
    );
    let catching_up = VolumeStatus { dirty_bytes: 1023 << 20, ..catching_up() };
    let target = VolumeStatus {
        disk_state: "Inconsistent".into(),
        connection: "sync-target".into(),
        peer_state: UP_TO_DATE.into(),
        ..catching_up.clone()
    };
    let frozen = VolumeStatus { role: "primary".into(), ..alone() };
    for volumes in [vec![catching_up.clone(), db()], vec![db(), target], vec![db(), frozen], vec![alone()]] {
        for row in table(volumes) {
            assert!(row.chars().count() <= 80, "{} columns: {row}", row.chars().count());
            assert!(
                row.contains("BEHIND") || !row.ends_with("GiB"),
                "what is behind is never given up: {row}"
            );
        }
    }
}

#[test]
fn a_long_name_gives_way_in_its_middle() {
    let name = format!("{}tail", "a".repeat(60));
    let long = VolumeStatus { name: name.clone(), ..db() };
    let status = Status {
        node: "alpha".into(),
        volumes: vec![long, db()],
        log_lines_dropped: 0,
        log_dropping: false,
        not_listening: vec![],
    };
    let text = status::render(&status, false);
    let row = text.lines().nth(2).expect("a row");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(row.starts_with("aaaa") && row.contains("…") && row.contains("tail  "), "{row}");
    let wide = status::render_within(&status, false, 200);
    assert!(wide.contains(&name) && wide.contains("ACK"), "{wide}");
}

#[test]
fn lost_lines_of_the_log_are_a_question_only_while_more_are_lost() {
    let text = |log_dropping| {
        let node = "alpha".into();
        let status =
            Status { node, volumes: vec![db()], log_lines_dropped: 3, log_dropping, not_listening: vec![] };
        status::render(&status, false)
    };
    assert!(text(false).contains("dropped since the start: 3\n"), "{}", text(false));
    assert!(text(true).contains("since the start: 3, and more are being dropped; is its"), "{}", text(true));
}

#[test]
fn what_the_peer_lacks_is_counted_or_not_known() {
    let behind = |volume: VolumeStatus| {
        let text = status::render(
            &Status {
                node: "alpha".into(),
                volumes: vec![volume],
                log_lines_dropped: 0,
                log_dropping: false,
                not_listening: vec![],
            },
            false,
        );
        text.lines().nth(2).and_then(|row| row.rsplit("  ").next()).map(str::to_owned)
    };
    assert_eq!(behind(db()).as_deref(), Some("-"));
    let failed = VolumeStatus { disk_state: "Failed".into(), resync_percent: 0.0, ..db() };
    assert_eq!(behind(failed).as_deref(), Some("unknown"));
    let ahead = VolumeStatus { dirty_bytes: 65536, resync_percent: 99.99, ..db() };
    assert_eq!(behind(ahead).as_deref(), Some("64 KiB"));
}

#[test]
fn want_of_rdma_is_one_short_line_and_a_failed_attempt_a_whole_one() {
    let none = "no RDMA device; on any network card a software one will do: costandby soft-roce up NETDEV (that is: \
                modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NETDEV)";
    let note = format!("alpha has no RDMA: {none}; beta has no RDMA: {none}");
    let volume = |name: &str| VolumeStatus { name: name.into(), link_note: Some(note.clone()), ..db() };
    let render = |volumes| {
        status::render(
            &Status {
                node: "alpha".into(),
                volumes,
                log_lines_dropped: 0,
                log_dropping: false,
                not_listening: vec![],
            },
            false,
        )
    };
    let text = render(vec![volume("db"), volume("web")]);
    let lines: Vec<_> = text.lines().skip(4).collect();
    assert_eq!(lines, ["link: no RDMA on alpha and beta (no RDMA device); see `costandby doctor`"]);
    let late = "alpha could not connect by RDMA: time is up while waiting for the peer to accept";
    let text = render(vec![VolumeStatus { link_note: Some(late.into()), ..db() }]);
    assert_eq!(text.lines().nth(3), Some(format!("  link tcp: {late}").as_str()));
    let only = VolumeStatus { link: "rdma".into(), connection: "connecting".into(), ..volume("db") };
    assert!(
        render(vec![only]).contains("modprobe rdma_rxe"),
        "where nothing else will do, what to do is said"
    );
}

#[test]
fn status_shows_addresses_that_are_not_bound() {
    let refused = NotListening { address: "tcp:10.9.0.1:10809".into(), reason: "taken".into() };
    let status = Status {
        node: "alpha".into(),
        volumes: vec![db()],
        not_listening: vec![refused],
        log_lines_dropped: 0,
        log_dropping: false,
    };
    let lines = status::render(&status, false);
    let lines: Vec<_> = lines.lines().collect();
    assert_eq!(lines[1], "  not listening on tcp:10.9.0.1:10809: taken");
}

#[test]
fn status_without_volumes_says_so() {
    let text = status::render(
        &Status {
            node: "alpha".into(),
            volumes: vec![],
            log_lines_dropped: 0,
            log_dropping: false,
            not_listening: vec![],
        },
        true,
    );
    assert_eq!(text, "node alpha: no volumes here; the configuration gives it no disk\n");
}

#[test]
fn status_json_has_the_fixed_keys() {
    let value = serde_json::to_value(Status {
        node: "alpha".into(),
        volumes: vec![db()],
        log_lines_dropped: 0,
        log_dropping: false,
        not_listening: vec![],
    })
    .expect("serializes");
    assert_eq!(value["node"], "alpha");
    let volume = value["volumes"][0].as_object().expect("an object");
    for key in [
        "name",
        "role",
        "disk_state",
        "peer_state",
        "link",
        "ack",
        "epoch",
        "generation",
        "size",
        "dirty_bytes",
        "resync_percent",
        "connection",
        "peer",
        "parted",
        "advice",
        "in_flight",
        "frozen",
        "link_note",
        "verify",
        "violations",
        "resync_rate",
        "resync_eta_s",
        "warnings",
    ] {
        assert!(volume.contains_key(key), "{key}");
    }
    assert_eq!(volume.len(), 23, "a new key belongs in the list above");
}

/// A configuration of nodes alpha and beta in a directory of its own.
struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path().display();
        let text = format!(
            r#"
            nodes.alpha = {{ listen = "127.0.0.1:7790", admin = "{at}/alpha.sock" }}
            nodes.beta = {{ listen = "127.0.0.1:7791", admin = "{at}/beta.sock" }}
            nodes.gamma = {{ listen = "127.0.0.1:7792", admin = "{at}/gamma.sock" }}
            volumes.db = {{ size = {size}, primary = "alpha", disk.alpha = "{at}/a.img", disk.beta = "{at}/b/b.img" }}
            volumes.scratch = {{ size = 4096, primary = "alpha", disk.alpha = "memory:", disk.gamma = "{at}/g.img" }}
            "#
        );
        std::fs::write(directory.path().join("c.toml"), text).expect("written");
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn run(&self, node: &str, args: &[&str]) -> Result<(), CliError> {
        let file = self.path("c.toml");
        let file = file.to_str().expect("a text path");
        run(parse(&[&["--config", file, "--node", node], args].concat()).expect("parses"))
    }

    fn complaint(&self, node: &str, args: &[&str]) -> String {
        self.run(node, args).expect_err("must fail").to_string()
    }

    fn superblock(&self) -> Superblock {
        let location = Location::beside(&self.path("a.img"));
        let (medium, _) = FileMedium::look(&location.path).expect("metadata");
        let found = inspect(&medium, 0, 0).expect("readable");
        assert!(matches!(found.area, Some(Ok(_))), "of format 2");
        found.newest.expect("good").1
    }
}

#[test]
fn create_makes_a_reserved_disk_and_its_metadata() {
    let bench = Bench::new("1048576");
    bench.run("alpha", &["create"]).expect("made");
    let metadata = std::fs::metadata(bench.path("a.img")).expect("there");
    use std::os::unix::fs::MetadataExt;
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (1 << 20, 0o600));
    assert!(metadata.blocks() * 512 >= 1 << 20, "space is not reserved");
    assert_eq!(std::fs::metadata(bench.path("a.img.meta")).expect("there").mode() & 0o777, 0o600);
    let superblock = bench.superblock();
    assert_eq!((superblock.volume.as_str(), superblock.node.as_str()), ("db", "alpha"));
    assert_eq!((superblock.size, superblock.zeroed, superblock.is_fresh()), (1 << 20, true, true));
}

#[test]
fn create_sparse_reserves_nothing() {
    let bench = Bench::new("\"64GiB\"");
    bench.run("alpha", &["create", "db", "--sparse"]).expect("made");
    let metadata = std::fs::metadata(bench.path("a.img")).expect("there");
    use std::os::unix::fs::MetadataExt;
    assert_eq!((metadata.len(), metadata.blocks()), (64 << 30, 0));
    assert!(bench.superblock().zeroed);
}

#[test]
fn create_touches_nothing_that_is_there() {
    let bench = Bench::new("1048576");
    std::fs::write(bench.path("a.img"), "precious").expect("written");
    let complaint = bench.complaint("alpha", &["create", "db"]);
    let expected = "a.img is already there, without metadata and with a first MiB that is not blank (at byte 0); --force";
    assert!(complaint.contains(expected), "{complaint}");
    assert!(complaint.contains("a peer's disk that has the volume's data overwrites it"), "{complaint}");
    assert_eq!(std::fs::read(bench.path("a.img")).expect("there"), b"precious");
    assert!(!bench.path("a.img.meta").exists());

    bench.run("alpha", &["create", "db", "--force"]).expect("taken over");
    let content = std::fs::read(bench.path("a.img")).expect("there");
    assert_eq!((content.len(), &content[..8]), (1 << 20, &b"precious"[..]));
    assert!(!bench.superblock().zeroed, "a disk with content must be copied whole");
    let complaint = bench.complaint("alpha", &["create", "db"]);
    assert!(complaint.contains("already there, with its metadata"), "{complaint}");
    assert!(complaint.contains("it never held data of this pair"), "{complaint}");
}

#[test]
fn create_refuses_a_disk_in_use_metadata_without_disk_and_a_longer_file() {
    let bench = Bench::new("1048576");
    bench.run("alpha", &["create", "db"]).expect("made");
    let daemon = FileMedium::open(&Location::beside(&bench.path("a.img")).path).expect("opened");
    assert!(bench.complaint("alpha", &["create", "db", "--force"]).contains("in use"));
    drop(daemon);

    std::fs::remove_file(bench.path("a.img")).expect("removed");
    let complaint = bench.complaint("alpha", &["create", "db"]);
    assert!(complaint.contains("a.img.meta is already there, metadata without its disk"), "{complaint}");
    assert!(complaint.contains("mount the disk's file system"), "{complaint}");

    std::fs::write(bench.path("a.img"), vec![1; (1 << 20) + 1]).expect("written");
    assert!(bench.complaint("alpha", &["create", "db", "--force"]).contains("more than the volume's"));
    assert_eq!(std::fs::metadata(bench.path("a.img")).expect("there").len(), (1 << 20) + 1);
}

#[test]
fn create_leaves_a_file_that_another_program_or_volume_has() {
    let bench = Bench::new("1048576");
    bench.run("alpha", &["create", "db"]).expect("made");
    let open = || File::options().read(true).write(true).open(bench.path("a.img")).expect("opens");
    let locked = open();
    costandby_datapath::disk::image::lock(&locked, &bench.path("a.img")).expect("nobody else has it");
    let complaint = bench.complaint("alpha", &["create", "db", "--force"]);
    assert!(complaint.contains("a.img is in use"), "{complaint}");
    drop(locked);
    bench.run("alpha", &["create", "db", "--force"]).expect("made anew");

    let text = std::fs::read_to_string(bench.path("c.toml")).expect("there");
    let text = text.replace("\"memory:\"", &format!("{:?}", bench.path("link.img").to_str().expect("text")));
    std::fs::write(bench.path("c.toml"), text).expect("written");
    for link in [std::os::unix::fs::symlink as fn(PathBuf, PathBuf) -> _, std::fs::hard_link] {
        link(bench.path("a.img"), bench.path("link.img")).expect("linked");
        let complaint = bench.complaint("alpha", &["create", "scratch", "--force"]);
        assert!(complaint.contains("is the disk of volume db as well"), "{complaint}");
        std::fs::remove_file(bench.path("link.img")).expect("removed");
    }
}

#[test]
fn create_says_what_is_missing() {
    let bench = Bench::new("\"1PiB\"");
    let complaint = bench.complaint("alpha", &["create"]);
    assert!(complaint.contains("no space for") && complaint.contains("1 PiB wanted"), "{complaint}");
    assert!(!bench.path("a.img").exists() && !bench.path("a.img.meta").exists());
    let complaint = bench.complaint("beta", &["create"]);
    assert!(complaint.contains("/b: make it, or mount"), "{complaint}");
    let complaint = bench.complaint("gamma", &["create", "db"]);
    assert!(complaint.contains("no disk on node gamma: its disks are on alpha and beta"), "{complaint}");
    let complaint = bench.complaint("alpha", &["create", "bd"]);
    assert!(complaint.contains("no volume \"bd\": did you mean \"db\"?"), "{complaint}");
    let complaint = bench.complaint("alhpa", &["create"]);
    assert!(complaint.contains("no node \"alhpa\": did you mean \"alpha\"?"), "{complaint}");
}

#[test]
fn a_file_that_cannot_be_completed_is_removed() {
    let bench = Bench::new("1048576");
    // A directory where the metadata belongs lets the disk be made and its metadata fail.
    std::fs::create_dir(bench.path("a.img.meta")).expect("made");
    bench.run("alpha", &["create", "db", "--force"]).expect_err("no metadata");
    assert!(!bench.path("a.img").exists());
}

/// A daemon whose volume `db` is in sync from the `after`th look on, and `before` that.
struct CatchingUp {
    looks: AtomicU32,
    after: u32,
    before: VolumeStatus,
}

impl AdminBackend for CatchingUp {
    fn status(&self) -> Answer<'_, Status> {
        let done = self.looks.fetch_add(1, Ordering::Relaxed) + 1 >= self.after;
        let volume = if done { db() } else { self.before.clone() };
        Box::pin(async {
            Status {
                node: "alpha".into(),
                volumes: vec![volume],
                log_lines_dropped: 0,
                log_dropping: false,
                not_listening: vec![],
            }
        })
    }

    fn command(&self, volume: String, _: Wish, _: Asked) -> Answer<'_, Result<String, CommandError>> {
        Box::pin(async { Err(CommandError::NoSuchVolume { node: "alpha".into(), volume }) })
    }
}

/// Serves on `socket` from a thread of its own, which ends with the test's process.
fn daemon(socket: PathBuf, delay: Duration, after: u32) {
    daemon_that_was(VolumeStatus { name: "db".into(), ..catching_up() }, socket, delay, after);
}

fn daemon_that_was(before: VolumeStatus, socket: PathBuf, delay: Duration, after: u32) {
    std::thread::spawn(move || {
        std::thread::sleep(delay);
        let server = AdminServer::bind(&socket).expect("bound");
        let backend = Arc::new(CatchingUp { looks: AtomicU32::new(0), after, before });
        block_on(async {
            server.serve(backend, std::future::pending()).await.map_err(|error| panic!("{error}"))
        })
    });
}

#[test]
fn wait_sync_waits_for_the_daemon_and_for_the_disks() {
    let bench = Bench::new("1048576");
    daemon(bench.path("alpha.sock"), Duration::from_millis(300), 3);
    bench.run("alpha", &["wait-sync", "db", "--timeout", "30s"]).expect("in sync at the third look");
    let complaint = bench.complaint("alpha", &["wait-sync", "dc"]);
    assert!(complaint.contains("node alpha has no volume dc: there are db"), "{complaint}");
}

#[test]
fn wait_sync_says_where_it_stood() {
    let bench = Bench::new("1048576");
    daemon(bench.path("alpha.sock"), Duration::ZERO, u32::MAX);
    let complaint = bench.complaint("alpha", &["wait-sync", "db", "--timeout", "700ms"]);
    let stood = "volume db is not in sync after 700ms: role primary, disk UpToDate, peer beta Inconsistent, \
                 sync-source, 97.6% in sync; give it time";
    assert_eq!(complaint, stood);
    let complaint = bench.complaint("beta", &["wait-sync", "db", "--timeout", "200ms"]);
    assert!(complaint.contains("start it with `costandby --node beta up`"), "{complaint}");
}

#[test]
fn wait_sync_does_not_wait_for_nodes_that_stay_apart() {
    let parted = VolumeStatus {
        name: "db".into(),
        parted: true,
        connection: "standalone".into(),
        advice: Some("split brain: both nodes went on".into()),
        ..alone()
    };
    let refused = VolumeStatus {
        connection: "connecting".into(),
        advice: Some("beta refuses a session: beta has no volume db".into()),
        ..parted.clone()
    };
    for (before, why) in [(parted, "split brain"), (refused.clone(), "beta has no volume db")] {
        let bench = Bench::new("1048576");
        daemon_that_was(before, bench.path("alpha.sock"), Duration::ZERO, u32::MAX);
        let began = std::time::Instant::now();
        let complaint = bench.complaint("alpha", &["wait-sync", "db"]);
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert!(complaint.starts_with("volume db cannot get in sync by itself: "), "{complaint}");
        assert!(complaint.contains(why), "{complaint}");
    }
    // What the daemon knows of the peer may be of before the operator's `connect` there.
    let bench = Bench::new("1048576");
    daemon_that_was(refused, bench.path("alpha.sock"), Duration::ZERO, 5);
    bench.run("alpha", &["wait-sync", "db"]).expect("in sync at the fifth look");
}
