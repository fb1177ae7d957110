//! Workers that come and go, told by flags or by the daemon.

use std::path::Path;

use http::StatusCode;
use kvbm_frontend::Config;
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::frontend::{Frontend, config};
use crate::mock::{MockDaemon, MockWorker, model_path, say, tiny};

async fn ask(frontend: &Frontend, model: &str) -> StatusCode {
    post(frontend.address, "/v1/completions", json!({ "model": model, "prompt": "Once" })).await.status
}

#[tokio::test]
async fn a_request_waits_for_a_worker_that_comes() {
    let folder = tempfile::tempdir().unwrap();
    let endpoint = kvbm_frontend::Endpoint::Unix(folder.path().join("w.sock"));
    let frontend = Frontend::start(Config { workers: vec![endpoint], ..config() }).await;
    let address = frontend.address;
    let request = json!({ "model": "tiny", "prompt": "Once" });
    let waiting = tokio::spawn(async move { post(address, "/v1/completions", request).await });
    assert_eq!(get(address, "/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    assert_eq!(waiting.await.unwrap().status, StatusCode::OK);
    // And for one that comes back.
    drop(worker);
    frontend.until_ready(0).await;
    let again = tokio::spawn(async move { ask(&frontend, "tiny").await });
    let _worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    assert_eq!(again.await.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn the_daemons_workers_are_served_with_and_without_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("kvbm.sock");
    let first = MockWorker::start(folder.path(), "first", "tiny", say(" x"));
    let second = MockWorker::start(folder.path(), "second", "tiny", say(" x"));
    let daemon = MockDaemon::start(&socket, vec![first.entry()]);
    let frontend = Frontend::of_daemon(socket.clone()).await;
    assert_eq!(ask(&frontend, "tiny").await, StatusCode::OK);
    daemon.set(vec![first.entry(), second.entry()]);
    frontend.until_ready(2).await;

    drop(daemon);
    for _ in 0..4 {
        assert_eq!(ask(&frontend, "tiny").await, StatusCode::OK);
    }
    // Started again, it lists its workers one after the other, as they attach.
    let daemon = MockDaemon::start(&socket, Vec::new());
    daemon.set(vec![second.entry()]);
    let mut draining = second.entry();
    draining.worker.as_mut().unwrap().state = "draining".to_owned();
    daemon.set(vec![first.entry(), draining]);
    frontend.until_ready(1).await;
    assert_eq!(ask(&frontend, "tiny").await, StatusCode::OK);

    // Off the list and dead, it is forgotten.
    daemon.set(vec![second.entry()]);
    drop(first);
    frontend
        .until_workers(|workers| matches!(workers, [one] if one["id"] == "second" && one["state"] == "ready"))
        .await;
}

/// The tiny model with another template and without the token that begins a sequence.
fn other_model(folder: &Path) {
    std::fs::copy(model_path().join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let config = json!({ "add_bos_token": false, "chat_template": "{{ messages[0].content }}!" });
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[tokio::test]
async fn each_model_has_its_own_workers_and_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let model = tempfile::tempdir().unwrap();
    other_model(model.path());
    let tiny_worker = MockWorker::start(folder.path(), "a", "tiny", say(" x"));
    let other_worker = MockWorker::start_with(folder.path(), "b", "acme/other", model.path(), say(" x"));
    let frontend = Frontend::of(&[&tiny_worker, &other_worker]).await;
    assert_eq!(ask(&frontend, "tiny").await, StatusCode::OK);
    let chat = json!({ "model": "acme/other", "messages": [{ "role": "user", "content": "Once" }] });
    assert_eq!(post(frontend.address, "/v1/chat/completions", chat).await.status, StatusCode::OK);
    assert_eq!(tiny_worker.requests()[0].prompt, tiny().encode_prompt("Once").unwrap());
    assert_eq!(other_worker.requests()[0].prompt, tiny().encode_prompt("Once!").unwrap()[1..]);
    assert_eq!(ask(&frontend, "third").await, StatusCode::NOT_FOUND);
    let models = get(frontend.address, "/v1/models").await.json();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["acme/other", "tiny"]);
    assert_eq!(get(frontend.address, "/v1/models/acme/other").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_worker_with_another_tokenizer_under_the_same_name_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let model = tempfile::tempdir().unwrap();
    other_model(model.path());
    let right = MockWorker::start(folder.path(), "a", "tiny", say(" x"));
    let wrong = MockWorker::start_with(folder.path(), "b", "tiny", model.path(), say(" x"));
    let workers = vec![right.endpoint.clone(), wrong.endpoint.clone()];
    let frontend = Frontend::start(Config { workers, ..config() }).await;
    let differs =
        |worker: &Value| worker["reason"].as_str().is_some_and(|reason| reason.contains("tokenizer differs"));
    frontend.until_workers(|workers| workers.iter().any(differs)).await;
    for _ in 0..4 {
        assert_eq!(ask(&frontend, "tiny").await, StatusCode::OK);
    }
    // Which of the two came first decides.
    let asked = [right.requests().len(), wrong.requests().len()];
    assert!(asked == [4, 0] || asked == [0, 4], "{asked:?}");
}
