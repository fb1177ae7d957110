//! What answers look like that are more than text: scores, several choices, calls of tools, and silence.

use std::time::Duration;

use http::StatusCode;
use kvbm_frontend::{Config, Times, ToolCallFormat};
use kvbm_proto::v1::FinishReason;
use serde_json::{Value, json};

use crate::client::{Open, get, post};
use crate::frontend::{Frontend, config};
use crate::mock::{MockWorker, Script, say, tokens};

fn weather() -> Value {
    json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } }])
}

fn chat(more: Value) -> Value {
    let mut body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "Weather?" }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

async fn with_tools(worker: &MockWorker) -> Frontend {
    let tool_calls = Some(ToolCallFormat::Tagged);
    let frontend =
        Frontend::start(Config { workers: vec![worker.endpoint.clone()], tool_calls, ..config() }).await;
    frontend.until_ready(1).await;
    frontend
}

#[tokio::test]
async fn each_choice_is_a_request_with_a_seed_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" said"));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 7 });
    let body = post(frontend.address, "/v1/completions", request).await.json();
    let indices: Vec<&Value> =
        body["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    let mut seeds: Vec<_> =
        worker.requests().iter().map(|r| r.sampling.clone().unwrap().seed.unwrap()).collect();
    seeds.sort_unstable();
    assert_eq!(seeds, [7, 7, 8, 8]);
    // The prompt is paid for once.
    let prompt: usize = 2 * worker.requests()[0].prompt.len();
    assert_eq!(body["usage"]["prompt_tokens"], prompt);
    let drawn = json!({ "model": "tiny", "prompt": "a" });
    post(frontend.address, "/v1/completions", drawn).await;
    assert!(
        worker.requests()[4].sampling.clone().unwrap().seed.is_some(),
        "whoever goes on needs the same seed"
    );
}

#[tokio::test]
async fn calls_of_tools_are_told_whole_and_streamed() {
    let folder = tempfile::tempdir().unwrap();
    let answer =
        "Well.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>";
    let script =
        Script::Say(tokens(answer).into_iter().map(|token| vec![token]).collect(), FinishReason::Stop);
    let worker = MockWorker::start(folder.path(), "w", "tiny", script);
    let frontend = with_tools(&worker).await;
    let path = "/v1/chat/completions";
    let body = post(frontend.address, path, chat(json!({ "tools": weather() }))).await.json();
    let choice = &body["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Well."))
    );
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({ "name": "weather", "arguments": "{\"city\":\"Ulm\"}" }));
    let streamed =
        post(frontend.address, path, chat(json!({ "tools": weather(), "stream": true }))).await.events();
    let deltas: Vec<&Value> = streamed.iter().map(|event| &event["choices"][0]["delta"]).collect();
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    let calls: Vec<&Value> = deltas.iter().filter(|delta| delta["tool_calls"].is_array()).copied().collect();
    assert_eq!((text.as_str(), calls.len()), ("Well.", 1));
    assert_eq!(calls[0]["tool_calls"][0]["function"]["name"], "weather");
    assert_eq!(streamed.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // Unasked, the same text is text.
    let body =
        post(frontend.address, path, chat(json!({ "tools": weather(), "tool_choice": "none" }))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], answer);
}

#[tokio::test]
async fn tools_that_a_template_does_not_know_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say("x"));
    let frontend = Frontend::of(&[&worker]).await;
    let answer = post(frontend.address, "/v1/chat/completions", chat(json!({ "tools": weather() }))).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("tools")));
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", Script::Hang(tokens(" a")));
    // Long enough for a first token on a busy machine.
    let timing = Times { request: Some(Duration::from_millis(1500)), keep_alive: None };
    let frontend =
        Frontend::start(Config { workers: vec![worker.endpoint.clone()], timing, ..config() }).await;
    frontend.until_ready(1).await;
    let request = json!({ "model": "tiny", "prompt": "Once" });
    let answer = post(frontend.address, "/v1/completions", request.clone()).await;
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (StatusCode::GATEWAY_TIMEOUT, &json!("response_timeout"))
    );
    worker.cancelled(1).await;
    let mut stream = request;
    stream["stream"] = json!(true);
    let text = post(frontend.address, "/v1/completions", stream.clone()).await.text();
    assert!(text.contains("response_timeout") && text.contains(" a"), "{text}");
    worker.cancelled(2).await;
    worker.set(Script::Hang(Vec::new()));
    let answer = post(frontend.address, "/v1/completions", stream).await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT, "nothing had been said");
    let metrics = get(frontend.address, "/metrics").await.text();
    assert!(metrics.contains("error_type=\"response_timeout\""), "{metrics}");
}

#[tokio::test]
async fn a_silent_stream_says_that_it_is_alive() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", Script::Hang(Vec::new()));
    let timing = Times { request: None, keep_alive: Some(Duration::from_millis(20)) };
    let frontend =
        Frontend::start(Config { workers: vec![worker.endpoint.clone()], timing, ..config() }).await;
    frontend.until_ready(1).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    for script in [Script::Hang(Vec::new()), Script::Hang(tokens(" a"))] {
        worker.set(script);
        let mut open = Open::post(frontend.address, "/v1/completions", request.clone()).await;
        let mut comments = 0;
        while comments < 3 {
            comments += open.next().await.unwrap().matches(": keep-alive\n\n").count();
        }
    }
}
