//! How requests reach the engine's loop, and events come back: bounded in both directions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};

use tokio::sync::mpsc;

use crate::bell::Bell;
use crate::request::{Event, Refusal, Request, RequestId};

/// Requests that may lie between a client and the loop.
const CAPACITY: usize = 1024;
/// Events of one request besides its tokens.
const EVENTS_BESIDE_TOKENS: usize = 4;

/// What the loop is told.
pub(crate) enum Command {
    /// A new request, and where its events go.
    Submit(Box<Request>, mpsc::Sender<Event>),
    /// The client does not want more.
    Cancel(RequestId),
}

/// The client's end; clones reach the same loop.
#[derive(Clone)]
pub struct Handle {
    sender: SyncSender<Command>,
    bell: Bell,
    next_id: Arc<AtomicU64>,
    context_length: usize,
}

/// The loop's end.
pub struct Inbox {
    receiver: Receiver<Command>,
    bell: Bell,
}

/// What the loop finds in its inbox.
pub(crate) enum Received {
    Command(Command),
    Empty,
    /// All handles are gone.
    Closed,
}

/// Makes both ends. `context_length` bounds the events of a request.
pub fn inbox(context_length: usize) -> (Handle, Inbox) {
    let (sender, receiver) = sync_channel(CAPACITY);
    let bell = Bell::default();
    let handle = Handle { sender, bell: bell.clone(), next_id: Arc::default(), context_length };
    (handle, Inbox { receiver, bell })
}

impl Handle {
    /// A name for a new request.
    pub fn next_id(&self) -> RequestId {
        RequestId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands a request over. Its events arrive at the receiver, which has room for all of them; dropping the receiver
    /// cancels the request when its next event is due, [`Handle::cancel`] at once.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>, Refusal> {
        let most = request.max_tokens.min(self.context_length) + EVENTS_BESIDE_TOKENS;
        let (sender, receiver) = mpsc::channel(most);
        self.send(Command::Submit(Box::new(request), sender))?;
        Ok(receiver)
    }

    /// Ends a request; its `Finished` event will come unless it had ended. Refused when the inbox is full: then try again.
    pub fn cancel(&self, id: RequestId) -> Result<(), Refusal> {
        self.send(Command::Cancel(id))
    }

    /// The loop's bell, for a cache to ring when it has events.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    fn send(&self, command: Command) -> Result<(), Refusal> {
        self.sender.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => Refusal::Busy,
            TrySendError::Disconnected(_) => Refusal::Stopping,
        })?;
        self.bell.ring();
        Ok(())
    }
}

impl Inbox {
    pub(crate) fn receive(&self) -> Received {
        match self.receiver.try_recv() {
            Ok(command) => Received::Command(command),
            Err(TryRecvError::Empty) => Received::Empty,
            Err(TryRecvError::Disconnected) => Received::Closed,
        }
    }

    /// The bell that its handles ring.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }
}
