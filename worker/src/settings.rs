//! The flags, checked before anything is bound or loaded.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvbm_cuda::DeviceName;
use kvbm_hash::RetentionConfig;
use kvbm_shm::PoolLayout;
use tokenizers::Tokenizer;

use crate::listener::Address;
use crate::model::{Config as ModelConfig, Shape};
use crate::{EngineKind, Isa, IsaChoice, KvLayout, Processors, Script, WorkerArgs, WorkerError};

mod retention;

pub use retention::RetentionArgs;

/// Tokens of a step that keep a processor busy, and a GPU.
const CPU_BATCH_TOKENS: i64 = 512;
const GPU_BATCH_TOKENS: i64 = 8192;
/// Pools that nobody asked for, GB.
const CPU_CACHE_GB: f64 = 0.25;
const GPU_CACHE_GB: f64 = 8.0;

/// Settings of a worker that are possible.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub model: PathBuf,
    /// `None`: the processor.
    pub device: Option<DeviceName>,
    /// For drills: a file in which it is noted what bytes blocks have.
    pub kv_witness: Option<PathBuf>,
    pub random_weights: Option<Shape>,
    pub served_name: String,
    pub revision: Option<String>,
    /// `None`: without a daemon.
    pub daemon: Option<kvbm_connector::Config>,
    pub listen: Address,
    pub pool: PoolSize,
    pub tokens_per_block: usize,
    pub max_batch_tokens: usize,
    pub max_batch: usize,
    pub max_waiting: usize,
    pub threads: usize,
    pub context_length: Option<usize>,
    pub engine: EngineKind,
    /// How long a step of the engine echo takes.
    pub echo_step: Duration,
    pub isa: Option<Isa>,
    pub role: String,
    pub drain: Duration,
    /// `None`: no system server.
    pub system: Option<(IpAddr, u16)>,
    pub lora: Lora,
    /// Of requests that say nothing.
    pub retention: Option<RetentionConfig>,
    /// What changes the logits of every request.
    pub processors: Processors,
}

/// How large the pool is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum PoolSize {
    Blocks(u32),
    Gigabytes(f64),
}

/// What becomes of requests that name an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lora {
    Refused,
    /// For tests of keys.
    CountsForKeysOnly,
}

impl Settings {
    /// Checks the flags; `variable` looks into the environment.
    pub fn check(args: WorkerArgs, variable: impl Fn(&str) -> Option<String>) -> Result<Self, WorkerError> {
        let model = model_folder(&args.model)?;
        let device = device(&args.device)?;
        let served_name = match (&args.served_model_name, args.random_weights) {
            (Some(name), _) => name.clone(),
            (None, Some(shape)) => shape.name().into(),
            (None, None) => {
                model.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into())
            }
        };
        if served_name.is_empty() {
            return Err(WorkerError::invalid("--served-model-name", "\"\"", "a name"));
        }
        if ![16, 32, 64].contains(&args.block_size) {
            return Err(WorkerError::invalid("--block-size", args.block_size, "16, 32 or 64"));
        }
        if !["prefill", "decode", "both"].contains(&args.role.as_str()) {
            return Err(WorkerError::invalid("--role", &args.role, "prefill, decode or both"));
        }
        let max_batch = whole("--max-batch", args.max_batch, 1..=4096)?;
        let default_tokens = if device.is_some() { GPU_BATCH_TOKENS } else { CPU_BATCH_TOKENS };
        let max_batch_tokens =
            whole("--max-batch-tokens", args.max_batch_tokens.unwrap_or(default_tokens), 1..=65_536)?;
        if max_batch_tokens < max_batch {
            let expected = format!("at least {max_batch}, one token for each sequence of --max-batch");
            return Err(WorkerError::invalid("--max-batch-tokens", max_batch_tokens, expected));
        }
        let context_length = args.context_length.map(|tokens| whole("--context-length", tokens, 2..=1 << 24));
        let socket = daemon_socket(&args, &variable)?;
        let init_timeout = seconds("--init-timeout-seconds", args.init_timeout_seconds, 86_400.0)?;
        let daemon = socket.as_ref().map(|socket| {
            let config = kvbm_connector::Config {
                client: concat!("kvbm-worker/", env!("CARGO_PKG_VERSION")).into(),
                model: served_name.clone(),
                tokens_per_block: args.block_size as u32,
                fresh: args.fresh_device_pool,
                init_timeout,
                ..kvbm_connector::Config::new(socket)
            };
            config.with_environment(&variable)
        });
        Ok(Self {
            served_name,
            revision: args.model_revision.clone(),
            daemon: daemon.transpose()?,
            listen: listen(&args, socket.as_deref())?,
            pool: pool_size(&args, if device.is_some() { GPU_CACHE_GB } else { CPU_CACHE_GB })?,
            device,
            random_weights: args.random_weights,
            tokens_per_block: args.block_size as usize,
            max_batch_tokens,
            max_batch,
            max_waiting: whole("--max-waiting", args.max_waiting, 1..=65_536)?,
            threads: whole("--threads", args.threads, 0..=1024)?,
            context_length: context_length.transpose()?,
            engine: args.engine,
            echo_step: Duration::from_millis(args.echo_step_ms.into()),
            isa: isa(args.isa)?,
            drain: seconds("--drain-seconds", args.drain_seconds, 3600.0)?,
            system: system(&args)?,
            retention: args.retention.over(args.config.as_deref())?,
            processors: test_processors(&model, &variable)?,
            kv_witness: variable(KV_WITNESS).map(PathBuf::from),
            lora: if args.ignore_lora { Lora::CountsForKeysOnly } else { Lora::Refused },
            role: args.role,
            model,
        })
    }

    /// The model's configuration, with the context length that is asked for.
    pub fn model_config(&self) -> Result<ModelConfig, WorkerError> {
        let loaded = ModelConfig::load(&self.model);
        let mut config =
            loaded.map_err(|source| WorkerError::Model { folder: self.model.clone(), source })?;
        if let Some(shape) = self.random_weights {
            config = shape.config(&config);
        }
        if let Some(context_length) = self.context_length {
            config.context_length = config.context_length.min(context_length);
        }
        Ok(config)
    }

    /// Blocks of this model.
    pub fn kv_layout(&self, model: &ModelConfig) -> KvLayout {
        KvLayout::of(model, self.tokens_per_block)
    }

    /// A pool of so many blocks as fit.
    pub fn pool_layout(&self, kv: KvLayout) -> Result<PoolLayout, WorkerError> {
        let block_bytes = kv.block_bytes();
        let one = PoolLayout { block_bytes, block_count: 1 };
        let block_count = match self.pool {
            PoolSize::Blocks(blocks) => blocks,
            PoolSize::Gigabytes(gb) => {
                let stride = one.stride() as f64;
                let blocks = (gb * 1e9 / stride).floor();
                if blocks < 1.0 {
                    let least = stride / 1e9;
                    let expected = format!("at least {least}, one block of {block_bytes} bytes");
                    return Err(WorkerError::invalid("--device-cache-gb", gb, expected));
                }
                // Saturates far above any memory.
                blocks as u32
            }
        };
        Ok(PoolLayout { block_count, ..one })
    }
}

/// The switches of a test that a worker's processors are run: the present name, and an older one.
const TEST_PROCESSOR: [&str; 2] = ["DYN_ENABLE_TEST_LOGITS_PROCESSOR", "DYNAMO_ENABLE_TEST_LOGITS_PROCESSOR"];

/// For drills: see `witness`.
const KV_WITNESS: &str = "KVBM_TEST_KV_WITNESS";

/// One that says "Hello world!", if that is asked for.
fn test_processors(
    model: &Path,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Processors, WorkerError> {
    if !TEST_PROCESSOR.iter().any(|name| variable(name).is_some_and(|value| value == "1")) {
        return Ok(Processors::default());
    }
    let expected = |error: String| WorkerError::invalid("--model", model.display(), error);
    let path = model.join("tokenizer.json");
    let tokenizer = Tokenizer::from_file(path)
        .map_err(|error| expected(format!("a folder with tokenizer.json ({error})")))?;
    let encoding =
        tokenizer.encode_fast("Hello world!", false).map_err(|error| expected(error.to_string()))?;
    let mut tokens = encoding.get_ids().to_vec();
    let config =
        ModelConfig::load(model).map_err(|source| WorkerError::Model { folder: model.to_owned(), source })?;
    tokens.extend(config.eos_token_ids.first());
    Ok(Processors(vec![std::sync::Arc::new(Script(tokens))]))
}

fn whole(flag: &'static str, value: i64, range: RangeInclusive<i64>) -> Result<usize, WorkerError> {
    match usize::try_from(value) {
        Ok(size) if range.contains(&value) => Ok(size),
        _ => Err(WorkerError::invalid(flag, value, format!("{} to {}", range.start(), range.end()))),
    }
}

fn seconds(flag: &'static str, value: f64, most: f64) -> Result<Duration, WorkerError> {
    if (0.0..=most).contains(&value) {
        return Ok(Duration::from_secs_f64(value));
    }
    Err(WorkerError::invalid(flag, value, format!("0 to {most}")))
}

fn model_folder(path: &Path) -> Result<PathBuf, WorkerError> {
    let expected = || "a folder with config.json";
    let folder = std::fs::canonicalize(path).map_err(|error| {
        WorkerError::invalid("--model", path.display(), format!("{} ({error})", expected()))
    })?;
    if !folder.join("config.json").is_file() {
        return Err(WorkerError::invalid("--model", path.display(), expected()));
    }
    Ok(folder)
}

fn device(text: &str) -> Result<Option<DeviceName>, WorkerError> {
    // A bare number is a GPU to other programs, but no name of a device.
    match text.parse() {
        _ if text == "cpu" => Ok(None),
        Ok(name) if text.parse::<u32>().is_err() => Ok(Some(name)),
        _ => Err(WorkerError::invalid(
            "--device",
            text,
            "cpu, cuda:<number>, GPU-<uuid> or <bus>:<device>.<function>",
        )),
    }
}

fn daemon_socket(
    args: &WorkerArgs,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<PathBuf>, WorkerError> {
    if args.no_daemon {
        return Ok(None);
    }
    if let Some(socket) = &args.socket {
        return Ok(Some(socket.clone()));
    }
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("KVBM_STATE_DIR")
        .or_else(|| set("XDG_STATE_HOME").map(|state| state.join("kvbm")))
        .or_else(|| set("HOME").map(|home| home.join(".local/state/kvbm")));
    match state {
        Some(state) => Ok(Some(state.join("kvbm.sock"))),
        None => Err(WorkerError::invalid("--socket", "(unset)", "the daemon's socket, or --no-daemon")),
    }
}

fn listen(args: &WorkerArgs, daemon_socket: Option<&Path>) -> Result<Address, WorkerError> {
    let Some(text) = &args.listen else {
        let folder = match daemon_socket.map(|socket| socket.parent().unwrap_or(Path::new(""))) {
            Some(folder) => folder.to_path_buf(),
            None => std::env::temp_dir(),
        };
        let path = folder.join(format!("worker-{}.sock", std::process::id()));
        let absolute = std::path::absolute(&path);
        return absolute.map(Address::Unix).map_err(|error| {
            WorkerError::invalid("--listen", format!("unix:{}", path.display()), format!("a path ({error})"))
        });
    };
    let expected = "unix:/path or http://host:port";
    Address::parse(text).ok_or_else(|| WorkerError::invalid("--listen", text, expected))
}

fn pool_size(args: &WorkerArgs, default_gb: f64) -> Result<PoolSize, WorkerError> {
    if let Some(blocks) = args.device_cache_blocks {
        let blocks = whole("--device-cache-blocks", blocks, 1..=1 << 30)?;
        return Ok(PoolSize::Blocks(blocks as u32));
    }
    let gb = args.device_cache_gb.unwrap_or(default_gb);
    if gb > 0.0 && gb <= 65_536.0 {
        return Ok(PoolSize::Gigabytes(gb));
    }
    Err(WorkerError::invalid("--device-cache-gb", gb, "above 0, up to 65536"))
}

fn isa(choice: IsaChoice) -> Result<Option<Isa>, WorkerError> {
    let (isa, name) = match choice {
        IsaChoice::Auto => return Ok(None),
        IsaChoice::Avx512 => (Isa::Avx512, "avx512"),
        IsaChoice::Avx2 => (Isa::Avx2, "avx2"),
        IsaChoice::Portable => (Isa::Portable, "portable"),
    };
    if isa.available() {
        return Ok(Some(isa));
    }
    Err(WorkerError::invalid("--isa", name, "auto, or an instruction set that this processor has"))
}

fn system(args: &WorkerArgs) -> Result<Option<(IpAddr, u16)>, WorkerError> {
    // Below 0 means off, as in other engines.
    let Some(port) = args.system_port.filter(|port| *port != -1) else { return Ok(None) };
    let port = u16::try_from(port)
        .map_err(|_| WorkerError::invalid("--system-port", port, "0 to 65535, or -1 for off"))?;
    let host = args
        .system_host
        .parse()
        .map_err(|_| WorkerError::invalid("--system-host", &args.system_host, "an IP address"))?;
    Ok(Some((host, port)))
}

#[cfg(test)]
mod tests;
