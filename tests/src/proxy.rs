//! A wire between the nodes that a test can cut in mid-frame, hold up, slow down and corrupt.
//!
//! Alpha dials beta, so one listener in front of beta carries everything. Two threads a connection, one for each
//! direction; all end with the proxy.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often a thread that waits for bytes looks whether it is to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What is to be done to the bytes from alpha to beta.
#[derive(Debug)]
struct Control {
    stop: AtomicBool,
    /// New connections end at once.
    refuse: AtomicBool,
    /// Nothing is read from either side.
    stall: AtomicBool,
    /// Microseconds each piece waits.
    delay_us: AtomicU64,
    /// Bytes from alpha to beta until the connection is cut; negative for never.
    cut_in: AtomicI64,
    /// Bytes from alpha to beta until a bit is turned; negative for never.
    corrupt_in: AtomicI64,
    /// Bytes that went from alpha to beta.
    carried: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

/// The wire. Dropping it cuts everything.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    control: Arc<Control>,
}

impl Proxy {
    /// Listens on an address of its own and carries every connection to `upstream`.
    ///
    /// # Panics
    /// When there is no free address.
    #[must_use]
    pub fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind((upstream.ip(), 0)).expect("a free port");
        let address = listener.local_addr().expect("a bound socket's address");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let control = Arc::new(Control {
            stop: AtomicBool::new(false),
            refuse: AtomicBool::new(false),
            stall: AtomicBool::new(false),
            delay_us: AtomicU64::new(0),
            cut_in: AtomicI64::new(-1),
            corrupt_in: AtomicI64::new(-1),
            carried: AtomicU64::new(0),
            open: Mutex::new(Vec::new()),
        });
        let shared = Arc::clone(&control);
        std::thread::spawn(move || accept(&listener, upstream, &shared));
        Self { address, control }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts the connection after so many more bytes from alpha to beta.
    pub fn cut_after(&self, bytes: u32) {
        self.control.cut_in.store(i64::from(bytes), Ordering::SeqCst);
    }

    /// Turns one bit after so many more bytes from alpha to beta.
    pub fn corrupt_after(&self, bytes: u32) {
        self.control.corrupt_in.store(i64::from(bytes), Ordering::SeqCst);
    }

    /// Whether what [`Proxy::cut_after`] or [`Proxy::corrupt_after`] ordered was done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let done = |left: &AtomicI64| left.load(Ordering::SeqCst) < 0;
        done(&self.control.cut_in) && done(&self.control.corrupt_in)
    }

    /// Reads nothing from either side any more, or again.
    pub fn stall(&self, on: bool) {
        self.control.stall.store(on, Ordering::SeqCst);
    }

    /// Holds each piece up for so long.
    pub fn delay(&self, by: Duration) {
        let us = u64::try_from(by.as_micros()).unwrap_or(u64::MAX);
        self.control.delay_us.store(us, Ordering::SeqCst);
    }

    /// Cuts all connections now.
    pub fn cut(&self) {
        self.control.cut_all();
    }

    /// Lets no new connection through, or again.
    pub fn refuse(&self, on: bool) {
        self.control.refuse.store(on, Ordering::SeqCst);
    }

    /// Bytes that went from alpha to beta so far.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.control.carried.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::SeqCst);
        self.control.cut_all();
    }
}

impl Control {
    fn cut_all(&self) {
        for stream in self.open.lock().expect("nobody panics with it").drain(..) {
            // An error means that it is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

fn accept(listener: &TcpListener, upstream: SocketAddr, control: &Arc<Control>) {
    while !control.stopped() {
        let Ok((near, _)) = listener.accept() else {
            std::thread::sleep(LOOK_INTERVAL);
            continue;
        };
        if control.refuse.load(Ordering::SeqCst) {
            continue;
        }
        let Ok(far) = TcpStream::connect_timeout(&upstream, Duration::from_secs(1)) else { continue };
        let clone = |stream: &TcpStream| stream.try_clone().expect("a socket can be duplicated");
        for stream in [&near, &far] {
            stream.set_nonblocking(false).expect("a socket can block");
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(LOOK_INTERVAL));
            control.open.lock().expect("nobody panics with it").push(clone(stream));
        }
        for (from, to, to_beta) in [(clone(&near), clone(&far), true), (far, near, false)] {
            let control = Arc::clone(control);
            std::thread::spawn(move || carry(from, to, to_beta, &control));
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, to_beta: bool, control: &Control) {
    let mut bytes = vec![0; 64 << 10];
    while !control.stopped() {
        if control.stall.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK_INTERVAL);
            continue;
        }
        let mut len = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(_) => break,
        };
        let delay_us = control.delay_us.load(Ordering::SeqCst);
        if delay_us > 0 {
            std::thread::sleep(Duration::from_micros(delay_us));
        }
        let mut last = false;
        if to_beta {
            if let Some(at) = due(&control.corrupt_in, len) {
                bytes[at] ^= 0x10;
            }
            if let Some(at) = due(&control.cut_in, len) {
                (len, last) = (at, true);
            }
            control.carried.fetch_add(len as u64, Ordering::SeqCst);
        }
        if to.write_all(&bytes[..len]).is_err() || last {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Where in the next `len` bytes the moment falls, if it does; counts them otherwise.
fn due(left: &AtomicI64, len: usize) -> Option<usize> {
    let now = left.load(Ordering::SeqCst);
    let len = i64::try_from(len).expect("a buffer's length");
    if now < 0 {
        return None;
    }
    if now < len {
        left.store(-1, Ordering::SeqCst);
        return usize::try_from(now).ok();
    }
    left.store(now - len, Ordering::SeqCst);
    None
}
