//! What offloads in the background cost an engine that decodes, on the same GPU.
//!
//! A worker decodes a batch. Beside it sessions without an engine commit blocks of pools of their own on that GPU as fast as
//! they are offloaded: more than any engine computes. Quiet windows and windows with offloads take turns within the same
//! answers, so that both see the same contexts.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use kvbm_connector::{BlockRef, Client, Committed, Release};
use kvbm_cuda::Driver;
use kvbm_hash::sequence_hashes;
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::{GenerateRequest, Sampling};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::Row;
use super::daemon::BenchEngine;
use super::node::{Node, NodeOptions};

/// Blocks of each session beside: their size, its pool, and how many are committed at a time. Fewer than half of the pool:
/// more would count as pressure.
const BLOCK_BYTES: usize = 4 << 20;
const POOL_BLOCKS: u32 = 1024;
const ROUND_BLOCKS: usize = 384;
/// Sessions beside, so that one's blocks are copied while another prepares its next.
const SESSIONS: u32 = 3;
/// Windows: quiet, offloads, quiet, ... quiet.
const WINDOWS: usize = 9;
/// Decoding with offloads may be so much slower, percent, unless it differs from itself by more.
const LIMIT_PERCENT: f64 = 3.0;
/// Of gaps between tokens, those right after a change of windows belong to neither.
const SETTLING: Duration = Duration::from_millis(200);

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct PacingArgs {
    /// The GPU: cuda:0, GPU-<uuid>
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Folder of a model, for its weights, or for its end tokens if they are random
    #[arg(long, env = "KVBM_MODEL_PATH", default_value = "models/tiny", value_name = "DIR")]
    model: PathBuf,
    /// Random weights of this shape; none: the folder's
    #[arg(long, value_name = "SHAPE|none", default_value = "llama-3-8b")]
    random_weights: String,
    /// Sequences that decode side by side
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Seconds of each window
    #[arg(long, default_value_t = 3.0)]
    window_seconds: f64,
}

/// Gaps between tokens in milliseconds, by window, and what was offloaded meanwhile, bytes per second.
struct Figures {
    gaps: Vec<Vec<f64>>,
    bytes_per_second: f64,
}

pub(super) fn measure(args: &PacingArgs) -> Result<Vec<Row>, String> {
    if args.batch == 0 || args.context < 64 || args.window_seconds < 0.5 {
        return Err("--batch, --context, --window-seconds: expected at least 1, 64 and 0.5".into());
    }
    let mut rows = Vec::new();
    for (name, percent) in [("paced", "3"), ("full", "100")] {
        let figures = run(args, percent)?;
        for (figure, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            let windows: Vec<f64> = figures.gaps.iter().map(|gaps| at(gaps, quantile)).collect();
            let alone = mean(windows.iter().step_by(2).copied());
            let more = mean((1..WINDOWS).step_by(2).map(|window| beyond(&windows, window, 1)));
            let itself = mean((2..WINDOWS - 2).step_by(2).map(|window| beyond(&windows, window, 2).abs()));
            let detail = format!(
                "{} of {}, {alone:.3} ms without; quiet windows differ by {itself:.2} %",
                args.batch, args.random_weights
            );
            let row = Row::new(format!("pacing.{name}.tpot.{figure}"), more, "%").detail(detail);
            rows.push(if name == "paced" { row.at_most(itself.max(LIMIT_PERCENT)) } else { row });
        }
        let detail = format!("offloaded meanwhile, gpu_slowdown_percent {percent}");
        rows.push(
            Row::new(format!("pacing.{name}.rate"), figures.bytes_per_second / 1e9, "GB/s").detail(detail),
        );
    }
    Ok(rows)
}

/// By how much a window is beyond the mean of those before and behind it, percent: contexts grow meanwhile.
fn beyond(windows: &[f64], window: usize, apart: usize) -> f64 {
    (windows[window] / mean([windows[window - apart], windows[window + apart]].into_iter()) - 1.0) * 100.0
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

fn at(values: &[f64], quantile: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * quantile).round() as usize).copied().unwrap_or(f64::NAN)
}

fn run(args: &PacingArgs, percent: &str) -> Result<Figures, String> {
    let text = |error: kvbm_cuda::Error| error.to_string();
    let gpu = Driver::load().and_then(|driver| driver.device(&args.device.parse()?)).map_err(text)?;
    // Enough for a step of a millisecond.
    let seconds = WINDOWS as f64 * args.window_seconds + 3.0;
    let tokens = ((seconds * 1000.0) as usize).min(8192);
    let blocks = args.batch * ((args.context + tokens) / 32 + 2) + 512;
    let node = Node::start(NodeOptions {
        device: args.device.clone(),
        model: args.model.clone(),
        random_weights: args.random_weights.clone(),
        pool_blocks: blocks,
        host_gb: 8.6,
        disk: false,
        dir: None,
        daemon_flags: vec!["--gpu-slowdown-percent".into(), percent.into()],
    });
    let mut node = node?;
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    let guard = runtime.enter();
    node.start_worker()?;
    drop(guard);
    runtime.block_on(async {
        let (flood, offloaded) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let arrivals: Arc<Mutex<Vec<(usize, Instant)>>> = Arc::default();
        let mut answers = JoinSet::new();
        for number in 0..args.batch {
            let (client, arrivals) = (node.client()?, arrivals.clone());
            answers.spawn(decode(client, number, args.context, tokens, arrivals));
        }
        let mut beside = JoinSet::new();
        for session in 0..SESSIONS {
            let client = Client::connect(node.socket()).await.map_err(|error| error.to_string())?;
            let engine = BenchEngine::attach_on(client, &gpu.uuid, BLOCK_BYTES, POOL_BLOCKS).await?;
            beside.spawn(offload(engine, session, flood.clone(), offloaded.clone()));
        }
        // Until all prompts are computed.
        while arrivals.lock().len() < args.batch * 32 {
            if let Some(ended) = answers.try_join_next() {
                return Err(format!("an answer ended early: {ended:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (mut windows, mut bytes, mut flooded) = (Vec::new(), 0, 0.0);
        for window in 0..WINDOWS {
            flood.store(window % 2 == 1, Ordering::SeqCst);
            tokio::time::sleep(SETTLING).await;
            let (begin, before) = (Instant::now(), offloaded.load(Ordering::SeqCst));
            tokio::time::sleep(Duration::from_secs_f64(args.window_seconds)).await;
            if window % 2 == 1 {
                bytes += offloaded.load(Ordering::SeqCst) - before;
                flooded += begin.elapsed().as_secs_f64();
            }
            windows.push((begin, Instant::now()));
        }
        if let Some(ended) = beside.try_join_next().or_else(|| answers.try_join_next()) {
            return Err(format!("it ended before it was measured: {ended:?}"));
        }
        let arrivals = std::mem::take(&mut *arrivals.lock());
        let gaps = windows.into_iter().map(|window| gaps(&arrivals, args.batch, window)).collect();
        Ok(Figures { gaps, bytes_per_second: bytes as f64 / flooded })
    })
}

/// Milliseconds between tokens of the same answer that both came within the window.
fn gaps(arrivals: &[(usize, Instant)], streams: usize, (begin, end): (Instant, Instant)) -> Vec<f64> {
    let mut last = vec![None; streams];
    let mut gaps = Vec::new();
    for (stream, at) in arrivals.iter().filter(|(_, at)| (begin..end).contains(at)) {
        if let Some(before) = last[*stream].replace(*at) {
            gaps.push(at.duration_since(before).as_secs_f64() * 1e3);
        }
    }
    gaps
}

async fn decode(
    mut client: kvbm_proto::v1::worker_client::WorkerClient<tonic::transport::Channel>,
    number: usize,
    context: usize,
    tokens: usize,
    arrivals: Arc<Mutex<Vec<(usize, Instant)>>>,
) -> Result<(), String> {
    let request = GenerateRequest {
        prompt: (0..context).map(|at| ((at * 31 + number * 7919) % 1999 + 3) as u32).collect(),
        max_tokens: tokens as u32,
        ignore_eos: true,
        sampling: Some(Sampling::default()),
        ..GenerateRequest::default()
    };
    let text = |status: tonic::Status| status.to_string();
    let mut stream = client.generate(request).await.map_err(text)?.into_inner();
    while let Some(event) = stream.message().await.map_err(text)? {
        if let Some(Body::Tokens(_)) = event.body {
            arrivals.lock().push((number, Instant::now()));
        }
    }
    Ok(())
}

/// Commits blocks and waits until they are in host memory, again and again while it is to.
async fn offload(
    engine: BenchEngine,
    session: u32,
    flood: Arc<AtomicBool>,
    offloaded: Arc<AtomicU64>,
) -> Result<(), String> {
    let text = |error: kvbm_connector::ClientError| error.to_string();
    let (client, pool) = (&engine.client, engine.pool.pool_id);
    for round in (session..).step_by(SESSIONS as usize) {
        while !flood.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let tokens: Vec<u32> = (0..ROUND_BLOCKS as u32 * 32).map(|token| token ^ (round << 16)).collect();
        let keys = sequence_hashes(engine.namespace, 32, &tokens);
        let blocks = client.request_grants(pool, ROUND_BLOCKS as u32).await.map_err(text)?;
        let keys = keys[..blocks.len()].to_vec();
        let parents = std::iter::once(None).chain(keys.iter().copied().map(Some)).take(keys.len()).collect();
        let committed = Committed { blocks: blocks.clone(), keys, parents, retention: vec![] };
        client.commit(engine.namespace_id, pool, committed).await.map_err(text)?;
        let done = client.offload(pool, blocks.clone()).await.map_err(text)?;
        offloaded.fetch_add(u64::from(done.blocks_done) * BLOCK_BYTES as u64, Ordering::SeqCst);
        let releases: Vec<Release> =
            blocks.iter().map(|block| Release { block: BlockRef::from(*block), pins: 1 }).collect();
        client.release(pool, &releases).await.map_err(text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_those_between_tokens_of_one_answer_within_the_window() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let arrivals = [(0, at(0)), (1, at(2)), (0, at(10)), (1, at(13)), (0, at(21)), (0, at(40))];
        assert_eq!(gaps(&arrivals, 2, (at(1), at(30))), [11.0, 11.0]);
        let at_quantiles = |values: &[f64]| (super::at(values, 0.5), super::at(values, 0.99));
        assert_eq!(at_quantiles(&[3.0, 1.0, 2.0]), (2.0, 3.0));
    }

    #[test]
    fn what_grows_evenly_is_not_beyond_its_neighbours() {
        assert_eq!(beyond(&[1.0, 2.0, 3.0, 4.0, 5.0], 2, 2), 0.0);
        assert_eq!(beyond(&[10.0, 15.0, 10.0], 1, 1), 50.0);
    }
}
