//! Many volumes on a node: they connect within seconds, on few threads and no more descriptors than the daemon says that it
//! needs; clients that take all they can get keep no operator and no peer out; too few descriptors are refused at the start.

use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::run_within;
use costandby_tests::{skip, wait_for};
use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Threads of a daemon with nothing to do but to open its disks: the reactor, the control thread, two of log and events, and
/// places for blocking calls, which a loaded machine hands to other threads before they are free.
const THREADS_MAX: usize = 250;

/// Descriptors that a daemon keeps for anything but NBD clients.
const fn set_aside(volumes: usize) -> usize {
    132 + 5 * volumes
}

fn volumes(count: usize) -> Settings {
    let volume = |number: usize| {
        let name: &'static str = Box::leak(format!("v{number}").into_boxed_str());
        VolumeSettings { primary: number % 2, ..VolumeSettings::new(name, 1) }
    };
    let mut settings = Settings::new(&(0..count).map(volume).collect::<Vec<_>>());
    settings.sparse = true;
    settings.peer_timeout = "3s";
    // A ring for RDMA is 44 MiB of locked memory.
    settings.link = "tcp";
    settings
}

/// `costandby` on a node, with these limits of open files. Its process becomes the program.
fn with_limits(pair: &Pair, node: usize, limits: &str, args: &[&str]) -> Command {
    let plain = pair.command(node);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{limits} && exec \"$0\" \"$@\"")).arg(plain.get_program());
    command.args(plain.get_args()).args(args);
    command
}

fn up_with_limits(pair: &mut Pair, node: usize, limits: &str) {
    let log = pair.path(&format!("{}.log", NODES[node]));
    let log = fs::File::options().append(true).create(true).open(log).expect("a log");
    let mut command = with_limits(pair, node, limits, &["up"]);
    command.env("COSTANDBY_LOG", "info").stdout(log.try_clone().expect("a log")).stderr(log);
    pair.up_by(node, &mut command);
}

fn entries(pair: &Pair, node: usize, what: &str) -> usize {
    fs::read_dir(format!("/proc/{}/{what}", pair.pid(node))).expect("a process").count()
}

/// Volumes that are in sync on both nodes.
fn in_sync(pair: &Pair) -> usize {
    let count = |node| {
        let status = pair.ask(node).ok()?;
        Some(status.volumes.iter().filter(|volume| volume.in_sync()).count())
    };
    [ALPHA, BETA].into_iter().filter_map(count).min().unwrap_or(0)
}

/// Starts both daemons and gives how long they took, and the most descriptors and threads that a node had meanwhile.
fn connect(pair: &mut Pair, count: usize, limit: Duration) -> (Duration, usize, usize) {
    let began = Instant::now();
    for node in [ALPHA, BETA] {
        up_with_limits(pair, node, "ulimit -Sn 1024");
    }
    let (mut descriptors, mut threads) = (0, 0);
    wait_for(&format!("all {count} volumes are in sync"), limit, || {
        for node in [ALPHA, BETA] {
            descriptors = descriptors.max(entries(pair, node, "fd"));
            threads = threads.max(entries(pair, node, "task"));
        }
        (in_sync(pair) == count).then_some(())
    });
    (began.elapsed(), descriptors, threads)
}

#[test]
fn three_hundred_volumes_connect_at_a_soft_limit_of_1024() {
    const COUNT: usize = 300;
    let mut pair = Pair::create(volumes(COUNT));
    let (took, descriptors, threads) = connect(&mut pair, COUNT, Duration::from_secs(20));
    println!("{COUNT} volumes: {took:?}, {descriptors} descriptors, {threads} threads");
    assert!(descriptors <= set_aside(COUNT), "{descriptors} descriptors, more than are set aside");
    assert!(threads <= THREADS_MAX, "{threads} threads");
    // Sessions begin side by side again, with what the old ones have not given back yet.
    pair.kill(BETA);
    up_with_limits(&mut pair, BETA, "ulimit -Sn 1024");
    wait_for("all volumes are in sync again", Duration::from_secs(20), || {
        (in_sync(&pair) == COUNT).then_some(())
    });
    for node in [ALPHA, BETA] {
        assert!(entries(&pair, node, "fd") <= set_aside(COUNT));
        pair.stop(node);
    }
}

/// Whether more wants to run on this machine than it has processors for, as far as the kernel's last minute tells.
fn is_busy() -> bool {
    let text = std::fs::read_to_string("/proc/loadavg").expect("the kernel tells");
    let load: f64 = text.split(' ').next().and_then(|load| load.parse().ok()).expect("a number");
    load > std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64)
}

#[test]
fn a_thousand_volumes_connect_within_ten_seconds() {
    const COUNT: usize = 1000;
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    if most.is_some_and(|most| most < 8192) {
        return skip("1,000 volumes need 6132 descriptors: ulimit -Hn 8192");
    }
    let mut pair = Pair::create(volumes(COUNT));
    let busy = is_busy();
    let (took, descriptors, threads) = connect(&mut pair, COUNT, Duration::from_secs(120));
    println!("{COUNT} volumes: {took:?}, {descriptors} descriptors, {threads} threads");
    // Beside other work the time is that work's.
    assert!(busy || is_busy() || took <= Duration::from_secs(10), "it took {took:?}");
    assert!(descriptors <= set_aside(COUNT), "{descriptors} descriptors, more than are set aside");
    assert!(threads <= THREADS_MAX, "{threads} threads");
    pair.stop(ALPHA);
    pair.stop(BETA);
}

#[test]
fn clients_that_take_all_they_can_get_keep_no_operator_and_no_peer_out() {
    let mut pair = Pair::create(volumes(2));
    up_with_limits(&mut pair, ALPHA, "ulimit -n 180");
    pair.up(BETA);
    pair.wait_in_sync("v0");
    pair.wait_in_sync("v1");
    // On a thread of its own, which waits where nobody accepts.
    let (socket, clients) = (pair.nbd_socket(ALPHA), Arc::new(Mutex::new(Vec::new())));
    let held = Arc::clone(&clients);
    std::thread::spawn(move || {
        for _ in 0..400 {
            let client = UnixStream::connect(&socket);
            held.lock().expect("nobody panics with it").extend(client);
        }
    });
    pair.wait_log(ALPHA, &["NBD client"]);
    let status = wait_for("status answers", Duration::from_secs(3), || pair.ask(ALPHA).ok());
    assert_eq!(status.volumes.len(), 2);
    assert!(pair.cli_ok(ALPHA, &["status"]).contains("v0"));
    // So does the peer have a session.
    pair.kill(BETA);
    pair.up(BETA);
    pair.wait_in_sync("v0");
    pair.wait_in_sync("v1");
    let log = pair.log(ALPHA);
    assert!(!log.contains("Too many open files"), "{log}");
    assert!(log.matches("and others are turned away until").count() <= 2, "it is said once: {log}");
    clients.lock().expect("nobody panics with it").clear();
    let mut client = wait_for("a client has a place", LIMIT, || pair.connect(ALPHA, "v0").ok());
    client.write(0, &[7; 4096], false).expect("a client is served");
    drop(client);
    pair.settle_and_compare("v0");
}

#[test]
fn a_daemon_with_too_few_descriptors_says_how_many_and_ends() {
    let pair = Pair::create(volumes(100));
    let said = run_within(&mut with_limits(&pair, ALPHA, "ulimit -n 256", &["up"]), Duration::from_secs(10));
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let parts = [
        "node alpha needs 732: 132 of its own, 500 for 100 volumes and 100 for NBD clients",
        "gives this process 256 descriptors",
        "LimitNOFILE=65536",
        "ulimit -n 65536",
    ];
    for part in parts {
        assert!(said.stderr.contains(part), "{}", said.stderr);
    }
    assert_eq!(said.stderr.trim_end().lines().count(), 1, "{}", said.stderr);
    assert!(!pair.path("alpha.sock").exists() && !pair.nbd_socket(ALPHA).exists(), "nothing was begun");
    let told =
        run_within(&mut with_limits(&pair, ALPHA, "ulimit -n 256", &["doctor"]), Duration::from_secs(20));
    assert!(told.stdout.contains("node alpha needs 732"), "{}", told.stdout);
    let told =
        run_within(&mut with_limits(&pair, ALPHA, "ulimit -n 800", &["doctor"]), Duration::from_secs(20));
    assert!(told.stdout.contains("800 leave only 168 for NBD connections"), "{}", told.stdout);
}
