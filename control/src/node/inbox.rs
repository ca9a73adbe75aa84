//! What a volume's task is told, by the daemon's other tasks.

use super::rdma::Prepared;
use crate::admin;
use crate::secure::channel::Channel;
use crate::task::{Action, Carrier, Event, Met, Next};
use tokio::sync::{mpsc, oneshot};

/// What happened.
pub(super) type TaskEvent = Event<Channel, Prepared>;

/// What the task has done.
pub(super) type TaskAction = Action<Channel, Prepared>;

/// What carries a session.
pub(super) type TaskCarrier = Carrier<Prepared>;

/// A conversation whose link is settled.
pub(super) type TaskMet = Met<Prepared>;

/// The connections of a change of link.
pub(super) type TaskNext = Next<Channel, Prepared>;

/// Who waits for the answer to an operator's command.
pub(super) type Reply = oneshot::Sender<Result<String, String>>;

/// The way to a volume's task.
pub(super) type Inbox = mpsc::UnboundedSender<Input>;

/// What the task is told.
pub(super) enum Input {
    /// This happened.
    Event(TaskEvent),
    /// An operator's command.
    Admin { command: admin::Command, asked: admin::Asked, reply: Reply },
}

/// Tells a task. One that has ended needs no news.
pub(super) fn tell(inbox: &Inbox, event: TaskEvent) {
    let _ = inbox.send(Input::Event(event));
}
