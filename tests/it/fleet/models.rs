//! Another OpenAI server that is listed and taken off with `kvbm models` while a frontend serves.

use std::process::{Command, Output};

use kvbm_tests::{DaemonOptions, Frontend, Node, eventually, get_any, program};
use serde_json::{Value, json};

use super::worker;

const POOL: usize = 128;

#[test]
fn a_server_that_is_added_is_served_until_it_is_removed() {
    let node = Node::start(DaemonOptions { host_mb: 64.0, arguments: vec![] });
    let _worker = worker(&node, 0, POOL, 16, &[]);
    // It knows nothing of who is before it, as any server of this kind.
    let other = Frontend::start(node.dir.path(), &[&node], &[]);
    other.until_ready(1);
    let folder = tempfile::tempdir().unwrap();
    let place = format!("file:{}", folder.path().join("fleet.json").display());
    let models = |arguments: &[&str]| -> Output {
        Command::new(program()).arg("models").args(arguments).args(["--discovery", &place]).output().unwrap()
    };
    let url = other.url("");
    let added = models(&["add", &url]);
    assert!(added.status.success(), "{added:?}");
    let listed: Value = serde_json::from_slice(&models(&["list"]).stdout).unwrap();
    assert_eq!(listed["upstreams"], json!([url]));

    let frontend =
        Frontend::start(folder.path(), &[], &["--discovery", &place, "--worker-wait-seconds", "1"]);
    let upstreams = || {
        let health: Value = serde_json::from_str(&get_any(&frontend.url("/health")).1).unwrap();
        health["upstreams"].as_array().unwrap().iter().filter(|one| one["state"] == "ready").count()
    };
    eventually("the server is ready", || (upstreams() == 1).then_some(()));
    let body = json!({ "model": "tiny", "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0 });
    let text = |frontend: &Frontend| {
        let (status, answer) = frontend.complete(&body);
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(text(&frontend), text(&other));

    assert!(models(&["remove", &url]).status.success());
    assert!(String::from_utf8_lossy(&models(&["remove", &url]).stderr).contains("is not listed"));
    eventually("its models are gone", || (frontend.complete(&body).0 == 503).then_some(()));
    assert_eq!(text(&other), text(&other));
}
