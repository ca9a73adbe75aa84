//! Sections and bounce buffer together, against a model, with a registrar that the test holds by the hand.

use super::*;
use crate::disk::image::DiskImage;
use crate::limits::{RDMA_BOUNCE_LEN, RDMA_BOUNCE_PIECE_LEN_MAX};
use crate::units::ByteRange;
use costandby_ffi::mapping::Pin;
use crossbeam_channel::{Receiver, Sender};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[cfg(feature = "rdma")]
mod device;

const MIB: usize = 1 << 20;

/// Plays the device: registers when the test says so, and counts what is registered.
#[derive(Clone, Debug)]
struct Fake {
    books: Arc<Books>,
    /// One word a registration; without it, all succeed at once.
    gate: Option<Receiver<Option<io::ErrorKind>>>,
}

#[derive(Debug, Default)]
struct Books {
    live: AtomicUsize,
    live_max: AtomicUsize,
    registrations: AtomicUsize,
}

#[derive(Clone, Debug)]
struct Region(Arc<Registered>);

#[derive(Debug)]
struct Registered {
    span: Span,
    books: Arc<Books>,
    _pin: Pin,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.books.live.fetch_sub(self.span.len(), Ordering::SeqCst);
    }
}

impl Registrar for Fake {
    type Region = Region;

    fn register(&self, span: &Span) -> io::Result<Region> {
        if let Some(kind) = self.gate.as_ref().and_then(|gate| gate.recv().expect("the test says")) {
            return Err(kind.into());
        }
        let pin = span.mapping().pin(span.offset(), span.len())?;
        let (books, span) = (Arc::clone(&self.books), span.clone());
        let live = books.live.fetch_add(span.len(), Ordering::SeqCst) + span.len();
        books.live_max.fetch_max(live, Ordering::SeqCst);
        books.registrations.fetch_add(1, Ordering::SeqCst);
        Ok(Region(Arc::new(Registered { span, books, _pin: pin })))
    }
}

fn free_fake() -> Fake {
    Fake { books: Arc::default(), gate: None }
}

fn bytes(piece: &Piece<'_, Region>) -> Vec<u8> {
    let mut bytes = vec![0; piece.len];
    piece.region.0.span.sub(piece.offset, piece.len).read_into(&mut bytes);
    bytes
}

/// Writes one section of a small disk until it is sent from in place.
fn insist(registrations: &mut Registrations<Fake>, span: &Span, ids: &mut Range<u64>) -> bool {
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        let id = ids.next().expect("enough");
        match registrations.source(span, 0, span.len(), false, id) {
            Source::Direct(_) => return true,
            Source::Bounced(_) => registrations.done_up_to(id),
            other => panic!("{other:?}"),
        }
        std::thread::yield_now();
    }
    false
}

#[derive(Clone, Debug)]
enum Step {
    /// A client's write, or a step of the background copy.
    Send { resync: bool, offset: usize, len: usize },
    /// This share of the open work requests is done.
    Done(u8),
    /// The registration under way ends so.
    Registered(Option<io::ErrorKind>),
}

const DISK_LEN: usize = 6 * MIB - 8192;
const LIMIT: usize = 2 * MIB + 100;

fn step() -> impl Strategy<Value = Step> {
    // Mostly few sections, so that some become hot.
    let section = prop_oneof![3 => 0..2_usize, 1 => 0..6_usize];
    let place = (section, 0..MIB - 8192, prop_oneof![6 => 1..9000_usize, 1 => 1..3 * MIB]);
    let send = (any::<u8>(), place).prop_map(|(resync, (section, at, len))| {
        let offset = section * MIB + at;
        Step::Send { resync: resync < 40, offset, len: len.min(DISK_LEN - offset) }
    });
    let ends = prop_oneof![
        6 => Just(None),
        1 => Just(Some(io::ErrorKind::WouldBlock)),
        1 => Just(Some(io::ErrorKind::Other)),
        1 => Just(Some(io::ErrorKind::OutOfMemory)),
    ];
    prop_oneof![8 => send, 2 => any::<u8>().prop_map(Step::Done), 3 => ends.prop_map(Step::Registered)]
}

/// What the sections must be, kept in the plainest way.
struct Model {
    registrations: Registrations<Fake>,
    words: Sender<Option<io::ErrorKind>>,
    books: Arc<Books>,
    disk: Arc<Mapping>,
    /// Registered, least recently used by clients first.
    registered: VecDeque<usize>,
    asked: Option<usize>,
    /// Of each section: last work request that names it, writes of clients.
    last_id: BTreeMap<usize, u64>,
    writes: BTreeMap<usize, u64>,
    /// Pieces in the bounce buffer: work request and place.
    bounced: VecDeque<(u64, Range<usize>)>,
    id: u64,
    done: u64,
    evictions: u64,
}

impl Model {
    fn new() -> Self {
        let (words, gate) = crossbeam_channel::unbounded();
        words.send(None).expect("for the bounce buffer");
        let fake = Fake { books: Arc::default(), gate: Some(gate) };
        let books = Arc::clone(&fake.books);
        let registrations = Registrations::new(&fake, LIMIT as u64).expect("starts");
        let disk = Mapping::anonymous(DISK_LEN).expect("memory");
        let (registered, asked, last_id, writes, bounced, id, done, evictions) = Default::default();
        Self {
            registrations,
            words,
            books,
            disk,
            registered,
            asked,
            last_id,
            writes,
            bounced,
            id,
            done,
            evictions,
        }
    }

    fn send(&mut self, offset: usize, len: usize, resync: bool, fill: u8) {
        let span = self.disk.span(offset, len);
        if !resync {
            span.write_from(&vec![fill; len]);
        }
        let mut from = 0;
        while from < len {
            self.id += 1;
            let taken = self.piece(&span, from, resync);
            if taken == 0 {
                return;
            }
            from += taken;
        }
    }

    fn piece(&mut self, span: &Span, from: usize, resync: bool) -> usize {
        let section = (span.offset() + from) / MIB;
        let rest = span.len() - from;
        let left = rest.min((section + 1) * MIB - (span.offset() + from));
        let mut wanted = vec![0; left];
        span.sub(from, left).read_into(&mut wanted);
        let asked_before = self.registrations.disk.as_ref().is_some_and(|disk| disk.pending);
        if !resync {
            *self.writes.entry(section).or_default() += 1;
        }
        let taken = match self.registrations.source(span, from, rest, resync, self.id) {
            Source::Direct(piece) => {
                assert!(self.registered.contains(&section), "section {section} is not registered");
                assert!(Arc::ptr_eq(piece.region.0.span.mapping(), &self.disk));
                let at = piece.region.0.span.offset() + piece.offset;
                assert_eq!((at, piece.len), (span.offset() + from, left));
                self.last_id.insert(section, self.id);
                if !resync {
                    self.registered.retain(|other| *other != section);
                    self.registered.push_back(section);
                }
                piece.len
            }
            Source::Bounced(piece) => {
                assert!(!self.registered.contains(&section), "section {section} is registered");
                assert_eq!(piece.len, left.min(RDMA_BOUNCE_PIECE_LEN_MAX));
                assert_eq!(bytes(&piece), wanted[..piece.len]);
                let place = piece.offset..piece.offset + piece.len;
                for (id, other) in &self.bounced {
                    let apart = place.end <= other.start || other.end <= place.start;
                    assert!(apart, "{place:?} overlaps {other:?} of {id}");
                }
                self.bounced.push_back((self.id, place.clone()));
                place.len()
            }
            Source::Wait => {
                assert!(!self.bounced.is_empty(), "an empty bounce buffer takes anything");
                0
            }
            Source::Medium => panic!("nothing is poisoned"),
        };
        self.look(section, resync, asked_before);
        taken
    }

    /// What the source asked of the registrar.
    fn look(&mut self, section: usize, resync: bool, asked_before: bool) {
        let counters = self.registrations.counters();
        assert!(counters.registered_bytes <= counters.limit_bytes && counters.limit_bytes <= LIMIT as u64);
        let disk = self.registrations.disk.as_ref();
        if asked_before || !disk.is_some_and(|disk| disk.pending) {
            assert_eq!(counters.evictions, self.evictions, "given up for nothing");
            return;
        }
        assert!(!resync, "the background copy asks for nothing");
        assert!(self.writes[&section] >= 2, "the first write asks for nothing");
        self.asked = Some(section);
        for _ in self.evictions..counters.evictions {
            let oldest = self.registered.pop_front().expect("one was registered");
            assert!(self.last_id[&oldest] <= self.done, "section {oldest} is being sent from");
        }
        self.evictions = counters.evictions;
    }

    fn done(&mut self, share: u8) {
        self.done += (self.id - self.done) * u64::from(share) / 255;
        let done = self.done;
        self.registrations.done_up_to(done);
        self.bounced.retain(|(id, _)| *id > done);
    }

    fn registered(&mut self, end: Option<io::ErrorKind>) {
        let Some(section) = self.asked.take() else { return };
        self.words.send(end).expect("the thread lives");
        let result = self.registrations.registry.wait();
        self.registrations.disk.as_mut().expect("asked").settle(Some(result));
        match end {
            None => {
                self.registered.push_back(section);
                self.last_id.insert(section, 0);
            }
            Some(io::ErrorKind::OutOfMemory) => {
                let counters = self.registrations.counters();
                assert_eq!(counters.limit_bytes, counters.registered_bytes);
            }
            Some(_) => {}
        }
        let live = self.books.live.load(Ordering::SeqCst) - RDMA_BOUNCE_LEN;
        assert_eq!(live as u64, self.registrations.counters().registered_bytes);
        assert!(self.books.live_max.load(Ordering::SeqCst) <= LIMIT + RDMA_BOUNCE_LEN);
        assert_eq!(self.registrations.counters().sections, self.registered.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn they_agree_with_the_model(steps in prop::collection::vec(step(), 1..150)) {
        let mut model = Model::new();
        // Sections are of the disk that clients write to.
        model.send(0, 1, false, 0);
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Send { resync, offset, len } => {
                    model.send(offset, len, resync, u8::try_from(n % 251).expect("small"));
                }
                Step::Done(share) => model.done(share),
                Step::Registered(end) => model.registered(end),
            }
        }
        // Whatever happened, with everything done a piece always finds its way.
        model.done(255);
        model.send(0, 1, true, 0);
        prop_assert!(model.done < model.id);
        // The thread waits for a word on the registration under way.
        model.words.send(None).expect("the thread lives");
    }
}

#[test]
fn pieces_are_cut_where_sections_and_the_device_end() {
    let mut registrations = Registrations::new(&free_fake(), 2 * MIB as u64).expect("starts");
    let disk = Mapping::anonymous(64 * MIB).expect("memory");
    let mut ids = 1..u64::MAX;
    assert!(insist(&mut registrations, &disk.span(MIB, 10), &mut ids), "never registered");
    let across = disk.span(2 * MIB - 100, 300);
    let mut next =
        |from, len_max| match registrations.source(&across, from, len_max, true, ids.next().expect("enough"))
        {
            Source::Direct(piece) => (true, piece.len),
            Source::Bounced(piece) => (false, piece.len),
            other => panic!("{other:?}"),
        };
    assert_eq!(next(0, 300), (true, 100), "the section ends");
    assert_eq!(next(0, 60), (true, 60));
    assert_eq!(next(100, 300), (false, 200));
    assert_eq!(next(100, 7), (false, 7));
}

#[test]
fn other_memory_goes_through_the_stage() {
    let mut registrations = Registrations::new(&free_fake(), u64::MAX).expect("starts");
    let (disk, other) = (Mapping::anonymous(MIB).expect("memory"), Mapping::anonymous(MIB).expect("memory"));
    let mut ids = 1..u64::MAX;
    assert!(insist(&mut registrations, &disk.span(0, 64), &mut ids), "never registered");
    for id in ids.take(100) {
        other.span(5, 64).write_from(&[u8::try_from(id % 251).expect("small"); 64]);
        let Source::Bounced(piece) = registrations.source(&other.span(5, 64), 0, 64, false, id) else {
            panic!("sent from the wrong place");
        };
        assert_eq!(bytes(&piece), [u8::try_from(id % 251).expect("small"); 64]);
        registrations.done_up_to(id);
    }
    assert_eq!(registrations.counters().sections, 1);
}

#[test]
fn of_a_failed_disk_nothing_goes_out_but_what_the_cpu_still_sees() {
    // Failed elsewhere: the registered page may be another than the one that is mapped.
    let mut registrations = Registrations::new(&free_fake(), u64::MAX).expect("starts");
    let disk = Mapping::anonymous(MIB).expect("memory");
    assert!(insist(&mut registrations, &disk.span(0, 64), &mut (1..1 << 40)), "never registered");
    disk.poison();
    let source = registrations.source(&disk.span(0, 64), 0, 64, false, 1 << 41);
    assert!(matches!(source, Source::Bounced(_)), "{source:?}");
    // And while it is copied.
    let mut registrations = Registrations::new(&free_fake(), u64::MAX).expect("starts");
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(1 << 20).expect("set_len");
    let disk = DiskImage::open(file.path(), 1 << 20).expect("opens");
    file.as_file().set_len(0).expect("truncate");
    let source = registrations.source(&disk.span(ByteRange::new(0, 4096)), 0, 4096, false, 1);
    assert!(matches!(source, Source::Medium), "{source:?}");
}

#[test]
fn memory_in_the_place_of_a_failed_disk_is_bounced_and_what_was_registered_ends() {
    let mut registrations = Registrations::new(&free_fake(), u64::MAX).expect("starts");
    let disk = Mapping::anonymous(MIB).expect("memory");
    disk.span(0, 64).write_from(&[1; 64]);
    assert!(insist(&mut registrations, &disk.span(0, 64), &mut (1..1 << 40)), "never registered");
    let _ = disk.replace(&[]).expect("memory");
    disk.span(0, 64).write_from(&[2; 64]);
    for id in 0..100 {
        let Source::Bounced(piece) = registrations.source(&disk.span(0, 64), 0, 64, false, (1 << 41) + id)
        else {
            panic!("registered pages are others now")
        };
        assert_eq!(bytes(&piece), [2; 64]);
        registrations.done_up_to((1 << 41) + id);
    }
    assert_eq!(registrations.counters().sections, 0);
}

#[test]
fn where_nothing_can_be_registered_everything_is_bounced() {
    let mut registrations = Registrations::new(&free_fake(), 0).expect("starts");
    let disk = Mapping::anonymous(64 * MIB).expect("memory");
    let span = disk.span(0, 40 * MIB);
    let (mut from, mut waits) = (0, 0);
    for id in 1..10_000 {
        match registrations.source(&span, from, usize::MAX, false, id) {
            Source::Bounced(piece) => from += piece.len,
            Source::Wait => {
                waits += 1;
                registrations.done_up_to(id - 1);
            }
            other => panic!("{other:?}"),
        }
        if from == span.len() {
            break;
        }
    }
    assert!(from == span.len() && waits >= 9, "{from} bytes, {waits} waits");
    assert_eq!(
        (registrations.counters().bounced_bytes, registrations.counters().registered_bytes),
        (40 << 20, 0)
    );
}

#[test]
fn the_thread_ends_with_its_link_and_nobody_waits_for_it() {
    let (words, gate) = crossbeam_channel::unbounded();
    words.send(None).expect("for the bounce buffer");
    let fake = Fake { books: Arc::default(), gate: Some(gate) };
    let books = Arc::clone(&fake.books);
    let mut registrations = Registrations::new(&fake, u64::MAX).expect("starts");
    drop(fake);
    let disk = Mapping::anonymous(40 * MIB).expect("memory");
    words.send(None).expect("for the first section");
    assert!(insist(&mut registrations, &disk.span(0, 64), &mut (1..100_000)), "never registered");
    for id in 100_000..100_003 {
        registrations.source(&disk.span(20 * MIB, 64), 0, 64, false, id);
    }
    // A registration hangs; the drop must not.
    drop(registrations);
    words.send(None).expect("for the second");
    let end = Instant::now() + Duration::from_secs(60);
    while Arc::strong_count(&books) > 1 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(Arc::strong_count(&books), 1, "the thread or a region is left");
    assert_eq!((books.live.load(Ordering::SeqCst), disk.pins_len()), (0, 0));
    assert_eq!(books.registrations.load(Ordering::SeqCst), 3);
}

/// Trims and registrations meet all the time: nothing is lost, and each registration comes about in the end.
#[test]
fn trims_race_registrations() {
    const SIZE: u64 = 8 << 20;
    let disk = DiskImage::memory("t", SIZE).expect("memory");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                disk.punch(ByteRange::new(4096, SIZE / 2)).expect("punches");
                // About as long without a hold as with one.
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let mut registered = 0;
        for round in 0..20_u64 {
            let fake = free_fake();
            let mut registrations = Registrations::new(&fake, SIZE).expect("starts");
            let span = disk.span(ByteRange::new(round * 4096, 4096));
            registered += u32::from(insist(&mut registrations, &span, &mut (1..1 << 40)));
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(registered, 20);
    });
    disk.punch(ByteRange::new(4096, SIZE / 2)).expect("punches");
    assert!(disk.span(ByteRange::new(4096, SIZE / 2)).is_zero());
}
