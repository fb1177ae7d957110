//! How the next token is chosen from its logits.
//!
//! ```text
//! logits -> guide -> logit bias -> min_tokens -> penalties -> processors -> temperature -> min_p -> top_k -> top_p
//!        -> chance
//! ```
//!
//! **Invariant.** All of it is a function of the prompt, of the tokens generated so far, of the request and of its seed.
//! Nothing else is remembered, so what else is in the batch, a preemption or a move to another worker does not change the
//! text: whoever knows prompt and generated tokens goes on where another left off.

mod choice;
mod guide;
mod logprobs;
mod params;
mod penalties;
mod processor;
mod sampler;

pub(crate) use choice::largest;
pub use guide::{Grammar, Guide, Guides};
pub use logprobs::Logprobs;
pub use params::Sampling;
pub use processor::{LogitsProcessor, Processors, Script, SoFar, Temperature};
pub(crate) use sampler::{Choice, Sampler};

#[cfg(test)]
mod tests;
