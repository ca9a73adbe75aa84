//! The only loop of a node: poll, handle, act. One thread owns every volume, link and client connection.
//!
//! One owner instead of tasks and locks: a request crosses no thread on its way from the client's socket to the peer's
//! ring, and order needs no argument. The price is that whatever blocks must be elsewhere: flushes and hole punching are
//! on the disks' worker threads, handshakes with peers and every decision about roles in control.
//!
//! A turn looks at everything once; a turn that found nothing precedes each sleep. How long the loop turns without work
//! before it sleeps is the [`PollMode`]'s matter.

use crate::disk::pool::WorkerPool;
use crate::disk::worker::{DiskWorkers, JobDone};
use crate::front::nbd::connection::Connection;
use crate::front::nbd::end::ConnectionEnd;
use crate::front::nbd::handshake::{Export, ExportDirectory, ListedExport, Lookup};
use crate::front::queue::QueueServer;
use crate::limits::CONNECTIONS_MAX;
use crate::transport::{DownReason, Link};
use crate::units::PollMode;
use crate::volume::{Notice, Origin, Volume};
use crate::waker::Waker;
use command::{Command, Event, VolumeCounters, VolumeSpec};
use crossbeam_channel::{Receiver, Sender};
use queues::Queue;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::SocketFlags;
use spin::SpinBudget;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

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

/// Events taken from the poller at a time; more wait for the next look.
const POLLER_EVENTS_MAX: usize = 64;

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
    /// What is told of exports that are no volumes, by their names.
    absent: HashMap<String, String>,
    /// Per volume: the poller said there is something, and no poll has come up empty since.
    link_ready: Vec<bool>,
    connections: Vec<Option<Connection>>,
    connections_len: usize,
    connection_serial: u32,
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
            volumes: Vec::new(),
            absent: HashMap::new(),
            connections: Vec::new(),
            connections_len: 0,
            connection_serial: 0,
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

    fn add_volume(&mut self, spec: VolumeSpec, counters: Arc<VolumeCounters>, now: Instant) {
        let index = self.volumes.len();
        let workers = DiskWorkers::in_pool(&self.pool, index, &spec.disk, spec.record.store.as_ref());
        self.absent.remove(&spec.name);
        self.volumes.push(Volume::new(index, spec, workers, now).counted_by(counters));
        self.link_ready.push(false);
        self.next_deadline = now;
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
        for volume in &mut self.volumes {
            volume.woke(now);
        }
        let mut any = self.take_commands(now);
        // Queues come before the links: a client that drives the reactor submits and turns at once, and what it submitted
        // is to be on its way before anything is waited for. Their depth bounds how long a turn stays here.
        if self.serve_queues() {
            any = true;
            for volume in &mut self.volumes {
                volume.pump(now);
            }
        }
        self.turns_since_poller += 1;
        let looked = self.connections_len > 0 || self.turns_since_poller >= POLLER_TURNS;
        if looked {
            any |= self.look_at_poller(Some(Duration::ZERO), now);
        }
        while let Ok(done) = self.jobs_done.try_recv() {
            // A change that waited for the disk gives ring space back, and what the socket holds by then has no edge left.
            self.link_ready[done.volume] = true;
            self.volumes[done.volume].job_done(done);
            any = true;
        }
        for volume in 0..self.volumes.len() {
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
                any |= busy;
            }
        }
        any |= self.deliver_notices();
        any |= self.serve_connections(now);
        for volume in &mut self.volumes {
            volume.pump(now);
        }
        any |= self.deliver_notices();
        any |= self.report();
        if now >= self.next_deadline {
            any |= self.keep_time(now);
        }
        any
    }

    fn report(&mut self) -> bool {
        let mut any = false;
        for volume in &mut self.volumes {
            for event in volume.events.drain(..) {
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
        for volume in &mut self.volumes {
            if let Some(at) = volume.keep_alive(now, self.peer_timeout) {
                next = next.min(at);
                // A link closed for silence reports its end at the next poll.
                if at <= now {
                    any |= volume.poll(now);
                }
            }
        }
        if now >= self.next_stall_check {
            self.next_stall_check = now + STALL_CHECK;
            for index in 0..self.connections.len() {
                if self.connections[index].as_ref().is_some_and(|c| c.is_stalled(now)) {
                    self.end_connection(
                        index,
                        &ConnectionEnd::Protocol("the client stalled in mid-message".into()),
                    );
                    any = true;
                }
            }
            // Clients that could not be accepted for want of descriptors: no edge will announce them again.
            for listener in 0..self.listeners.len() {
                self.accept(listener, now);
            }
        }
        self.next_deadline = next;
        any
    }

    /// Sleeps until something happens or time is due.
    fn sleep(&mut self) {
        self.waker.prepare_sleep();
        let mut queued = false;
        for (volume, ready) in self.volumes.iter_mut().zip(&mut self.link_ready) {
            if !volume.prepare_sleep() {
                *ready = true;
                queued = true;
            }
        }
        let queued = queued
            || !self.commands.is_empty()
            || !self.jobs_done.is_empty()
            || self.queues.iter().any(Queue::has_operations)
            || self.volumes.iter().any(|v| !v.notices.is_empty());
        if !queued {
            let paced = self.volumes.iter().filter_map(Volume::due).min();
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
                            flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR),
                        );
                    }
                }
                KIND_LINK => self.link_ready[index] = true,
                _ => {}
            }
        }
        any
    }

    fn accept(&mut self, listener: usize, now: Instant) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        loop {
            let socket = match rustix::net::accept_with(&self.listeners[listener], flags) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an NBD client");
                    return;
                }
            };
            if self.connections_len >= CONNECTIONS_MAX {
                tracing::warn!("an NBD client was turned away: {CONNECTIONS_MAX} are connected");
                continue;
            }
            // Not a TCP socket: then there is nothing to set. A client whose host is gone is noticed in about two minutes.
            let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
            let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
            let _ = rustix::net::sockopt::set_tcp_keepidle(&socket, Duration::from_secs(60));
            let _ = rustix::net::sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(15));
            let _ = rustix::net::sockopt::set_tcp_keepcnt(&socket, 4);
            let index = self.connections.iter().position(Option::is_none).unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if let Err(error) = epoll::add(&self.poller, &socket, key(KIND_CONNECTION, index), edges) {
                tracing::warn!(%error, "cannot watch an NBD client");
                continue;
            }
            self.connection_serial = self.connection_serial.wrapping_add(1);
            let number = u32::try_from(index).expect("bounded by CONNECTIONS_MAX");
            self.connections[index] = Some(Connection::new(socket, number, self.connection_serial, now));
            self.connections_len += 1;
        }
    }

    fn serve_connections(&mut self, now: Instant) -> bool {
        let mut any = false;
        if self.connections_len == 0 {
            return false;
        }
        for index in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[index] else { continue };
            if !connection.wants_service() {
                continue;
            }
            let served = match connection.volume() {
                Some(volume) => connection.service(&mut self.volumes[volume], now),
                None => self.negotiate(index),
            };
            match served {
                Ok(busy) => any |= busy,
                Err(end) => {
                    self.end_connection(index, &end);
                    any = true;
                }
            }
        }
        any
    }

    fn negotiate(&mut self, index: usize) -> Result<bool, ConnectionEnd> {
        let connection = self.connections[index].as_mut().expect("the caller looked");
        let directory = Directory { volumes: &self.volumes, absent: &self.absent };
        let Some((name, negotiated)) = connection.negotiate(&directory)? else { return Ok(false) };
        let volume = self.volumes.iter().position(|v| v.name() == name).expect("the directory knew it");
        tracing::debug!(volume = %name, "NBD client opened");
        connection.open(volume, negotiated);
        Ok(true)
    }

    fn end_connection(&mut self, index: usize, end: &ConnectionEnd) {
        let Some(connection) = self.connections[index].take() else { return };
        self.connections_len -= 1;
        match end {
            ConnectionEnd::Gone | ConnectionEnd::Io(_) => tracing::debug!(%end, "NBD client"),
            ConnectionEnd::Protocol(_) => tracing::info!(%end, "NBD client disconnected"),
        }
        let volume = connection.volume();
        connection.close(volume.map(|v| &mut self.volumes[v]));
    }

    /// Tells front ends what their volumes have for them.
    fn deliver_notices(&mut self) -> bool {
        let mut any = false;
        for at in 0..self.volumes.len() {
            if self.volumes[at].notices.is_empty() {
                continue;
            }
            any = true;
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
                    connection.granted(token, &mut self.volumes[at]);
                }
            }
            Notice::Done { origin: Origin::Nbd { connection, serial, cookie }, result } => {
                if let Some(connection) = live(&mut self.connections, connection, serial) {
                    connection.done(cookie, result);
                }
            }
            Notice::Granted { origin: Origin::Queue { queue, slot }, token } => {
                self.queues[queue as usize].granted(slot, token, &mut self.volumes[at]);
            }
            Notice::Done { origin: Origin::Queue { queue, slot }, result } => {
                self.queues[queue as usize].done(slot, result);
            }
            Notice::Unpin { token } => {
                for connection in self.connections.iter_mut().flatten() {
                    if connection.volume() == Some(at) && connection.pins(token) {
                        connection.unpin(token, &mut self.volumes[at]);
                    }
                }
            }
            Notice::Granted { .. } | Notice::Done { .. } => panic!("only front ends get notices"),
        }
    }

    fn serve_queues(&mut self) -> bool {
        let mut any = false;
        for queue in &mut self.queues {
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
                self.volumes[volume].attach_after(before, link, direction, epoch, now);
                self.link_ready[volume] = true;
                self.next_deadline = now;
            }
            Command::SwitchLink { volume, mut link, serial } => {
                self.watch(volume, link.as_mut());
                self.volumes[volume].switch_link(link, serial, now);
                self.link_ready[volume] = true;
                self.next_deadline = now;
            }
            Command::Direct { volume, direction, epoch } => self.volumes[volume].direct(direction, epoch),
            Command::CloseLink { volume, reason } => {
                self.volumes[volume].close_link(DownReason::Local(reason));
                self.link_ready[volume] = true;
            }
            Command::Serve { volume } => self.volumes[volume].serve(),
            Command::Refusal { volume, text } => self.volumes[volume].set_refusal(text),
            Command::StopServing { volume } => {
                self.volumes[volume].stop_serving();
                self.deliver_notices();
                self.end_clients(volume, now);
            }
            Command::GoAlone { volume } => self.volumes[volume].go_alone(),
            Command::MarkAll { volume, done } => self.volumes[volume].mark_all(done),
            Command::Verify { volume, repair } => self.volumes[volume].verify(repair),
            Command::StopVerify { volume } => self.volumes[volume].stop_verify(),
            Command::PeerInSync { volume } => self.volumes[volume].peer_in_sync(),
            Command::Detach { volume } => self.volumes[volume].detach(),
            Command::SendPeer { volume, code, arg } => self.volumes[volume].send_peer(code, arg),
            Command::Quiesce { volume } => {
                for connection in self.connections.iter_mut().flatten() {
                    if connection.volume() == Some(volume) && connection.in_payload() {
                        connection.leave(&mut self.volumes[volume]);
                    }
                }
                self.volumes[volume].quiesce();
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

    /// Sends what the volume's clients are still owed, then closes them.
    fn end_clients(&mut self, volume: usize, now: Instant) {
        for index in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[index] else { continue };
            if connection.volume() == Some(volume) {
                // An error here ends it a line later anyway.
                let _ = connection.service(&mut self.volumes[volume], now);
                self.end_connection(index, &ConnectionEnd::Gone);
            }
        }
    }
}

fn live(connections: &mut [Option<Connection>], index: u32, serial: u32) -> Option<&mut Connection> {
    connections.get_mut(index as usize)?.as_mut().filter(|c| c.serial() == serial)
}

/// What NBD clients see of the volumes.
struct Directory<'a> {
    volumes: &'a [Volume],
    absent: &'a HashMap<String, String>,
}

impl ExportDirectory for Directory<'_> {
    fn lookup(&self, name: &str) -> Lookup {
        let Some(volume) = self.volumes.iter().find(|v| v.name() == name) else {
            let absent = self.absent.get(name).cloned();
            return absent.map_or(Lookup::Unknown, |message| Lookup::Refused { message });
        };
        match volume.refusal() {
            Some(message) => Lookup::Refused { message: message.to_owned() },
            None => Lookup::Found(Export {
                size: volume.disk().size(),
                read_only: false,
                description: format!("costandby volume {name}"),
            }),
        }
    }

    fn list(&self) -> Vec<ListedExport> {
        let served = self.volumes.iter().filter(|v| v.refusal().is_none());
        served.map(|v| ListedExport { name: v.name().to_owned(), description: String::new() }).collect()
    }
}
