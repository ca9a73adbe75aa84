//! What links are made of, for tests of sessions that go on over another kind of link, and one such test.

use super::*;
use crate::testing::fake_rdma::{self, Manner};
use crate::testing::fault::{FaultLink, Plan};
use crate::transport::tcp::TcpLink;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

pub(super) type Ends = (Box<dyn Link>, Box<dyn Link>);

/// What a link is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Make {
    Loopback,
    Tcp,
    /// RDMA over memory, which completes late and in heaps.
    Rdma,
    /// Seldom looked at, at both ends.
    Slow,
}

impl Make {
    pub(super) fn ends(self) -> Ends {
        match self {
            Self::Loopback => {
                let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
                (Box::new(here), Box::new(there))
            }
            Self::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
                let here = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
                let (there, _) = listener.accept().expect("accept");
                let link = |stream| Box::new(TcpLink::new(stream, RING_LEN, RING_LEN).expect("link"));
                (link(here), link(there))
            }
            Self::Rdma => {
                let manner = Manner { seed: Some(11), ..Manner::default() };
                let (here, there) = fake_rdma::pair(RING_LEN, manner).expect("memory");
                (Box::new(here), Box::new(there))
            }
            Self::Slow => {
                let plan = Plan { poll_every: Some(7), ..Plan::default() };
                let (here, there) = loopback::pair(RING_LEN).expect("ring memory");
                (Box::new(FaultLink::new(here, plan)), Box::new(FaultLink::new(there, plan)))
            }
        }
    }
}

/// Client writes, and what either end closes, whichever kind of link follows which.
#[test]
fn a_session_goes_on_over_any_kind_of_link_after_any_other() {
    const MAKES: [Make; 4] = [Make::Loopback, Make::Tcp, Make::Rdma, Make::Slow];
    let mut pair = Pair::in_sync(AckLevel::Memory);
    let mut slot = 0;
    for (round, (from, to)) in MAKES.into_iter().flat_map(|from| MAKES.map(|to| (from, to))).enumerate() {
        for make in [from, to] {
            let first = slot;
            for _ in 0..6 {
                let range = grains(u64::from(slot) % 20, 1);
                pair.a.write(slot, range, u8::try_from(slot % 251).expect("small"));
                slot += 1;
            }
            (0..round % 5).for_each(|_| pair.turn());
            let closes = if round % 2 == 0 { &mut pair.a } else { &mut pair.b };
            closes.volume.close_link(DownReason::Local("the session goes on over another link"));
            pair.cut();
            pair.go_on_over(make.ends());
            (first..slot).for_each(|slot| pair.until_told(slot));
            assert!(
                (first..slot).all(|slot| pair.a.told(slot) == [Ok(())]),
                "once, and well: {from:?} {to:?}"
            );
        }
    }
    let applied = pair.b.volume.counters.changes_applied.load(Ordering::Relaxed);
    assert_eq!(applied, u64::from(slot), "each change once");
    assert!(!pair.a.volume.record.is_dirty() && !pair.b.volume.record.is_dirty(), "nothing to copy");
    pair.until_quiet();
    pair.assert_equal_and_clean();
}
