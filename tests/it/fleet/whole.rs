//! A streamed answer put together: what is compared between an undisturbed run and one whose workers were taken away.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kvbm_tests::Frontend;
use serde_json::{Value, json};

/// A request that asks for a stream.
#[derive(Debug, Clone)]
pub struct Request {
    path: &'static str,
    body: Value,
}

impl Request {
    pub fn completion(prompt: &[u32], more: Value) -> Self {
        Self::new("/v1/completions", json!({ "prompt": prompt }), more)
    }

    pub fn chat(text: &str, more: Value) -> Self {
        Self::new("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": text }] }), more)
    }

    fn new(path: &'static str, mut body: Value, more: Value) -> Self {
        let fields = body.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        fields.insert("model".into(), json!("tiny"));
        fields.insert("stream".into(), json!(true));
        fields.insert("stream_options".into(), json!({ "include_usage": true }));
        Self { path, body }
    }
}

/// One choice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// Of a completion or a chat, and the arguments of calls.
    pub text: String,
    /// What was said of each token, field by field.
    pub scores: BTreeMap<String, Vec<Value>>,
    pub finish: Option<String>,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Whole {
    pub choices: BTreeMap<u64, Choice>,
    pub completion_tokens: u64,
}

/// An answer and how it came.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    pub whole: Whole,
    /// Longest time between two events of one choice.
    pub longest_gap: Duration,
}

/// Asks, and hears the answer to its end. `on_event` is told the route and how many events have come.
pub fn hear(frontend: &Frontend, request: &Request, mut on_event: impl FnMut(&str, usize)) -> Heard {
    let (route, events) = frontend.events(request.path, &request.body);
    let mut heard = Heard::default();
    let mut last: BTreeMap<u64, Instant> = BTreeMap::new();
    for (count, event) in events.enumerate() {
        assert!(event["error"].is_null(), "{event} as answer to {}", request.body);
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            heard.whole.completion_tokens = tokens;
        }
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap();
            let now = Instant::now();
            if let Some(before) = last.insert(index, now) {
                heard.longest_gap = heard.longest_gap.max(now - before);
            }
            heard.whole.choices.entry(index).or_default().add(choice);
        }
        on_event(&route, count + 1);
    }
    for choice in heard.whole.choices.values() {
        assert!(choice.finish.is_some(), "it broke off: {choice:?}");
    }
    heard
}

impl Choice {
    fn add(&mut self, event: &Value) {
        let (text, content) = (&event["text"], &event["delta"]["content"]);
        let calls = event["delta"]["tool_calls"].as_array().into_iter().flatten();
        let arguments = calls.map(|call| &call["function"]["arguments"]);
        for part in [text, content].into_iter().chain(arguments) {
            self.text.push_str(part.as_str().unwrap_or_default());
        }
        for (field, scores) in event["logprobs"].as_object().into_iter().flatten() {
            let scores = scores.as_array().into_iter().flatten().cloned();
            self.scores.entry(field.clone()).or_default().extend(scores);
        }
        if let Some(finish) = event["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
    }
}
