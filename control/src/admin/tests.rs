//! Tests of the admin socket: a round trip with a fake daemon behind it, refusals, left-over sockets.

use super::*;
use crate::admin_client::{AdminClient, ClientError};
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A daemon with volume `db`, which remembers its commands and refuses to demote.
#[derive(Default)]
struct Fake {
    commands: Mutex<Vec<(String, Command)>>,
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

impl AdminBackend for Fake {
    fn status(&self) -> Answer<'_, Status> {
        Box::pin(async {
            Status {
                node: "alpha".into(),
                volumes: vec![db()],
                log_lines_dropped: 0,
                log_dropping: false,
                not_listening: vec![],
            }
        })
    }

    fn command(
        &self,
        volume: String,
        command: Command,
        _: Asked,
    ) -> Answer<'_, Result<String, CommandError>> {
        Box::pin(async move {
            if volume != "db" {
                return Err(CommandError::NoSuchVolume { node: "alpha".into(), volume });
            }
            if command == Command::Demote {
                return Err(CommandError::Refused("volume db: not now".into()));
            }
            let done = format!("{} done", command.as_str());
            self.commands.lock().expect("not poisoned").push((volume, command));
            Ok(done)
        })
    }
}

struct Daemon {
    directory: tempfile::TempDir,
    backend: Arc<Fake>,
    stop: tokio::sync::oneshot::Sender<()>,
    served: tokio::task::JoinHandle<Result<(), AdminError>>,
}

impl Daemon {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = AdminServer::bind(&directory.path().join("run/a.sock")).expect("bound");
        let backend = Arc::new(Fake::default());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let shutdown = async move {
            let _ = stopped.await;
        };
        let served = tokio::spawn(server.serve(Arc::clone(&backend) as _, shutdown));
        Self { directory, backend, stop, served }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/a.sock")
    }

    fn client(&self) -> AdminClient {
        AdminClient::new(&self.socket(), "alpha")
    }

    /// One request as bytes, for what the client never sends; the answer's status line and body.
    async fn raw(&self, request: &str) -> String {
        let mut stream = tokio::net::UnixStream::connect(self.socket()).await.expect("connected");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        let reading = stream.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(60), reading).await.expect("in time").expect("text");
        answer
    }

    async fn post(&self, target: &str, body: &str) -> String {
        let len = body.len();
        self.raw(&format!(
            "POST {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n{body}"
        ))
        .await
    }
}

#[tokio::test]
async fn status_and_commands_make_the_round_trip() {
    let daemon = Daemon::start();
    let client = daemon.client();
    let status = client.status().await.expect("answered");
    assert_eq!(
        status,
        Status {
            node: "alpha".into(),
            volumes: vec![db()],
            log_lines_dropped: 0,
            log_dropping: false,
            not_listening: vec![]
        }
    );
    let commands = [
        Command::Promote { force: true },
        Command::Promote { force: false },
        Command::Connect { discard_my_data: true },
        Command::Connect { discard_my_data: false },
        Command::Disconnect,
        Command::Invalidate,
        Command::Verify { repair: true },
        Command::Verify { repair: false },
        Command::StopVerify,
    ];
    for command in commands {
        let message = client.command("db", command).await.expect("done");
        assert_eq!(message, format!("{} done", command.as_str()));
    }
    let seen = daemon.backend.commands.lock().expect("not poisoned").clone();
    assert_eq!(seen, commands.map(|command| ("db".to_owned(), command)));
}

#[tokio::test]
async fn refusals_arrive_in_the_daemons_words() {
    let daemon = Daemon::start();
    let refused = daemon.client().command("db", Command::Demote).await.expect_err("refused");
    assert!(
        matches!(&refused, ClientError::Refused { message } if message == "volume db: not now"),
        "{refused}"
    );
    let unknown = daemon
        .client()
        .command("dc", Command::Connect { discard_my_data: false })
        .await
        .expect_err("unknown");
    assert!(unknown.to_string().contains("no volume \"dc\""), "{unknown}");
}

#[tokio::test]
async fn bad_requests_get_their_status_and_a_reason() {
    let daemon = Daemon::start();
    let table = [
        (daemon.post("/v1/volumes/db/demote", "").await, "409", "not now"),
        (daemon.post("/v1/volumes/dc/demote", "").await, "404", "no volume"),
        (daemon.post("/v1/volumes/db/explode", "").await, "404", "no command \\\"explode\\\""),
        (daemon.post("/v1/volumes/db/promote", "{\"forse\":true}").await, "400", "forse"),
        (daemon.post("/v1/volumes/db/promote", "[").await, "400", "the body of promote"),
        (daemon.post("/v1/status", "").await, "405", "GET /v1/status"),
        (daemon.post("/v2", "").await, "404", "no such path"),
        (daemon.post("/v1/volumes/db/promote", &"x".repeat(BODY_LEN_MAX + 1)).await, "413", ""),
        (daemon.post("/v1/volumes/db/promote", "").await, "200", "promote done"),
    ];
    for (answer, status, part) in table {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
        assert!(answer.contains(part), "{part}: {answer}");
    }
    let seen = daemon.backend.commands.lock().expect("not poisoned").clone();
    assert_eq!(seen, [("db".to_owned(), Command::Promote { force: false })]);
}

#[tokio::test]
async fn only_the_owner_may_open_the_socket() {
    let daemon = Daemon::start();
    let mode = std::fs::metadata(daemon.socket()).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_second_daemon_is_refused_and_a_dead_ones_socket_replaced() {
    let daemon = Daemon::start();
    let socket = daemon.socket();
    assert!(matches!(AdminServer::bind(&socket), Err(AdminError::AlreadyRuns { .. })));
    daemon.client().status().await.expect("the first one is not hurt");

    let dead = daemon.directory.path().join("dead.sock");
    drop(UnixListener::bind(&dead).expect("bound"));
    assert!(dead.exists());
    drop(AdminServer::bind(&dead).expect("replaced"));
    assert!(!dead.exists(), "a server that ends takes its socket with it");

    let file = daemon.directory.path().join("precious");
    std::fs::write(&file, "text").expect("written");
    assert!(matches!(AdminServer::bind(&file), Err(AdminError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).expect("still there"), b"text");
}

#[tokio::test]
async fn shutting_down_removes_the_socket_and_does_not_wait_for_a_hung_client() {
    let Daemon { directory, stop, served, .. } = Daemon::start();
    let socket = directory.path().join("run/a.sock");
    let mut hung = tokio::net::UnixStream::connect(&socket).await.expect("connected");
    hung.write_all(b"POST /v1/volumes/db/promote HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        .await
        .expect("sent");
    // The server has to have read the head, or there is nothing to wait for.
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.send(()).expect("still serving");
    tokio::time::timeout(SHUTDOWN_GRACE * 3, served)
        .await
        .expect("in time")
        .expect("no panic")
        .expect("served");
    assert!(!socket.exists());
    let error = AdminClient::new(&socket, "alpha").status().await.expect_err("nobody is there");
    assert!(error.to_string().contains("start it with `costandby --node alpha up`"), "{error}");
}

#[tokio::test]
async fn a_daemon_that_talks_nonsense_is_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("x.sock");
    let listener = tokio::net::UnixListener::bind(&socket).expect("bound");
    let client = AdminClient::new(&socket, "alpha");
    let talk = async {
        for answer in ["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "rubbish\r\n\r\n"] {
            let (mut stream, _) = listener.accept().await.expect("connected");
            stream.write_all(answer.as_bytes()).await.expect("sent");
            let _ = stream.read(&mut [0; 512]).await;
        }
    };
    let ask = async {
        assert!(matches!(client.status().await, Err(ClientError::Garbled { .. })));
        assert!(matches!(client.status().await, Err(ClientError::Http { .. })));
    };
    tokio::join!(talk, ask);
}

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("not poisoned").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn every_command_leaves_who_what_and_the_outcome_in_the_log() {
    let lines = Lines::default();
    let sink = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || sink.clone()).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    let daemon = Daemon::start();
    let client = daemon.client();
    client.command("db", Command::Promote { force: true }).await.expect("done");
    client.command("db", Command::Demote).await.expect_err("refused");
    client.command("web", Command::StopVerify).await.expect_err("no such volume");
    let log = String::from_utf8(lines.0.lock().expect("not poisoned").clone()).expect("text");
    let (user, process) = (rustix::process::geteuid().as_raw(), std::process::id());
    let who = format!("user {user} (process {process}) asked for");
    for (level, line) in [
        ("INFO", format!("{who} promote --force: promote done volume=\"db\"")),
        ("WARN", format!("{who} demote, which is refused: volume db: not now volume=\"db\"")),
        (
            "WARN",
            format!(
                "{who} verify --stop, which is refused: node alpha has no volume \"web\": `status` shows those it has volume=\"web\""
            ),
        ),
    ] {
        assert!(
            log.lines().any(|found| found.contains(level) && found.contains(&line)),
            "{line} is not in {log}"
        );
    }
    assert_eq!(log.lines().count(), 3, "{log}");
}
