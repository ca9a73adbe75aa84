//! Micro benchmarks of what a mirrored write passes: checksum, copies, headers, range locks, the pipeline.
//!
//! `cargo bench -p costandby-bench`. The sum of these is what a mirrored write may cost beyond the bare sockets.

use costandby_datapath::disk::inflight::{Access, Admission, Inflight};
use costandby_datapath::limits::{WAITERS_LEN, WINDOW_LEN};
use costandby_datapath::mirror::pipeline::{Action, Change, Event, Pipeline};
use costandby_datapath::units::{AckLevel, ByteRange, Epoch, OnPeerLoss, Seq, Token};
use costandby_datapath::wire::{Header, Kind};
use costandby_ffi::mapping::Mapping;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const LENS: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

fn spans(c: &mut Criterion) {
    let (from, to) =
        (Mapping::anonymous(1 << 20).expect("memory"), Mapping::anonymous(1 << 20).expect("memory"));
    let mut group = c.benchmark_group("span");
    for len in LENS {
        let (source, target, bytes) = (from.span(0, len), to.span(0, len), vec![7; len]);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("crc32c", len), |b| b.iter(|| black_box(source.crc32c())));
        group.bench_function(BenchmarkId::new("copy_to", len), |b| b.iter(|| source.copy_to(&target)));
        group.bench_function(BenchmarkId::new("write_from", len), |b| b.iter(|| target.write_from(&bytes)));
    }
    group.finish();
}

fn headers(c: &mut Criterion) {
    let mut header = Header::new(Kind::Write, Epoch(7));
    header.seq = Seq(1);
    header.range = ByteRange::new(1 << 30, 4096);
    let wire = header.encode();
    assert_eq!(Header::decode(&wire).expect("our own"), header);
    let mut group = c.benchmark_group("header");
    group.bench_function("encode", |b| b.iter(|| black_box(&header).encode()));
    group.bench_function("decode", |b| b.iter(|| Header::decode(black_box(&wire)).expect("our own")));
    group.finish();
}

fn locks(c: &mut Criterion) {
    let mut group = c.benchmark_group("inflight");
    for depth in [1_u64, 32] {
        let mut inflight = Inflight::new(WINDOW_LEN, WAITERS_LEN);
        let mut granted = Vec::with_capacity(WINDOW_LEN);
        for other in 1..depth {
            let admission = inflight.request(Token(other), ByteRange::new(other << 20, 4096), Access::Change);
            assert_eq!(admission, Admission::Granted);
        }
        group.bench_function(BenchmarkId::new("request_release", depth), |b| {
            b.iter(|| {
                let admission = inflight.request(Token(0), ByteRange::new(8192, 4096), Access::Change);
                assert_eq!(admission, Admission::Granted);
                inflight.release(Token(0), 8192, &mut granted);
            });
        });
    }
    group.finish();
}

fn pipeline(c: &mut Criterion) {
    let session = || {
        let mut pipeline = Pipeline::new(AckLevel::Memory, OnPeerLoss::Continue);
        let mut actions = Vec::with_capacity(2 * WINDOW_LEN);
        pipeline.handle(Event::SessionUp { in_sync: true }, &mut actions).expect("not an ack");
        (pipeline, actions)
    };
    let change = Change { token: Token(1), kind: Kind::Write, range: ByteRange::new(4096, 4096), flags: 0 };
    c.bench_function("pipeline/32_landed_acked_one_by_one", |b| {
        b.iter_batched_ref(
            session,
            |(pipeline, actions)| {
                for seq in 1..=32 {
                    pipeline.handle(Event::Landed(change), actions).expect("not an ack");
                    let ack = Event::Ack { applied: Seq(seq), durable: Seq::ZERO };
                    pipeline.handle(ack, actions).expect("of what was sent");
                    assert!(actions.iter().any(|action| matches!(action, Action::Complete(_))));
                    actions.clear();
                }
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, spans, headers, locks, pipeline);
criterion_main!(benches);
