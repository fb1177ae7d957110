//! One answer in the making: a worker's tokens become text, until they end or a stop string does.
//!
//! Dropped, it takes the worker's stream with it, which is how the worker learns that nobody listens any more.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::Stream;
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::{FinishReason, GenerateEvent};
use tonic::Streaming;

use crate::detokenizer::Detokenizer;
use crate::model::Model;
use crate::openai::{ApiError, CachedTokens, Finish};
use crate::stop::StopFilter;

/// A worker's stream that has come to its first token, or to its end.
pub struct Opened {
    pub events: Streaming<GenerateEvent>,
    pub cached: CachedTokens,
    /// `Tokens` or `Finished`.
    pub first: Body,
}

/// How the text of an answer ends, besides the model's own end.
pub struct Ending {
    pub stop: Vec<String>,
    /// Tokens that end the answer and have no text.
    pub stop_token_ids: Vec<u32>,
}

/// The answer to one prompt.
pub struct Generation {
    /// `None` when finished.
    events: Option<Streaming<GenerateEvent>>,
    first: Option<Body>,
    detokenizer: Detokenizer,
    filter: StopFilter,
    stop_token_ids: Vec<u32>,
    /// Scratch: the text of one token, on its way to the filter.
    piece: String,
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
    pub fn new(opened: Opened, model: &Arc<Model>, prompt: &[u32], ending: Ending) -> Self {
        Self {
            events: Some(opened.events),
            first: Some(opened.first),
            detokenizer: Detokenizer::new(model, prompt),
            filter: StopFilter::new(ending.stop),
            stop_token_ids: ending.stop_token_ids,
            piece: String::new(),
            prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
            completion_tokens: 0,
            cached: opened.cached,
        }
    }

    /// Nothing more will come.
    pub fn is_finished(&self) -> bool {
        self.events.is_none()
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

    /// Waits for the next event and appends its text to `out`. Not to be called when finished.
    pub fn poll(&mut self, cx: &mut Context<'_>, out: &mut String) -> Poll<Result<Progress, ApiError>> {
        let result = match ready!(self.poll_event(cx)) {
            Ok(Body::Started(_)) => Ok(Progress { tokens: 0, finish: None }),
            Ok(Body::Tokens(tokens)) => Ok(self.tokens(&tokens.ids, out)),
            Ok(Body::Finished(finished)) => match finish(finished.reason()) {
                Some(reason) => {
                    self.completion_tokens = finished.completion_tokens.max(self.completion_tokens);
                    Ok(self.end(reason, out))
                }
                None => Err(ApiError::worker_lost("it cancelled the request")),
            },
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.events = None;
        }
        Poll::Ready(result)
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Body, ApiError>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Ok(first));
        }
        let Some(events) = &mut self.events else {
            return Poll::Ready(Err(ApiError::internal("the answer has already ended")));
        };
        let event = ready!(Pin::new(events).poll_next(cx));
        Poll::Ready(match event {
            Some(Ok(GenerateEvent { body: Some(body) })) => Ok(body),
            Some(Ok(GenerateEvent { body: None })) => Err(ApiError::worker_lost("it sent an empty event")),
            Some(Err(status)) => Err(ApiError::worker_lost(status.message())),
            None => Err(ApiError::worker_lost("its stream ended early")),
        })
    }

    fn tokens(&mut self, ids: &[u32], out: &mut String) -> Progress {
        for (index, &id) in ids.iter().enumerate() {
            self.completion_tokens += 1;
            if self.stop_token_ids.contains(&id) {
                continue;
            }
            if self.filter.is_idle() {
                self.detokenizer.push(id, out);
                continue;
            }
            self.piece.clear();
            self.detokenizer.push(id, &mut self.piece);
            if self.filter.push(&self.piece, out) {
                self.events = None;
                return Progress { tokens: index + 1, finish: Some(Finish::Stop) };
            }
        }
        Progress { tokens: ids.len(), finish: None }
    }

    fn end(&mut self, reason: Finish, out: &mut String) -> Progress {
        self.events = None;
        self.piece.clear();
        self.detokenizer.flush(&mut self.piece);
        let stopped = self.filter.push(&self.piece, out);
        if !stopped {
            self.filter.flush(out);
        }
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
