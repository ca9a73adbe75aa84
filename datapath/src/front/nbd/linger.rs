//! Keeps the sockets of closed NBD connections until their clients have closed them too.
//!
//! TCP answers bytes that reach a closed socket with a reset, and a reset destroys the replies that are still on their way to
//! the client. So the reactor's last step for a connection is to end its own direction, then to read and discard what the
//! client still sends, until the client closes, or has had [`LINGER_MS_MAX`] and sent [`LINGER_LEN_MAX`].
//!
//! Off the hot path: nothing here is called while no connection has ended. No call blocks but [`Lingering::finish`].

use crate::limits::{LINGER_LEN_MAX, LINGER_LOOK_LEN, LINGER_LOOK_MS, LINGER_MS_MAX, LINGERING_MAX};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// One such socket.
#[derive(Debug)]
struct End {
    socket: OwnedFd,
    until: Instant,
    left: usize,
}

impl End {
    /// Reads some of what the client sent. False when the socket may close.
    fn look(&mut self, now: Instant) -> bool {
        let mut scrap = [0; 16 << 10];
        let mut room = LINGER_LOOK_LEN.min(self.left);
        while room > 0 {
            let take = room.min(scrap.len());
            match recv(&self.socket, &mut scrap[..take], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return false,
                Ok((_, n)) => {
                    room -= n;
                    self.left -= n;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // The client is gone.
                Err(_) => return false,
            }
        }
        self.left > 0 && now < self.until
    }
}

/// The sockets that linger, the oldest first.
#[derive(Debug, Default)]
pub struct Lingering {
    ends: VecDeque<End>,
}

impl Lingering {
    /// Ends our direction of the socket, whose last reply was sent, and keeps the socket as long as that is of use.
    pub fn add(&mut self, socket: OwnedFd, now: Instant) {
        // An error: the client is gone, as the look finds out.
        let _ = shutdown(&socket, Shutdown::Write);
        let until = now + Duration::from_millis(LINGER_MS_MAX);
        let mut end = End { socket, until, left: LINGER_LEN_MAX };
        if !end.look(now) {
            return;
        }
        if self.ends.len() >= LINGERING_MAX {
            self.close_oldest();
        }
        self.ends.push_back(end);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Closes the oldest, if there is one.
    pub fn close_oldest(&mut self) {
        self.ends.pop_front();
    }

    /// Looks at each. Returns when that is due again, if it is.
    pub fn tend(&mut self, now: Instant) -> Option<Instant> {
        self.ends.retain_mut(|end| end.look(now));
        (!self.ends.is_empty()).then(|| now + Duration::from_millis(LINGER_LOOK_MS))
    }

    /// Waits until none is left. Blocks, for [`LINGER_MS_MAX`] at most.
    pub fn finish(mut self) {
        while let Some(next) = self.tend(Instant::now()) {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};

    /// A client, and the server's end of its connection.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
        let (server, _) = listener.accept().expect("a client");
        server.set_nonblocking(true).expect("set");
        (client, server)
    }

    /// Fills the socket with replies, and says how many bytes it took.
    fn fill(server: &mut TcpStream) -> usize {
        let mut sent = 0;
        loop {
            match server.write(&[0xAB; 64 << 10]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return sent,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn replies_reach_a_client_that_still_sends() {
        let (mut client, mut server) = connection();
        client.write_all(&[1; 4096]).expect("sends");
        let sent = fill(&mut server);
        let mut lingering = Lingering::default();
        lingering.add(server.into(), Instant::now());
        // Requests that come after the end, as from a client that has not seen the end yet.
        for _ in 0..3 {
            client.write_all(&[2; 4096]).expect("sends");
            std::thread::sleep(Duration::from_millis(2));
            assert!(lingering.tend(Instant::now()).is_some(), "the client has not closed");
        }
        let reader = std::thread::spawn(move || {
            let mut told = Vec::new();
            client.read_to_end(&mut told).map(|_| told.len())
        });
        lingering.finish();
        assert_eq!(reader.join().expect("no panic").expect("no reset"), sent);
    }

    #[test]
    fn a_client_that_closes_is_not_waited_for() {
        let (client, server) = connection();
        drop(client);
        let mut lingering = Lingering::default();
        let began = Instant::now();
        lingering.add(server.into(), began);
        lingering.finish();
        assert!(began.elapsed() < Duration::from_millis(LINGER_MS_MAX / 2), "{:?}", began.elapsed());
    }

    #[test]
    fn no_client_is_waited_for_longer_than_said_or_beyond_what_it_may_send() {
        let (_client, server) = connection();
        let mut lingering = Lingering::default();
        let now = Instant::now();
        lingering.add(server.into(), now);
        assert!(lingering.tend(now + Duration::from_millis(LINGER_MS_MAX - 1)).is_some());
        assert_eq!(lingering.tend(now + Duration::from_millis(LINGER_MS_MAX)), None);

        let (mut client, server) = connection();
        let sender = std::thread::spawn(move || {
            let mut sent = 0;
            while let Ok(n) = client.write(&[0; 64 << 10]) {
                sent += n;
            }
            sent
        });
        lingering.add(server.into(), now);
        // Time stands still: the bytes alone end it.
        while lingering.tend(now).is_some() {
            std::thread::yield_now();
        }
        assert!(sender.join().expect("no panic") >= LINGER_LEN_MAX);
    }

    #[test]
    fn those_that_linger_are_bounded() {
        let mut lingering = Lingering::default();
        let clients: Vec<_> = (0..=LINGERING_MAX)
            .map(|_| {
                let (client, server) = connection();
                lingering.add(server.into(), Instant::now());
                client
            })
            .collect();
        assert_eq!(lingering.ends.len(), LINGERING_MAX);
        drop(clients);
    }
}
