//! The pool of threads: bounds, order, and disks that hang.

use super::*;
use crate::disk::activity_log::{ActivityLog, Touch};
use crate::disk::metadata::layout::Geometry;
use crate::units::{ByteRange, Token};
use crossbeam_channel::{Receiver, unbounded};
use std::time::Instant;

/// Longest a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a test looks for something that must not come.
const WHILE: Duration = Duration::from_millis(100);

/// A disk whose calls wait for a word each.
#[derive(Debug)]
struct Held {
    begun: Sender<&'static str>,
    go: Receiver<()>,
}

impl Calls for Held {
    fn carry_out(&self, kind: &JobKind) -> Result<(), DiskError> {
        let name = if kind.is_of_record() { "record" } else { "data" };
        let _ = self.begun.send(name);
        // The test that ends lets go of all.
        let _ = self.go.recv();
        Ok(())
    }
}

/// A disk that answers at once.
#[derive(Debug)]
struct Quick;

impl Calls for Quick {
    fn carry_out(&self, _: &JobKind) -> Result<(), DiskError> {
        Ok(())
    }
}

struct Pool {
    pool: WorkerPool,
    done: Receiver<JobDone>,
}

impl Pool {
    fn new() -> Self {
        Self::with_idle(PATIENCE)
    }

    fn with_idle(idle: Duration) -> Self {
        let (sender, done) = unbounded();
        Self { pool: WorkerPool::with_idle(&sender, &Waker::new().expect("bell"), idle), done }
    }

    /// A disk, what it says of each call that begins, and what lets one end.
    fn held(&self, volume: usize) -> (usize, Receiver<&'static str>, Sender<()>) {
        let ((begun, begins), (let_go, go)) = (unbounded(), unbounded());
        (self.pool.add(volume, Arc::new(Held { begun, go })), begins, let_go)
    }

    fn submit(&self, disk: usize, kind: JobKind, token: u64) {
        self.pool.submit(disk, Job { kind, token: Token(token) });
    }

    fn done(&self) -> (usize, u64) {
        let done = self.done.recv_timeout(PATIENCE).expect("a job ends");
        done.result.expect("no fault was planted");
        (done.volume, done.token.0)
    }

    fn wait_threads(&self, what: &str, wanted: impl Fn(usize) -> bool) {
        let began = Instant::now();
        while !wanted(self.pool.threads()) {
            assert!(began.elapsed() < PATIENCE, "{what}: {} threads", self.pool.threads());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn record() -> JobKind {
    let geometry = Geometry::for_volume(64 << 20).expect("usual");
    let mut log = ActivityLog::new(geometry, 1, 0);
    assert!(matches!(log.touch(ByteRange::new(0, 4096)), Touch::Wait(_)));
    JobKind::Commit(log.next_transaction().expect("a cold extent was touched"))
}

#[test]
fn a_disk_that_hangs_keeps_its_share_of_threads_and_no_other_disks() {
    let pool = Pool::new();
    let (hung, begins, let_go) = pool.held(7);
    for token in 0..20 {
        pool.submit(hung, JobKind::Flush, token);
    }
    for _ in 0..DISK_WORKERS {
        assert_eq!(begins.recv_timeout(PATIENCE), Ok("data"));
    }
    pool.submit(hung, record(), 20);
    assert_eq!(begins.recv_timeout(PATIENCE), Ok("record"), "a store does not wait behind calls on data");
    assert!(begins.recv_timeout(WHILE).is_err(), "more calls at once than the disk's share");
    let others: Vec<_> = (0..8).map(|volume| pool.pool.add(volume, Arc::new(Quick))).collect();
    for round in 0..50 {
        for (volume, &disk) in others.iter().enumerate() {
            pool.submit(disk, if round % 2 == 0 { JobKind::Flush } else { record() }, round);
            assert_eq!(pool.done(), (volume, round), "another disk waits for the one that hangs");
        }
    }
    assert!(pool.pool.threads() <= DISK_WORKERS + 1 + 2, "{} threads", pool.pool.threads());
    drop(let_go);
    let mut ended: Vec<_> = (0..=20).map(|_| pool.done()).collect();
    ended.sort_unstable();
    assert_eq!(ended, (0..=20).map(|token| (7, token)).collect::<Vec<_>>());
    for disk in others.into_iter().chain([hung]) {
        pool.pool.remove(disk);
    }
}

#[test]
fn every_disk_may_hang_at_once_but_one() {
    let pool = Pool::new();
    let hung: Vec<_> = (0..40).map(|volume| pool.held(volume)).collect();
    for (disk, begins, _) in &hung {
        for token in 0..4 {
            pool.submit(*disk, JobKind::Flush, token);
        }
        for _ in 0..DISK_WORKERS {
            assert_eq!(begins.recv_timeout(PATIENCE), Ok("data"));
        }
    }
    let quick = pool.pool.add(99, Arc::new(Quick));
    pool.submit(quick, JobKind::Flush, 1);
    assert_eq!(pool.done(), (99, 1));
    let most = 40 * DISK_WORKERS + 2;
    assert!(pool.pool.threads() <= most, "{} threads, {most} at most", pool.pool.threads());
    for (disk, _, let_go) in hung {
        drop(let_go);
        pool.pool.remove(disk);
    }
    assert_eq!(pool.done.len(), 40 * 4);
}

#[test]
fn stores_of_one_record_are_made_in_order_one_at_a_time() {
    let pool = Pool::new();
    let (disk, begins, let_go) = pool.held(0);
    for token in 0..30 {
        pool.submit(disk, record(), token);
    }
    for token in 0..30 {
        assert_eq!(begins.recv_timeout(PATIENCE), Ok("record"));
        let looks = if token == 0 { WHILE } else { Duration::ZERO };
        assert!(begins.recv_timeout(looks).is_err(), "two stores of one record at a time");
        let_go.send(()).expect("the disk is there");
        assert_eq!(pool.done(), (0, token));
    }
    pool.pool.remove(disk);
}

#[test]
fn a_disk_that_is_dropped_has_done_its_jobs_and_is_let_go_of() {
    let pool = Pool::new();
    let (disk, begins, let_go) = pool.held(0);
    for token in 0..6 {
        pool.submit(disk, JobKind::Flush, token);
    }
    let waiting = {
        let pool = pool.pool.clone();
        std::thread::spawn(move || pool.remove(disk))
    };
    assert_eq!(begins.recv_timeout(PATIENCE), Ok("data"));
    std::thread::sleep(WHILE);
    assert!(!waiting.is_finished(), "a disk is let go of while calls on it are under way");
    for _ in 0..6 {
        let_go.send(()).expect("the disk is there");
    }
    waiting.join().expect("no panic");
    assert_eq!(pool.done.len(), 6);
    assert!(let_go.send(()).is_err(), "the pool still has the disk");
}

#[test]
fn threads_that_nobody_needs_end_but_one_and_that_one_with_the_pool() {
    let pool = Pool::with_idle(WHILE);
    let (disk, begins, let_go) = pool.held(0);
    for token in 0..2 {
        pool.submit(disk, JobKind::Flush, token);
        assert_eq!(begins.recv_timeout(PATIENCE), Ok("data"));
    }
    pool.wait_threads("two work and one is free", |threads| threads == 3);
    drop(let_go);
    for _ in 0..2 {
        let _ = pool.done();
    }
    pool.wait_threads("one is left", |threads| threads == 1);
    std::thread::sleep(2 * WHILE);
    pool.wait_threads("that one stays", |threads| threads == 1);
    pool.pool.remove(disk);
    let threads = Arc::downgrade(&pool.pool.open.shared);
    drop(pool);
    let began = Instant::now();
    while threads.strong_count() > 0 {
        assert!(began.elapsed() < PATIENCE, "{} threads live on", threads.strong_count());
        std::thread::sleep(Duration::from_millis(1));
    }
}
