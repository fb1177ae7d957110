//! The answer to a request that is not streamed.

use serde::Serialize;

use super::Usage;
use crate::metrics::Api;

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// End of sequence, stop string or stop token.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
}

impl Finish {
    /// As it is written.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
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
    logprobs: Option<()>,
    finish_reason: Finish,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

/// The JSON of an answer. `choices` are in order of the prompts.
pub fn answer_body(
    api: Api,
    id: &str,
    created: u64,
    model: &str,
    choices: &[(String, Finish)],
    usage: Usage,
) -> Result<Vec<u8>, serde_json::Error> {
    let choices = choices.iter().enumerate().map(|(index, (text, finish_reason))| {
        let (text, message) = match api {
            Api::Completions => (Some(text.as_str()), None),
            Api::Chat => (None, Some(Message { role: "assistant", content: text, refusal: None })),
        };
        Choice { index, text, message, logprobs: None, finish_reason: *finish_reason }
    });
    let object = match api {
        Api::Completions => "text_completion",
        Api::Chat => "chat.completion",
    };
    serde_json::to_vec(&Answer { id, object, created, model, choices: choices.collect(), usage })
}
