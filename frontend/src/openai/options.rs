//! The parameters of a request besides its prompt, checked.

use kvbm_hash::RetentionConfig;
use serde_json::Value;

use super::fields::{count, either, extension, flag};
use super::guide::{Guided, guided};
use super::{ApiError, Parameters, Sampling, Tools, retention, tenant, tools, unsupported};
use crate::metrics::Api;

const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 4096;
const SALT_BYTES_MAX: usize = 4096;
const LORA_BYTES_MAX: usize = 256;
/// Most choices of one prompt.
const CHOICES_MAX: u32 = 128;

/// What a request asks for besides its prompt.
#[derive(Debug)]
pub struct Options {
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
    /// Choices of each prompt, at least 1.
    pub choices: u32,
    /// 0 with `echo` only.
    pub max_tokens: Option<u32>,
    pub sampling: Sampling,
    pub guided: Option<Guided>,
    pub tools: Option<Tools>,
    /// The prompt is repeated in front of its completion.
    pub echo: bool,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub cache_salt: String,
    /// What its blocks are to be kept like.
    pub retention: Option<RetentionConfig>,
    /// As the body names it.
    pub tenant: Option<String>,
    /// The adapter, by its name at the worker; empty: none.
    pub lora: String,
}

impl Options {
    /// Checks what is supported and refuses what is not.
    pub fn of(p: &Parameters, api: Api) -> Result<Self, ApiError> {
        let model = match p.model.as_str() {
            Some(model) if !model.is_empty() => model.to_owned(),
            _ => return Err(ApiError::parameter("model", "'model' must be a string that names a model.")),
        };
        unsupported::refuse(p)?;
        let echo = flag("echo", &p.echo)?.unwrap_or(false);
        if echo && api == Api::Chat {
            return Err(ApiError::parameter("echo", "'echo' belongs to completions, not to chats."));
        }
        let max_tokens = count("max_tokens", &p.max_tokens, u32::from(!echo), u32::MAX)?;
        let max_completion_tokens =
            count("max_completion_tokens", &p.max_completion_tokens, u32::from(!echo), u32::MAX)?;
        let options = Self {
            model,
            stream: flag("stream", &p.stream)?.unwrap_or(false),
            include_usage: include_usage(&p.stream_options)?,
            choices: count("n", &p.n, 1, CHOICES_MAX)?.unwrap_or(1),
            max_tokens: max_completion_tokens.or(max_tokens),
            sampling: Sampling::of(p, api)?,
            guided: guided(p)?,
            tools: tools::tools(p, api)?,
            echo,
            stop: stop(&p.stop)?,
            stop_token_ids: stop_token_ids(&p.stop_token_ids)?,
            ignore_eos: flag("ignore_eos", either("ignore_eos", &p.ignore_eos, &p.nvext)?)?.unwrap_or(false),
            cache_salt: match salt("cache_salt", &p.cache_salt)? {
                Some(salt) => salt,
                None => salt("nvext.cache_salt", extension(&p.nvext, "cache_salt")?)?.unwrap_or_default(),
            },
            retention: retention::retention(
                &p.kv_cache_retention_config,
                extension(&p.nvext, "kv_cache_retention_config")?,
            )?,
            tenant: tenant::in_body(extension(&p.nvext, "tenant")?)?,
            lora: lora(extension(&p.nvext, "lora")?)?,
        };
        options.check()?;
        Ok(options)
    }

    /// What goes with what.
    fn check(&self) -> Result<(), ApiError> {
        if self.max_tokens.is_some_and(|most| most < self.sampling.min_tokens) {
            let message = "'min_tokens' must not be above 'max_tokens'.";
            return Err(ApiError::parameter("min_tokens", message));
        }
        if let (Some(guided), Some(_)) = (&self.guided, self.tools.as_ref().and_then(Tools::guided)) {
            let message = format!(
                "'tool_choice' says what the answer must look like, and so does '{}'.",
                guided.parameter
            );
            return Err(ApiError::parameter("tool_choice", message));
        }
        Ok(())
    }

    /// What the answer must look like.
    pub fn guide(&self) -> Option<Guided> {
        self.guided.clone().or_else(|| self.tools.as_ref()?.guided())
    }
}

fn include_usage(stream_options: &Value) -> Result<bool, ApiError> {
    match stream_options {
        Value::Null => Ok(false),
        Value::Object(fields) => {
            let value = fields.get("include_usage").unwrap_or(&Value::Null);
            Ok(flag("stream_options.include_usage", value)?.unwrap_or(false))
        }
        _ => Err(ApiError::parameter("stream_options", "'stream_options' must be an object.")),
    }
}

fn stop(value: &Value) -> Result<Vec<String>, ApiError> {
    let wrong = || {
        let message = format!(
            "'stop' must be a string or a list of at most {STOPS_MAX} strings, each of 1 to {STOP_BYTES_MAX} bytes."
        );
        ApiError::parameter("stop", message)
    };
    let stops = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(stops) if stops.len() <= STOPS_MAX => stops.as_slice(),
        Value::Array(_) => return Err(wrong()),
        stop => std::slice::from_ref(stop),
    };
    let texts = stops.iter().map(|stop| match stop.as_str() {
        Some(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => Ok(text.to_owned()),
        _ => Err(wrong()),
    });
    texts.collect()
}

fn stop_token_ids(value: &Value) -> Result<Vec<u32>, ApiError> {
    let wrong = || ApiError::parameter("stop_token_ids", "'stop_token_ids' must be a list of token ids.");
    let ids = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(ids) if ids.len() <= 128 => ids,
        _ => return Err(wrong()),
    };
    ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong)).collect()
}

fn lora(value: &Value) -> Result<String, ApiError> {
    match value {
        Value::Null => Ok(String::new()),
        Value::String(lora) if (1..=LORA_BYTES_MAX).contains(&lora.len()) => Ok(lora.clone()),
        _ => Err(ApiError::parameter(
            "nvext.lora",
            format!("'nvext.lora' must be the name of an adapter, of 1 to {LORA_BYTES_MAX} bytes."),
        )),
    }
}

fn salt(name: &'static str, value: &Value) -> Result<Option<String>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(salt) if salt.len() <= SALT_BYTES_MAX => Ok(Some(salt.clone())),
        _ => Err(ApiError::parameter(
            name,
            format!("'{name}' must be a string of at most {SALT_BYTES_MAX} bytes."),
        )),
    }
}
