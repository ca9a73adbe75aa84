//! Two daemons as separate processes, `alpha` and `beta`, with a configuration and disks of their own.
//!
//! Each node has its own copy of the configuration, so that a test may put a proxy between them. Every pair has a
//! loopback address of its own: its ports cannot be taken by another test, and clients' short-lived ports are elsewhere.
//! When a test fails, the end of both logs is printed.

use crate::patience::Limits;
use crate::process::{Guarded, Ran, costandby_binary, run, run_within};
use crate::proxy::Proxy;
use crate::{scaled, wait_for, wait_while_moving};
use costandby_control::admin::{self, VolumeStatus};
use costandby_control::admin_client::{AdminClient, ClientError};
use costandby_control::nbd_client::{Endpoint, NbdClient, NbdError, NbdUri, Options};
use costandby_control::secure::key::{Key, Keys};
use costandby_control::secure::keyring;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// The nodes' names; indices into them are how this module's calls name a node.
pub const NODES: [&str; 2] = ["alpha", "beta"];
/// The node that starts as primary unless a test says otherwise, and the one that dials.
pub const ALPHA: usize = 0;
/// The other node.
pub const BETA: usize = 1;

/// How long anything may take that a healthy pair does at once: generous, for two loaded cores.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How long a daemon may take to end after SIGTERM; it gives itself 40 s.
const STOP_LIMIT: Duration = Duration::from_secs(45);

/// Lines of each log that a failed test prints.
const LOG_LINES: usize = 40;

/// What carries the copies of pairs that say nothing else: `COSTANDBY_TEST_LINK`, or `tcp`.
///
/// With `rdma` the nodes are on `COSTANDBY_RDMA_ADDRESS`, the address of this machine's RDMA device.
///
/// # Panics
/// When `rdma` is asked for and there is no such address.
fn link_from_environment() -> (&'static str, Option<IpAddr>) {
    match std::env::var("COSTANDBY_TEST_LINK").as_deref() {
        Ok("rdma") => {
            let address = std::env::var("COSTANDBY_RDMA_ADDRESS").unwrap_or_default();
            let address = address.parse().expect("COSTANDBY_RDMA_ADDRESS is the RDMA device's address");
            ("rdma", Some(address))
        }
        Ok("tcp") | Err(_) => ("tcp", None),
        Ok(other) => panic!("COSTANDBY_TEST_LINK is {other:?}, neither tcp nor rdma"),
    }
}

/// One volume of a pair.
#[derive(Clone, Debug)]
pub struct VolumeSettings {
    /// Its name.
    pub name: &'static str,
    /// Bytes.
    pub size: u64,
    /// Index of the node it starts on.
    pub primary: usize,
    /// `async`, `memory` or `durable`.
    pub ack: &'static str,
    /// `continue` or `freeze`.
    pub on_peer_loss: &'static str,
    /// `checksum_first`.
    pub checksum_first: bool,
    /// Directory of each node's disk, where it is not to be the pair's own.
    pub dirs: [Option<PathBuf>; 2],
}

impl VolumeSettings {
    /// A volume of `size_mib` that starts on alpha, with the defaults.
    #[must_use]
    pub fn new(name: &'static str, size_mib: u64) -> Self {
        Self {
            name,
            size: size_mib << 20,
            primary: ALPHA,
            ack: "memory",
            on_peer_loss: "continue",
            checksum_first: false,
            dirs: [None, None],
        }
    }
}

/// What a pair is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its volumes.
    pub volumes: Vec<VolumeSettings>,
    /// `peer_timeout`.
    pub peer_timeout: &'static str,
    /// Put a [`Proxy`] between the nodes.
    pub proxied: bool,
    /// `create --sparse`.
    pub sparse: bool,
    /// Network name space and address of each node, where it is not to be this one's loopback.
    pub namespaces: Option<[(String, SocketAddr); 2]>,
    /// Another TCP address for clients, the same on both nodes.
    pub floating: Option<SocketAddr>,
    /// `link`; with `rdma`, `device_address` too.
    pub link: &'static str,
    /// Where the nodes listen for each other, where that is not to be loopback.
    pub device_address: Option<IpAddr>,
    /// The nodes hold the pair's key; without, they run with `insecure = true`.
    pub keyed: bool,
}

impl Settings {
    /// These volumes, and nothing special.
    #[must_use]
    pub fn new(volumes: &[VolumeSettings]) -> Self {
        let (link, device_address) = link_from_environment();
        Self {
            volumes: volumes.to_vec(),
            peer_timeout: "1s",
            proxied: false,
            sparse: false,
            namespaces: None,
            floating: None,
            link,
            device_address,
            keyed: true,
        }
    }
}

/// Two nodes. Dropping it ends both daemons.
#[derive(Debug)]
pub struct Pair {
    daemons: [Option<Guarded>; 2],
    proxy: Option<Proxy>,
    settings: Settings,
    listen: [SocketAddr; 2],
    nbd_tcp: [SocketAddr; 2],
    runtime: tokio::runtime::Runtime,
    dir: TempDir,
}

impl Pair {
    /// Makes the disks, starts both daemons and waits until all volumes are in sync.
    ///
    /// # Panics
    /// When any of it fails.
    #[must_use]
    pub fn start(settings: Settings) -> Self {
        let mut pair = Self::create(settings);
        pair.up(ALPHA);
        pair.up(BETA);
        let names: Vec<_> = pair.settings.volumes.iter().map(|volume| volume.name).collect();
        for name in names {
            pair.wait_in_sync(name);
        }
        pair
    }

    /// Makes configuration and disks, and starts nothing.
    ///
    /// # Panics
    /// When any of it fails.
    #[must_use]
    pub fn create(settings: Settings) -> Self {
        let dir = tempfile::Builder::new().prefix("costandby-").tempdir().expect("a temporary directory");
        let ports: [SocketAddr; 4] = free_addresses();
        let local = settings.device_address.map_or([ports[0], ports[1]], free_addresses_on);
        let listen = settings.namespaces.as_ref().map_or(local, |spaces| [spaces[0].1, spaces[1].1]);
        let proxy = settings.proxied.then(|| Proxy::start(listen[BETA]));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let daemons = [None, None];
        let nbd_tcp = [ports[2], ports[3]];
        let pair = Self { daemons, proxy, settings, listen, nbd_tcp, runtime, dir };
        let key = Keys::one(Key::random().expect("random bytes"));
        for node in [ALPHA, BETA] {
            keyring::create(&pair.key_path(node), &key).expect("a key file");
            fs::create_dir(pair.path(NODES[node])).expect("a directory for the node");
            fs::write(pair.config(node), pair.config_text(node)).expect("a configuration");
            let mut create = pair.command(node);
            // Of a disk that is a device; a file is zeros anyway.
            create.args(["create", "--zero"]);
            if pair.settings.sparse {
                create.arg("--sparse");
            }
            run(&mut create).ok();
        }
        pair
    }

    /// Starts a daemon and waits until it answers.
    ///
    /// # Panics
    /// When it runs already, ends at once or does not answer.
    pub fn up(&mut self, node: usize) {
        self.up_unasked(node);
        self.wait_answers(node);
    }

    /// Starts a daemon by a command of the caller's, whose process becomes the daemon, and waits until it answers.
    ///
    /// # Panics
    /// When it runs already, ends at once or does not answer.
    pub fn up_by(&mut self, node: usize, command: &mut Command) {
        assert!(self.daemons[node].is_none(), "{} runs already", NODES[node]);
        self.daemons[node] = Some(Guarded::spawn(command));
        self.wait_answers(node);
    }

    fn wait_answers(&mut self, node: usize) {
        wait_for(&format!("{} answers", NODES[node]), LIMIT, || {
            let ended = self.daemons[node].as_mut().and_then(Guarded::ended);
            assert!(ended.is_none(), "{} ended with {ended:?}: {}", NODES[node], self.log(node));
            self.ask(node).ok()
        });
    }

    /// Starts a daemon, and does not ask it anything.
    ///
    /// # Panics
    /// When it runs already.
    pub fn up_unasked(&mut self, node: usize) {
        assert!(self.daemons[node].is_none(), "{} runs already", NODES[node]);
        let log = File::options().append(true).create(true).open(self.log_path(node)).expect("a log");
        let mut command = self.command(node);
        command.arg("up").env("COSTANDBY_LOG", "info").stdout(log.try_clone().expect("a log")).stderr(log);
        self.daemons[node] = Some(Guarded::spawn(&mut command));
    }

    /// SIGKILL.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self, node: usize) {
        let mut daemon = self.daemons[node].take().expect("a daemon to kill");
        assert!(daemon.ended().is_none(), "{} ended by itself before it was killed", NODES[node]);
        daemon.kill();
    }

    /// SIGTERM.
    ///
    /// # Panics
    /// When it does not end, or not well.
    pub fn stop(&mut self, node: usize) {
        let status = self.daemons[node].take().expect("a daemon to stop").terminate(scaled(STOP_LIMIT));
        assert!(status.is_some_and(|s| s.success()), "{} ended with {status:?} on SIGTERM", NODES[node]);
    }

    /// The daemon's process id.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self, node: usize) -> u32 {
        self.daemons[node].as_ref().expect("a daemon").pid()
    }

    /// Panics if a daemon that should run has ended.
    ///
    /// # Panics
    /// See above.
    pub fn assert_alive(&mut self, node: usize) {
        let ended = self.daemons[node].as_mut().expect("a daemon").ended();
        assert!(ended.is_none(), "{} ended with {ended:?}: {}", NODES[node], self.log(node));
    }

    /// Bytes of memory that are the daemon's own and not backed by a file.
    ///
    /// # Panics
    /// When `/proc` does not say.
    #[must_use]
    pub fn own_memory(&self, node: usize) -> u64 {
        let path = format!("/proc/{}/status", self.pid(node));
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
        kib << 10
    }

    /// Whether the nodes' device may keep pages of the disks, which a trim then fills with zeros instead of releasing them.
    #[must_use]
    pub fn device_keeps_pages(&self) -> bool {
        self.settings.link == "rdma"
    }

    /// The proxy between the nodes.
    ///
    /// # Panics
    /// Where the settings asked for none.
    #[must_use]
    pub fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().expect("settings with proxied")
    }

    /// `costandby --config … --node …`, in the node's name space.
    #[must_use]
    pub fn command(&self, node: usize) -> Command {
        let mut command = match &self.settings.namespaces {
            None => Command::new(costandby_binary()),
            Some(spaces) => {
                let mut command = crate::process::system_command("ip");
                // No fork in between: the id stays the daemon's.
                command.args(["netns", "exec", &spaces[node].0]).arg(costandby_binary());
                command
            }
        };
        command.arg("--config").arg(self.config(node)).args(["--node", NODES[node]]);
        command
    }

    /// Runs the command line on a node.
    #[must_use]
    pub fn cli(&self, node: usize, args: &[&str]) -> Ran {
        run_within(self.command(node).args(args), Duration::from_secs(90))
    }

    /// Runs the command line on a node and expects success; its standard output.
    ///
    /// # Panics
    /// When it fails.
    pub fn cli_ok(&self, node: usize, args: &[&str]) -> String {
        self.cli(node, args).ok().stdout
    }

    /// Has the daemon carry out an operator's command, without a process of its own.
    ///
    /// # Errors
    /// The daemon's refusal, and whatever keeps it from answering.
    pub fn tell(&self, node: usize, volume: &str, command: admin::Command) -> Result<String, ClientError> {
        self.runtime.block_on(self.admin(node).command(volume, command))
    }

    /// Promotes a volume.
    ///
    /// # Panics
    /// When the daemon refuses.
    pub fn promote(&self, node: usize, volume: &str) {
        let told = self.tell(node, volume, admin::Command::Promote { force: false });
        told.unwrap_or_else(|error| panic!("promote {volume} on {}: {error}", NODES[node]));
    }

    /// Hands a volume over from one node to the other.
    ///
    /// # Panics
    /// When a daemon refuses.
    pub fn hand_over(&self, volume: &str, from: usize) {
        let told = self.tell(from, volume, admin::Command::Demote);
        told.unwrap_or_else(|error| panic!("demote {volume} on {}: {error}", NODES[from]));
        // The demotion was answered because the peer knows of it.
        self.promote(1 - from, volume);
    }

    /// A volume's state as a node sees it; `None` where its daemon does not answer.
    #[must_use]
    pub fn status(&self, node: usize, volume: &str) -> Option<VolumeStatus> {
        self.ask(node).ok()?.volumes.into_iter().find(|found| found.name == volume)
    }

    /// Addresses that a node cannot listen on.
    ///
    /// # Panics
    /// When its daemon does not answer.
    #[must_use]
    pub fn not_listening(&self, node: usize) -> Vec<admin::NotListening> {
        self.ask(node).unwrap_or_else(|error| panic!("{}: {error}", NODES[node])).not_listening
    }

    /// Waits until a node's view of a volume is as wanted.
    ///
    /// # Panics
    /// When nothing in the status changes for [`LIMIT`], or it goes on changing for ten times as long.
    pub fn wait_status(
        &self,
        node: usize,
        volume: &str,
        what: &str,
        mut wanted: impl FnMut(&VolumeStatus) -> bool,
    ) -> VolumeStatus {
        let look = || match self.status(node, volume) {
            Some(status) if wanted(&status) => Ok(status),
            seen => Err(Box::new(seen)),
        };
        wait_while_moving(Limits::still(LIMIT), look).unwrap_or_else(|(over, seen)| {
            panic!("waited in vain until {volume} on {} is {what}: {over}; it says {seen:?}", NODES[node])
        })
    }

    /// Waits until both nodes say that the volume is in sync.
    ///
    /// # Panics
    /// When [`Pair::wait_status`] does.
    pub fn wait_in_sync(&self, volume: &str) {
        for node in [ALPHA, BETA] {
            self.wait_status(node, volume, "in sync", VolumeStatus::in_sync);
        }
    }

    /// The node that says it is the volume's primary.
    ///
    /// # Panics
    /// When there is none, or two.
    #[must_use]
    pub fn primary(&self, volume: &str) -> usize {
        let serves = |&node: &usize| self.status(node, volume).is_some_and(|status| status.role == "primary");
        let found: Vec<_> = [ALPHA, BETA].into_iter().filter(serves).collect();
        assert_eq!(found.len(), 1, "primaries of {volume}: {found:?}");
        found[0]
    }

    /// The address of a volume's export on a node's unix socket.
    #[must_use]
    pub fn uri(&self, node: usize, volume: &str) -> NbdUri {
        NbdUri { endpoint: Endpoint::Unix(self.nbd_socket(node)), export: volume.to_owned() }
    }

    /// The address of a volume's export on a node's TCP endpoint.
    #[must_use]
    pub fn uri_tcp(&self, node: usize, volume: &str) -> NbdUri {
        let endpoint =
            Endpoint::Tcp { host: self.nbd_tcp[node].ip().to_string(), port: self.nbd_tcp[node].port() };
        NbdUri { endpoint, export: volume.to_owned() }
    }

    /// Connects to a volume on a node.
    ///
    /// # Errors
    /// As [`NbdClient::connect`].
    pub fn connect(&self, node: usize, volume: &str) -> Result<NbdClient, NbdError> {
        NbdClient::connect(&self.uri(node, volume), &Options::default())
    }

    /// Connects to a volume on a node that serves it.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn client(&self, node: usize, volume: &str) -> NbdClient {
        self.connect(node, volume).unwrap_or_else(|error| panic!("{volume} on {}: {error}", NODES[node]))
    }

    /// Flushes the volume, waits until nothing is under way, and compares the two disks byte for byte.
    ///
    /// # Panics
    /// When they differ, or do not come to rest.
    pub fn settle_and_compare(&self, volume: &str) {
        let node = self.primary(volume);
        self.client(node, volume).flush().unwrap_or_else(|error| panic!("flush {volume}: {error}"));
        self.wait_in_sync(volume);
        self.wait_status(node, volume, "quiet", |status| {
            status.in_sync() && status.in_flight == 0 && status.dirty_bytes == 0
        });
        self.compare(volume);
    }

    /// Compares the two disks byte for byte.
    ///
    /// # Panics
    /// When they differ; says where first.
    pub fn compare(&self, volume: &str) {
        let [mut a, mut b] = [ALPHA, BETA].map(|node| File::open(self.disk(node, volume)).expect("a disk"));
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut offset = 0;
        loop {
            let len = read_full(&mut a, &mut left);
            assert_eq!(len, read_full(&mut b, &mut right), "the disks of {volume} differ in length");
            if let Some(at) = (0..len).find(|&at| left[at] != right[at]) {
                let (alpha, beta) = (left[at], right[at]);
                panic!("{volume} differs at byte {}: alpha has {alpha:#x}, beta {beta:#x}", offset + at);
            }
            if len == 0 {
                assert_eq!(offset as u64, self.volume(volume).size, "bytes compared of {volume}");
                return;
            }
            offset += len;
        }
    }

    /// The daemon's log so far.
    #[must_use]
    pub fn log(&self, node: usize) -> String {
        let bytes = fs::read(self.log_path(node)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the daemon's log has a line with all of `words`.
    ///
    /// # Panics
    /// When that takes longer than [`LIMIT`].
    pub fn wait_log(&self, node: usize, words: &[&str]) -> String {
        let what = format!("the log of {} has a line with {words:?}", NODES[node]);
        wait_for(&what, LIMIT, || {
            let log = self.log(node);
            log.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
    }

    /// A volume's disk on a node.
    #[must_use]
    pub fn disk(&self, node: usize, volume: &str) -> PathBuf {
        let own = self.path(NODES[node]);
        self.volume(volume).dirs[node].as_ref().unwrap_or(&own).join(format!("{volume}.{}.img", NODES[node]))
    }

    /// The metadata beside a volume's disk on a node.
    #[must_use]
    pub fn metadata(&self, node: usize, volume: &str) -> PathBuf {
        let mut path = self.disk(node, volume).into_os_string();
        path.push(".meta");
        path.into()
    }

    /// A path in the pair's own directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A node's configuration.
    #[must_use]
    pub fn config(&self, node: usize) -> PathBuf {
        self.path(&format!("{}.toml", NODES[node]))
    }

    /// Where a node listens for its peer.
    #[must_use]
    pub fn peer_address(&self, node: usize) -> SocketAddr {
        self.listen[node]
    }

    /// A node's unix socket for NBD clients.
    #[must_use]
    pub fn nbd_socket(&self, node: usize) -> PathBuf {
        self.path(&format!("{}.nbd", NODES[node]))
    }

    /// The file of a node's key: each node has its own copy.
    #[must_use]
    pub fn key_path(&self, node: usize) -> PathBuf {
        self.path(&format!("{}.key", NODES[node]))
    }

    /// The keys a node's file holds.
    ///
    /// # Panics
    /// When it holds none.
    #[must_use]
    pub fn keys(&self, node: usize) -> Keys {
        keyring::read(&self.key_path(node)).expect("a good key file")
    }

    /// Gives a node other keys, which its daemon sees within seconds.
    ///
    /// # Panics
    /// When they cannot be written.
    pub fn set_keys(&self, node: usize, keys: &Keys) {
        keyring::replace(&self.key_path(node), keys).expect("written");
    }

    fn volume(&self, name: &str) -> &VolumeSettings {
        self.settings.volumes.iter().find(|volume| volume.name == name).expect("a volume of this pair")
    }

    fn log_path(&self, node: usize) -> PathBuf {
        self.path(&format!("{}.log", NODES[node]))
    }

    fn admin(&self, node: usize) -> AdminClient {
        AdminClient::new(&self.path(&format!("{}.sock", NODES[node])), NODES[node])
    }

    /// What a node says of itself.
    ///
    /// # Errors
    /// Whatever keeps its daemon from answering.
    pub fn ask(&self, node: usize) -> Result<admin::Status, ClientError> {
        self.runtime.block_on(self.admin(node).status())
    }

    fn config_text(&self, of: usize) -> String {
        let mut text = format!("peer_timeout = \"{}\"\n", self.settings.peer_timeout);
        if self.settings.keyed {
            text.insert_str(0, &format!("key = \"{}\"\n", self.key_path(of).display()));
        } else {
            text.insert_str(0, "insecure = true\n");
        }
        for node in [ALPHA, BETA] {
            let proxied = self.proxy.as_ref().filter(|_| of == ALPHA && node == BETA);
            let listen = proxied.map_or(self.listen[node], Proxy::address);
            let dir = self.dir.path().display();
            let name = NODES[node];
            let own = self.settings.namespaces.is_none().then_some(self.nbd_tcp[node]);
            let nbd_tcp = own.into_iter().chain(self.settings.floating);
            let nbd_tcp: String = nbd_tcp.map(|address| format!(", \"tcp:{address}\"")).collect();
            let _ = write!(
                text,
                "\n[nodes.{name}]\nlisten = \"{listen}\"\nadmin = \"{dir}/{name}.sock\"\n\
                 nbd = [\"unix:{dir}/{name}.nbd\"{nbd_tcp}]\n"
            );
        }
        for volume in &self.settings.volumes {
            let VolumeSettings { name, size, primary, ack, on_peer_loss, checksum_first, .. } = volume;
            let primary = NODES[*primary];
            let link = self.settings.link;
            let disks = [ALPHA, BETA].map(|node| self.disk(node, name).display().to_string());
            let _ = write!(
                text,
                "\n[volumes.{name}]\nsize = {size}\nprimary = \"{primary}\"\nlink = \"{link}\"\nack = \"{ack}\"\n\
                 on_peer_loss = \"{on_peer_loss}\"\nchecksum_first = {checksum_first}\ndisk.alpha = \"{}\"\ndisk.beta = \"{}\"\n",
                disks[0], disks[1]
            );
        }
        text
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for (node, name) in NODES.iter().enumerate() {
            let log = self.log(node);
            let lines: Vec<_> = log.lines().collect();
            println!("--- the end of {name}'s log");
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                println!("{line}");
            }
        }
    }
}

fn read_full(file: &mut File, bytes: &mut [u8]) -> usize {
    let mut len = 0;
    while len < bytes.len() {
        match file.read(&mut bytes[len..]).expect("a disk can be read") {
            0 => break,
            more => len += more,
        }
    }
    len
}

/// Addresses nobody uses, on a loopback address of this pair alone.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    static PAIRS: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id().to_le_bytes();
    let pair = PAIRS.fetch_add(1, Ordering::Relaxed).max(1);
    free_addresses_on(Ipv4Addr::new(127, process[0] | 1, process[1], pair).into())
}

/// Addresses of `ip` that nobody uses.
fn free_addresses_on<const N: usize>(ip: IpAddr) -> [SocketAddr; N] {
    let sockets = [(); N].map(|()| std::net::TcpListener::bind((ip, 0)).expect("a free port"));
    sockets.map(|socket| socket.local_addr().expect("a bound socket's address"))
}
