//! RDMA as this machine has it: the datapath's verbs behind [`super::RdmaSetup`].

use super::{Makers, Prepared, RdmaListener, RdmaSetup, RingState, Secret, Wanted};
use costandby_datapath::limits::{PAYLOAD_LEN_MAX, RDMA_BOUNCE_LEN, RDMA_RING_LEN};
use costandby_datapath::transport::rdma::keeper::{Making, Whereabouts};
use costandby_datapath::transport::rdma::ring::{Ring, RingKeeper, RingLease};
use costandby_datapath::transport::rdma::setup::{self, Connected, Listening, SetupError};
use costandby_datapath::transport::rdma::{Joined, RdmaLink, private_data};
use costandby_datapath::transport::{Link, ring_takes};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;

/// How long a ring that could not be made is told of. Whoever waited for it asks many times in that time; a later
/// conversation has it tried again.
const FAILURE_FRESH: Duration = Duration::from_secs(1);

/// How long a connection waits for the ring of the link before: its reactor lets go of it within a turn, and whoever
/// gave up a conversation within a moment.
const LEND_MAX: Duration = Duration::from_secs(1);

/// Between two looks at it.
const LEND_LOOK: Duration = Duration::from_millis(2);

/// A volume's RDMA over this machine's devices.
pub(super) struct Verbs {
    /// Bytes of a disk that a link may register.
    registered_bytes_max: u64,
    keeper: RingKeeper,
    makers: Makers,
    /// When and why the ring could not be made, last time.
    failed: Arc<Mutex<Option<(Instant, String)>>>,
}

fn ring_len() -> usize {
    usize::try_from(RDMA_RING_LEN).expect("64-bit")
}

fn secret(secret: &Secret) -> private_data::Secret {
    private_data::Secret(secret.0)
}

/// The volume's ring for a link, as soon as it is free.
fn lend(keeper: &RingKeeper) -> Option<RingLease> {
    let until = Instant::now() + LEND_MAX;
    loop {
        let lease = keeper.lend();
        if lease.is_some() || keeper.look() != Whereabouts::InUse || Instant::now() >= until {
            return lease;
        }
        std::thread::sleep(LEND_LOOK);
    }
}

/// The link, but for its companion. Made while the peer can still be told that there will be none.
fn prepared(connected: Connected, registered_bytes_max: u64) -> Result<Prepared, String> {
    let Connected { endpoint, ring, receives, peer_ring_len, peer_receives } = connected;
    if !ring_takes(peer_ring_len, PAYLOAD_LEN_MAX as usize) {
        return Err(format!("the peer announces a ring of {peer_ring_len} bytes, which cannot be used"));
    }
    let joined =
        Joined { ring, receives, peer_ring_len, peer_receives, companion: None, registered_bytes_max };
    let mut link =
        RdmaLink::new(endpoint, joined).map_err(|error| format!("making the RDMA link: {error}"))?;
    Ok(Prepared::new(move |companion: TcpStream| -> io::Result<Box<dyn Link>> {
        link.accompany(companion)?;
        Ok(Box::new(link))
    }))
}

impl Verbs {
    pub(super) fn new(registered_bytes_max: u64, makers: Makers) -> Self {
        Self { registered_bytes_max, keeper: RingKeeper::default(), makers, failed: Arc::default() }
    }

    /// Makes the ring in the background, in its turn.
    fn make(&self, making: Making<Ring>, local: IpAddr) {
        let (places, failed) = (Arc::clone(&self.makers.places), Arc::clone(&self.failed));
        tokio::spawn(async move {
            let place = places.acquire_owned().await.expect("never closed");
            let began = Instant::now();
            let made = spawn_blocking(move || Ring::make(making, local, ring_len())).await;
            drop(place);
            match made.expect("a panic has ended the process") {
                Ok(()) => {
                    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                    tracing::debug!(%local, took_ms, "the ring of a volume is registered for RDMA");
                }
                // The volume's task has ended.
                Err(SetupError::GivenUp) => {}
                Err(error) => {
                    let why = (Instant::now(), error.to_string());
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                }
            }
        });
    }
}

impl RdmaSetup for Verbs {
    fn able(&self, local: IpAddr) -> Result<(), String> {
        let listener = setup::listener(local).map_err(|error| error.to_string())?;
        // The address may have come to another device since the ring was registered.
        self.keeper.forget_unless(|ring| ring.is_of(&listener));
        Ok(())
    }

    fn ring(&self, local: IpAddr) -> Result<RingState, String> {
        match self.keeper.look() {
            Whereabouts::Here => return Ok(RingState::Ready),
            Whereabouts::InUse => return Ok(RingState::InUse),
            Whereabouts::Making { done_bytes } => {
                return Ok(RingState::Making {
                    percent: done_bytes * 100 / (RDMA_RING_LEN + RDMA_BOUNCE_LEN as u64),
                });
            }
            Whereabouts::Nowhere => {}
        }
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((when, why)) = failed
            && when.elapsed() < FAILURE_FRESH
        {
            return Err(why);
        }
        if let Some(making) = self.keeper.begin() {
            self.make(making, local);
        }
        Ok(RingState::Making { percent: 0 })
    }

    fn listen(&self, local: IpAddr, shown: &Secret) -> Result<Box<dyn RdmaListener>, String> {
        let listening = Listening::bind(local, secret(shown)).map_err(|error| error.to_string())?;
        let (registered_bytes_max, keeper) = (self.registered_bytes_max, self.keeper.clone());
        Ok(Box::new(VerbsListener { listening, registered_bytes_max, keeper }))
    }

    fn dial(
        &self,
        local: IpAddr,
        to: SocketAddr,
        shown: &Secret,
        step_max: Duration,
    ) -> Result<Prepared, String> {
        let ring = lend(&self.keeper).ok_or_else(|| SetupError::RingInUse.to_string())?;
        let connected = setup::dial(local, to, secret(shown), ring, step_max);
        prepared(connected.map_err(|error| error.to_string())?, self.registered_bytes_max)
    }
}

struct VerbsListener {
    listening: Listening,
    registered_bytes_max: u64,
    keeper: RingKeeper,
}

impl RdmaListener for VerbsListener {
    fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    fn accept(
        self: Box<Self>,
        come_max: Duration,
        step_max: Duration,
        wanted: &Wanted,
    ) -> Result<Prepared, String> {
        let keeper = &self.keeper;
        let connected = self.listening.accept(come_max, step_max, || wanted.still(), || lend(keeper));
        prepared(connected.map_err(|error| error.to_string())?, self.registered_bytes_max)
    }
}
