//! Answers that wait for a drive.
//!
//! Unlike answers to copies they have no place in the queue of answers before they are true: a session all of whose
//! places wait for a drive would read no further message, and to its client a slow drive would look like a dead daemon.
//! They are bounded all the same, by a number of their own; one more is refused.

use kvbm_proto::v1::server_message::Body;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::session::outbound::{Outbound, Unsendable};

/// What a session waits for. Dropping it forgets the questions.
#[derive(Debug)]
pub(super) struct Waits {
    limit: usize,
    tasks: JoinSet<Result<(), Unsendable>>,
}

/// To be called with the answer, on any thread. Dropped instead, the question is somebody else's to answer.
pub(super) type Answering = Box<dyn FnOnce(Body) + Send>;

impl Waits {
    pub fn new(limit: usize) -> Self {
        Self { limit, tasks: JoinSet::new() }
    }

    /// Begins to wait for the answer to message `id`, unless there are too many such questions.
    pub fn begin(&mut self, outbound: &Outbound, id: u64) -> Option<Answering> {
        if self.tasks.len() >= self.limit {
            return None;
        }
        let outbound = outbound.clone();
        let (answering, answered) = oneshot::channel();
        self.tasks.spawn(async move {
            if let Ok(body) = answered.await {
                outbound.reserve(id).await?.send(body);
            }
            Ok(())
        });
        // A session that has ended does not need to know.
        Some(Box::new(move |body| drop(answering.send(body))))
    }

    /// Returns when an answer cannot be sent. While it is awaited, waits that are over give up their places.
    pub async fn unsendable(&mut self) -> Unsendable {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(unsendable))) => return unsendable,
                Some(Err(error)) => tracing::error!(%error, "an answer is lost"),
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvbm_proto::v1::{Pong, PrefetchReply};
    use tokio::time::timeout;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::session::outbound;

    fn body(host_blocks: u32) -> Body {
        Body::Prefetch(PrefetchReply { host_blocks, promoting_blocks: 0 })
    }

    #[tokio::test]
    async fn others_are_answered_while_a_drive_is_waited_for() {
        let (outbound, mut answers) = outbound::channel(1, Duration::from_secs(30));
        let mut waits = Waits::new(2);
        let first = waits.begin(&outbound, 1).unwrap();
        let second = waits.begin(&outbound, 2).unwrap();
        assert!(waits.begin(&outbound, 3).is_none(), "only so many");
        for id in 4..8 {
            outbound.reserve(id).await.unwrap().send(Body::Pong(Pong {}));
            assert_eq!(answers.next().await.unwrap().unwrap().id, id);
        }
        second(body(7));
        let answer = answers.next().await.unwrap().unwrap();
        assert_eq!((answer.id, answer.body), (2, Some(body(7))));
        drop(first);
        assert!(timeout(Duration::from_millis(5), waits.unsendable()).await.is_err());
        assert!(waits.begin(&outbound, 8).is_some());
    }

    #[tokio::test]
    async fn a_client_that_takes_no_answers_is_noticed() {
        let (outbound, answers) = outbound::channel(1, Duration::from_millis(5));
        let mut waits = Waits::new(4);
        let (first, second) = (waits.begin(&outbound, 1).unwrap(), waits.begin(&outbound, 2).unwrap());
        first(body(1));
        second(body(2));
        assert_eq!(waits.unsendable().await, Unsendable::Stalled);
        drop(answers);
        waits.begin(&outbound, 3).unwrap()(body(3));
        assert_eq!(waits.unsendable().await, Unsendable::Closed);
    }
}
