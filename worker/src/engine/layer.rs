//! The weights as the kernels want them.

use rayon::prelude::*;

use super::lanes::widen;
use super::packed::Packed;
use crate::Result;
use crate::model::{AttentionBias, Config, Weights};

/// Weights of one layer.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// Queries, then keys, then values.
    pub(super) qkv: Packed,
    /// In the same order.
    pub(super) qkv_bias: Option<Vec<f32>>,
    /// Of a head's queries, and of a head's keys.
    pub(super) head_norms: Option<[Vec<f32>; 2]>,
    pub(super) out: Packed,
    pub(super) out_bias: Option<Vec<f32>>,
    pub(super) feed_forward_norm: Vec<f32>,
    /// Gate, then up.
    pub(super) gate_up: Packed,
    pub(super) down: Packed,
}

/// Weights of a model, and its table of angles.
pub(super) struct Model {
    pub(super) embedding: Packed,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// `None`: the embedding serves as the output matrix.
    pub(super) head: Option<Packed>,
    /// For each position `head_dim / 2` cosines, then as many sines.
    pub(super) angles: Vec<f32>,
}

impl Model {
    pub(super) fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        // Rows of tokens that no sequence may have are not wanted.
        let matrix = |name: &str| -> Result<Packed> {
            let tensor = weights.tensor(name, &[vocab, hidden])?;
            Ok(Packed::new(&[&tensor.bits[..config.token_count * hidden]], hidden))
        };
        // Some writers store the output matrix of a tied model too; it is the same then.
        let head = if config.tied_embeddings { None } else { Some(matrix("lm_head.weight")?) };
        Ok(Self {
            embedding: matrix("model.embed_tokens.weight")?,
            layers: (0..config.layers).map(|i| Layer::load(config, weights, i)).collect::<Result<_>>()?,
            norm: vector(weights, "model.norm.weight", hidden)?,
            head,
            angles: angles(config),
        })
    }

    /// The matrix from hidden states to logits.
    pub(super) fn head(&self) -> &Packed {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl Layer {
    fn load(config: &Config, weights: &Weights, index: usize) -> Result<Self> {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let bias =
            |part: &str, len: usize| vector(weights, &format!("model.layers.{index}.{part}.bias"), len);
        let packed = |parts: &[(&str, usize)], columns: usize| -> Result<Packed> {
            let tensors = parts
                .iter()
                .map(|(part, rows)| weights.tensor(&name(part), &[*rows, columns]))
                .collect::<Result<Vec<_>>>()?;
            let bits: Vec<&[u16]> = tensors.iter().map(|tensor| &*tensor.bits).collect();
            Ok(Packed::new(&bits, columns))
        };
        Ok(Self {
            attention_norm: vector(weights, &name("input_layernorm"), hidden)?,
            qkv: packed(
                &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
            )?,
            qkv_bias: match config.attention_bias {
                AttentionBias::None => None,
                AttentionBias::Inputs | AttentionBias::All => Some(
                    [
                        bias("self_attn.q_proj", q)?,
                        bias("self_attn.k_proj", kv)?,
                        bias("self_attn.v_proj", kv)?,
                    ]
                    .concat(),
                ),
            },
            head_norms: match config.head_norm {
                true => Some([
                    vector(weights, &name("self_attn.q_norm"), config.head_dim)?,
                    vector(weights, &name("self_attn.k_norm"), config.head_dim)?,
                ]),
                false => None,
            },
            out: packed(&[("self_attn.o_proj", hidden)], q)?,
            out_bias: match config.attention_bias {
                AttentionBias::None | AttentionBias::Inputs => None,
                AttentionBias::All => Some(bias("self_attn.o_proj", hidden)?),
            },
            feed_forward_norm: vector(weights, &name("post_attention_layernorm"), hidden)?,
            gate_up: packed(&[("mlp.gate_proj", wide), ("mlp.up_proj", wide)], hidden)?,
            down: packed(&[("mlp.down_proj", hidden)], wide)?,
        })
    }
}

fn vector(weights: &Weights, name: &str, len: usize) -> Result<Vec<f32>> {
    Ok(weights.tensor(name, &[len])?.bits.iter().map(|bits| widen(*bits)).collect())
}

/// The angle is the f32 product of position and frequency, as in training; its functions are rounded from f64.
pub(super) fn angles(config: &Config) -> Vec<f32> {
    let frequencies = config.rope.frequencies(config.head_dim);
    let half = frequencies.len();
    let mut table = vec![0.0; config.context_length * 2 * half];
    table.par_chunks_mut(2 * half).enumerate().for_each(|(position, row)| {
        let (cosines, sines) = row.split_at_mut(half);
        for ((frequency, cos), sin) in frequencies.iter().zip(cosines).zip(sines) {
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            (*cos, *sin) = (c as f32, s as f32);
        }
    });
    table
}
