//! The command line of `kvbm replay`.

use std::path::PathBuf;

use clap::{ArgAction, ArgGroup, Args};
use kvbm::AdmissionRules;
use kvbm::ledger::{DiskRules, PolicyKind};

use super::drive::Capacities;
use super::fleet::FleetArgs;
use super::policies::Selection;
use super::workloads::{TOKENS_PER_BLOCK, Workload};

/// Bytes of KV in one token where nobody says otherwise: 32 layers, 8 heads of 128 numbers of 16 bits, keys and values.
const BYTES_PER_TOKEN: u64 = 131_072;
/// No block is larger: 1 TiB.
const BLOCK_BYTES_MAX: u64 = 1 << 40;

/// Replay a trace through the block manager's ledger, in virtual time: hit ratios of policies and sizes
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true).args(["trace", "workload"]))]
pub(crate) struct ReplayArgs {
    /// Trace to replay: Mooncake JSONL (timestamp, hash_ids), or a file of `kvbm daemon --record`
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
    /// Replay a made-up workload instead
    #[arg(long, value_name = "NAME")]
    pub(super) workload: Option<Workload>,
    /// Seed of the workload
    #[arg(long, default_value_t = 1, requires = "workload")]
    pub(super) seed: u64,
    /// Requests of the workload
    #[arg(long, default_value_t = 10_000, requires = "workload", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) requests: u32,
    /// Write the workload as Mooncake JSONL instead of replaying it
    #[arg(long, value_name = "FILE", requires = "workload")]
    pub(super) write_trace: Option<PathBuf>,
    /// Blocks in host memory
    #[arg(long, default_value_t = 0, value_name = "N")]
    host_blocks: u32,
    /// Blocks on disk
    #[arg(long, default_value_t = 0, value_name = "N")]
    disk_blocks: u32,
    /// Blocks in an engine's pool; 0: blocks are stored in host memory directly
    #[arg(long, default_value_t = 0, value_name = "N")]
    device_blocks: u32,
    /// Policy of eviction, or `all`: each policy of the ledger, known ones as plain pools, Belady's choice and room for
    /// everything
    #[arg(long, default_value = PolicyKind::DEFAULT.name())]
    pub(super) policy: Selection,
    /// Cut the blocks of the trace into smaller ones of this size [default: as in the trace]
    #[arg(long, value_name = "N")]
    pub(super) tokens_per_block: Option<u32>,
    /// Tokens in a block of a Mooncake trace
    #[arg(long, default_value_t = TOKENS_PER_BLOCK, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) trace_tokens_per_block: u32,
    /// Bytes of one block, to account for copies and writes [default: as recorded, else 131072 per token]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..=BLOCK_BYTES_MAX))]
    block_bytes: Option<u64>,
    /// Replay the trace so many times, one after the other
    #[arg(long, default_value_t = 1, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) repeat: u32,
    /// With --repeat: each time with blocks that were not there before
    #[arg(long)]
    pub(super) fresh_ids: bool,
    /// Write to disk only blocks that were used twice
    #[arg(long, default_value = "on", value_name = "on|off", action = ArgAction::Set, value_parser = on_or_off)]
    disk_filter: bool,
    /// Bytes that may be written to disk per day of the trace
    #[arg(long, value_name = "BYTES_PER_DAY")]
    disk_write_budget: Option<u64>,
    /// Secret that keys are spread with; which blocks a policy learns from depends on it
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) secret: u64,
    /// Hit ratio over the capacity of host memory
    #[arg(long, conflicts_with = "host_blocks")]
    pub(super) curve: bool,
    /// Capacities of the curve, in blocks [default: powers of two up to the different blocks of the trace]
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', requires = "curve",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) capacities: Vec<u32>,
    /// Plot the curve into this file
    #[arg(long, value_name = "FILE", requires = "curve")]
    pub(super) svg: Option<PathBuf>,
    #[command(flatten)]
    pub(super) fleet: FleetArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(super) json: bool,
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("permitted are on, off".to_owned()),
    }
}

impl ReplayArgs {
    pub(super) fn capacities(&self) -> Capacities {
        Capacities { device: self.device_blocks, host: self.host_blocks, disk: self.disk_blocks }
    }

    pub(super) fn disk_rules(&self) -> DiskRules {
        let rules = DiskRules::default();
        let admission = AdmissionRules {
            frequency_filter: self.disk_filter,
            bytes_per_day: self.disk_write_budget,
            ..rules.admission
        };
        DiskRules { admission, ..rules }
    }

    pub(super) fn block_bytes(&self, recorded: Option<u64>, tokens_per_block: u32) -> u64 {
        let usual = u64::from(tokens_per_block) * BYTES_PER_TOKEN;
        self.block_bytes.or(recorded).unwrap_or(usual).clamp(1, BLOCK_BYTES_MAX)
    }
}
