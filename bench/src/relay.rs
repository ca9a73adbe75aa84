//! A relay between the two daemons of a case, which counts the bytes that one sends to the other.

use crate::Outcome;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Stands between alpha and beta and counts what alpha sends.
pub(crate) struct Relay {
    address: SocketAddr,
    /// Where beta listens; nobody is let through before that is known.
    upstream: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
}

impl Relay {
    /// Listens on loopback. Its threads end with the process.
    pub(crate) fn start() -> Outcome<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let (upstream, sent) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (to, counter) = (Arc::clone(&upstream), Arc::clone(&sent));
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            for near in listener.incoming().flatten() {
                let port = u16::try_from(to.load(Ordering::SeqCst)).expect("a port was stored");
                // Beta may not be up yet: alpha's connection ends, and alpha tries again.
                let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { continue };
                let _ = near.set_nodelay(true).and_then(|()| far.set_nodelay(true));
                if let (Ok(near_back), Ok(far_back)) = (near.try_clone(), far.try_clone()) {
                    let _ = carry(near, far, Some(Arc::clone(&counter)));
                    let _ = carry(far_back, near_back, None);
                }
            }
        })?;
        Ok(Self { address, upstream, sent })
    }

    /// The port that stands for beta's.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Beta listens there.
    pub(crate) fn lead_to(&self, port: u16) {
        self.upstream.store(port.into(), Ordering::SeqCst);
    }

    /// Bytes that alpha has sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, counter: Option<Arc<AtomicU64>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut bytes = vec![0; 256 << 10];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..len]).is_err() {
                break;
            }
            if let Some(counter) = &counter {
                counter.fetch_add(len as u64, Ordering::SeqCst);
            }
        }
        // Both directions end together, as with one connection.
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = from.shutdown(std::net::Shutdown::Both);
    })
}
