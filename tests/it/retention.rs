//! What users say about keeping, from HTTP to what is found later.

use std::path::Path;
use std::time::{Duration, Instant};

use kvbm_hash::Retention;
use kvbm_tests::{DaemonOptions, KeyedEngine, KeyedModel, Node, Process, Random, WorkerOptions, eventually};
use serde_json::{Value, json};

/// Prompts of four blocks of 32 tokens, of which a repetition finds three.
pub const PROMPT_TOKENS: usize = 128;
pub const FOUND_TOKENS: u64 = 96;

/// A worker behind a frontend of its own.
pub struct Served {
    url: String,
    _worker: Process,
    _frontend: Process,
}

impl Served {
    pub fn start(node: &Node, name: &str, options: &WorkerOptions) -> Self {
        let (worker, _) = node.worker(name, options);
        let endpoint = format!("unix:{}", node.dir.path().join(format!("{name}.sock")).display());
        let arguments = ["frontend", "--http-host", "127.0.0.1", "--http-port", "0", "--worker", &endpoint];
        let arguments = arguments.map(String::from);
        let mut frontend = Process::start(node.dir.path(), &format!("{name}-frontend"), &arguments, &[]);
        let url = format!("{}/v1/completions", frontend.wait_ready()["address"].as_str().unwrap());
        Self { url, _worker: worker, _frontend: frontend }
    }

    /// Status and answer.
    fn post(&self, headers: &[(&str, &str)], body: &Value) -> (u16, String, Value) {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let mut request =
            ureq::Agent::new_with_config(config).post(&self.url).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = request.send(body.to_string()).unwrap();
        let cached = response.headers().get("x-kvbm-cached-tokens");
        let cached = cached.map_or("", |value| value.to_str().unwrap()).to_owned();
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().unwrap();
        (status, cached, serde_json::from_str(&text).unwrap())
    }

    /// Tokens of a prompt that were found: device, host, disk.
    pub fn ask(&self, prompt: &[u32], more: &Value) -> [u64; 3] {
        self.ask_as(&[], prompt, more)
    }

    pub fn ask_as(&self, headers: &[(&str, &str)], prompt: &[u32], more: &Value) -> [u64; 3] {
        let mut body = json!({ "model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, cached, answer) = self.post(headers, &body);
        assert_eq!(status, 200, "{answer}");
        let mut parts = cached.split(',').map(|part| part.split('=').nth(1).unwrap().parse().unwrap());
        [(); 3].map(|()| parts.next().unwrap())
    }

    /// So many prompts that nobody asks for again.
    fn flood(&self, random: &mut Random, prompts: usize) {
        for _ in 0..prompts {
            self.ask(&random.tokens(PROMPT_TOKENS), &json!({}));
        }
    }
}

fn kept(priority: u8, duration_ms: u64) -> Value {
    json!({ "nvext": { "kv_cache_retention_config": { "priority": priority, "duration_ms": duration_ms } } })
}

pub fn small() -> WorkerOptions {
    WorkerOptions { pool_blocks: 24, ..WorkerOptions::default() }
}

/// Prompts that nobody asks for again until so many more of their blocks have reached a tier, which may lag behind.
fn flood_tier(node: &Node, served: &Served, random: &mut Random, arrivals: &str, blocks: f64) {
    let before = node.metric(arrivals, "");
    eventually("the flood has reached the tier", || {
        served.flood(random, 10);
        (node.metric(arrivals, "") >= before + blocks).then_some(())
    });
}

/// Until what was kept for so long is kept no longer, then so many prompts more.
fn flood_beyond(served: &Served, random: &mut Random, kept: Duration, prompts: usize) {
    let begin = Instant::now();
    while begin.elapsed() <= kept {
        served.flood(random, 1);
    }
    served.flood(random, prompts);
}

#[test]
fn a_worker_without_a_daemon_keeps_what_is_dear_until_its_time_is_over() {
    let node = Node::empty();
    let served = Served::start(&node, "alone", &WorkerOptions { alone: true, ..small() });
    let mut random = Random::new(31);
    let (dear, plain) = (random.tokens(PROMPT_TOKENS), random.tokens(PROMPT_TOKENS));
    served.ask(&dear, &kept(90, 600_000));
    served.ask(&plain, &json!({}));
    served.flood(&mut random, 12);
    assert_eq!(served.ask(&plain, &json!({})), [0; 3]);
    // From now on for a moment only.
    assert_eq!(served.ask(&dear, &kept(90, 300)), [FOUND_TOKENS, 0, 0]);
    flood_beyond(&served, &mut random, Duration::from_millis(300), 12);
    assert_eq!(served.ask(&dear, &json!({})), [0; 3]);
}

/// Which of two blocks of equal right goes first is not asked here.
const POLICY: [&str; 2] = ["--eviction-policy", "lru"];

/// 80 blocks of host memory; another worker with an empty pool says what is in it.
#[test]
fn a_dear_prompt_survives_a_flood_in_host_until_its_time_is_over() {
    let node = Node::start(DaemonOptions { host_mb: 8.0, ..DaemonOptions::default() }.and(&POLICY));
    let served = Served::start(&node, "a", &small());
    let mut random = Random::new(32);
    let (dear, plain) = (random.tokens(PROMPT_TOKENS), random.tokens(PROMPT_TOKENS));
    served.ask(&dear, &kept(90, 600_000));
    served.ask(&plain, &json!({}));
    node.assert_offloaded(8);
    let flood = |random: &mut Random| flood_tier(&node, &served, random, "kvbm_offload_blocks_d2h", 240.0);
    flood(&mut random);
    let second = Served::start(&node, "b", &small());
    assert_eq!(second.ask(&plain, &json!({})), [0; 3]);
    assert_eq!(second.ask(&dear, &kept(90, 1000)), [0, FOUND_TOKENS, 0]);
    std::thread::sleep(Duration::from_secs(1));
    flood(&mut random);
    let third = Served::start(&node, "c", &small());
    assert_eq!(third.ask(&dear, &json!({})), [0; 3]);
}

/// As in host memory, but that is lost before anybody looks.
#[test]
fn a_dear_prompt_survives_a_flood_on_disk_until_its_time_is_over() {
    for (duration_ms, survives) in [(600_000, true), (1000, false)] {
        let mut node = Node::start(DaemonOptions::with_disk(8.0, 16.0).and(&POLICY));
        let mut random = Random::new(33);
        let (dear, plain) = (random.tokens(PROMPT_TOKENS), random.tokens(PROMPT_TOKENS));
        {
            let served = Served::start(&node, "a", &small());
            served.ask(&dear, &kept(90, duration_ms));
            served.ask(&plain, &json!({}));
            std::thread::sleep(Duration::from_secs(1));
            flood_tier(&node, &served, &mut random, "kvbm_offload_blocks_h2d", 480.0);
        }
        node.kill_daemon();
        node.start_daemon();
        let second = Served::start(&node, "b", &small());
        assert_eq!(second.ask(&plain, &json!({})), [0; 3]);
        assert_eq!(second.ask(&dear, &json!({})), [0, 0, if survives { FOUND_TOKENS } else { 0 }]);
    }
}

/// Scenarios of TensorRT-LLM's tests of its block manager, through a daemon that evicts as it does: pools of four and of
/// eight blocks; a chain is named by its first token.
#[tokio::test]
async fn an_engines_pool_is_kept_as_tensorrt_llm_keeps_it() {
    let options = DaemonOptions { host_mb: 0.0, ..DaemonOptions::default() };
    let node = Node::start(options.and(&POLICY));
    let keep = |priority, ms: Option<u64>| Retention { priority, duration: ms.map(Duration::from_millis) };
    let default = Retention::default();
    let engine = |number, pool_blocks| {
        let model = KeyedModel { number, tokens_per_block: 4, block_bytes: 4096, pool_blocks };
        let socket = node.socket();
        let chain = move |name: u32, blocks: u32| {
            model.chain("", &(0..blocks * 4).map(|i| name * 1000 + i).collect::<Vec<_>>())
        };
        async move { (KeyedEngine::attach(&socket, model, &[""]).await.unwrap(), chain) }
    };
    // By block.
    let (pool, chain) = engine(1, 4).await;
    pool.serve_kept(&chain(1, 2), &[keep(90, None), keep(10, None)]).await.unwrap();
    pool.serve_kept(&chain(2, 2), &[]).await.unwrap();
    pool.serve_kept(&chain(3, 2), &[keep(20, None); 2]).await.unwrap();
    assert_eq!(pool.serve_kept(&chain(2, 2), &[]).await.unwrap(), 1);
    assert_eq!(pool.serve_kept(&chain(1, 2), &[]).await.unwrap(), 1, "its block of priority 90 survived");
    assert_eq!(pool.serve_kept(&chain(3, 2), &[]).await.unwrap(), 0);
    // What was generated.
    let (pool, chain) = engine(2, 8).await;
    let (low, high) = (keep(5, None), keep(90, None));
    pool.serve_kept(&chain(1, 4), &[low, low, low, high]).await.unwrap();
    pool.serve_kept(&chain(2, 4), &[high, high, high, low]).await.unwrap();
    pool.serve_kept(&chain(3, 3), &[]).await.unwrap();
    assert_eq!(pool.serve_kept(&chain(1, 3), &[]).await.unwrap(), 2);
    // A high priority that is over goes before a lower one that is not.
    let (pool, chain) = engine(3, 8).await;
    pool.serve_kept(&chain(1, 4), &[keep(80, Some(10)); 4]).await.unwrap();
    pool.serve_kept(&chain(2, 4), &[keep(50, None); 4]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    pool.serve_kept(&chain(3, 4), &[]).await.unwrap();
    assert_eq!(pool.serve_kept(&chain(2, 4), &[]).await.unwrap(), 4);
    // So does what was generated.
    let (pool, chain) = engine(4, 8).await;
    pool.serve_kept(&chain(1, 4), &[keep(50, None); 4]).await.unwrap();
    pool.serve_kept(&chain(2, 4), &[default, default, default, keep(100, Some(20))]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    pool.serve_kept(&chain(3, 2), &[]).await.unwrap();
    assert_eq!(pool.serve_kept(&chain(2, 3), &[]).await.unwrap(), 2);
}

#[test]
fn requests_override_flags_and_flags_override_the_file() {
    let node = Node::empty();
    let file = node.dir.path().join("model.yaml");
    std::fs::write(&file, "kv_cache_retention_config:\n  priority: 10\n  duration_ms: 600000\n").unwrap();
    let mut random = Random::new(34);
    let low = json!({ "kv_cache_retention_config": { "priority": 20 } });
    let (default, flag) = (vec![], vec!["--local-kv-retention-priority".to_owned(), "60".to_owned()]);
    for (name, arguments, survives) in [("file", default, false), ("flag", flag, true)] {
        let config = ["--config".to_owned(), file.display().to_string()];
        let arguments = config.into_iter().chain(arguments).collect();
        let served = Served::start(&node, name, &WorkerOptions { alone: true, arguments, ..small() });
        let prompt = random.tokens(PROMPT_TOKENS);
        served.ask(&prompt, &json!({}));
        for _ in 0..12 {
            served.ask(&random.tokens(PROMPT_TOKENS), &low);
        }
        let found = served.ask(&prompt, &json!({}));
        assert_eq!(found, [if survives { FOUND_TOKENS } else { 0 }, 0, 0], "{name}");
    }
}

#[test]
fn the_daemon_offloads_a_prompt_up_to_its_first_block_below_the_least_priority() {
    let options = DaemonOptions::default().and(&["--host-offload-prefix-min-priority", "50"]);
    let node = Node::start(options);
    let first = Served::start(&node, "a", &small());
    let mut random = Random::new(35);
    let (dear, plain) = (random.tokens(PROMPT_TOKENS), random.tokens(PROMPT_TOKENS));
    let ranges = json!([
        { "token_start": 0, "token_end": 64, "priority": 50 },
        { "token_start": 64, "token_end": 96, "priority": 49 },
        { "token_start": 96, "token_end": null, "priority": 100 },
    ]);
    let config = json!({ "kv_cache_retention_config": { "token_range_retention_configs": ranges } });
    first.ask(&plain, &json!({}));
    first.ask(&dear, &config);
    node.assert_offloaded(2);
    node.assert_idle();
    let second = Served::start(&node, "b", &small());
    assert_eq!(second.ask(&dear, &json!({})), [0, 64, 0]);
    assert_eq!(second.ask(&plain, &json!({})), [0; 3]);
    assert_eq!(node.metric("kvbm_tier_resident_blocks", "host"), 2.0);
}

#[test]
fn tenants_have_their_blocks_for_themselves_and_the_daemon_knows_whose_they_are() {
    let node = Node::start(DaemonOptions::default());
    let served = Served::start(&node, "a", &small());
    let prompt = Random::new(36).tokens(PROMPT_TOKENS);
    let (acme, other) = ([("x-kvbm-tenant", "acme")], json!({ "nvext": { "tenant": "other" } }));
    assert_eq!(served.ask_as(&acme, &prompt, &json!({})), [0; 3]);
    assert_eq!(served.ask(&prompt, &other), [0; 3]);
    assert_eq!(served.ask(&prompt, &json!({})), [0; 3]);
    assert_eq!(served.ask_as(&acme, &prompt, &json!({})), [FOUND_TOKENS, 0, 0]);
    let mut tenants: Vec<String> = node.status().namespaces.into_iter().map(|of| of.tenant).collect();
    tenants.sort();
    assert_eq!(tenants, ["", "acme", "other"]);
}

#[test]
fn what_cannot_be_is_400_with_the_field_or_one_line_and_code_2() {
    let node = Node::empty();
    let served = Served::start(&node, "alone", &WorkerOptions { alone: true, ..small() });
    let chat = served.url.replace("/v1/completions", "/v1/chat/completions");
    let range = json!({ "token_start": 0, "priority": 101 });
    let config = json!({ "token_range_retention_configs": [range] });
    let field = "kv_cache_retention_config.token_range_retention_configs[0].priority";
    let nvext = format!("nvext.{field}");
    for (place, param) in [
        (json!({ "kv_cache_retention_config": config }), field),
        (json!({ "nvext": { "kv_cache_retention_config": config } }), nvext.as_str()),
    ] {
        let messages = json!([{ "role": "user", "content": "hello" }]);
        for (url, more) in
            [(&served.url, json!({ "prompt": "hello" })), (&chat, json!({ "messages": messages }))]
        {
            let mut body = json!({ "model": "tiny" });
            body.as_object_mut().unwrap().extend(place.as_object().unwrap().clone());
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let agent = ureq::Agent::config_builder().http_status_as_error(false).build();
            let request = ureq::Agent::new_with_config(agent).post(url);
            let mut response =
                request.header("content-type", "application/json").send(body.to_string()).unwrap();
            let text = response.body_mut().read_to_string().unwrap();
            assert_eq!(response.status().as_u16(), 400, "{text}");
            let error: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(error["error"]["param"], param);
            assert_eq!(error["error"]["type"], "invalid_request_error");
        }
    }
    refuses(node.dir.path());
}

fn refuses(dir: &Path) {
    let file = dir.join("wrong.yaml");
    std::fs::write(&file, "kv_cache_retention_config: {priority: 101}\n").unwrap();
    let file = file.display().to_string();
    let model = kvbm_tests::tiny_model().display().to_string();
    let cases: [(&[&str], &[(&str, &str)], &[&str]); 6] = [
        (
            &["worker", "--model", &model, "--local-kv-retention-priority", "101"],
            &[],
            &["--local-kv-retention-priority", "101", "0 to 100"],
        ),
        (
            &["worker", "--model", &model],
            &[("KVBM_LOCAL_KV_RETENTION_DURATION", "-1")],
            &["--local-kv-retention-duration", "-1", "0 to 3155760000000"],
        ),
        (
            &["worker", "--model", &model, "--config", &file],
            &[],
            &["kv_cache_retention_config.priority", "101", "0 to 100"],
        ),
        (
            &["up", "--model", &model, "--local-kv-retention-priority", "-1"],
            &[],
            &["--local-kv-retention-priority", "-1", "0 to 100"],
        ),
        (
            &["up", "--model", &model, "--worker-config", &file],
            &[],
            &["kv_cache_retention_config.priority", "101", "0 to 100"],
        ),
        (
            &["daemon"],
            &[("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", "101")],
            &["DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", "101", "100"],
        ),
    ];
    for (arguments, environment, expected) in cases {
        let mut command = std::process::Command::new(kvbm_tests::program());
        let command = command.args(arguments).env("KVBM_STATE_DIR", dir.join("state"));
        let output = command.envs(environment.iter().copied()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{arguments:?}: {error}");
        assert!(expected.iter().all(|part| error.contains(part)), "{arguments:?}: {error}");
    }
}
