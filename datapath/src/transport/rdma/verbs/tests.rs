//! The law suite over a real device, both ends in one process: the one that has `COSTANDBY_RDMA_ADDRESS`.

use super::*;
use crate::transport::Link;
use crate::transport::laws::{self, Ends};
use crate::transport::rdma::{Joined, RdmaLink};
use costandby_ffi::mapping::Mapping;
use costandby_ffi::verbs::{Established, Listener, Resolved, Settings};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Many connections at once would only wait for each other on emulated processors.
static ALONE: Mutex<()> = Mutex::new(());

const SETTINGS: Settings = Settings { send_len: 256, receive_len: 512, ack_timeout: 14 };

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A ring of any length, as two of our own introduce themselves only with larger ones.
struct Ring {
    mapping: Arc<Mapping>,
    region: Region,
}

impl Ring {
    fn new(domain: &Domain, len: usize) -> Self {
        let mapping = Mapping::ring(len).unwrap();
        let region = Region::ring(domain, &mapping.span(0, mapping.len())).unwrap();
        Self { mapping, region }
    }

    fn private(&self) -> Vec<u8> {
        [&self.region.address().to_le_bytes()[..], &self.region.remote_key().to_le_bytes()].concat()
    }

    fn link(self, established: Established) -> Box<dyn Link> {
        let Established { queue_pair, private } = established;
        let address = u64::from_le_bytes(private[..8].try_into().unwrap());
        let key = u32::from_le_bytes(private[8..12].try_into().unwrap());
        let joined = Joined {
            peer_ring_len: self.mapping.len() / 2,
            ring: self.mapping,
            receives: SETTINGS.receive_len,
            peer_receives: SETTINGS.receive_len,
            companion: None,
            windows_limit_bytes: 1 << 30,
        };
        let endpoint = VerbsEndpoint::new(queue_pair, self.region, Target { address, key }).unwrap();
        Box::new(RdmaLink::new(endpoint, joined).unwrap())
    }
}

fn pair(address: IpAddr, ring_len: usize) -> Ends {
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let peer = listener.local_address();
    let passive = std::thread::spawn(move || {
        let request = listener.request(soon()).unwrap().unwrap().open().unwrap();
        let ring = Ring::new(request.domain(), ring_len);
        let private = ring.private();
        ring.link(request.accept(&SETTINGS, &private, soon()).unwrap())
    });
    let resolved = Resolved::new(None, peer, soon()).unwrap();
    let ring = Ring::new(resolved.domain(), ring_len);
    let private = ring.private();
    let active = ring.link(resolved.connect(&SETTINGS, &private, soon()).unwrap());
    (active, passive.join().unwrap())
}

macro_rules! device_laws {
    ($($law:ident),* $(,)?) => {
        $(
            #[test]
            fn $law() {
                let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
                    println!("SKIPPED: no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
                    return;
                };
                let address = address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address");
                let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
                laws::$law(&|ring_len| pair(address, ring_len));
            }
        )*
    };
}

device_laws! {
    frames_and_messages_keep_one_order,
    the_ring_goes_round_at_any_size,
    the_largest_frame_passes,
    sent_is_not_an_ack,
    claim_waits_for_release,
    a_peer_that_does_not_read_cannot_grow_us,
    an_ack_that_waits_gives_way_to_the_next,
    a_poll_is_bounded_and_owns_up_to_the_rest,
    each_frame_wakes_who_sleeps,
    closing_here_fails_each_token_once,
    closing_there_comes_after_all_that_arrived,
    an_end_that_is_dropped_is_closed,
    nothing_is_delivered_after_closing_here,
}
