//! What a client gets that asks for what cannot be.

use std::time::Duration;

use http::{Method, StatusCode};
use kvbm_frontend::{Config, Daemon};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{Answer, get, post, send};
use crate::frontend::{Frontend, config};
use crate::mock::{MockWorker, say};

fn check(answer: &Answer, status: u16, param: Option<&str>, code: Option<&str>) -> Value {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    let error = answer.json()["error"].take();
    assert_eq!(error["type"], "invalid_request_error");
    assert_eq!(error["param"].as_str(), param, "{error}");
    assert_eq!(error["code"].as_str(), code, "{error}");
    assert!(!error["message"].as_str().unwrap().is_empty());
    assert!(!answer.header("content-type").is_empty());
    error
}

#[tokio::test]
async fn each_wrong_request_gets_its_status_and_parameter() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    let frontend = Frontend::of(&[&worker]).await;
    let completions = "/v1/completions";
    for (fields, param, code) in [
        (json!({ "prompt": "" }), "prompt", None),
        (json!({ "prompt": [] }), "prompt", None),
        (json!({ "prompt": null }), "prompt", None),
        (json!({ "prompt": ["a", ""] }), "prompt", None),
        (json!({ "prompt": [5000] }), "prompt", None),
        (json!({ "prompt": vec![5; 4096] }), "prompt", Some("context_length_exceeded")),
        (json!({ "prompt": " the".repeat(4097) }), "prompt", Some("context_length_exceeded")),
        (json!({ "prompt": "x ".repeat(5_000_000) }), "prompt", Some("context_length_exceeded")),
        (json!({ "max_tokens": -1 }), "max_tokens", None),
        (json!({ "max_tokens": 0 }), "max_tokens", None),
        (json!({ "n": 200 }), "n", None),
        (json!({ "n": 50, "prompt": ["a", "b", "c"] }), "n", None),
        (json!({ "top_p": 0 }), "top_p", None),
        (json!({ "logprobs": 21 }), "logprobs", None),
        (json!({ "suffix": "x" }), "suffix", None),
        (json!({ "temperature": 3 }), "temperature", None),
    ] {
        let mut request = json!({ "model": "tiny", "prompt": "Once" });
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        check(&post(frontend.address, completions, request).await, 400, Some(param), code);
    }
    let unknown = json!({ "model": "other", "prompt": "Once" });
    check(&post(frontend.address, completions, unknown).await, 404, Some("model"), Some("model_not_found"));
    check(&post(frontend.address, completions, json!({ "prompt": "x" })).await, 400, Some("model"), None);
    for messages in [json!([]), json!(null), json!("hi"), json!([{ "role": "user" }])] {
        let request = json!({ "model": "tiny", "messages": messages });
        check(&post(frontend.address, "/v1/chat/completions", request).await, 400, Some("messages"), None);
    }
    let long = json!({ "model": "tiny", "messages": [{ "role": "user", "content": " the".repeat(5000) }] });
    let answer = post(frontend.address, "/v1/chat/completions", long).await;
    let error = check(&answer, 400, Some("messages"), Some("context_length_exceeded"));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("4096 tokens") && message.contains("500"), "{message}");
    assert!(worker.requests().is_empty());
}

#[tokio::test]
async fn a_context_with_room_for_one_token_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": vec![5; 4095], "max_tokens": 100 });
    assert_eq!(post(frontend.address, "/v1/completions", request).await.status, StatusCode::OK);
    assert_eq!(worker.requests()[0].max_tokens, 1);
}

#[tokio::test]
async fn bodies_that_cannot_be_read_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    let frontend = Frontend::of(&[&worker]).await;
    let address = frontend.address;
    for body in [&b"{"[..], b"", b"[]", b"{\"model\": \"tiny\", \"prompt\": \"\xff\xfe\"}"] {
        let answer = send(address, Method::POST, "/v1/completions", &[], body).await;
        check(&answer, 400, None, None);
    }
    let body = json!({ "model": "tiny", "prompt": "Once" }).to_string();
    let text = [("content-type", "text/plain")];
    assert_eq!(send(address, Method::POST, "/v1/completions", &text, body).await.status, StatusCode::OK);
    check(&get(address, "/v1/nothing").await, 404, None, Some("not_found"));
    check(&get(address, "/v1/completions").await, 405, None, Some("method_not_allowed"));
    check(&post(address, "/v1/models", json!({})).await, 405, None, Some("method_not_allowed"));
    check(&get(address, "/v1/models/other").await, 404, Some("model"), Some("model_not_found"));
}

const BODY_BYTES: usize = 100_000_000;

/// Sends 100 MB in pieces and returns the answer.
async fn send_large(frontend: &Frontend, head: &str, piece_head: &str, piece_tail: &str) -> String {
    let mut socket = TcpStream::connect(frontend.address).await.unwrap();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let piece = format!("{piece_head}{}{piece_tail}", "x".repeat(1_000_000));
    for _ in 0..BODY_BYTES / 1_000_000 {
        socket.write_all(piece.as_bytes()).await.unwrap();
    }
    let mut answer = String::new();
    socket.write_all(if piece_head.is_empty() { b"" } else { b"0\r\n\r\n" }).await.unwrap();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_body_of_100_mb_is_answered_and_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    let frontend = Frontend::of(&[&worker]).await;
    let announced = send_large(&frontend, &format!("content-length: {BODY_BYTES}"), "", "").await;
    let chunked = send_large(&frontend, "transfer-encoding: chunked", "f4240\r\n", "\r\n").await;
    for answer in [announced, chunked] {
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(answer.contains("\"code\":\"request_too_large\""), "{answer}");
        assert!(answer.contains("limit of 32 MB"), "{answer}");
    }
    // Who asks first is told before anything is sent.
    let mut socket = TcpStream::connect(frontend.address).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {BODY_BYTES}\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn without_a_worker_a_request_waits_and_is_told_to_retry() {
    let folder = tempfile::tempdir().unwrap();
    let daemons = vec![Daemon::at_socket(folder.path().join("none.sock"))];
    let frontend =
        Frontend::start(Config { daemons, worker_wait: Duration::from_millis(20), ..config() }).await;
    let request = json!({ "model": "tiny", "prompt": "Once" });
    let answer = post(frontend.address, "/v1/completions", request).await;
    assert_eq!((answer.status, answer.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, "1"));
    assert_eq!(answer.json()["error"]["code"], "no_worker");
    let health = get(frontend.address, "/health").await;
    assert_eq!(health.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(health.json()["reason"], "no worker is known");
    assert_eq!(get(frontend.address, "/v1/models").await.json()["data"], json!([]));
}
