//! Tokens per second, beside what the GPU's memory and its products allow.

use std::time::{Duration, Instant};

use kvbm_worker::model::Config;
use kvbm_worker::{BatchLimits, BlockId, Ceilings, Chunk, Logits, Want};

use super::subject::{Source, Subject};
use super::{EngineArgs, Row};

/// Times that a prompt is computed, or fewer when that takes too long; the median counts.
const PROMPT_ROUNDS: usize = 5;
const PROMPT_TIME: Duration = Duration::from_secs(10);
/// Tokens that are decoded; the median step counts.
const DECODE_STEPS: usize = 64;

pub(super) fn measure(args: &EngineArgs) -> Result<Vec<Row>, String> {
    let source = Source { folder: &args.model, shape: args.shape()? };
    let sequences = args.batches.iter().copied().max().unwrap_or(1).max(1);
    let limits = BatchLimits {
        tokens: args.chunk.max(sequences),
        sequences,
        answers: sequences,
        tokens_per_block: args.block_size,
    };
    let each = (args.context + DECODE_STEPS + 1).div_ceil(args.block_size);
    let longest = args.prompts.iter().copied().max().unwrap_or(0).div_ceil(args.block_size);
    let blocks = (each * sequences).max(longest);
    let mut subject = if args.is_cpu() {
        Subject::cpu(source, limits, blocks)?
    } else {
        Subject::cuda(&args.device, source, limits, blocks)?
    };
    let ceilings = match &mut subject {
        Subject::Cpu(_) => None,
        Subject::Cuda(llama) => Some(llama.engine.ceilings().map_err(|error| error.to_string())?),
    };
    let mut bench = Bench { logits: Logits::default(), table: scattered(blocks), chunk: args.chunk, subject };
    let context_length = bench.subject.config().context_length;
    let mut rows = Vec::new();
    for prompt in args.prompts.iter().filter(|prompt| (1..=context_length).contains(prompt)) {
        let rate = bench.prefill(*prompt)?;
        let detail = format!(
            "{} on {}, steps of {} tokens, blocks of {} tokens scattered; median of up to {PROMPT_ROUNDS}",
            source.name(),
            bench.subject.place(),
            args.chunk,
            args.block_size
        );
        let row = Row::new(format!("engine.prefill.{prompt}"), rate, "tok/s").detail(detail);
        rows.push(with_ceiling(row, ceilings.map(|c| prefill_ceiling(c, bench.subject.config(), *prompt))));
    }
    for batch in &args.batches {
        if *batch == 0 || args.context + DECODE_STEPS >= context_length {
            continue;
        }
        let rate = bench.decode(*batch, args.context, each)?;
        let detail = format!(
            "{} on {}, {batch} sequences of {} tokens; median step of {DECODE_STEPS}, {:.2} ms",
            source.name(),
            bench.subject.place(),
            args.context,
            *batch as f64 / rate * 1e3
        );
        let row = Row::new(format!("engine.decode.{batch}"), rate, "tok/s").detail(detail);
        let ceiling = ceilings.map(|c| decode_ceiling(c, bench.subject.config(), *batch, args.context));
        rows.push(with_ceiling(row, ceiling));
    }
    Ok(rows)
}

fn with_ceiling(row: Row, ceiling: Option<f64>) -> Row {
    match ceiling {
        Some(ceiling) => row.ceiling(ceiling),
        None => row,
    }
}

/// An engine, and blocks for it.
struct Bench {
    subject: Subject,
    logits: Logits,
    table: Vec<BlockId>,
    chunk: usize,
}

impl Bench {
    fn prefill(&mut self, tokens: usize) -> Result<f64, String> {
        let prompt = self.prompt(tokens);
        let mut seconds = Vec::new();
        // The first one loads what libraries need.
        self.compute(&prompt[..tokens.min(self.chunk)], 0..self.table.len())?;
        let start = Instant::now();
        while seconds.is_empty() || (seconds.len() < PROMPT_ROUNDS && start.elapsed() < PROMPT_TIME) {
            let begin = Instant::now();
            self.compute(&prompt, 0..self.table.len())?;
            seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok(tokens as f64 / median(seconds))
    }

    /// Computes a prompt into some of the blocks.
    fn compute(&mut self, prompt: &[u32], blocks: std::ops::Range<usize>) -> Result<u32, String> {
        let mut done = 0;
        for part in prompt.chunks(self.chunk) {
            let want = if done + part.len() == prompt.len() { Want::Largest } else { Want::Nothing };
            let blocks = &self.table[blocks.clone()];
            let chunk = Chunk { tokens: part, first_position: done, blocks, want };
            self.subject.forward(&[chunk], &mut self.logits)?;
            done += part.len();
        }
        Ok(self.logits.largest(0))
    }

    fn decode(&mut self, batch: usize, context: usize, each: usize) -> Result<f64, String> {
        let prompt = self.prompt(context);
        let mut tokens = Vec::new();
        for sequence in 0..batch {
            tokens.push(self.compute(&prompt, sequence * each..(sequence + 1) * each)?);
        }
        let mut seconds = Vec::new();
        for step in 0..DECODE_STEPS {
            let begin = Instant::now();
            let chunks: Vec<Chunk<'_>> = (0..batch)
                .map(|i| Chunk {
                    tokens: &tokens[i..=i],
                    first_position: context + step,
                    blocks: &self.table[i * each..(i + 1) * each],
                    want: Want::Largest,
                })
                .collect();
            self.subject.forward(&chunks, &mut self.logits)?;
            tokens = (0..batch).map(|i| self.logits.largest(i)).collect();
            seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok(batch as f64 / median(seconds))
    }

    fn prompt(&self, tokens: usize) -> Vec<u32> {
        let known = self.subject.config().token_count as u64;
        (0..tokens as u64).map(|i| ((i * 7919 + 17) % known) as u32).collect()
    }
}

/// All blocks, in an order that jumps about.
fn scattered(blocks: usize) -> Vec<BlockId> {
    // A step that shares no factor with the number reaches each once.
    let common = |mut a: usize, mut b: usize| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let step = (blocks * 5 / 8..).find(|step| *step > 0 && common(*step, blocks) == 1).unwrap_or(1);
    (0..blocks).map(|i| BlockId((i * step % blocks) as u32)).collect()
}

/// Multiplications and additions of weights for one token.
fn weight_count(config: &Config) -> f64 {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let attention = config.hidden_size * (2 * q + 2 * kv);
    (config.layers * (attention + 3 * config.hidden_size * config.intermediate_size)) as f64
}

/// All arithmetic at the rate of a large product.
fn prefill_ceiling(ceilings: Ceilings, config: &Config, tokens: usize) -> f64 {
    let attention = 2.0 * tokens as f64 * (config.layers * config.heads * config.head_dim) as f64;
    ceilings.product_flops_per_second / (2.0 * weight_count(config) + attention)
}

/// Weights and KV read at the rate of a copy.
fn decode_ceiling(ceilings: Ceilings, config: &Config, batch: usize, context: usize) -> f64 {
    let weights = 2.0 * (weight_count(config) + (config.vocab_size * config.hidden_size) as f64);
    let kv = 4.0 * (config.layers * config.kv_heads * config.head_dim * context * batch) as f64;
    batch as f64 * ceilings.memory_bytes_per_second / (weights + kv)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_tables_have_each_block_once() {
        for blocks in [1, 2, 7, 64, 1000] {
            let mut table = scattered(blocks);
            table.sort_unstable();
            assert!(table.iter().enumerate().all(|(i, block)| block.0 as usize == i), "{blocks}");
        }
    }
}
