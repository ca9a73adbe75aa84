//! Whoever types commands, and whatever goes wrong.
//!
//! The operator looks every now and then. Mostly he does what is sensible: has somebody serve, repairs, reconnects, and
//! discards one side of a split brain. Sometimes he is wrong. At the end of a run he only repairs, until both disks are in
//! sync and one serves.

use super::checker::{NAMES, Verdict};
use super::clock::{MS, Nanos, S};
use super::network::lock;
use super::world::{Event, Input, World};
use costandby_control::role::{Command, Connection, ReplyId, Role, Status};
use costandby_datapath::disk::superblock::{DiskState, Superblock};

/// What he remembers.
#[derive(Debug, Default)]
pub(super) struct Operator {
    commands: u64,
    /// Since when nobody serves.
    unserved_since: Option<Nanos>,
    /// Since when there is no session.
    apart_since: Option<Nanos>,
    /// Whom to promote once nobody serves.
    wish: Option<usize>,
}

impl World {
    fn status(&self, at: usize) -> Option<Status> {
        self.nodes[at].process.as_ref().map(|p| p.driver.task.status())
    }

    fn order(&mut self, at: usize, command: Command) {
        self.operator.commands += 1;
        let id = ReplyId(self.operator.commands);
        self.post_input(at, Input::Operator { id, command });
    }

    pub(super) fn replied(&mut self, at: usize, id: ReplyId, result: &Result<String, String>) {
        self.tell(at, format_args!("answers {}: {result:?}", id.0));
        if result.is_err() {
            self.driver(at).invalidates = false;
        }
    }

    /// What an operator's word excuses.
    pub(super) fn note_command(&mut self, at: usize, command: Command) {
        if matches!(command, Command::Connect { discard_my_data: true }) {
            self.driver(at).discards = true;
            self.new_disks.decided(at);
        }
        if command == Command::Invalidate {
            self.driver(at).invalidates = true;
            self.checker.invalidation_asked();
            self.new_disks.decided(at);
        }
        let Command::Promote { force } = command else { return };
        if force {
            self.new_disks.decided(at);
        }
        let status = self.status(at).expect("it takes commands");
        let alone = status.role == Role::Standby && status.peer_primary.is_none();
        if alone && force {
            let record = self.record(at);
            self.checker.forced(at, record);
        }
        if alone || (force && status.role == Role::Primary) {
            self.checker.released(at);
        }
    }

    /// A look at both nodes.
    pub(super) fn operate(&mut self) -> Verdict {
        let pause = if self.calm { 300 * MS } else { 50 * MS + self.rng.below(400 * MS) };
        self.agenda.at(self.now() + pause, Event::Operator);
        let now = self.now();
        let statuses = [self.status(0), self.status(1)];
        let serving = (0..2).find(|at| statuses[*at].as_ref().is_some_and(|s| s.role == Role::Primary));
        let together = statuses.iter().all(|s| {
            s.as_ref()
                .is_some_and(|s| !matches!(s.connection, Connection::Connecting | Connection::Standalone))
        });
        self.operator.unserved_since =
            if serving.is_some() { None } else { self.operator.unserved_since.or(Some(now)) };
        self.operator.apart_since = if together { None } else { self.operator.apart_since.or(Some(now)) };
        for (at, status) in statuses.iter().enumerate() {
            match status {
                None if self.calm => self.boot(at)?,
                None => {}
                Some(status) => self.look_after(at, status, &statuses[1 - at])?,
            }
        }
        match serving {
            None => self.have_somebody_serve(&statuses),
            Some(at) if !self.calm => self.meddle(at),
            Some(_) => {}
        }
        Ok(())
    }

    /// Repairs one node.
    fn look_after(&mut self, at: usize, status: &Status, other: &Option<Status>) -> Verdict {
        let apart = self.operator.apart_since.map_or(0, |since| self.now() - since);
        let patience = if self.calm { 2 * S } else { 3 * S };
        // What it quotes of its peer is the peer's to be acted upon.
        let advice = status.advice.as_deref().filter(|advice| !advice.contains("refuses a session"));
        let says = |words: &str| advice.is_some_and(|advice| advice.contains(words));
        let failed = says("the disk failed");
        if failed && (self.calm || self.rng.below(4) == 0) {
            self.tell(at, format_args!("operator: repairs the disk"));
            self.end_process(at);
            let due = self.now() + 100 * MS;
            self.agenda.at(due, Event::Boot { at });
            return Ok(());
        }
        if says("went on without") && status.role == Role::Primary {
            if apart > patience {
                self.seen.insert("an overtaken primary gave way");
                self.order(at, Command::Demote);
            }
            return Ok(());
        }
        let split = says("split brain") || says("no common past");
        if split && apart > patience && other.is_some() {
            let other_serves = other.as_ref().is_some_and(|other| other.role == Role::Primary);
            let wanted = status.role == Role::Primary && (!other_serves || at == 0);
            let told = says("split brain");
            if !wanted && told && self.rng.below(4) > 0 {
                let command = if status.role == Role::Standby {
                    Command::Connect { discard_my_data: true }
                } else {
                    Command::Demote
                };
                self.seen.insert("a split brain was resolved");
                self.order(at, command);
                return Ok(());
            }
            if !wanted {
                return self.discard(at);
            }
        }
        if status.connection == Connection::Standalone && (self.calm || self.rng.below(6) == 0) {
            self.order(at, Command::Connect { discard_my_data: false });
        }
        let stuck = says("neither disk can be copied from");
        if stuck && apart > patience && status.role == Role::Standby && self.rng.below(3) == 0 {
            self.order(at, Command::Promote { force: true });
        }
        if status.frozen && !self.calm && self.rng.below(20) == 0 {
            self.order(at, Command::Promote { force: true });
        }
        Ok(())
    }

    /// `create --force` on a node whose data is not wanted.
    fn discard(&mut self, at: usize) -> Verdict {
        self.tell(at, format_args!("operator: gives up this node's data"));
        self.seen.insert("a split brain was resolved");
        self.end_process(at);
        let now = self.now();
        self.checker.gave_up(now, at);
        self.new_disks.decided(at);
        let fresh = Superblock::fresh("db", NAMES[at], self.config.size, false);
        let area = self.rng.next_u64();
        self.nodes[at].meta.recreate(&fresh, area);
        self.checker.related = false;
        self.agenda.at(now + 50 * MS, Event::Boot { at });
        Ok(())
    }

    fn have_somebody_serve(&mut self, statuses: &[Option<Status>; 2]) {
        let waited = self.operator.unserved_since.map_or(0, |since| self.now() - since);
        let preferred = self.operator.wish.take().unwrap_or_else(|| usize::from(self.rng.below(2) == 0));
        let usable = |at: usize| statuses[at].as_ref().is_some_and(|s| s.disk_state == DiskState::UpToDate);
        let Some(at) = [preferred, 1 - preferred].into_iter().find(|at| usable(*at)) else {
            let up = [preferred, 1 - preferred].into_iter().find(|at| statuses[*at].is_some());
            if let Some(at) = up.filter(|_| waited > 8 * S) {
                self.order(at, Command::Promote { force: true });
            }
            return;
        };
        let together = self.operator.apart_since.is_none();
        if together || waited > if self.calm { 4 * S } else { 600 * MS } {
            self.order(at, Command::Promote { force: false });
        }
    }

    /// A cluster manager has noticed that a node died: it promotes the other one at once, while that node may still
    /// flush what it had applied.
    pub(super) fn take_over(&mut self, at: usize) {
        let died = self.nodes[1 - at].process.is_none();
        let usable = self.status(at).is_some_and(|status| {
            status.disk_state == DiskState::UpToDate
                && status.role == Role::Standby
                && status.connection == Connection::Connecting
        });
        if died && usable && !self.calm {
            self.seen.insert("a takeover at once");
            self.order(at, Command::Promote { force: false });
        }
    }

    /// Changes what works.
    fn meddle(&mut self, serving: usize) {
        let standby = 1 - serving;
        match self.rng.below(60) {
            0..=2 | 8..=11 => {
                self.operator.wish = Some(standby);
                self.order(serving, Command::Demote);
            }
            3 => self.order(standby, Command::Promote { force: false }),
            4 => {
                let force = self.rng.below(4) == 0;
                self.order(standby, Command::Promote { force });
            }
            6 => {
                self.seen.insert("a disk was invalidated");
                self.order(standby, Command::Invalidate);
            }
            5 => {
                let at = usize::from(self.rng.below(2) == 0);
                self.order(at, Command::Disconnect);
            }
            7 => {
                let at = usize::from(self.rng.below(2) == 0);
                self.tell(at, format_args!("operator: restarts the daemon"));
                self.post_input(at, Input::Shutdown);
                let due = self.now() + self.rng.below(2 * S);
                self.agenda.at(due, Event::Boot { at });
                self.agenda.at(due + 2 * S, Event::Boot { at });
            }
            _ => {}
        }
    }

    /// Something goes wrong.
    pub(super) fn fault(&mut self) -> Verdict {
        if self.calm {
            return Ok(());
        }
        let pause = self.config.fault_pause / 4 + self.rng.below(2 * self.config.fault_pause);
        self.agenda.at(self.now() + pause, Event::Fault);
        let at = usize::from(self.rng.below(2) == 0);
        let name = match self.rng.below(56) {
            0..=5 => self.cut_path(at),
            6..=12 => self.crash(at),
            13..=14 => {
                self.crash(1 - at);
                self.crash(at)
            }
            15..=18 => return self.power(at),
            19 => {
                self.power(at)?;
                return self.power(1 - at);
            }
            20..=23 => {
                let until = self.now() + self.rng.below(3 * S);
                self.nodes[at].slow_until = until;
                "slow disk"
            }
            24..=27 => self.hold_up(at),
            28 => {
                self.nodes[at].call_fails = true;
                "failing disk call"
            }
            29 => {
                self.nodes[at].store_fails = true;
                "failing metadata"
            }
            31..=32 => {
                let until = self.now() + self.rng.below(3 * S);
                self.nodes[at].stores_slow_until = until;
                "slow metadata"
            }
            30 => {
                self.nodes[at]
                    .disk
                    .image
                    .span(costandby_datapath::units::ByteRange::new(0, 512))
                    .mapping()
                    .poison();
                let now = self.now();
                self.wake(at, now);
                "unreadable page"
            }
            42..=51 => self.reset_links(at),
            _ => self.change_delay(),
        };
        self.count_fault(at, name);
        Ok(())
    }

    fn count_fault(&mut self, at: usize, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
        self.tell(at, format_args!("fault: {name}"));
    }

    fn cut_path(&mut self, at: usize) -> &'static str {
        let both = self.rng.below(3) > 0;
        let healed = self.now() + self.short_or_long(300 * MS, 4 * S);
        for to in [at, 1 - at].into_iter().take(if both { 2 } else { 1 }) {
            self.cut[to] = true;
            self.agenda.at(healed, Event::Heal { to });
        }
        self.block();
        if both { "path cut" } else { "path cut one way" }
    }

    /// The connections between the nodes are reset, as by a router in between; more than once, mostly.
    fn reset_links(&mut self, at: usize) -> &'static str {
        let (next, again) = (self.now() + self.short_or_long(20 * MS, 1500 * MS), self.rng.below(4) > 0);
        if again {
            self.agenda.at(next, Event::Reset { at });
        }
        self.reset_now(at);
        "link reset"
    }

    /// The same again.
    pub(super) fn reset_again(&mut self, at: usize) {
        if !self.calm {
            let name = self.reset_links(at);
            self.count_fault(at, name);
        }
    }

    fn reset_now(&mut self, at: usize) {
        let late = |world: &mut Self| match world.rng.below(6) {
            0..=3 => Some(world.rng.below(3 * MS)),
            4 => Some(world.rng.below(200 * MS)),
            _ => None,
        };
        let (first, second) = (late(self), late(self));
        let told = if at == 0 { [first, second] } else { [second, first] };
        let wires: Vec<_> = self.wires.clone();
        for wire in wires {
            super::network::lock(&wire).reset(told);
        }
        if self.rng.below(2) == 0 {
            self.reset_streams();
        }
        self.deliver_wakes();
    }

    fn short_or_long(&mut self, short: Nanos, long: Nanos) -> Nanos {
        let most = if self.rng.below(2) == 0 { short } else { long };
        self.rng.below(most)
    }

    fn crash(&mut self, at: usize) -> &'static str {
        if self.rng.below(2) == 0 {
            // Who takes over does so with a busy disk, whose flushes take longer than the promotion.
            self.nodes[1 - at].flushes_slow_until = self.now() + self.rng.below(2 * S);
        }
        self.end_process(at);
        let due = self.now() + self.short_or_long(100 * MS, 3 * S);
        self.agenda.at(due, Event::Boot { at });
        "process killed"
    }

    fn power(&mut self, at: usize) -> Verdict {
        self.count_fault(at, "power lost");
        self.lose_power(at)?;
        let due = self.now() + 50 * MS + self.rng.below(4 * S);
        self.agenda.at(due, Event::Boot { at });
        Ok(())
    }

    /// The reactor waits for a page or the processor.
    fn hold_up(&mut self, at: usize) -> &'static str {
        let until = self.now() + self.short_or_long(50 * MS, 3 * S);
        if let Some(reactor) = self.reactor(at) {
            reactor.held_until = until;
            reactor.turn_at = None;
            self.wake(at, until);
        }
        "reactor held up"
    }

    fn change_delay(&mut self) -> &'static str {
        let delay = [10, 50, 300, 2_000, 20_000][usize::try_from(self.rng.below(5)).expect("small")];
        let jitter = 1 + self.rng.below(2 * delay);
        let mut ether = lock(&self.ether);
        ether.delay = delay * super::clock::US;
        ether.jitter = jitter * super::clock::US;
        "other delay"
    }

    /// From now on things only get better.
    pub(super) fn become_calm(&mut self) {
        self.calm = true;
        self.cut = [false; 2];
        for node in &mut self.nodes {
            node.slow_until = 0;
            node.flushes_slow_until = 0;
            node.stores_slow_until = 0;
            node.call_fails = false;
            node.store_fails = false;
        }
        let mut ether = lock(&self.ether);
        ether.delay = 100 * super::clock::US;
        ether.jitter = 100 * super::clock::US;
        drop(ether);
        self.heal();
    }
}
