//! What a client gets when all is well.

use http::{Method, StatusCode};
use kvbm_proto::v1::FinishReason;
use serde_json::{Value, json};

use crate::client::{get, post, send};
use crate::frontend::Frontend;
use crate::mock::{MockWorker, Script, say, tiny, tokens};

const TEXT: &str = " there was a little girl named Lily.";

#[tokio::test]
async fn a_completion_is_answered_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(TEXT));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": "Once upon a time", "cache_salt": "pepper", "user": "u",
        "temperature": 0.5, "seed": 7 });
    let headers = [("x-request-id", "mine-1"), ("traceparent", "00-a-b-01")];
    let answer = send(frontend.address, Method::POST, "/v1/completions", &headers, request.to_string()).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("x-request-id"), "mine-1");
    assert_eq!(answer.header("x-kvbm-cached-tokens"), "device=96,host=64,disk=32");
    assert_eq!(answer.header("content-type"), "application/json");
    let body = answer.json();
    assert_eq!((&body["id"], &body["object"]), (&json!("cmpl-mine-1"), &json!("text_completion")));
    assert_eq!(
        body["choices"],
        json!([{ "index": 0, "text": TEXT, "logprobs": null, "finish_reason": "length" }])
    );
    let prompt = tiny().encode_prompt("Once upon a time").unwrap();
    let (asked, said) = (prompt.len(), tokens(TEXT).len());
    assert_eq!(
        body["usage"],
        json!({ "prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said,
            "prompt_tokens_details": { "cached_tokens": 192 } })
    );
    let request = &worker.requests()[0];
    assert_eq!((&request.prompt, request.prompt[0]), (&prompt, 0));
    assert_eq!((request.max_tokens, request.cache_salt.as_str()), (16, "pepper"));
    let sampling = request.sampling.clone().unwrap();
    assert_eq!((sampling.temperature, sampling.seed), (0.5, Some(7)));
    assert_eq!((request.request_id.as_str(), request.stop_token_ids.as_slice()), ("mine-1", &[1][..]));
    assert_eq!(request.trace.clone().unwrap().traceparent, "00-a-b-01");
}

#[tokio::test]
async fn a_completion_is_streamed() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(TEXT));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": [0, 920, 263], "max_tokens": 64, "stream": true,
        "stream_options": { "include_usage": true } });
    let answer = post(frontend.address, "/v1/completions", request).await;
    assert_eq!(answer.header("content-type"), "text/event-stream");
    assert_eq!(answer.header("x-kvbm-cached-tokens"), "device=96,host=64,disk=32");
    assert!(!answer.header("x-request-id").is_empty());
    let events = answer.events();
    let (usage, chunks) = events.split_last().unwrap();
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, TEXT);
    assert!(chunks.iter().all(|chunk| chunk["usage"] == Value::Null));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["prompt_tokens"], 3);
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 192);
    assert_eq!(worker.requests()[0].prompt, [0, 920, 263]);
}

#[tokio::test]
async fn a_chat_is_answered_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(TEXT));
    let frontend = Frontend::of(&[&worker]).await;
    let mut request =
        json!({ "model": "tiny", "messages": [{ "role": "user", "content": "Once upon a time" }] });
    let body = post(frontend.address, "/v1/chat/completions", request.clone()).await.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(
        body["choices"][0]["message"],
        json!({ "role": "assistant", "content": TEXT, "refusal": null })
    );
    let prompt = tiny().encode_prompt("Once upon a time\n").unwrap();
    assert_eq!(worker.requests()[0].prompt, prompt);
    assert_eq!(worker.requests()[0].max_tokens as usize, 4096 - prompt.len());

    request["stream"] = json!(true);
    request["max_completion_tokens"] = json!(9);
    let events = post(frontend.address, "/v1/chat/completions", request).await.events();
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let text: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, TEXT);
    let last = events.last().unwrap();
    assert_eq!(
        (&last["choices"][0]["finish_reason"], &last["choices"][0]["delta"]),
        (&json!("length"), &json!({}))
    );
    assert_eq!(last.get("usage"), None);
    assert_eq!(worker.requests()[1].max_tokens, 9);
}

#[tokio::test]
async fn several_prompts_get_one_choice_each() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(TEXT));
    let frontend = Frontend::of(&[&worker]).await;
    let mut request = json!({ "model": "tiny", "prompt": ["one", "two", "three"] });
    let body = post(frontend.address, "/v1/completions", request.clone()).await.json();
    let choices = body["choices"].as_array().unwrap();
    assert!(
        choices.iter().enumerate().all(|(index, choice)| choice["index"] == index && choice["text"] == TEXT)
    );
    assert_eq!(choices.len(), 3);
    assert_eq!(body["usage"]["completion_tokens"], 3 * tokens(TEXT).len());

    request["stream"] = json!(true);
    let events = post(frontend.address, "/v1/completions", request).await.events();
    for index in 0..3 {
        let mine = events.iter().filter(|event| event["choices"][0]["index"] == index);
        let text: String = mine.map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, TEXT);
    }
}

#[tokio::test]
async fn the_end_of_sequence_has_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let mut said = tokens(TEXT);
    said.push(1);
    let worker =
        MockWorker::start(folder.path(), "w", "tiny", Script::Say(vec![said.clone()], FinishReason::Stop));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "ignore_eos": true });
    for request in [json!({ "model": "tiny", "prompt": "Once" }), request] {
        let body = post(frontend.address, "/v1/completions", request).await.json();
        assert_eq!(
            (&body["choices"][0]["text"], &body["choices"][0]["finish_reason"]),
            (&json!(TEXT), &json!("stop"))
        );
        assert_eq!(body["usage"]["completion_tokens"], said.len());
    }
    let requests = worker.requests();
    assert!(requests[1].ignore_eos && requests[1].stop_token_ids.is_empty());
}

#[tokio::test]
async fn models_health_and_metrics_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(TEXT));
    let frontend = Frontend::of(&[&worker]).await;
    let models = get(frontend.address, "/v1/models").await.json();
    let model = &models["data"][0];
    assert_eq!(
        (&model["id"], &model["object"], &model["max_model_len"]),
        (&json!("tiny"), &json!("model"), &json!(4096))
    );
    assert_eq!(&get(frontend.address, "/v1/models/tiny").await.json(), model);
    let health = get(frontend.address, "/health").await;
    assert_eq!((health.status, &health.json()["status"]), (StatusCode::OK, &json!("healthy")));
    assert_eq!(get(frontend.address, "/live").await.status, StatusCode::OK);

    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    post(frontend.address, "/v1/completions", request).await.events();
    post(frontend.address, "/v1/completions", json!({ "model": "tiny", "prompt": "" })).await;
    let said = tokens(TEXT).len();
    let asked = tiny().encode_prompt("Once").unwrap().len();
    let labels = "{model=\"tiny\"}";
    for line in [
        "dynamo_frontend_requests_total{endpoint=\"completions\",error_type=\"\",model=\"tiny\",request_type=\"stream\",status=\"success\"} 1".to_owned(),
        "dynamo_frontend_requests_total{endpoint=\"completions\",error_type=\"validation\",model=\"\",request_type=\"unary\",status=\"error\"} 1".to_owned(),
        format!("dynamo_frontend_inflight_requests{labels} 0"),
        format!("dynamo_frontend_output_tokens_total{labels} {said}"),
        format!("dynamo_frontend_time_to_first_token_seconds_count{labels} 1"),
        format!("dynamo_frontend_inter_token_latency_seconds_count{labels} {}", said - 1),
        format!("dynamo_frontend_input_sequence_tokens_sum{labels} {asked}"),
        format!("dynamo_frontend_output_sequence_tokens_sum{labels} {said}"),
        format!("dynamo_frontend_cached_tokens_sum{labels} 192"),
        format!("dynamo_frontend_request_duration_seconds_count{labels} 1"),
        "dynamo_frontend_disconnected_clients 0".to_owned(),
    ] {
        let text = get(frontend.address, "/metrics").await.text();
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn requests_that_run_end_before_the_frontend_does() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(TEXT));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    let mut open = crate::client::Open::post(frontend.address, "/v1/completions", request).await;
    let mut text = open.next().await.unwrap();
    let stopped = tokio::spawn(frontend.stopped());
    while let Some(more) = open.next().await {
        text.push_str(&more);
    }
    assert!(text.ends_with("data: [DONE]\n\n"));
    stopped.await.unwrap();
}
