//! `kv_cache_retention_config`: what the blocks of a request are to be kept like, as TensorRT-LLM writes it, or as
//! `{priority, duration_ms}` for all of them.

use std::collections::BTreeMap;
use std::time::Duration;

use kvbm_hash::{Retention, RetentionConfig, RetentionError, TokenRange};
use serde_json::Value;

use super::ApiError;

const NAME: &str = "kv_cache_retention_config";
const NVEXT_NAME: &str = "nvext.kv_cache_retention_config";

/// The config of a request, at its top level or in `nvext`. Both may be there if they mean the same.
pub fn retention(top: &Value, nvext: &Value) -> Result<Option<RetentionConfig>, ApiError> {
    let (top, nvext) = (config(NAME, top)?, config(NVEXT_NAME, nvext)?);
    match (top, nvext) {
        (Some(top), Some(nvext)) if top != nvext => {
            let message = format!("'{NVEXT_NAME}' and '{NAME}' differ. Leave one of them out.");
            Err(ApiError::parameter(NVEXT_NAME, message))
        }
        (top, nvext) => Ok(top.or(nvext)),
    }
}

fn config(path: &str, value: &Value) -> Result<Option<RetentionConfig>, ApiError> {
    let mut fields = match value {
        Value::Null => return Ok(None),
        value => Fields::of(path.to_owned(), value)?,
    };
    // Where TensorRT-LLM's transfers go to. Here they go where the tiers are.
    for ignored in ["transfer_mode", "directory"] {
        fields.take(ignored);
    }
    let said = |name: &str| fields.values.get(name).is_some_and(|value| !value.is_null());
    let long = ["token_range_retention_configs", "decode_retention_priority", "decode_duration_ms"];
    let long_form = long.into_iter().find(|name| said(name));
    let short_form = ["priority", "duration_ms"].into_iter().find(|name| said(name));
    let refused = |error: RetentionError| {
        let param = format!("{path}.{}", error.field);
        ApiError::parameter(param.clone(), format!("'{param}' {}.", error.reason))
    };
    let config = match (short_form, long_form) {
        (Some(short), Some(long)) => {
            let param = format!("{path}.{short}");
            let message = format!("'{param}' is for all blocks and cannot be given together with '{long}'.");
            return Err(ApiError::parameter(param, message));
        }
        (Some(_), None) => {
            let retention = fields.retention("priority", "duration_ms")?;
            RetentionConfig::uniform(retention)
        }
        (None, _) => {
            let ranges = ranges(&mut fields)?;
            let decode = fields.retention("decode_retention_priority", "decode_duration_ms")?;
            RetentionConfig::new(ranges, decode)
        }
    };
    for neutral in ["priority", "duration_ms"] {
        fields.take(neutral);
    }
    fields.end()?;
    config.map(Some).map_err(refused)
}

fn ranges(fields: &mut Fields<'_>) -> Result<Vec<TokenRange>, ApiError> {
    let name = "token_range_retention_configs";
    let list = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(fields.wrong(name, "must be a list of objects")),
    };
    let range = |(index, value): (usize, &Value)| {
        let mut fields = Fields::of(format!("{}.{name}[{index}]", fields.path), value)?;
        let start = fields.whole("token_start", u32::MAX.into())?;
        let Some(start) = start else { return Err(fields.wrong("token_start", "is missing")) };
        let range = TokenRange {
            start: token(start),
            end: fields.whole("token_end", u32::MAX.into())?.map(token),
            retention: fields.retention("priority", "duration_ms")?,
        };
        fields.end()?;
        Ok(range)
    };
    list.iter().enumerate().map(range).collect()
}

fn token(position: u64) -> u32 {
    u32::try_from(position).expect("it was bounded")
}

/// The fields of one object that were not read yet.
struct Fields<'a> {
    /// Of the object.
    path: String,
    values: BTreeMap<String, &'a Value>,
}

impl<'a> Fields<'a> {
    fn of(path: String, value: &'a Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(object) => {
                Ok(Self { path, values: object.iter().map(|(name, value)| (name.clone(), value)).collect() })
            }
            _ => Err(ApiError::parameter(path.clone(), format!("'{path}' must be an object."))),
        }
    }

    /// A field that is neither absent nor null.
    fn take(&mut self, name: &str) -> Option<&'a Value> {
        self.values.remove(name).filter(|value| !value.is_null())
    }

    fn retention(&mut self, priority: &str, duration: &str) -> Result<Retention, ApiError> {
        let given = self.whole(priority, Retention::PRIORITY_MAX.into())?;
        let lasting = self.whole(duration, Retention::DURATION_MS_MAX)?;
        let given = given.map(|given| u8::try_from(given).expect("it was bounded"));
        Ok(Retention {
            priority: given.unwrap_or(Retention::default().priority),
            duration: lasting.map(Duration::from_millis),
        })
    }

    fn whole(&mut self, name: &str, most: u64) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64().filter(|whole| *whole <= most) {
            Some(whole) => Ok(Some(whole)),
            None => {
                let given = if value.is_number() { value.to_string() } else { "something else".into() };
                Err(self.wrong(name, &format!("must be an integer from 0 to {most}, but it is {given}")))
            }
        }
    }

    /// What is left is not known: a name that is misspelt must not be without effect.
    fn end(mut self) -> Result<(), ApiError> {
        match self.values.pop_first() {
            None => Ok(()),
            Some((name, _)) => Err(self.wrong(&name, "is not known")),
        }
    }

    fn wrong(&self, name: &str, what: &str) -> ApiError {
        let param = format!("{}.{name}", self.path);
        ApiError::parameter(param.clone(), format!("'{param}' {what}."))
    }
}
