//! Answers that go on at another worker.

use std::collections::HashSet;
use std::time::Duration;

use http::StatusCode;
use kvbm_frontend::RouterConfig;
use kvbm_proto::v1::{FinishReason, GenerateRequest};
use serde_json::{Value, json};
use tonic::Status;

use crate::client::{Open, get, post};
use crate::frontend::Frontend;
use crate::mock::{MockWorker, Script, say, tokens};

fn request(stream: bool) -> Value {
    json!({ "model": "tiny", "prompt": "Once", "stream": stream, "max_tokens": 100 })
}

fn lost(text: &str) -> Script {
    Script::Fail(tokens(text), Status::unavailable("killed"))
}

/// Two workers, the first of which gets the first request.
async fn pair(folder: &std::path::Path, first: Script, second: Script) -> (MockWorker, MockWorker) {
    let a = MockWorker::start(folder, "a", "tiny", first);
    let b = MockWorker::start(folder, "b", "tiny", second);
    (a, b)
}

#[tokio::test]
async fn another_worker_goes_on_behind_the_last_token() {
    let folder = tempfile::tempdir().unwrap();
    for stream in [true, false] {
        let (a, b) = pair(folder.path(), lost(" one two"), say(" three four")).await;
        let frontend = Frontend::of(&[&a, &b]).await;
        let answer = post(frontend.address, "/v1/completions", request(stream)).await;
        assert_eq!(answer.status, StatusCode::OK);
        let text: String = match stream {
            true => answer.events().iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect(),
            false => answer.json()["choices"][0]["text"].as_str().unwrap().to_owned(),
        };
        assert_eq!(text, " one two three four");
        let (first, second) = (&a.requests()[0], &b.requests()[0]);
        assert_eq!(second.generated, tokens(" one two"));
        assert_eq!((&second.prompt, second.max_tokens), (&first.prompt, first.max_tokens));
        let metric = "dynamo_frontend_model_migration_total{migration_type=\"ongoing_request\",model=\"tiny\",outcome=\"success\"} 1";
        frontend.until_metric(metric).await;
        // As long as the mock says that it copied.
        frontend
            .until_metric("dynamo_frontend_model_migration_gap_seconds_sum{part=\"onboard\"} 0.007")
            .await;
    }
}

#[tokio::test]
async fn a_worker_that_dies_or_gives_up_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), Script::Hang(tokens(" one")), say(" two")).await;
    let frontend = Frontend::of(&[&a, &b]).await;
    let mut open = Open::post(frontend.address, "/v1/completions", request(true)).await;
    let mut text = open.next().await.unwrap();
    drop(a);
    while let Some(more) = open.next().await {
        text.push_str(&more);
    }
    assert!(text.ends_with("data: [DONE]\n\n") && text.contains(" two"), "{text}");

    let gives_up = Script::Say(vec![tokens(" one")], FinishReason::Cancelled);
    let (c, d) = pair(folder.path(), gives_up, say(" two")).await;
    let frontend = Frontend::of(&[&c, &d]).await;
    let answer = post(frontend.address, "/v1/completions", request(false)).await;
    assert_eq!(answer.json()["choices"][0]["text"], " one two");
}

#[tokio::test]
async fn a_worker_that_says_nothing_for_too_long_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), Script::Hang(tokens(" one")), say(" two")).await;
    let router = RouterConfig { stall: Some(Duration::from_millis(50)), ..RouterConfig::default() };
    let frontend = Frontend::routed(&[&a, &b], router).await;
    let answer = post(frontend.address, "/v1/completions", request(false)).await;
    assert_eq!(answer.json()["choices"][0]["text"], " one two");
    a.cancelled(1).await;
}

#[tokio::test]
async fn an_answer_moves_no_more_often_than_it_may() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), lost(" one"), lost(" two")).await;
    let router = RouterConfig { migration_limit: 2, ..RouterConfig::default() };
    let frontend = Frontend::routed(&[&a, &b], router).await;
    let answer = post(frontend.address, "/v1/completions", request(false)).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.json()["error"]["code"], "worker_lost");
    let all = [a.requests(), b.requests()].concat();
    let mut generated: Vec<Vec<u32>> = all.into_iter().map(|request| request.generated).collect();
    generated.sort_by_key(Vec::len);
    assert_eq!(generated, [tokens(""), tokens(" one"), [tokens(" one"), tokens(" two")].concat()]);
}

#[tokio::test]
async fn chance_is_the_same_at_the_next_worker() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), lost(" one"), say(" two")).await;
    let frontend = Frontend::of(&[&a, &b]).await;
    let mut request = request(false);
    request["temperature"] = json!(0.7);
    post(frontend.address, "/v1/completions", request).await;
    let seeds = [&a, &b].map(|worker| worker.requests()[0].sampling.clone().unwrap().seed);
    assert!(seeds[0].is_some() && seeds[0] == seeds[1], "{seeds:?}");
}

#[tokio::test]
async fn an_answer_that_was_complete_but_for_its_end_moves_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), lost(" one two"), say(" three")).await;
    let frontend = Frontend::of(&[&a, &b]).await;
    let mut request = request(false);
    request["max_tokens"] = json!(tokens(" one two").len());
    let answer = post(frontend.address, "/v1/completions", request).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["choices"][0]["text"], " one two");
    assert_eq!(b.requests().len(), 0);
    assert_eq!(get(frontend.address, "/health").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_stop_string_is_found_across_a_move_and_the_prompt_is_repeated_once() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), lost(" one tw"), Script::Hang(tokens("o three"))).await;
    let frontend = Frontend::of(&[&a, &b]).await;
    let mut request = request(false);
    request.as_object_mut().unwrap().extend([("stop".into(), json!("two")), ("echo".into(), json!(true))]);
    let choice =
        post(frontend.address, "/v1/completions", request.clone()).await.json()["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Once one "), &json!("stop")));
    b.cancelled(1).await;
    assert_eq!(b.requests()[0].generated, tokens(" one tw"));

    // Before the minimum, counted over both workers, it is text.
    request["min_tokens"] = json!(50);
    let (a, b) = pair(folder.path(), lost(" one tw"), say("o three")).await;
    let frontend = Frontend::of(&[&a, &b]).await;
    let choice = post(frontend.address, "/v1/completions", request).await.json()["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Once one two three"), &json!("length")));
    assert_eq!(b.requests()[0].sampling.clone().unwrap().min_tokens, 50);
}

#[tokio::test]
async fn each_choice_moves_with_a_seed_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = pair(folder.path(), lost(" one"), say(" two")).await;
    let frontend = Frontend::of(&[&a, &b]).await;
    let mut request = request(false);
    request["n"] = json!(3);
    let choices = post(frontend.address, "/v1/completions", request).await.json()["choices"].clone();
    assert_eq!(choices.as_array().unwrap().len(), 3);
    let all = [a.requests(), b.requests()].concat();
    let seed = |request: &GenerateRequest| request.sampling.clone().unwrap().seed.unwrap();
    let (moved, first): (Vec<_>, Vec<_>) = all.iter().partition(|request| !request.generated.is_empty());
    assert!(!moved.is_empty());
    for request in moved {
        let before = first.iter().find(|before| before.request_id == request.request_id).unwrap();
        assert_eq!((seed(request), &request.prompt), (seed(before), &before.prompt));
    }
    let seeds: HashSet<u64> = first.iter().map(|request| seed(request)).collect();
    assert_eq!((first.len(), seeds.len()), (3, 3));
}
