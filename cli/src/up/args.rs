//! What `kvbm up` is told.

use std::path::PathBuf;

use clap::Args;

/// Start a daemon, a holder of its host memory, workers and a frontend on this machine, and keep them running
///
/// Ctrl-C stops all, a second one at once. A part that dies is started again. Settings that are not given here are those
/// of the parts (the daemon's from kvbm.toml, too): see `kvbm daemon --help`, `kvbm worker --help` and `kvbm frontend --help`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// Folder of the model to serve: config.json, tokenizer.json, safetensors [default: the bundled one]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Port of the OpenAI frontend; the next free one if it is taken, 0 for any [default: 8000] [env: DYN_HTTP_PORT]
    #[arg(long, value_name = "N")]
    pub http_port: Option<String>,
    /// Port of the daemon's metrics; the next free one if it is taken, 0 for any [default: 6880]
    /// [env: DYN_KVBM_METRICS_PORT]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub metrics_port: Option<String>,
    /// Where sockets and the disk cache go [default: $XDG_STATE_HOME/kvbm]
    #[arg(long, value_name = "DIR", env = "KVBM_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Host memory for the cache, GB (10^9 bytes), 0 for none [default: 1] [env: DYN_KVBM_CPU_CACHE_GB]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub cpu_cache_gb: Option<String>,
    /// Disk for the cache, GB (10^9 bytes), 0 for none [default: 0] [env: DYN_KVBM_DISK_CACHE_GB]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub disk_cache_gb: Option<String>,
    /// KV pool of each worker, GB (10^9 bytes) [default: 0.25] [env: KVBM_DEVICE_CACHE_GB]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub device_cache_gb: Option<String>,
    /// YAML file of the model, of which kv_cache_retention_config is read: what its blocks are kept like
    #[arg(long, env = "KVBM_WORKER_CONFIG", value_name = "FILE")]
    pub worker_config: Option<PathBuf>,
    /// Over that file.
    #[command(flatten)]
    pub retention: kvbm_worker::RetentionArgs,
    /// Number of workers, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,
    /// Further workers, which only compute prompts, 0 to 64; the others then go on with what those computed
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub prefill_workers: u16,
    /// How the frontend chooses a worker: see `kvbm frontend --help` [default: round-robin] [env: DYN_ROUTER_MODE]
    #[arg(long, value_name = "MODE")]
    pub router_mode: Option<String>,
    /// What the workers compute with: llama, or echo to measure everything else
    #[arg(long, value_name = "NAME", default_value = "llama")]
    pub engine: String,
    /// Start no `kvbm hold`: host memory then ends with the daemon
    #[arg(long)]
    pub no_warm_host: bool,
    /// Print one line of JSON on standard output when everything is ready
    #[arg(long)]
    pub json: bool,
}
