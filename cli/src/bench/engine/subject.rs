//! An engine with memory for blocks, on a processor or on a GPU.

use std::path::Path;

use kvbm_worker::model::{Config, Shape};
use kvbm_worker::{
    BatchLimits, BlockId, Chunk, CudaEngine, CudaLlama, DevicePool, Engine, EngineOptions, KvMemory, Llama,
    Logits, Model,
};

/// See the module.
pub(super) enum Subject {
    Cpu(Box<Llama>),
    Cuda(Box<CudaLlama>),
}

/// What is loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub folder: &'a Path,
    pub shape: Option<Shape>,
}

impl Subject {
    /// On a processor.
    pub fn cpu(source: Source<'_>, limits: BatchLimits, blocks: usize) -> Result<Self, String> {
        let engine = Engine::load(source.folder, &source.options()).map_err(|error| error.to_string())?;
        let kv = KvMemory::private(engine.kv_layout(limits.tokens_per_block), blocks);
        Ok(Self::Cpu(Box::new(Llama { engine, kv })))
    }

    /// On a GPU.
    pub fn cuda(
        device: &str,
        source: Source<'_>,
        limits: BatchLimits,
        blocks: usize,
    ) -> Result<Self, String> {
        let load = || -> kvbm_worker::Result<CudaLlama> {
            let engine = CudaEngine::load(&device.parse()?, source.folder, &source.options(), limits)?;
            let pool = DevicePool::private(&engine, blocks)?;
            Ok(CudaLlama { engine, pool })
        };
        load().map(|llama| Self::Cuda(Box::new(llama))).map_err(|error| error.to_string())
    }

    pub fn config(&self) -> &Config {
        match self {
            Self::Cpu(llama) => llama.engine.config(),
            Self::Cuda(llama) => llama.engine.config(),
        }
    }

    pub fn forward(&mut self, batch: &[Chunk<'_>], logits: &mut Logits) -> Result<(), String> {
        match self {
            Self::Cpu(llama) => llama.forward(batch, logits),
            Self::Cuda(llama) => llama.forward(batch, logits),
        }
        .map_err(|error| error.to_string())
    }

    /// A block's bytes.
    pub fn block(&self, block: BlockId) -> Result<Vec<u8>, String> {
        match self {
            Self::Cpu(llama) => Ok(llama.kv.read_block(block)),
            Self::Cuda(llama) => llama.pool.read_block(block).map_err(|error| error.to_string()),
        }
    }

    /// Where it computes, in words.
    pub fn place(&self) -> String {
        match self {
            Self::Cpu(llama) => format!("{} threads, {:?}", llama.engine.threads(), llama.engine.isa()),
            Self::Cuda(llama) => llama.engine.context().device().name.clone(),
        }
    }
}

impl Source<'_> {
    fn options(&self) -> EngineOptions {
        // Nothing is kept under this name.
        let revision = self.shape.is_none().then(|| "bench".to_owned());
        EngineOptions { revision, random_weights: self.shape, ..EngineOptions::default() }
    }

    /// Its name in figures.
    pub fn name(&self) -> String {
        match self.shape {
            Some(shape) => shape.name().into(),
            None => {
                self.folder.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into())
            }
        }
    }
}
