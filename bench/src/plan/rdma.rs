//! The cases of a run over an RDMA device: the mirror over its link, held against bare verbs and perftest, and the same
//! load over TCP at the same address beside it.

use super::{Inproc, LARGE, MIDDLE, Plan, SMALL, STREAM_DEPTH};
use crate::inproc::Via;
use crate::perftest::{self, Perftest};
use crate::report::{Against, Measure};
use crate::{Outcome, RdmaArgs, verbs};
use costandby_datapath::units::PollMode;
use costandby_datapath::wire::frame_len;
use std::net::IpAddr;

/// One load over each carrier, and the title and ids it goes by.
struct Load {
    payload_len: usize,
    depth: usize,
    random: bool,
    /// Of perftest, RDMA and TCP.
    ids: [&'static str; 3],
    titles: [&'static str; 3],
}

const STREAMS: [Load; 3] = [
    Load {
        payload_len: SMALL,
        depth: 32,
        random: true,
        ids: ["perftest-bw-4k-32", "rdma-busy-4k-32", "tcp-busy-4k-32"],
        titles: [
            "perftest ib_write_bw 4 KiB x32",
            "in process 4 KiB x32, busy, RDMA",
            "in process 4 KiB x32, busy, TCP",
        ],
    },
    Load {
        payload_len: MIDDLE,
        depth: STREAM_DEPTH,
        random: false,
        ids: ["perftest-bw-64k-8", "rdma-busy-64k-8", "tcp-busy-64k-8"],
        titles: [
            "perftest ib_write_bw 64 KiB x8",
            "in process 64 KiB x8 sequential, busy, RDMA",
            "in process 64 KiB x8 sequential, busy, TCP",
        ],
    },
    Load {
        payload_len: LARGE,
        depth: STREAM_DEPTH,
        random: false,
        ids: ["perftest-bw-1m-8", "rdma-busy-1m-8", "tcp-busy-1m-8"],
        titles: [
            "perftest ib_write_bw 1 MiB x8",
            "in process 1 MiB x8 sequential, busy, RDMA",
            "in process 1 MiB x8 sequential, busy, TCP",
        ],
    },
];

impl Plan {
    /// Sets everything up for the device.
    pub(crate) fn over_rdma(args: &RdmaArgs) -> Outcome<Self> {
        let mut plan = Self::empty(&args.run)?;
        let (rdma, tcp) = (Via::Rdma(args.address), Via::Tcp(args.address));
        let perftest = Perftest::new(&args.device, args.address, plan.directory.path());
        let with_perftest = match perftest::missing() {
            Some(missing) => {
                plan.skipped.push(missing);
                false
            }
            None => true,
        };
        if with_perftest {
            let perftest = perftest.clone();
            plan.add("perftest-lat-4k", "perftest ib_write_lat 4 KiB, half a round trip", None, move |_| {
                perftest.latency(SMALL)
            });
        }
        plan.add_latencies(args.address, rdma, tcp);
        for load in STREAMS {
            if with_perftest {
                let (perftest, payload_len, depth) = (perftest.clone(), load.payload_len, load.depth);
                plan.add(load.ids[0], load.titles[0], None, move |_| perftest.bandwidth(payload_len, depth));
            }
            let rate = |id| Against { ids: vec![id], measure: Measure::Rate, target: None };
            for (at, via, against) in [(1, rdma, load.ids[0]), (2, tcp, load.ids[1])] {
                let inproc = Inproc {
                    via,
                    poll: PollMode::Busy,
                    depth: load.depth,
                    payload_len: load.payload_len,
                    random: load.random,
                    files: false,
                };
                plan.add_inproc(load.ids[at], load.titles[at], rate(against), inproc);
            }
        }
        Ok(plan)
    }

    fn add_latencies(&mut self, address: IpAddr, rdma: Via, tcp: Via) {
        const FLOOR: &str = "floor-verbs-4k-1";
        const FLOOR_FRAME: &str = "floor-verbs-frame-1";
        const MIRROR: &str = "rdma-busy-4k-1";
        self.add(FLOOR, "floor: bare verbs, 4 KiB out and 64 B back, busy", None, move |time| {
            verbs::floor(address, SMALL, time)
        });
        // A header in front makes two packets of one where the path takes 4096 bytes.
        self.add(FLOOR_FRAME, "floor: bare verbs, 4 KiB + 64 B out and 64 B back", None, move |time| {
            verbs::floor(address, frame_len(SMALL), time)
        });
        let against = |id, target| Against { ids: vec![id], measure: Measure::P50, target };
        let load = Inproc {
            via: rdma,
            poll: PollMode::Busy,
            depth: 1,
            payload_len: SMALL,
            random: true,
            files: false,
        };
        self.add_inproc(MIRROR, "in process 4 KiB x1, busy, RDMA", against(FLOOR, Some(1.2)), load);
        let frames = against(FLOOR_FRAME, None);
        self.add_inproc("rdma-busy-4k-1-again", "the same, against the floor with a header", frames, load);
        let files = Inproc { files: true, ..load };
        self.add_inproc(
            "rdma-busy-4k-1-file",
            "in process 4 KiB x1, busy, RDMA, files",
            against(FLOOR, None),
            files,
        );
        let over_tcp = Inproc { via: tcp, ..load };
        self.add_inproc("tcp-busy-4k-1", "in process 4 KiB x1, busy, TCP", against(MIRROR, None), over_tcp);
        let event = Inproc { poll: PollMode::Event, ..load };
        self.add_inproc("rdma-event-4k-1", "in process 4 KiB x1, event, RDMA", against(MIRROR, None), event);
    }
}
