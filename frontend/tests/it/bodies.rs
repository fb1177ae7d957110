//! Bodies that nobody thought of: understood or refused, never a panic. `frontend/fuzz` does the same for longer.

use kvbm_frontend::read_body;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const FIELDS: [&str; 36] = [
    "model",
    "prompt",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "echo",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "structured_outputs",
    "tools",
    "tool_choice",
    "nvext",
    "cache_salt",
    "kv_cache_retention_config",
    "chat_template_kwargs",
    "best_of",
];

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        "[a-z0-9\u{e9}]{0,6}".prop_map(Value::from),
        Just(json!("function")),
        Just(json!({ "type": "function", "function": { "name": "f" } })),
        Just(json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }] }])),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let name =
            prop_oneof![proptest::sample::select(&FIELDS[..]).prop_map(str::to_owned), "[a-z0-9]{0,4}"];
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::Array),
            vec((name, inner), 0..4).prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_bytes_are_no_panic(body in vec(any::<u8>(), 0..200)) {
        read_body(&body);
    }

    #[test]
    fn any_values_of_any_fields_are_no_panic(fields in vec((proptest::sample::select(&FIELDS[..]), any_value()), 0..8)) {
        let mut body: Map<String, Value> = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        body.entry("model").or_insert(json!("tiny"));
        read_body(Value::Object(body).to_string().as_bytes());
    }
}
