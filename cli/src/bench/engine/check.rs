//! Whether a GPU computes what the CPU engine computes, and the same in every way of computing it.
//!
//! The CPU engine's figures do not depend on how a text is divided; a GPU's do, a little. So a GPU is held to cosines, and
//! to the same continuations unless the CPU's two best tokens are nearly equal there.

use std::path::Path;

use kvbm_worker::model::Shape;
use kvbm_worker::{BatchLimits, BlockId, Chunk, Logits, Sampling, Want};

use super::subject::{Source, Subject};
use super::{EngineArgs, Row};

/// Tokens of the prompt.
const PROMPT: usize = 301;
/// Tokens that are continued.
const CONTINUED: usize = 32;
/// Blocks of each pool.
const BLOCKS: usize = 96;
/// What two computations of the same logits have in common.
const COSINE_MIN: f64 = 0.9999;
/// Where the two best tokens' log-probabilities are closer than this, another choice is as good.
const TIE: f64 = 0.05;

pub(super) fn measure(args: &EngineArgs) -> Result<Vec<Row>, String> {
    if args.is_cpu() {
        return Err("--check compares a GPU with the processor: name a GPU with --device".into());
    }
    let mut rows = Vec::new();
    for shape in [None, Some(Shape::Small)] {
        let source = Source { folder: &args.model, shape };
        let limits = BatchLimits { tokens: 512, sequences: 8, answers: 8, tokens_per_block: args.block_size };
        let cpu = Subject::cpu(source, limits, BLOCKS)?;
        let gpu = Subject::cuda(&args.device, source, limits, BLOCKS)?;
        let mut check = Check::new(cpu, gpu, &args.model, args.block_size)?;
        rows.extend(check.rows(&source.name())?);
    }
    Ok(rows)
}

/// One model, on both.
struct Check {
    cpu: Subject,
    gpu: Subject,
    tokens_per_block: usize,
    /// The prompt, and what the CPU engine continues it with.
    tokens: Vec<u32>,
    /// The CPU's logits of the last `CONTINUED` tokens.
    wanted: Vec<Vec<f32>>,
}

impl Check {
    fn new(mut cpu: Subject, gpu: Subject, folder: &Path, tokens_per_block: usize) -> Result<Self, String> {
        let known = cpu.config().token_count as u64;
        let mut tokens: Vec<u32> = (0..PROMPT as u64).map(|i| ((i * i * 7919 + 17) % known) as u32).collect();
        if let Some(text) = reference_prompt(folder).filter(|text| text.iter().all(|t| u64::from(*t) < known))
        {
            // A text that the model was trained on, behind noise.
            tokens.splice(PROMPT - text.len().min(PROMPT).., text.into_iter().take(PROMPT));
        }
        let table = straight();
        let mut wanted = vec![run(&mut cpu, &tokens, &[tokens.len()], &table)?];
        for _ in 1..CONTINUED {
            tokens.push(argmax(&wanted[wanted.len() - 1]));
            let (begin, last) = (tokens.len() - 1, tokens[tokens.len() - 1]);
            wanted.push(step(&mut cpu, &[(&[last], begin, &table)])?.remove(0));
        }
        Ok(Self { cpu, gpu, tokens_per_block, tokens, wanted })
    }

    fn rows(&mut self, name: &str) -> Result<Vec<Row>, String> {
        let row = |what: &str, value: f64, least: f64, detail: String| {
            Row::new(format!("engine.check.{name}.{what}"), value, "").at_least(least).detail(detail)
        };
        let cosine = |what: &str, value: f64, detail: &str| {
            row(what, value, COSINE_MIN, format!("least cosine, 1 less {:.1e}; {detail}", 1.0 - value))
        };
        let plain = self.along(&straight(), &[PROMPT])?;
        let against = "a prompt of 301 tokens and 31 behind it, one by one, against the CPU engine";
        let kv = self.kv_cosine(&straight())?;
        let (equal, excused) = self.greedy(&plain);
        let largest = self.largest(&straight(), &plain)?;
        let chunked = self.along(&straight(), &[64, 100, 1, 2, 134])?;
        let elsewhere = self.along(&scattered(), &[PROMPT])?;
        let recorded = self.recorded()?;
        let together = self.together()?;
        let greedy = format!(
            "tokens along that text that are the CPU engine's ({equal}), or where its two best are closer than {TIE} \
             ({excused})"
        );
        Ok(vec![
            cosine("logits", least_cosine(&plain, &self.wanted), against),
            cosine("kv", kv, "blocks' numbers, against the CPU engine's"),
            row("greedy", (equal + excused) as f64, CONTINUED as f64, greedy),
            row("largest", largest, 1.0, "the GPU's choice is that of its logits".into()),
            cosine("chunked", least_cosine(&chunked, &plain), "in chunks of 64, 100, 1, 2 and 134 tokens"),
            row(
                "scattered",
                same(&elsewhere, &plain),
                1.0,
                "the same bits with blocks in another order".into(),
            ),
            row(
                "recorded",
                recorded,
                1.0,
                "the same bits by kernels, when recorded, and from the recording".into(),
            ),
            cosine("together", together, "prompts and decodes in one batch, against each alone"),
        ])
    }

    /// The GPU's logits along the CPU's text.
    fn along(&mut self, table: &[BlockId], division: &[usize]) -> Result<Vec<Vec<f32>>, String> {
        let mut logits = vec![run(&mut self.gpu, &self.tokens[..PROMPT], division, table)?];
        for at in PROMPT..self.tokens.len() {
            logits.push(step(&mut self.gpu, &[(&self.tokens[at..=at], at, table)])?.remove(0));
        }
        Ok(logits)
    }

    /// How many of the best tokens along the text are the CPU's, and how many others are excused.
    fn greedy(&self, logits: &[Vec<f32>]) -> (usize, usize) {
        let pairs = || logits.iter().zip(&self.wanted);
        let equal = pairs().filter(|(got, wanted)| argmax(got) == argmax(wanted)).count();
        let tied = pairs().filter(|(got, wanted)| argmax(got) != argmax(wanted) && gap(wanted) < TIE).count();
        (equal, tied)
    }

    /// 1 if the tokens that the GPU chooses are those with the largest of its logits.
    fn largest(&mut self, table: &[BlockId], logits: &[Vec<f32>]) -> Result<f64, String> {
        let mut right = true;
        // From the token behind the prompt on: each is computed as it was before, bit for bit.
        for (at, row) in (PROMPT..).zip(&logits[1..]) {
            let tokens = &self.tokens[at..=at];
            let mut chosen = Logits::default();
            let chunk = Chunk { tokens, first_position: at, blocks: table, want: Want::Largest };
            self.gpu.forward(&[chunk], &mut chosen)?;
            right &= chosen.largest(0) == argmax(row);
        }
        Ok(f64::from(u8::from(right)))
    }

    /// Cosine of the blocks' numbers. Both pools hold the same text.
    fn kv_cosine(&self, table: &[BlockId]) -> Result<f64, String> {
        let mut least = f64::INFINITY;
        for block in &table[..self.tokens.len() / self.tokens_per_block] {
            least = least.min(cosine(&numbers(&self.gpu.block(*block)?), &numbers(&self.cpu.block(*block)?)));
        }
        Ok(least)
    }

    /// The same step again and again: by kernels, recorded, launched. 1 if all bits are the same.
    fn recorded(&mut self) -> Result<f64, String> {
        let table = straight();
        let mut alike = 1.0;
        // One row, and three that are filled up to four; the text lies in all of these blocks.
        for rows in [1, 3] {
            let tables = [&table[..24], &table[24..48], &table[48..72]];
            for table in tables {
                run(&mut self.gpu, &self.tokens[..PROMPT], &[PROMPT], table)?;
            }
            let chunks: Vec<(&[u32], usize, &[BlockId])> = tables[..rows]
                .iter()
                .enumerate()
                .map(|(i, table)| (&self.tokens[PROMPT - i..=PROMPT - i], PROMPT - i, *table))
                .collect();
            let first = step(&mut self.gpu, &chunks)?;
            for _ in 0..3 {
                alike = f64::min(alike, same(&step(&mut self.gpu, &chunks)?, &first));
            }
        }
        Ok(alike)
    }

    /// Prompts and decodes in one batch, against the same alone.
    fn together(&mut self) -> Result<f64, String> {
        let table = scattered();
        let tables = [&table[..24], &table[24..48], &table[48..72]];
        let (a, b) = (&self.tokens[..PROMPT], &self.tokens[20..200]);
        run(&mut self.gpu, &a[..200], &[200], tables[0])?;
        run(&mut self.gpu, b, &[180], tables[2])?;
        let chunks: [(&[u32], usize, &[BlockId]); 3] =
            [(&a[200..301], 200, tables[0]), (&self.tokens[50..200], 0, tables[1]), (&[5], 180, tables[2])];
        let together = step(&mut self.gpu, &chunks)?;
        let alone: Result<Vec<_>, _> = chunks
            .iter()
            .map(|chunk| Ok(step(&mut self.gpu, &[*chunk])?.remove(0)))
            .collect::<Result<_, String>>();
        Ok(least_cosine(&together, &alone?))
    }
}

/// Computes a text from its beginning, in steps; the logits of its last token.
fn run(
    subject: &mut Subject,
    tokens: &[u32],
    division: &[usize],
    table: &[BlockId],
) -> Result<Vec<f32>, String> {
    let (mut done, mut last) = (0, Vec::new());
    for count in division.iter().copied() {
        last = step(subject, &[(&tokens[done..done + count], done, table)])?.remove(0);
        done += count;
    }
    assert_eq!(done, tokens.len(), "the division covers the text");
    Ok(last)
}

/// One step over chunks (tokens, first position, blocks); the logits of each.
fn step(subject: &mut Subject, chunks: &[(&[u32], usize, &[BlockId])]) -> Result<Vec<Vec<f32>>, String> {
    let batch: Vec<Chunk<'_>> = chunks
        .iter()
        .map(|(tokens, first_position, blocks)| Chunk {
            tokens,
            first_position: *first_position,
            blocks,
            want: Want::Logits(1),
        })
        .collect();
    let mut logits = Logits::default();
    subject.forward(&batch, &mut logits)?;
    Ok((0..logits.answers()).map(|i| logits.row(i).to_vec()).collect())
}

fn straight() -> Vec<BlockId> {
    (0..BLOCKS as u32).map(BlockId).collect()
}

fn scattered() -> Vec<BlockId> {
    (0..BLOCKS as u32).map(|i| BlockId((i * 37 + 11) % BLOCKS as u32)).collect()
}

/// The first stored prompt of the folder's model.
fn reference_prompt(folder: &Path) -> Option<Vec<u32>> {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("reference.json")).ok()?).ok()?;
    json["prompts"][0]["ids"].as_array()?.iter().map(|id| id.as_u64().map(|id| id as u32)).collect()
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes.as_chunks::<2>().0;
    pairs.iter().map(|pair| f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16)).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    Sampling::greedy().choose(logits, 0)
}

/// Between the log-probabilities of the two best tokens.
fn gap(logits: &[f32]) -> f64 {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    f64::from(sorted[0] - sorted[1])
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn least_cosine(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len(), "as many rows");
    // Not a number must not pass for a large one.
    a.iter().zip(b).map(|(a, b)| cosine(a, b)).fold(1.0, |least, c| if c >= least { least } else { c })
}

/// 1 if all bits are the same.
fn same(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let bits = |rows: &[Vec<f32>]| -> Vec<u32> { rows.iter().flatten().map(|v| v.to_bits()).collect() };
    f64::from(u8::from(bits(a) == bits(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_fails() {
        let rows = [vec![1.0, 2.0]];
        assert!((least_cosine(&rows, &rows) - 1.0).abs() < 1e-12);
        assert!(least_cosine(&[vec![f32::NAN, 1.0]], &rows).is_nan());
        assert!(least_cosine(&[vec![2.0, -1.0]], &rows).abs() < 1e-12);
        assert_eq!((same(&rows, &rows), same(&rows, &[vec![1.0, 2.5]])), (1.0, 0.0));
        assert!((gap(&[1.0, 4.0, 3.5]) - 0.5).abs() < 1e-9);
    }
}
