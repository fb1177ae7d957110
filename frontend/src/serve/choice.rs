//! One choice of an answer: what a worker generates, with calls of tools told apart.

use std::task::{Context, Poll, ready};

use crate::generation::{Generation, Progress};
use crate::openai::{ApiError, CachedTokens, Delta, Finish};
use crate::router::Route;
use crate::tools::CallParser;

/// See the module.
pub struct Choice {
    generation: Generation,
    calls: Option<CallParser>,
    /// The first choice of a prompt pays for it.
    first: bool,
}

impl Choice {
    /// Of the choice with this number among those of its prompt.
    pub fn new(generation: Generation, calls: Option<CallParser>, number: usize) -> Self {
        Self { generation, calls, first: number == 0 }
    }

    /// Nothing more will come.
    pub fn is_finished(&self) -> bool {
        self.generation.is_finished()
    }

    /// Where it was sent first, and why.
    pub fn route(&self) -> &Route {
        self.generation.route()
    }

    /// Tokens of the prompt; 0 if another choice has the same one.
    pub fn prompt_tokens(&self) -> u32 {
        if self.first { self.generation.prompt_tokens() } else { 0 }
    }

    /// Tokens generated so far; when finished, those that the answer consists of.
    pub fn completion_tokens(&self) -> u32 {
        self.generation.completion_tokens()
    }

    /// What the cache had of the prompt; nothing if another choice has the same one.
    pub fn cached(&self) -> CachedTokens {
        if self.first { self.generation.cached() } else { CachedTokens::default() }
    }

    /// Waits for the next event and appends what it says to `out`. Not to be called when finished.
    pub fn poll(&mut self, cx: &mut Context<'_>, out: &mut Delta) -> Poll<Result<Progress, ApiError>> {
        let Some(calls) = &mut self.calls else { return self.generation.poll(cx, out) };
        let mut delta = Delta::default();
        let mut progress = ready!(self.generation.poll(cx, &mut delta))?;
        if let Some(finish) = progress.finish {
            calls.end(&mut delta);
            let called = calls.has_called() && finish == Finish::Stop;
            progress.finish = Some(if called { Finish::ToolCalls } else { finish });
        } else {
            calls.push(&mut delta);
        }
        out.text.push_str(&delta.text);
        out.scores.append(&mut delta.scores);
        out.calls.append(&mut delta.calls);
        Poll::Ready(Ok(progress))
    }
}
