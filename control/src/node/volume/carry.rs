//! The part of a volume's task that makes the links of its sessions: it gives each conversation its terms, makes
//! the negotiated link, and reports which one is in use.

use super::super::negotiate::{Carrier, Met, NoLink, Terms};
use super::super::registry::Source;
use super::{Surroundings, VolumeTask};
use crate::compared::{Settings, differences};
use crate::config::LinkKind;
use crate::hello::RefuseCode;
use crate::link::{Kind, short_note};
use crate::role::{Event, SessionSide};
use crate::secure::channel::Channel;
use costandby_datapath::limits::{PAYLOAD_LEN_MAX, RING_LEN};
use costandby_datapath::reactor::command::{Before, Command, Direction, Event as ReactorEvent};
use costandby_datapath::transport::tcp::TcpLink;
use costandby_datapath::transport::{Link, ring_takes};
use costandby_datapath::units::Epoch;
use std::io;
use std::time::{Duration, Instant};

/// Largest ring a peer may announce: more than any release of ours offers; it only bounds what we keep in flight.
const RING_LEN_ANNOUNCED_MAX: u64 = 16 << 30;

/// The peer of a conversation whose link is settled.
pub(super) struct PeerEnd {
    ring_len: u64,
    /// It takes RDMA when it can.
    wants_rdma: bool,
    carrier: Carrier,
}

/// A session as far as its link may change.
pub(super) struct SessionState {
    /// We dialled, and ask for changes.
    pub(super) dialled: bool,
    /// What carries it.
    pub(super) kind: Kind,
}

/// A conversation's connection as the datapath takes it.
fn companion(stream: Channel) -> io::Result<std::net::TcpStream> {
    let stream = stream.into_stream().into_std()?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

impl Surroundings {
    /// Whether RDMA is possible here, for a volume that would have it; then its ring begins to be made. Blocks briefly.
    pub(super) fn able(&self, wanted: LinkKind) -> Result<(), String> {
        if wanted == LinkKind::Tcp {
            return Ok(());
        }
        let able = self.rdma.able(self.local).and_then(|()| self.rdma.ring(self.local));
        able.map(drop).map_err(|why| format!("{} has no RDMA: {why}", self.node))
    }
}

impl VolumeTask {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// What this volume brings to a conversation.
    pub(super) fn terms(&self) -> Terms {
        Terms {
            wanted: self.shared.config.link,
            paused: self.link.paused(self.now()).map(str::to_owned),
            local: self.surroundings.local,
            node: self.surroundings.node.clone(),
            peer: self.shared.peer.as_str().to_owned(),
            rdma: self.surroundings.rdma.clone(),
            listeners: self.listeners.clone(),
        }
    }

    /// It is settled what carries the session, or that nothing does.
    pub(super) async fn met(&mut self, stream: Channel, met: Result<Met, NoLink>) {
        let event = match met {
            Ok(Met { hello, carrier }) => {
                if let Carrier::Tcp { why: Some(why), tried: true } = &carrier {
                    self.link.rdma_failed(self.began.elapsed(), why);
                }
                self.compare_settings(&hello.settings);
                self.redial.told(hello.view.recall.as_ref());
                let fits = usize::try_from(hello.ring_len)
                    .is_ok_and(|len| ring_takes(len, PAYLOAD_LEN_MAX as usize))
                    && hello.ring_len <= RING_LEN_ANNOUNCED_MAX;
                if fits {
                    let conversation = self.conversation.as_mut().expect("the caller looked");
                    conversation.stream = Some(stream);
                    let ring_len = hello.ring_len;
                    let wants_rdma = hello.voice().wants_rdma();
                    conversation.peer = Some(PeerEnd { ring_len, wants_rdma, carrier });
                    Event::HelloReceived(hello)
                } else {
                    self.conversation = None;
                    let text =
                        format!("it announces a ring of {} bytes, which cannot be used", hello.ring_len);
                    Event::SessionFailed { text }
                }
            }
            Err(error) => {
                self.note_no_link(&error);
                self.conversation_failed(error)
            }
        };
        self.publish_link();
        self.converse(event).await;
    }

    /// Shows what differs between the two nodes' configurations, until a hello says that nothing does.
    fn compare_settings(&self, theirs: &Settings) {
        let Surroundings { node, settings, .. } = &self.surroundings;
        let (peer, volume) = (self.shared.peer.as_str(), self.shared.config.name.as_str());
        let found = differences((node, settings), (peer, theirs));
        if self.shared.warn(Source::Configuration, &found) {
            for text in found {
                tracing::warn!(volume, "{text}");
            }
        }
    }

    /// Remembers why there is no link where that is about links.
    pub(super) fn note_no_link(&mut self, error: &NoLink) {
        match error {
            NoLink::Rdma(why) => self.link.rdma_failed(self.began.elapsed(), why),
            NoLink::NothingInCommon(text) => self.link.tell(text),
            NoLink::Refused(refuse) if refuse.code == RefuseCode::Link => self.link.tell(&refuse.text),
            // The controller tells of these.
            NoLink::Refused(_) | NoLink::Hello(_) | NoLink::OutOfTurn { .. } => {}
        }
    }

    /// The session is over.
    pub(super) fn link_ended(&mut self, reason: &str) {
        self.session = None;
        self.link.ended(self.began.elapsed(), reason);
        self.publish_link();
    }

    /// Makes public what there is to say about the link, and logs what is new: in a few words, `doctor` has the rest.
    pub(super) fn publish_link(&mut self) {
        let status = self.link.status();
        *self.shared.link.lock().expect("nobody panics with it") = Some(status.clone());
        let only_rdma = self.shared.config.link == LinkKind::Rdma;
        // Without a session nothing is carried, and what will be is not known for certain.
        if !only_rdma && self.session.is_none() {
            return;
        }
        let (volume, link) = (self.shared.config.name.as_str(), status.kind.as_str());
        let text = match &status.note {
            Some(why) if only_rdma => format!("no link: {why}"),
            Some(why) => format!("the link is {link}: {}", short_note(why)),
            None => format!("the link is {link}"),
        };
        if self.link_logged.as_ref() == Some(&text) {
            return;
        }
        match &status.note {
            Some(_) if only_rdma => tracing::warn!(volume, "{text}"),
            _ => tracing::info!(volume, "{text}"),
        }
        self.link_logged = Some(text);
    }

    pub(super) fn start_session(&mut self, side: SessionSide, before: Before, serve: bool, epoch: Epoch) {
        self.session_began = Some(Instant::now());
        self.redial.session_began();
        let conversation = self.conversation.take();
        self.epoch = epoch;
        self.link_up = true;
        let volume = self.index;
        let linked = conversation
            .and_then(|c| {
                let peer = c.peer?;
                let kind = if matches!(peer.carrier, Carrier::Rdma(_)) { Kind::Rdma } else { Kind::Tcp };
                self.session = Some(SessionState { dialled: c.dialled, kind });
                Some((c.stream?, peer))
            })
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
            .and_then(|(stream, peer)| self.make_link(stream, peer));
        match linked {
            Ok(link) => {
                let direction = match side {
                    SessionSide::Source { resync } => Direction::Source { resync },
                    SessionSide::Target { resync } => Direction::Target { resync },
                };
                self.send(Command::Session { volume, before, link, direction, epoch });
            }
            Err(error) => {
                // The controller hears of it as of any link that ends: nothing was applied that could be torn.
                let down = ReactorEvent::LinkDown {
                    volume,
                    reason: error.to_string(),
                    undurable: true,
                    dirty: true,
                    moved: false,
                    heard: false,
                    parted: None,
                };
                for event in [down, ReactorEvent::Settled { volume }] {
                    let _ = self.shared.inbox.send(super::Input::Reactor(event));
                }
            }
        }
        if serve {
            self.send(Command::Serve { volume });
        }
    }

    fn make_link(&mut self, stream: Channel, peer: PeerEnd) -> io::Result<Box<dyn Link>> {
        let stream = companion(stream)?;
        let now = self.now();
        let len = |n: u64| usize::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let link: Box<dyn Link> = match peer.carrier {
            Carrier::Rdma(prepared) => {
                self.link.began(now, Kind::Rdma, None, peer.wants_rdma);
                prepared.into_link(stream)?
            }
            Carrier::Tcp { why, .. } => {
                self.link.began(now, Kind::Tcp, why, peer.wants_rdma);
                Box::new(TcpLink::new(stream, len(RING_LEN)?, len(peer.ring_len)?)?)
            }
        };
        self.publish_link();
        Ok(link)
    }
}
