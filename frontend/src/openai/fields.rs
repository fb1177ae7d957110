//! Single fields of a body, read and checked.

use serde_json::Value;

use super::ApiError;

/// A field at the top level or in NVIDIA's extension object `nvext`, which may both be there if they say the same.
pub fn either<'a>(name: &'static str, top: &'a Value, nvext: &'a Value) -> Result<&'a Value, ApiError> {
    let within = extension(nvext, name)?;
    match (top.is_null(), within.is_null()) {
        (_, true) => Ok(top),
        (true, false) => Ok(within),
        (false, false) if top == within => Ok(top),
        (false, false) => {
            let message = format!("'nvext.{name}' and '{name}' differ. Leave one of them out.");
            Err(ApiError::parameter(format!("nvext.{name}"), message))
        }
    }
}

/// A field of `nvext`.
pub fn extension<'a>(nvext: &'a Value, name: &str) -> Result<&'a Value, ApiError> {
    match nvext {
        Value::Null => Ok(&Value::Null),
        Value::Object(fields) => Ok(fields.get(name).unwrap_or(&Value::Null)),
        _ => Err(ApiError::parameter("nvext", "'nvext' must be an object.")),
    }
}

pub fn flag(name: &'static str, value: &Value) -> Result<Option<bool>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::Bool(flag) => Ok(Some(*flag)),
        _ => Err(ApiError::parameter(name, format!("'{name}' must be true or false."))),
    }
}

/// An integer of a range.
pub fn integer(name: &'static str, value: &Value, least: i64, most: u32) -> Result<Option<i64>, ApiError> {
    if value.is_null() {
        return Ok(None);
    }
    let number = value.as_i64().filter(|number| (least..=i64::from(most)).contains(number));
    number.map(Some).ok_or_else(|| {
        let message =
            format!("'{name}' must be an integer from {least} to {most}, but it is {}.", given(value));
        ApiError::parameter(name, message)
    })
}

/// As `integer`, from `least` on.
pub fn count(name: &'static str, value: &Value, least: u32, most: u32) -> Result<Option<u32>, ApiError> {
    let number = integer(name, value, i64::from(least), most)?;
    Ok(number.and_then(|number| u32::try_from(number).ok()))
}

/// A number of a range, its ends included.
pub fn number(name: &'static str, value: &Value, least: f64, most: f64) -> Result<Option<f32>, ApiError> {
    match value.as_f64() {
        None if value.is_null() => Ok(None),
        Some(number) if (least..=most).contains(&number) => Ok(Some(number as f32)),
        _ => {
            let message =
                format!("'{name}' must be a number from {least} to {most}, but it is {}.", given(value));
            Err(ApiError::parameter(name, message))
        }
    }
}

/// As `number`, of numbers above 0.
pub fn positive_number(name: &'static str, value: &Value, most: f64) -> Result<Option<f32>, ApiError> {
    match value.as_f64() {
        None if value.is_null() => Ok(None),
        Some(number) if number > 0.0 && number <= most => Ok(Some(number as f32)),
        _ => {
            let message =
                format!("'{name}' must be a number above 0 and up to {most}, but it is {}.", given(value));
            Err(ApiError::parameter(name, message))
        }
    }
}

fn given(value: &Value) -> String {
    if value.is_number() { value.to_string() } else { "something else".to_owned() }
}
