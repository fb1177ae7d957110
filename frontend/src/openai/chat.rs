//! The messages of a conversation.

use serde_json::Value;

use super::ApiError;

/// Checks messages and joins contents that come in parts, which templates of text models do not know.
pub fn messages(mut value: Value) -> Result<Value, ApiError> {
    let Value::Array(messages) = &mut value else {
        return Err(wrong("'messages' must be a list."));
    };
    if messages.is_empty() {
        return Err(wrong("'messages' must not be empty."));
    }
    for message in messages {
        let Value::Object(fields) = message else { return Err(wrong("Each message must be an object.")) };
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(wrong("Each message must have a 'role'."));
        }
        let content = match fields.remove("content") {
            Some(Value::String(text)) => text,
            Some(Value::Array(parts)) => joined(&parts)?,
            None | Some(Value::Null) if fields["role"] == "assistant" => String::new(),
            _ => return Err(wrong("The 'content' of a message must be a string or a list of parts.")),
        };
        fields.insert("content".to_owned(), Value::String(content));
    }
    Ok(value)
}

fn joined(parts: &[Value]) -> Result<String, ApiError> {
    let mut text = String::new();
    for part in parts {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(piece)) => text.push_str(piece),
            _ => return Err(wrong("Parts of a message other than text are not supported yet.")),
        }
    }
    Ok(text)
}

fn wrong(message: &str) -> ApiError {
    ApiError::parameter("messages", message)
}
