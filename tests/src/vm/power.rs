//! Power cuts: two guests with a disk each on the host, whose QEMU gets SIGKILL at random moments of every state they
//! can be in, with a client on the host that outlives them all.
//!
//! What a guest's kernel had not written to its disk is lost with it, as with a real machine; what it had written is in
//! the disk's file, for the file belongs to the host. The client writes through a second network card of the primary's
//! guest and keeps the ledger of what was acknowledged and what flushed. After each round the nodes are booted again,
//! catch up, are checked against the ledger, and both disks' files are compared.
//!
//! | what loses power | what must be there |
//! | --- | --- |
//! | the primary, and the standby is promoted | every acknowledged write, on the standby |
//! | the standby | every acknowledged write; none was refused |
//! | the target, in mid-resync | the same |
//! | both | every flushed write |
//! | the source, in mid-resync, which is both as far as the target is no copy | every flushed write |
//! | both, in mid-resync | every flushed write |
//! | the primary, and it is back before anybody is promoted | every acknowledged write: the standby has them all |
//!
//! Invariants: a guest is told what to do only by its [`super::agent`]; every wait has a limit; the files are compared
//! only after a flush, with nothing under way.

use super::agent::{ORDER, PROMOTE, STATE, STOP};
use super::failover::{PAIR, SIZE_MIB, VOLUME};
use super::guest::{FORWARDED_PORT, Guest, Settings, Wire};
use super::{Rig, Steps, VmError, io_error, last_lines, quoted};
use crate::Rng;
use crate::ledger::{Ledger, Writing};
use crate::pair::free_addresses;
use crate::patience::{Limits, Patience};
use crate::wait_while_moving;
use costandby_control::admin::VolumeStatus;
use costandby_control::nbd_client::{Endpoint, NbdClient, NbdUri, Options};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a block device holds besides the volume.
const METADATA_MIB: u64 = 1;

/// What guests do at once, and what takes a boot and a full copy. Whatever an agent says is progress. Stretched, like all
/// times here, by how slow the guests are.
const LIMITS: Limits = Limits { still: Duration::from_secs(150), whole: Duration::from_secs(600) };

/// How long guests may take to power off.
const STOP_LIMITS: Limits = Limits::silent(Duration::from_secs(120));

/// How long a client waits for an answer: longer than a primary needs to go on without its standby.
const PATIENCE: Duration = Duration::from_secs(30);

/// Writes acknowledged before anything happens: enough that all writers are at it.
const ACKED_MIN: u64 = 60;

const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What loses power in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    Primary,
    Standby,
    TargetInResync,
    Both,
    SourceInResync,
    BothInResync,
    PrimaryThatReturns,
}

/// The rounds, with their lines.
const ROUNDS: [(Cut, &str); 7] = [
    (Cut::Primary, "power: the primary loses it, the standby is promoted"),
    (Cut::Standby, "power: the standby loses it"),
    (Cut::TargetInResync, "power: the target loses it in mid-resync"),
    (Cut::Both, "power: both lose it"),
    (Cut::SourceInResync, "power: the source loses it in mid-resync"),
    (Cut::BothInResync, "power: both lose it in mid-resync"),
    (Cut::PrimaryThatReturns, "power: the primary loses it and is back before anybody is promoted"),
];

/// Runs all rounds; `link` carries the copies. Logs are in `run`.
///
/// # Errors
/// What does not hold; the round it happened in is marked as failed.
pub fn run(rig: &Rig, run: &Path, link: &str, seed: u64, steps: &mut Steps) -> Result<(), VmError> {
    // Each run has disks of its own.
    let run = run.join(format!("power-{seed}"));
    let done = Rounds::new(rig, &run, link, seed).and_then(|mut rounds| rounds.run(steps));
    if done.is_err() {
        steps.failed(&format!("seed {seed}"));
        for (node, _) in PAIR {
            println!("    --- the end of {node}'s log");
            print!("{}", last_lines(&run.join(node).join("share/daemon.log"), 15));
        }
    }
    done
}

/// A node: its guest while it has power, and what is known of it.
struct Node {
    guest: Option<Guest>,
    state: Option<VolumeStatus>,
    /// Answers to orders that were not looked at yet.
    answers: Vec<String>,
    orders: u64,
    disk: PathBuf,
    address: SocketAddr,
}

struct Rounds<'a> {
    rig: &'a Rig,
    run: &'a Path,
    link: &'a str,
    /// Unix sockets have short names, and a clone may lie deep.
    sockets: tempfile::TempDir,
    nodes: [Node; 2],
    ledger: Ledger,
    rng: Rng,
    primary: usize,
}

impl<'a> Rounds<'a> {
    fn new(rig: &'a Rig, run: &'a Path, link: &'a str, seed: u64) -> Result<Self, VmError> {
        std::fs::create_dir_all(run).map_err(io_error(format!("making {}", run.display())))?;
        let sockets = tempfile::Builder::new().prefix("costandby-vm-").tempdir();
        let sockets = sockets.map_err(io_error("making a temporary directory"))?;
        let addresses: [SocketAddr; 2] = free_addresses();
        let node = |n: usize| {
            let disk = run.join(format!("{}.disk", PAIR[n].0));
            let made = File::create(&disk).and_then(|file| file.set_len((SIZE_MIB + METADATA_MIB) << 20));
            made.map_err(io_error(format!("making {}", disk.display())))?;
            let (guest, state, answers) = (None, None, Vec::new());
            Ok(Node { guest, state, answers, orders: 0, disk, address: addresses[n] })
        };
        let nodes = [node(0)?, node(1)?];
        let ledger = Ledger::new(SIZE_MIB << 20);
        Ok(Self { rig, run, link, sockets, nodes, ledger, rng: Rng::new(seed), primary: 0 })
    }

    fn run(&mut self, steps: &mut Steps) -> Result<(), VmError> {
        steps.begin("power: two guests boot, in sync");
        self.boot(0)?;
        self.boot(1)?;
        self.wait_in_sync()?;
        steps.passed("");
        for (cut, title) in ROUNDS {
            steps.begin(title);
            let note = self.round(cut)?;
            self.settle_and_compare()?;
            steps.passed(&note);
        }
        for node in 0..2 {
            self.order(node, STOP)?;
        }
        for (node, (name, _)) in self.nodes.iter_mut().zip(PAIR) {
            let guest = node.guest.take().expect("both have power");
            match guest.finish(STOP_LIMITS)? {
                0 => {}
                status => return Err(failed(format!("{name}'s guest ended with status {status}"))),
            }
        }
        self.compare()
    }

    fn round(&mut self, cut: Cut) -> Result<String, VmError> {
        let (primary, standby) = (self.primary, 1 - self.primary);
        let writing = self.writing()?;
        let in_resync = matches!(cut, Cut::TargetInResync | Cut::SourceInResync | Cut::BothInResync);
        if in_resync {
            self.cut(standby)?;
            self.wait(primary, "alone", apart)?;
            self.wait_acked(&writing, writing.acked() + ACKED_MIN)?;
            self.boot(standby)?;
            self.wait(standby, "being copied to", |status| status.connection == "sync-target")?;
        }
        self.pause(200, if in_resync { 1000 } else { 2500 });
        match cut {
            Cut::Primary => self.promote_survivor(writing),
            Cut::PrimaryThatReturns => {
                self.cut(primary)?;
                let acked = self.end(writing);
                self.boot(primary)?;
                // Copied to, and then primary again, by itself.
                self.wait_in_sync()?;
                self.wait(primary, "serving", |status| status.role == "primary")?;
                self.check("after the return")?;
                Ok(format!("{acked} writes acknowledged, and {} serves again", PAIR[primary].0))
            }
            Cut::Standby | Cut::TargetInResync => {
                self.cut(standby)?;
                self.wait(primary, "alone", apart)?;
                self.wait_acked(&writing, writing.acked() + ACKED_MIN)?;
                self.boot(standby)?;
                self.wait_in_sync()?;
                let acked = writing.acked();
                let (ledger, error) = writing.finish();
                self.ledger = ledger;
                if let Some(error) = error {
                    return Err(failed(format!("a writer of the survivor met an error: {error}")));
                }
                self.check("after the return")?;
                Ok(format!("{acked} writes acknowledged, none refused"))
            }
            Cut::Both | Cut::SourceInResync | Cut::BothInResync => {
                let mut victims =
                    if cut == Cut::SourceInResync { vec![primary] } else { vec![primary, standby] };
                if self.rng.below(2) == 0 {
                    victims.reverse();
                }
                for &node in &victims {
                    self.cut(node)?;
                }
                let acked = self.end(writing);
                for &node in &victims {
                    self.boot(node)?;
                }
                self.wait_in_sync()?;
                self.primary = self.serving(primary)?;
                let mut client = self.client()?;
                let lost = self.ledger.check_flushed(&mut client).map_err(failed)?;
                Ok(format!(
                    "{acked} writes acknowledged; of blocks never flushed {} fell back, {} were torn",
                    lost.fell_back, lost.torn
                ))
            }
        }
    }

    /// The primary loses power, the standby is promoted and has everything; then the dead one returns under load.
    fn promote_survivor(&mut self, writing: Writing) -> Result<String, VmError> {
        let (dead, survivor) = (self.primary, 1 - self.primary);
        self.cut(dead)?;
        let cut = Instant::now();
        self.wait(survivor, "alone", apart)?;
        self.promote(survivor)?;
        let took = cut.elapsed().as_secs_f64();
        let acked = self.end(writing);
        self.check("on the survivor")?;
        let writing = self.writing()?;
        self.boot(dead)?;
        self.wait_in_sync()?;
        let (ledger, error) = writing.finish();
        self.ledger = ledger;
        if let Some(error) = error {
            return Err(failed(format!("a writer of the survivor met an error: {error}")));
        }
        self.check("after the return")?;
        Ok(format!("{acked} writes acknowledged, taken over after {took:.1} s"))
    }

    /// Writers at work on the primary.
    fn writing(&mut self) -> Result<Writing, VmError> {
        let ledger = std::mem::replace(&mut self.ledger, Ledger::new(0));
        let patience = PATIENCE.mul_f64(self.slowness());
        let writing = ledger.write_within(&self.uri(), self.rng.next_u64(), patience);
        self.wait_acked(&writing, ACKED_MIN)?;
        Ok(writing)
    }

    /// How many times slower than on a quiet machine the slower guest is.
    fn slowness(&mut self) -> f64 {
        let guests = self.nodes.iter_mut().filter_map(|node| node.guest.as_mut());
        guests.map(Guest::slowness).fold(1.0, f64::max)
    }

    fn wait_acked(&mut self, writing: &Writing, least: u64) -> Result<(), VmError> {
        let done = wait_while_moving(LIMITS.stretched(self.slowness()), || match writing.acked() {
            acked if acked >= least => Ok(()),
            acked => Err(acked),
        });
        done.map_err(|(over, acked)| {
            failed(format!("only {acked} of {least} writes were acknowledged: {over}"))
        })
    }

    /// Ends writers whose server is gone; the number of writes acknowledged.
    fn end(&mut self, writing: Writing) -> u64 {
        let acked = writing.acked();
        self.ledger = writing.finish().0;
        acked
    }

    fn check(&mut self, when: &str) -> Result<(), VmError> {
        let mut client = self.client()?;
        self.ledger.check(&mut client).map_err(|lost| failed(format!("{when}: {lost}")))
    }

    fn uri(&self) -> NbdUri {
        let address = self.nodes[self.primary].address;
        let endpoint = Endpoint::Tcp { host: address.ip().to_string(), port: address.port() };
        NbdUri { endpoint, export: VOLUME.to_owned() }
    }

    fn client(&mut self) -> Result<NbdClient, VmError> {
        let options = Options { timeout: PATIENCE.mul_f64(self.slowness()), ..Options::default() };
        let uri = self.uri();
        NbdClient::connect(&uri, &options).map_err(|error| failed(format!("connecting to {uri}: {error}")))
    }

    fn pause(&mut self, from_ms: u64, to_ms: u64) {
        std::thread::sleep(Duration::from_millis(from_ms + self.rng.below(to_ms - from_ms)));
    }

    /// Flushes, waits until nothing is under way, and compares the disks.
    fn settle_and_compare(&mut self) -> Result<(), VmError> {
        self.client()?.flush().map_err(|error| failed(format!("flushing: {error}")))?;
        self.wait_in_sync()?;
        let link = self.link.to_owned();
        self.wait(self.primary, "quiet", |status| {
            status.in_sync() && status.in_flight == 0 && status.dirty_bytes == 0 && status.link == link
        })?;
        self.compare()
    }

    fn cut(&mut self, node: usize) -> Result<(), VmError> {
        let Node { guest, state, .. } = &mut self.nodes[node];
        *state = None;
        guest.take().expect("it has power").pull_the_plug()
    }

    fn order(&mut self, node: usize, order: &str) -> Result<(), VmError> {
        let guest = self.nodes[node].guest.as_ref().expect("it has power");
        let path = guest.share().join("orders");
        let file = File::options().append(true).create(true).open(&path);
        let written = file.and_then(|mut file| writeln!(file, "{order}"));
        written.map_err(io_error(format!("writing {}", path.display())))?;
        self.nodes[node].orders += 1;
        Ok(())
    }

    fn promote(&mut self, node: usize) -> Result<(), VmError> {
        let patience = Patience::new(LIMITS.stretched(self.slowness()), Instant::now());
        loop {
            self.order(node, PROMOTE)?;
            let number = self.nodes[node].orders;
            let answer = self.until(node, "an answer", |node| {
                let found = node.answers.iter().find_map(|answer| answer.strip_prefix(&format!("{number} ")));
                found.map(str::to_owned)
            })?;
            if answer == "ok" {
                self.primary = node;
                return Ok(());
            }
            if let Some(over) = patience.over(Instant::now()) {
                return Err(failed(format!("{} is not promoted ({over}): {answer}", PAIR[node].0)));
            }
        }
    }

    /// The node that serves; where none does, `candidate` is promoted.
    fn serving(&mut self, candidate: usize) -> Result<usize, VmError> {
        let role = |node: &Node| node.state.as_ref().map(|state| state.role.clone());
        if let Some(found) = (0..2).find(|&node| role(&self.nodes[node]).as_deref() == Some("primary")) {
            return Ok(found);
        }
        self.promote(candidate)?;
        Ok(candidate)
    }

    fn wait_in_sync(&mut self) -> Result<(), VmError> {
        for node in 0..2 {
            self.wait(node, "in sync", VolumeStatus::in_sync)?;
        }
        Ok(())
    }

    fn wait(
        &mut self,
        node: usize,
        what: &str,
        wanted: impl Fn(&VolumeStatus) -> bool,
    ) -> Result<(), VmError> {
        self.until(node, what, |node| node.state.as_ref().filter(|state| wanted(state)).map(drop))
    }

    /// Listens to both nodes until `look` finds something in one.
    fn until<T>(&mut self, node: usize, what: &str, look: impl Fn(&Node) -> Option<T>) -> Result<T, VmError> {
        let mut patience = Patience::new(LIMITS.stretched(self.slowness()), Instant::now());
        loop {
            for node in &mut self.nodes {
                if node.listen()? {
                    patience.moved(Instant::now());
                }
            }
            if let Some(found) = look(&self.nodes[node]) {
                return Ok(found);
            }
            if let Some(over) = patience.over(Instant::now()) {
                let seen = [&self.nodes[0].state, &self.nodes[1].state];
                return Err(failed(format!(
                    "waited in vain for {what} of {}: {over}; the nodes say {seen:?}",
                    PAIR[node].0
                )));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn boot(&mut self, node: usize) -> Result<(), VmError> {
        let (name, _) = PAIR[node];
        let socket = |node: usize| self.sockets.path().join(PAIR[node].0);
        let mut settings = Settings::new(name, &self.script(node));
        settings.node = u8::try_from(node + 1).expect("1 or 2");
        settings.memory_mib = 1024;
        settings.wire = Some(Wire { own: socket(node), other: socket(1 - node) });
        settings.forward = Some(self.nodes[node].address);
        settings.disks = vec![self.nodes[node].disk.clone()];
        // Orders of before the cut are not for this boot.
        let _ = std::fs::remove_file(self.run.join(name).join("share/orders"));
        let guest = Guest::boot(self.rig, self.run, &settings)?;
        let booted = &mut self.nodes[node];
        (booted.guest, booted.state, booted.orders) = (Some(guest), None, 0);
        booted.answers.clear();
        Ok(())
    }

    /// What a guest does: the daemon, for as long as its agent is not ordered to stop.
    fn script(&self, node: usize) -> String {
        let (name, _) = PAIR[node];
        let quoted_path = |path: PathBuf| quoted(&path.display().to_string());
        let costandby = quoted_path(self.rig.program("costandby"));
        let own = quoted_path(self.rig.program("costandby-vm"));
        format!(
            "/bin/busybox modprobe virtio_blk\n\
             cat >/run/pair.toml <<'END'\n{}END\n\
             costandby() {{ {costandby} --config /run/pair.toml --node {name} \"$@\"; }}\n\
             if [ ! -e /share/created ]; then costandby create --zero >/share/daemon.log 2>&1 || exit; touch /share/created; fi\n\
             export COSTANDBY_LOG=info\n\
             {costandby} --config /run/pair.toml --node {name} up >>/share/daemon.log 2>&1 &\n\
             daemon=$!\n\
             until [ -S /run/{name}.sock ]; do sleep 0.1; kill -0 $daemon 2>/dev/null || exit 1; done\n\
             {own} agent {name} /run/{name}.sock /share/orders || exit\n\
             kill -TERM $daemon\n\
             wait $daemon\n",
            self.configuration()
        )
    }

    fn configuration(&self) -> String {
        let nodes = [0, 1].map(|node| {
            let (name, address) = PAIR[node];
            // As the guest's settings say it.
            let inner = format!("10.0.2.{}", 16 + node);
            format!(
                "[nodes.{name}]\nlisten = \"{address}:7790\"\nadmin = \"/run/{name}.sock\"\n\
                 nbd = [\"tcp:{inner}:{FORWARDED_PORT}\"]\n"
            )
        });
        format!(
            "insecure = true\npeer_timeout = \"2s\"\n{}{}[volumes.{VOLUME}]\nsize = \"{SIZE_MIB}MiB\"\n\
             primary = \"alpha\"\nlink = \"{}\"\ndisk.alpha = \"/dev/vda\"\ndisk.beta = \"/dev/vda\"\n",
            nodes[0], nodes[1], self.link
        )
    }

    /// Compares the volumes in both disks' files, byte for byte.
    fn compare(&self) -> Result<(), VmError> {
        let read = |node: &Node| {
            let mut bytes = Vec::new();
            let file =
                File::open(&node.disk).and_then(|file| file.take(SIZE_MIB << 20).read_to_end(&mut bytes));
            file.map_err(io_error(format!("reading {}", node.disk.display())))?;
            Ok(bytes)
        };
        let (alpha, beta) = (read(&self.nodes[0])?, read(&self.nodes[1])?);
        match alpha.iter().zip(&beta).position(|(alpha, beta)| alpha != beta) {
            None => Ok(()),
            Some(at) => Err(failed(format!(
                "the disks differ at byte {at}: alpha has {:#x}, beta {:#x}",
                alpha[at], beta[at]
            ))),
        }
    }
}

impl Node {
    /// Takes in what its guest has said; whether that was anything.
    fn listen(&mut self) -> Result<bool, VmError> {
        let Some(guest) = &mut self.guest else { return Ok(false) };
        let said = guest.said()?;
        let any = !said.is_empty();
        for line in said {
            if let Some(state) = line.strip_prefix(STATE) {
                let state =
                    serde_json::from_str(state).map_err(|error| failed(format!("{error}: {line}")))?;
                self.state = Some(state);
            } else if let Some(answer) = line.strip_prefix(ORDER) {
                self.answers.push(answer.to_owned());
            }
        }
        Ok(any)
    }
}

fn failed(what: String) -> VmError {
    VmError::Failed(what)
}

fn apart(status: &VolumeStatus) -> bool {
    status.connection != "connected"
}
