//! Which worker a request goes to, and what is told of it.

use std::time::Duration;

use http::Method;
use kvbm_frontend::{RouterConfig, RouterMode};
use kvbm_hash::{BaseNamespace, SequenceHash, sequence_hashes};
use kvbm_proto::v1::{Event, EventKind, Tier};
use serde_json::{Value, json};

use crate::client::{Answer, post, send};
use crate::frontend::Frontend;
use crate::mock::{MockDaemon, MockWorker, Script, say, tokens};

/// Blocks of 32 tokens, as the mock workers say, and a token behind them.
fn prompt(first: u32, blocks: u32) -> Vec<u32> {
    (first..=first + 32 * blocks).map(|token| 100 + token % 3000).collect()
}

fn keys(prompt: &[u32], salt: Option<&str>) -> Vec<SequenceHash> {
    sequence_hashes(BaseNamespace([7; 32]).namespace(None, salt), 32, prompt)
}

fn events(first: u64, kind: EventKind, tier: Tier, pool_id: u32, keys: &[SequenceHash]) -> Vec<Event> {
    let event = |(at, key): (u64, &SequenceHash)| Event {
        sequence: at,
        kind: kind.into(),
        tier: tier.into(),
        pool_id,
        key: key.0.to_vec(),
        ..Event::default()
    };
    (first..).zip(keys).map(event).collect()
}

fn stored(first: u64, tier: Tier, pool_id: u32, keys: &[SequenceHash]) -> Vec<Event> {
    events(first, EventKind::Stored, tier, pool_id, keys)
}

/// Two workers of one daemon: `a` with pool 1, `b` with pool 2.
struct Pair {
    folder: tempfile::TempDir,
    a: MockWorker,
    b: MockWorker,
    daemon: MockDaemon,
}

impl Pair {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| MockWorker::start(folder.path(), name, "tiny", say(" x")));
        let entries = vec![a.entry_with_pool(1), b.entry_with_pool(2)];
        let daemon = MockDaemon::start(&folder.path().join("kvbm.sock"), entries);
        Self { folder, a, b, daemon }
    }

    async fn frontend(&self) -> Frontend {
        let frontend = Frontend::kv(self.folder.path().join("kvbm.sock"), 2).await;
        frontend.until_metric("dynamo_frontend_router_snapshots_total 1").await;
        frontend
    }

    /// Requests that each has had.
    fn served(&self) -> [usize; 2] {
        [self.a.requests().len(), self.b.requests().len()]
    }
}

async fn ask(frontend: &Frontend, prompt: &[u32]) -> Answer {
    post(frontend.address, "/v1/completions", json!({ "model": "tiny", "prompt": prompt })).await
}

async fn ask_with(frontend: &Frontend, headers: &[(&str, &str)], body: Value) -> Answer {
    send(frontend.address, Method::POST, "/v1/completions", headers, body.to_string()).await
}

#[tokio::test]
async fn a_prompt_goes_where_its_blocks_are_and_follows_them() {
    let pair = Pair::new();
    let prompt = prompt(0, 8);
    let keys = keys(&prompt, None);
    pair.daemon.blocks.set_snapshot(8, stored(0, Tier::Device, 2, &keys));
    let frontend = pair.frontend().await;
    for _ in 0..4 {
        let answer = ask(&frontend, &prompt).await;
        assert!(answer.header("x-kvbm-route").starts_with("worker=b; mode=kv; device=256; host=0; disk=0; "));
    }
    assert_eq!(pair.served(), [0, 4]);
    let moved = [
        events(9, EventKind::Removed, Tier::Device, 2, &keys),
        stored(9 + keys.len() as u64, Tier::Device, 1, &keys),
    ];
    pair.daemon.blocks.tell(moved.concat());
    frontend
        .until_metric(&format!("dynamo_frontend_router_events_total{{from=\"daemon\"}} {}", 2 * keys.len()))
        .await;
    ask(&frontend, &prompt).await;
    assert_eq!(pair.served(), [1, 4]);
    frontend
        .until_metric("dynamo_frontend_kv_selected_cached_prefix_tokens_total{tier=\"device\"} 1280")
        .await;
    // What the mock says that it found: 96 + 64 + 32 tokens, five times.
    frontend.until_metric("dynamo_frontend_kv_worker_reused_tokens_total 960").await;
}

#[tokio::test]
async fn missed_events_are_made_good_by_a_snapshot() {
    let pair = Pair::new();
    let prompt = prompt(0, 8);
    let keys = keys(&prompt, None);
    let frontend = pair.frontend().await;
    pair.daemon.blocks.set_snapshot(40, stored(0, Tier::Device, 1, &keys));
    pair.daemon.blocks.tell(stored(7, Tier::Device, 2, &keys));
    frontend.until_metric("dynamo_frontend_router_snapshots_total 2").await;
    frontend.until_metric("dynamo_frontend_router_event_gaps_total 1").await;
    assert!(
        ask(&frontend, &prompt).await.header("x-kvbm-route").starts_with("worker=a; mode=kv; device=256;")
    );
    // And a daemon that was started again begins anew.
    let Pair { folder, a, b, daemon } = pair;
    drop(daemon);
    let entries = vec![a.entry_with_pool(1), b.entry_with_pool(2)];
    let daemon = MockDaemon::start(&folder.path().join("kvbm.sock"), entries);
    daemon.blocks.set_snapshot(1, stored(0, Tier::Device, 2, &keys[..4]));
    frontend.until_metric("dynamo_frontend_router_index_blocks 4").await;
    assert!(
        ask(&frontend, &prompt).await.header("x-kvbm-route").starts_with("worker=b; mode=kv; device=128;")
    );
}

#[tokio::test]
async fn blocks_of_another_salt_tenant_or_adapter_draw_nobody() {
    let pair = Pair::new();
    let prompt = prompt(0, 8);
    pair.daemon.blocks.set_snapshot(8, stored(0, Tier::Device, 2, &keys(&prompt, Some("s"))));
    let frontend = pair.frontend().await;
    let overlap = async |headers: &[(&str, &str)], salt: &str, lora: Value| {
        let nvext = json!({ "lora": lora });
        let body = json!({ "model": "tiny", "prompt": prompt, "cache_salt": salt, "nvext": nvext });
        let answer = ask_with(&frontend, headers, body).await;
        let route = answer.header("x-kvbm-route").to_owned();
        route.split("device=").nth(1).unwrap().split(';').next().unwrap().to_owned()
    };
    assert_eq!(overlap(&[], "s", Value::Null).await, "256");
    assert_eq!(overlap(&[], "other", Value::Null).await, "0");
    assert_eq!(overlap(&[("x-kvbm-tenant", "t")], "s", Value::Null).await, "0");
    assert_eq!(overlap(&[], "s", json!("terse")).await, "0");
    let asked = [pair.a.requests(), pair.b.requests()].concat();
    assert_eq!(asked.iter().filter(|request| request.lora == "terse").count(), 1, "the worker is told which");
}

#[tokio::test]
async fn blocks_on_disk_are_announced_before_the_request() {
    let pair = Pair::new();
    let prompt = prompt(0, 8);
    let keys = keys(&prompt, None);
    let snapshot = [stored(0, Tier::Host, 0, &keys[..2]), stored(0, Tier::Disk, 0, &keys[..6])];
    pair.daemon.blocks.set_snapshot(8, snapshot.concat());
    let frontend = pair.frontend().await;
    assert!(ask(&frontend, &prompt).await.header("x-kvbm-route").contains("; device=0; host=64; disk=128; "));
    let asked = pair.daemon.blocks.prefetched();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].keys, kvbm_proto::pack_keys(keys.iter().map(|key| &key.0)));
    assert_eq!(asked[0].namespace_digest, BaseNamespace([7; 32]).namespace(None, None).0);
    frontend.until_metric("dynamo_frontend_router_prefetches_total{outcome=\"taken\"} 1").await;
}

#[tokio::test]
async fn without_events_prompts_go_where_they_went_before() {
    let folder = tempfile::tempdir().unwrap();
    let workers = ["a", "b"].map(|name| MockWorker::start(folder.path(), name, "tiny", say(" x")));
    let router = RouterConfig { mode: RouterMode::Kv, ..RouterConfig::default() };
    let frontend = Frontend::routed(&[&workers[0], &workers[1]], router).await;
    for first in 0..6 {
        for _ in 0..3 {
            ask(&frontend, &prompt(first * 400, 8)).await;
        }
    }
    for worker in &workers {
        let requests = worker.requests();
        for request in &requests {
            let alike = requests.iter().filter(|other| other.prompt == request.prompt).count();
            assert_eq!(alike, 3, "each prompt stays with one worker");
        }
    }
}

#[tokio::test]
async fn a_busy_worker_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    for mode in [RouterMode::LeastLoaded, RouterMode::PowerOfTwo, RouterMode::Kv] {
        let hang = Script::Hang(tokens(" x"));
        let workers = ["a", "b"].map(|name| MockWorker::start(folder.path(), name, "tiny", hang.clone()));
        let router = RouterConfig { mode, ..RouterConfig::default() };
        let frontend = Frontend::routed(&[&workers[0], &workers[1]], router).await;
        let mut open = Vec::new();
        for number in 0..6 {
            let body = json!({ "model": "tiny", "prompt": prompt(number * 400, 2), "stream": true, "max_tokens": 50 });
            let mut answer = crate::client::Open::post(frontend.address, "/v1/completions", body).await;
            answer.next().await.unwrap();
            open.push(answer);
        }
        assert_eq!(workers.each_ref().map(|worker| worker.requests().len()), [3, 3], "{mode:?}");
    }
}

#[tokio::test]
async fn by_chance_each_has_a_share() {
    let folder = tempfile::tempdir().unwrap();
    let workers = ["a", "b"].map(|name| MockWorker::start(folder.path(), name, "tiny", say(" x")));
    let router = RouterConfig { mode: RouterMode::Random, ..RouterConfig::default() };
    let frontend = Frontend::routed(&[&workers[0], &workers[1]], router).await;
    for number in 0..64 {
        ask(&frontend, &prompt(number * 40, 1)).await;
    }
    // Fewer come once in many millions of times.
    assert!(workers.iter().all(|worker| worker.requests().len() >= 10));
}

#[tokio::test]
async fn sessions_stay_and_named_workers_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let workers = ["a", "b"].map(|name| MockWorker::start(folder.path(), name, "tiny", say(" x")));
    let served = || workers.each_ref().map(|worker| worker.requests().len());
    let of = async |router| Frontend::routed(&[&workers[0], &workers[1]], router).await;
    let body = || json!({ "model": "tiny", "prompt": "Once" });

    let affinity = Some(Duration::from_secs(60));
    let frontend = of(RouterConfig { affinity, ..RouterConfig::default() }).await;
    for _ in 0..4 {
        ask_with(&frontend, &[("x-kvbm-session", "s")], body()).await;
    }
    assert!(served() == [4, 0] || served() == [0, 4], "{:?}", served());

    let direct = of(RouterConfig { mode: RouterMode::Direct, ..RouterConfig::default() }).await;
    let before = served();
    for _ in 0..3 {
        assert_eq!(ask_with(&direct, &[("x-kvbm-worker", "b")], body()).await.status, 200);
    }
    assert_eq!(served(), [before[0], before[1] + 3]);
    let answer = ask_with(&direct, &[], body()).await;
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("x-kvbm-worker"), "{}", answer.text());
    assert!(!answer.headers.contains_key("x-kvbm-route"));
}
