//! `kvbm pin`, from the command line to what is found after a flood.

use std::process::Command;

use kvbm_tests::{DaemonOptions, Node, Random, program, tiny_model};
use serde_json::{Value, json};

use super::retention::{FOUND_TOKENS, PROMPT_TOKENS, Served, small};

#[test]
fn a_prompt_that_an_operator_pins_survives_a_flood_until_it_is_unpinned() {
    let node = Node::start(DaemonOptions { host_mb: 8.0, ..DaemonOptions::default() });
    let served = Served::start(&node, "a", &small());
    let mut random = Random::new(43);
    let prompts = [(); 3].map(|()| random.tokens(PROMPT_TOKENS));
    let tenant = [("x-kvbm-tenant", "acme")];
    for prompt in &prompts {
        served.ask_as(&tenant, prompt, &json!({}));
    }
    node.assert_offloaded(12);
    let tokens = node.dir.path().join("tokens.json");
    std::fs::write(&tokens, json!(prompts[0]).to_string()).unwrap();
    let kvbm = |arguments: &[&str]| {
        let output =
            Command::new(program()).args(arguments).arg("--socket").arg(node.socket()).output().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (model, tokens) = (tiny_model().display().to_string(), tokens.display().to_string());
    let pin = ["pin", "--json", "--model", &model, "--served-model-name", "tiny", "--tokens-file", &tokens];
    let (ok, said) = kvbm(&pin);
    assert!(!ok && said.lines().count() == 1, "nobody without a tenant asked for it: {said}");
    let (ok, said) = kvbm(&[&pin[..], &["--tenant", "acme"]].concat());
    assert!(ok, "{said}");
    let pinned: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(pinned["blocks"]["host"], 4);
    for _ in 0..60 {
        served.ask(&random.tokens(PROMPT_TOKENS), &json!({ "nvext": { "tenant": "acme" } }));
    }
    node.assert_idle();
    let second = Served::start(&node, "b", &small());
    assert_eq!(second.ask_as(&tenant, &prompts[0], &json!({})), [0, FOUND_TOKENS, 0]);
    assert_eq!(second.ask_as(&tenant, &prompts[1], &json!({})), [0; 3]);
    let (ok, said) = kvbm(&["unpin", &pinned["id"].to_string()]);
    assert!(ok, "{said}");
    assert_eq!(node.status().pins.len(), 0);
}
