//! The only loop of a node: poll, handle, act. One thread owns every volume, link and client connection.
//!
//! One owner instead of tasks and locks: a request crosses no thread on its way from the client's socket to the peer's
//! ring, and order needs no argument. The price is that whatever blocks must be elsewhere: flushes and hole punching are
//! on the disks' worker threads, handshakes with peers and every decision about roles in control.
//!
//! A turn looks once at everything that is awake ([`awake`]): a volume of which nothing was heard for a moment rests, so that
//! a node of a thousand volumes turns as fast as one of those that are in use. A turn that found nothing precedes each sleep.
//! How long the loop turns without work before it sleeps is the [`PollMode`]'s matter.

use crate::disk::pool::WorkerPool;
use crate::disk::worker::{DiskWorkers, JobDone};
use crate::front::nbd::connection::Connection;
use crate::front::nbd::linger::Lingering;
use crate::front::nbd::memory::ClientMemory;
use crate::front::queue::QueueServer;
use crate::limits::CONNECTIONS_MAX;
use crate::transport::{DownReason, Link};
use crate::units::PollMode;
use crate::volume::{Notice, Origin, Volume};
use crate::waker::Waker;
use awake::Awake;
use command::{Command, Event, VolumeCounters, VolumeSpec};
use crossbeam_channel::{Receiver, Sender};
use queues::Queue;
use rustix::event::epoll::{self, EventData, EventFlags};
use spin::SpinBudget;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

mod awake;
mod clients;
pub mod command;
mod queues;
pub mod spin;

/// How a reactor is set up.
#[derive(Debug)]
pub struct ReactorConfig {
    /// How it waits.
    pub poll: PollMode,
    /// Silence after which a peer counts as gone.
    pub peer_timeout: Duration,
    /// Bound, listening, non-blocking NBD sockets. [`Command::Listen`] adds some later.
    pub nbd_listeners: Vec<OwnedFd>,
}

/// Control's handle to a running reactor.
#[derive(Debug, Clone)]
pub struct ReactorHandle {
    commands: Sender<Command>,
    waker: Waker,
    /// Of each volume, by its index.
    counters: Arc<Mutex<Vec<Arc<VolumeCounters>>>>,
}

impl ReactorHandle {
    /// Hands a command over. Does not block. A reactor that has ended ignores it.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.waker.wake();
    }

    /// The reactor's doorbell, for in-process queues.
    #[must_use]
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Hands one more volume over, and gives its index, which other commands may name at once. Does not block.
    pub fn add_volume(&self, spec: VolumeSpec) -> usize {
        let counters = Arc::new(VolumeCounters::default());
        // Locked until the command is queued, as the reactor counts in the order of the commands.
        let mut known = self.known();
        known.push(Arc::clone(&counters));
        self.send(Command::AddVolume { spec: Box::new(spec), counters });
        known.len() - 1
    }

    /// The counters of a volume.
    ///
    /// # Panics
    /// When there is no such volume.
    #[must_use]
    pub fn counters(&self, volume: usize) -> Arc<VolumeCounters> {
        Arc::clone(&self.known()[volume])
    }

    fn known(&self) -> MutexGuard<'_, Vec<Arc<VolumeCounters>>> {
        self.counters.lock().expect("nobody panics with it")
    }
}

/// Seconds between looks at clients that stall.
const STALL_CHECK: Duration = Duration::from_secs(1);

/// Turns between looks at the poller while nothing but links and queues is busy: a turn is about a microsecond.
const POLLER_TURNS: u32 = 16;

/// Glances of an idle, busy-polling reactor at its links between two turns in full. A glance costs a tenth of a turn, so that
/// an answer is seen that much sooner; what else a turn looks at waits for about the time of two turns more.
const GLANCES: u32 = 16;

/// Events taken from the poller at a time; more wait for the next look. 3 KiB, and a thousand links that all have something are
/// heard in four looks.
const POLLER_EVENTS_MAX: usize = 256;

/// Volumes awake beyond which links are not asked one by one: asking the poller once costs as much as asking a few of them.
const LINKS_ASKED_MAX: usize = 8;

const KIND_WAKER: u64 = 0;
const KIND_LISTENER: u64 = 1;
const KIND_CONNECTION: u64 = 2;
const KIND_LINK: u64 = 3;

fn key(kind: u64, index: usize) -> EventData {
    EventData::new_u64(kind << 32 | index as u64)
}

/// The reactor.
pub struct Reactor {
    poll_mode: PollMode,
    peer_timeout: Duration,
    poller: OwnedFd,
    turns_since_poller: u32,
    /// A busy reactor with nothing to do only glances this many times more before it turns in full.
    glances: u32,
    waker: Waker,
    commands: Receiver<Command>,
    events: Sender<Event>,
    jobs_done: Receiver<JobDone>,
    /// Makes the calls of all disks. Behind the volumes, which wait for their last ones.
    pool: WorkerPool,
    listeners: Vec<OwnedFd>,
    volumes: Vec<Volume>,
    /// Which of them are looked at.
    awake: Awake,
    /// What is told of exports that are no volumes, by their names.
    absent: HashMap<String, String>,
    /// Per volume: the poller said there is something, and no poll has come up empty since.
    link_ready: Vec<bool>,
    /// The volumes whose links had something in this turn. Empty between turns.
    polled: Vec<usize>,
    connections: Vec<Option<Connection>>,
    connections_len: usize,
    connections_max: usize,
    /// Clients turned away since the last one was let in.
    turned_away: u64,
    /// The system refused to give the last one's socket.
    accept_refused: bool,
    connection_serial: u32,
    /// What connections hold beyond themselves.
    client_memory: ClientMemory,
    /// A client that is connected may have ended its direction.
    client_ended: bool,
    /// What is left of connections that are over.
    lingering: Lingering,
    queues: Vec<Queue>,
    /// When the last turn in full began.
    turned: Instant,
    next_deadline: Instant,
    next_stall_check: Instant,
    stopping: bool,
}

impl Reactor {
    /// Sets up a reactor; nothing runs until [`Reactor::run`] or [`Reactor::turn`].
    ///
    /// # Errors
    /// When the system gives no descriptor or thread.
    pub fn new(
        config: ReactorConfig,
        volumes: Vec<VolumeSpec>,
        events: Sender<Event>,
    ) -> std::io::Result<(Self, ReactorHandle)> {
        let waker = Waker::new()?;
        let (done, jobs_done) = crossbeam_channel::unbounded();
        let (command_sender, commands) = crossbeam_channel::unbounded();
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poller, &waker, key(KIND_WAKER, 0), EventFlags::IN)?;
        let now = Instant::now();
        let mut reactor = Self {
            poll_mode: config.poll,
            peer_timeout: config.peer_timeout,
            poller,
            turns_since_poller: 0,
            glances: 0,
            waker: waker.clone(),
            commands,
            events,
            jobs_done,
            pool: WorkerPool::new(&done, &waker),
            listeners: Vec::new(),
            link_ready: Vec::new(),
            polled: Vec::new(),
            volumes: Vec::new(),
            awake: Awake::default(),
            absent: HashMap::new(),
            connections: Vec::new(),
            connections_len: 0,
            connections_max: CONNECTIONS_MAX,
            turned_away: 0,
            accept_refused: false,
            connection_serial: 0,
            client_memory: ClientMemory::default(),
            client_ended: false,
            lingering: Lingering::default(),
            queues: Vec::new(),
            turned: now,
            next_deadline: now,
            next_stall_check: now + STALL_CHECK,
            stopping: false,
        };
        for listener in config.nbd_listeners {
            reactor.listen(listener)?;
        }
        let mut known = Vec::with_capacity(volumes.len());
        for spec in volumes {
            let counters = Arc::new(VolumeCounters::default());
            known.push(Arc::clone(&counters));
            reactor.add_volume(spec, counters, now);
        }
        let counters = Arc::new(Mutex::new(known));
        Ok((reactor, ReactorHandle { commands: command_sender, waker, counters }))
    }

    /// The same, which serves at most this many NBD connections at a time, where that is less than [`CONNECTIONS_MAX`]: what
    /// its owner has descriptors for.
    #[must_use]
    pub fn with_connections_max(mut self, connections_max: usize) -> Self {
        self.connections_max = connections_max.min(CONNECTIONS_MAX);
        self
    }

    fn add_volume(&mut self, spec: VolumeSpec, counters: Arc<VolumeCounters>, now: Instant) {
        let index = self.volumes.len();
        let workers = DiskWorkers::in_pool(&self.pool, index, &spec.disk, spec.record.store());
        self.absent.remove(&spec.name);
        self.volumes.push(Volume::new(index, spec, workers, now).counted_by(counters));
        self.link_ready.push(false);
        self.awake.add(now);
    }

    /// Whoever changes something about a volume, or hears of it, wakes it first.
    fn wake(&mut self, volume: usize) -> &mut Volume {
        let (now, volumes) = (self.turned, &mut self.volumes);
        if self.awake.wake(volume, now) {
            volumes[volume].woke(now);
        }
        &mut volumes[volume]
    }

    fn listen(&mut self, listener: OwnedFd) -> std::io::Result<()> {
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.poller, &listener, key(KIND_LISTENER, self.listeners.len()), edge)?;
        self.listeners.push(listener);
        Ok(())
    }

    /// Turns until told to shut down. Blocks.
    pub fn run(mut self) {
        let mut spin = SpinBudget::default();
        let mut idle_since: Option<Instant> = None;
        while !self.stopping {
            if self.turn() {
                if let Some(since) = idle_since.take() {
                    spin.work_came_after(since.elapsed());
                }
                continue;
            }
            let since = *idle_since.get_or_insert_with(Instant::now);
            match self.poll_mode {
                PollMode::Busy => std::hint::spin_loop(),
                PollMode::Adaptive if spin.spins(since.elapsed()) => {
                    let before = Instant::now();
                    std::thread::yield_now();
                    spin.yielded(before.elapsed());
                }
                PollMode::Adaptive | PollMode::Event => self.sleep(),
            }
        }
        let _ = self.events.send(Event::Stopped);
        self.lingering.finish();
    }

    /// Looks at everything once, without blocking. Returns whether anything happened. For programs that drive the
    /// reactor on their own thread; others use [`Reactor::run`].
    pub fn turn(&mut self) -> bool {
        if self.glances > 0 && !self.glance() {
            self.glances -= 1;
            return false;
        }
        let any = self.turn_in_full() || self.glances > 0;
        // Other modes sleep when there is nothing to do.
        self.glances = if any || self.poll_mode != PollMode::Busy { 0 } else { GLANCES };
        any
    }

    /// Looks only where the next write or its answer will show: at the queues and the links. What it takes is carried on by
    /// the turn that follows.
    fn glance(&mut self) -> bool {
        let now = self.turned;
        self.queues.iter().any(Queue::has_operations)
            || self.volumes.iter_mut().any(|volume| volume.poll(now))
    }

    fn turn_in_full(&mut self) -> bool {
        let now = Instant::now();
        self.turned = now;
        for &volume in self.awake.all() {
            self.volumes[volume].woke(now);
        }
        let mut any = self.take_commands(now);
        // Queues come before the links: a client that drives the reactor submits and turns at once, and what it submitted
        // is to be on its way before anything is waited for. Their depth bounds how long a turn stays here.
        if self.serve_queues() {
            any = true;
            self.pump(now);
        }
        self.turns_since_poller += 1;
        let looked = self.connections_len > 0
            || self.turns_since_poller >= POLLER_TURNS
            || self.awake.all().len() > LINKS_ASKED_MAX;
        if looked {
            any |= self.look_at_poller(Some(Duration::ZERO), now);
        }
        while let Ok(done) = self.jobs_done.try_recv() {
            // A change that waited for the disk gives ring space back, and what the socket holds by then has no edge left.
            self.link_ready[done.volume] = true;
            self.wake(done.volume).job_done(done);
            any = true;
        }
        for &volume in self.awake.all() {
            // Busy turns look at every link, which the poller does not watch for them. Otherwise a link that is about to
            // answer is asked directly, unless the poller has just spoken for it.
            if self.poll_mode == PollMode::Busy
                || self.link_ready[volume]
                || (!looked && self.volumes[volume].expects_link())
                || self.volumes[volume].has_backlog()
                || self.volumes[volume].link_polls_for_free()
            {
                let busy = self.volumes[volume].poll(now);
                self.link_ready[volume] = busy;
                if busy {
                    self.polled.push(volume);
                }
            }
        }
        for volume in self.polled.drain(..) {
            any = true;
            self.awake.wake(volume, now);
        }
        any |= self.deliver_notices();
        any |= self.serve_connections(now);
        let timed = now >= self.next_deadline;
        if timed {
            self.pump_resting(now);
        }
        self.pump(now);
        any |= self.deliver_notices();
        any |= self.report();
        if timed {
            any |= self.keep_time(now);
        }
        self.let_rest(now);
        any
    }

    fn pump(&mut self, now: Instant) {
        for &volume in self.awake.all() {
            self.volumes[volume].pump(now);
        }
    }

    /// What time alone makes due in volumes that rest.
    fn pump_resting(&mut self, now: Instant) {
        for at in 0..self.volumes.len() {
            if self.awake.is_awake(at) {
                continue;
            }
            let volume = &mut self.volumes[at];
            volume.woke(now);
            volume.pump(now);
            if !is_quiet(volume) {
                self.awake.wake(at, now);
            }
        }
    }

    /// Volumes of which nothing was heard in this turn, nor for a moment before, are not looked at any more.
    fn let_rest(&mut self, now: Instant) {
        if self.poll_mode == PollMode::Busy {
            // Nothing else would tell of their links.
            return;
        }
        let (volumes, ready) = (&mut self.volumes, &self.link_ready);
        self.awake.let_rest(now, |at| !ready[at] && is_quiet(&volumes[at]) && may_sleep(&mut volumes[at]));
    }

    fn report(&mut self) -> bool {
        let mut any = false;
        for &at in self.awake.all() {
            for event in self.volumes[at].events.drain(..) {
                any = true;
                // Control that is gone takes the whole process with it; nobody is left to tell.
                let _ = self.events.send(event);
            }
        }
        any
    }

    /// Does what time alone makes due. Returns whether another turn should follow at once.
    fn keep_time(&mut self, now: Instant) -> bool {
        let mut any = false;
        let mut next = now + STALL_CHECK;
        for (index, volume) in self.volumes.iter_mut().enumerate() {
            if let Some(at) = volume.keep_alive(now, self.peer_timeout) {
                next = next.min(at);
                // A link closed for silence reports its end at the next poll.
                if at <= now {
                    any |= volume.poll(now);
                }
                if !is_quiet(volume) {
                    self.awake.wake(index, now);
                }
            }
        }
        if now >= self.next_stall_check {
            self.next_stall_check = now + STALL_CHECK;
            any |= self.end_stalled(now);
            // Clients that could not be accepted for want of descriptors: no edge will announce them again.
            for listener in 0..self.listeners.len() {
                self.accept(listener, now);
            }
        }
        if let Some(at) = self.lingering.tend(now) {
            next = next.min(at);
        }
        self.next_deadline = next;
        any
    }

    /// Sleeps until something happens or time is due.
    fn sleep(&mut self) {
        self.waker.prepare_sleep();
        let mut queued = false;
        for &volume in self.awake.all() {
            if !self.volumes[volume].prepare_sleep() {
                self.link_ready[volume] = true;
                queued = true;
            }
        }
        let queued = queued
            || !self.commands.is_empty()
            || !self.jobs_done.is_empty()
            || self.queues.iter().any(Queue::has_operations)
            || self.awake.all().iter().any(|&volume| !self.volumes[volume].notices.is_empty());
        if !queued {
            let paced = self.awake.all().iter().filter_map(|&volume| self.volumes[volume].due()).min();
            let due = paced.map_or(self.next_deadline, |at| at.min(self.next_deadline));
            let timeout = due.saturating_duration_since(Instant::now());
            self.look_at_poller(Some(timeout), Instant::now());
        }
        self.waker.awake();
    }

    fn look_at_poller(&mut self, timeout: Option<Duration>, now: Instant) -> bool {
        self.turns_since_poller = 0;
        let mut room = [const { MaybeUninit::<epoll::Event>::uninit() }; POLLER_EVENTS_MAX];
        let timeout = timeout.and_then(|t| rustix::event::Timespec::try_from(t).ok());
        // Interrupted: the next look tells.
        let Ok((events, _)) = epoll::wait(&self.poller, &mut room, timeout.as_ref()) else { return false };
        let any = !events.is_empty();
        for event in events.iter() {
            let (kind, index) =
                (event.data.u64() >> 32, usize::try_from(event.data.u64() & 0xffff_ffff).expect("64-bit"));
            let flags = event.flags;
            match kind {
                KIND_LISTENER => self.accept(index, now),
                KIND_CONNECTION => {
                    if let Some(connection) = &mut self.connections[index] {
                        connection.ready(
                            flags.contains(EventFlags::IN),
                            flags.contains(EventFlags::OUT),
                            flags.contains(EventFlags::RDHUP),
                            flags.intersects(EventFlags::HUP | EventFlags::ERR),
                        );
                        self.client_ended |= connection.is_half_closed();
                    }
                }
                KIND_LINK => {
                    self.link_ready[index] = true;
                    self.wake(index);
                }
                _ => {}
            }
        }
        any
    }

    /// Tells front ends what their volumes have for them.
    fn deliver_notices(&mut self) -> bool {
        let mut any = false;
        // Some may wake while others hear.
        for place in 0..self.awake.all().len() {
            let at = self.awake.all()[place];
            if self.volumes[at].notices.is_empty() {
                continue;
            }
            any = true;
            self.wake(at);
            let mut notices = std::mem::take(&mut self.volumes[at].notices);
            for notice in notices.drain(..) {
                self.deliver(at, notice);
            }
            if self.volumes[at].notices.is_empty() {
                self.volumes[at].notices = notices;
            }
        }
        any
    }

    fn deliver(&mut self, at: usize, notice: Notice) {
        match notice {
            Notice::Granted { origin: Origin::Nbd { connection, serial, .. }, token } => {
                if let Some(connection) = live(&mut self.connections, connection, serial) {
                    connection.granted(token);
                }
            }
            Notice::Done { origin: Origin::Nbd { connection, serial, cookie }, result } => {
                if let Some(connection) = live(&mut self.connections, connection, serial) {
                    connection.done(cookie, result, &mut self.client_memory);
                }
            }
            Notice::Granted { origin: Origin::Queue { queue, slot }, token } => {
                self.queues[queue as usize].granted(slot, token, &mut self.volumes[at]);
            }
            Notice::Done { origin: Origin::Queue { queue, slot }, result } => {
                self.queues[queue as usize].done(slot, result);
            }
            Notice::Unpin { token } => self.unpin(at, token),
            Notice::Granted { .. } | Notice::Done { .. } => panic!("only front ends get notices"),
        }
    }

    fn serve_queues(&mut self) -> bool {
        let mut any = false;
        for queue in &mut self.queues {
            if !queue.wants_service() {
                continue;
            }
            let (now, volume) = (self.turned, queue.volume());
            if self.awake.wake(volume, now) {
                self.volumes[volume].woke(now);
            }
            any |= queue.serve(&mut self.volumes);
        }
        any
    }

    fn take_commands(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Ok(command) = self.commands.try_recv() {
            any = true;
            self.command(command, now);
        }
        any
    }

    fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::AddVolume { spec, counters } => self.add_volume(*spec, counters, now),
            Command::Absent { name, text } => {
                self.absent.insert(name, text);
            }
            Command::Listen { listener } => {
                if let Err(error) = self.listen(listener) {
                    tracing::error!(%error, "cannot watch an address for NBD clients, which are not served there");
                }
            }
            Command::Session { volume, before, mut link, direction, epoch } => {
                self.watch(volume, link.as_mut());
                self.wake(volume).attach_after(before, link, direction, epoch, now);
                self.link_ready[volume] = true;
                // When its first sign of life is due.
                self.next_deadline = self.next_deadline.min(now + self.peer_timeout / 4);
            }
            Command::Direct { volume, direction, epoch } => self.wake(volume).direct(direction, epoch),
            Command::CloseLink { volume, reason } => {
                self.wake(volume).close_link(DownReason::Local(reason));
                self.link_ready[volume] = true;
            }
            Command::Serve { volume } => self.wake(volume).serve(),
            Command::Refusal { volume, text } => self.wake(volume).set_refusal(text),
            Command::StopServing { volume } => {
                self.wake(volume).stop_serving();
                self.deliver_notices();
                self.end_clients(volume, now);
            }
            Command::GoAlone { volume } => self.wake(volume).go_alone(),
            Command::MarkAll { volume, done } => self.wake(volume).mark_all(done),
            Command::Verify { volume, repair } => self.wake(volume).verify(repair),
            Command::StopVerify { volume } => self.wake(volume).stop_verify(),
            Command::PeerInSync { volume } => self.wake(volume).peer_in_sync(),
            Command::Detach { volume } => self.wake(volume).detach(),
            Command::SendPeer { volume, code, arg } => self.wake(volume).send_peer(code, arg),
            Command::Quiesce { volume } => {
                self.wake(volume);
                for connection in self.connections.iter_mut().flatten() {
                    if connection.volume() == Some(volume) && connection.in_payload() {
                        connection.leave(&mut self.volumes[volume], &mut self.client_memory);
                    }
                }
                self.wake(volume).quiesce();
            }
            Command::Attach { volume, queue } => self.attach_queue(volume, queue),
            Command::Shutdown => self.stopping = true,
        }
    }

    /// Has the poller wake the loop for a link of the volume, which may have two for a while. It forgets the link when
    /// that closes its descriptor.
    fn watch(&self, volume: usize, link: &mut dyn Link) {
        let watch = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        // Busy turns look at every link anyway, and a watched socket costs the sender of each packet a wake-up.
        if self.poll_mode != PollMode::Busy
            && let Some((socket, _)) = link.arm()
            && let Err(error) = epoll::add(&self.poller, socket, key(KIND_LINK, volume), watch)
        {
            link.close(DownReason::Io(error.into()));
        }
    }

    fn attach_queue(&mut self, volume: usize, queue: QueueServer) {
        let index = u32::try_from(self.queues.len()).expect("few queues");
        self.queues.push(Queue::new(index, volume, queue));
    }
}

/// Whether a volume has nothing to tell, and nothing to do that no event will announce.
fn is_quiet(volume: &Volume) -> bool {
    volume.notices.is_empty()
        && volume.events.is_empty()
        && volume.due().is_none()
        && !volume.has_backlog()
        && !volume.link_polls_for_free()
}

/// Whether its link tells by its descriptor what comes next.
fn may_sleep(volume: &mut Volume) -> bool {
    volume.prepare_sleep()
}

fn live(connections: &mut [Option<Connection>], index: u32, serial: u32) -> Option<&mut Connection> {
    connections.get_mut(index as usize)?.as_mut().filter(|c| c.serial() == serial)
}
