//! The throttle against a model of a link: clients and steps stand in one queue, as they do before the standby.

use super::*;
use std::collections::BinaryHeap;

/// A link that serves one after the other, and clients that write, wait and write again.
struct Model {
    bytes_per_s: u64,
    overhead: Duration,
    clients: usize,
    think: Duration,
    /// Of a xorshift generator.
    dice: u64,
    now: Duration,
    free_at: Duration,
    /// Ends of what is under way, soonest first.
    ends: BinaryHeap<std::cmp::Reverse<(Duration, usize)>>,
    landed: Vec<Option<Landed>>,
    began: Vec<Duration>,
    throttle: Throttle,
    copied: u64,
}

const STEP: usize = usize::MAX;
const WRITE_LEN: u64 = 4096;

impl Model {
    fn new(bytes_per_s: u64, clients: usize, think: Duration) -> Self {
        let mut model = Self {
            bytes_per_s,
            overhead: Duration::from_micros(30),
            clients,
            think,
            dice: 0x9e37_79b9_7f4a_7c15,
            now: Duration::ZERO,
            free_at: Duration::ZERO,
            ends: BinaryHeap::new(),
            landed: vec![None; clients],
            began: vec![Duration::ZERO; clients],
            throttle: Throttle::new(),
            copied: 0,
        };
        for client in 0..clients {
            model.ends.push(std::cmp::Reverse((Duration::from_micros(client as u64), client)));
        }
        model
    }

    fn roll(&mut self) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice
    }

    /// When the link is done with `len` bytes that it is given now.
    fn serve(&mut self, len: u64) -> Duration {
        // Most take a few microseconds more or less, some a lot.
        let jitter = if self.roll().is_multiple_of(64) { self.roll() % 60 } else { self.roll() % 10 };
        let transfer = Duration::from_nanos(len * 1_000_000_000 / self.bytes_per_s);
        self.free_at = self.free_at.max(self.now) + transfer + Duration::from_micros(jitter);
        self.free_at + self.overhead
    }

    /// Runs for `time`; returns how long the clients' changes took.
    fn run(&mut self, epoch: Instant, time: Duration, copies: bool) -> Vec<Duration> {
        let until = self.now + time;
        let mut took = Vec::new();
        let mut wake = None;
        loop {
            let next = self.ends.peek().map(|end| end.0.0);
            let first = copies && next.is_none() && wake.is_none();
            let at = match (next, wake) {
                (Some(next), Some(wake)) if wake < next => wake,
                (Some(next), _) => next,
                (None, Some(wake)) => wake,
                (None, None) if first => self.now,
                (None, None) => until,
            };
            if at >= until {
                self.now = until;
                return took;
            }
            self.now = at;
            while let Some(&std::cmp::Reverse((end, who))) = self.ends.peek()
                && end <= self.now
            {
                self.ends.pop();
                self.ended(epoch, who, &mut took);
            }
            wake = if copies { self.copy(epoch) } else { None };
        }
    }

    fn ended(&mut self, epoch: Instant, who: usize, took: &mut Vec<Duration>) {
        if who == STEP {
            return self.throttle.step_ended();
        }
        if let Some(landed) = self.landed[who].take() {
            self.throttle.released(landed, epoch + self.now);
            took.push(self.now - self.began[who]);
            if self.think > Duration::ZERO {
                let think =
                    self.think / 2 + self.think * u32::try_from(self.roll() % 1000).expect("small") / 1000;
                self.ends.push(std::cmp::Reverse((self.now + think, who)));
                return;
            }
        }
        self.began[who] = self.now;
        self.landed[who] = Some(self.throttle.landed(epoch + self.now));
        let end = self.serve(WRITE_LEN);
        self.ends.push(std::cmp::Reverse((end, who)));
    }

    fn copy(&mut self, epoch: Instant) -> Option<Duration> {
        loop {
            let now = epoch + self.now;
            match self.throttle.leave(now, self.clients > 0) {
                Leave::Enough => return None,
                Leave::Wait(at) => return Some(at - epoch),
                Leave::Step(len) => {
                    self.throttle.step_began(now, len);
                    self.copied += len;
                    let end = self.serve(len);
                    self.ends.push(std::cmp::Reverse((end, STEP)));
                }
            }
        }
    }
}

fn p99(mut took: Vec<Duration>) -> Duration {
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

#[test]
fn clients_p99_at_most_doubles_and_the_copy_goes_on() {
    let epoch = Instant::now();
    let ms = Duration::from_millis;
    // Bytes a second of the link, clients, milliseconds between their writes.
    let cases = [
        (1250 << 20, 1, ms(0)),
        (1250 << 20, 16, ms(0)),
        (1250 << 20, 1, ms(10)),
        (1250 << 20, 64, ms(5)),
        (118 << 20, 1, ms(0)),
        (118 << 20, 16, ms(1)),
        (50 << 20, 4, ms(2)),
    ];
    for case in cases {
        let (bytes_per_s, clients, think) = case;
        let mut model = Model::new(bytes_per_s, clients, think);
        let before = p99(model.run(epoch, Duration::from_secs(10), false));
        model.run(epoch, Duration::from_secs(30), true);
        let copied = model.copied;
        let time = Duration::from_secs(60);
        let beside = p99(model.run(epoch, time, true));
        let rate = (model.copied - copied) / time.as_secs();
        println!("{case:?}: p99 {before:?} alone, {beside:?} beside a copy at {} MiB/s", rate >> 20);
        assert!(beside <= before * 2, "{case:?}: p99 {before:?} became {beside:?} at {rate} B/s");
        assert!(rate >= THROTTLE_RATE_MIN * 9 / 10, "{case:?}: {rate} B/s");
    }
}

#[test]
fn where_the_link_has_room_the_copy_takes_it() {
    let epoch = Instant::now();
    // 5000 writes a second of a link that could carry 1.25 GB: 2 %.
    let mut model = Model::new(1250 << 20, 64, Duration::from_millis(12));
    model.overhead = Duration::from_millis(1);
    model.run(epoch, Duration::from_secs(10), false);
    model.run(epoch, Duration::from_secs(60), true);
    let rate = model.throttle.rate();
    assert!(rate > 400 << 20, "where a write takes a millisecond anyway, {rate} B/s is too careful");
}

#[test]
fn without_clients_nothing_is_held_back() {
    let epoch = Instant::now();
    let mut model = Model::new(1250 << 20, 0, Duration::ZERO);
    model.run(epoch, Duration::from_secs(10), true);
    let possible = 10 * (1250 << 20);
    assert!(model.copied > possible / 10 * 9, "{} of {possible} bytes", model.copied);
}

#[test]
fn however_bad_it_looks_it_never_stops() {
    let epoch = Instant::now();
    let mut throttle = Throttle::new();
    let mut now = epoch;
    for _ in 0..1000 {
        let landed = throttle.landed(now);
        now += Duration::from_micros(50);
        throttle.released(landed, now);
    }
    let (mut copied, began) = (0, now);
    while now < began + Duration::from_secs(60) {
        match throttle.leave(now, true) {
            Leave::Step(len) => {
                copied += len;
                throttle.step_began(now, len);
                // Each and every change that meets a step takes a second.
                for _ in 0..100 {
                    let landed = throttle.landed(now);
                    throttle.released(landed, now + Duration::from_secs(1));
                }
                throttle.step_ended();
            }
            Leave::Wait(at) => now = at,
            Leave::Enough => panic!("nothing is under way"),
        }
    }
    assert!(copied / 60 >= THROTTLE_RATE_MIN * 9 / 10, "{copied} bytes in a minute");
    assert_eq!(throttle.rate(), THROTTLE_RATE_MIN);
}

#[test]
fn readers_alone_let_it_grow_so_far() {
    let mut throttle = Throttle::new();
    let mut now = Instant::now();
    // A minute in milliseconds.
    for _ in 0..60_000 {
        match throttle.leave(now, true) {
            Leave::Step(len) => {
                throttle.step_began(now, len);
                throttle.step_ended();
            }
            Leave::Wait(_) | Leave::Enough => {}
        }
        now += Duration::from_millis(1);
    }
    assert_eq!(throttle.rate(), THROTTLE_RATE_READERS);
}
