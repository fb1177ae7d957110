//! The CPU engine: a Llama over KV blocks that lie in memory of somebody else's choosing.
//!
//! **Invariant (batch invariance).** The KV bytes and the logits of a token are a function of the tokens up to it, and of
//! nothing else: not of chunking, of what else is in the batch, of threads, of instruction set, of block size, nor of
//! which blocks came from a cache. Each kernel has one order of arithmetic per output element; see [`matmul`] and
//! [`attention`]. Activations are f32, weights and KV bf16.
//!
//! This is the part of the crate where `unsafe` is allowed.
#![allow(unsafe_code)]

mod attention;
pub(crate) mod cuda;
mod forward;
mod isa;
mod kv;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
mod layer;
mod matmul;
mod packed;
mod pointwise;

use std::path::Path;

use rayon::ThreadPool;

pub use forward::{Answer, Chunk, Logits, Want};
pub use isa::Isa;
pub use kv::{BlockId, KvLayout, KvMemory};
pub(crate) use pointwise::exponentials;

use crate::model::{Config, OpenModel, Shape};
use crate::{Error, Result};
use attention::Scratch;
use forward::Buffers;
use layer::{Layer, Model};

/// How an [`Engine`] is made.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// Threads that compute; 0: one per processor.
    pub threads: usize,
    /// Instruction set; `None`: the best there is.
    pub isa: Option<Isa>,
    /// Longest sequence, at most that of the model; `None`: that of the model.
    pub context_length: Option<usize>,
    /// What the operator vouches for as the revision; `None`: a digest of the files.
    pub revision: Option<String>,
    /// Random weights of this shape instead of the folder's.
    pub random_weights: Option<Shape>,
}

/// A loaded model and the threads that run it.
pub struct Engine {
    config: Config,
    revision: String,
    isa: Isa,
    pool: ThreadPool,
    model: Model,
    buffers: Buffers,
    scratch: Vec<parking_lot::Mutex<Scratch>>,
}

impl Engine {
    /// Loads the model in `folder`.
    pub fn load(folder: &Path, options: &EngineOptions) -> Result<Self> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.available() {
            return Err(Error::invalid("isa", format!("this processor does not have {isa:?}")));
        }
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |threads| threads.get()),
            threads => threads,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("engine-{i}"))
            .build()
            .map_err(|error| Error::Threads { threads, detail: error.to_string() })?;
        let OpenModel { config, weights, revision } = pool.install(|| OpenModel::open(folder, options))?;
        let model = pool.install(|| Model::load(&config, &weights))?;
        let scratch = (0..threads).map(|_| Default::default()).collect();
        Ok(Self { config, revision, isa, pool, model, buffers: Buffers::default(), scratch })
    }

    /// The model's dimensions; the context length is that of the options if shorter.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The model's revision.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Dimensions of blocks of this model with so many tokens.
    pub fn kv_layout(&self, tokens_per_block: usize) -> KvLayout {
        KvLayout::of(&self.config, tokens_per_block)
    }

    /// Layer weights kept packed, for forward.
    fn layers(&self) -> &[Layer] {
        &self.model.layers
    }
}
