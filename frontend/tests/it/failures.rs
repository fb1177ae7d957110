//! Workers that fail, and clients that leave.

use http::StatusCode;
use kvbm_frontend::RouterConfig;
use kvbm_proto::v1::FinishReason;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::Status;

use crate::client::{Open, parse, post};
use crate::frontend::Frontend;
use crate::mock::{MockWorker, Script, say, tokens};

#[tokio::test]
async fn workers_take_turns() {
    let folder = tempfile::tempdir().unwrap();
    let workers = ["a", "b"].map(|name| MockWorker::start(folder.path(), name, "tiny", say(" x")));
    let frontend = Frontend::of(&[&workers[0], &workers[1]]).await;
    for _ in 0..10 {
        let request = json!({ "model": "tiny", "prompt": "Once" });
        assert_eq!(post(frontend.address, "/v1/completions", request).await.status, StatusCode::OK);
    }
    assert_eq!(workers.each_ref().map(|worker| worker.requests().len()), [5, 5]);
}

#[tokio::test]
async fn another_worker_answers_when_one_fails_before_the_first_token() {
    let folder = tempfile::tempdir().unwrap();
    let good = MockWorker::start(folder.path(), "good", "tiny", say(" x"));
    let bad = MockWorker::start(folder.path(), "bad", "tiny", say(" x"));
    let frontend = Frontend::of(&[&good, &bad]).await;
    for (count, script) in [
        Script::Refuse(Status::unavailable("draining")),
        Script::Refuse(Status::resource_exhausted("full")),
        Script::Fail(Vec::new(), Status::unavailable("draining")),
    ]
    .into_iter()
    .enumerate()
    {
        bad.set(script);
        for stream in [true, false] {
            let request = json!({ "model": "tiny", "prompt": "Once", "stream": stream });
            assert_eq!(post(frontend.address, "/v1/completions", request).await.status, StatusCode::OK);
        }
        assert_eq!(bad.requests().len(), count + 1);
    }
    drop(bad);
    for _ in 0..4 {
        let request = json!({ "model": "tiny", "prompt": "Once" });
        assert_eq!(post(frontend.address, "/v1/completions", request).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn full_workers_are_told_from_wrong_requests() {
    let folder = tempfile::tempdir().unwrap();
    let worker =
        MockWorker::start(folder.path(), "w", "tiny", Script::Refuse(Status::resource_exhausted("full")));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    for (status, expected, code) in [
        (Status::resource_exhausted("full"), 503, "overloaded"),
        (Status::invalid_argument("no such LoRA"), 400, ""),
        (Status::internal("broken"), 500, "internal_error"),
    ] {
        worker.set(Script::Refuse(status));
        let answer = post(frontend.address, "/v1/completions", request.clone()).await;
        assert_eq!(answer.status.as_u16(), expected);
        assert_eq!(answer.json()["error"]["code"].as_str().unwrap_or_default(), code);
        assert_eq!(answer.headers.contains_key("retry-after"), expected == 503);
    }
}

#[tokio::test]
async fn a_worker_lost_in_the_middle_is_an_error_event_or_502_if_no_other_may_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", Script::Hang(tokens(" one two")));
    let router = RouterConfig { migration_limit: 0, ..RouterConfig::default() };
    let frontend = Frontend::routed(&[&worker], router).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    let mut open = Open::post(frontend.address, "/v1/completions", request.clone()).await;
    let mut text = open.next().await.unwrap();
    drop(worker);
    while let Some(more) = open.next().await {
        text.push_str(&more);
    }
    let events = parse(&text);
    assert_eq!(events[0]["choices"][0]["text"], " one two");
    assert_eq!(events.last().unwrap()["error"]["code"], "worker_lost");

    let script = Script::Fail(tokens(" one"), Status::unavailable("killed"));
    let worker = MockWorker::start(folder.path(), "w", "tiny", script);
    let request = json!({ "model": "tiny", "prompt": "Once" });
    let answer = post(frontend.address, "/v1/completions", request.clone()).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.json()["error"]["code"], "worker_lost");
    worker.set(Script::Say(vec![tokens(" one")], FinishReason::Cancelled));
    assert_eq!(post(frontend.address, "/v1/completions", request).await.status, StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_at_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", Script::Hang(tokens(" one")));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    let mut open = Open::post(frontend.address, "/v1/completions", request).await;
    open.next().await.unwrap();
    drop(open);
    worker.cancelled(1).await;
    frontend.until_metric("dynamo_frontend_disconnected_clients 1").await;

    // Waiting for a whole answer, and for a first token.
    for (count, script) in [(2, Script::Hang(tokens(" one"))), (3, Script::Hang(Vec::new()))] {
        worker.set(script);
        let body = json!({ "model": "tiny", "prompt": "Once" }).to_string();
        let mut socket = TcpStream::connect(frontend.address).await.unwrap();
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        while worker.requests().len() < count {
            tokio::task::yield_now().await;
        }
        drop(socket);
        worker.cancelled(count).await;
        frontend.until_metric(&format!("dynamo_frontend_disconnected_clients {count}")).await;
    }
    frontend.until_metric("dynamo_frontend_inflight_requests{model=\"tiny\"} 0").await;
}
