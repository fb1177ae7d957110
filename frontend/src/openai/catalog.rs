//! Every parameter that is supported: what `/openapi.json` and docs/api.md say is this table, and tests compare it with
//! what is parsed.

/// A parameter of a request's body.
pub struct Parameter {
    pub name: &'static str,
    pub apis: Apis,
    /// JSON schema.
    pub schema: &'static str,
    pub about: &'static str,
}

/// Where a parameter is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apis {
    Both,
    Completions,
    Chat,
}

use Apis::{Both, Chat, Completions};

const fn of(apis: Apis, name: &'static str, schema: &'static str, about: &'static str) -> Parameter {
    Parameter { name, apis, schema, about }
}

const BOOLEAN: &str = r#"{"type":"boolean"}"#;
const STRING: &str = r#"{"type":"string"}"#;
const OBJECT: &str = r#"{"type":"object"}"#;
const INTEGER: &str = r#"{"type":"integer"}"#;
const UNSIGNED: &str = r#"{"type":"integer","minimum":0}"#;
const SHARE: &str = r#"{"type":"number","minimum":0,"maximum":1}"#;
const PENALTY: &str = r#"{"type":"number","minimum":-2,"maximum":2}"#;
const TEXT_OR_TEXTS: &str = r#"{"anyOf":[{"type":"string"},{"type":"array","items":{"type":"string"}}]}"#;
const SCHEMA_OR_TEXT: &str = r#"{"anyOf":[{"type":"object"},{"type":"boolean"},{"type":"string"}]}"#;

/// All of them, in the order in which they are documented.
pub const PARAMETERS: &[Parameter] = &[
    of(Both, "model", STRING, "Name of a model that `/v1/models` lists."),
    of(
        Completions,
        "prompt",
        r#"{"anyOf":[{"type":"string"},{"type":"array","items":{"type":"string"}},{"type":"array","items":{"type":"integer"}},{"type":"array","items":{"type":"array","items":{"type":"integer"}}}]}"#,
        "Text, token ids, or a list of either; each has choices of its own.",
    ),
    of(
        Chat,
        "messages",
        r#"{"type":"array","minItems":1,"items":{"type":"object","required":["role"]}}"#,
        "The conversation. Contents are text, or parts of type `text`; others are refused.",
    ),
    of(Both, "stream", BOOLEAN, "Answer with server-sent events."),
    of(Both, "stream_options", OBJECT, "`include_usage`: the last event has the usage."),
    of(
        Both,
        "max_tokens",
        UNSIGNED,
        "Most tokens of a choice: 16 for completions, what the context has room for in chats. 0 with `echo` only.",
    ),
    of(Both, "max_completion_tokens", UNSIGNED, "The same, and counts if both are there."),
    of(
        Both,
        "min_tokens",
        UNSIGNED,
        "Tokens before which neither an end of sequence nor a stop ends the choice.",
    ),
    of(
        Both,
        "n",
        r#"{"type":"integer","minimum":1,"maximum":128}"#,
        "Choices of each prompt. Choice `i` has the seed `seed + i`.",
    ),
    of(
        Both,
        "temperature",
        r#"{"type":"number","minimum":0,"maximum":2}"#,
        "0 takes the likeliest token. Default: as generation_config.json says, else 1.",
    ),
    of(
        Both,
        "top_p",
        r#"{"type":"number","exclusiveMinimum":0,"maximum":1}"#,
        "Only the likeliest tokens that together have this probability.",
    ),
    of(Both, "top_k", INTEGER, "Only so many of the likeliest tokens; 0 and -1: all. Also in `nvext`."),
    of(
        Both,
        "min_p",
        SHARE,
        "Only tokens at least this likely, as a share of the likeliest. Also in `nvext`.",
    ),
    of(
        Both,
        "repetition_penalty",
        r#"{"type":"number","exclusiveMinimum":0,"maximum":100}"#,
        "Logits of tokens of prompt and answer are divided by it if positive, else multiplied. Also in `nvext`.",
    ),
    of(Both, "presence_penalty", PENALTY, "Taken off the logits of tokens that were generated."),
    of(
        Both,
        "frequency_penalty",
        PENALTY,
        "Taken off the logits of tokens for each time they were generated.",
    ),
    of(
        Both,
        "logit_bias",
        r#"{"type":"object","additionalProperties":{"type":"number","minimum":-100,"maximum":100}}"#,
        "Added to the logits of these tokens, by id; at most 1,024.",
    ),
    of(
        Both,
        "seed",
        INTEGER,
        "Of 64 bits. The same seed gives the same text, whatever else is going on and whatever the cache has.",
    ),
    of(Both, "stop", TEXT_OR_TEXTS, "Up to 16 texts; the answer ends in front of the first."),
    of(
        Both,
        "stop_token_ids",
        r#"{"type":"array","items":{"type":"integer"}}"#,
        "Tokens that end the answer, without text.",
    ),
    of(Both, "ignore_eos", BOOLEAN, "The model's end of sequence is a token like others. Also in `nvext`."),
    of(
        Both,
        "logprobs",
        r#"{"anyOf":[{"type":"boolean"},{"type":"integer","minimum":0,"maximum":20}]}"#,
        "Completions: how many of the likeliest tokens are listed beside each. Chats: whether tokens are listed.",
    ),
    of(
        Chat,
        "top_logprobs",
        r#"{"type":"integer","minimum":0,"maximum":20}"#,
        "How many of the likeliest tokens are listed beside each.",
    ),
    of(
        Completions,
        "echo",
        BOOLEAN,
        "Repeat the prompt in front of the answer, with `logprobs` also its tokens.",
    ),
    of(Both, "response_format", OBJECT, "`text`, `json_object`, or `json_schema` with a schema."),
    of(Both, "guided_json", SCHEMA_OR_TEXT, "The answer is JSON of this schema. Also in `nvext`."),
    of(
        Both,
        "guided_regex",
        STRING,
        "The answer matches this regular expression, as a whole. Also in `nvext`.",
    ),
    of(
        Both,
        "guided_choice",
        r#"{"type":"array","items":{"type":"string"}}"#,
        "The answer is one of these texts. Also in `nvext`.",
    ),
    of(Both, "guided_grammar", STRING, "The answer is of this grammar, in Lark's syntax. Also in `nvext`."),
    of(
        Both,
        "structured_outputs",
        OBJECT,
        "One of `json`, `regex`, `choice`, `grammar` and `json_object`; so is `nvext.guided_decoding`.",
    ),
    of(Chat, "tools", r#"{"type":"array","items":{"type":"object"}}"#, "Functions that may be called."),
    of(
        Chat,
        "tool_choice",
        r#"{"anyOf":[{"type":"string","enum":["none","auto","required"]},{"type":"object"}]}"#,
        "`none`, `auto`, `required`, or a function, which is then called with arguments of its schema.",
    ),
    of(Chat, "parallel_tool_calls", BOOLEAN, "`false`: with `required`, no more than one call."),
    of(Chat, "add_generation_prompt", BOOLEAN, "Whether the assistant is to speak next."),
    of(Chat, "chat_template_kwargs", OBJECT, "Variables for the chat template."),
    of(Both, "cache_salt", STRING, "Only requests with the same salt find each other's KV. Also in `nvext`."),
    of(
        Both,
        "kv_cache_retention_config",
        OBJECT,
        "What the blocks of the request are to be kept like. Also in `nvext`.",
    ),
    of(
        Both,
        "nvext",
        OBJECT,
        "The parameters that say so above, `tenant`, and `lora`, an adapter by its name at the worker.",
    ),
];
