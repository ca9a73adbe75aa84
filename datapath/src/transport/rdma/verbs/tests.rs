//! The conformance suite over a real device, both ends in one process: the one that has `COSTANDBY_RDMA_ADDRESS`. Once as it is,
//! and once with frames held up, lost, doubled and damaged.

use super::*;
use crate::testing::conformance::Ends;
use crate::testing::fault::{FaultLink, Plan, tests as faults};
use crate::transport::Link;
use crate::transport::rdma::ring::Ring;
use crate::transport::rdma::{Joined, RdmaLink};
use costandby_ffi::testing::{scaled, skip_outside_rig};
use costandby_ffi::verbs::{Established, Listener, Resolved, Settings};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Many connections at once would only wait for each other on emulated processors.
static ALONE: Mutex<()> = Mutex::new(());

const SETTINGS: Settings = Settings { send_len: 256, receive_len: 512, ack_timeout: 14 };

fn soon() -> Instant {
    Instant::now() + scaled(Duration::from_secs(20))
}

/// What the other end is told of a ring of any length: two of our own introduce themselves only with larger ones.
fn private(ring: &RingLease) -> Vec<u8> {
    let region = ring.ring().region();
    [&region.address().to_le_bytes()[..], &region.remote_key().to_le_bytes()].concat()
}

fn link(ring: RingLease, established: Established) -> RdmaLink<VerbsEndpoint> {
    let Established { queue_pair, private } = established;
    let address = u64::from_le_bytes(private[..8].try_into().unwrap());
    let key = u32::from_le_bytes(private[8..12].try_into().unwrap());
    let joined = Joined {
        peer_ring_len: ring.ring().len(),
        ring: Arc::clone(ring.ring().mapping()),
        receives: SETTINGS.receive_len,
        peer_receives: SETTINGS.receive_len,
        companion: None,
        registered_bytes_max: 1 << 30,
    };
    let endpoint = VerbsEndpoint::new(queue_pair, ring, Target { address, key }).unwrap();
    RdmaLink::new(endpoint, joined).unwrap()
}

fn pair(address: IpAddr, ring_len: usize, plan: Option<Plan>) -> Ends {
    let [ours, theirs] = [(); 2].map(|()| RingLease::of(Ring::new(address, ring_len, |_| true).unwrap()));
    let listener = Listener::bind(SocketAddr::new(address, 0)).unwrap();
    let peer = listener.local_address();
    let passive = std::thread::spawn(move || {
        let request = listener.request(soon()).unwrap().unwrap();
        let request = request.open_within(theirs.ring().domain()).unwrap();
        let established = request.accept(&SETTINGS, &private(&theirs), soon()).unwrap();
        link(theirs, established)
    });
    let resolved = Resolved::within(ours.ring().domain(), None, peer, soon()).unwrap();
    let established = resolved.connect(&SETTINGS, &private(&ours), soon()).unwrap();
    let active = link(ours, established);
    let ends = [active, passive.join().unwrap()];
    let [here, there] = ends.map(|link| match plan {
        None => Box::new(link) as Box<dyn Link>,
        Some(plan) => Box::new(FaultLink::new(link, plan)),
    });
    (here, there)
}

/// The device's address and the right to it, if there is one.
fn device() -> Option<(IpAddr, MutexGuard<'static, ()>)> {
    let Ok(address) = std::env::var("COSTANDBY_RDMA_ADDRESS") else {
        skip_outside_rig("no RDMA device (COSTANDBY_RDMA_ADDRESS is not set)");
        return None;
    };
    let address = address.parse().expect("COSTANDBY_RDMA_ADDRESS is an IP address");
    Some((address, ALONE.lock().unwrap_or_else(PoisonError::into_inner)))
}

macro_rules! device_laws {
    ($plan:expr => $($law:ident),* $(,)?) => {
        $(
            #[test]
            fn $law() {
                let Some((address, _alone)) = super::device() else { return };
                crate::testing::conformance::$law(&|ring_len| super::pair(address, ring_len, $plan));
            }
        )*
    };
    ($plan:expr) => {
        device_laws! {
            $plan =>
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
    };
}

mod as_it_is {
    device_laws!(None);
}

mod late {
    device_laws!(Some(super::Plan { delay: Some(4), ..Default::default() }));
}

#[test]
fn faults_on_the_device_are_the_planned_ones() {
    let Some((address, _alone)) = device() else { return };
    let make = |ring_len, plan| pair(address, ring_len, Some(plan));
    faults::loses_and_doubles_as_planned(&make);
    faults::damages_as_planned(&make);
}
