//! What `kvbm up` is told.

use std::path::PathBuf;

use clap::Args;

/// Start a daemon, workers and a frontend on this machine, and keep them running
///
/// Ctrl-C stops all. A part that dies is started again. Every other setting of the parts is taken from the environment:
/// see `kvbm daemon --help`, `kvbm worker --help` and `kvbm frontend --help`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// Folder of the model to serve: config.json, tokenizer.json, safetensors [default: the bundled one]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Port of the OpenAI frontend, 0 for any that is free
    #[arg(long, value_name = "N", default_value_t = 8000)]
    pub http_port: u16,
    /// Port of the daemon's metrics; the next free one if it is taken, 0 for any
    #[arg(long, value_name = "N", env = "DYN_KVBM_METRICS_PORT", default_value_t = 6880)]
    pub metrics_port: u16,
    /// Where sockets, logs and the disk cache go [default: $XDG_STATE_HOME/kvbm]
    #[arg(long, value_name = "DIR", env = "KVBM_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Host memory for the cache, GB (10^9 bytes), 0 for none
    #[arg(long, value_name = "F", env = "DYN_KVBM_CPU_CACHE_GB", default_value_t = 1.0)]
    pub cpu_cache_gb: f64,
    /// Disk for the cache, GB (10^9 bytes), 0 for none
    #[arg(long, value_name = "F", env = "DYN_KVBM_DISK_CACHE_GB", default_value_t = 0.0)]
    pub disk_cache_gb: f64,
    /// KV pool of each worker, GB (10^9 bytes)
    #[arg(long, value_name = "F", env = "KVBM_DEVICE_CACHE_GB", default_value_t = 0.25)]
    pub device_cache_gb: f64,
    /// Number of workers, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,
    /// What the workers compute with: llama, or echo to measure everything else
    #[arg(long, value_name = "NAME", default_value = "llama")]
    pub engine: String,
    /// Print one line of JSON on standard output when everything is ready
    #[arg(long)]
    pub json: bool,
}
