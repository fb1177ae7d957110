//! All that is done to one sequence's logits, in order.

use super::{Guide, Logprobs, Processors, Sampling, SoFar, penalties};
use crate::engine::Want;
use crate::request::{Eos, Request};

/// Chooses the tokens of one sequence.
pub(crate) struct Sampler {
    sampling: Sampling,
    guide: Option<Guide>,
    /// Tokens that end the sequence.
    ends: Vec<u32>,
    processors: Processors,
    /// Kept from call to call to be filled again.
    logits: Vec<f32>,
}

/// A token, and what the model thought of it if that was asked for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Choice {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

impl Sampler {
    /// Of a request; what was generated before is taken into account.
    pub fn new(request: &Request, eos_token_ids: &[u32], processors: &Processors) -> Result<Self, String> {
        let mut ends = request.stop_token_ids.clone();
        if request.eos == Eos::Ends {
            ends.extend(eos_token_ids);
        }
        let mut guide = request.guide.clone();
        if let Some(guide) = &mut guide {
            guide.accept(&request.generated)?;
        }
        let processors = processors.clone();
        Ok(Self { sampling: request.sampling.clone(), guide, ends, processors, logits: Vec::new() })
    }

    /// What is needed of the engine to choose the token behind so many generated ones. The likeliest token will do if
    /// nothing here changes logits, or reports them.
    pub fn want(&self, generated: usize) -> Want {
        let unchanged = self.guide.is_none()
            && self.processors.0.is_empty()
            && generated >= self.sampling.min_tokens
            && self.sampling.takes_largest();
        if unchanged { Want::Largest } else { Want::Logits(1) }
    }

    /// Takes the token that the engine found the likeliest.
    ///
    /// # Panics
    /// When logits were wanted.
    pub fn take_largest(&self, token: u32, generated: usize) -> Choice {
        assert_eq!(self.want(generated), Want::Largest, "a token is no answer to who wants logits");
        Choice { token, logprobs: None }
    }

    /// Chooses the token that follows.
    pub fn choose(&mut self, logits: &[f32], so_far: SoFar<'_>) -> Result<Choice, String> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        if let Some(guide) = &mut self.guide {
            guide.mask(&mut self.logits)?;
        }
        for &(token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if so_far.generated.len() < self.sampling.min_tokens {
            self.forbid_ends();
        }
        penalties::apply(&self.sampling, so_far, &mut self.logits);
        for processor in &self.processors.0 {
            processor.process(so_far, &mut self.logits);
            // What is not a number cannot be compared with others.
            self.logits
                .iter_mut()
                .filter(|logit| logit.is_nan())
                .for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        let token = self.sampling.choose(&self.logits, so_far.len());
        let logprobs = self.sampling.logprobs.map(|count| Logprobs::of(logits, token, count));
        if let Some(guide) = &mut self.guide {
            guide.accept(&[token])?;
        }
        Ok(Choice { token, logprobs })
    }

    /// The guide lets nothing follow.
    pub fn is_complete(&self) -> bool {
        self.guide.as_ref().is_some_and(Guide::is_complete)
    }

    /// What the model thought of a token of the prompt.
    pub fn prompt_logprobs(&self, logits: &[f32], token: u32) -> Option<Logprobs> {
        self.sampling.prompt_logprobs.map(|count| Logprobs::of(logits, token, count))
    }

    /// Unless the guide wants the sequence to end here.
    fn forbid_ends(&mut self) {
        let other = |(token, logit): (usize, &f32)| {
            *logit > f32::NEG_INFINITY && !self.ends.contains(&(token as u32))
        };
        if !self.logits.iter().enumerate().any(other) {
            return;
        }
        for &end in &self.ends {
            if let Some(logit) = self.logits.get_mut(end as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}
