//! The answer to a request that is not streamed.

use serde::Serialize;
use serde_json::{Value, json};

use super::logprobs::logprobs;
use super::{CallDelta, Delta, Usage};
use crate::metrics::Api;

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// End of sequence, stop string or stop token.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// Tools are called.
    ToolCalls,
}

impl Finish {
    /// As it is written.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// All that a choice said.
#[derive(Debug, Default)]
pub struct Said {
    pub delta: Delta,
    pub finish: Option<Finish>,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    logprobs: Option<Value>,
    finish_reason: Finish,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

/// The JSON of an answer. `choices` are in order of the prompts; tokens are listed if that is asked for.
pub fn answer_body(
    api: Api,
    id: &str,
    created: u64,
    model: &str,
    choices: &[Said],
    usage: Usage,
    scored: bool,
) -> Result<Vec<u8>, serde_json::Error> {
    let choices = choices.iter().enumerate().map(|(index, said)| {
        let text = said.delta.text.as_str();
        let (text, message) = match api {
            Api::Completions => (Some(text), None),
            Api::Chat => {
                let tool_calls = calls(&said.delta.calls);
                let content = Some(text).filter(|text| tool_calls.is_empty() || !text.is_empty());
                (None, Some(Message { role: "assistant", content, refusal: None, tool_calls }))
            }
        };
        let logprobs = scored.then(|| logprobs(api, &said.delta.scores));
        Choice { index, text, message, logprobs, finish_reason: said.finish.unwrap_or(Finish::Stop) }
    });
    let object = match api {
        Api::Completions => "text_completion",
        Api::Chat => "chat.completion",
    };
    serde_json::to_vec(&Answer { id, object, created, model, choices: choices.collect(), usage })
}

/// Calls put together from their parts.
fn calls(parts: &[CallDelta]) -> Vec<Value> {
    let mut calls: Vec<(&str, &str, String)> = Vec::new();
    for part in parts {
        match &part.head {
            Some((id, name)) => calls.push((id, name, part.arguments.clone())),
            None => {
                if let Some((_, _, arguments)) = calls.get_mut(part.index) {
                    arguments.push_str(&part.arguments);
                }
            }
        }
    }
    let written = calls.into_iter().map(|(id, name, arguments)| {
        json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
    });
    written.collect()
}
