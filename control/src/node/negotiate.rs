//! The part of a conversation that settles its link: hellos, the RDMA connection where both have it, TCP where not.
//!
//! Runs between a connection and [`super::volume`], which hears of a hello only when it is settled what will carry the
//! session. The dialer connects, because it knows first that both can; the acceptor has its listener open before its
//! hello names it. An RDMA connection that fails costs its time limit once, then both go on over TCP where their
//! configurations allow it; [`crate::task`] keeps the next attempt away for a while.
//!
//! For a session that had to begin over TCP the same is done over a second connection ([`ask_rdma`], [`offer_rdma`]), without
//! harm to the session wherever it fails. When both nodes have the RDMA connection, the session's link is closed, and that
//! connection carries the hellos by which it goes on ([`greet_over`]).
//!
//! Invariants: both sides end with the same kind, or the conversation ends. A secret is one conversation's, which makes one
//! offer; it follows from the handshake of that connection and is never sent over it. Every wait
//! has a limit; what blocks runs on the runtime's blocking threads. RDMA is promised only with a ring that is registered
//! and free: one that is still being made is waited for before the hello ([`RING_WAIT_AUTO`], [`RING_WAIT_RDMA`]), goes on
//! being made whatever becomes of the conversation, and is never made again for the next one.
//!
//! A listener and its thread are held until the connection comes, [`COME_MAX`] is over or the conversation ends: so a
//! volume has room for [`LISTENERS_MAX`], and who comes when both are taken is offered no RDMA.
//!
//! Survives a peer that sends anything in any order, connects and vanishes, or promises a connection that never comes.

use super::connection::{MESSAGE_MAX, Route, listen, listen_for, say};
use super::inbox::{TaskCarrier as Carrier, TaskMet as Met};
use super::rdma::{Prepared, RdmaListener, RdmaSetup, RingState, Secret, Wanted};
use crate::config::LinkKind;
use crate::hello::{Ask, Hello, HelloError, Message, RdmaOffer, Refuse, RefuseCode, Settled};
use crate::link::{Choice, Kind, Voice, choose, reason};
use crate::secure::channel::Channel;
use crate::task::{NoLink, out_of_turn};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

/// How long each step of connecting by RDMA may take, over a network on which a round trip has just been made: finding the
/// way, being accepted. A few milliseconds each, and a tenth of a second in an emulated machine; no ring is made meanwhile.
/// It is also what a network that swallows RDMA packets costs before the nodes fall back to TCP.
const STEP_MAX: Duration = Duration::from_secs(3);

/// How long the acceptor waits for that connection: the dialer's steps, and some for its own hello to get there.
const COME_MAX: Duration = Duration::from_secs(7);

/// How long it waits to be told what came of it.
const SETTLE_MAX: Duration = Duration::from_secs(8);
const _: () =
    assert!(2 * STEP_MAX.as_secs() < COME_MAX.as_secs() && COME_MAX.as_secs() < SETTLE_MAX.as_secs());

/// How long a hello waits for the volume's ring where TCP would do: at a daemon's start the ring takes half a second even in
/// an emulated machine, and a session that begins over TCP costs a change of link later.
const RING_WAIT_AUTO: Duration = Duration::from_secs(2);

/// The same where there is nothing but RDMA: nearly as long as the peer waits for a message. What is not ready by then is
/// further in the next conversation.
const RING_WAIT_RDMA: Duration = Duration::from_secs(4);
const _: () = assert!(RING_WAIT_RDMA.as_millis() < MESSAGE_MAX.as_millis());

/// Between two looks at a ring that is waited for.
const RING_LOOK: Duration = Duration::from_millis(5);

/// RDMA listeners of a volume at one time: one for the peer, and one for a conversation it began before that and gave up.
/// Each takes a thread, and memory for a ring once somebody connects, and a hello is all that it takes to have one.
pub(super) const LISTENERS_MAX: usize = 2;

/// What a volume brings to a conversation about its link.
#[derive(Clone)]
pub(super) struct Terms {
    /// The volume's `link`.
    pub(super) wanted: LinkKind,
    /// Why RDMA is left alone for now.
    pub(super) paused: Option<String>,
    /// This node's address towards its peer.
    pub(super) local: IpAddr,
    /// This node's name.
    pub(super) node: String,
    /// The other one's.
    pub(super) peer: String,
    /// This node's RDMA.
    pub(super) rdma: Arc<dyn RdmaSetup>,
    /// Room for listeners, of this volume's conversations together.
    pub(super) listeners: Arc<Semaphore>,
}

/// An RDMA listener, and its place among those of its volume.
pub(super) struct Offered {
    listener: Box<dyn RdmaListener>,
    place: OwnedSemaphorePermit,
}

/// The dialer's part: says our hello, hears theirs, settles the link.
pub(super) async fn greet(stream: &mut Channel, mut ours: Hello, terms: &Terms) -> Result<Met, NoLink> {
    let voice = terms.voice(true).await;
    ours.set_voice(voice.clone());
    say(stream, &Message::Hello(Box::new(ours))).await?;
    let hello = match listen(stream).await? {
        Message::Hello(hello) => hello,
        other => return Err(out_of_turn(other, "its hello")),
    };
    let carrier = match terms.choose(&voice, &hello.voice()) {
        Choice::Tcp { why } => Carrier::Tcp { why, tried: false },
        Choice::Refused { text } => return Err(refuse(stream, text).await),
        Choice::Rdma => {
            let Some(offer) = hello.rdma.clone() else {
                return Err(NoLink::OutOfTurn { said: "that it has RDMA", wanted: "where its RDMA listens" });
            };
            let tcp = voice.has(Kind::Tcp) && hello.voice().has(Kind::Tcp);
            connect(stream, offer, tcp, terms).await?
        }
    };
    Ok(Met { hello, carrier })
}

/// Connects to an offer and says what came of it; `tcp` is what else there is.
async fn connect(
    stream: &mut Channel,
    offer: RdmaOffer,
    tcp: bool,
    terms: &Terms,
) -> Result<Carrier, NoLink> {
    let (settled, carrier) = match terms.dial(offer, link_secret(stream)).await {
        Ok(prepared) => (Settled { kind: Kind::Rdma, why: None }, Carrier::Rdma(prepared)),
        Err(why) if tcp => {
            let why = reason(&format!("{} could not connect by RDMA: {why}", terms.node));
            (
                Settled { kind: Kind::Tcp, why: Some(why.clone()) },
                Carrier::Tcp { why: Some(why), tried: true },
            )
        }
        Err(why) => {
            let text = reason(&format!("{} could not connect by RDMA: {why}", terms.node));
            say(stream, &Message::Refuse(Refuse { code: RefuseCode::Link, text: text.clone() })).await?;
            return Err(NoLink::Rdma(text));
        }
    };
    say(stream, &Message::Link(settled)).await?;
    Ok(carrier)
}

/// The acceptor's part, after it read `theirs`: says our hello, with an offer where both have RDMA, settles the link.
pub(super) async fn answer(
    stream: &mut Channel,
    mut ours: Hello,
    theirs: Box<Hello>,
    terms: &Terms,
) -> Result<Met, NoLink> {
    let their_voice = theirs.voice();
    let mut voice = terms.voice(their_voice.has(Kind::Rdma)).await;
    let mut listener = None;
    if terms.choose(&voice, &their_voice) == Choice::Rdma {
        match terms.listen(link_secret(stream)).await {
            Ok((opened, offer)) => {
                listener = Some(opened);
                ours.rdma = Some(offer);
            }
            Err(why) => voice.lose_rdma(&why),
        }
    }
    let why = match terms.choose(&voice, &their_voice) {
        Choice::Tcp { why } => why,
        Choice::Rdma => None,
        Choice::Refused { text } => return Err(refuse(stream, text).await),
    };
    let tcp = voice.has(Kind::Tcp);
    ours.set_voice(voice);
    let Some(listener) = listener else {
        say(stream, &Message::Hello(Box::new(ours))).await?;
        return Ok(Met { hello: theirs, carrier: Carrier::Tcp { why, tried: false } });
    };
    let accepting = accept(listener);
    say(stream, &Message::Hello(Box::new(ours))).await?;
    let carrier = match listen_for(stream, SETTLE_MAX).await? {
        Message::Link(Settled { kind: Kind::Rdma, .. }) => Carrier::Rdma(accepted(accepting, terms).await?),
        Message::Link(Settled { kind: Kind::Tcp, why }) if tcp => Carrier::Tcp { why, tried: true },
        Message::Link(_) => {
            let text = format!("{} has link = \"rdma\" and nothing else", terms.node);
            return Err(refuse(stream, text).await);
        }
        other => return Err(out_of_turn(other, "what became of the RDMA offer")),
    };
    Ok(Met { hello: theirs, carrier })
}

/// The dialer's part in getting an RDMA connection for a session over TCP: a second connection to the peer, and RDMA beside
/// it. Nothing of the session is touched.
pub(super) async fn ask_rdma(route: &Route, ask: Ask, terms: &Terms) -> Result<(Channel, Prepared), NoLink> {
    // Mostly it fails here, and costs the peer nothing.
    terms.ready().await.map_err(|why| NoLink::Rdma(format!("{} has no RDMA: {why}", terms.node)))?;
    let mut stream = route.connect().await.map_err(HelloError::from)?;
    say(&mut stream, &Message::Ask(ask)).await?;
    let offer = match listen(&mut stream).await? {
        Message::Offer(offer) => offer,
        other => return Err(out_of_turn(other, "an offer")),
    };
    // The session has its TCP link either way; this connection is for RDMA or nothing.
    match connect(&mut stream, offer, true, terms).await? {
        Carrier::Rdma(prepared) => match listen(&mut stream).await? {
            Message::Link(Settled { kind: Kind::Rdma, .. }) => Ok((stream, prepared)),
            other => Err(out_of_turn(other, "that it has the RDMA connection too")),
        },
        Carrier::Tcp { why, .. } => Err(NoLink::Rdma(why.expect("told by what failed"))),
    }
}

/// The acceptor's part in that. The dialer waits for [`confirm`].
pub(super) async fn offer_rdma(stream: &mut Channel, terms: &Terms) -> Result<Prepared, NoLink> {
    let opened = match terms.ready().await {
        Ok(()) => terms.listen(link_secret(stream)).await,
        Err(why) => Err(why),
    };
    let (listener, offer) = match opened {
        Ok(opened) => opened,
        Err(why) => return Err(refuse(stream, format!("{} has no RDMA: {why}", terms.node)).await),
    };
    let accepting = accept(listener);
    say(stream, &Message::Offer(offer)).await?;
    match listen_for(stream, SETTLE_MAX).await? {
        Message::Link(Settled { kind: Kind::Rdma, .. }) => accepted(accepting, terms).await,
        Message::Link(Settled { kind: Kind::Tcp, why }) => Err(NoLink::Rdma(why.unwrap_or_default())),
        other => Err(out_of_turn(other, "what became of the RDMA offer")),
    }
}

/// Says that the RDMA connection is here too, and waits for the hello of a dialer that has left the session's link.
pub(super) async fn confirm(stream: &mut Channel) -> Result<Box<Hello>, NoLink> {
    say(stream, &Message::Link(Settled { kind: Kind::Rdma, why: None })).await?;
    match listen(stream).await? {
        Message::Hello(hello) => Ok(hello),
        other => Err(out_of_turn(other, "its hello")),
    }
}

/// A conversation over a connection beside which both nodes have RDMA already: hellos, and nothing to settle. `theirs` has
/// come where the peer dialled.
pub(super) async fn greet_over(
    stream: &mut Channel,
    mut ours: Hello,
    theirs: Option<Box<Hello>>,
    prepared: Prepared,
    terms: &Terms,
) -> Result<Met, NoLink> {
    ours.set_voice(Voice::new(terms.wanted, Ok(())));
    say(stream, &Message::Hello(Box::new(ours))).await?;
    let hello = match theirs {
        Some(hello) => hello,
        None => match listen(stream).await? {
            Message::Hello(hello) => hello,
            other => return Err(out_of_turn(other, "its hello")),
        },
    };
    Ok(Met { hello, carrier: Carrier::Rdma(prepared) })
}

/// The wait for a connection that was asked for by an offer. Dropped, it ends.
pub(super) struct Accepting {
    connection: JoinHandle<Result<Prepared, String>>,
    wanted: Wanted,
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.wanted.cancel();
    }
}

/// Begins to take the connection that an offer asked for.
pub(super) fn accept(offered: Offered) -> Accepting {
    let Offered { listener, place } = offered;
    let wanted = Wanted::default();
    let asked = wanted.clone();
    let connection = spawn_blocking(move || {
        let accepted = listener.accept(COME_MAX, STEP_MAX, &asked);
        drop(place);
        accepted
    });
    Accepting { connection, wanted }
}

/// The connection that the peer says it made.
pub(super) async fn accepted(mut accepting: Accepting, terms: &Terms) -> Result<Prepared, NoLink> {
    let prepared = (&mut accepting.connection).await.expect("a panic has ended the process");
    prepared.map_err(|why| NoLink::Rdma(format!("{} was not connected by RDMA: {why}", terms.node)))
}

/// Says a last word about links.
async fn refuse(stream: &mut Channel, text: String) -> NoLink {
    let text = reason(&text);
    // The peer is told if it still listens; the conversation ends either way.
    let _ = say(stream, &Message::Refuse(Refuse { code: RefuseCode::Link, text: text.clone() })).await;
    NoLink::NothingInCommon(text)
}

impl Terms {
    fn choose(&self, ours: &Voice, theirs: &Voice) -> Choice {
        choose((&self.node, ours), (&self.peer, theirs))
    }

    /// What this node can do at this moment. `ring`: the peer may have RDMA too, so the volume's ring has to be there.
    async fn voice(&self, ring: bool) -> Voice {
        let rdma = match (&self.paused, self.wanted) {
            (_, LinkKind::Tcp) => Ok(()),
            (Some(why), _) => Err(why.clone()),
            (None, _) if ring => self.ready().await,
            (None, _) => self.able().await,
        };
        Voice::new(self.wanted, rdma)
    }

    /// Whether RDMA is possible here.
    pub(super) async fn able(&self) -> Result<(), String> {
        let (rdma, local) = (Arc::clone(&self.rdma), self.local);
        blocking(move || rdma.able(local)).await
    }

    /// Whether RDMA is possible here and the volume's ring is there to be promised, waiting a while for one that is being
    /// made.
    pub(super) async fn ready(&self) -> Result<(), String> {
        self.able().await?;
        let patience = if self.wanted == LinkKind::Rdma { RING_WAIT_RDMA } else { RING_WAIT_AUTO };
        let until = Instant::now() + patience;
        loop {
            match self.rdma.ring(self.local)? {
                RingState::Ready => return Ok(()),
                state if Instant::now() >= until => return Err(state.to_string()),
                _ => tokio::time::sleep(RING_LOOK).await,
            }
        }
    }

    /// A listener for whoever shows `secret`.
    pub(super) async fn listen(&self, secret: Secret) -> Result<(Offered, RdmaOffer), String> {
        let place = Arc::clone(&self.listeners).try_acquire_owned();
        let place = place.map_err(|_| {
            format!("all {LISTENERS_MAX} RDMA listeners of the volume wait for connections that were promised before")
        })?;
        let (rdma, local) = (Arc::clone(&self.rdma), self.local);
        blocking(move || {
            let listener = rdma.listen(local, &secret)?;
            let offer = RdmaOffer { address: listener.address() };
            Ok((Offered { listener, place }, offer))
        })
        .await
    }

    /// A connection to an offer.
    pub(super) async fn dial(&self, offer: RdmaOffer, secret: Secret) -> Result<Prepared, String> {
        let (rdma, local) = (Arc::clone(&self.rdma), self.local);
        blocking(move || rdma.dial(local, offer.address, &secret, STEP_MAX)).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(work).await.expect("a panic has ended the process")
}

/// What the RDMA connection that is made beside this one has to show.
pub(super) fn link_secret(channel: &Channel) -> Secret {
    Secret(channel.secret("costandby rdma link"))
}

#[cfg(test)]
mod tests;
