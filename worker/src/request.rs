//! What is asked of the engine, and what it reports back.

use std::time::Duration;

use kvbm_hash::{Namespace, RetentionConfig};
use tracing::Span;

use crate::{Guide, Logprobs, Sampling};

/// Names a request within this worker; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A prompt to be continued.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// Which cached blocks it may use.
    pub namespace: Namespace,
    /// Tokens of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// What another worker has generated already: output that is not reported again.
    pub generated: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// What the answer must look like, from its first token.
    pub guide: Option<Guide>,
    /// Most tokens to generate, `generated` included, at least 1; clipped to the context.
    pub max_tokens: usize,
    /// Whether a token that ends sequences ends this one.
    pub eos: Eos,
    /// Further tokens that end it.
    pub stop_token_ids: Vec<u32>,
    /// What its blocks are to be kept like; `None`: nobody said, and what it finds in the cache stays as it is.
    pub retention: Option<RetentionConfig>,
    /// Its place in a trace, until it ends.
    pub span: Span,
}

/// What an end-of-sequence token does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eos {
    /// It ends the sequence.
    Ends,
    /// It is a token like others.
    Ignored,
}

/// What is reported of a request: `Started`, any number of `Tokens`, then `Finished`. In place of any of these,
/// `Refused` (first and only) or `Failed` (last).
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It left the queue.
    Started {
        /// Tokens of the prompt that did not have to be computed.
        cached: CachedTokens,
        /// How long it took to copy what of them was not in the pool, waiting for the copy included.
        onboard: Duration,
    },
    /// Tokens were generated, a stop token included.
    Tokens(Vec<u32>),
    /// As `Tokens`, with what the model thought of them, if the request asks for that.
    Scored(Vec<(u32, Logprobs)>),
    /// What the model thought of the prompt's tokens from the second on, if the request asks for that; once, before any
    /// token.
    Prompt(Vec<Logprobs>),
    /// It is done.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens that were generated.
        completion_tokens: usize,
    },
    /// It will not be served.
    Refused(Refusal),
    /// It was given up; this is for a person to look at.
    Failed(String),
}

/// Tokens of a prompt that came from the cache, by tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CachedTokens {
    /// From the device pool.
    pub device: usize,
    /// From host memory.
    pub host: usize,
    /// From disk.
    pub disk: usize,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence or a stop token.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// The client did not want more.
    Cancelled,
}

/// Why a request is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It could never be served.
    #[error("{field}: {detail}")]
    Invalid {
        /// The field at fault.
        field: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// The queue is full: later perhaps.
    #[error("the queue is full")]
    Busy,
    /// The engine is stopping.
    #[error("the worker is stopping")]
    Stopping,
}

/// What a request must keep to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest sequence, in tokens.
    pub context_length: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Blocks of the device pool.
    pub pool_blocks: usize,
    /// Tokens of a block.
    pub tokens_per_block: usize,
}

impl Limits {
    /// Checks a request and returns the number of tokens it may generate.
    pub fn check(&self, request: &Request) -> Result<usize, Refusal> {
        let invalid = |field, detail| Err(Refusal::Invalid { field, detail });
        let prompt = request.prompt.len();
        if prompt == 0 {
            return invalid("prompt", "is empty".into());
        }
        for (field, tokens) in [("prompt", &request.prompt), ("generated", &request.generated)] {
            if let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocab_size) {
                return invalid(field, format!("token {token} is not below {}", self.vocab_size));
            }
        }
        if prompt >= self.context_length {
            let most = self.context_length - 1;
            return invalid("prompt", format!("has {prompt} tokens, at most {most} are possible"));
        }
        if request.max_tokens == 0 {
            return invalid("max_tokens", "is 0, must be at least 1".into());
        }
        request.sampling.check(self.vocab_size)?;
        let max_tokens = request.max_tokens.min(self.context_length - prompt);
        if request.generated.len() >= max_tokens {
            let detail = format!("has {} tokens, {max_tokens} are possible", request.generated.len());
            return invalid("generated", detail);
        }
        // The last token is reported, but its KV is never computed.
        let blocks = (prompt + max_tokens - 1).div_ceil(self.tokens_per_block);
        if blocks > self.pool_blocks {
            let detail = format!(
                "prompt and completion of {} tokens need {blocks} blocks, the device pool has {}",
                prompt + max_tokens,
                self.pool_blocks
            );
            return invalid("max_tokens", detail);
        }
        Ok(max_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_never_be_served_is_refused_by_field() {
        let limits = Limits { context_length: 100, vocab_size: 50, pool_blocks: 4, tokens_per_block: 16 };
        let check = |prompt: Vec<u32>, max_tokens, temperature| {
            limits.check(&Request {
                id: RequestId(1),
                namespace: Namespace([0; 32]),
                prompt,
                generated: vec![],
                sampling: Sampling::random(temperature, 1),
                guide: None,
                max_tokens,
                eos: Eos::Ends,
                stop_token_ids: vec![],
                retention: None,
                span: Span::none(),
            })
        };
        assert_eq!(check(vec![1; 60], 5, 1.0), Ok(5));
        assert_eq!(check(vec![1; 10], 55, 1.0), Ok(55));
        for (prompt, max_tokens, temperature, want) in [
            (vec![], 1, 1.0, "prompt"),
            (vec![50], 1, 1.0, "prompt"),
            (vec![1; 100], 1, 1.0, "prompt"),
            (vec![1], 0, 1.0, "max_tokens"),
            (vec![1; 10], 56, 1.0, "max_tokens"),
            (vec![1], 1, f32::NAN, "temperature"),
            (vec![1], 1, -1.0, "temperature"),
        ] {
            let Err(Refusal::Invalid { field, .. }) = check(prompt, max_tokens, temperature) else {
                panic!("{want} is accepted");
            };
            assert_eq!(field, want);
        }
        let wide = Limits { pool_blocks: 100, ..limits.clone() };
        let request = Request {
            id: RequestId(1),
            namespace: Namespace([0; 32]),
            prompt: vec![1; 90],
            generated: vec![],
            sampling: Sampling::greedy(),
            guide: None,
            max_tokens: 1000,
            eos: Eos::Ends,
            stop_token_ids: vec![],
            retention: None,
            span: Span::none(),
        };
        assert_eq!(wide.check(&request), Ok(10), "clipped to the context");
        let generated = |count| wide.check(&Request { generated: vec![1; count], ..request.clone() });
        assert_eq!(generated(9), Ok(10));
        assert!(matches!(generated(10), Err(Refusal::Invalid { field: "generated", .. })));
    }
}
