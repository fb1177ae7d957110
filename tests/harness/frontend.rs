//! A frontend before the daemons of some nodes.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::node::{Node, get, get_any, metric_in};
use crate::process::Process;
use crate::wait::eventually;

/// See the module.
#[derive(Debug)]
pub struct Frontend {
    /// The process.
    pub process: Process,
    address: String,
}

/// A streamed answer.
#[derive(Debug, Clone, Default)]
pub struct Streamed {
    /// All text.
    pub text: String,
    /// From the request to the first event.
    pub first: Duration,
    /// From each event with text to the next.
    pub gaps: Vec<Duration>,
    /// Why it ended; none if it broke off.
    pub finish: Option<String>,
    /// The error it ended with.
    pub error: Option<Value>,
    /// Header x-kvbm-route.
    pub route: String,
}

impl Frontend {
    /// Starts it; logs go to a file in `dir`.
    pub fn start(dir: &Path, nodes: &[&Node], arguments: &[&str]) -> Self {
        let mut all: Vec<String> =
            ["frontend", "--http-host", "127.0.0.1", "--http-port", "0"].map(String::from).into();
        for node in nodes {
            all.extend(["--daemon".to_owned(), format!("unix:{}", node.socket().display())]);
        }
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let mut process = Process::start(dir, "frontend", &all, &[]);
        let ready = process.wait_ready();
        let address = ready["address"].as_str().unwrap_or_default().to_owned();
        Self { process, address }
    }

    /// Where it serves this.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address)
    }

    /// Waits until so many workers take requests.
    pub fn until_ready(&self, workers: usize) {
        eventually("workers are ready", || {
            let health: Value = serde_json::from_str(&get_any(&self.url("/health")).1).ok()?;
            let ready = health["workers"].as_array()?.iter().filter(|worker| worker["state"] == "ready");
            (ready.count() == workers).then_some(())
        });
    }

    /// Sum of a metric over its labels, or over those lines that contain `label`.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        metric_in(&get(&self.url("/metrics")), name, label)
    }

    fn send(&self, path: &str, body: &Value) -> Result<ureq::http::Response<ureq::Body>, ureq::Error> {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let agent = ureq::Agent::new_with_config(config);
        let request = agent.post(self.url(path)).header("content-type", "application/json");
        request.send(body.to_string())
    }

    /// What is answered to a request that asks for a stream: header x-kvbm-route, and event by event.
    pub fn events(&self, path: &str, body: &Value) -> (String, impl Iterator<Item = Value> + use<>) {
        let response = self.send(path, body).unwrap();
        let route = response.headers().get("x-kvbm-route").map_or("", |value| value.to_str().unwrap());
        let route = route.to_owned();
        let lines = BufReader::new(response.into_body().into_reader()).lines().map_while(Result::ok);
        let event = |line: String| serde_json::from_str(line.strip_prefix("data: ").unwrap_or(&line)).ok();
        (route, lines.filter_map(event))
    }

    /// Status and body of a completion.
    pub fn complete(&self, body: &Value) -> (u16, Value) {
        let mut response = self.send("/v1/completions", body).unwrap();
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Tokens of a completion's prompt that were found in the worker's pool, and in all tiers, as the worker says.
    pub fn found(&self, body: &Value) -> (u64, u64) {
        let response = self.send("/v1/completions", body).unwrap();
        assert_eq!(response.status(), 200, "{response:?}");
        let header = response.headers()["x-kvbm-cached-tokens"].to_str().unwrap();
        let tiers = header.split(',').map(|tier| tier.split_once('=').unwrap());
        let tokens: Vec<(&str, u64)> = tiers.map(|(name, tokens)| (name, tokens.parse().unwrap())).collect();
        let device = tokens.iter().find(|(name, _)| *name == "device").unwrap().1;
        (device, tokens.iter().map(|(_, tokens)| tokens).sum())
    }

    /// A completion, event by event; `body` asks for a stream.
    pub fn stream(&self, body: &Value) -> Streamed {
        let started = Instant::now();
        let (route, events) = self.events("/v1/completions", body);
        let mut streamed = Streamed { route, ..Streamed::default() };
        let mut last = None;
        for event in events {
            if !event["error"].is_null() {
                streamed.error = Some(event["error"].clone());
                continue;
            }
            let choice = &event["choices"][0];
            if let Some(text) = choice["text"].as_str().filter(|text| !text.is_empty()) {
                let now = Instant::now();
                match last.replace(now) {
                    None => streamed.first = now - started,
                    Some(last) => streamed.gaps.push(now - last),
                }
                streamed.text.push_str(text);
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                streamed.finish = Some(reason.to_owned());
            }
        }
        streamed
    }
}
