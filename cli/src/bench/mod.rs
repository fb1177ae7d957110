//! `kvbm bench`: what this machine gives, beside the ceiling measured in the same run.

mod daemon;
mod disk;
mod grpc;
mod hash;
mod host_copy;
mod matching;
mod overhead;
mod row;
mod serve;

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
    /// Requests per second and latency of frontend and worker, with an engine that only echoes
    Serve,
    /// What the cache costs when it never hits: a worker with a daemon against one without, interleaved
    Overhead,
}

/// Exit code 0 when measured, whatever the figures.
pub(crate) fn run(args: &BenchArgs) -> Result<(), String> {
    let rows = match &args.what {
        What::Hash => hash::measure(),
        What::Match => matching::measure(),
        What::Grpc => grpc::measure()?,
        What::HostCopy => host_copy::measure()?,
        What::Disk(args) => disk::measure(args)?,
        What::Serve => serve::measure()?,
        What::Overhead => overhead::measure()?,
    };
    if args.json {
        println!("{}", serde_json::to_string(&rows).map_err(|error| error.to_string())?);
    } else {
        rows.iter().for_each(|row| println!("{row}"));
    }
    Ok(())
}
