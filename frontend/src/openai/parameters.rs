//! The body of a request as it came. Scalars stay JSON values so that a wrong one can be named.

use serde::Deserialize;
use serde_json::Value;

use super::ApiError;

/// Every field that is known, supported or not; fields that are not known are ignored. Absent is `null`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Parameters {
    pub model: Value,
    pub prompt: Value,
    pub messages: Value,
    pub stream: Value,
    pub stream_options: Value,
    pub max_tokens: Value,
    pub max_completion_tokens: Value,
    pub temperature: Value,
    pub seed: Value,
    pub stop: Value,
    pub stop_token_ids: Value,
    pub ignore_eos: Value,
    pub min_tokens: Value,
    pub cache_salt: Value,
    pub kv_cache_retention_config: Value,
    pub nvext: Value,
    pub add_generation_prompt: Value,
    pub chat_template_kwargs: Value,
    pub n: Value,
    pub echo: Value,
    pub logprobs: Value,
    pub top_logprobs: Value,
    pub top_p: Value,
    pub top_k: Value,
    pub min_p: Value,
    pub presence_penalty: Value,
    pub frequency_penalty: Value,
    pub repetition_penalty: Value,
    pub logit_bias: Value,
    pub tools: Value,
    pub tool_choice: Value,
    pub parallel_tool_calls: Value,
    pub response_format: Value,
    pub structured_outputs: Value,
    pub guided_json: Value,
    pub guided_regex: Value,
    pub guided_choice: Value,
    pub guided_grammar: Value,
    // Supported with their neutral values only, see `unsupported`.
    pub best_of: Value,
    pub suffix: Value,
    pub prompt_logprobs: Value,
    pub length_penalty: Value,
    pub use_beam_search: Value,
    pub bad_words: Value,
    pub functions: Value,
    pub function_call: Value,
    pub modalities: Value,
    pub audio: Value,
    pub prediction: Value,
    pub reasoning_effort: Value,
    pub web_search_options: Value,
    pub prompt_embeds: Value,
    pub truncate_prompt_tokens: Value,
    pub chat_template: Value,
    pub documents: Value,
    pub continue_final_message: Value,
    pub include_stop_str_in_output: Value,
    pub skip_special_tokens: Value,
}

impl Parameters {
    /// Reads a body, whatever its content type says.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            ApiError::request(format!("The body is not valid UTF-8 at byte {}.", error.valid_up_to()))
        })?;
        if !text.trim_ascii_start().starts_with('{') {
            return Err(ApiError::request("The body is not a JSON object."));
        }
        serde_json::from_str(text)
            .map_err(|error| ApiError::request(format!("The body is not valid JSON: {error}.")))
    }
}
