//! Clients that send slowly, close in the middle, half-close, or do not read: two real daemons, and clients made by hand.
//!
//! None of them may hold up another client, a verification or a resync, have an older write carried out after a newer one, or
//! make the daemon hold memory without bound.

use costandby_control::nbd_client::{NbdClient, Options};
use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use costandby_tests::wait_for;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const READ: u8 = 0;
const WRITE: u8 = 1;
const FLUSH: u8 = 3;
const FUA: u8 = 1;

/// Longest wait for what is to happen at once, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(10);

/// A socket of either kind.
trait Socket: Read + Write + Send {
    fn end_input(&self);
    fn set_timeout(&self, timeout: Duration);
}

impl Socket for UnixStream {
    fn end_input(&self) {
        self.shutdown(Shutdown::Write).expect("half-closed");
    }

    fn set_timeout(&self, timeout: Duration) {
        self.set_read_timeout(Some(timeout)).expect("set");
    }
}

impl Socket for TcpStream {
    fn end_input(&self) {
        self.shutdown(Shutdown::Write).expect("half-closed");
    }

    fn set_timeout(&self, timeout: Duration) {
        self.set_read_timeout(Some(timeout)).expect("set");
    }
}

/// A client whose every byte the test sends itself.
struct ByHand(Box<dyn Socket>);

impl ByHand {
    fn unix(pair: &Pair) -> Self {
        Self::open(Box::new(UnixStream::connect(pair.nbd_socket(ALPHA)).expect("connects")))
    }

    fn tcp(pair: &Pair) -> Self {
        let uri = pair.uri_tcp(ALPHA, "db");
        let costandby_control::nbd_client::Endpoint::Tcp { host, port } = uri.endpoint else {
            panic!("a TCP address")
        };
        Self::open(Box::new(TcpStream::connect((host, port)).expect("connects")))
    }

    fn open(mut socket: Box<dyn Socket>) -> Self {
        socket.set_timeout(Duration::from_secs(60));
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).expect("a greeting");
        // No zeroes after the answer; NBD_OPT_EXPORT_NAME.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.extend_from_slice(&2_u32.to_be_bytes());
        hello.extend_from_slice(b"db");
        socket.write_all(&hello).expect("sends");
        let mut export = [0; 10];
        socket.read_exact(&mut export).expect("the export");
        Self(socket)
    }

    /// Sends a request, and of its payload what is given.
    fn send(&mut self, kind: u8, flags: u8, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, flags, 0, kind]);
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.0.write_all(&bytes).expect("sends");
    }

    fn write(&mut self, flags: u8, cookie: u64, offset: u64, bytes: &[u8]) {
        self.send(WRITE, flags, cookie, offset, u32::try_from(bytes.len()).expect("small"), bytes);
    }

    /// The cookie of the next reply, which must be a success without data.
    fn reply(&mut self) -> u64 {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).expect("a reply");
        assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a success");
        u64::from_be_bytes(reply[8..].try_into().expect("8"))
    }
}

fn pair() -> Pair {
    Pair::start(Settings::new(&[VolumeSettings::new("db", 64)]))
}

fn quick(pair: &Pair) -> NbdClient {
    let options = Options { timeout: SOON, ..Options::default() };
    NbdClient::connect(&pair.uri(ALPHA, "db"), &options).expect("connects")
}

fn byte_at(pair: &Pair, offset: u64) -> u8 {
    let mut byte = [0];
    quick(pair).read(offset, &mut byte).expect("a read");
    byte[0]
}

fn signal(pair: &Pair, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pair.pid(BETA)).expect("a pid")).expect("not zero");
    kill_process(pid, signal).expect("our own process");
}

#[test]
fn a_client_that_sends_a_write_slowly_holds_up_neither_clients_nor_verify_nor_a_resync() {
    let mut pair = pair();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut slow = [ByHand::unix(&pair), ByHand::tcp(&pair)];
        for (slow, offset) in slow.iter_mut().zip([0, MIB]) {
            slow.send(WRITE, 0, 1, offset, 65_536, &[0xAA; 1000]);
        }
        let over = &over;
        scope.spawn(move || {
            // For longer than everything below takes.
            for _ in 0..600 {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                thread::sleep(Duration::from_millis(200));
                for slow in &mut slow {
                    slow.0.write_all(&[0xAA]).expect("is not closed");
                }
            }
        });
        for offset in [0, MIB] {
            quick(&pair).write(offset, &[1; 4096], true).expect("a write to the same place");
        }
        pair.cli_ok(ALPHA, &["verify", "db"]);
        pair.kill(BETA);
        pair.wait_status(ALPHA, "db", "alone", |status| status.connection != "connected");
        quick(&pair).write(0, &[2; 70_000], false).expect("a write alone");
        pair.up(BETA);
        pair.wait_in_sync("db");
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(byte_at(&pair, 0), 2, "half a write leaves no trace");
    pair.settle_and_compare("db");
}

#[test]
fn an_older_write_of_a_closed_connection_is_never_carried_out_after_a_newer_one() {
    for client in [ByHand::unix, ByHand::tcp] {
        let pair = pair();
        // The peer acknowledges nothing, so that the first write keeps its range.
        signal(&pair, Signal::STOP);
        let mut holder = ByHand::unix(&pair);
        holder.write(0, 1, 0, &[1; 4096]);
        thread::sleep(Duration::from_millis(100));
        let mut closed = client(&pair);
        closed.write(0, 1, 0, &[2; 4096]);
        closed.write(0, 2, MIB, &[2; 4096]);
        thread::sleep(Duration::from_millis(100));
        drop(closed);
        let mut back = client(&pair);
        back.write(FUA, 1, MIB, &[3; 4096]);
        thread::sleep(Duration::from_millis(100));
        signal(&pair, Signal::CONT);
        assert_eq!((holder.reply(), back.reply()), (1, 1));
        pair.settle_and_compare("db");
        assert_eq!(byte_at(&pair, MIB), 3, "the older write was carried out after the newer one");
        assert_eq!(byte_at(&pair, 0), 1, "what had not begun was begun");
    }
}

#[test]
fn a_half_closed_client_gets_the_replies_it_is_owed() {
    let pair = pair();
    for client in [ByHand::unix, ByHand::tcp] {
        let mut half = client(&pair);
        for cookie in 0..40 {
            half.write(0, cookie, cookie * 100_000, &vec![7; 50_000]);
        }
        half.send(FLUSH, 0, 40, 0, 0, &[]);
        half.0.end_input();
        let mut cookies: Vec<_> = (0..=40).map(|_| half.reply()).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..=40).collect::<Vec<_>>());
        assert_eq!(half.0.read(&mut [0]).expect("the end"), 0);
    }
    assert_eq!(byte_at(&pair, 39 * 100_000 + 49_999), 7);
}

#[test]
fn readers_that_take_no_replies_cost_little_and_hold_nobody_up() {
    let pair = pair();
    quick(&pair).write(0, &vec![5; 32 << 20], false).expect("a write");
    let before = pair.own_memory(ALPHA);
    let mut readers: Vec<_> = (0..64).map(|_| ByHand::unix(&pair)).collect();
    for reader in &mut readers {
        reader.send(READ, 0, 1, 0, 32 << 20, &[]);
    }
    thread::sleep(Duration::from_millis(500));
    let mut writer = quick(&pair);
    let began = Instant::now();
    writer.write(31 << 20, &[6], false).expect("a write");
    let took = began.elapsed();
    let grown = pair.own_memory(ALPHA).saturating_sub(before);
    assert!(took < Duration::from_secs(2), "one byte took {took:?}");
    assert!(grown < 160 << 20, "{} MiB more", grown >> 20);
    // Who was not closed gets what it asked for, as it was or as it is.
    let mut whole = 0;
    for reader in &mut readers {
        let mut bytes = Vec::new();
        if reader.0.as_mut().take((32 << 20) + 16).read_to_end(&mut bytes).is_ok()
            && bytes.len() == (32 << 20) + 16
        {
            assert!(bytes[16..].iter().enumerate().all(|(at, b)| *b == 5 || (at == 31 << 20 && *b == 6)));
            whole += 1;
        }
    }
    assert!(whole >= 2, "{whole} readers were let finish");
    drop(readers);
    // The memory is given back.
    wait_for("the copies are gone", SOON, || {
        (pair.own_memory(ALPHA).saturating_sub(before) < 40 << 20).then_some(())
    });
}

#[test]
fn payloads_that_do_not_end_cost_little_and_give_way() {
    let pair = pair();
    quick(&pair).write(0, &vec![5; 32 << 20], false).expect("a write");
    let before = pair.own_memory(ALPHA);
    let almost = vec![9; (32 << 20) - 1];
    let mut greedy: Vec<_> = (0..6).map(|_| ByHand::unix(&pair)).collect();
    thread::scope(|scope| {
        for (n, greedy) in greedy.iter_mut().enumerate() {
            let almost = &almost;
            scope.spawn(move || {
                // Those that find no room are not read, and those that are in the way are closed.
                let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
                bytes.extend_from_slice(&[0, 0, 0, WRITE]);
                bytes.extend_from_slice(&(n as u64).to_be_bytes());
                bytes.extend_from_slice(&0_u64.to_be_bytes());
                bytes.extend_from_slice(&(32_u32 << 20).to_be_bytes());
                bytes.extend_from_slice(almost);
                let _ = greedy.0.write_all(&bytes);
            });
        }
        thread::sleep(Duration::from_secs(2));
        let grown = pair.own_memory(ALPHA).saturating_sub(before);
        assert!(grown < 160 << 20, "{} MiB more", grown >> 20);
        // A small write needs none of that memory, and a large one gets its turn.
        quick(&pair).write(4096, &[1; 4096], false).expect("a small write");
        let options = Options { timeout: Duration::from_secs(90), ..Options::default() };
        let mut large = NbdClient::connect(&pair.uri(ALPHA, "db"), &options).expect("connects");
        large.write(40 << 20, &vec![2; 8 << 20], false).expect("a large write");
    });
    assert_eq!(byte_at(&pair, 0), 5, "no part of a payload that did not end");
    drop(greedy);
    pair.settle_and_compare("db");
}
