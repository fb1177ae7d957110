//! `kvbm bench engine`: how fast the worker's engine computes, and whether it computes the right thing.

mod check;
mod speed;
mod subject;

use std::path::PathBuf;

use clap::Args;
use kvbm_worker::model::Shape;

use super::Row;

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Where it is computed: cpu, cuda:0, GPU-<uuid>
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Folder of a model, for its weights, or for its end tokens if they are random
    #[arg(long, env = "KVBM_MODEL_PATH", default_value = "models/tiny", value_name = "DIR")]
    model: PathBuf,
    /// Random weights of this shape; none: the folder's [default: llama-3-8b on a GPU, none on a processor]
    #[arg(long, value_name = "SHAPE|none")]
    random_weights: Option<String>,
    /// Tokens of one block: 16, 32 or 64
    #[arg(long, default_value_t = 32)]
    block_size: usize,
    /// Lengths of prompts, tokens
    #[arg(long, value_delimiter = ',', default_values_t = [2048, 8192, 32_768])]
    prompts: Vec<usize>,
    /// Sequences that decode side by side
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32])]
    batches: Vec<usize>,
    /// Tokens of each sequence that decodes
    #[arg(long, default_value_t = 2048)]
    context: usize,
    /// Most tokens of one step
    #[arg(long, default_value_t = 8192)]
    chunk: usize,
    /// Do not measure: compare a GPU's logits, KV and continuations with the CPU engine's, on the folder's model and on
    /// random weights, and chunked prefill, scattered blocks and batches with the plain case. Exit code 1 on a difference
    #[arg(long)]
    pub(super) check: bool,
}

pub(super) fn measure(args: &EngineArgs) -> Result<Vec<Row>, String> {
    if ![16, 32, 64].contains(&args.block_size) {
        return Err(format!("--block-size {}: expected 16, 32 or 64", args.block_size));
    }
    let tokens = [("--chunk", args.chunk), ("--context", args.context)];
    if let Some((flag, _)) = tokens.into_iter().find(|(_, tokens)| *tokens == 0) {
        return Err(format!("{flag} 0: expected at least 1"));
    }
    if args.check {
        return check::measure(args);
    }
    speed::measure(args)
}

impl EngineArgs {
    fn is_cpu(&self) -> bool {
        self.device == "cpu"
    }

    fn shape(&self) -> Result<Option<Shape>, String> {
        match self.random_weights.as_deref() {
            None if self.is_cpu() => Ok(None),
            None => Ok(Some(Shape::Llama3With8B)),
            Some("none") => Ok(None),
            Some(name) => <Shape as clap::ValueEnum>::from_str(name, false).map(Some).map_err(|_| {
                format!("--random-weights {name}: expected none, or a shape of kvbm worker --help")
            }),
        }
    }
}
