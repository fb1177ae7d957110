//! The weights on the GPU, row-major bf16.

use half::bf16;
use kvbm_cuda::{DeviceMemory, DeviceRange};

use super::bytes::bytes;
use super::device::allocate;
use super::kernels::{FillRandom, Kernels};
use crate::Result;
use crate::engine::layer::angles;
use crate::model::{Config, Origin, Weights};

/// A matrix of outputs by inputs.
pub(super) struct WeightMatrix {
    memory: DeviceMemory,
    pub rows: usize,
    pub columns: usize,
}

impl WeightMatrix {
    pub fn address(&self) -> u64 {
        self.memory.address().0
    }
}

/// Weights of one layer.
pub(super) struct DeviceLayer {
    pub attention_norm: DeviceMemory,
    /// Queries, then keys, then values.
    pub qkv: WeightMatrix,
    pub out: WeightMatrix,
    pub feed_forward_norm: DeviceMemory,
    /// Gate, then up.
    pub gate_up: WeightMatrix,
    pub down: WeightMatrix,
}

/// Weights of a model, and its table of angles.
pub(super) struct DeviceModel {
    pub embedding: WeightMatrix,
    pub layers: Vec<DeviceLayer>,
    pub norm: DeviceMemory,
    /// `None`: the embedding serves as the output matrix.
    head: Option<WeightMatrix>,
    /// f32; for each position `head_dim / 2` cosines, then as many sines.
    pub angles: DeviceMemory,
}

impl DeviceModel {
    /// Uploads the weights, or makes them where they are to be.
    pub fn load(kernels: &Kernels, config: &Config, weights: &Weights) -> Result<Self> {
        let loader = Loader { kernels, weights };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let head = match config.tied_embeddings {
            true => None,
            false => Some(loader.matrix(&[("lm_head.weight", vocab)], hidden)?),
        };
        let layers = (0..config.layers).map(|i| loader.layer(config, i)).collect::<Result<_>>()?;
        let table = angles(config);
        let on_device = allocate(kernels.stream().context(), "angles", size_of_val(&table[..]))?;
        on_device.write(0, bytes(&table))?;
        let model = Self {
            embedding: loader.matrix(&[("model.embed_tokens.weight", vocab)], hidden)?,
            layers,
            norm: loader.vector("model.norm.weight", hidden)?,
            head,
            angles: on_device,
        };
        kernels.stream().synchronize()?;
        Ok(model)
    }

    /// The matrix from hidden states to logits.
    pub fn head(&self) -> &WeightMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Fills the GPU's memory from a source of weights.
struct Loader<'a> {
    kernels: &'a Kernels,
    weights: &'a Weights,
}

impl Loader<'_> {
    fn layer(&self, config: &Config, index: usize) -> Result<DeviceLayer> {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let [q_name, k_name, v_name] = ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj")));
        Ok(DeviceLayer {
            attention_norm: self.vector(&name("input_layernorm"), hidden)?,
            qkv: self.matrix(&[(&q_name, q), (&k_name, kv), (&v_name, kv)], hidden)?,
            out: self.matrix(&[(&name("self_attn.o_proj"), hidden)], q)?,
            feed_forward_norm: self.vector(&name("post_attention_layernorm"), hidden)?,
            gate_up: self.matrix(&[(&name("mlp.gate_proj"), wide), (&name("mlp.up_proj"), wide)], hidden)?,
            down: self.matrix(&[(&name("mlp.down_proj"), hidden)], wide)?,
        })
    }

    /// Matrices of the same number of columns, stacked on each other.
    fn matrix(&self, parts: &[(&str, usize)], columns: usize) -> Result<WeightMatrix> {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        let memory = allocate(self.kernels.stream().context(), "weights", rows * columns * 2)?;
        let mut at = 0;
        for (name, rows) in parts {
            self.fill(&memory, at, name, &[*rows, columns])?;
            at += rows * columns * 2;
        }
        Ok(WeightMatrix { memory, rows, columns })
    }

    fn vector(&self, name: &str, len: usize) -> Result<DeviceMemory> {
        let memory = allocate(self.kernels.stream().context(), "weights", len * 2)?;
        self.fill(&memory, 0, name, &[len])?;
        Ok(memory)
    }

    fn fill(&self, memory: &DeviceMemory, offset: usize, name: &str, shape: &[usize]) -> Result<()> {
        let count: usize = shape.iter().product();
        assert!(offset + count * 2 <= memory.bytes(), "a tensor fits its matrix");
        match self.weights.origin(name, shape)? {
            Origin::Bits(bits) => Ok(memory.write(offset, bytes(&bits))?),
            Origin::Ones => Ok(memory.write(offset, bytes(&vec![bf16::ONE.to_bits(); count]))?),
            Origin::Random(tensor) => {
                let to = memory.address().plus(offset).0;
                let (seed, scale) = (tensor.seed, tensor.scale);
                let arguments = FillRandom { to, count: count as u64, seed, scale, unused: 0 };
                // SAFETY: the elements lie within the memory, which `load` keeps until the stream is idle, unless the
                // loading fails: freeing memory waits for what was issued.
                Ok(unsafe { self.kernels.fill_random(&arguments) }?)
            }
        }
    }
}
