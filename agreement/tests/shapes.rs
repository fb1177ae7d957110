//! Each shape of model with random weights: logits against those of another implementation, which is given the same files.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use half::bf16;
use kvbm_worker::{BlockId, Chunk, Engine, EngineOptions, KvMemory, Logits, Want};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};

const VOCAB: usize = 192;
const HIDDEN: usize = 64;
const WIDE: usize = 112;
const LAYERS: usize = 3;
/// Largest difference of a logit, as a share of the largest logit. KV is kept in bf16 here and in f32 there.
const TOLERANCE: f32 = 0.02;

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// Computes `tokens` behind `first_position` and returns the last one's logits.
fn run(engine: &mut Engine, kv: &KvMemory, tokens: &[u32], first_position: usize) -> Vec<f32> {
    let blocks: Vec<BlockId> = (0..kv.block_count() as u32).map(BlockId).collect();
    let mut logits = Logits::default();
    let chunk = Chunk { tokens, first_position, blocks: &blocks, want: Want::Logits(1) };
    engine.forward(kv, &[chunk], &mut logits);
    logits.row(0).to_vec()
}

struct Shape {
    architecture: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Fields of config.json besides the dimensions.
    more: Value,
}

/// All fields that any of the implementations wants.
fn config(shape: &Shape) -> Value {
    let mut config = json!({
        "architectures": [shape.architecture], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false, "sliding_window": 512, "use_sliding_window": false,
        "max_window_layers": LAYERS, "attention_bias": false, "eos_token_id": 1,
    });
    config.as_object_mut().unwrap().extend(shape.more.as_object().unwrap().clone());
    config
}

fn write_model(folder: &Path, shape: &Shape, config: &Value) {
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    if config["tie_word_embeddings"] == false {
        tensors.push(("lm_head.weight".into(), vec![VOCAB, HIDDEN]));
    }
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()))
        };
        for (name, rows, columns) in [
            ("self_attn.q_proj", q, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, q),
            ("mlp.gate_proj", WIDE, HIDDEN),
            ("mlp.up_proj", WIDE, HIDDEN),
            ("mlp.down_proj", HIDDEN, WIDE),
        ] {
            add(&format!("{name}.weight"), &[rows, columns]);
            let inputs = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].contains(&name);
            let biased = config["attention_bias"] == true && name.starts_with("self_attn");
            if biased || (inputs && shape.architecture == "Qwen2ForCausalLM") {
                add(&format!("{name}.bias"), &[rows]);
            }
        }
        add("input_layernorm.weight", &[HIDDEN]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
        if shape.architecture == "Qwen3ForCausalLM" {
            add("self_attn.q_norm.weight", &[shape.head_dim]);
            add("self_attn.k_norm.weight", &[shape.head_dim]);
        }
    }
    let mut random = Random(7);
    let filled: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let centre = if name.contains("norm") { 1.0 } else { 0.0 };
            let bytes = (0..shape.iter().product()).flat_map(|_| {
                let uniform = random.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0;
                bf16::from_f32(centre + 0.25 * uniform).to_le_bytes()
            });
            (name, shape.clone(), bytes.collect())
        })
        .collect();
    let views: HashMap<&str, TensorView<'_>> = filled
        .iter()
        .map(|(name, shape, bytes)| {
            (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
        })
        .collect();
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// Logits behind some tokens, as the other implementation has them.
fn reference(folder: &Path, shape: &Shape, config: &Value, tokens: &[u32]) -> Vec<f32> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
    let input = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let config = config.clone();
    let logits = match shape.architecture {
        "LlamaForCausalLM" => {
            let config: llama::LlamaConfig = serde_json::from_value(config).unwrap();
            let config = config.into_config(false);
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            llama::Llama::load(weights, &config).unwrap().forward(&input, 0, &mut cache)
        }
        "MistralForCausalLM" => {
            let config: mistral::Config = serde_json::from_value(config).unwrap();
            mistral::Model::new(&config, weights).unwrap().forward(&input, 0)
        }
        "Qwen2ForCausalLM" => {
            let config: qwen2::Config = serde_json::from_value(config).unwrap();
            qwen2::ModelForCausalLM::new(&config, weights).unwrap().forward(&input, 0)
        }
        _ => {
            let config: qwen3::Config = serde_json::from_value(config).unwrap();
            qwen3::ModelForCausalLM::new(&config, weights).unwrap().forward(&input, 0)
        }
    };
    logits.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn agrees(shape: &Shape) {
    let folder = tempfile::tempdir().unwrap();
    let config = config(shape);
    write_model(folder.path(), shape, &config);
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    let mut engine = Engine::load(folder.path(), &options).unwrap();
    let kv = KvMemory::private(engine.kv_layout(16), 16);
    let mut random = Random(3);
    let tokens: Vec<u32> = (0..200).map(|_| random.below(VOCAB) as u32).collect();
    let (mut done, mut worst) = (0, 0.0f32);
    for count in [1, 2, 17, 64, 65, 199, 200] {
        let ours = run(&mut engine, &kv, &tokens[done..count], done);
        done = count;
        let theirs = reference(folder.path(), shape, &config, &tokens[..count]);
        let largest = theirs.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
        let difference =
            ours.iter().zip(&theirs).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / largest;
        worst = worst.max(difference);
        assert!(difference < TOLERANCE, "{} behind {count} tokens: {difference}", shape.architecture);
        let best = argmax(&theirs) as usize;
        let gap = theirs.iter().enumerate().filter(|(token, _)| *token != best);
        let gap = theirs[best] - gap.fold(f32::MIN, |most, (_, logit)| most.max(*logit));
        assert!(gap < 2.0 * TOLERANCE * largest || argmax(&ours) as usize == best);
    }
    println!("{} {}: largest difference {worst:.5} of the largest logit", shape.architecture, shape.more);
}

fn shape(architecture: &'static str, more: Value) -> Shape {
    Shape { architecture, heads: 4, kv_heads: 2, head_dim: 16, more }
}

#[test]
fn llama_agrees() {
    agrees(&shape("LlamaForCausalLM", json!({})));
    agrees(&shape("LlamaForCausalLM", json!({ "tie_word_embeddings": true })));
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64 });
    agrees(&shape("LlamaForCausalLM", json!({ "rope_scaling": scaling, "rope_theta": 500_000.0 })));
}

#[test]
fn mistral_agrees() {
    agrees(&shape("MistralForCausalLM", json!({ "rope_theta": 1_000_000.0 })));
    // Heads that are wider together than the hidden state; a window that is not reached.
    let wide = Shape { head_dim: 32, ..shape("MistralForCausalLM", json!({ "sliding_window": 256 })) };
    agrees(&wide);
}

#[test]
fn qwen2_agrees() {
    agrees(&shape("Qwen2ForCausalLM", json!({})));
    agrees(&shape("Qwen2ForCausalLM", json!({ "tie_word_embeddings": true, "rope_theta": 1_000_000.0 })));
}

#[test]
fn qwen3_agrees() {
    agrees(&shape("Qwen3ForCausalLM", json!({})));
    let biased = json!({ "attention_bias": true, "tie_word_embeddings": true, "rms_norm_eps": 1e-6 });
    agrees(&Shape { head_dim: 32, ..shape("Qwen3ForCausalLM", biased) });
}
