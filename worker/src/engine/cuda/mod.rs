//! The CUDA engine: a Llama on a GPU, over KV blocks in the GPU's memory.
//!
//! ```text
//! batch -> Step (lists, one upload) -> embed -> layers: normalize, product, rotate_store, attend, product,
//!                                                       normalize, product, activate, product
//!                                   -> normalize, product -> largest -> tokens, or logits, back to the host
//! ```
//!
//! Weights, KV and what passes between kernels are bf16; sums, the hidden states and logits f32. Unlike the CPU engine it
//! is not batch-invariant: cuBLAS chooses its order of summation by the size of a product. So its KV has a base namespace
//! of its own.
//!
//! A step that only decodes is recorded as a graph when its shape comes the second time: launching some 300 kernels one by
//! one takes longer than the GPU needs for them.

mod activations;
mod bytes;
mod ceilings;
mod device;
mod forward;
mod graphs;
mod host;
mod kernels;
mod pool;
mod products;
mod step;
mod weights;

use std::path::Path;

use kvbm_cuda::copy_engine::StepWords;
use kvbm_cuda::{Context, DeviceName, Driver};

pub use ceilings::Ceilings;
pub use pool::DevicePool;

use crate::model::{AttentionBias, Config, OpenModel};
use crate::{EngineOptions, Error, KvLayout, Logits, Model, Result};
use activations::Activations;
use graphs::Graphs;
use host::HostLists;
use kernels::Kernels;
use weights::DeviceModel;

use super::Chunk;

/// Oldest GPUs that the kernels run on: A100 and later.
const CAPABILITY_MIN: (u32, u32) = (8, 0);

/// The largest batch that an engine will be given; memory for it is allocated once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Tokens.
    pub tokens: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of which something is wanted, one of each sequence at least.
    pub answers: usize,
    /// Tokens of a block: 16, 32 or 64.
    pub tokens_per_block: usize,
}

/// A loaded model on a GPU.
pub struct CudaEngine {
    config: Config,
    revision: String,
    limits: BatchLimits,
    context: Context,
    graphs: Graphs,
    kernels: Kernels,
    model: DeviceModel,
    activations: Activations,
    lists: HostLists,
    steps: Option<StepWords>,
}

impl CudaEngine {
    /// Loads the model in `folder` onto a GPU. Threads and instruction set of the options do not matter.
    pub fn load(
        device: &DeviceName,
        folder: &Path,
        options: &EngineOptions,
        limits: BatchLimits,
    ) -> Result<Self> {
        // First of all, so that what is missing is told at once.
        let driver = Driver::load()?;
        let device = driver.device(device)?;
        let OpenModel { config, weights, revision } = OpenModel::open(folder, options)?;
        let refuse = |detail: String| Error::Device { device: device.name.clone(), detail };
        if device.capability < CAPABILITY_MIN {
            let (major, minor) = device.capability;
            return Err(refuse(format!("it has compute capability {major}.{minor}, the kernels need 8.0")));
        }
        check_shape(&config).map_err(refuse)?;
        assert!(limits.tokens >= limits.sequences && limits.sequences > 0, "a batch has a token of each");
        assert!(limits.answers >= limits.sequences, "a batch has an answer to each");
        let context = Context::open(&driver, &device)?;
        let kernels = Kernels::load(&driver, &context, config.head_dim)?;
        tracing::info!(
            device = device.name,
            uuid = device.uuid,
            cuda = driver.version(),
            blas = %kernels.blas.library().display(),
            "computing on a GPU"
        );
        let model = DeviceModel::load(&kernels, &config, &weights)?;
        let activations = Activations::allocate(&context, &config, limits)?;
        let lists = HostLists::allocate(&context, &config, limits)?;
        let graphs = Graphs::new(limits.sequences);
        Ok(Self {
            config,
            revision,
            limits,
            context,
            graphs,
            kernels,
            model,
            activations,
            lists,
            steps: None,
        })
    }

    /// The model's dimensions; the context length is that of the options if shorter.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The model's revision.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The GPU.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Tells from now on, in shared words, when steps begin and end: by them, whoever copies blocks of this GPU in the
    /// background is paced.
    pub fn publish_steps(&mut self, words: StepWords) {
        words.reset();
        self.steps = Some(words);
    }

    /// Dimensions of blocks of this model.
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout::of(&self.config, self.limits.tokens_per_block)
    }
}

/// What the kernels cannot compute.
fn check_shape(config: &Config) -> Result<(), String> {
    let group = config.heads / config.kv_heads;
    if config.attention_bias != AttentionBias::None {
        return Err(
            "the model's attention has biases, for which there is no kernel; use the processor".into()
        );
    }
    if config.head_norm {
        return Err("the model normalizes its heads, for which there is no kernel; use the processor".into());
    }
    if !Kernels::HEAD_DIMS.contains(&config.head_dim) {
        return Err(format!("the model's head_dim is {}, there are kernels for 64 and 128", config.head_dim));
    }
    if group > Kernels::GROUP_MAX {
        return Err(format!(
            "{group} query heads share one of keys, the kernels take up to {}",
            Kernels::GROUP_MAX
        ));
    }
    Ok(())
}

/// The engine with its memory.
pub struct CudaLlama {
    /// The engine.
    pub engine: CudaEngine,
    /// The memory its blocks are in.
    pub pool: DevicePool,
}

impl Model for CudaLlama {
    fn forward(&mut self, batch: &[Chunk<'_>], logits: &mut Logits) -> Result<()> {
        self.engine.forward(&self.pool, batch, logits)
    }
}
