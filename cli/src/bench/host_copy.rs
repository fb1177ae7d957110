//! How fast blocks move between an engine's pool and host memory, the daemon copying, against memcpy.

use std::time::Instant;

use kvbm_connector::{Client, Committed};
use kvbm_hash::{SequenceHash, sequence_hashes};
use kvbm_proto::v1::BlockRef;
use kvbm_shm::SharedMemory;

use super::Row;
use super::daemon::{BenchDaemon, BenchEngine};

const SIZES: [(&str, usize); 3] = [("64KiB", 64 << 10), ("1MiB", 1 << 20), ("4MiB", 4 << 20)];
/// Data copied each time, in last-level caches.
const CACHES: usize = 4;
const DATA_MIN: usize = 512 << 20;
const ROUNDS: usize = 7;
/// Blocks in one commit: an engine commits as it computes.
const COMMIT_BLOCKS: usize = 256;
/// Share of memcpy that the project demands.
const LIMIT: f64 = 0.9;

pub(super) fn measure() -> Result<Vec<Row>, String> {
    let cache = last_level_cache_bytes().unwrap_or(32 << 20);
    let data = (cache * CACHES + (4 << 20)).max(DATA_MIN) / (4 << 20) * (4 << 20);
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    let mut rows = Vec::new();
    for (name, block_bytes) in SIZES {
        let figures = runtime.block_on(measure_size(block_bytes, data))?;
        let detail = format!(
            "{} MiB in blocks of {name}, scattered, every byte compared afterwards, last-level cache {} MiB; medians of \
             {ROUNDS} alternations with memcpy between two shared memories in one process",
            data >> 20,
            cache >> 20
        );
        for (direction, ours, ceiling) in [
            ("offload", &figures.offload, &figures.memcpy_out),
            ("onboard", &figures.onboard, &figures.memcpy_in),
        ] {
            rows.push(
                Row::new(format!("host_copy.{direction}.{name}"), median(ours), "GB/s")
                    .ceiling(median(ceiling))
                    .ratio_at_least(LIMIT)
                    .detail(&detail),
            );
        }
    }
    Ok(rows)
}

#[derive(Default)]
struct Figures {
    offload: Vec<f64>,
    onboard: Vec<f64>,
    memcpy_out: Vec<f64>,
    memcpy_in: Vec<f64>,
}

async fn measure_size(block_bytes: usize, data: usize) -> Result<Figures, String> {
    let blocks = data / block_bytes;
    // Room for this round's and the last one's.
    let daemon = BenchDaemon::start((data * 2 + (128 << 20)) as u64)?;
    let client = Client::connect(daemon.socket()).await.map_err(|error| error.to_string())?;
    daemon.populated(&client).await?;
    let mut engine = BenchEngine::attach(client, block_bytes, (blocks * 2) as u32).await?;
    let memory = |name| SharedMemory::create(name, data).map_err(|error| error.to_string());
    let (near, far) = (memory("bench-near")?, memory("bench-far")?);
    let populate =
        |memory: &SharedMemory| memory.populate(0..memory.bytes()).map_err(|error| error.to_string());
    populate(&near)?;
    populate(&far)?;
    populate(engine.memory.memory())?;
    let order = scatter(blocks);
    let mut figures = Figures::default();
    // The first round warms everything up and does not count.
    for round in 0..=ROUNDS {
        let (offload, onboard) = through_daemon(&mut engine, blocks, round as u32).await?;
        let (out, back) =
            (memcpy(&near, &far, block_bytes, &order), memcpy(&far, &near, block_bytes, &order));
        if round > 0 {
            let gb = data as f64 / 1e9;
            figures.offload.push(gb / offload);
            figures.onboard.push(gb / onboard);
            figures.memcpy_out.push(gb / out);
            figures.memcpy_in.push(gb / back);
        }
    }
    Ok(figures)
}

/// Writes blocks, has them offloaded, onboards them into others and compares. Returns the seconds of both copies.
async fn through_daemon(engine: &mut BenchEngine, blocks: usize, round: u32) -> Result<(f64, f64), String> {
    let text = |error: kvbm_connector::ClientError| error.to_string();
    let (client, pool) = (engine.client.clone(), engine.pool.pool_id);
    let tokens: Vec<u32> = (0..blocks as u32 * 32).map(|token| token ^ (round << 28)).collect();
    let keys = sequence_hashes(engine.namespace, 32, &tokens);
    let mut sources = client.request_grants(pool, blocks as u32).await.map_err(text)?;
    expect(sources.len(), blocks, "blocks granted")?;
    shuffle(&mut sources);
    for (block, key) in sources.iter().zip(&keys) {
        fill(engine, block, *key);
    }
    let parents: Vec<_> = std::iter::once(None).chain(keys.iter().copied().map(Some)).take(blocks).collect();
    let started = Instant::now();
    for first in (0..blocks).step_by(COMMIT_BLOCKS) {
        let piece = first..(first + COMMIT_BLOCKS).min(blocks);
        let (blocks, keys) = (sources[piece.clone()].to_vec(), keys[piece.clone()].to_vec());
        let committed = Committed { blocks, keys, parents: parents[piece].to_vec(), retention: vec![] };
        client.commit(engine.namespace_id, pool, committed).await.map_err(text)?;
    }
    let done = client.offload(pool, sources.clone()).await.map_err(text)?;
    let offload = started.elapsed().as_secs_f64();
    expect(done.blocks_done as usize, blocks, "blocks offloaded")?;

    let mut targets = client.request_grants(pool, blocks as u32).await.map_err(text)?;
    expect(targets.len(), blocks, "targets granted")?;
    shuffle(&mut targets);
    // Asked without the pool: the match is about what is in host memory.
    let matched = client.match_prefix(engine.namespace_id, &keys, 0).await.map_err(text)?;
    expect(matched.host_blocks as usize, blocks, "blocks found in host")?;
    let started = Instant::now();
    let done = client.onboard(matched.lease_id, pool, targets.clone()).await.map_err(text)?;
    let onboard = started.elapsed().as_secs_f64();
    expect(done.blocks_done as usize, blocks, "blocks onboarded")?;
    for (block, key) in targets.iter().zip(&keys) {
        if !holds(engine, block, *key) {
            return Err(format!("block {} came back with other bytes", block.block));
        }
    }
    let all = sources.iter().chain(&targets);
    let releases: Vec<_> = all
        .map(|b| kvbm_connector::Release {
            block: kvbm_connector::BlockRef { block: b.block, generation: b.generation },
            pins: 1,
        })
        .collect();
    client.release(pool, &releases).await.map_err(text)?;
    Ok((offload, onboard))
}

fn expect(actual: usize, expected: usize, what: &str) -> Result<(), String> {
    if actual == expected { Ok(()) } else { Err(format!("{actual} of {expected} {what}")) }
}

/// Bytes that are different for every key and every place in the block.
fn pattern(key: SequenceHash, page: usize) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    let seed = u64::from_le_bytes(*key.0.first_chunk().expect("8 of 16 bytes"));
    for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = seed.wrapping_mul((page * 512 + i) as u64 | 1).to_le_bytes();
    }
    bytes
}

fn fill(engine: &BenchEngine, block: &BlockRef, key: SequenceHash) {
    let layout = engine.memory.layout();
    for page in 0..layout.block_bytes / 4096 {
        engine.memory.memory().write(layout.offset(block.block) + page * 4096, &pattern(key, page));
    }
}

fn holds(engine: &BenchEngine, block: &BlockRef, key: SequenceHash) -> bool {
    let layout = engine.memory.layout();
    let mut bytes = [0; 4096];
    (0..layout.block_bytes / 4096).all(|page| {
        engine.memory.memory().read(layout.offset(block.block) + page * 4096, &mut bytes);
        bytes == pattern(key, page)
    })
}

/// Seconds to copy all blocks from one place to another.
fn memcpy(from: &SharedMemory, to: &SharedMemory, block_bytes: usize, order: &[usize]) -> f64 {
    let started = Instant::now();
    for (i, block) in order.iter().enumerate() {
        from.memcpy_to(block * block_bytes, to, order[order.len() - 1 - i] * block_bytes, block_bytes);
    }
    started.elapsed().as_secs_f64()
}

/// A fixed permutation without locality.
fn scatter(count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    shuffle(&mut order);
    order
}

fn shuffle<T>(items: &mut [T]) {
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for i in (1..items.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        items.swap(i, (random % (i as u64 + 1)) as usize);
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The largest cache of the first core, by the kernel's word.
fn last_level_cache_bytes() -> Option<usize> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?.flatten();
    let size = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path.join("size")).ok()?;
        let text = text.trim();
        let (digits, unit) = text.split_at(text.len() - 1);
        let unit = match unit {
            "K" => 1 << 10,
            "M" => 1 << 20,
            _ => return None,
        };
        Some(digits.parse::<usize>().ok()? * unit)
    };
    caches.filter_map(|cache| size(cache.path())).max()
}
