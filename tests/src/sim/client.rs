//! The clients of the volume: requests of every kind, many at once, meeting each other on a small disk.
//!
//! Stands beside `reactor/queues.rs`, but puts the payload of a write in place in two steps, as a connection does. Each client
//! asks the node it believes to serve and turns to the other when refused.

use super::checker::{ChangeId, Effect, FlushAsked, NAMES, Verdict, broken, payload};
use super::clock::{MS, Nanos, US};
use super::storage::SECTOR_LEN;
use super::world::{Event, World};
use costandby_datapath::error::IoError;
use costandby_datapath::units::{ByteRange, Token};
use costandby_datapath::volume::{Begin, NewRequest, Op, Origin};
use costandby_datapath::wire::Kind;

/// A request's place in the list of all of a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct OpId(pub(super) u32);

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    /// Whom it believes to serve.
    pub(super) node: usize,
    pub(super) open: u64,
    depth: u64,
    /// Usual pause between two requests.
    pause: Nanos,
    /// It begins at the node with a flush, as a file system does that recovers.
    begins: bool,
}

#[derive(Debug)]
struct Request {
    client: usize,
    node: usize,
    op: Op,
    range: ByteRange,
    fua: bool,
    change: Option<ChangeId>,
    flush: Option<FlushAsked>,
    /// The payload is half in place, under this token.
    receiving: Option<Token>,
}

/// All requests of a run.
#[derive(Debug, Default)]
pub(super) struct Requests {
    list: Vec<Option<Request>>,
    /// Those under way, in order.
    open: std::collections::BTreeSet<OpId>,
    pub(super) answered: u64,
    pub(super) failed: u64,
}

impl Requests {
    fn get(&mut self, id: OpId) -> &mut Request {
        self.list[id.0 as usize].as_mut().expect("an open request")
    }

    pub(super) fn open(&self) -> usize {
        self.open.len()
    }
}

impl World {
    pub(super) fn make_clients(&mut self) {
        for client in 0..2 + self.rng.below(4) {
            let depth = 1 + self.rng.below(6);
            let pause = [MS, 5 * MS, 20 * MS, 50 * MS][usize::try_from(self.rng.below(4)).expect("small")];
            self.clients.push(Client { node: 0, open: 0, depth, pause, begins: false });
            self.agenda.at(MS, Event::Client(usize::try_from(client).expect("few")));
        }
    }

    /// A client's turn.
    pub(super) fn client(&mut self, at: usize) {
        if self.calm {
            return;
        }
        let pause = self.clients[at].pause;
        let (now, node) = (self.now(), self.clients[at].node);
        if now < self.hush_until {
            self.agenda.at(self.hush_until, Event::Client(at));
            return;
        }
        let refused = self.reactor(node).is_none_or(|reactor| reactor.volume.refusal().is_some());
        if refused && self.rng.below(20) > 0 {
            // It would hear so at its next connection.
            self.clients[at].node = 1 - node;
            self.clients[at].begins = self.rng.below(2) == 0;
            let again = now + 10 * MS + self.rng.below(10 * MS);
            self.agenda.at(again, Event::Client(at));
            return;
        }
        let bursts = if self.rng.below(8) == 0 { self.clients[at].depth } else { 1 };
        for _ in 0..bursts {
            let client = &self.clients[at];
            if client.open < client.depth && self.nodes[client.node].process.is_some() {
                self.ask(at);
            }
        }
        let rest = if self.rng.below(200) == 0 { 500 * MS } else { 0 };
        let again = self.now() + pause / 2 + self.rng.below(pause) + self.rng.below(rest + 1);
        self.agenda.at(again, Event::Client(at));
    }

    fn some_range(&mut self, sectors_max: u64) -> ByteRange {
        let sector = SECTOR_LEN as u64;
        let all = self.config.size / sector;
        let hot = if self.rng.below(2) == 0 { all.min(64) } else { all };
        let start = self.rng.below(hot);
        let len = match self.rng.below(8) {
            0 => 1 + self.rng.below(sectors_max),
            1..=4 => 8,
            _ => 1 + self.rng.below(8),
        };
        ByteRange::new(start * sector, len.min(all - start) * sector)
    }

    fn ask(&mut self, client: usize) {
        let now = self.now();
        let node = self.clients[client].node;
        let fua = self.rng.below(40) == 0;
        let begins = std::mem::take(&mut self.clients[client].begins);
        let (op, effect, range) = match self.rng.below(64) {
            _ if begins => (Op::Flush, None, ByteRange::new(0, 0)),
            0..=38 => (Op::Change(Kind::Write), Some(Effect::Write), self.some_range(128)),
            39..=40 => (Op::Change(Kind::WriteZeroes), Some(Effect::Zero), self.some_range(600)),
            41..=42 => (Op::Change(Kind::Trim), Some(Effect::Zero), self.some_range(600)),
            43 => (Op::Flush, None, ByteRange::new(0, 0)),
            _ => (Op::Read, None, self.some_range(64)),
        };
        let change = effect.map(|effect| self.checker.ask(now, node, effect, range, fua));
        let flush = (op == Op::Flush).then(|| self.checker.ask_flush(now, node));
        let id = OpId(u32::try_from(self.requests.list.len()).expect("fewer in a run"));
        self.requests.list.push(Some(Request {
            client,
            node,
            op,
            range,
            fua,
            change,
            flush,
            receiving: None,
        }));
        self.requests.open.insert(id);
        self.clients[client].open += 1;
        self.live(node).operations.push_back(id);
        self.story.mix(&[now, u64::from(id.0), range.start, range.len]);
        self.wake(node, now + US);
    }

    /// Hands the volume what clients have asked for.
    pub(super) fn serve_queue(&mut self, at: usize) -> Result<bool, super::Violation> {
        let mut any = false;
        while !self.live(at).full
            && let Some(id) = self.live(at).operations.pop_front()
        {
            any = true;
            let request = self.requests.get(id);
            let (op, range, fua, change) = (request.op, request.range, request.fua, request.change);
            let origin = Origin::Queue { queue: 0, slot: id.0 };
            match self.volume(at).begin(NewRequest { origin, op, range, fua }) {
                Begin::Go(token) => self.go(at, id, token)?,
                Begin::Waits(_) => {}
                Begin::Full => {
                    self.live(at).operations.push_front(id);
                    self.live(at).full = true;
                }
                Begin::Failed(error) => {
                    let client = self.requests.get(id).client;
                    self.clients[client].node = 1 - at;
                    self.op_done(id, Err(error))?;
                    continue;
                }
            }
            self.tell(
                at,
                format_args!("{} {range}{} ({id:?})", name(op, change), if fua { " fua" } else { "" }),
            );
        }
        Ok(any)
    }

    /// The range is the request's: move the bytes.
    pub(super) fn go(&mut self, at: usize, id: OpId, token: Token) -> Verdict {
        let request = self.requests.get(id);
        let (op, range, change) = (request.op, request.range, request.change);
        match op {
            Op::Read => {
                let bytes = self.nodes[at].disk.read(range);
                self.volume(at).read_done(token);
                if self.nodes[at].disk.image.is_failed() {
                    return self.op_done(id, Err(IoError::DiskFailed));
                }
                let records = [self.record(0), self.record(1)];
                self.close(id, true);
                self.tell(
                    at,
                    format_args!(
                        "{id:?} reads change {}",
                        u64::from_le_bytes(bytes[..8].try_into().expect("8"))
                    ),
                );
                self.checker.read(at, range, &bytes, [&self.nodes[0].disk, &self.nodes[1].disk], records)
            }
            Op::Change(Kind::Write) => {
                let bytes = payload(change.expect("a change"), range);
                let half = if self.rng.below(6) == 0 { half_of(bytes.len()) } else { bytes.len() };
                let start = ByteRange::new(range.start, half as u64);
                self.nodes[at].disk.image.span(start).write_from(&bytes[..half]);
                if half == bytes.len() {
                    self.volume(at).landed(token);
                } else {
                    self.requests.get(id).receiving = Some(token);
                    let due = self.now() + self.rng.below(3 * MS);
                    let life = self.nodes[at].life;
                    self.agenda.at(due, Event::Land { at, life, op: id });
                }
                Ok(())
            }
            Op::Change(_) | Op::Flush => Ok(()),
        }
    }

    /// Puts the rest of a payload in place, and its beginning again, as the disk may have been exchanged for memory.
    pub(super) fn land(&mut self, at: usize, id: OpId) {
        let Some(request) = &mut self.requests.list[id.0 as usize] else { return };
        let Some(token) = request.receiving.take() else { return };
        let (range, change) = (request.range, request.change.expect("a change"));
        self.nodes[at].disk.image.span(range).write_from(&payload(change, range));
        self.volume(at).landed(token);
        let now = self.now();
        self.wake(at, now);
    }

    /// Clients are disconnected: what has begun of their writes is carried out.
    pub(super) fn end_payloads(&mut self, at: usize) {
        let ids: Vec<OpId> = self.requests.open.iter().copied().collect();
        for id in ids {
            if self.requests.get(id).node == at {
                self.land(at, id);
            }
        }
    }

    /// The answer.
    pub(super) fn op_done(&mut self, id: OpId, result: Result<(), IoError>) -> Verdict {
        let now = self.now();
        let request = self.requests.get(id);
        let (node, change, flush) = (request.node, request.change, request.flush.take());
        self.story.mix(&[now, u64::from(id.0), u64::from(result.is_ok())]);
        self.tell(node, format_args!("{id:?} ends: {result:?}"));
        self.close(id, result.is_ok());
        if let Err(error) = result {
            // A client whose connection ends asks again, where a real one would reconnect.
            self.checker.count("answered-or-closed");
            if !error.ends_connection() && !self.nodes[node].disk.image.is_failed() {
                let text = format!("{} answers {id:?} with an error: {error}", NAMES[node]);
                return broken("answered-or-closed", text);
            }
        }
        match (change, flush) {
            (Some(change), _) if result.is_ok() => {
                let disks = [&self.nodes[0].disk, &self.nodes[1].disk];
                let records = [self.nodes[0].meta.durable(), self.nodes[1].meta.durable()];
                self.checker.acked(now, change, disks, records)
            }
            (Some(change), _) => {
                self.checker.end(now, change);
                Ok(())
            }
            (None, Some(flush)) if result.is_ok() => {
                let disks = [&self.nodes[0].disk, &self.nodes[1].disk];
                let records = [self.nodes[0].meta.durable(), self.nodes[1].meta.durable()];
                self.checker.flushed(&flush, disks, records)
            }
            _ => Ok(()),
        }
    }

    fn close(&mut self, id: OpId, answered: bool) {
        let request = self.requests.list[id.0 as usize].take().expect("an open request");
        self.requests.open.remove(&id);
        self.clients[request.client].open -= 1;
        if answered {
            self.requests.answered += 1;
        } else {
            self.requests.failed += 1;
        }
    }

    /// The process that was asked is gone.
    pub(super) fn end_requests(&mut self, at: usize) {
        let now = self.now();
        let ids: Vec<OpId> = self.requests.open.iter().copied().collect();
        for id in ids {
            if self.requests.get(id).node == at {
                self.close(id, false);
            }
        }
        self.checker.ended(now, at, self.nodes[at].meta.durable());
    }
}

/// Where a payload breaks: no rule speaks of less than a sector.
fn half_of(len: usize) -> usize {
    len.div_ceil(2).next_multiple_of(SECTOR_LEN)
}

fn name(op: Op, change: Option<ChangeId>) -> String {
    match (op, change) {
        (Op::Change(kind), Some(change)) => format!("change {change}: {kind:?}"),
        (op, _) => format!("{op:?}"),
    }
}
