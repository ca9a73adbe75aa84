//! Over the device that has `COSTANDBY_RDMA_ADDRESS`, both ends in one process: what is trimmed and written again under
//! a registered section is what the device sends.

use super::*;
use crate::disk::image::Extent;
use crate::transport::rdma::endpoint::{Completion, Endpoint};
use crate::transport::rdma::setup::{Connected, both_ends};
use costandby_ffi::testing::{scaled, skip_outside_rig};

const RING_LEN: usize = 64 << 20;
const LEN: usize = 64 << 10;
const SIZE: u64 = 1 << 20;

const STEP_MAX: Duration = Duration::from_secs(30);

fn soon() -> Instant {
    Instant::now() + scaled(STEP_MAX)
}

/// A disk at one end, and what arrives at the other.
struct Device {
    here: Connected,
    there: Connected,
    id: u64,
}

impl Device {
    fn new(address: std::net::IpAddr) -> Self {
        let [here, there] = both_ends(address, RING_LEN, STEP_MAX).expect("connects");
        Self { here, there, id: 0 }
    }

    /// Sends the span by one write, from a section or from the bounce buffer. Returns which, and the byte that arrived all over.
    fn send(
        &mut self,
        registrations: &mut Registrations<impl Registrar<Region = Region>>,
        span: &Span,
    ) -> (bool, u8) {
        self.id += 1;
        let (direct, piece) = match registrations.source(span, 0, span.len(), false, self.id) {
            Source::Direct(piece) => (true, piece),
            Source::Bounced(piece) => (false, piece),
            other => panic!("{other:?}"),
        };
        assert_eq!(piece.len, span.len());
        self.here.endpoint.write(&[piece], 0, Some(0), self.id, true);
        self.here.endpoint.ring_doorbell().expect("posts");
        assert_eq!(completion(&mut self.there.endpoint), Completion::Placed { immediate: 0 });
        assert_eq!(completion(&mut self.here.endpoint), Completion::Done { id: self.id });
        registrations.done_up_to(self.id);
        let mut bytes = vec![0; span.len()];
        self.there.ring.span(0, span.len()).read_into(&mut bytes);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a mixture arrived");
        (direct, bytes[0])
    }
}

type Region = <crate::transport::rdma::verbs::VerbsEndpoint as Endpoint>::Region;

fn completion(endpoint: &mut impl Endpoint) -> Completion {
    let deadline = soon();
    let mut completions = [Completion::Done { id: 0 }];
    while endpoint.poll(&mut completions).expect("works") == 0 {
        assert!(Instant::now() < deadline, "nothing completes");
    }
    completions[0]
}

#[test]
fn what_is_trimmed_under_a_section_is_sent_as_it_is_then() {
    let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
        skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
        return;
    };
    let mut device = Device::new(address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address"));
    let file = tempfile::NamedTempFile::new().expect("temp file");
    file.as_file().set_len(SIZE).expect("set_len");
    let on_file = DiskImage::open(file.path(), SIZE).expect("opens");
    for disk in [on_file, DiskImage::memory("t", SIZE).expect("memory")] {
        let mut registrations = Registrations::new(&device.here.endpoint.registrar(), SIZE).expect("starts");
        let range = ByteRange::new(128 << 10, LEN as u64);
        let span = disk.span(range);
        span.write_from(&vec![1; LEN]);
        let deadline = soon();
        assert_eq!(
            device.send(&mut registrations, &span),
            (false, 1),
            "the first goes through the bounce buffer"
        );
        while device.send(&mut registrations, &span) != (true, 1) {
            assert!(Instant::now() < deadline, "never registered: {:?}", registrations.counters());
        }
        for (clear, next) in [(DiskImage::punch as fn(&DiskImage, ByteRange) -> _, 2), (DiskImage::zero, 3)] {
            clear(&disk, range).expect("clears");
            assert_eq!(device.send(&mut registrations, &span), (true, 0), "the old page was sent");
            span.write_from(&vec![next; LEN]);
            assert_eq!(device.send(&mut registrations, &span), (true, next), "the old page was sent");
        }
        // Once nothing is registered any more, blocks are given back.
        drop(registrations);
        while disk.mapping().pins_len() > 0 {
            assert!(Instant::now() < deadline, "the section is still registered");
            std::thread::sleep(Duration::from_millis(1));
        }
        disk.punch(ByteRange::new(0, SIZE)).expect("punches");
        let hole = Extent { range: ByteRange::new(0, SIZE), hole: true };
        assert_eq!(disk.extent_at(0, SIZE), hole);
    }
}
