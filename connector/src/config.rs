//! What an engine says about itself and how patient it is.

use std::path::PathBuf;
use std::time::Duration;

use kvbm_proto::v1;
use thiserror::Error;

/// Settings of a [`crate::DeviceCache`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The daemon's gRPC socket; the side channel is beside it, with `.fd` appended.
    pub socket: PathBuf,
    /// Name and version of the engine, for status and logs.
    pub client: String,
    /// Tenant label of the namespaces this engine registers.
    pub tenant: String,
    /// Model label of the namespaces this engine registers.
    pub model: String,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Where the pool's blocks are: `cpu:0`, or the UUID of a GPU, as in `GPU-...`.
    pub device: String,
    /// Do not take over the pool that a dead worker left.
    pub fresh: bool,
    /// How long the start waits for the daemon before it goes on without.
    pub init_timeout: Duration,
    /// How long a lookup waits for the daemon before it counts as no match.
    pub match_deadline: Duration,
    /// How long any answer may be missing before the engine goes on alone.
    pub detach_after: Duration,
    /// What a copy may take besides, for each MiB it moves.
    pub onboard_per_mib: Duration,
    /// How long a lookup waits for blocks that are on disk, and what it waits besides for each MiB of them.
    pub disk_wait_base: Duration,
    /// See `disk_wait_base`.
    pub disk_wait_per_mib: Duration,
    /// The longest such wait; zero: lookups do not wait for the disk.
    pub disk_wait_max: Duration,
    /// How long after such a wait the daemon may still owe the answer before the engine goes on alone: it answers when
    /// a drive has delivered or failed, and drives take their time.
    pub disk_fail_after: Duration,
    /// How long connecting, or handing the pool over, may take.
    pub attach_deadline: Duration,
    /// First and longest pause between attempts to connect.
    pub reconnect_pause: (Duration, Duration),
    /// Blocks to keep granted in advance, at most an eighth of the pool.
    pub stash_blocks_max: u32,
}

/// An environment variable that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("read {name}={value}: expected whole milliseconds from {min} to {max}")]
pub struct InvalidSetting {
    /// The variable.
    pub name: &'static str,
    /// What it is set to.
    pub value: String,
    /// Least permitted value.
    pub min: u64,
    /// Largest permitted value.
    pub max: u64,
}

impl Config {
    /// The defaults, for the daemon at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            client: concat!("kvbm-connector/", env!("CARGO_PKG_VERSION")).into(),
            tenant: String::new(),
            model: String::new(),
            tokens_per_block: 32,
            device: "cpu:0".into(),
            fresh: false,
            init_timeout: Duration::from_secs(10),
            match_deadline: Duration::from_millis(20),
            detach_after: Duration::from_millis(250),
            onboard_per_mib: Duration::from_millis(1),
            disk_wait_base: Duration::from_millis(250),
            disk_wait_per_mib: Duration::from_millis(2),
            disk_wait_max: Duration::from_secs(10),
            disk_fail_after: Duration::from_secs(60),
            attach_deadline: Duration::from_secs(1),
            reconnect_pause: (Duration::from_millis(20), Duration::from_millis(250)),
            stash_blocks_max: 32,
        }
    }

    /// Takes `KVBM_MATCH_DEADLINE_MS`, `KVBM_DETACH_AFTER_MS`, `KVBM_CONNECTOR_DISK_WAIT_BASE_MS`, `KVBM_CONNECTOR_DISK_WAIT_PER_MIB_MS` and
    /// `KVBM_CONNECTOR_DISK_WAIT_MAX_MS` from `variable`, where they are set.
    pub fn with_environment(
        mut self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, InvalidSetting> {
        let read = |name: &'static str, range: std::ops::RangeInclusive<u64>| {
            let Some(value) = variable(name) else { return Ok(None) };
            match value.parse::<u64>().ok().filter(|value| range.contains(value)) {
                Some(value) => Ok(Some(Duration::from_millis(value))),
                None => Err(InvalidSetting { name, value, min: *range.start(), max: *range.end() }),
            }
        };
        if let Some(deadline) = read("KVBM_MATCH_DEADLINE_MS", 1..=60_000)? {
            self.match_deadline = deadline;
        }
        if let Some(patience) = read("KVBM_DETACH_AFTER_MS", 10..=600_000)? {
            self.detach_after = patience;
        }
        for (name, setting) in [
            ("KVBM_CONNECTOR_DISK_WAIT_BASE_MS", &mut self.disk_wait_base),
            ("KVBM_CONNECTOR_DISK_WAIT_PER_MIB_MS", &mut self.disk_wait_per_mib),
            ("KVBM_CONNECTOR_DISK_WAIT_MAX_MS", &mut self.disk_wait_max),
        ] {
            if let Some(wait) = read(name, 0..=600_000)? {
                *setting = wait;
            }
        }
        Ok(self)
    }

    /// Whether the pool's blocks are in a GPU's memory.
    pub fn is_on_gpu(&self) -> bool {
        self.device.starts_with("GPU-")
    }

    /// How long a lookup waits for so many bytes from disk.
    pub(crate) fn disk_wait(&self, bytes: usize) -> Duration {
        let mebibytes = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let wait = self.disk_wait_base.saturating_add(self.disk_wait_per_mib.saturating_mul(mebibytes));
        wait.min(self.disk_wait_max)
    }
}

/// How an engine is listed in the daemon's registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkerRegistration {
    /// Unique among the workers of the daemon.
    pub worker_id: String,
    /// `unix:/path` or `http://host:port`, serving `kvbm.v1.Worker`.
    pub endpoint: String,
    /// Served name of the model.
    pub model: String,
    /// Folder of the model.
    pub model_path: String,
    /// prefill, decode or both.
    pub role: String,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Longest sequence, tokens.
    pub context_length: u32,
    /// ready or draining.
    pub state: String,
    /// Where the blocks are in pools of other sessions: the base namespace of their keys.
    pub base_namespace: Option<[u8; 32]>,
}

impl WorkerRegistration {
    /// The message; `pool_id` is 0 while the engine has no pool at the daemon.
    pub fn message(&self, pool_id: u32) -> v1::RegisterWorker {
        v1::RegisterWorker {
            worker_id: self.worker_id.clone(),
            endpoint: self.endpoint.clone(),
            model: self.model.clone(),
            model_path: self.model_path.clone(),
            role: self.role.clone(),
            tokens_per_block: self.tokens_per_block,
            context_length: self.context_length,
            pool_id,
            state: self.state.clone(),
            base_namespace: self.base_namespace.map_or_else(Vec::new, Vec::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_overrides_and_names_what_is_wrong() {
        let set = |value: &'static str| {
            move |name: &str| (name == "KVBM_MATCH_DEADLINE_MS").then(|| value.to_owned())
        };
        let config = Config::new("s").with_environment(set("35")).unwrap();
        assert_eq!(config.match_deadline, Duration::from_millis(35));
        assert_eq!(config.detach_after, Duration::from_millis(250));
        let wrong = Config::new("s").with_environment(set("0")).unwrap_err();
        assert!(wrong.to_string().contains("KVBM_MATCH_DEADLINE_MS=0"));
        let off = |name: &str| (name == "KVBM_CONNECTOR_DISK_WAIT_MAX_MS").then(|| "0".to_owned());
        assert_eq!(Config::new("s").with_environment(off).unwrap().disk_wait(1 << 30), Duration::ZERO);
    }

    #[test]
    fn the_wait_for_the_disk_grows_with_what_is_on_it_up_to_a_limit() {
        let config = Config::new("s");
        assert_eq!(config.disk_wait(1), Duration::from_millis(252));
        assert_eq!(config.disk_wait(100 << 20), Duration::from_millis(450));
        assert_eq!(config.disk_wait(usize::MAX), Duration::from_secs(10));
    }
}
