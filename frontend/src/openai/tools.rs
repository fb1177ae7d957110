//! The tools of a chat, and whether the model has to call one.

use serde_json::{Map, Value, json};

use super::fields::flag;
use super::guide::Guided;
use super::{ApiError, Parameters};
use crate::metrics::Api;

const TOOLS_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 64;

/// Tools that may be called, and which must be.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    /// As chat templates are given them.
    pub list: Value,
    pub choice: ToolChoice,
    /// No more than one call.
    single: bool,
}

/// Whether tools are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// As the model likes.
    Auto,
    /// At least one is.
    Required,
    /// This one is.
    Function(String),
}

impl Tools {
    /// What the answer must look like for a call that has to be made: a list of calls, or the arguments of the one.
    pub fn guided(&self) -> Option<Guided> {
        match &self.choice {
            ToolChoice::Auto => None,
            ToolChoice::Required => Some(Guided::schema("tools", &self.calls_schema())),
            ToolChoice::Function(name) => {
                let schema = self.functions().find(|(called, _)| called == name).map(|(_, schema)| schema);
                Some(Guided::schema("tools", &schema.unwrap_or(json!({ "type": "object" }))))
            }
        }
    }

    /// Names and schemas of arguments.
    fn functions(&self) -> impl Iterator<Item = (&str, Value)> {
        self.list.as_array().into_iter().flatten().map(|tool| {
            let function = &tool["function"];
            let schema = match &function["parameters"] {
                Value::Null => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
                schema => schema.clone(),
            };
            (function["name"].as_str().unwrap_or_default(), schema)
        })
    }

    fn calls_schema(&self) -> Value {
        let mut definitions = Map::new();
        let calls: Vec<Value> = self
            .functions()
            .map(|(name, mut schema)| {
                // What is referred to from the root has to be there.
                if let Some(Value::Object(own)) =
                    schema.as_object_mut().and_then(|fields| fields.remove("$defs"))
                {
                    definitions.extend(own);
                }
                json!({
                    "type": "object",
                    "properties": { "name": { "const": name }, "arguments": schema },
                    "required": ["name", "arguments"],
                    "additionalProperties": false,
                })
            })
            .collect();
        let mut schema = json!({ "type": "array", "minItems": 1, "items": { "anyOf": calls } });
        if self.single {
            schema["maxItems"] = json!(1);
        }
        if !definitions.is_empty() {
            schema["$defs"] = Value::Object(definitions);
        }
        schema
    }
}

/// The tools that a chat may call; `None` if it may not.
pub fn tools(p: &Parameters, api: Api) -> Result<Option<Tools>, ApiError> {
    let list = match &p.tools {
        Value::Null => &[][..],
        Value::Array(list) => list,
        _ => return Err(wrong("'tools' must be a list.")),
    };
    if list.is_empty() {
        return match p.tool_choice.as_str() {
            Some("none" | "auto") => Ok(None),
            _ if p.tool_choice.is_null() => Ok(None),
            _ => Err(ApiError::parameter("tool_choice", "'tool_choice' needs 'tools' to choose from.")),
        };
    }
    if api == Api::Completions {
        return Err(wrong("'tools' belong to chats, not to completions."));
    }
    if list.len() > TOOLS_MAX {
        return Err(wrong(&format!("'tools' must hold at most {TOOLS_MAX} tools.")));
    }
    for (index, tool) in list.iter().enumerate() {
        check(index, tool)?;
    }
    let single = !flag("parallel_tool_calls", &p.parallel_tool_calls)?.unwrap_or(true);
    let Some(choice) = choice(&p.tool_choice, list)? else { return Ok(None) };
    Ok(Some(Tools { list: Value::Array(list.to_vec()), choice, single }))
}

fn check(index: usize, tool: &Value) -> Result<(), ApiError> {
    let at = |what: &str| wrong(&format!("'tools[{index}]{what}"));
    if tool["type"].as_str() != Some("function") {
        return Err(at(".type' must be \"function\"."));
    }
    let function = &tool["function"];
    let printable = |name: &&str| {
        (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
    };
    if function["name"].as_str().filter(printable).is_none() {
        return Err(at(".function.name' must be 1 to 64 letters, digits, dots, low lines and hyphens."));
    }
    if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
        return Err(at(".function.parameters' must be a JSON schema."));
    }
    Ok(())
}

/// `None`: none is to be called.
fn choice(value: &Value, tools: &[Value]) -> Result<Option<ToolChoice>, ApiError> {
    let wrong = |message: &str| ApiError::parameter("tool_choice", message);
    match value {
        Value::Null => Ok(Some(ToolChoice::Auto)),
        Value::String(word) => match word.as_str() {
            "none" => Ok(None),
            "auto" => Ok(Some(ToolChoice::Auto)),
            "required" => Ok(Some(ToolChoice::Required)),
            _ => Err(wrong("'tool_choice' must be \"none\", \"auto\", \"required\" or a function.")),
        },
        Value::Object(_) => {
            let name = value["function"]["name"].as_str().filter(|_| value["type"] == "function");
            let name = name.ok_or_else(|| {
                wrong("'tool_choice' must look like {\"type\": \"function\", \"function\": {\"name\": ...}}.")
            })?;
            if !tools.iter().any(|tool| tool["function"]["name"] == name) {
                return Err(wrong("'tool_choice' names a function that is not among 'tools'."));
            }
            Ok(Some(ToolChoice::Function(name.to_owned())))
        }
        _ => Err(wrong("'tool_choice' must be a word or a function.")),
    }
}

fn wrong(message: &str) -> ApiError {
    ApiError::parameter("tools", message)
}
