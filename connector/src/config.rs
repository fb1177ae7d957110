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
    /// Device of the pool, for status.
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
            attach_deadline: Duration::from_secs(1),
            reconnect_pause: (Duration::from_millis(20), Duration::from_millis(250)),
            stash_blocks_max: 32,
        }
    }

    /// Takes `KVBM_MATCH_DEADLINE_MS` and `KVBM_DETACH_AFTER_MS` from `variable`, where they are set.
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
        Ok(self)
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
    }
}
