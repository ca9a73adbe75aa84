//! RDMA played by memory: each step can be made to fail, and a dial meets the listener whose secret it shows.
//!
//! Fakes that came from one [`Fabric`] reach each other. What is prepared is a TCP link over the companion, which any
//! reactor can drive.

use super::{Prepared, RdmaListener, RdmaSetup, RingState, Secret, Wanted};
use costandby_datapath::limits::RING_LEN;
use costandby_datapath::transport::Link;
use costandby_datapath::transport::tcp::TcpLink;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Between two looks at whether a connection is still wanted.
const LOOK: Duration = Duration::from_millis(10);

/// Where listeners are found, by port.
type Listeners = Arc<Mutex<HashMap<u16, (Secret, Sender<()>)>>>;

/// What joins fakes.
#[derive(Default)]
pub(in crate::node) struct Fabric {
    listeners: Listeners,
}

/// How the ring comes about.
#[derive(Clone, Copy, Default)]
pub(in crate::node) enum RingScript {
    /// It is there.
    #[default]
    Ready,
    /// It is there when it has been looked at so many times.
    After(u64),
    /// It is being made, for good.
    Never,
    /// It cannot be made.
    Fails(&'static str),
}

/// Which steps fail, and with which words.
#[derive(Clone, Default)]
pub(in crate::node) struct Script {
    pub(in crate::node) able: Option<&'static str>,
    pub(in crate::node) ring: RingScript,
    pub(in crate::node) listen: Option<&'static str>,
    pub(in crate::node) dial: Option<&'static str>,
    pub(in crate::node) accept: Option<&'static str>,
}

/// One node's RDMA. The script may be changed at any time.
#[derive(Clone)]
pub(in crate::node) struct FakeRdma {
    listeners: Listeners,
    script: Arc<Mutex<Script>>,
}

impl Fabric {
    pub(in crate::node) fn node(&self, script: Script) -> Arc<FakeRdma> {
        let listeners = Arc::clone(&self.listeners);
        Arc::new(FakeRdma { listeners, script: Arc::new(Mutex::new(script)) })
    }

    /// Listeners that nobody has connected to or given up.
    pub(in crate::node) fn listening(&self) -> usize {
        self.listeners.lock().expect("no panics").len()
    }
}

impl FakeRdma {
    pub(in crate::node) fn set(&self, script: Script) {
        *self.script.lock().expect("no panics") = script;
    }

    fn step(&self, fails: impl Fn(&Script) -> Option<&'static str>) -> Result<(), String> {
        fails(&self.script.lock().expect("no panics")).map_or(Ok(()), |why| Err(why.to_owned()))
    }
}

fn prepared() -> Prepared {
    Prepared::new(|companion: TcpStream| -> io::Result<Box<dyn Link>> {
        let len = usize::try_from(RING_LEN).expect("64-bit");
        Ok(Box::new(TcpLink::new(companion, len, len)?))
    })
}

impl RdmaSetup for FakeRdma {
    fn able(&self, _: IpAddr) -> Result<(), String> {
        self.step(|script| script.able)
    }

    fn ring(&self, _: IpAddr) -> Result<RingState, String> {
        let mut script = self.script.lock().expect("no panics");
        match &mut script.ring {
            RingScript::Ready | RingScript::After(0) => Ok(RingState::Ready),
            RingScript::After(looks) => {
                *looks -= 1;
                Ok(RingState::Making { percent: 0 })
            }
            RingScript::Never => Ok(RingState::Making { percent: 61 }),
            RingScript::Fails(why) => Err((*why).to_owned()),
        }
    }

    fn listen(&self, local: IpAddr, secret: &Secret) -> Result<Box<dyn RdmaListener>, String> {
        self.step(|script| script.listen)?;
        let (sender, met) = channel();
        let mut listeners = self.listeners.lock().expect("no panics");
        let port = (1..).find(|port| !listeners.contains_key(port)).expect("few");
        listeners.insert(port, (secret.clone(), sender));
        let fake = self.clone();
        Ok(Box::new(FakeListener { address: SocketAddr::new(local, port), met, fake }))
    }

    fn dial(&self, _: IpAddr, to: SocketAddr, shown: &Secret, _: Duration) -> Result<Prepared, String> {
        self.step(|script| script.dial)?;
        let ready =
            matches!(self.script.lock().expect("no panics").ring, RingScript::Ready | RingScript::After(0));
        assert!(ready, "connected without a ring");
        let listeners = self.listeners.lock().expect("no panics");
        match listeners.get(&to.port()) {
            Some((secret, met)) if secret == shown => {
                met.send(()).map_err(|_| "the listener is gone".to_owned())?;
                Ok(prepared())
            }
            _ => Err("turned away".to_owned()),
        }
    }
}

struct FakeListener {
    address: SocketAddr,
    met: Receiver<()>,
    fake: FakeRdma,
}

impl RdmaListener for FakeListener {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn accept(self: Box<Self>, come_max: Duration, _: Duration, wanted: &Wanted) -> Result<Prepared, String> {
        let until = Instant::now() + come_max;
        while let Err(error) = self.met.recv_timeout(LOOK) {
            let late = !wanted.still() || Instant::now() >= until;
            if late || error == RecvTimeoutError::Disconnected {
                return Err("nobody connected".to_owned());
            }
        }
        self.fake.step(|script| script.accept)?;
        Ok(prepared())
    }
}

impl Drop for FakeListener {
    fn drop(&mut self) {
        self.fake.listeners.lock().expect("no panics").remove(&self.address.port());
    }
}
