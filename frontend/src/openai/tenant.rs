//! Whose request it is: the header that a gateway sets, or `nvext.tenant`.

use http::HeaderMap;
use serde_json::Value;

use super::ApiError;

/// The header.
const HEADER: &str = "x-kvbm-tenant";
const FIELD: &str = "nvext.tenant";
const TENANT_BYTES_MAX: usize = 256;

/// The tenant that the body names.
pub fn in_body(value: &Value) -> Result<Option<String>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(tenant) => checked(FIELD, tenant).map(Some),
        _ => Err(wrong(FIELD)),
    }
}

/// The tenant of the request; empty: none. A body cannot say another than the header does.
pub fn tenant(headers: &HeaderMap, in_body: Option<String>) -> Result<String, ApiError> {
    let mut values = headers.get_all(HEADER).iter();
    let in_header = match (values.next(), values.next()) {
        (None, _) => None,
        (Some(value), None) => {
            Some(checked(HEADER, value.to_str().map_err(|_| wrong(HEADER))?.trim_ascii())?)
        }
        (Some(_), Some(_)) => {
            return Err(ApiError::parameter(HEADER, format!("The header '{HEADER}' is there twice.")));
        }
    };
    match (in_header, in_body) {
        (Some(header), Some(body)) if header != body => {
            let message = format!("'{FIELD}' and the header '{HEADER}' name different tenants.");
            Err(ApiError::parameter(FIELD, message))
        }
        (header, body) => Ok(header.or(body).unwrap_or_default()),
    }
}

fn checked(param: &'static str, tenant: &str) -> Result<String, ApiError> {
    if (1..=TENANT_BYTES_MAX).contains(&tenant.len()) { Ok(tenant.to_owned()) } else { Err(wrong(param)) }
}

fn wrong(param: &'static str) -> ApiError {
    ApiError::parameter(param, format!("'{param}' must be a text of 1 to {TENANT_BYTES_MAX} bytes."))
}
