//! Answers on their way to one client.
//!
//! Invariant: whoever asks the manager anything holds the right to one place in the queue first, so an answer always
//! has room, on whatever thread it becomes true. The queue bounds questions in flight and answers that the client has
//! not taken; when it is full the session reads no further messages. A client that takes nothing for long while answers
//! wait for it is given up.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use kvbm::Refused;
use kvbm_proto::v1::{ServerMessage, server_message::Body};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::Stream;
use tonic::Status;

use crate::wire;

/// The session's end.
#[derive(Debug, Clone)]
pub(super) struct Outbound {
    sender: mpsc::Sender<Result<ServerMessage, Status>>,
    flow: Arc<Flow>,
    stall: Duration,
}

/// Answers put into the queue, and taken out of it.
#[derive(Debug, Default)]
struct Flow {
    sent: AtomicU64,
    taken: AtomicU64,
}

/// Nothing more can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsendable {
    /// The client closed the stream.
    Closed,
    /// It takes nothing.
    Stalled,
}

/// The client's end.
#[derive(Debug)]
pub(crate) struct Answers {
    receiver: mpsc::Receiver<Result<ServerMessage, Status>>,
    flow: Arc<Flow>,
}

/// The right, and the duty, to answer one message.
#[must_use]
#[derive(Debug)]
pub(super) struct Answer {
    permit: mpsc::OwnedPermit<Result<ServerMessage, Status>>,
    flow: Arc<Flow>,
    id: u64,
}

pub(super) fn channel(depth: usize, stall: Duration) -> (Outbound, Answers) {
    let (sender, receiver) = mpsc::channel(depth);
    let flow = Arc::new(Flow::default());
    (Outbound { sender, flow: Arc::clone(&flow), stall }, Answers { receiver, flow })
}

impl Outbound {
    /// Waits for room for the answer to message `id`.
    pub async fn reserve(&self, id: u64) -> Result<Answer, Unsendable> {
        let answer = |permit| Answer { permit, flow: Arc::clone(&self.flow), id };
        if let Ok(permit) = self.sender.clone().try_reserve_owned() {
            return Ok(answer(permit));
        }
        loop {
            let taken = self.flow.taken.load(Relaxed);
            match timeout(self.stall, self.sender.clone().reserve_owned()).await {
                Ok(permit) => return permit.map(answer).map_err(|_| Unsendable::Closed),
                // Waiting for copies in flight is no stall; waiting for a client that takes nothing is.
                Err(_) if self.flow.taken.load(Relaxed) == taken && self.flow.sent.load(Relaxed) > taken => {
                    return Err(Unsendable::Stalled);
                }
                Err(_) => {}
            }
        }
    }

    /// Ends the stream with a status, if there is room for it; it ends in any case when all rights are gone.
    pub fn end(&self, status: Status) {
        if self.sender.try_send(Err(status)).is_ok() {
            self.flow.sent.fetch_add(1, Relaxed);
        }
    }

    /// Returns when the client has closed the stream.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl Answer {
    pub fn send(self, body: Body) {
        self.flow.sent.fetch_add(1, Relaxed);
        self.permit.send(Ok(ServerMessage { id: self.id, body: Some(body) }));
    }

    pub fn refuse(self, refused: &Refused) {
        self.send(Body::Refused(wire::refused(refused)));
    }

    pub fn send_or_refuse(self, result: Result<Body, Refused>) {
        match result {
            Ok(body) => self.send(body),
            Err(refused) => self.refuse(&refused),
        }
    }
}

impl Stream for Answers {
    type Item = Result<ServerMessage, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let next = this.receiver.poll_recv(context);
        if let Poll::Ready(Some(_)) = &next {
            this.flow.taken.fetch_add(1, Relaxed);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use kvbm_proto::v1::Pong;
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_told_from_a_copy_that_takes_long() {
        let (outbound, mut answers) = channel(1, Duration::from_millis(5));
        let first = outbound.reserve(1).await.unwrap();
        // The place is taken by a question in flight: waiting goes on beyond the stall time.
        let second = outbound.reserve(2);
        assert!(timeout(Duration::from_millis(25), second).await.is_err());
        first.send(Body::Pong(Pong {}));
        assert_eq!(outbound.reserve(2).await.unwrap_err(), Unsendable::Stalled);
        assert_eq!(answers.next().await.unwrap().unwrap().id, 1);
        outbound.reserve(2).await.unwrap().refuse(&Refused::Closed);
        assert_eq!(answers.next().await.unwrap().unwrap().id, 2);
        drop(answers);
        assert_eq!(outbound.reserve(3).await.unwrap_err(), Unsendable::Closed);
    }
}
