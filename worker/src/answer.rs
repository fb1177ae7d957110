//! The stream that a request is answered with.
//!
//! It is pulled by the connection: what the client does not take yet stays in the request's own channel, which has room
//! for every event that the request can have. So a slow reader costs memory bounded by its own `max_tokens` and never
//! makes the engine wait; tokens that piled up travel in one message.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::{self, GenerateEvent};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::Status;

use crate::{Event, FinishReason, Handle, Logprobs, Refusal, RequestId};

/// Events taken at once.
const EVENTS_MAX: usize = 64;

/// See the module. Dropping it before the end cancels the request.
pub(crate) struct Answer {
    events: mpsc::Receiver<Event>,
    taken: Vec<Event>,
    ready: VecDeque<Result<GenerateEvent, Status>>,
    open: Open,
    handle: Handle,
    id: RequestId,
    _running: TaskTrackerToken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Yes,
    /// The last event was taken.
    No,
}

impl Answer {
    pub fn new(
        events: mpsc::Receiver<Event>,
        handle: Handle,
        id: RequestId,
        running: TaskTrackerToken,
    ) -> Self {
        let (taken, ready) = (Vec::new(), VecDeque::new());
        Self { events, taken, ready, open: Open::Yes, handle, id, _running: running }
    }

    fn take_in(&mut self) {
        for event in self.taken.drain(..) {
            let message = message(event);
            if let Ok(GenerateEvent { body: Some(Body::Tokens(more)) }) = &message
                && let Some(Ok(GenerateEvent { body: Some(Body::Tokens(tokens)) })) = self.ready.back_mut()
            {
                tokens.ids.extend(&more.ids);
                tokens.logprobs.extend_from_slice(&more.logprobs);
                continue;
            }
            if matches!(message, Ok(GenerateEvent { body: Some(Body::Finished(_)) }) | Err(_)) {
                self.open = Open::No;
            }
            self.ready.push_back(message);
        }
    }
}

impl Stream for Answer {
    type Item = Result<GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.ready.is_empty() && this.open == Open::Yes {
            if ready!(this.events.poll_recv_many(context, &mut this.taken, EVENTS_MAX)) == 0 {
                // The loop ended without a word.
                this.open = Open::No;
                return Poll::Ready(Some(Err(Status::unavailable("the engine stopped"))));
            }
            this.take_in();
        }
        Poll::Ready(this.ready.pop_front())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.open == Open::Yes {
            // When the inbox is full, the closed channel ends the request with its next event.
            let _ = self.handle.cancel(self.id);
        }
    }
}

/// Why a request is not served, as gRPC says it.
pub(crate) fn status(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::Invalid { .. } => Status::invalid_argument(refusal.to_string()),
        Refusal::Busy => Status::resource_exhausted(refusal.to_string()),
        Refusal::Stopping => Status::unavailable(refusal.to_string()),
    }
}

fn message(event: Event) -> Result<GenerateEvent, Status> {
    let body = match event {
        Event::Started { cached, onboard } => Body::Started(v1::Started {
            device_tokens: count(cached.device),
            host_tokens: count(cached.host),
            disk_tokens: count(cached.disk),
            onboard_us: u64::try_from(onboard.as_micros()).unwrap_or(u64::MAX),
        }),
        Event::Tokens(ids) => Body::Tokens(v1::Tokens { ids, ..v1::Tokens::default() }),
        Event::Scored(tokens) => {
            let (ids, logprobs) = tokens.into_iter().map(|(id, found)| (id, logprobs(found))).unzip();
            Body::Tokens(v1::Tokens { ids, logprobs, prompt_logprobs: Vec::new() })
        }
        Event::Prompt(found) => {
            let prompt_logprobs = found.into_iter().map(logprobs).collect();
            Body::Tokens(v1::Tokens { prompt_logprobs, ..v1::Tokens::default() })
        }
        Event::Finished { reason, prompt_tokens, completion_tokens } => {
            let reason = match reason {
                FinishReason::Stop => v1::FinishReason::Stop,
                FinishReason::Length => v1::FinishReason::Length,
                FinishReason::Cancelled => v1::FinishReason::Cancelled,
            };
            Body::Finished(v1::Finished {
                reason: reason.into(),
                prompt_tokens: count(prompt_tokens),
                completion_tokens: count(completion_tokens),
            })
        }
        Event::Refused(refusal) => return Err(status(&refusal)),
        Event::Failed(detail) => return Err(Status::internal(detail)),
    };
    Ok(GenerateEvent { body: Some(body) })
}

fn logprobs(found: Logprobs) -> v1::Logprobs {
    let (top_ids, top_logprobs) = found.top.into_iter().unzip();
    v1::Logprobs { logprob: found.logprob, top_ids, top_logprobs }
}

/// Tokens of one sequence: a context length fits.
fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}
