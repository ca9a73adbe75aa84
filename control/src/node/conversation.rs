//! What a volume's task has said and asked on connections, each on a task of its own that tells the volume's task the outcome.
//!
//! A volume's task holds at most one conversation at a time; a connection is with the conversation while a message is awaited.

use super::connection::{Route, listen, say};
use super::inbox::{Inbox, TaskNext, tell};
use super::negotiate::{self, Terms};
use super::rdma::Prepared;
use crate::hello::{Ask, Hello, Message, Refuse, RefuseCode};
use crate::role::Obstacle;
use crate::secure::channel::Channel;
use crate::task::{Event, Next, out_of_turn};

/// Dials a peer and tells the volume's task.
pub(super) fn dial(route: Route, inbox: Inbox) {
    tokio::spawn(async move {
        tell(&inbox, Event::Dialled(route.reach().await));
    });
}

/// Asks a peer that dials us whether it would have a session about a volume, and tells the volume's task.
///
/// The answer is a refusal in any case: `busy` where it would have one, and else why not.
pub(super) fn probe(route: Route, volume: String, inbox: Inbox) {
    tokio::spawn(async move {
        let question = Ask { node: route.node.clone(), volume, rdma: false };
        let asked = match route.reach().await {
            Ok(mut stream) => ask(&mut stream, question).await,
            Err(obstacle) => Err(obstacle),
        };
        tell(&inbox, Event::Probed(asked));
    });
}

async fn ask(stream: &mut Channel, question: Ask) -> Result<(), Obstacle> {
    let answer = match say(stream, &Message::Ask(question)).await {
        Ok(()) => listen(stream).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(Message::Refuse(Refuse { code: RefuseCode::Busy, .. })) => Ok(()),
        Ok(Message::Refuse(refuse)) => Err(Obstacle::Refused(refuse)),
        Ok(other) => Err(Obstacle::Failed { text: out_of_turn(other, "a refusal").to_string() }),
        Err(error) => Err(Obstacle::Failed { text: error.to_string() }),
    }
}

/// Makes an RDMA connection to the peer for a session over TCP, and tells the volume's task what came of it.
pub(super) fn ask_for_rdma(serial: u64, route: Route, ask: Ask, terms: Terms, inbox: Inbox) {
    tokio::spawn(async move {
        let made = negotiate::ask_rdma(&route, ask, &terms).await;
        tell(&inbox, Event::Made { serial, made });
    });
}

/// Makes the peer the offer that it asked for, and tells the volume's task what came of it.
pub(super) fn offer_rdma(serial: u64, mut stream: Channel, terms: Terms, inbox: Inbox) {
    tokio::spawn(async move {
        let made = negotiate::offer_rdma(&mut stream, &terms).await;
        let made = made.map(|prepared| (stream, prepared));
        tell(&inbox, Event::Made { serial, made });
    });
}

/// Says that the RDMA connection is here, waits for the peer's hello, and tells the volume's task.
pub(super) fn await_hello(serial: u64, mut stream: Channel, prepared: Prepared, inbox: Inbox) {
    tokio::spawn(async move {
        let hello = negotiate::confirm(&mut stream).await;
        let next = hello.map(|hello| Next { stream, prepared, hello: Some(hello) });
        tell(&inbox, Event::CameOver { serial, next });
    });
}

/// Begins, or answers where `theirs` has come, a conversation that RDMA is there for already, and tells the volume's task.
pub(super) fn greet_over(serial: u64, ours: Hello, next: TaskNext, terms: Terms, inbox: Inbox) {
    let Next { mut stream, prepared, hello: theirs } = next;
    tokio::spawn(async move {
        let met = negotiate::greet_over(&mut stream, ours, theirs, prepared, &terms).await;
        tell(&inbox, Event::Met { serial, stream, met });
    });
}

/// Says `ours`, listens for the answer, and gives both connection and answer to the volume's task.
pub(super) fn converse(serial: u64, mut stream: Channel, ours: Message, inbox: Inbox) {
    tokio::spawn(async move {
        let heard = match say(&mut stream, &ours).await {
            Ok(()) => listen(&mut stream).await,
            Err(error) => Err(error),
        };
        tell(&inbox, Event::Heard { serial, stream, heard });
    });
}

/// Begins a conversation, and tells the volume's task when both sides know what carries it.
pub(super) fn greet(serial: u64, mut stream: Channel, ours: Hello, terms: Terms, inbox: Inbox) {
    tokio::spawn(async move {
        let met = negotiate::greet(&mut stream, ours, &terms).await;
        tell(&inbox, Event::Met { serial, stream, met });
    });
}

/// Answers a hello that was read already, and tells the volume's task when both sides know what carries the session.
pub(super) fn answer_hello(
    serial: u64,
    mut stream: Channel,
    ours: Hello,
    theirs: Box<Hello>,
    terms: Terms,
    inbox: Inbox,
) {
    tokio::spawn(async move {
        let met = negotiate::answer(&mut stream, ours, theirs, &terms).await;
        tell(&inbox, Event::Met { serial, stream, met });
    });
}
