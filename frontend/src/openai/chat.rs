//! The messages of a conversation.

use serde_json::{Map, Value};

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
        if let Some(calls) = fields.get_mut("tool_calls") {
            arguments_as_objects(calls)?;
        }
    }
    Ok(value)
}

/// Arguments of earlier calls are texts of JSON in the API, and objects in templates.
fn arguments_as_objects(calls: &mut Value) -> Result<(), ApiError> {
    let shape = "The 'tool_calls' of a message must be a list of calls, each with 'function.name'.";
    let calls = match calls {
        Value::Null => return Ok(()),
        Value::Array(calls) => calls,
        _ => return Err(wrong(shape)),
    };
    for call in calls {
        let function = call.get_mut("function").and_then(Value::as_object_mut).ok_or_else(|| wrong(shape))?;
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong(shape));
        }
        let arguments = match function.get("arguments") {
            Some(Value::String(text)) if text.is_empty() => Value::Object(Map::new()),
            Some(Value::String(text)) => serde_json::from_str(text)
                .map_err(|error| wrong(&format!("The 'arguments' of a tool call are no JSON: {error}.")))?,
            Some(Value::Null) | None => Value::Object(Map::new()),
            Some(arguments) => arguments.clone(),
        };
        function.insert("arguments".to_owned(), arguments);
    }
    Ok(())
}

fn joined(parts: &[Value]) -> Result<String, ApiError> {
    let mut text = String::new();
    for part in parts {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(piece)) => text.push_str(piece),
            (Some("text"), None) => return Err(wrong("A part of type 'text' must have a 'text'.")),
            (
                Some(
                    kind @ ("image_url" | "input_image" | "input_audio" | "audio_url" | "video_url" | "file"),
                ),
                _,
            ) => {
                let message = format!("This model reads text only: parts of type '{kind}' are not possible.");
                return Err(wrong(&message));
            }
            _ => return Err(wrong("Parts of a message must be of type 'text'.")),
        }
    }
    Ok(text)
}

fn wrong(message: &str) -> ApiError {
    ApiError::parameter("messages", message)
}
