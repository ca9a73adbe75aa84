//! Which cases a run goes through, in which order, and what each is held against.
//!
//! Ids are stable: records of different commits are compared by them.

use crate::floor::{self, Wait};
use crate::histogram::Summary;
use crate::idle;
use crate::inproc::{self, Backing, Via};
use crate::nbd::{self, Mirror};
use crate::qemu::{self, Hop, Quorum};
use crate::report::{Against, Idle, Machine, Measure, Report, Row};
use crate::resync::{self, Measured};
use crate::{Outcome, RunArgs};
use costandby_datapath::units::PollMode;
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::time::Duration;
use tempfile::TempDir;

#[cfg(feature = "rdma")]
mod rdma;

/// Bytes of the small payload: the block size of most databases and file systems.
const SMALL: usize = 4096;
const MIDDLE: usize = 64 << 10;
const LARGE: usize = 1 << 20;

/// Where the floor's two ends meet.
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Large writes under way at a time: enough to keep a link busy while one is being acknowledged.
const STREAM_DEPTH: usize = 8;

/// Bytes of the volume of the idle check.
const IDLE_DISK_LEN: u64 = 64 << 30;

/// The ways qemu can do it: by hop and file access, ids and titles at 1 and at 32.
const QUORUMS: [(Hop, &str, [&str; 2], [&str; 2]); 4] = [
    (
        Hop::Unix,
        "threads",
        ["qemu-unix-threads-4k-1", "qemu-unix-threads-4k-32"],
        ["qemu quorum 4 KiB x1, unix, threads", "qemu quorum 4 KiB x32, unix, threads"],
    ),
    (
        Hop::Tcp,
        "threads",
        ["qemu-tcp-threads-4k-1", "qemu-tcp-threads-4k-32"],
        ["qemu quorum 4 KiB x1, TCP, threads", "qemu quorum 4 KiB x32, TCP, threads"],
    ),
    (
        Hop::Unix,
        "io_uring",
        ["qemu-unix-uring-4k-1", "qemu-unix-uring-4k-32"],
        ["qemu quorum 4 KiB x1, unix, io_uring", "qemu quorum 4 KiB x32, unix, io_uring"],
    ),
    (
        Hop::Tcp,
        "io_uring",
        ["qemu-tcp-uring-4k-1", "qemu-tcp-uring-4k-32"],
        ["qemu quorum 4 KiB x1, TCP, io_uring", "qemu quorum 4 KiB x32, TCP, io_uring"],
    ),
];

/// Our daemons: by poll mode, ids and titles at 1 and at 32.
const MIRRORS: [(&str, [&str; 2], [&str; 2]); 2] = [
    (
        "adaptive",
        ["nbd-adaptive-4k-1", "nbd-adaptive-4k-32"],
        ["costandby NBD 4 KiB x1, TCP, adaptive", "costandby NBD 4 KiB x32, TCP, adaptive"],
    ),
    (
        "event",
        ["nbd-event-4k-1", "nbd-event-4k-32"],
        ["costandby NBD 4 KiB x1, TCP, event", "costandby NBD 4 KiB x32, TCP, event"],
    ),
];

/// One case.
pub(crate) struct Case {
    pub(crate) row: Row,
    /// Measures for this long.
    pub(crate) run: Box<dyn FnMut(Duration) -> Outcome<Summary>>,
}

/// All cases of a run and what they share.
pub(crate) struct Plan {
    pub(crate) cases: Vec<Case>,
    idle: Vec<Idle>,
    skipped: Vec<String>,
    mirrors: Vec<Rc<Mirror>>,
    quorums: Vec<Rc<Quorum>>,
    only: Vec<String>,
    disk_len: u64,
    idle_time: Duration,
    /// Whether and how long the resync is looked at.
    resync_time: Option<Duration>,
    directory: TempDir,
}

impl Plan {
    /// No case yet.
    fn empty(args: &RunArgs) -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("costandby-bench").tempdir_in(&args.dir)?;
        Ok(Self {
            cases: Vec::new(),
            idle: Vec::new(),
            skipped: Vec::new(),
            mirrors: Vec::new(),
            quorums: Vec::new(),
            only: args.only.clone(),
            disk_len: if args.quick { 8 << 20 } else { args.disk_mib << 20 },
            idle_time: Duration::from_millis(if args.quick { 200 } else { 5000 }),
            resync_time: None,
            directory,
        })
    }

    /// Sets everything up.
    pub(crate) fn new(args: &RunArgs) -> Outcome<Self> {
        let mut plan = Self::empty(args)?;
        plan.add_busy();
        plan.add_sleeping();
        plan.add_streams();
        match nbd::fio_missing() {
            Some(missing) => plan.skipped.push(missing),
            None => {
                plan.add_nbd(args.quick)?;
                plan.resync_time = Some(Duration::from_millis(if args.quick { 50 } else { 2000 }));
            }
        }
        Ok(plan)
    }

    fn wanted(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| id.starts_with(prefix.as_str()))
    }

    fn add(
        &mut self,
        id: &'static str,
        title: &'static str,
        against: Option<Against>,
        run: impl FnMut(Duration) -> Outcome<Summary> + 'static,
    ) {
        if self.wanted(id) {
            let row = Row { id, title, against, rounds: Vec::new() };
            self.cases.push(Case { row, run: Box::new(run) });
        }
    }

    fn add_floor(
        &mut self,
        id: &'static str,
        title: &'static str,
        wait: Wait,
        depth: usize,
        payload_len: usize,
    ) {
        self.add(id, title, None, move |time| {
            floor::run(floor::Load { address: LOOPBACK, wait, depth, payload_len, time })
        });
    }

    fn add_inproc(&mut self, id: &'static str, title: &'static str, against: Against, load: Inproc) {
        let backing = if load.files { Backing::Files(self.directory.path().into()) } else { Backing::Memory };
        let disk_len = self.disk_len;
        let Inproc { via, poll, depth, payload_len, random, .. } = load;
        self.add(id, title, Some(against), move |time| {
            let backing = backing.clone();
            inproc::run(&inproc::Load { via, poll, depth, payload_len, random, backing, disk_len, time })
        });
    }

    fn add_busy(&mut self) {
        let small = Inproc {
            via: Via::LOOPBACK,
            poll: PollMode::Busy,
            depth: 1,
            payload_len: SMALL,
            random: true,
            files: false,
        };
        let deep = Inproc { depth: 32, ..small };
        let latency = |target| Against { ids: vec!["floor-busy-4k-1"], measure: Measure::P50, target };
        let rate = || Against { ids: vec!["floor-busy-4k-32"], measure: Measure::Iops, target: None };
        self.add_floor("floor-busy-4k-1", "floor 4 KiB x1, busy", Wait::Busy, 1, SMALL);
        self.add_inproc("inproc-busy-4k-1", "in process 4 KiB x1, busy, memory", latency(Some(1.2)), small);
        let files = Inproc { files: true, ..small };
        self.add_inproc("inproc-busy-4k-1-file", "in process 4 KiB x1, busy, files", latency(None), files);
        self.add_floor("floor-busy-4k-32", "floor 4 KiB x32, busy", Wait::Busy, 32, SMALL);
        self.add_inproc("inproc-busy-4k-32", "in process 4 KiB x32, busy, memory", rate(), deep);
        let files = Inproc { files: true, ..deep };
        self.add_inproc("inproc-busy-4k-32-file", "in process 4 KiB x32, busy, files", rate(), files);
    }

    fn add_sleeping(&mut self) {
        let adaptive = Inproc {
            via: Via::LOOPBACK,
            poll: PollMode::Adaptive,
            depth: 1,
            payload_len: SMALL,
            random: true,
            files: false,
        };
        let event = Inproc { poll: PollMode::Event, ..adaptive };
        let latency = || Against { ids: vec!["floor-sleep-4k-1"], measure: Measure::P50, target: None };
        let rate = || Against { ids: vec!["floor-sleep-4k-32"], measure: Measure::Iops, target: None };
        self.add_floor("floor-sleep-4k-1", "floor 4 KiB x1, sleeping", Wait::Sleep, 1, SMALL);
        self.add_inproc(
            "inproc-adaptive-4k-1",
            "in process 4 KiB x1, adaptive, 3 threads",
            latency(),
            adaptive,
        );
        self.add_inproc("inproc-event-4k-1", "in process 4 KiB x1, event, 3 threads", latency(), event);
        self.add_floor("floor-sleep-4k-32", "floor 4 KiB x32, sleeping", Wait::Sleep, 32, SMALL);
        let deep = |load| Inproc { depth: 32, ..load };
        self.add_inproc(
            "inproc-adaptive-4k-32",
            "in process 4 KiB x32, adaptive, 3 threads",
            rate(),
            deep(adaptive),
        );
        self.add_inproc("inproc-event-4k-32", "in process 4 KiB x32, event, 3 threads", rate(), deep(event));
    }

    fn add_streams(&mut self) {
        let busy = PollMode::Busy;
        let middle = Inproc {
            via: Via::LOOPBACK,
            poll: busy,
            depth: 1,
            payload_len: MIDDLE,
            random: true,
            files: false,
        };
        let latency = Against { ids: vec!["floor-busy-64k-1"], measure: Measure::P50, target: None };
        self.add_floor("floor-busy-64k-1", "floor 64 KiB x1, busy", Wait::Busy, 1, MIDDLE);
        self.add_inproc("inproc-busy-64k-1", "in process 64 KiB x1, busy, memory", latency, middle);
        let disk_len = usize::try_from(self.disk_len).expect("64-bit");
        self.add("floor-copy-1m", "floor: copying 1 MiB pieces in memory", None, move |time| {
            Ok(floor::memory_copy(LARGE, disk_len, time))
        });
        self.add_floor("floor-busy-1m-8", "floor 1 MiB x8, busy", Wait::Busy, STREAM_DEPTH, LARGE);
        let rate = Against { ids: vec!["floor-busy-1m-8"], measure: Measure::Rate, target: Some(0.9) };
        let large = Inproc {
            via: Via::LOOPBACK,
            poll: busy,
            depth: STREAM_DEPTH,
            payload_len: LARGE,
            random: false,
            files: false,
        };
        self.add_inproc("inproc-busy-1m-8", "in process 1 MiB x8 sequential, busy, memory", rate, large);
    }

    fn add_nbd(&mut self, quick: bool) -> Outcome<()> {
        let mut rivals: [Vec<&'static str>; 2] = [Vec::new(), Vec::new()];
        if let Some(missing) = qemu::missing() {
            self.skipped.push(missing);
        } else {
            for (hop, aio, ids, titles) in QUORUMS.into_iter().take(if quick { 1 } else { QUORUMS.len() }) {
                self.add_quorum(hop, aio, ids, titles)?;
                rivals[0].push(ids[0]);
                rivals[1].push(ids[1]);
            }
        }
        for (poll, ids, titles) in MIRRORS {
            if !ids.iter().any(|id| self.wanted(id)) {
                continue;
            }
            let directory = self.directory.path().join(poll);
            let mirror = Rc::new(Mirror::start(&directory, poll, self.disk_len, false)?);
            self.mirrors.push(Rc::clone(&mirror));
            let target = (poll == "adaptive").then_some(3.0);
            for (at, depth) in [1, 32].into_iter().enumerate() {
                let against = Against { ids: rivals[at].clone(), measure: Measure::Iops, target };
                let mirror = Rc::clone(&mirror);
                self.add(ids[at], titles[at], Some(against), move |time| {
                    nbd::random_writes(&mirror.uri, depth, time)
                });
            }
        }
        Ok(())
    }

    fn add_quorum(
        &mut self,
        hop: Hop,
        aio: &str,
        ids: [&'static str; 2],
        titles: [&'static str; 2],
    ) -> Outcome<()> {
        if !ids.iter().any(|id| self.wanted(id)) {
            return Ok(());
        }
        let directory = self.directory.path().join(ids[0]);
        let quorum = Rc::new(Quorum::start(&directory, hop, aio, self.disk_len)?);
        self.quorums.push(Rc::clone(&quorum));
        for (at, depth) in [1, 32].into_iter().enumerate() {
            let quorum = Rc::clone(&quorum);
            self.add(ids[at], titles[at], None, move |time| nbd::random_writes(&quorum.uri, depth, time));
        }
        Ok(())
    }

    /// The idle check, with everything else ended.
    fn look_at_idle(&mut self) -> Outcome<()> {
        if !self.wanted("idle") {
            return Ok(());
        }
        let mirror = Mirror::start(&self.directory.path().join("idle"), "adaptive", IDLE_DISK_LEN, true)?;
        for (daemon, role) in mirror.daemons.iter().zip(["primary", "standby"]) {
            let title = format!("idle 64 GiB volume, adaptive, {role}");
            self.idle.push(idle::look(&title, daemon, self.idle_time)?);
        }
        Ok(())
    }

    /// Checks the disks, ends what was set up, looks at an idle daemon.
    pub(crate) fn finish(mut self, machine: Machine) -> Outcome<Report> {
        for mirror in &self.mirrors {
            mirror.check()?;
        }
        let mut notes = Vec::new();
        for quorum in &self.quorums {
            // The peer's copies are its own affair: a quorum does not order overlapping writes between its children, so
            // 32 of them in flight at random places may end in two different disks. Worth telling, not worth failing.
            if let Err(error) = quorum.check() {
                notes.push(format!("the peer's two copies are not the same: {error}"));
            }
        }
        // The cases hold on to the processes too.
        for case in &mut self.cases {
            case.run = Box::new(|_| Err("the run is over".into()));
        }
        self.mirrors.clear();
        self.quorums.clear();
        self.look_at_idle()?;
        let mut rows: Vec<_> = self.cases.drain(..).map(|case| case.row).collect();
        let mut figures = Vec::new();
        if let Some(time) = self.resync_time.filter(|_| self.wanted(resync::ID)) {
            let Measured { rows: more, figures: found } =
                resync::measure(self.directory.path(), self.disk_len, time)?;
            rows.extend(more);
            figures = found;
        }
        Ok(Report { machine, rows, idle: self.idle, figures, skipped: self.skipped, notes })
    }
}

/// What tells the in-process cases apart.
#[derive(Clone, Copy)]
struct Inproc {
    via: Via,
    poll: PollMode,
    depth: usize,
    payload_len: usize,
    random: bool,
    files: bool,
}
