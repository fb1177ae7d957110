//! What a match costs over the socket.

use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use kvbm_connector::{Client, Committed, Release};
use kvbm_hash::{SequenceHash, sequence_hashes};

use super::Row;
use super::daemon::{BenchDaemon, BenchEngine};
use super::row::{histogram, percentile_us};

const BLOCKS: usize = 1024;
const BLOCK_BYTES: usize = 4096;
const ALONE: usize = 5000;
const CLIENTS: usize = 8;
/// Calls per second of all clients together.
const CALLS_PER_SECOND: f64 = 2000.0;
const CROWD: Duration = Duration::from_secs(10);
/// Microseconds that the project demands: alone at the median, in a crowd at the 99th percentile.
const ALONE_P50_US: f64 = 200.0;
const CROWD_P99_US: f64 = 1000.0;

pub(super) fn measure() -> Result<Vec<Row>, String> {
    let daemon = BenchDaemon::start(64 << 20)?;
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let client = Client::connect(daemon.socket()).await.map_err(|error| error.to_string())?;
        daemon.populated(&client).await?;
        let engine = BenchEngine::attach(client, BLOCK_BYTES, BLOCKS as u32).await?;
        let tokens: Vec<u32> = (0..BLOCKS as u32 * 32).collect();
        let keys = sequence_hashes(engine.namespace, 32, &tokens);
        fill(&engine, &keys).await?;

        let mut alone = histogram();
        for i in 0..ALONE + ALONE / 10 {
            let took = one_match(&engine.client, engine.namespace_id, &keys).await?;
            if i >= ALONE / 10 {
                alone.saturating_record(took.as_nanos() as u64);
            }
        }
        let crowd = crowd(&daemon.socket(), &keys)?;
        let detail = format!("{BLOCKS} blocks found in host and leased, one client, {ALONE} calls");
        let crowd_detail = format!(
            "{CLIENTS} clients, {CALLS_PER_SECOND} calls/s in total for {} s, timed from when each call was due",
            CROWD.as_secs()
        );
        Ok(vec![
            Row::new("grpc.match.1024.p50", percentile_us(&alone, 50.0), "us").at_most(ALONE_P50_US).detail(&detail),
            Row::new("grpc.match.1024.p99", percentile_us(&crowd, 99.0), "us")
                .at_most(CROWD_P99_US)
                .detail(&crowd_detail),
            Row::new("grpc.match.1024.alone.p99", percentile_us(&alone, 99.0), "us").detail(detail),
            Row::new("grpc.match.1024.crowd.p50", percentile_us(&crowd, 50.0), "us").detail(crowd_detail),
        ])
    })
}

/// Puts a chain into host memory.
async fn fill(engine: &BenchEngine, keys: &[SequenceHash]) -> Result<(), String> {
    let text = |error: kvbm_connector::ClientError| error.to_string();
    let pool = engine.pool.pool_id;
    let blocks = engine.client.request_grants(pool, keys.len() as u32).await.map_err(text)?;
    let parents = std::iter::once(None).chain(keys.iter().copied().map(Some)).take(keys.len()).collect();
    let committed = Committed { blocks: blocks.clone(), keys: keys.to_vec(), parents, retention: vec![] };
    engine.client.commit(engine.namespace_id, pool, committed).await.map_err(text)?;
    let done = engine.client.offload(pool, blocks.clone()).await.map_err(text)?;
    if done.blocks_done as usize != keys.len() {
        return Err(format!(
            "only {} of {} blocks reached host memory: {}",
            done.blocks_done,
            keys.len(),
            done.detail
        ));
    }
    let releases: Vec<Release> = blocks
        .iter()
        .map(|b| Release {
            block: kvbm_connector::BlockRef { block: b.block, generation: b.generation },
            pins: 1,
        })
        .collect();
    engine.client.release(pool, &releases).await.map_err(text)
}

async fn one_match(client: &Client, namespace_id: u32, keys: &[SequenceHash]) -> Result<Duration, String> {
    let started = Instant::now();
    let matched = client.match_prefix(namespace_id, keys, 0).await.map_err(|error| error.to_string())?;
    let took = started.elapsed();
    if matched.host_blocks as usize != keys.len() {
        return Err(format!("found {} of {} blocks", matched.host_blocks, keys.len()));
    }
    client.release_lease(matched.lease_id).await.map_err(|error| error.to_string())?;
    Ok(took)
}

/// Clients with a session and a thread each, calling at a fixed rate whether or not earlier calls were answered late.
/// Threads, because the runtime's timers only count whole milliseconds.
fn crowd(socket: &Path, keys: &[SequenceHash]) -> Result<Histogram<u64>, String> {
    let period = Duration::from_secs_f64(CLIENTS as f64 / CALLS_PER_SECOND);
    let call = |i: usize| -> Result<Histogram<u64>, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let engine = runtime.block_on(async {
            let client = Client::connect(socket).await.map_err(|error| error.to_string())?;
            BenchEngine::attach(client, BLOCK_BYTES, 1).await
        })?;
        let mut times = histogram();
        let start = Instant::now() + period * i as u32 / CLIENTS as u32;
        let mut due = start;
        while due < start + CROWD {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            runtime.block_on(one_match(&engine.client, engine.namespace_id, keys))?;
            times.saturating_record(due.elapsed().as_nanos() as u64);
            due += period;
        }
        Ok(times)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS).map(|i| scope.spawn(move || call(i))).collect();
        let mut all = histogram();
        for thread in threads {
            let times = thread.join().map_err(|_| "a client panicked".to_owned())??;
            all.add(times).map_err(|error| error.to_string())?;
        }
        Ok(all)
    })
}
