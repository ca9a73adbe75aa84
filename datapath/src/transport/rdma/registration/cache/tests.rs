//! Which sections come and go, decision by decision.

use super::*;
use std::io::{Error, ErrorKind};

const MIB: usize = 1 << 20;

/// A disk of twelve sections and a bit, of which three may be registered.
fn small() -> Cache<u32> {
    let cache = Cache::new(12 * MIB + 4096, 3 * MIB);
    assert_eq!((cache.entries.len(), cache.bytes(12)), (13, 12 * MIB..12 * MIB + 4096));
    cache
}

/// Writes of clients, each done when the next comes.
struct Clients {
    id: u64,
}

impl Clients {
    fn write(&mut self, cache: &mut Cache<u32>, section: u32) -> Option<u32> {
        cache.done_up_to(self.id);
        self.id += 1;
        cache.touch(section, true, self.id)
    }

    /// Writes until the section is registered; returns how often, and what went for it.
    fn insist(&mut self, cache: &mut Cache<u32>, section: u32) -> (u32, Vec<u32>) {
        for writes in 1..100_000 {
            assert_eq!(self.write(cache, section), None);
            if let Some(ended) = cache.wants(section) {
                cache.registered(Ok(section));
                return (writes, ended);
            }
        }
        panic!("section {section} is never registered");
    }
}

#[test]
fn the_second_write_of_clients_counts() {
    let (mut cache, mut clients) = (small(), Clients { id: 0 });
    for id in 1..10 {
        assert_eq!(cache.touch(5, false, id), None);
        assert_eq!(cache.wants(5), None, "the background copy asks for nothing");
    }
    clients.id = 10;
    clients.write(&mut cache, 5);
    assert_eq!(cache.wants(5), None);
    assert_eq!(cache.touch(5, true, clients.id), None);
    assert_eq!(cache.wants(5), None, "asked twice for one write");
    clients.write(&mut cache, 5);
    assert_eq!(cache.wants(5), Some(vec![]));
    clients.write(&mut cache, 5);
    clients.write(&mut cache, 6);
    clients.write(&mut cache, 6);
    assert_eq!((cache.wants(5), cache.wants(6)), (None, None), "one at a time");
    assert_eq!(cache.registered_bytes(), MIB);
    cache.registered(Ok(55));
    let slot = cache.touch(5, false, 100).expect("registered, for the background copy too");
    assert_eq!(cache.region(slot), (&55, 5 * MIB));
    assert_eq!((cache.sections(), cache.wants(5)), (1, None));
}

#[test]
fn writes_far_apart_do_not_count() {
    let (mut cache, mut clients) = (small(), Clients { id: 0 });
    clients.write(&mut cache, 0);
    for _ in 0..ERA_LEN {
        clients.write(&mut cache, 1);
    }
    clients.write(&mut cache, 0);
    assert_eq!(cache.wants(0), None);
}

#[test]
fn the_oldest_goes_for_a_much_hotter_one() {
    let (mut cache, mut clients) = (small(), Clients { id: 0 });
    for section in [3, 1, 2] {
        assert_eq!(clients.insist(&mut cache, section), (2, vec![]));
    }
    for _ in 0..4 {
        clients.write(&mut cache, 3).expect("registered");
    }
    // 1 is the oldest, of heat 2.
    assert_eq!(clients.insist(&mut cache, 7), (5, vec![1]));
    // Then 2, of heat 2; then 3, of heat 6.
    assert_eq!(clients.insist(&mut cache, 8), (5, vec![2]));
    assert_eq!(clients.insist(&mut cache, 9), (13, vec![3]));
    assert_eq!((cache.evictions(), cache.sections(), cache.registered_bytes()), (3, 3, 3 * MIB));
    // The background copy makes nothing newer: 7, of heat 5, goes next all the same. 1 remembers its first two writes.
    cache.touch(7, false, clients.id).expect("registered");
    assert_eq!(clients.insist(&mut cache, 1), (9, vec![7]));
    // The short section at the end needs one of the others out all the same.
    assert_eq!(clients.insist(&mut cache, 12), (11, vec![8]));
    assert_eq!(cache.registered_bytes(), 2 * MIB + 4096);
}

#[test]
fn what_a_work_request_names_stays() {
    let (mut cache, mut clients) = (small(), Clients { id: 0 });
    for section in 0..3 {
        clients.insist(&mut cache, section);
    }
    let id = 1000;
    cache.touch(0, false, id).expect("registered");
    for other in 0..50 {
        cache.touch(5, true, id + other);
        assert_eq!(cache.wants(5), None, "section 0 is being sent from");
    }
    cache.done_up_to(id);
    assert_eq!(cache.wants(5), Some(vec![0]));
}

#[test]
fn a_failed_registration_is_put_off() {
    let (mut cache, mut clients) = (small(), Clients { id: 0 });
    let mut fail = |cache: &mut Cache<u32>, kind: ErrorKind| {
        let mut writes = 0;
        while cache.wants(4).is_none() {
            clients.write(cache, 4);
            writes += 1;
        }
        cache.registered(Err(Error::from(kind)));
        writes
    };
    assert_eq!(fail(&mut cache, ErrorKind::WouldBlock), 2);
    assert_eq!(fail(&mut cache, ErrorKind::WouldBlock), PUT_OFF_BUSY);
    assert_eq!(fail(&mut cache, ErrorKind::Other), PUT_OFF_BUSY);
    for doubled in 0..5 {
        assert_eq!(fail(&mut cache, ErrorKind::Other), PUT_OFF << doubled);
    }
    assert_eq!((cache.failures(), cache.registered_bytes(), cache.sections()), (8, 0, 0));
    // Others are not held up.
    assert_eq!(clients.insist(&mut cache, 5), (2, vec![]));
}

#[test]
fn want_of_memory_lowers_the_limit_for_a_while() {
    let (mut cache, mut clients) = (small(), Clients { id: 0 });
    clients.insist(&mut cache, 0);
    clients.write(&mut cache, 1);
    clients.write(&mut cache, 1);
    assert_eq!(cache.wants(1), Some(vec![]));
    cache.registered(Err(Error::from_raw_os_error(12)));
    assert_eq!((cache.limit(), cache.registered_bytes()), (MIB, MIB));
    // One may be had for another, none more.
    assert_eq!(clients.insist(&mut cache, 2), (5, vec![0]));
    let mut writes = 5;
    while cache.limit() == MIB {
        clients.write(&mut cache, 3);
        assert_eq!(clients.write(&mut cache, 2), Some(0));
        writes += 2;
        if let Some(ended) = cache.wants(3) {
            assert_eq!(ended, []);
            cache.registered(Ok(3));
        }
    }
    assert_eq!((cache.limit(), cache.sections()), (2 * MIB, 2));
    assert_eq!(writes, LIMIT_TRIED_AFTER + 1, "tried again when the time has come");
}

#[test]
fn a_refused_limit_is_tried_twice_as_high_and_more_rarely_until_that_succeeds() {
    let mut cache: Cache<u32> = Cache::new(1024 * MIB, 512 * MIB);
    let mut clients = Clients { id: 0 };
    let refused = |cache: &mut Cache<u32>, clients: &mut Clients, section| {
        for writes in 1..1_000_000 {
            clients.write(cache, section);
            if cache.wants(section).is_some() {
                cache.registered(Err(ErrorKind::OutOfMemory.into()));
                return writes;
            }
        }
        panic!("never tried");
    };
    refused(&mut cache, &mut clients, 0);
    assert_eq!(cache.limit(), 0);
    // A section that was refused waits by itself as well: so another one each time.
    let mut tries = (1..8).map(|section| refused(&mut cache, &mut clients, section)).collect::<Vec<u64>>();
    assert_eq!(tries.remove(0), LIMIT_TRIED_AFTER);
    assert!(tries.is_sorted() && tries[0] == 2 * LIMIT_TRIED_AFTER, "{tries:?}");
    assert_eq!(tries[5], LIMIT_TRIED_AFTER_MAX, "{tries:?}");
    // All is to be had again: one section, then twice as many each time, and soon.
    let mut limits = vec![0];
    let (mut last, mut section, began) = (0, 8, cache.touches);
    while cache.limit() < 400 * MIB && cache.touches - began < LIMIT_TRIED_AFTER_MAX + 8 * LIMIT_TRIED_AFTER {
        clients.write(&mut cache, section);
        if cache.wants(section).is_some() {
            cache.registered(Ok(section));
        }
        if cache.entries[section as usize].slot != NONE {
            section += 1;
        }
        if cache.limit() != last {
            last = cache.limit();
            limits.push(last / cache.bytes(0).len());
        }
    }
    assert!(limits.starts_with(&[0, 1, 2, 4]), "{limits:?}");
}

#[test]
fn nothing_is_registered_where_nothing_may_be() {
    let mut cache = Cache::<u32>::new(64 * MIB, 4096);
    for id in 1..1000 {
        cache.touch(0, true, id);
        assert_eq!(cache.wants(0), None);
    }
}

#[test]
fn sections_fit_the_disk_and_the_limit() {
    let shifts = [
        (64 << 30, 8 << 30, RDMA_SECTION_LEN),
        (4096, 4096, RDMA_SECTION_LEN),
        (MIB, MIB, RDMA_SECTION_LEN),
        // Little may be registered: four sections of it at least, while they are not tiny.
        (64 << 30, 32 * MIB, 8 * MIB),
        (64 << 30, 0, RDMA_SECTION_LEN_MIN),
        (32 << 40, 8 << 30, 2 * RDMA_SECTION_LEN),
    ];
    for (disk, limit, len) in shifts {
        assert_eq!(1_usize << section_shift(disk, limit), len, "{disk} {limit}");
    }
    let whole = Cache::<u32>::new(5000, 5000);
    assert_eq!((whole.entries.len(), whole.bytes(0)), (1, 0..5000));
}
