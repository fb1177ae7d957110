//! `kvbm replay`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::conversation;

fn replay(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvbm")).arg("replay").args(arguments).output().unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let output = replay(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The one line on standard error, and no result.
fn refused(arguments: &[&str]) -> String {
    let output = replay(arguments);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{arguments:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn file(dir: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ratio_of(rows: &Value, policy: &str) -> f64 {
    let row = rows.as_array().unwrap().iter().find(|row| row["policy"] == policy);
    row.unwrap_or_else(|| panic!("no row {policy}"))["hit_ratio"].as_f64().unwrap()
}

/// Figures that an implementation in another language has for the same trace.
#[test]
fn the_conversation_trace_gives_the_known_hit_ratios() {
    let dir = tempfile::tempdir().unwrap();
    let trace = file(&dir, "conversation.jsonl", &conversation::mooncake());
    let sizes = [1_000, 5_000, 10_000, 20_000, 30_000, 50_000, 100_000];
    let lru = [0.0445, 0.1118, 0.2116, 0.2878, 0.3257, 0.3546, 0.3637];
    let list = sizes.map(|size: u32| size.to_string()).join(",");
    let rows = json(&["--trace", text(&trace), "--policy", "lru", "--curve", "--capacities", &list]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), sizes.len());
    for ((row, size), expected) in rows.iter().zip(sizes).zip(lru) {
        assert_eq!(row["capacities"]["host"], size);
        assert_eq!((&row["requests"], &row["block_refs"]), (&12_031.into(), &288_500.into()));
        let ratio = row["hit_ratio"].as_f64().unwrap();
        assert!((ratio - expected).abs() < 0.002, "{size} blocks: {ratio}, not {expected}");
    }
    let rows = json(&["--trace", text(&trace), "--policy", "all", "--host-blocks", "5000"]);
    for (policy, expected) in [
        ("reference-lru", 0.1118),
        ("reference-fifo", 0.1064),
        ("reference-lfu", 0.0924),
        ("reference-s3fifo", 0.1403),
        ("reference-arc", 0.1167),
        ("belady", 0.3393),
        ("infinite", 0.3664),
    ] {
        let ratio = ratio_of(&rows, policy);
        assert!((ratio - expected).abs() < 0.0005, "{policy}: {ratio}, not {expected}");
    }
    let closed = |policy: &str| {
        let row = rows.as_array().unwrap().iter().find(|row| row["policy"] == policy).unwrap();
        row["gap_closed"].as_f64().unwrap()
    };
    assert_eq!((closed("lru"), closed("belady")), (0.0, 1.0));
    assert!((0.10..0.15).contains(&closed("reference-s3fifo")));
}

/// Two nodes with two workers each, tiers that are small beside the trace, each of its blocks scaled to 16 tokens. How much
/// is gained over taking turns depends on the tiers: one and a half times is reached with some of these sizes only, so what is
/// demanded of all of them is less.
#[test]
fn routing_by_blocks_finds_far_more_than_taking_turns() {
    let dir = tempfile::tempdir().unwrap();
    let trace = file(&dir, "conversation.jsonl", &conversation::mooncake());
    let common = ["--trace", text(&trace), "--trace-tokens-per-block", "16"];
    let rows = |more: &[&str]| {
        let rows = json(&[&common[..], &["--router-mode", "round-robin,kv"], more].concat());
        let figure = |row: usize, name: &str| rows[row][name].as_f64().unwrap();
        let gain = |name| figure(1, name) / figure(0, name);
        assert!(figure(1, "most_over_mean") < 1.1, "{rows}");
        (gain("hit_blocks"), gain("device_hit_blocks"), gain("first_token_p50_ms"))
    };
    for host in ["1000", "3000", "5000", "7000"] {
        let (found, _, first_token) =
            rows(&["--device-blocks", "1000", "--host-blocks", host, "--prefill-rate", "625"]);
        assert!(found >= 1.45 && first_token < 1.0, "{host}: {found} {first_token}");
    }
    // One node without host memory: what is found is in the worker's own pool.
    let (_, device, first_token) =
        rows(&["--nodes", "1", "--device-blocks", "5000", "--prefill-rate", "1250"]);
    assert!(device >= 1.5 && first_token < 1.0, "{device} {first_token}");
}

#[test]
fn the_default_policy_is_at_or_above_the_best_known_on_the_conversation_trace() {
    let dir = tempfile::tempdir().unwrap();
    let trace = file(&dir, "conversation.jsonl", &conversation::mooncake());
    let sizes = [1_000, 5_000, 10_000, 20_000, 30_000, 50_000, 100_000];
    let list = sizes.map(|size: u32| size.to_string()).join(",");
    let all = ["--trace", text(&trace), "--policy", "all", "--curve", "--capacities", &list];
    for secret in ["1", "2", "3"] {
        let rows = json(&[&all[..], &["--secret", secret]].concat());
        for size in sizes {
            let of_size = rows.as_array().unwrap().iter().filter(|row| row["capacities"]["host"] == size);
            let of_size = Value::Array(of_size.cloned().collect());
            let [ours, lru] = ["gittins", "reference-lru"].map(|policy| ratio_of(&of_size, policy));
            for known in ["lru", "reference-fifo", "reference-lru", "reference-s3fifo", "reference-arc"] {
                let known_ratio = ratio_of(&of_size, known);
                assert!(ours >= known_ratio, "{size} blocks: {ours}, {known} {known_ratio}");
            }
            assert!(size > 5_000 || ours >= 1.5 * lru, "{size} blocks: {ours}, LRU {lru}");
        }
    }
}

/// Scripts read these: fields may be added.
#[test]
fn the_fields_of_a_row_are_those_documented() {
    let one = json(&["--workload", "chat", "--requests", "200", "--host-blocks", "500"]);
    let page = include_str!("../../../docs/replay.md");
    let fields = [
        "policy",
        "kind",
        "capacities",
        "requests",
        "block_refs",
        "hit_blocks",
        "hit_ratio",
        "tiers",
        "bytes_moved",
        "disk_writes",
        "write_amplification",
        "refs_per_second",
        "metadata_bytes_per_block",
    ];
    for field in fields {
        assert!(one.get(field).is_some(), "{field} is missing in {one}");
        assert!(page.contains(&format!("`{field}`")), "docs/replay.md does not explain {field}");
    }
    let known: Vec<&str> = one.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(known.len(), fields.len(), "{known:?}");
    for tier in ["device", "host", "disk"] {
        assert!(one["tiers"][tier].is_u64() && one["capacities"][tier].is_u64());
    }
    assert_eq!(one["tiers"]["host"], one["hit_blocks"]);
    assert!(one["refs_per_second"].as_f64().unwrap() > 0.0);
    assert!(one["metadata_bytes_per_block"].as_f64().unwrap() > 0.0);
    assert!(replay(&["--workload", "chat", "--requests", "200", "--host-blocks", "500"]).status.success());
}

#[test]
fn a_workload_that_was_written_is_the_one_that_is_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agents.jsonl");
    let workload = ["--workload", "agents", "--seed", "7", "--requests", "500"];
    let written = replay(&[&workload[..], &["--write-trace", text(&path)]].concat());
    assert!(written.status.success());
    let of = |source: &[&str]| {
        let mut row = json(&[source, &["--host-blocks", "2000"]].concat());
        row.as_object_mut().unwrap().remove("refs_per_second");
        row
    };
    let direct = of(&workload);
    assert_eq!(direct["requests"], 500);
    assert_eq!(of(&["--trace", text(&path)]), direct);
    assert_ne!(of(&["--workload", "agents", "--seed", "8", "--requests", "500"]), direct);
}

#[test]
fn a_curve_is_a_table_a_list_and_a_plot() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("curve.svg");
    let curve = ["--workload", "rag", "--requests", "300", "--curve", "--policy", "all"];
    let output = replay(&[&curve[..], &["--capacities", "2000,100", "--svg", text(&plot)]].concat());
    let table = String::from_utf8(output.stdout).unwrap();
    let first: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(first, ["policy", "100", "2000"]);
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains(">belady<") && svg.contains("rag, 300 requests"));
    let rows = json(&curve);
    let infinite: Vec<f64> = rows
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["policy"] == "lru")
        .map(|row| row["hit_ratio"].as_f64().unwrap())
        .collect();
    assert!(infinite.len() > 5 && infinite.is_sorted(), "more room finds more: {infinite:?}");
}

#[test]
fn repetitions_hit_unless_their_blocks_are_new() {
    let source = ["--workload", "scan", "--requests", "100", "--host-blocks", "100000", "--repeat", "3"];
    let same = json(&source);
    let fresh = json(&[&source[..], &["--fresh-ids"]].concat());
    let once = json(&["--workload", "scan", "--requests", "100", "--host-blocks", "100000"]);
    let hits = |row: &Value| row["hit_blocks"].as_u64().unwrap();
    let refs = |row: &Value| row["block_refs"].as_u64().unwrap();
    assert_eq!((refs(&same), refs(&fresh)), (3 * refs(&once), 3 * refs(&once)));
    assert_eq!((hits(&same), hits(&fresh)), (hits(&once) + 2 * refs(&once), 3 * hits(&once)));
}

#[test]
fn a_bad_trace_is_told_by_file_line_and_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    let good = "{\"timestamp\": 5, \"hash_ids\": [1, 2]}\n";
    let run = |path: &Path| refused(&["--trace", text(path), "--host-blocks", "10"]);
    let bad = file(&dir, "bad.jsonl", &format!("{good}\n{{\"timestamp\": 6, \"hash_ids\": [1, -2]}}\n"));
    let line = run(&bad);
    assert!(line.contains("bad.jsonl, line 3: expected a JSON object with \"timestamp\""), "{line}");
    let unsorted = file(&dir, "unsorted.jsonl", &format!("{good}{}", good.replace('5', "4")));
    assert!(run(&unsorted).contains("line 2: timestamp 4 is before"), "{}", run(&unsorted));
    assert!(run(&file(&dir, "empty.jsonl", "\n")).contains("is empty"));
    assert!(run(&dir.path().join("none.jsonl")).contains("cannot read trace"));
    let good = file(&dir, "good.jsonl", good);
    assert!(refused(&["--trace", text(&good)]).contains("--host-blocks"));
    let odd = ["--trace", text(&good), "--host-blocks", "9", "--tokens-per-block", "100"];
    assert!(refused(&odd).contains("does not divide the 512 tokens"));
    let unknown = ["--trace", text(&good), "--host-blocks", "9", "--policy", "best"];
    assert!(refused(&unknown).contains("permitted are all, lru"), "{}", refused(&unknown));
    let disk = refused(&["--trace", text(&good), "--device-blocks", "9", "--disk-blocks", "9"]);
    assert!(disk.contains("from host memory only"), "{disk}");
}
