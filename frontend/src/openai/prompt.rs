//! The prompt of a completion: a text, tokens, or several of either.

use serde_json::Value;

use super::ApiError;

const PROMPTS_MAX: usize = 128;

/// One prompt, and so one choice of the answer.
#[derive(Debug, PartialEq, Eq)]
pub enum PromptItem {
    Text(String),
    Tokens(Vec<u32>),
}

/// At least one, none of them empty.
pub fn prompts(value: Value) -> Result<Vec<PromptItem>, ApiError> {
    let items = match value {
        Value::Null => return Err(wrong("'prompt' is missing.")),
        Value::String(text) => vec![PromptItem::Text(text)],
        Value::Array(items) => match items.first() {
            Some(Value::Number(_)) => vec![PromptItem::Tokens(tokens(&items)?)],
            _ => items.into_iter().map(item).collect::<Result<_, _>>()?,
        },
        _ => return Err(wrong(SHAPE)),
    };
    let is_empty = |item: &PromptItem| match item {
        PromptItem::Text(text) => text.is_empty(),
        PromptItem::Tokens(tokens) => tokens.is_empty(),
    };
    if items.is_empty() || items.iter().any(is_empty) {
        return Err(wrong("'prompt' must not be empty."));
    }
    if items.len() > PROMPTS_MAX {
        return Err(wrong(format!("'prompt' must hold at most {PROMPTS_MAX} prompts.")));
    }
    Ok(items)
}

const SHAPE: &str =
    "'prompt' must be a string, a list of strings, a list of token ids, or a list of such lists.";

fn item(value: Value) -> Result<PromptItem, ApiError> {
    match value {
        Value::String(text) => Ok(PromptItem::Text(text)),
        Value::Array(ids) => Ok(PromptItem::Tokens(tokens(&ids)?)),
        _ => Err(wrong(SHAPE)),
    }
}

fn tokens(ids: &[Value]) -> Result<Vec<u32>, ApiError> {
    ids.iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(SHAPE)))
        .collect()
}

fn wrong(message: impl Into<String>) -> ApiError {
    ApiError::parameter("prompt", message)
}
