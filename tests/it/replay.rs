//! What a daemon recorded, replayed: the same blocks are found.

use std::process::Command;

use kvbm_tests::{DaemonOptions, KeyedChain, KeyedEngine, KeyedModel, Node, Random, program};
use serde_json::Value;

const MODEL: KeyedModel = KeyedModel { number: 3, tokens_per_block: 16, block_bytes: 4096, pool_blocks: 48 };
const HOST_BLOCKS: usize = 256;
const REQUESTS: usize = 150;

/// Conversations that go on by turns, more of them than there is room for.
fn requests() -> Vec<KeyedChain> {
    let mut random = Random::new(17);
    let mut talks: Vec<Vec<u32>> = (0..24).map(|_| random.tokens(16 * 8)).collect();
    let mut next = || {
        let talk = random.below(24) as usize;
        if talks[talk].len() > 16 * 32 {
            talks[talk] = random.tokens(16 * 8);
        }
        let more = random.tokens(16 * 3);
        talks[talk].extend(more);
        MODEL.chain("one", &talks[talk])
    };
    (0..REQUESTS).map(|_| next()).collect()
}

fn replay(trace: &str) -> Value {
    let host = HOST_BLOCKS.to_string();
    let pool = MODEL.pool_blocks.to_string();
    let sizes = ["--host-blocks", &host, "--device-blocks", &pool, "--policy", "lru", "--json"];
    let output = Command::new(program()).args(["replay", "--trace", trace]).args(sizes).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_recorded_workload_finds_as_much_when_it_is_replayed() {
    let mut node = Node::empty();
    let path = node.dir.path().join("trace");
    let blocks = HOST_BLOCKS.to_string();
    node.configure(DaemonOptions { host_mb: 1.0, arguments: vec![] }.and(&[
        "--eviction-policy",
        "lru",
        "--record",
        path.to_str().unwrap(),
        "--cpu-cache-blocks",
        &blocks,
    ]));
    node.start_daemon();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let engine = KeyedEngine::attach(&node.socket(), MODEL, &["one"]).await.unwrap();
        for chain in requests() {
            engine.serve(&chain).await.unwrap();
        }
        engine.detach().await.unwrap();
    });
    assert_eq!(node.metric("kvbm_record_dropped_total", ""), 0.0);
    node.daemon().terminate();
    let text = std::fs::read_to_string(&path).unwrap();
    let mut recorded = [0; 3];
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        for (tier, hits) in recorded.iter_mut().enumerate() {
            *hits += line["match"]["hits"][tier].as_u64().unwrap_or(0);
        }
    }
    assert!(recorded[0] > 0 && recorded[1] > 100 && recorded[2] == 0, "{recorded:?}");
    let row = replay(path.to_str().unwrap());
    assert_eq!(row["requests"], REQUESTS);
    let (found, replayed) = (recorded[0] + recorded[1], row["hit_blocks"].as_u64().unwrap());
    // A daemon that was busy copying may have had a block a little later or earlier.
    assert!(replayed.abs_diff(found) * 50 <= found, "{replayed} when replayed, {found} recorded: {row}");
}
