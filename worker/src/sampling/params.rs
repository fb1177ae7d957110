//! What a request says about the choice of its tokens.

use super::choice::choose;
use crate::Refusal;

/// Most tokens that are named beside a generated one.
const LOGPROBS_MAX: usize = 20;
/// Most tokens that have a bias.
const BIASES_MAX: usize = 1024;
/// Below this temperature the likeliest token is taken.
const TEMPERATURE_MIN: f32 = 1e-5;

/// What a request says about the choice of its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token, of equal ones the lowest.
    pub temperature: f32,
    /// Chooses the sequence of random numbers.
    pub seed: u64,
    /// Only the likeliest tokens that together have this probability; above 0, up to 1.
    pub top_p: f32,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only tokens that are at least this likely, as a share of the likeliest one; 0..=1.
    pub min_p: f32,
    /// Logits of tokens that were seen in prompt or answer are divided by it if positive, else multiplied; above 0.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that were generated.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens for each time they were generated.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Generated tokens before which none comes that ends the sequence.
    pub min_tokens: usize,
    /// Report the logarithm of each token's probability, and of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// The same of the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
}

impl Sampling {
    /// The likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            seed: 0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    /// By chance, in proportion to `exp(logit / temperature)`.
    pub fn random(temperature: f32, seed: u64) -> Self {
        Self { temperature, seed, ..Self::greedy() }
    }

    /// Whether chance has no say.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_MIN
    }

    /// Whether the token with the model's largest logit is taken, and nothing more is asked.
    pub(super) fn takes_largest(&self) -> bool {
        self.is_greedy()
            && self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
            && self.logprobs.is_none()
    }

    /// The token for `position`, counted from the sequence's first, of logits that are otherwise final.
    pub fn choose(&self, logits: &[f32], position: usize) -> u32 {
        choose(self, logits, position as u64)
    }

    /// Checks what can be checked without the request.
    pub(crate) fn check(&self, vocab_size: usize) -> Result<(), Refusal> {
        within("temperature", self.temperature, |x| x >= 0.0, "0 or a positive number")?;
        within("top_p", self.top_p, |x| x > 0.0 && x <= 1.0, "above 0, up to 1")?;
        within("min_p", self.min_p, |x| (0.0..=1.0).contains(&x), "within 0 to 1")?;
        within("repetition_penalty", self.repetition_penalty, |x| x > 0.0, "a positive number")?;
        within("presence_penalty", self.presence_penalty, |_| true, "a number")?;
        within("frequency_penalty", self.frequency_penalty, |_| true, "a number")?;
        if self.logit_bias.len() > BIASES_MAX {
            let detail = format!("names {} tokens, at most {BIASES_MAX} are possible", self.logit_bias.len());
            return Err(invalid("logit_bias", detail));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab_size {
                return Err(invalid("logit_bias", format!("token {token} is not below {vocab_size}")));
            }
            within("logit_bias", bias, |_| true, "a number")?;
        }
        for (field, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if count.is_some_and(|count| count > LOGPROBS_MAX) {
                return Err(invalid(field, format!("is above {LOGPROBS_MAX}")));
            }
        }
        Ok(())
    }
}

fn within(
    field: &'static str,
    value: f32,
    possible: impl Fn(f32) -> bool,
    expected: &str,
) -> Result<(), Refusal> {
    if value.is_finite() && possible(value) {
        return Ok(());
    }
    Err(invalid(field, format!("{value} is not {expected}")))
}

fn invalid(field: &'static str, detail: String) -> Refusal {
    Refusal::Invalid { field, detail }
}
