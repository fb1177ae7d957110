//! What a request calls its prompt, made into tokens.

use std::sync::Arc;

use serde_json::Value;

use crate::fleet::Entry;
use crate::metrics::Api;
use crate::model::{Conversation, Model};
use crate::openai::{ApiError, Parameters, PromptItem, Tools, flag, messages, prompts};

/// Longer texts are tokenized on a thread of their own, so that other requests do not wait for them.
const INLINE_TEXT_BYTES: usize = 4096;

/// Prompts as they were given.
pub enum Source {
    /// Of a completion.
    Prompts(Vec<PromptItem>),
    /// Of a chat.
    Chat {
        /// Checked.
        messages: Value,
        /// `chat_template_kwargs`: an object, or `null`.
        variables: Value,
        /// Tools that may be called: a list, or `null`.
        tools: Value,
        /// Whether the assistant is to speak next.
        add_generation_prompt: bool,
    },
}

impl Source {
    /// Takes from the parameters what this API calls the prompt.
    pub fn of(api: Api, parameters: Parameters, tools: Option<&Tools>) -> Result<Self, ApiError> {
        match api {
            Api::Completions => Ok(Self::Prompts(prompts(parameters.prompt)?)),
            Api::Chat => {
                let variables = parameters.chat_template_kwargs;
                if !variables.is_null() && !variables.is_object() {
                    let message = "'chat_template_kwargs' must be an object.";
                    return Err(ApiError::parameter("chat_template_kwargs", message));
                }
                let add_generation_prompt =
                    flag("add_generation_prompt", &parameters.add_generation_prompt)?.unwrap_or(true);
                let tools = tools.map_or(Value::Null, |tools| tools.list.clone());
                let messages = messages(parameters.messages)?;
                Ok(Self::Chat { messages, variables, tools, add_generation_prompt })
            }
        }
    }

    /// Tokens of each prompt, none of which is empty.
    pub async fn encode(self, entry: &Arc<Entry>) -> Result<Vec<Vec<u32>>, ApiError> {
        let model = &entry.model;
        match self {
            Self::Prompts(items) => {
                let mut lists = Vec::with_capacity(items.len());
                for item in items {
                    lists.push(match item {
                        PromptItem::Tokens(tokens) => known_tokens(model, tokens)?,
                        PromptItem::Text(text) => encode(entry, "prompt", text, Model::encode_prompt).await?,
                    });
                }
                Ok(lists)
            }
            Self::Chat { messages, variables, tools, add_generation_prompt } => {
                let conversation = Conversation {
                    messages: &messages,
                    add_generation_prompt,
                    tools: &tools,
                    variables: &variables,
                };
                let text = render(model, &conversation)?;
                Ok(vec![encode(entry, "messages", text, Model::encode_chat).await?])
            }
        }
    }
}

fn render(model: &Model, conversation: &Conversation<'_>) -> Result<String, ApiError> {
    match model.render_chat(conversation) {
        Some(Ok(text)) => Ok(text),
        Some(Err(error)) => {
            Err(ApiError::parameter("messages", format!("The chat template refuses the messages: {error}")))
        }
        None => Err(ApiError::parameter("model", "The model has no chat template; use /v1/completions.")),
    }
}

type Encode = fn(&Model, &str) -> Result<Vec<u32>, String>;

async fn encode(
    entry: &Arc<Entry>,
    param: &'static str,
    text: String,
    encode: Encode,
) -> Result<Vec<u32>, ApiError> {
    let at_least = entry.model.tokens_min(text.len());
    if at_least >= entry.context_length as usize {
        return Err(ApiError::too_long(param, entry.context_length, at_least, false));
    }
    let encoded = if text.len() <= INLINE_TEXT_BYTES {
        encode(&entry.model, &text)
    } else {
        let model = entry.model.clone();
        let encoding = tokio::task::spawn_blocking(move || encode(&model, &text));
        encoding.await.unwrap_or_else(|error| Err(error.to_string()))
    };
    match encoded {
        Ok(tokens) if tokens.is_empty() => {
            Err(ApiError::parameter(param, format!("'{param}' has no tokens.")))
        }
        Ok(tokens) => Ok(tokens),
        Err(error) => Err(ApiError::internal(format!("The text could not be tokenized: {error}."))),
    }
}

fn known_tokens(model: &Model, tokens: Vec<u32>) -> Result<Vec<u32>, ApiError> {
    match tokens.iter().find(|&&token| token as usize >= model.vocabulary_len()) {
        None => Ok(tokens),
        Some(token) => {
            let message =
                format!("'prompt' holds the token {token}, but the model has {}.", model.vocabulary_len());
            Err(ApiError::parameter("prompt", message))
        }
    }
}
