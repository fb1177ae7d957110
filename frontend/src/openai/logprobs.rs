//! The objects `logprobs` of both APIs.

use serde_json::{Map, Value, json};

use super::Score;
use crate::metrics::Api;

/// As the API has it.
pub fn logprobs(api: Api, scores: &[Score]) -> Value {
    match api {
        Api::Completions => completion(scores),
        Api::Chat => json!({ "content": scores.iter().map(chat).collect::<Vec<_>>(), "refusal": null }),
    }
}

/// Lists with one entry for each token.
fn completion(scores: &[Score]) -> Value {
    let column = |read: fn(&Score) -> Value| scores.iter().map(read).collect::<Vec<_>>();
    json!({
        "tokens": column(|score| name(&score.bytes).into()),
        "token_logprobs": column(|score| json!(score.logprob)),
        "top_logprobs": column(top),
        "text_offset": column(|score| score.offset.into()),
    })
}

/// By the text of the token; of tokens with the same text the likeliest.
fn top(score: &Score) -> Value {
    if score.logprob.is_none() {
        return Value::Null;
    }
    let mut fields = Map::new();
    for (bytes, logprob) in &score.top {
        fields.entry(name(bytes)).or_insert_with(|| json!(logprob));
    }
    Value::Object(fields)
}

fn chat(score: &Score) -> Value {
    let token = |bytes: &[u8], logprob: f32| json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes });
    let mut entry = token(&score.bytes, score.logprob.unwrap_or(0.0));
    entry["top_logprobs"] = score.top.iter().map(|(bytes, logprob)| token(bytes, *logprob)).collect();
    entry
}

/// Text, or the bytes of a token that is a part of a character.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{escaped}")
        }
    }
}
