//! `kvbm bench`: what this machine gives, beside the ceiling measured in the same run.

mod daemon;
mod disagg;
mod disk;
mod engine;
mod fan_out;
mod gpu_copy;
mod grpc;
mod hash;
mod host_copy;
mod link;
mod matching;
mod node;
mod overhead;
mod pacing;
mod rescue;
mod router;
mod row;
mod serve;
mod ttft;

use clap::{Args, Subcommand};

pub(crate) use row::Row;

/// Measure a part of kvbm on this machine
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
    /// Print a JSON list instead of a table
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Tokens to keys: GB/s of token bytes on one core, against plain BLAKE3 of the same blocks
    Hash,
    /// Prefix match of 1024 blocks in the ledger, lease included, among 100,000 and 1,000,000 resident blocks
    Match,
    /// The same over the socket: one client, then 8 clients at 2,000 calls per second in total
    Grpc,
    /// Blocks between an engine's pool and host memory, across processes, verified, against memcpy
    HostCopy,
    /// Reads and writes of a drive, past the page cache, against fio with the same sizes on the same file
    Disk(disk::DiskArgs),
    /// Blocks between a GPU and host memory by the daemon's copy engine, the pool in another process, against raw copies
    GpuCopy(gpu_copy::GpuCopyArgs),
    /// Blocks that all ranks of an engine hold whole: loaded once and copied from GPU to GPU, against a load into one
    FanOut(fan_out::FanOutArgs),
    /// Time to the first token of prompts that are on a GPU, in host memory, on disk, or nowhere
    Ttft(ttft::TtftArgs),
    /// What offloads in the background cost decoding on a GPU: paced, and as fast as they can
    Pacing(pacing::PacingArgs),
    /// What is saved of the GPU memory of an engine that is killed while it reassigns its blocks
    Rescue(rescue::RescueArgs),
    /// Requests per second and latency of frontend and worker, with an engine that only echoes
    Serve,
    /// The worker's engine on a GPU (or a processor): tokens per second of prefill and decode, or its checks
    Engine(engine::EngineArgs),
    /// The router's index: block operations per second on one core, and bytes, with 1,000,000 blocks
    Router,
    /// Gaps between tokens under a flood of long prompts: two workers that do both, against prefill and decode apart
    Disagg,
    /// What the cache costs when it never hits: a worker with a daemon against one without, interleaved
    Overhead,
}

/// Exit code 0 when measured, whatever the figures; checks fail.
pub(crate) fn run(args: &BenchArgs) -> Result<(), String> {
    let rows = match &args.what {
        What::Hash => hash::measure(),
        What::Match => matching::measure(),
        What::Grpc => grpc::measure()?,
        What::HostCopy => host_copy::measure()?,
        What::Disk(args) => disk::measure(args)?,
        What::GpuCopy(args) => gpu_copy::measure(args)?,
        What::FanOut(args) => fan_out::measure(args)?,
        What::Rescue(args) => rescue::measure(args)?,
        What::Pacing(args) => pacing::measure(args)?,
        What::Ttft(args) => ttft::measure(args)?,
        What::Serve => serve::measure()?,
        What::Engine(args) => engine::measure(args)?,
        What::Router => router::measure()?,
        What::Disagg => disagg::measure()?,
        What::Overhead => overhead::measure()?,
    };
    if args.json {
        println!("{}", serde_json::to_string(&rows).map_err(|error| error.to_string())?);
    } else {
        rows.iter().for_each(|row| println!("{row}"));
    }
    let missed = rows.iter().filter(|row| row.is_missed()).count();
    match &args.what {
        // A wrong engine is no figure.
        What::Engine(args) if args.check && missed > 0 => Err(format!("{missed} checks failed")),
        _ => Ok(()),
    }
}
