use serde_json::json;

use super::*;

fn llama() -> Map<String, Value> {
    let Value::Object(config) = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 1,
        "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
    }) else {
        unreachable!()
    };
    config
}

fn with(changes: Value) -> Map<String, Value> {
    let mut config = llama();
    for (field, value) in changes.as_object().unwrap() {
        config.insert(field.clone(), value.clone());
    }
    config
}

fn parse(changes: Value) -> Result<Config> {
    Config::parse(&with(changes), None)
}

#[test]
fn absent_fields_have_their_defaults() {
    let mut config = llama();
    config.remove("num_key_value_heads");
    config.remove("rope_parameters");
    let config = Config::parse(&config, None).unwrap();
    assert_eq!((config.kv_heads, config.head_dim, config.tied_embeddings), (4, 64, false));
    assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::Default });
    assert_eq!(parse(json!({"head_dim": 32})).unwrap().head_dim, 32);
}

#[test]
fn new_and_old_rope_fields_mean_the_same() {
    assert_eq!(parse(json!({})).unwrap().rope.theta, 20_000.0);
    let llama3 = json!({"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let mut within = llama3.clone();
    within["rope_theta"] = json!(500_000.0);
    let new = parse(json!({"rope_parameters": within})).unwrap();
    let old =
        parse(json!({"rope_parameters": null, "rope_theta": 500_000.0, "rope_scaling": llama3})).unwrap();
    assert_eq!(new, old);
    assert!(matches!(new.rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
    let linear = parse(
        json!({"rope_parameters": null, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}),
    );
    assert_eq!(linear.unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn end_tokens_are_one_or_many_and_generation_config_wins() {
    assert_eq!(parse(json!({})).unwrap().eos_token_ids, vec![1]);
    assert_eq!(parse(json!({"eos_token_id": [5, 6]})).unwrap().eos_token_ids, vec![5, 6]);
    assert_eq!(parse(json!({"eos_token_id": null})).unwrap().eos_token_ids, Vec::<u32>::new());
    let generation = json!({"eos_token_id": [7, 8]});
    let config = Config::parse(&llama(), generation.as_object()).unwrap();
    assert_eq!(config.eos_token_ids, vec![7, 8]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (changes, field) in [
        (json!({"architectures": ["GemmaForCausalLM"]}), "architectures"),
        (json!({"architectures": ["Qwen3MoeForCausalLM"]}), "architectures"),
        (json!({"architectures": null}), "architectures"),
        (json!({"architectures": ["MistralForCausalLM"], "attention_bias": true}), "attention_bias"),
        (json!({"architectures": ["MistralForCausalLM"], "sliding_window": "wide"}), "sliding_window"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"hidden_act": "gelu"}), "hidden_act"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "quantization_config"),
        (json!({"hidden_size": 250}), "hidden_size"),
        (json!({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}), "rope_parameters.rope_type"),
        (
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            "partial_rotary_factor",
        ),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
        (json!({"vocab_size": "many"}), "vocab_size"),
        (json!({"rope_parameters": null, "rope_scaling": {"type": "llama3"}}), "rope_scaling.factor"),
        (json!({"eos_token_id": "</s>"}), "eos_token_id"),
    ] {
        let message = parse(changes).unwrap_err().to_string();
        assert!(message.contains(field), "{message} names {field}");
    }
    let mut config = llama();
    config.remove("vocab_size");
    assert!(Config::parse(&config, None).unwrap_err().to_string().contains("vocab_size: is missing"));
}

#[test]
fn relatives_differ_in_details() {
    let of = |architecture: &str, changes: Value| {
        let mut changes = changes;
        changes["architectures"] = json!([architecture]);
        let config = parse(changes).unwrap();
        (config.attention_bias, config.head_norm, config.head_dim, config.context_length)
    };
    use AttentionBias::{All, Inputs, None};
    assert_eq!(of("LlamaForCausalLM", json!({"sliding_window": 512})), (None, false, 64, 4096));
    assert_eq!(of("LlamaForCausalLM", json!({"attention_bias": true})), (All, false, 64, 4096));
    assert_eq!(of("MistralForCausalLM", json!({"sliding_window": null})), (None, false, 64, 4096));
    assert_eq!(of("MistralForCausalLM", json!({"sliding_window": 512})), (None, false, 64, 512));
    assert_eq!(
        of("MistralForCausalLM", json!({"sliding_window": 8192, "head_dim": 32})),
        (None, false, 32, 4096)
    );
    let unused = json!({"use_sliding_window": false, "sliding_window": 512});
    assert_eq!(of("Qwen2ForCausalLM", unused), (Inputs, false, 64, 4096));
    let used = json!({"use_sliding_window": true, "sliding_window": 512});
    assert_eq!(of("Qwen2ForCausalLM", used), (Inputs, false, 64, 512));
    assert_eq!(of("Qwen3ForCausalLM", json!({})), (None, true, 128, 4096));
    assert_eq!(of("Qwen3ForCausalLM", json!({"head_dim": 64})), (None, true, 64, 4096));
}
