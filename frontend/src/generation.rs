//! One answer in the making: a worker's tokens become text, until they end or a stop string does. When the worker is
//! lost, or was to compute the prompt only, another goes on behind the last token that came.
//!
//! ```text
//!         lost, or only prefill               another worker's first token
//!   Open ───────────────────────► Moving ───────────────────────────────────► Open
//!    └── finished, stop string, lost for good ──► Ended ◄── nobody goes on ──┘
//! ```
//!
//! Dropped, it takes the worker's stream with it, which is how the worker learns that nobody listens any more.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream};
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::{self, FinishReason, Finished, GenerateEvent};
use tonic::Streaming;

use crate::openai::{ApiError, CachedTokens, Delta, Finish};
use crate::router::{Burden, Dispatch, HandOver, Opened, Route, is_lost};
use crate::silence::Silence;
use crate::transcript::Transcript;

/// How the text of an answer begins and ends, besides the model's own end.
pub struct Frame {
    pub stop: Vec<String>,
    pub echo: Echo,
}

/// Whether the prompt is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Echo {
    No,
    /// In front of the answer.
    Prompt,
    /// In front of the answer, with its tokens listed.
    Scored,
    /// As these, and nothing else is said.
    PromptOnly,
    ScoredOnly,
}

impl Echo {
    fn is_all(self) -> bool {
        matches!(self, Self::PromptOnly | Self::ScoredOnly)
    }

    fn is_scored(self) -> bool {
        matches!(self, Self::Scored | Self::ScoredOnly)
    }
}

/// Where tokens come from.
#[expect(clippy::large_enum_variant, reason = "one for each answer, and nearly always the largest")]
enum Tokens {
    Open { events: Streaming<GenerateEvent>, burden: Burden },
    Moving(BoxFuture<'static, Result<Opened, ApiError>>),
    Ended,
}

/// The answer to one prompt.
pub struct Generation {
    source: Tokens,
    first: Option<Body>,
    dispatch: Arc<Dispatch>,
    route: Route,
    /// The connection that tokens come over, or came over last.
    connection: u64,
    moves_left: u32,
    /// What is left to do when the stream ends, if it is a prefill worker's.
    hand_over: Option<HandOver>,
    /// All tokens so far, for whoever goes on; empty if nobody may.
    generated: Vec<u32>,
    silence: Silence,
    transcript: Transcript,
    /// Tokens before which stop strings are text.
    min_tokens: u32,
    echo: Echo,
    /// The prompt is still to be repeated.
    repeats: bool,
    /// Tokens that workers sent; those of the answer, unless it is the prompt only.
    received: u32,
    prompt_tokens: u32,
    completion_tokens: u32,
    cached: CachedTokens,
}

/// What one event of the worker brought.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pub tokens: usize,
    pub finish: Option<Finish>,
}

impl Generation {
    /// Of an opened stream.
    pub fn new(opened: Opened, dispatch: Arc<Dispatch>, frame: Frame) -> Self {
        let Opened { events, cached, first, route, connection, burden, hand_over, onboard: _ } = opened;
        let config = dispatch.router.config();
        let request = &dispatch.request;
        let prompt = &request.prompt;
        Self {
            source: Tokens::Open { events, burden },
            first: Some(first),
            route,
            connection,
            moves_left: config.migration_limit,
            hand_over,
            generated: Vec::new(),
            silence: Silence::new(config.stall),
            transcript: Transcript::new(&dispatch.entry.model, prompt, frame.stop),
            min_tokens: request.sampling.as_ref().map_or(0, |sampling| sampling.min_tokens),
            echo: frame.echo,
            repeats: frame.echo != Echo::No,
            received: 0,
            prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
            completion_tokens: 0,
            cached,
            dispatch,
        }
    }

    /// Nothing more will come.
    pub fn is_finished(&self) -> bool {
        matches!(self.source, Tokens::Ended)
    }

    /// Where it was sent first, and why.
    pub fn route(&self) -> &Route {
        &self.route
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
    }

    /// Tokens generated so far; when finished, those that the answer consists of.
    pub fn completion_tokens(&self) -> u32 {
        self.completion_tokens
    }

    /// What the cache had of the prompt.
    pub fn cached(&self) -> CachedTokens {
        self.cached
    }

    /// Waits for the next event and appends what it says to `out`. Not to be called when finished.
    pub fn poll(&mut self, cx: &mut Context<'_>, out: &mut Delta) -> Poll<Result<Progress, ApiError>> {
        let result = match ready!(self.poll_event(cx)) {
            Ok(Body::Started(_)) => Ok(Progress { tokens: 0, finish: None }),
            Ok(Body::Tokens(tokens)) => Ok(self.tokens(&tokens, out)),
            Ok(Body::Finished(finished)) => match finish(finished.reason()) {
                Some(Finish::Length) if self.goes_on() => Ok(Progress { tokens: 0, finish: None }),
                Some(reason) => {
                    self.repeat(&[], out);
                    if !self.echo.is_all() {
                        self.completion_tokens = finished.completion_tokens.max(self.completion_tokens);
                    }
                    Ok(self.end(reason, out))
                }
                // The worker gives it up, nobody here does.
                None => self.lost("it cancelled the request").map(|()| Progress { tokens: 0, finish: None }),
            },
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.source = Tokens::Ended;
        }
        Poll::Ready(result)
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Body, ApiError>> {
        loop {
            if let Some(first) = self.first.take() {
                return Poll::Ready(Ok(first));
            }
            let lost = match &mut self.source {
                Tokens::Ended => return Poll::Ready(Err(ApiError::internal("the answer has already ended"))),
                Tokens::Moving(moving) => {
                    let moved = ready!(moving.poll_unpin(cx));
                    let Opened { events, first, connection, burden, .. } = moved.map_err(|error| {
                        ApiError::worker_lost(&format!("no other goes on with it: {}", error.message()))
                    })?;
                    self.source = Tokens::Open { events, burden };
                    (self.first, self.connection) = (Some(first), connection);
                    self.silence.broken();
                    continue;
                }
                Tokens::Open { events, .. } => match Pin::new(events).poll_next(cx) {
                    Poll::Ready(Some(Ok(GenerateEvent { body: Some(body) }))) => {
                        self.silence.broken();
                        return Poll::Ready(Ok(body));
                    }
                    Poll::Ready(Some(Ok(GenerateEvent { body: None }))) => {
                        return Poll::Ready(Err(ApiError::worker_lost("it sent an empty event")));
                    }
                    Poll::Ready(Some(Err(status))) if is_lost(&status) => status.message().to_owned(),
                    Poll::Ready(Some(Err(status))) => {
                        return Poll::Ready(Err(ApiError::worker_lost(status.message())));
                    }
                    Poll::Ready(None) => "its stream ended early".to_owned(),
                    Poll::Pending => {
                        ready!(self.silence.poll_too_long(cx));
                        "it said nothing for too long".to_owned()
                    }
                },
            };
            // A prefill worker that is lost behind its token has done its part.
            if self.received > 0 && self.goes_on() {
                continue;
            }
            if let Some(end) = self.is_complete() {
                return Poll::Ready(Ok(Body::Finished(end)));
            }
            self.lost(&lost)?;
        }
    }

    /// The worker will say nothing more: another is asked to go on.
    fn lost(&mut self, reason: &str) -> Result<(), ApiError> {
        if self.moves_left == 0 {
            return Err(ApiError::worker_lost(reason));
        }
        self.moves_left -= 1;
        tracing::info!(reason, tokens = self.generated.len(), "a worker is lost, another is to go on");
        let (generated, last) = (self.generated.clone(), self.silence.since());
        let resumed = self.dispatch.clone().resume(generated, self.connection, last);
        self.source = Tokens::Moving(resumed.boxed());
        Ok(())
    }

    /// The end of a prefill worker's stream is not that of the answer.
    fn goes_on(&mut self) -> bool {
        let Some(hand_over) = self.hand_over.take() else { return false };
        if self.is_complete().is_some() {
            return false;
        }
        let decoded = self.dispatch.clone().decode(self.generated.clone(), hand_over);
        self.source = Tokens::Moving(decoded.boxed());
        true
    }

    /// How the answer ends, if only the word of it was lost.
    fn is_complete(&self) -> Option<Finished> {
        let request = &self.dispatch.request;
        let stopped = self.generated.last().is_some_and(|last| request.stop_token_ids.contains(last));
        let reason = match stopped {
            true => FinishReason::Stop,
            false if self.received >= request.max_tokens => FinishReason::Length,
            false => return None,
        };
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens, self.received);
        Some(Finished { reason: reason.into(), prompt_tokens, completion_tokens })
    }

    fn tokens(&mut self, tokens: &v1::Tokens, out: &mut Delta) -> Progress {
        if let Tokens::Open { burden, .. } = &mut self.source {
            burden.grow(tokens.ids.len());
        }
        if self.moves_left > 0 || self.hand_over.is_some() {
            self.generated.extend_from_slice(&tokens.ids);
        }
        self.repeat(&tokens.prompt_logprobs, out);
        if self.echo.is_all() {
            self.received += tokens.ids.len() as u32;
            return Progress { tokens: 0, finish: None };
        }
        for (index, &id) in tokens.ids.iter().enumerate() {
            self.received += 1;
            self.completion_tokens += 1;
            if self.dispatch.request.stop_token_ids.contains(&id) {
                continue;
            }
            let early = self.completion_tokens < self.min_tokens;
            let logprobs = tokens.logprobs.get(index);
            if self.transcript.push(id, logprobs, early, out) {
                self.source = Tokens::Ended;
                return Progress { tokens: index + 1, finish: Some(Finish::Stop) };
            }
        }
        Progress { tokens: tokens.ids.len(), finish: None }
    }

    /// Repeats the prompt if that is wanted, once.
    fn repeat(&mut self, logprobs: &[v1::Logprobs], out: &mut Delta) {
        if std::mem::take(&mut self.repeats) {
            let scores = self.echo.is_scored().then_some(logprobs);
            self.transcript.repeat(&self.dispatch.request.prompt, scores, out);
        }
    }

    fn end(&mut self, reason: Finish, out: &mut Delta) -> Progress {
        self.source = Tokens::Ended;
        let stopped = self.transcript.end(out);
        Progress { tokens: 0, finish: Some(if stopped { Finish::Stop } else { reason }) }
    }
}

fn finish(reason: FinishReason) -> Option<Finish> {
    match reason {
        FinishReason::Stop => Some(Finish::Stop),
        FinishReason::Length => Some(Finish::Length),
        FinishReason::Cancelled | FinishReason::Unspecified => None,
    }
}
