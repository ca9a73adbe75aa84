//! The reactor's part of a node: one [`Volume`] turned in virtual time.
//!
//! [`World::turn`] stands beside `Reactor::turn` (datapath/src/reactor/mod.rs) and does the same in the same order, with
//! the simulator's clock, queues and disk jobs in place of the system's; keep the two comparable line by line.

use super::checker::{FlushAsked, NAMES, Verdict};
use super::client::OpId;
use super::clock::{MS, Nanos, US};
use super::storage::FlushBegun;
use super::world::{Event, Input, World};
use costandby_datapath::disk::image::DiskError;
use costandby_datapath::disk::worker::{Job, JobDone, JobKind};
use costandby_datapath::reactor::command::{Command, Event as ReactorEvent};
use costandby_datapath::transport::DownReason;
use costandby_datapath::volume::{Notice, Origin, Volume};
use crossbeam_channel::Receiver;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The peers' timeout, as configured by default.
const PEER_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest sleep of a reactor with nothing to do.
const STALL_CHECK: Nanos = 1000 * MS;

/// A disk call under way.
pub(super) struct Calling {
    job: Job,
    begun: Option<(FlushBegun, Option<FlushAsked>)>,
}

/// The reactor of one process.
pub(super) struct Reactor {
    pub(super) volume: Volume,
    jobs: Receiver<Job>,
    calls: BTreeMap<u64, Calling>,
    calls_begun: u64,
    pub(super) jobs_done: VecDeque<JobDone>,
    pub(super) commands: VecDeque<(Nanos, Command)>,
    pub(super) operations: VecDeque<OpId>,
    pub(super) full: bool,
    /// The last turn found something to do: the next follows at once.
    busy: bool,
    next_deadline: Nanos,
    pub(super) turn_at: Option<Nanos>,
    /// Held up until then, as by a page fault on a slow disk.
    pub(super) held_until: Nanos,
}

impl Reactor {
    pub(super) fn new(volume: Volume, jobs: Receiver<Job>) -> Self {
        Self {
            volume,
            jobs,
            calls: BTreeMap::new(),
            calls_begun: 0,
            jobs_done: VecDeque::new(),
            commands: VecDeque::new(),
            operations: VecDeque::new(),
            full: false,
            busy: true,
            next_deadline: 0,
            turn_at: None,
            held_until: 0,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.busy
            && self.calls.is_empty()
            && self.jobs_done.is_empty()
            && self.commands.is_empty()
            && self.operations.is_empty()
            && self.volume.counters().in_flight.load(std::sync::atomic::Ordering::Relaxed) == 0
    }
}

impl World {
    /// The reactor of `at` looks at everything at `time` at the latest.
    pub(super) fn wake(&mut self, at: usize, time: Nanos) {
        let now = self.now();
        let Some(reactor) = self.reactor(at) else { return };
        let time = time.max(now).max(reactor.held_until);
        if reactor.turn_at.is_none_or(|turn| turn > time) {
            reactor.turn_at = Some(time);
            let life = self.nodes[at].life;
            self.agenda.at(time, Event::Turn { at, life });
        }
    }

    /// One turn of the reactor.
    pub(super) fn turn(&mut self, at: usize) -> Verdict {
        let now = self.now();
        match self.reactor(at) {
            Some(reactor) if reactor.turn_at == Some(now) && reactor.held_until <= now => {
                reactor.turn_at = None;
            }
            _ => return Ok(()),
        }
        let instant = self.nodes[at].skew.instant(now);
        self.volume(at).woke(instant);
        let mut any = self.take_commands(at)?;
        if self.serve_queue(at)? {
            any = true;
            self.volume(at).pump(instant);
        }
        while let Some(done) = self.live(at).jobs_done.pop_front() {
            self.volume(at).job_done(done);
            any = true;
        }
        any |= self.volume(at).poll(instant);
        any |= self.deliver_notices(at)?;
        self.volume(at).pump(instant);
        any |= self.deliver_notices(at)?;
        self.take_jobs(at);
        any |= self.report(at);
        if now >= self.live(at).next_deadline {
            any |= self.keep_time(at);
        }
        self.deliver_wakes();
        let next = self.live(at).next_deadline;
        let skew = self.nodes[at].skew;
        let due = self.volume(at).due().map_or(next, |due| skew.when(due).max(now + US));
        let next = next.min(due);
        let soon = now + US + self.rng.below(5 * US);
        let again = any || self.volume(at).has_backlog();
        self.live(at).busy = again;
        self.wake(at, if again { soon } else { next });
        self.marked(at)
    }

    fn take_commands(&mut self, at: usize) -> Result<bool, super::Violation> {
        let now = self.now();
        let mut any = false;
        while self.live(at).commands.front().is_some_and(|(due, _)| *due <= now) {
            let (_, command) = self.live(at).commands.pop_front().expect("just seen");
            self.command(at, command)?;
            any = true;
        }
        if let Some((due, _)) = self.live(at).commands.front() {
            let due = *due;
            self.wake(at, due);
        }
        Ok(any)
    }

    fn command(&mut self, at: usize, command: Command) -> Verdict {
        let now = self.now();
        let instant = self.nodes[at].skew.instant(now);
        match command {
            Command::Session { before, link, direction, epoch, .. } => {
                self.tell(at, format_args!("session begins: {direction:?}, epoch {epoch}, {before:?}"));
                self.volume(at).attach_after(before, link, direction, epoch, instant);
                self.live(at).next_deadline = now;
            }
            Command::Direct { direction, epoch, .. } => {
                self.tell(at, format_args!("direction {direction:?}, epoch {epoch}"));
                self.volume(at).direct(direction, epoch);
            }
            Command::CloseLink { reason, .. } => self.volume(at).close_link(DownReason::Local(reason)),
            Command::Serve { .. } => {
                self.tell(at, format_args!("serves"));
                self.volume(at).serve();
            }
            Command::Refusal { text, .. } => self.volume(at).set_refusal(text),
            Command::StopServing { .. } => {
                self.tell(at, format_args!("stops serving"));
                self.volume(at).stop_serving();
                self.deliver_notices(at)?;
                self.end_payloads(at);
            }
            Command::GoAlone { .. } => {
                self.tell(at, format_args!("goes alone"));
                self.volume(at).go_alone();
            }
            Command::MarkAll { done, .. } => self.volume(at).mark_all(done),
            Command::Verify { repair, .. } => self.volume(at).verify(repair),
            Command::StopVerify { .. } => self.volume(at).stop_verify(),
            Command::PeerInSync { .. } => self.volume(at).peer_in_sync(),
            Command::SendPeer { code, arg, .. } => self.volume(at).send_peer(code, arg),
            Command::Quiesce { .. } => {
                self.tell(at, format_args!("quiesces"));
                self.end_payloads(at);
                self.volume(at).quiesce();
            }
            // Disks here are of memory, which nothing takes the place of.
            Command::Detach { .. }
            | Command::Attach { .. }
            | Command::AddVolume { .. }
            | Command::Absent { .. }
            | Command::Listen { .. }
            | Command::Shutdown => {
                panic!("the simulator gives no such command")
            }
        }
        Ok(())
    }

    /// Tells clients what the volume has for them.
    fn deliver_notices(&mut self, at: usize) -> Result<bool, super::Violation> {
        let mut any = false;
        while !self.volume(at).notices.is_empty() {
            any = true;
            let notices = std::mem::take(&mut self.volume(at).notices);
            for notice in notices {
                match notice {
                    Notice::Granted { origin: Origin::Queue { slot, .. }, token } => {
                        self.go(at, OpId(slot), token)?;
                    }
                    Notice::Done { origin: Origin::Queue { slot, .. }, result } => {
                        self.live(at).full = false;
                        self.op_done(OpId(slot), result)?;
                    }
                    // Reads here end where they begin, and never keep a pin.
                    Notice::Unpin { .. } => {}
                    other => panic!("{other:?} is for nobody here"),
                }
            }
        }
        Ok(any)
    }

    /// Starts the disk calls that were asked for.
    fn take_jobs(&mut self, at: usize) {
        while let Ok(job) = self.live(at).jobs.try_recv() {
            let Some(job) = self.metadata_job(at, job) else { continue };
            let (now, record) = (self.now(), self.record(at));
            let flushes = matches!(job.kind, JobKind::Flush);
            let begun = flushes
                .then(|| (self.nodes[at].disk.begin_flush(), self.checker.flush_begins(now, at, record)));
            let mut takes = self.disk_call_takes(at);
            if self.nodes[at].flushes_slow_until > self.now() {
                takes += self.rng.below(800 * MS);
            }
            self.tell(at, format_args!("disk call {:?} takes {} µs", job.kind, takes / US));
            let reactor = self.live(at);
            reactor.calls_begun += 1;
            let call = reactor.calls_begun;
            reactor.calls.insert(call, Calling { job, begun });
            let life = self.nodes[at].life;
            self.agenda.at(self.now() + takes, Event::Call { at, life, call });
        }
    }

    /// A disk call ends.
    pub(super) fn call_ends(&mut self, at: usize, call: u64) {
        let Some(Calling { job, begun }) = self.live(at).calls.remove(&call) else { return };
        let image = std::sync::Arc::clone(&self.nodes[at].disk.image);
        let result = job.kind.carry_out(&image, None);
        if let (Some((begun, flush)), Ok(())) = (begun, &result) {
            self.nodes[at].disk.end_flush(&begun);
            self.checker.flush_ended(flush.as_ref());
        }
        let result = if std::mem::take(&mut self.nodes[at].call_fails) && result.is_ok() {
            image.fail();
            Err(DiskError::Poisoned { path: "simulated".into() })
        } else {
            result
        };
        self.live(at).jobs_done.push_back(JobDone { volume: 0, kind: job.kind, token: job.token, result });
        let now = self.now();
        self.wake(at, now);
    }

    /// The process ends in the middle of its calls: the kernel may still carry them out.
    pub(super) fn abandon_calls(&mut self, at: usize) {
        let calls = std::mem::take(&mut self.live(at).calls);
        for Calling { job, .. } in calls.into_values() {
            let image = std::sync::Arc::clone(&self.nodes[at].disk.image);
            let done = self.rng.below(2) == 0;
            if done && !matches!(job.kind, JobKind::Flush) {
                let _ = job.kind.carry_out(&image, None);
            }
        }
    }

    fn report(&mut self, at: usize) -> bool {
        let events = std::mem::take(&mut self.volume(at).events);
        let any = !events.is_empty();
        for event in events {
            if let ReactorEvent::DiskFailed { .. } = event {
                let now = self.now();
                self.disturb();
                self.checker.gave_up(now, at);
            }
            self.post_input(at, Input::Reactor(event));
        }
        any
    }

    fn keep_time(&mut self, at: usize) -> bool {
        let now = self.now();
        let skew = self.nodes[at].skew;
        let mut any = false;
        let mut next = now + STALL_CHECK;
        if let Some(deadline) = self.volume(at).keep_alive(skew.instant(now), PEER_TIMEOUT) {
            let deadline = skew.when(deadline);
            next = next.min(deadline.max(now + US));
            if deadline <= now + US {
                any |= self.volume(at).poll(skew.instant(now));
            }
        }
        self.live(at).next_deadline = next;
        any
    }

    /// Wakes whoever something is on its way to.
    pub(super) fn deliver_wakes(&mut self) {
        let wakes = std::mem::take(&mut super::network::lock(&self.ether).wakes);
        for (at, due) in wakes {
            self.wake(at, due);
        }
    }

    pub(super) fn reactor(&mut self, at: usize) -> Option<&mut Reactor> {
        self.nodes[at].process.as_mut().map(|process| &mut process.reactor)
    }

    pub(super) fn live(&mut self, at: usize) -> &mut Reactor {
        self.reactor(at).unwrap_or_else(|| panic!("{} is up", NAMES[at]))
    }

    pub(super) fn volume(&mut self, at: usize) -> &mut Volume {
        &mut self.live(at).volume
    }
}
