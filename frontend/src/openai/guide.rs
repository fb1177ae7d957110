//! What an answer must look like: `response_format`, `guided_*`, `structured_outputs`, and the same within `nvext`.

use kvbm_proto::v1;
use kvbm_proto::v1::guide::Kind;
use serde_json::{Value, json};

use super::fields::{either, extension};
use super::{ApiError, Parameters};

/// A guide, and the parameter that asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Guided {
    pub parameter: &'static str,
    pub kind: Kind,
}

impl Guided {
    /// As workers are told.
    pub fn message(&self) -> v1::Guide {
        v1::Guide { kind: Some(self.kind.clone()) }
    }

    /// A JSON text of this schema.
    pub fn schema(parameter: &'static str, schema: &Value) -> Self {
        Self { parameter, kind: Kind::JsonSchema(schema.to_string()) }
    }
}

/// At most one of all spellings.
pub fn guided(p: &Parameters) -> Result<Option<Guided>, ApiError> {
    let field = |name, value| either(name, value, &p.nvext);
    let found = [
        response_format(&p.response_format)?,
        json_schema("guided_json", field("guided_json", &p.guided_json)?)?,
        text("guided_regex", field("guided_regex", &p.guided_regex)?, Kind::Regex)?,
        choice("guided_choice", field("guided_choice", &p.guided_choice)?)?,
        text("guided_grammar", field("guided_grammar", &p.guided_grammar)?, Kind::Lark)?,
        object("structured_outputs", &p.structured_outputs)?,
        object("nvext.guided_decoding", extension(&p.nvext, "guided_decoding")?)?,
    ];
    let mut found = found.into_iter().flatten();
    match (found.next(), found.next()) {
        (Some(first), Some(second)) => {
            let message = format!(
                "'{}' and '{}' both say what the answer must look like. Leave one of them out.",
                first.parameter, second.parameter
            );
            Err(ApiError::parameter(second.parameter, message))
        }
        (first, _) => Ok(first),
    }
}

fn response_format(value: &Value) -> Result<Option<Guided>, ApiError> {
    const NAME: &str = "response_format";
    let wrong = |message: &str| Err(ApiError::parameter(NAME, message));
    match value {
        Value::Null => Ok(None),
        Value::Object(fields) => match fields.get("type").and_then(Value::as_str) {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(Guided::schema(NAME, &json!({ "type": "object" })))),
            Some("json_schema") => match value["json_schema"].get("schema") {
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Some(Guided::schema(NAME, schema))),
                _ => wrong("'response_format.json_schema.schema' must be a JSON schema."),
            },
            _ => wrong("'response_format.type' must be \"text\", \"json_object\" or \"json_schema\"."),
        },
        _ => wrong("'response_format' must be an object."),
    }
}

/// A schema, as an object or as its text.
fn json_schema(name: &'static str, value: &Value) -> Result<Option<Guided>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::Object(_) | Value::Bool(_) => Ok(Some(Guided::schema(name, value))),
        Value::String(text) => match serde_json::from_str::<Value>(text) {
            Ok(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Some(Guided::schema(name, &schema))),
            _ => Err(ApiError::parameter(name, format!("'{name}' is a text that is no JSON schema."))),
        },
        _ => Err(ApiError::parameter(name, format!("'{name}' must be a JSON schema."))),
    }
}

fn text(
    name: &'static str,
    value: &Value,
    kind: impl Fn(String) -> Kind,
) -> Result<Option<Guided>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) if !text.is_empty() => {
            Ok(Some(Guided { parameter: name, kind: kind(text.clone()) }))
        }
        _ => Err(ApiError::parameter(name, format!("'{name}' must be a text that is not empty."))),
    }
}

fn choice(name: &'static str, value: &Value) -> Result<Option<Guided>, ApiError> {
    let wrong =
        || ApiError::parameter(name, format!("'{name}' must be a list of texts, none of them empty."));
    let list = match value {
        Value::Null => return Ok(None),
        Value::Array(list) if list.is_empty() => return Ok(None),
        Value::Array(list) => list,
        _ => return Err(wrong()),
    };
    let text = |item: &Value| item.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let texts = list.iter().map(|item| text(item).ok_or_else(wrong)).collect::<Result<_, _>>()?;
    Ok(Some(Guided { parameter: name, kind: Kind::Choice(v1::Choices { texts }) }))
}

/// One of `json`, `regex`, `choice`, `grammar` and `json_object`; what else is in it must be empty.
fn object(name: &'static str, value: &Value) -> Result<Option<Guided>, ApiError> {
    let fields = match value {
        Value::Null => return Ok(None),
        Value::Object(fields) => fields,
        _ => return Err(ApiError::parameter(name, format!("'{name}' must be an object."))),
    };
    let mut found = Vec::new();
    for (field, value) in fields {
        let guided = match field.as_str() {
            "json" => json_schema(name, value)?,
            "regex" => text(name, value, Kind::Regex)?,
            "choice" => choice(name, value)?,
            "grammar" => text(name, value, Kind::Lark)?,
            "json_object" if value == &Value::Bool(true) => {
                Some(Guided::schema(name, &json!({ "type": "object" })))
            }
            "json_object" if value == &Value::Bool(false) => None,
            _ if value.is_null() || value == &Value::Bool(false) => None,
            _ => {
                let message = format!("'{name}.{field}' is not supported yet. Leave it out.");
                return Err(ApiError::parameter(name, message));
            }
        };
        found.extend(guided);
    }
    if found.len() > 1 {
        return Err(ApiError::parameter(name, format!("'{name}' says more than one thing.")));
    }
    Ok(found.pop())
}
