//! Shapes of models whose weights are random numbers: to measure, and to compare engines.

use super::{AttentionBias, Config, Rope, RopeScaling};

/// A shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// Llama 3.1 8B: 32 layers of 4096, 131,072 tokens of context, 16.1 GB of weights.
    #[value(name = "llama-3-8b")]
    Llama3With8B,
    /// Llama 3.2 1B: 16 layers of 2048, heads of 64, 131,072 tokens of context, 3.0 GB of weights (an output matrix of its
    /// own included).
    #[value(name = "llama-3.2-1b")]
    Llama32With1B,
    /// Four layers of 512 with heads of 128, quick on a processor too.
    #[value(name = "small-128")]
    Small,
}

impl Shape {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama3With8B => "llama-3-8b",
            Self::Llama32With1B => "llama-3.2-1b",
            Self::Small => "small-128",
        }
    }

    /// Name of these very weights.
    pub fn revision(self) -> String {
        format!("random-v1/{}", self.name())
    }

    /// Its dimensions, with the end tokens of `tokenizer` and the tokens that it knows: a tokenizer of fewer tokens than the
    /// shape has will do, and none but its tokens are ever generated.
    pub fn config(self, tokenizer: &Config) -> Config {
        let (layers, hidden_size, intermediate_size, heads, kv_heads, head_dim, vocab_size) = match self {
            Self::Llama3With8B => (32, 4096, 14_336, 32, 8, 128, 128_256),
            Self::Llama32With1B => (16, 2048, 8192, 32, 8, 64, 128_256),
            Self::Small => (4, 512, 1024, 8, 2, 128, 8192),
        };
        let factor = match self {
            Self::Llama3With8B | Self::Small => 8.0,
            Self::Llama32With1B => 32.0,
        };
        Config {
            vocab_size,
            token_count: tokenizer.token_count.min(vocab_size),
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            context_length: 131_072,
            attention_bias: AttentionBias::None,
            head_norm: false,
            norm_epsilon: 1e-5,
            tied_embeddings: false,
            rope: Rope {
                theta: 500_000.0,
                scaling: RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192.0,
                },
            },
            eos_token_ids: tokenizer.eos_token_ids.clone(),
        }
    }
}
