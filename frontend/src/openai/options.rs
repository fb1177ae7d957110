//! The parameters that both APIs share, checked.

use kvbm_hash::RetentionConfig;
use serde_json::Value;

use super::{ApiError, Parameters, retention, tenant, unsupported};

const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 4096;
const SALT_BYTES_MAX: usize = 4096;

/// What a request asks for besides its prompt.
#[derive(Debug)]
pub struct Options {
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
    /// At least 1.
    pub max_tokens: Option<u32>,
    pub temperature: Option<f32>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub cache_salt: String,
    /// What its blocks are to be kept like.
    pub retention: Option<RetentionConfig>,
    /// As the body names it.
    pub tenant: Option<String>,
}

impl Options {
    /// Checks what is supported and refuses what is not.
    pub fn of(parameters: &Parameters) -> Result<Self, ApiError> {
        let p = parameters;
        let model = match p.model.as_str() {
            Some(model) if !model.is_empty() => model.to_owned(),
            _ => return Err(ApiError::parameter("model", "'model' must be a string that names a model.")),
        };
        unsupported::refuse(p)?;
        let max_tokens = positive("max_tokens", &p.max_tokens)?;
        let max_completion_tokens = positive("max_completion_tokens", &p.max_completion_tokens)?;
        let options = Self {
            model,
            stream: flag("stream", &p.stream)?.unwrap_or(false),
            include_usage: include_usage(&p.stream_options)?,
            max_tokens: max_completion_tokens.or(max_tokens),
            temperature: temperature(&p.temperature)?,
            seed: seed(&p.seed)?,
            stop: stop(&p.stop)?,
            stop_token_ids: stop_token_ids(&p.stop_token_ids)?,
            ignore_eos: flag("ignore_eos", &p.ignore_eos)?
                .or(flag("nvext.ignore_eos", extension(&p.nvext, "ignore_eos")?)?)
                .unwrap_or(false),
            cache_salt: match salt("cache_salt", &p.cache_salt)? {
                Some(salt) => salt,
                None => salt("nvext.cache_salt", extension(&p.nvext, "cache_salt")?)?.unwrap_or_default(),
            },
            retention: retention::retention(
                &p.kv_cache_retention_config,
                extension(&p.nvext, "kv_cache_retention_config")?,
            )?,
            tenant: tenant::in_body(extension(&p.nvext, "tenant")?)?,
        };
        options.check_min_tokens(&p.min_tokens)?;
        Ok(options)
    }

    /// A minimum is kept anyway when nothing can end the answer early.
    fn check_min_tokens(&self, value: &Value) -> Result<(), ApiError> {
        let runs_full = self.ignore_eos && self.stop.is_empty() && self.stop_token_ids.is_empty();
        match value.as_u64() {
            Some(0) => Ok(()),
            Some(_) if runs_full => Ok(()),
            None if value.is_null() => Ok(()),
            _ => Err(ApiError::parameter(
                "min_tokens",
                "'min_tokens' is supported together with 'ignore_eos' only.",
            )),
        }
    }
}

/// A field of NVIDIA's extension object.
fn extension<'a>(nvext: &'a Value, name: &str) -> Result<&'a Value, ApiError> {
    match nvext {
        Value::Null => Ok(&Value::Null),
        Value::Object(fields) => Ok(fields.get(name).unwrap_or(&Value::Null)),
        _ => Err(ApiError::parameter("nvext", "'nvext' must be an object.")),
    }
}

fn flag(name: &'static str, value: &Value) -> Result<Option<bool>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::Bool(flag) => Ok(Some(*flag)),
        _ => Err(ApiError::parameter(name, format!("'{name}' must be true or false."))),
    }
}

fn positive(name: &'static str, value: &Value) -> Result<Option<u32>, ApiError> {
    if value.is_null() {
        return Ok(None);
    }
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number >= 1);
    let given = || if value.is_number() { value.to_string() } else { "something else".to_owned() };
    number.map(Some).ok_or_else(|| {
        let message = format!("'{name}' must be an integer from 1 to {}, but it is {}.", u32::MAX, given());
        ApiError::parameter(name, message)
    })
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

fn temperature(value: &Value) -> Result<Option<f32>, ApiError> {
    match value.as_f64() {
        None if value.is_null() => Ok(None),
        Some(temperature) if (0.0..=2.0).contains(&temperature) => Ok(Some(temperature as f32)),
        _ => Err(ApiError::parameter("temperature", "'temperature' must be a number from 0 to 2.")),
    }
}

fn seed(value: &Value) -> Result<Option<u64>, ApiError> {
    let bits = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    if bits.is_none() && !value.is_null() {
        return Err(ApiError::parameter("seed", "'seed' must be an integer of 64 bits."));
    }
    Ok(bits)
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
