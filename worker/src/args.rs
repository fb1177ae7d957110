//! Flags of `kvbm worker`.

use std::path::PathBuf;

use crate::RetentionArgs;
use crate::model::Shape;

/// Flags of a worker. They are checked when it starts.
#[derive(Debug, Clone, clap::Args)]
pub struct WorkerArgs {
    /// Folder of the model: config.json, tokenizer.json, safetensors
    #[arg(long, env = "KVBM_MODEL_PATH", value_name = "DIR")]
    pub model: PathBuf,
    /// Where it is computed: cpu, cuda:0, the UUID of a GPU, or a place on the PCI bus
    #[arg(long, env = "KVBM_WORKER_DEVICE", default_value = "cpu")]
    pub device: String,
    /// Random weights of this shape instead of the folder's, of which tokenizer and end tokens are used: to measure
    #[arg(long, env = "KVBM_WORKER_RANDOM_WEIGHTS", value_enum, value_name = "SHAPE")]
    pub random_weights: Option<Shape>,
    /// Name under which the model is served [default: name of the folder, or of the shape]
    #[arg(long, env = "KVBM_WORKER_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Revision of the weights that you vouch for [default: a digest of them]
    #[arg(long, env = "KVBM_WORKER_MODEL_REVISION", value_name = "TEXT")]
    pub model_revision: Option<String>,
    /// YAML file of the model, of which kv_cache_retention_config is read: what its blocks are kept like
    #[arg(long, env = "KVBM_WORKER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Over that file.
    #[command(flatten)]
    pub retention: RetentionArgs,
    /// Unix socket of the daemon [default: kvbm.sock in the state directory]
    #[arg(long, env = "KVBM_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Keep the KV in private memory, without any daemon
    #[arg(long)]
    pub no_daemon: bool,
    /// Where to serve: unix:/path or http://host:port, port 0 for any [default: a socket beside the daemon's]
    #[arg(long, env = "KVBM_WORKER_LISTEN", value_name = "ENDPOINT")]
    pub listen: Option<String>,
    /// KV pool, GB (10^9 bytes) [default: 0.25, on a GPU 8]
    #[arg(long, env = "KVBM_DEVICE_CACHE_GB", allow_negative_numbers = true)]
    pub device_cache_gb: Option<f64>,
    /// KV pool, blocks, instead of GB
    #[arg(
        long,
        env = "KVBM_WORKER_DEVICE_CACHE_BLOCKS",
        value_name = "BLOCKS",
        allow_negative_numbers = true
    )]
    pub device_cache_blocks: Option<i64>,
    /// Do not take over the pool that a dead worker left
    #[arg(long)]
    pub fresh_device_pool: bool,
    /// Tokens in one block: 16, 32 or 64
    #[arg(long, env = "KVBM_BLOCK_SIZE", default_value_t = 32, allow_negative_numbers = true)]
    pub block_size: i64,
    /// Most tokens of one step, 1 to 65536, no fewer than --max-batch [default: 512, on a GPU 8192]
    #[arg(long, env = "KVBM_WORKER_MAX_BATCH_TOKENS", allow_negative_numbers = true)]
    pub max_batch_tokens: Option<i64>,
    /// Most sequences that run side by side, 1 to 4096
    #[arg(long, env = "KVBM_WORKER_MAX_BATCH", default_value_t = 64, allow_negative_numbers = true)]
    pub max_batch: i64,
    /// Most requests that wait, 1 to 65536
    #[arg(long, env = "KVBM_WORKER_MAX_WAITING", default_value_t = 1024, allow_negative_numbers = true)]
    pub max_waiting: i64,
    /// Threads that compute, 0 to 1024; 0: one per processor
    #[arg(long, env = "KVBM_WORKER_THREADS", default_value_t = 0, allow_negative_numbers = true)]
    pub threads: i64,
    /// Longest sequence in tokens, at least 2 [default: what the model was made for]
    #[arg(long, env = "KVBM_WORKER_CONTEXT_LENGTH", value_name = "TOKENS", allow_negative_numbers = true)]
    pub context_length: Option<i64>,
    /// What computes
    #[arg(long, env = "KVBM_WORKER_ENGINE", value_enum, default_value_t = EngineKind::Llama)]
    pub engine: EngineKind,
    /// Milliseconds that each step of the engine echo takes, 0 to 60000
    #[arg(long, env = "KVBM_WORKER_ECHO_STEP_MS", default_value_t = 0, value_name = "MS",
          value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub echo_step_ms: u32,
    /// Instruction set of the kernels; all give the same bits
    #[arg(long, env = "KVBM_WORKER_ISA", value_enum, default_value_t = IsaChoice::Auto)]
    pub isa: IsaChoice,
    /// What the worker takes on with a frontend that has --disagg: prefill, decode or both
    #[arg(long, env = "KVBM_WORKER_ROLE", default_value = "both")]
    pub role: String,
    /// Seconds to wait for the daemon at the start, 0 to 86400; after that the worker serves and attaches later
    #[arg(
        long,
        env = "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS",
        default_value_t = 30.0,
        allow_negative_numbers = true
    )]
    pub init_timeout_seconds: f64,
    /// Seconds that running requests are given when the worker stops, 0 to 3600
    #[arg(long, env = "KVBM_DRAIN_SECONDS", default_value_t = 10.0, allow_negative_numbers = true)]
    pub drain_seconds: f64,
    /// Port of /health, /live and /metrics; 0 for any that is free [default: off, as -1]
    #[arg(long, env = "DYN_SYSTEM_PORT", value_name = "PORT", allow_negative_numbers = true)]
    pub system_port: Option<i64>,
    /// Address of that port
    #[arg(long, env = "DYN_SYSTEM_HOST", default_value = "0.0.0.0")]
    pub system_host: String,
    /// Accept LoRA ids although no adapter is applied: they count for keys only
    #[arg(long, hide = true)]
    pub ignore_lora: bool,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineKind {
    /// The model.
    Llama,
    /// Nothing: the prompt is repeated.
    Echo,
}

/// Which instruction set is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum IsaChoice {
    /// The best there is.
    Auto,
    /// AVX-512.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// No vector instructions beyond the target's own.
    Portable,
}
