//! One connected queue pair: writes and messages out, completions in.
//!
//! What the RDMA transport calls for every write. No call here blocks; but for [`QueuePair::check`],
//! [`QueuePair::notify`] and [`QueuePair::cut`] none makes a system call of its own (a software device's doorbell is one
//! of its driver's), allocates or locks.
//!
//! Invariants: at most `send_len` requests are open; every region named by an open request is held here; completions
//! of one direction come in order; after the first failure nothing succeeds any more.

use std::collections::VecDeque;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use super::completion::{BATCH_LEN, CompletionQueue};
use super::connected::Connection;
use super::context::Domain;
use super::error::{Failure, VerbsError};
use super::receive::{RECEIVE, ReceiveQueue};
use super::send::{Piece, SendQueue, Target};
use super::sys;
use super::{MESSAGE_BYTES, MESSAGE_LEN, PIECES};

/// How large a queue pair is, and how long it hopes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Work requests that may be open.
    pub send_len: u32,
    /// Receives posted: writes with an immediate and messages of the peer's that may be here and not polled.
    pub receive_len: u32,
    /// Unanswered packets are sent again after 4.096 µs × 2^this, six times; then the connection has failed. 0..=31;
    /// 0 is never.
    pub ack_timeout: u8,
}

/// What completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// The signalled request with this id, and every one before it.
    Done {
        /// As posted.
        id: u64,
    },
    /// A write of the peer's with an immediate stands in the ring.
    Placed {
        /// As the peer sent it.
        immediate: u32,
    },
    /// A message arrived.
    Message {
        /// Its bytes.
        bytes: [u8; MESSAGE_LEN],
    },
    /// A message arrived that is shorter than messages are. (A longer one is a failure.)
    Short {
        /// Bytes of it.
        len: u32,
    },
}

/// A connected queue pair.
pub struct QueuePair {
    /// Null once cut.
    raw: *mut sys::ibv_qp,
    /// Given to the reaper with the cut.
    connection: Option<Connection>,
    pub(super) send: SendQueue,
    receive: ReceiveQueue,
    completions: CompletionQueue,
    /// What was polled before the cut and not asked for.
    left: VecDeque<Completion>,
    /// The first one.
    failure: Option<Failure>,
    /// The device did not let go of it when it was cut.
    stuck: bool,
    port: u8,
    domain: Domain,
}

// SAFETY: a queue pair is used by one thread at a time, since everything takes `&mut`; the library does not care which.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair in the state RESET.
    pub(super) fn new(domain: &Domain, settings: &Settings, port: u8) -> Result<Self, VerbsError> {
        let limits = domain.limits()?;
        let enough = |what, found: u32, needed: u32| {
            let error = || VerbsError::Limit {
                device: domain.device_name(),
                what,
                found: found.into(),
                needed: needed.into(),
            };
            if found < needed { Err(error()) } else { Ok(()) }
        };
        let completions_len = settings.send_len.saturating_add(settings.receive_len);
        enough("work requests a queue", limits.work_requests, settings.send_len.max(settings.receive_len))?;
        enough("pieces a work request", limits.pieces, PIECES)?;
        enough("completion queue entries", limits.completions, completions_len)?;
        let completions = CompletionQueue::new(domain, completions_len)?;
        let receive = ReceiveQueue::new(domain, settings.receive_len)?;
        let mut attributes = sys::ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: completions.as_ptr(),
            recv_cq: completions.as_ptr(),
            srq: std::ptr::null_mut(),
            cap: sys::ibv_qp_cap {
                max_send_wr: settings.send_len,
                max_recv_wr: settings.receive_len,
                max_send_sge: PIECES,
                max_recv_sge: 1,
                max_inline_data: MESSAGE_BYTES,
            },
            qp_type: sys::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        let raw = create(domain, &mut attributes)?;
        domain.created();
        Ok(Self {
            raw,
            connection: None,
            send: SendQueue::new(settings.send_len),
            receive,
            completions,
            left: VecDeque::new(),
            failure: None,
            stuck: false,
            port,
            domain: domain.clone(),
        })
    }

    /// Changes the queue pair's attributes and state.
    pub(super) fn modify(&mut self, attributes: &mut sys::ibv_qp_attr, mask: i32) -> Result<(), VerbsError> {
        let verbs = self.domain.context().verbs();
        // SAFETY: the queue pair is alive, and the call reads the attributes only.
        match unsafe { verbs.ibv_modify_qp(self.raw, attributes, mask) } {
            0 => Ok(()),
            code => Err(VerbsError::code("ibv_modify_qp", code.abs())),
        }
    }

    /// Posts the receives; from the state INIT on.
    pub(super) fn post_receives(&mut self) -> Result<(), VerbsError> {
        self.receive.post(self.raw)
    }

    pub(super) fn number(&self) -> u32 {
        // SAFETY: the queue pair is alive while its connection is being made; the number is constant.
        unsafe { (*self.raw).qp_num }
    }

    pub(super) fn own(&mut self, connection: Connection) {
        self.connection = Some(connection);
    }

    /// Where memory for it is registered.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Work requests that may be open.
    #[must_use]
    pub fn send_len(&self) -> usize {
        self.send.len()
    }

    /// Bytes of one write at most, as the port says.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn write_len_max(&self) -> Result<usize, VerbsError> {
        Ok(self.domain.context().port(self.port)?.max_msg_sz as usize)
    }

    /// Queues a write of the pieces, one behind the other; with an immediate, the peer is told when it stands there.
    /// It goes out with the next [`QueuePair::ring_doorbell`] at the latest. The regions are held until it is done.
    ///
    /// # Panics
    /// With too many pieces ([`super::PIECES_MAX`]), pieces outside their region, of another domain or longer than
    /// 4 GiB, or more than `send_len` requests open.
    pub fn write(
        &mut self,
        pieces: &[Piece<'_>],
        target: Target,
        immediate: Option<u32>,
        id: u64,
        signalled: bool,
    ) {
        for piece in pieces {
            assert!(piece.region.domain().is(&self.domain), "a region of another queue pair's domain");
        }
        self.send.write(pieces, target, immediate, id, signalled);
        self.post_full_batch();
    }

    /// Queues a message. Its bytes are copied.
    ///
    /// # Panics
    /// With more than `send_len` requests open.
    pub fn send(&mut self, bytes: &[u8; MESSAGE_LEN], id: u64, signalled: bool) {
        self.send.message(bytes, id, signalled);
        self.post_full_batch();
    }

    fn post_full_batch(&mut self) {
        if self.send.batch_is_full() {
            // What fails is told with the next doorbell.
            let _ = self.ring_doorbell();
        }
    }

    /// Hands what is queued to the device.
    ///
    /// # Errors
    /// The queue pair has failed.
    pub fn ring_doorbell(&mut self) -> Result<(), Failure> {
        if let Some(failure) = self.failure {
            self.send.forget_batch();
            return Err(failure);
        }
        self.send.post(self.raw).map_err(|error| self.fail(error.into()))
    }

    /// The first failure stands.
    fn fail(&mut self, failure: Failure) -> Failure {
        *self.failure.get_or_insert(failure)
    }

    /// Takes completions, and posts consumed receives again. Returns how many were taken.
    ///
    /// # Errors
    /// The queue pair has failed; what completed well before was returned by earlier calls.
    pub fn poll(&mut self, completions: &mut [Completion]) -> Result<usize, Failure> {
        let mut count = 0;
        while count < completions.len()
            && let Some(completion) = self.left.pop_front()
        {
            completions[count] = completion;
            count += 1;
        }
        if count > 0 {
            return Ok(count);
        }
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let mut room = [const { MaybeUninit::uninit() }; BATCH_LEN];
        let wanted = completions.len().min(BATCH_LEN);
        let taken = match self.completions.take(&mut room[..wanted]) {
            Ok(taken) => taken,
            Err(error) => return Err(self.fail(error.into())),
        };
        for (at, entry) in taken.iter().enumerate() {
            match translate(entry, &mut self.send, &mut self.receive) {
                Ok(completion) => {
                    completions[count] = completion;
                    count += 1;
                }
                // The other direction may have completed something well before it was told of this one's failure.
                Err(failure) => {
                    self.failure.get_or_insert_with(|| cause_of(failure, &taken[at..]));
                }
            }
        }
        match self.failure {
            Some(failure) if count == 0 => return Err(failure),
            Some(_) => {}
            None => {
                if let Err(error) = self.receive.post(self.raw) {
                    self.fail(error.into());
                }
            }
        }
        Ok(count)
    }

    /// Looks for events of the connection, the device and the completion channel. Two or more system calls.
    ///
    /// # Errors
    /// One of them ended the connection.
    pub fn check(&mut self) -> Result<(), Failure> {
        let Some(connection) = &self.connection else {
            return Err(self.fail(Failure::Closed));
        };
        let none = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut descriptors =
            [connection.events(), self.domain.context().events(), self.completions.events()].map(
                |descriptor| {
                    rustix::event::PollFd::from_borrowed_fd(descriptor, rustix::event::PollFlags::IN)
                },
            );
        // An interrupted poll is repeated with the next check.
        let _ = rustix::event::poll(&mut descriptors, Some(&none));
        let [connection_ready, device_ready, completion_ready] = descriptors.map(|d| !d.revents().is_empty());
        let mut ended = None;
        if device_ready {
            ended = self.domain.context().next_event(self.port).map(Failure::Device);
        }
        if connection_ready {
            ended = ended.or_else(|| connection.ended());
        }
        if completion_ready {
            self.completions.take_event();
        }
        if let Some(ended) = ended {
            // Told even where a request failed before: how it ended is the better reason.
            self.fail(ended);
            return Err(ended);
        }
        self.failure.map_or(Ok(()), Err)
    }

    /// Asks that one of [`QueuePair::descriptors`] become readable with the next completion. Poll once more after it.
    ///
    /// # Errors
    /// The queue pair has failed.
    pub fn notify(&mut self) -> Result<(), Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        self.completions.notify().map_err(|error| self.fail(error.into()))
    }

    /// What becomes readable when [`QueuePair::check`] or, after [`QueuePair::notify`], [`QueuePair::poll`] has something:
    /// completions, device, connection. The last one is gone after the cut.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut descriptors = vec![self.completions.events(), self.domain.context().events()];
        descriptors.extend(self.connection.as_ref().map(Connection::events));
        descriptors
    }

    /// Destroys the queue pair: when this returns nothing of the peer's lands in our memory any more and nothing of ours
    /// goes out, whoever still holds a region of its domain. What completed before can still be polled. The peer is
    /// told, in the background. Idempotent.
    pub fn cut(&mut self) {
        if self.raw.is_null() {
            return;
        }
        self.stop();
        self.drain();
        let number = self.number();
        // SAFETY: created once, destroyed once, and not used after: `raw` becomes null. When the call returns the device
        // neither reads nor writes for this queue pair any more.
        let code = unsafe { self.domain.context().verbs().ibv_destroy_qp(self.raw) };
        self.raw = std::ptr::null_mut();
        // A device that does not let go of the queue pair may still read what was posted: that memory is never freed.
        self.stuck = code != 0;
        if self.stuck {
            self.send.leak();
            self.receive.leak();
        } else {
            self.send.release();
        }
        self.domain.destroyed(number, self.stuck);
        self.fail(Failure::Closed);
        if let Some(connection) = self.connection.take() {
            connection.close();
        }
    }

    /// Whether the device refused to destroy the queue pair when it was cut. Then its state alone keeps the peer out, until
    /// the memory is deregistered too.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }

    /// To the state ERR: what is posted is flushed, and arriving packets are dropped.
    fn stop(&mut self) {
        // SAFETY: zeroes are valid for this plain C structure; only the state is read, as the mask says.
        let mut attributes: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = sys::IBV_QPS_ERR;
        // Failing, it leaves the rest to the destruction that follows.
        let _ = self.modify(&mut attributes, sys::IBV_QP_STATE.cast_signed());
    }

    /// Takes what completed well off the completion queue: some devices drop it along with the queue pair.
    fn drain(&mut self) {
        // No more completions can be there than requests.
        for _ in 0..=(self.send.len() + self.receive.len()) / BATCH_LEN + 1 {
            let mut room = [const { MaybeUninit::uninit() }; BATCH_LEN];
            let Ok(taken) = self.completions.take(&mut room) else { return };
            if taken.is_empty() {
                return;
            }
            let good =
                taken.iter().filter_map(|entry| translate(entry, &mut self.send, &mut self.receive).ok());
            self.left.extend(good);
        }
    }
}

/// A queue pair with a number that none of the domain had lately: what is still on its way to a former one, from a peer
/// that has not noticed its end, then finds nobody.
fn create(domain: &Domain, attributes: &mut sys::ibv_qp_init_attr) -> Result<*mut sys::ibv_qp, VerbsError> {
    let mut used = Vec::new();
    let created = loop {
        // SAFETY: domain and completion queue live longer than the queue pair: `Drop` destroys it first.
        let raw = unsafe { domain.context().verbs().ibv_create_qp(domain.as_ptr(), attributes) };
        if raw.is_null() {
            break Err(VerbsError::last("ibv_create_qp"));
        }
        // SAFETY: just created; the number is constant.
        if !domain.had(unsafe { (*raw).qp_num }) {
            break Ok(raw);
        }
        // Kept until there is another: numbers in use are not given out, so the loop ends when all remembered ones are.
        used.push(raw);
    };
    for raw in used {
        // SAFETY: created here, in the state RESET, and never used.
        unsafe { domain.context().verbs().ibv_destroy_qp(raw) };
    }
    created
}

/// What a completion queue's entry means.
fn translate(
    entry: &sys::ibv_wc,
    send: &mut SendQueue,
    receive: &mut ReceiveQueue,
) -> Result<Completion, Failure> {
    const NONSENSE: Failure = Failure::Device("it completed what was never posted");
    if entry.status != sys::IBV_WC_SUCCESS {
        return Err(Failure::WorkRequest { status: entry.status });
    }
    if entry.wr_id & RECEIVE == 0 {
        return send.done(entry.wr_id).map(|id| Completion::Done { id }).ok_or(NONSENSE);
    }
    let index = entry.wr_id & !RECEIVE;
    if !receive.consume(index) {
        return Err(NONSENSE);
    }
    if entry.opcode == sys::IBV_WC_RECV_RDMA_WITH_IMM {
        return Ok(Completion::Placed { immediate: u32::from_be(entry.imm_data) });
    }
    if entry.byte_len as usize != MESSAGE_LEN {
        return Ok(Completion::Short { len: entry.byte_len });
    }
    Ok(Completion::Message { bytes: receive.message(index) })
}

/// The request that failed is the cause; those flushed after it may come first.
fn cause_of(first: Failure, entries: &[sys::ibv_wc]) -> Failure {
    const FLUSHED: u32 = sys::IBV_WC_WR_FLUSH_ERR;
    let (Failure::WorkRequest { status: FLUSHED }, false) = (first, entries.is_empty()) else { return first };
    let statuses = entries.iter().map(|entry| entry.status);
    let cause = statuses.into_iter().find(|status| ![FLUSHED, sys::IBV_WC_SUCCESS].contains(status));
    cause.map_or(first, |status| Failure::WorkRequest { status })
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // Before any field: queue, regions, domain.
        self.cut();
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.send.open();
        f.debug_struct("QueuePair")
            .field("open", &open)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}
