//! Answers of every kind go over to another worker: several choices, answers that are held to a form, scores, penalties,
//! calls of tools. No token, no score and no reason changes.

use kvbm_tests::{DaemonOptions, Frontend, Node, Process, Random};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::whole::{Request, hear};
use super::worker;

const POOL: usize = 512;
const BLOCK: usize = 16;
/// Events of an answer after which its worker is taken away.
const HEARD: usize = 20;

fn numbers() -> Value {
    json!({ "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 999 }, "minItems": 200, "maxItems": 200 })
}

/// Each of them long enough to be disturbed.
fn requests() -> Vec<(&'static str, Request)> {
    let prompt = Random::new(17).tokens(90);
    let record = json!({
        "type": "object", "properties": { "numbers": numbers() }, "required": ["numbers"],
        "additionalProperties": false,
    });
    let tool = json!({ "type": "function", "function": { "name": "note", "parameters": record } });
    let long = |more: Value| {
        let mut all = json!({ "max_tokens": 700, "ignore_eos": true });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Request::completion(&prompt, all)
    };
    vec![
        ("greedy, scored", long(json!({ "temperature": 0, "logprobs": 3 }))),
        ("three choices by chance", long(json!({ "n": 3, "temperature": 0.9, "seed": 5, "logprobs": 1 }))),
        (
            "penalties, bias, filters and a stop string",
            long(json!({
                "temperature": 0.8, "seed": 9, "top_p": 0.95, "top_k": 60, "min_p": 0.001, "logprobs": 4,
                "repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.3,
                "logit_bias": { "100": 2.0, "200": -3.0 }, "min_tokens": 300, "stop": ["zq"],
            })),
        ),
        (
            "two choices of a schema",
            Request::chat(
                "Some numbers, please.",
                json!({
                    "n": 2, "max_tokens": 1500, "temperature": 0.8, "seed": 3, "logprobs": true, "top_logprobs": 2,
                    "response_format": {
                        "type": "json_schema", "json_schema": { "name": "record", "schema": record },
                    },
                }),
            ),
        ),
        (
            "a call of a tool",
            Request::chat(
                "Write some numbers down.",
                json!({
                    "max_tokens": 1500, "temperature": 0.7, "seed": 4, "tools": [tool],
                    "tool_choice": { "type": "function", "function": { "name": "note" } },
                }),
            ),
        ),
        (
            "a regular expression",
            long(json!({ "guided_regex": "([a-f]{3}[0-9]{3} ){150}end", "temperature": 1.0, "seed": 8 })),
        ),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Kill,
    Drain,
}

/// The worker that a route names: its process is part of the name.
fn of_route(workers: &[Process], route: &str) -> usize {
    let is_named = |worker: &Process| route.starts_with(&format!("worker=worker-{}-", worker.pid()));
    workers.iter().position(is_named).unwrap_or_else(|| panic!("{route:?} names no worker"))
}

fn start(node: &Node, number: usize) -> Process {
    // Draining ends before its answers do.
    worker(node, number, POOL, BLOCK, &["--drain-seconds", "0.1"])
}

#[test]
fn answers_of_every_kind_go_over_to_another_worker_unchanged() {
    let node = Node::start(DaemonOptions::default());
    let mut workers: Vec<Process> = (0..2).map(|number| start(&node, number)).collect();
    let frontend = Frontend::start(node.dir.path(), &[&node], &["--router-mode", "kv", "--debug-headers"]);
    frontend.until_ready(2);
    let moved = || frontend.metric("dynamo_frontend_model_migration_total", "ongoing_request");
    for (kind, request) in requests() {
        let expected = hear(&frontend, &request, |_, _| ()).whole;
        for (blow, signal) in [(Blow::Kill, Signal::KILL), (Blow::Drain, Signal::TERM)] {
            let before = moved();
            let mut struck = None;
            let heard = hear(&frontend, &request, |route, events| {
                if events == HEARD {
                    let number = of_route(&workers, route);
                    workers[number].signal(signal);
                    struck = Some(number);
                }
            });
            assert_eq!(heard.whole, expected, "{kind}, {blow:?}");
            assert!(moved() > before, "{kind}, {blow:?}: nothing was moved");
            let number = struck.unwrap();
            workers[number].kill();
            workers[number] = start(&node, number);
            frontend.until_ready(2);
        }
    }
    node.assert_idle();
}
