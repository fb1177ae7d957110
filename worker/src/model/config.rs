//! `config.json` and `generation_config.json` of a Llama, or of a model that is one but for details.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Rope, RopeScaling};
use crate::{Error, Result};

/// Dimensions and constants of a model, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of the output matrix.
    pub vocab_size: usize,
    /// Tokens that sequences may have, from 0 on; at most `vocab_size`.
    pub token_count: usize,
    /// Elements of a token's hidden state.
    pub hidden_size: usize,
    /// Elements of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; a divisor of the query heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Longest sequence, in tokens. Not longer than the window of attention: within that, all tokens see all before them.
    pub context_length: usize,
    /// Which projections of attention have a bias.
    pub attention_bias: AttentionBias,
    /// Queries and keys are normalized head by head.
    pub head_norm: bool,
    /// Added to the mean square when normalizing.
    pub norm_epsilon: f32,
    /// The output matrix is the embedding matrix.
    pub tied_embeddings: bool,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
}

/// Which projections of attention have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// None.
    None,
    /// Those of queries, keys and values.
    Inputs,
    /// These and the output's.
    All,
}

/// Architectures that are a Llama but for details.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

const FAMILIES: [(&str, Family); 4] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
];

impl Config {
    /// Reads the configuration of a model folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join("config.json"))?;
        let generation = folder.join("generation_config.json");
        let generation = if generation.exists() { Some(read_json(&generation)?) } else { None };
        Self::parse(&config, generation.as_ref())
    }

    /// Checks a parsed configuration. End tokens are those of `generation` where it names some.
    pub fn parse(config: &Map<String, Value>, generation: Option<&Map<String, Value>>) -> Result<Self> {
        let family = family(config)?;
        refuse_unsupported(config)?;
        let hidden_size = size(config, "hidden_size")?;
        let heads = size(config, "num_attention_heads")?;
        let kv_heads = optional_size(config, "num_key_value_heads")?.unwrap_or(heads);
        let head_dim = match optional_size(config, "head_dim")? {
            Some(head_dim) => head_dim,
            None if family == Family::Qwen3 => 128,
            None => hidden_size / heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(
                "num_key_value_heads",
                format!("{kv_heads} does not divide {heads} heads"),
            ));
        }
        let intermediate_size = size(config, "intermediate_size")?;
        for (field, value) in
            [("hidden_size", hidden_size), ("intermediate_size", intermediate_size), ("head_dim", head_dim)]
        {
            if !value.is_multiple_of(16) {
                return Err(Error::unsupported(field, value, "multiples of 16"));
            }
        }
        let mut eos_token_ids = token_ids(config, "eos_token_id")?;
        if let Some(generation) = generation {
            let ids = token_ids(generation, "eos_token_id")?;
            if !ids.is_empty() {
                eos_token_ids = ids;
            }
        }
        let vocab_size = size(config, "vocab_size")?;
        Ok(Self {
            vocab_size,
            token_count: vocab_size,
            hidden_size,
            intermediate_size,
            layers: size(config, "num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            context_length: context_length(config, family)?,
            attention_bias: attention_bias(config, family)?,
            head_norm: family == Family::Qwen3,
            norm_epsilon: optional_number(config, "rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied_embeddings: optional_flag(config, "tie_word_embeddings")?.unwrap_or(false),
            rope: parse_rope(config)?,
            eos_token_ids,
        })
    }
}

fn family(config: &Map<String, Value>) -> Result<Family> {
    let architectures = config.get("architectures").cloned().unwrap_or(Value::Null);
    let named = |name: &str| architectures.as_array().is_some_and(|names| names.iter().any(|n| n == name));
    match FAMILIES.iter().find(|(name, _)| named(name)) {
        Some((_, family)) => Ok(*family),
        None => {
            let names: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
            Err(Error::unsupported("architectures", architectures, &names.join(", ")))
        }
    }
}

fn attention_bias(config: &Map<String, Value>, family: Family) -> Result<AttentionBias> {
    let said = optional_flag(config, "attention_bias")?.unwrap_or(false);
    match family {
        // Always, whatever the field says.
        Family::Qwen2 => Ok(AttentionBias::Inputs),
        Family::Mistral if said => Err(Error::unsupported("attention_bias", true, "false")),
        Family::Llama | Family::Qwen3 if said => Ok(AttentionBias::All),
        Family::Llama | Family::Qwen3 | Family::Mistral => Ok(AttentionBias::None),
    }
}

/// Positions, or the window of attention if that is shorter.
fn context_length(config: &Map<String, Value>, family: Family) -> Result<usize> {
    let positions = size(config, "max_position_embeddings")?;
    let window = match family {
        Family::Llama => None,
        Family::Mistral => optional_size(config, "sliding_window")?,
        Family::Qwen2 | Family::Qwen3 => match optional_flag(config, "use_sliding_window")? {
            Some(true) => optional_size(config, "sliding_window")?,
            Some(false) | None => None,
        },
    };
    Ok(window.map_or(positions, |window| positions.min(window)))
}

fn refuse_unsupported(config: &Map<String, Value>) -> Result<()> {
    if optional_flag(config, "mlp_bias")? == Some(true) {
        return Err(Error::unsupported("mlp_bias", true, "false"));
    }
    match config.get("hidden_act") {
        None | Some(Value::Null) => {}
        Some(act) if act == "silu" => {}
        Some(act) => return Err(Error::unsupported("hidden_act", act, "silu")),
    }
    match config.get("quantization_config") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(fields)) => {
            let method = fields.get("quant_method").cloned().unwrap_or(Value::Null);
            Err(Error::unsupported("quantization_config", method, "weights that are not quantized"))
        }
        Some(other) => {
            Err(Error::unsupported("quantization_config", other, "weights that are not quantized"))
        }
    }
}

/// The newer form has all in `rope_parameters`, the older `rope_theta` beside an optional `rope_scaling`.
fn parse_rope(config: &Map<String, Value>) -> Result<Rope> {
    let (section, name) = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Some(Value::Object(section)), _) => (Some(section), "rope_parameters"),
        (_, Some(Value::Object(section))) => (Some(section), "rope_scaling"),
        (None | Some(Value::Null), None | Some(Value::Null)) => (None, "rope_scaling"),
        (None | Some(Value::Null), Some(other)) => {
            return Err(Error::invalid("rope_scaling", format!("{other} is not an object")));
        }
        (Some(other), _) => {
            return Err(Error::invalid("rope_parameters", format!("{other} is not an object")));
        }
    };
    let beside = optional_number(config, "rope_theta")?;
    let Some(section) = section else {
        return Ok(Rope { theta: beside.unwrap_or(10_000.0), scaling: RopeScaling::Default });
    };
    let within = |error: Error| match error {
        Error::Invalid { field, detail } => Error::Invalid { field: format!("{name}.{field}"), detail },
        other => other,
    };
    let theta = optional_number(section, "rope_theta").map_err(within)?.or(beside).unwrap_or(10_000.0);
    if let Some(part) = optional_number(section, "partial_rotary_factor").map_err(within)?
        && part != 1.0
    {
        return Err(Error::unsupported(&format!("{name}.partial_rotary_factor"), part, "1"));
    }
    let kind = section.get("rope_type").or_else(|| section.get("type"));
    let number = |field: &str| positive(section, field).map_err(within);
    let scaling = match kind.map(|kind| kind.as_str().unwrap_or("?")) {
        None | Some("default") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear { factor: number("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")?,
        },
        Some(other) => {
            return Err(Error::unsupported(&format!("{name}.rope_type"), other, "default, linear, llama3"));
        }
    };
    Ok(Rope { theta, scaling })
}

pub(super) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let bytes =
        fs::read(path).map_err(|source| Error::Io { op: "read", path: path.to_path_buf(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::Malformed { path: path.to_path_buf(), detail: error.to_string() })
}

fn present<'a>(object: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    object.get(field).filter(|value| !value.is_null())
}

fn optional_size(object: &Map<String, Value>, field: &str) -> Result<Option<usize>> {
    let Some(value) = present(object, field) else { return Ok(None) };
    match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
        Some(n) if n > 0 => Ok(Some(n as usize)),
        _ => Err(Error::invalid(field, format!("{value} is not a positive integer"))),
    }
}

fn size(object: &Map<String, Value>, field: &str) -> Result<usize> {
    optional_size(object, field)?.ok_or_else(|| Error::invalid(field, "is missing"))
}

fn optional_number(object: &Map<String, Value>, field: &str) -> Result<Option<f64>> {
    let Some(value) = present(object, field) else { return Ok(None) };
    value.as_f64().map(Some).ok_or_else(|| Error::invalid(field, format!("{value} is not a number")))
}

fn positive(object: &Map<String, Value>, field: &str) -> Result<f64> {
    match optional_number(object, field)? {
        Some(value) if value > 0.0 => Ok(value),
        Some(value) => Err(Error::invalid(field, format!("{value} is not positive"))),
        None => Err(Error::invalid(field, "is missing")),
    }
}

fn optional_flag(object: &Map<String, Value>, field: &str) -> Result<Option<bool>> {
    let Some(value) = present(object, field) else { return Ok(None) };
    value.as_bool().map(Some).ok_or_else(|| Error::invalid(field, format!("{value} is not true or false")))
}

/// One id, a list of ids, or none.
fn token_ids(object: &Map<String, Value>, field: &str) -> Result<Vec<u32>> {
    let Some(value) = present(object, field) else { return Ok(Vec::new()) };
    let list = match value {
        Value::Array(list) => list.as_slice(),
        single => std::slice::from_ref(single),
    };
    list.iter()
        .map(|id| {
            id.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| Error::invalid(field, format!("{id} is not a token id")))
        })
        .collect()
}

#[cfg(test)]
mod tests;
