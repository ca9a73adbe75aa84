//! The floor: what the same bytes cost over bare sockets, with no disk, no checksum and no protocol.
//!
//! One thread sends frames of a 64-byte header and a payload by gather calls, as many as the depth allows in one call;
//! the other counts whole frames and answers each receive call that completed one with a 64-byte cumulative ack. That
//! is the traffic of the mirror at its best, so no mirror over TCP can be faster on the same machine.
//!
//! Each end checks the other: acks count what was sent, and at the end everything sent was acked.

use crate::Outcome;
use crate::histogram::{Recorder, Summary};
use costandby_datapath::wire::{HEADER_LEN, frame_len};
use costandby_ffi::net::{Piece, send_pieces};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, recv};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Frames one gather call sends at most: two pieces each.
const GATHER_FRAMES_MAX: usize = 32;

/// Bytes one receive call takes at most: a few of the largest frames, and it stays in the processor's cache.
const RECEIVE_LEN_MAX: usize = 2 << 20;

/// How the two ends wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wait {
    /// Non-blocking calls, again and again.
    Busy,
    /// In the kernel, until there is something.
    Sleep,
}

/// One load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Where both ends meet.
    pub(crate) address: IpAddr,
    pub(crate) wait: Wait,
    /// Frames under way at a time.
    pub(crate) depth: usize,
    pub(crate) payload_len: usize,
    /// How long, a tenth of it for warming up before.
    pub(crate) time: Duration,
}

/// A connected pair over TCP at an address of this machine, without Nagle's delay.
pub(crate) fn tcp_pair(address: IpAddr) -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((address, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// Runs the load.
pub(crate) fn run(load: Load) -> Outcome<Summary> {
    let (near, far) = tcp_pair(load.address)?;
    let answering = std::thread::Builder::new().name("floor".into()).spawn(move || answer(&far, load))?;
    let sent = Sender::new(&near, load).drive();
    drop(near);
    answering.join().expect("the answering thread does not panic")?;
    Ok(sent?)
}

fn receive(stream: &TcpStream, wait: Wait, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let flags = if wait == Wait::Busy { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
    match recv(stream, buffer, flags) {
        Ok((_, count)) => Ok(Some(count)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The far end: counts frames, acks, until the near end closes.
fn answer(stream: &TcpStream, load: Load) -> io::Result<()> {
    let frame_len = frame_len(load.payload_len) as u64;
    let mut buffer = vec![0; RECEIVE_LEN_MAX];
    let (mut received, mut acked) = (0_u64, 0_u64);
    loop {
        let Some(count) = receive(stream, load.wait, &mut buffer)? else {
            std::hint::spin_loop();
            continue;
        };
        if count == 0 {
            return Ok(());
        }
        received += count as u64;
        let whole = received / frame_len;
        if whole > acked {
            acked = whole;
            let mut ack = [0; HEADER_LEN];
            ack[..8].copy_from_slice(&whole.to_le_bytes());
            let mut out = 0;
            // A window of acks always fits the socket, so this goes round once.
            while out < HEADER_LEN {
                match send_pieces(stream.as_fd(), &[Piece::Bytes(&ack[out..])]) {
                    Ok(taken) => out += taken,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// The near end.
struct Sender<'a> {
    stream: &'a TcpStream,
    load: Load,
    header: [u8; HEADER_LEN],
    payload: Vec<u8>,
    recorder: Recorder,
    /// When each frame under way began.
    began: VecDeque<Instant>,
    sent: u64,
    acked: u64,
    /// Bytes of begun frames that the socket has not taken yet.
    unsent: usize,
    acks: [u8; 64 * HEADER_LEN],
    acks_len: usize,
}

impl<'a> Sender<'a> {
    fn new(stream: &'a TcpStream, load: Load) -> Self {
        Self {
            stream,
            load,
            header: [0x5a; HEADER_LEN],
            payload: vec![0xa5; frame_len(load.payload_len) - HEADER_LEN],
            recorder: Recorder::new(load.payload_len),
            began: VecDeque::with_capacity(load.depth),
            sent: 0,
            acked: 0,
            unsent: 0,
            acks: [0; 64 * HEADER_LEN],
            acks_len: 0,
        }
    }

    fn drive(mut self) -> io::Result<Summary> {
        let start = Instant::now();
        let (warm, end) = (start + self.load.time / 10, start + self.load.time / 10 + self.load.time);
        let mut warming = true;
        let mut now = start;
        while now < end {
            if warming && now >= warm {
                warming = false;
                self.recorder.restart();
            }
            self.begin(now);
            self.send()?;
            if self.take_acks()? {
                now = Instant::now();
                self.end(now);
            } else if self.load.wait == Wait::Busy {
                std::hint::spin_loop();
            }
        }
        let summary = self.recorder.finish();
        while self.acked < self.sent {
            self.send()?;
            self.take_acks()?;
        }
        Ok(summary)
    }

    fn begin(&mut self, now: Instant) {
        while self.began.len() < self.load.depth {
            self.began.push_back(now);
            self.sent += 1;
            self.unsent += HEADER_LEN + self.payload.len();
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let frame_len = HEADER_LEN + self.payload.len();
        while self.unsent > 0 {
            let mut pieces = [Piece::Bytes(&[]); 2 * GATHER_FRAMES_MAX];
            let (mut used, mut rest) = (0, self.unsent);
            while rest > 0 && used < pieces.len() {
                let out = (frame_len - rest % frame_len) % frame_len;
                pieces[used] = Piece::Bytes(&self.header[out.min(HEADER_LEN)..]);
                pieces[used + 1] = Piece::Bytes(&self.payload[out.saturating_sub(HEADER_LEN)..]);
                used += 2;
                rest -= frame_len - out;
            }
            match send_pieces(self.stream.as_fd(), &pieces[..used]) {
                Ok(taken) => self.unsent -= taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes in what acks are here. In sleeping mode waits for some, or for the socket to take more.
    fn take_acks(&mut self) -> io::Result<bool> {
        if self.load.wait == Wait::Sleep && self.unsent > 0 {
            let mut wanted = [PollFd::new(self.stream, PollFlags::IN | PollFlags::OUT)];
            poll(&mut wanted, None)?;
            if !wanted[0].revents().contains(PollFlags::IN) {
                return Ok(false);
            }
        }
        let Some(count) = receive(self.stream, self.load.wait, &mut self.acks[self.acks_len..])? else {
            return Ok(false);
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.acks_len += count;
        let whole = self.acks_len / HEADER_LEN * HEADER_LEN;
        if whole == 0 {
            return Ok(false);
        }
        let last: [u8; 8] = self.acks[whole - HEADER_LEN..][..8].try_into().expect("8 bytes");
        self.acks.copy_within(whole..self.acks_len, 0);
        self.acks_len -= whole;
        let acked = u64::from_le_bytes(last);
        if acked <= self.acked || acked > self.sent {
            return Err(io::Error::other(format!("ack {acked} after {} of {} sent", self.acked, self.sent)));
        }
        self.acked = acked;
        Ok(true)
    }

    fn end(&mut self, now: Instant) {
        let under_way = usize::try_from(self.sent - self.acked).expect("at most the depth");
        for began in self.began.drain(..self.began.len() - under_way) {
            self.recorder.record(now - began);
        }
    }
}

/// The rate of copying memory, `piece_len` bytes at a time out of the cache into a disk's worth of memory.
pub(crate) fn memory_copy(piece_len: usize, disk_len: usize, time: Duration) -> Summary {
    let source = vec![1_u8; piece_len];
    let mut disk = vec![0_u8; disk_len];
    let mut recorder = Recorder::new(piece_len);
    let start = Instant::now();
    'run: loop {
        for piece in disk.chunks_exact_mut(piece_len) {
            let began = Instant::now();
            piece.copy_from_slice(&source);
            std::hint::black_box(piece);
            recorder.record(began.elapsed());
            if start.elapsed() >= time {
                break 'run;
            }
        }
    }
    recorder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn every_mode_and_depth_gets_answers() {
        for (wait, depth, payload_len) in [
            (Wait::Busy, 1, 4096),
            (Wait::Sleep, 1, 4096),
            (Wait::Sleep, 32, 4096),
            (Wait::Sleep, 4, 1 << 20),
        ] {
            let summary =
                run(Load { address: LOOPBACK, wait, depth, payload_len, time: Duration::from_millis(30) })
                    .expect("loopback");
            assert!(
                summary.requests > 0 && summary.p50_us > 0.0,
                "{wait:?} {depth} {payload_len}: {summary:?}"
            );
        }
    }
}
