//! How tokens are to be chosen, as a request says it.

use std::collections::BTreeMap;

use serde_json::Value;

use super::fields::{count, either, integer, number, positive_number};
use super::{ApiError, Parameters};
use crate::metrics::Api;

const LOGPROBS_MAX: u32 = 20;
const BIASES_MAX: usize = 1024;

/// What a request asks of the choice of its tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    pub temperature: Option<f32>,
    pub seed: Option<u64>,
    pub top_p: Option<f32>,
    /// 0: all.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// By token.
    pub logit_bias: BTreeMap<u32, f32>,
    pub min_tokens: u32,
    /// So many of the likeliest beside each token.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Checks what is said.
    pub fn of(p: &Parameters, api: Api) -> Result<Self, ApiError> {
        let top_k = integer("top_k", either("top_k", &p.top_k, &p.nvext)?, -1, i32::MAX.cast_unsigned())?;
        let repetition_penalty = either("repetition_penalty", &p.repetition_penalty, &p.nvext)?;
        Ok(Self {
            temperature: number("temperature", &p.temperature, 0.0, 2.0)?,
            seed: seed(&p.seed)?,
            top_p: positive_number("top_p", &p.top_p, 1.0)?,
            top_k: top_k.map(|top_k| u32::try_from(top_k).unwrap_or(0)),
            min_p: number("min_p", either("min_p", &p.min_p, &p.nvext)?, 0.0, 1.0)?,
            repetition_penalty: positive_number("repetition_penalty", repetition_penalty, 100.0)?,
            presence_penalty: number("presence_penalty", &p.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0),
            frequency_penalty: number("frequency_penalty", &p.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(&p.logit_bias)?,
            min_tokens: count("min_tokens", &p.min_tokens, 0, u32::MAX)?.unwrap_or(0),
            logprobs: logprobs(p, api)?,
        })
    }
}

fn seed(value: &Value) -> Result<Option<u64>, ApiError> {
    let bits = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    if bits.is_none() && !value.is_null() {
        return Err(ApiError::parameter("seed", "'seed' must be an integer of 64 bits."));
    }
    Ok(bits)
}

fn logit_bias(value: &Value) -> Result<BTreeMap<u32, f32>, ApiError> {
    let wrong = || {
        let message = format!(
            "'logit_bias' must be an object of at most {BIASES_MAX} token ids, each with a number from -100 to 100."
        );
        ApiError::parameter("logit_bias", message)
    };
    let fields = match value {
        Value::Null => return Ok(BTreeMap::new()),
        Value::Object(fields) if fields.len() <= BIASES_MAX => fields,
        _ => return Err(wrong()),
    };
    let entry = |(token, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
        Some((token.parse().ok()?, bias as f32))
    };
    fields.iter().map(|field| entry(field).ok_or_else(wrong)).collect()
}

/// A number of tokens in completions; in chats a flag, and the number beside it.
fn logprobs(p: &Parameters, api: Api) -> Result<Option<u32>, ApiError> {
    match api {
        Api::Completions => {
            if !p.top_logprobs.is_null() {
                let message = "'top_logprobs' belongs to chats; here 'logprobs' is the number of tokens.";
                return Err(ApiError::parameter("top_logprobs", message));
            }
            match &p.logprobs {
                Value::Bool(false) => Ok(None),
                value => count("logprobs", value, 0, LOGPROBS_MAX),
            }
        }
        Api::Chat => {
            let top = count("top_logprobs", &p.top_logprobs, 0, LOGPROBS_MAX)?;
            match super::fields::flag("logprobs", &p.logprobs)? {
                Some(true) => Ok(Some(top.unwrap_or(0))),
                Some(false) | None if top.unwrap_or(0) == 0 => Ok(None),
                Some(false) | None => {
                    let message = "'top_logprobs' needs 'logprobs' to be true.";
                    Err(ApiError::parameter("top_logprobs", message))
                }
            }
        }
    }
}
