//! Time to the first token of a prompt that nobody has, and of one whose blocks are on the GPU, in host memory, on disk.
//!
//! A daemon and a worker of this binary; each prompt is asked once per tier. Between two tiers the worker comes back with an
//! empty pool, or the daemon with empty host memory, so that the blocks can only come from where they are said to.

use std::path::PathBuf;

use clap::Args;
use kvbm_cuda::copy_engine::Direction;
use kvbm_worker::KvLayout;
use kvbm_worker::model::{Config, Shape};
use tokio::runtime::Runtime;

use super::node::{First, Node, NodeOptions};
use super::{Row, link};

/// Tokens of a block.
const BLOCK_TOKENS: usize = 32;
/// What a hit in host memory may cost beside the bytes: finding it, and being told that they are there.
const SPARE_SECONDS: f64 = 0.003;
/// How much slower than the link alone its bytes may be.
const LINK_FACTOR: f64 = 1.06;
/// Prompts that are longer are asked once.
const LONG: usize = 16_384;

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct TtftArgs {
    /// The GPU: cuda:0, GPU-<uuid>; or cpu, to see that it works
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Folder of a model, for its weights, or for its end tokens if they are random
    #[arg(long, env = "KVBM_MODEL_PATH", default_value = "models/tiny", value_name = "DIR")]
    model: PathBuf,
    /// Random weights of this shape; none: the folder's
    #[arg(long, value_name = "SHAPE|none", default_value = "llama-3-8b")]
    random_weights: String,
    /// Lengths of prompts, tokens; each at least 64
    #[arg(long, value_delimiter = ',', default_values_t = [2048, 8192, 32_768, 100_000])]
    tokens: Vec<usize>,
    /// Prompts of each length up to 16384 tokens; of longer ones, one
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Without the disk tier, and without its rows
    #[arg(long)]
    no_disk: bool,
    /// Where the disk tier is, in a folder of its own [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// A prompt, and how long its first token took, by tier.
struct Prompt {
    length: usize,
    tokens: Vec<u32>,
    firsts: Vec<(Tier, First)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tier {
    Recompute,
    Device,
    Host,
    Disk,
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Self::Recompute => "recompute",
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }

    /// Tokens of a hit that came from there.
    fn of(self, first: &First) -> usize {
        match self {
            Self::Recompute => 0,
            Self::Device => first.device_tokens,
            Self::Host => first.host_tokens,
            Self::Disk => first.disk_tokens,
        }
    }
}

pub(super) fn measure(args: &TtftArgs) -> Result<Vec<Row>, String> {
    if let Some(tokens) = args.tokens.iter().find(|tokens| **tokens < 2 * BLOCK_TOKENS) {
        return Err(format!("--tokens {tokens}: expected at least {}", 2 * BLOCK_TOKENS));
    }
    if args.rounds == 0 {
        return Err("--rounds 0: expected at least 1".into());
    }
    let shape = shape(&args.random_weights)?;
    let folder = Config::load(&args.model).map_err(|error| error.to_string())?;
    let config = shape.map_or_else(|| folder.clone(), |shape| shape.config(&folder));
    let block_bytes = KvLayout::of(&config, BLOCK_TOKENS).block_bytes();
    let rate = link::bytes_per_second(&args.device, block_bytes, Direction::Onboard)?;
    let mut prompts = prompts(args, config.token_count);
    let blocks: usize = prompts.iter().map(|prompt| prompt.length.div_ceil(BLOCK_TOKENS)).sum();
    let longest = args.tokens.iter().max().copied().unwrap_or(0);
    let bytes = ((blocks + 600) * block_bytes.next_multiple_of(4096)) as f64;
    let options = NodeOptions {
        device: args.device.clone(),
        model: args.model.clone(),
        random_weights: args.random_weights.clone(),
        // A match promises half of a pool at most; what warms up has to fit too.
        pool_blocks: (blocks + 600).max(2 * longest.div_ceil(BLOCK_TOKENS) + 600),
        // A segment is whole or it is not there.
        host_gb: bytes / 1e9 * 1.05 + 1.1,
        disk: !args.no_disk,
        dir: args.dir.clone(),
        daemon_flags: vec![],
    };
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    let _guard = runtime.enter();
    let mut node = Node::start(options)?;
    node.start_worker()?;
    ask_all(&runtime, &mut node, &mut prompts, Tier::Recompute)?;
    ask_all(&runtime, &mut node, &mut prompts, Tier::Device)?;
    let complete: usize = prompts.iter().map(|prompt| prompt.length / BLOCK_TOKENS).sum();
    runtime.block_on(node.resident("host", complete))?;
    node.start_worker()?;
    ask_all(&runtime, &mut node, &mut prompts, Tier::Host)?;
    let mut tiers = vec![Tier::Recompute, Tier::Device, Tier::Host];
    let mut failed = None;
    if !args.no_disk {
        // What was measured before is told in any case.
        match ask_for_disk(&runtime, &mut node, &mut prompts, complete) {
            Ok(()) => tiers.push(Tier::Disk),
            Err(error) => failed = Some(Row::failed("ttft.disk", "ms", error)),
        }
    }
    Ok(rows(args, &prompts, &tiers, block_bytes, rate).into_iter().chain(failed).collect())
}

/// Waits until all blocks are on disk, and asks when they are nowhere else.
fn ask_for_disk(
    runtime: &Runtime,
    node: &mut Node,
    prompts: &mut [Prompt],
    complete: usize,
) -> Result<(), String> {
    runtime.block_on(node.resident("disk", complete))?;
    node.restart_daemon()?;
    node.start_worker()?;
    ask_all(runtime, node, prompts, Tier::Disk)
}

fn shape(name: &str) -> Result<Option<Shape>, String> {
    use clap::ValueEnum;
    match name {
        "none" => Ok(None),
        name => Shape::from_str(name, false).map(Some).map_err(|error| format!("--random-weights: {error}")),
    }
}

fn prompts(args: &TtftArgs, token_count: usize) -> Vec<Prompt> {
    let mut seed = 1u64;
    let mut token = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 33) % token_count as u64) as u32
    };
    let mut prompts = Vec::new();
    for length in &args.tokens {
        for _ in 0..if *length > LONG { 1 } else { args.rounds } {
            let tokens = (0..*length).map(|_| token()).collect();
            prompts.push(Prompt { length: *length, tokens, firsts: Vec::new() });
        }
    }
    prompts
}

/// Asks each prompt once. A hit that came from elsewhere is an error: it would be a figure about something else.
fn ask_all(runtime: &Runtime, node: &mut Node, prompts: &mut [Prompt], tier: Tier) -> Result<(), String> {
    for prompt in prompts {
        let first = runtime.block_on(node.ask(prompt.tokens.clone()))?;
        let found = first.device_tokens + first.host_tokens + first.disk_tokens;
        // The last token is computed in any case, and with it its block.
        let expected =
            if tier == Tier::Recompute { 0 } else { (prompt.length - 1) / BLOCK_TOKENS * BLOCK_TOKENS };
        if tier.of(&first) != expected || found != expected {
            let length = prompt.length;
            return Err(format!(
                "a prompt of {length} tokens was to find {expected} ({}), and found {first:?}",
                tier.name()
            ));
        }
        prompt.firsts.push((tier, first));
    }
    Ok(())
}

fn rows(args: &TtftArgs, prompts: &[Prompt], tiers: &[Tier], block_bytes: usize, rate: f64) -> Vec<Row> {
    let seconds = |length: usize, tier: Tier| {
        let of = prompts.iter().filter(|prompt| prompt.length == length);
        let mut all: Vec<f64> = of
            .flat_map(|prompt| prompt.firsts.iter().filter(|(of, _)| *of == tier))
            .map(|(_, first)| first.seconds)
            .collect();
        all.sort_by(f64::total_cmp);
        (all[all.len() / 2], all.len())
    };
    let mut rows = Vec::new();
    for length in &args.tokens {
        let (recompute, _) = seconds(*length, Tier::Recompute);
        let (device, _) = seconds(*length, Tier::Device);
        for tier in tiers {
            let (took, count) = seconds(*length, *tier);
            let bytes = (*length - 1) / BLOCK_TOKENS * block_bytes;
            let detail = match tier {
                Tier::Recompute => format!("{:.0} tokens/s", *length as f64 / took),
                Tier::Device => format!("{:.3} of recompute", took / recompute),
                Tier::Host | Tier::Disk => format!(
                    "{:.3} of recompute; {:.3} GB, the link alone moves {:.1} GB/s; beyond the GPU's hit {:.1} GB/s",
                    took / recompute,
                    bytes as f64 / 1e9,
                    rate / 1e9,
                    bytes as f64 / 1e9 / (took - device).max(1e-9),
                ),
            };
            let row = Row::new(format!("ttft.{length}.{}", tier.name()), took * 1e3, "ms");
            let row = row.detail(format!("median of {count}; {detail}"));
            rows.push(match tier {
                Tier::Host => row.at_most((device + LINK_FACTOR * bytes as f64 / rate + SPARE_SECONDS) * 1e3),
                Tier::Recompute | Tier::Device | Tier::Disk => row,
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(seconds: f64, host_tokens: usize) -> First {
        First { seconds, device_tokens: 0, host_tokens, disk_tokens: 0 }
    }

    #[test]
    fn a_host_hit_is_held_to_the_gpus_hit_and_the_link() {
        let args = TtftArgs {
            device: "cpu".into(),
            model: "m".into(),
            random_weights: "none".into(),
            tokens: vec![65],
            rounds: 1,
            no_disk: true,
            dir: None,
        };
        let prompt = |host: f64| Prompt {
            length: 65,
            tokens: vec![],
            firsts: vec![
                (Tier::Recompute, first(1.0, 0)),
                (Tier::Device, first(0.010, 0)),
                (Tier::Host, first(host, 64)),
            ],
        };
        // Two blocks of 1,000,000 bytes at 100 MB/s: 20 ms, so that 34.2 ms are allowed.
        let missed = |host: f64| {
            let tiers = [Tier::Recompute, Tier::Device, Tier::Host];
            let rows = rows(&args, &[prompt(host)], &tiers, 1_000_000, 1e8);
            rows.iter().map(Row::is_missed).collect::<Vec<_>>()
        };
        assert_eq!(missed(0.0341), [false; 3]);
        assert_eq!(missed(0.0343), [false, false, true]);
    }
}
