//! An engine that says what it was told: no model, no KV. For measuring everything around an engine.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Bell;
use crate::inbox::{Command, Inbox, Received};
use crate::request::{CachedTokens, Event, FinishReason, Limits, Request, RequestId};
use crate::turns::{Delivery, Progress, Replies, Turn};

/// Repeats each prompt, over and over, one token a turn, until `max_tokens` or a stop token.
pub struct Echo {
    inbox: Inbox,
    limits: Limits,
    replies: Replies,
    active: BTreeMap<RequestId, Speech>,
    step: Duration,
}

struct Speech {
    request: Request,
    max_tokens: usize,
    said: usize,
}

impl Echo {
    /// An engine for requests within `limits`.
    pub fn new(limits: Limits, inbox: Inbox) -> Self {
        Self { inbox, limits, replies: Replies::default(), active: BTreeMap::new(), step: Duration::ZERO }
    }

    /// Each turn takes so long, for all that speak together.
    #[must_use]
    pub fn paced(mut self, step: Duration) -> Self {
        self.step = step;
        self
    }

    fn submit(&mut self, request: Request) {
        let id = request.id;
        match self.limits.check(&request) {
            Err(refusal) => {
                self.replies.send(id, Event::Refused(refusal));
            }
            Ok(max_tokens) => {
                let started = Event::Started { cached: CachedTokens::default(), onboard: Duration::ZERO };
                if self.replies.send(id, started) == Delivery::Sent {
                    self.active.insert(id, Speech { said: request.generated.len(), request, max_tokens });
                }
            }
        }
    }

    /// Takes in what clients sent; false once all handles are gone.
    fn receive(&mut self) -> bool {
        loop {
            match self.inbox.receive() {
                Received::Command(Command::Submit(request, reply)) => {
                    self.replies.add(request.id, reply);
                    self.submit(*request);
                }
                Received::Command(Command::Cancel(id)) => {
                    if let Some(speech) = self.active.remove(&id) {
                        self.replies.send(id, speech.finished(FinishReason::Cancelled));
                    }
                }
                Received::Empty => return true,
                Received::Closed => return false,
            }
        }
    }
}

impl Speech {
    fn finished(&self, reason: FinishReason) -> Event {
        Event::Finished { reason, prompt_tokens: self.request.prompt.len(), completion_tokens: self.said }
    }
}

impl Turn for Echo {
    fn turn(&mut self) -> Progress {
        let open = self.receive();
        if self.active.is_empty() {
            return if open { Progress::Idle } else { Progress::Closed };
        }
        let replies = &mut self.replies;
        self.active.retain(|id, speech| {
            let token = speech.request.prompt[speech.said % speech.request.prompt.len()];
            speech.said += 1;
            if replies.send(*id, Event::Tokens(vec![token])) == Delivery::Gone {
                return false;
            }
            let reason = if speech.request.stop_token_ids.contains(&token) {
                FinishReason::Stop
            } else if speech.said == speech.max_tokens {
                FinishReason::Length
            } else {
                return true;
            };
            replies.send(*id, speech.finished(reason));
            false
        });
        if !self.step.is_zero() {
            std::thread::sleep(self.step);
        }
        Progress::Worked
    }

    fn bell(&self) -> &Bell {
        self.inbox.bell()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.replies.stop();
    }
}
