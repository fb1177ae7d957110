//! Logits processors: code that changes logits before a token is chosen from them.
//!
//! ```
//! use kvbm_worker::{LogitsProcessor, SoFar, Temperature};
//!
//! let mut logits = [1.0, 2.0];
//! Temperature(0.5).process(SoFar { prompt: &[0], generated: &[] }, &mut logits);
//! assert_eq!(logits, [2.0, 4.0]);
//! ```

use std::fmt;
use std::sync::Arc;

/// The tokens of a sequence.
#[derive(Debug, Clone, Copy)]
pub struct SoFar<'a> {
    /// What was asked.
    pub prompt: &'a [u32],
    /// What was answered so far.
    pub generated: &'a [u32],
}

impl SoFar<'_> {
    /// Tokens of both: the next one's position.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    /// There is not even a prompt.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Changes logits before a token is chosen from them.
///
/// It remembers nothing from call to call: what it does is a function of the tokens so far, so that a sequence can be
/// preempted, or go on in another worker, and still has the same text. It runs on the engine's thread, once per
/// sequence and step: what it takes, all wait for.
pub trait LogitsProcessor: Send + Sync {
    /// Changes the logits of the next token. Minus infinity forbids a token.
    fn process(&self, so_far: SoFar<'_>, logits: &mut [f32]);
}

/// Processors of every request of a worker, in order. They come after what the request asks for, except chance.
#[derive(Clone, Default)]
pub struct Processors(pub Vec<Arc<dyn LogitsProcessor>>);

impl fmt::Debug for Processors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} processors", self.0.len())
    }
}

/// An example: divides all logits by a temperature.
#[derive(Debug, Clone, Copy)]
pub struct Temperature(
    /// Above 0.
    pub f32,
);

impl LogitsProcessor for Temperature {
    fn process(&self, _: SoFar<'_>, logits: &mut [f32]) {
        logits.iter_mut().for_each(|logit| *logit /= self.0);
    }
}

/// Another: says the same whatever is asked. With `DYN_ENABLE_TEST_LOGITS_PROCESSOR=1` a worker says "Hello world!".
#[derive(Debug, Clone)]
pub struct Script(
    /// What is said, token by token. The last one is repeated; it should end the sequence.
    pub Vec<u32>,
);

impl LogitsProcessor for Script {
    fn process(&self, so_far: SoFar<'_>, logits: &mut [f32]) {
        let Some(token) = self.0.get(so_far.generated.len()).or(self.0.last()) else { return };
        logits.fill(f32::NEG_INFINITY);
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = 0.0;
        }
    }
}
