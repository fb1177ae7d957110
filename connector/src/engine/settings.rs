//! What an engine's connector is told at its start, by the engine and by the environment.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvbm_hash::{BaseNamespace, BaseParts, Namespace};
use thiserror::Error;

use super::{LoadMode, PoolChoice};

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("read {name}: {reason}")]
pub struct InvalidEngineSetting {
    /// The variable or field.
    pub name: String,
    /// What is wrong with it, and what is permitted.
    pub reason: String,
}

/// Who the engine is, and which part of it this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineSettings {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Name and version of the engine, for status and logs.
    pub client: String,
    /// Label of the namespaces, and part of them if it is not empty.
    pub tenant: String,
    /// The model, as all its engines name it.
    pub model: String,
    /// What tells its weights from others under the same name.
    pub revision: String,
    /// Element type of the KV cache.
    pub kv_dtype: String,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// What numbers of adapters mean: engines that give the same numbers to the same adapters name the same scope.
    pub lora_scope: String,
    /// This process among those of the engine; 0 has the scheduler half.
    pub rank: u32,
    /// Processes of the engine.
    pub rank_count: u32,
    /// Part of a block that this rank has.
    pub shard: u32,
    /// Parts of a block.
    pub shard_count: u32,
    /// Set: the scheduler half is in no process with memory, and this is the name of the engine, which all its processes
    /// know. Otherwise rank 0 has it and draws a name.
    pub apart: Option<[u8; 16]>,
    /// How the engine waits for loads.
    pub load_mode: LoadMode,
    /// Where it can wait for each layer: a request that is alone goes on before all of them are there.
    pub by_layer: bool,
    /// Who copies blocks out.
    pub pool: PoolChoice,
    /// The longest that a lookup holds up the engine.
    pub lookup_deadline: Duration,
    /// How long any answer may be missing before the session is given up.
    pub detach_after: Duration,
    /// How long a request may wait for blocks that come from disk: at least, besides for each MiB, and at most. Zero at
    /// most: it does not wait. Only engines that ask again can.
    pub disk_wait: (Duration, Duration, Duration),
    /// How long attaching may take.
    pub attach_deadline: Duration,
    /// First and longest pause between attempts to attach.
    pub reconnect_pause: (Duration, Duration),
    /// A file in which rank 0 writes the base namespace as soon as it knows it: for who serves this engine's requests.
    pub base_file: Option<PathBuf>,
}

impl EngineSettings {
    /// The defaults of a single process, at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            client: concat!("kvbm-connector/", env!("CARGO_PKG_VERSION")).into(),
            tenant: String::new(),
            model: String::new(),
            revision: String::new(),
            kv_dtype: String::new(),
            tokens_per_block: 32,
            lora_scope: String::new(),
            rank: 0,
            rank_count: 1,
            shard: 0,
            shard_count: 1,
            apart: None,
            load_mode: LoadMode::Parked,
            by_layer: true,
            pool: PoolChoice::Auto,
            lookup_deadline: Duration::from_millis(20),
            detach_after: Duration::from_secs(1),
            disk_wait: (Duration::from_millis(250), Duration::from_millis(2), Duration::from_secs(10)),
            attach_deadline: Duration::from_secs(2),
            reconnect_pause: (Duration::from_millis(20), Duration::from_millis(500)),
            base_file: None,
        }
    }

    /// Takes what an operator says, where it is said: `TLLM_KVBM_MODEL`, `TLLM_KVBM_REVISION`, `TLLM_KVBM_TENANT`,
    /// `TLLM_KVBM_LORA_SCOPE`, `TLLM_KVBM_LOAD` (`parked`, `in-pass`, and `auto` where the halves are apart),
    /// `TLLM_KVBM_POOL` (`auto`, `ipc` or `staged`), `TLLM_KVBM_LOOKUP_DEADLINE_MS`, `TLLM_KVBM_DETACH_AFTER_MS`,
    /// `TLLM_KVBM_DISK_WAIT_MAX_MS`, `TLLM_KVBM_BASE_FILE`.
    pub fn with_environment(
        mut self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, InvalidEngineSetting> {
        for (name, setting) in [
            ("TLLM_KVBM_MODEL", &mut self.model),
            ("TLLM_KVBM_REVISION", &mut self.revision),
            ("TLLM_KVBM_TENANT", &mut self.tenant),
            ("TLLM_KVBM_LORA_SCOPE", &mut self.lora_scope),
        ] {
            if let Some(value) = variable(name) {
                *setting = value;
            }
        }
        match variable("TLLM_KVBM_LOAD").as_deref() {
            None => {}
            Some("parked") => self.load_mode = LoadMode::Parked,
            Some("in-pass") => self.load_mode = LoadMode::InPass,
            // Only engines that ask again can be told each time.
            Some("auto") if self.apart.is_some() => self.load_mode = LoadMode::Auto,
            Some(other) => {
                let expected =
                    if self.apart.is_some() { "auto, parked or in-pass" } else { "parked or in-pass" };
                return Err(invalid("TLLM_KVBM_LOAD", format!("is {other:?}, expected {expected}")));
            }
        }
        match variable("TLLM_KVBM_BY_LAYER").as_deref() {
            None => {}
            Some("true") => self.by_layer = true,
            Some("false") => self.by_layer = false,
            Some(other) => {
                return Err(invalid("TLLM_KVBM_BY_LAYER", format!("is {other:?}, expected true or false")));
            }
        }
        match variable("TLLM_KVBM_POOL").as_deref() {
            None => {}
            Some("auto") => self.pool = PoolChoice::Auto,
            Some("ipc") => self.pool = PoolChoice::Ipc,
            Some("staged") => self.pool = PoolChoice::Staged,
            Some(other) => {
                return Err(invalid("TLLM_KVBM_POOL", format!("is {other:?}, expected auto, ipc or staged")));
            }
        }
        for (name, setting, range) in [
            ("TLLM_KVBM_LOOKUP_DEADLINE_MS", &mut self.lookup_deadline, 1..=1000),
            ("TLLM_KVBM_DETACH_AFTER_MS", &mut self.detach_after, 10..=600_000),
            ("TLLM_KVBM_DISK_WAIT_MAX_MS", &mut self.disk_wait.2, 0..=600_000),
        ] {
            let Some(value) = variable(name) else { continue };
            let milliseconds = value.parse::<u64>().ok().filter(|value| range.contains(value));
            *setting = milliseconds.map(Duration::from_millis).ok_or_else(|| {
                let expected =
                    format!("expected whole milliseconds from {} to {}", range.start(), range.end());
                invalid(name, format!("is {value:?}, {expected}"))
            })?;
        }
        if let Some(path) = variable("TLLM_KVBM_BASE_FILE") {
            self.base_file = Some(path.into());
        }
        Ok(self)
    }

    /// The base namespace of blocks that lie like this.
    pub fn base(&self, layout: &str) -> BaseNamespace {
        BaseNamespace::new(&BaseParts {
            model: &self.model,
            revision: &self.revision,
            kv_dtype: &self.kv_dtype,
            layout,
            tokens_per_block: self.tokens_per_block,
            parallel: &format!("tp{} ranks{}", self.shard_count, self.rank_count),
        })
    }

    /// The namespace of requests with this adapter and salt.
    pub fn namespace(&self, base: BaseNamespace, lora: Option<u64>, salt: Option<&str>) -> Namespace {
        let lora = lora.map(|number| format!("{number}@{}", self.lora_scope));
        self.namespace_of_named(base, lora.as_deref(), salt)
    }

    /// The same for an adapter whose name tells its weights from all others.
    pub fn namespace_of_named(
        &self,
        base: BaseNamespace,
        lora: Option<&str>,
        salt: Option<&str>,
    ) -> Namespace {
        base.namespace(lora, salt).of_tenant(&self.tenant)
    }

    /// How long a request waits for so many bytes from disk.
    pub(crate) fn wait_for_disk(&self, bytes: usize) -> Duration {
        let (base, per_mib, most) = self.disk_wait;
        let mebibytes = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        base.saturating_add(per_mib.saturating_mul(mebibytes)).min(most)
    }
}

/// The socket that an address names: a path, with or without `unix:` in front. Without one the socket of `kvbm up`.
pub fn socket_of(
    address: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<PathBuf, InvalidEngineSetting> {
    let given =
        address.filter(|address| !address.is_empty()).map(|address| ("server_url", address.to_owned()));
    let named = || variable("TLLM_KVBM_ENDPOINT").filter(|address| !address.is_empty());
    let Some((name, address)) = given.or_else(|| Some(("TLLM_KVBM_ENDPOINT", named()?))) else {
        return Ok(default_socket(variable));
    };
    let path = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:")).unwrap_or(&address);
    if !Path::new(path).is_absolute() {
        let reason = format!(
            "is {address:?}; the daemon is reached over a Unix socket of the same node, for example unix:/run/kvbm/kvbm.sock"
        );
        return Err(invalid(name, reason));
    }
    Ok(path.into())
}

/// Where `kvbm up` listens.
fn default_socket(variable: impl Fn(&str) -> Option<String>) -> PathBuf {
    if let Some(named) = variable("KVBM_STATE_DIR") {
        return Path::new(&named).join("kvbm.sock");
    }
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    state.unwrap_or_else(std::env::temp_dir).join("kvbm/kvbm.sock")
}

fn invalid(name: &str, reason: String) -> InvalidEngineSetting {
    InvalidEngineSetting { name: name.into(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn the_engines_address_comes_before_the_environments_and_that_before_the_default() {
        let environment = |name: &str| match name {
            "TLLM_KVBM_ENDPOINT" => Some("unix:///b/kvbm.sock".to_owned()),
            "HOME" => Some("/home/me".to_owned()),
            _ => None,
        };
        assert_eq!(socket_of(Some("unix:/a/kvbm.sock"), environment), Ok("/a/kvbm.sock".into()));
        assert_eq!(socket_of(None, environment), Ok("/b/kvbm.sock".into()));
        let home = |name: &str| environment(name).filter(|_| name == "HOME");
        assert_eq!(socket_of(Some(""), home), Ok("/home/me/.local/state/kvbm/kvbm.sock".into()));
        let tcp = socket_of(Some("tcp://localhost:5555"), none).unwrap_err().to_string();
        assert!(tcp.contains("server_url") && tcp.contains("Unix socket"), "{tcp}");
    }

    #[test]
    fn the_environment_overrides_and_names_what_is_wrong() {
        let with = |name: &'static str, value: &'static str| {
            EngineSettings::new("/s").with_environment(move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert_eq!(with("TLLM_KVBM_LOAD", "in-pass").unwrap().load_mode, LoadMode::InPass);
        assert!(with("TLLM_KVBM_LOAD", "auto").is_err(), "TensorRT-LLM asks once");
        assert_eq!(with("TLLM_KVBM_POOL", "staged").unwrap().pool, PoolChoice::Staged);
        assert!(with("TLLM_KVBM_POOL", "cuda").unwrap_err().to_string().contains("auto, ipc or staged"));
        assert_eq!(with("TLLM_KVBM_TENANT", "t").unwrap().tenant, "t");
        let wrong = with("TLLM_KVBM_LOAD", "sync").unwrap_err().to_string();
        assert!(wrong.contains("TLLM_KVBM_LOAD") && wrong.contains("parked or in-pass"), "{wrong}");
        assert!(
            with("TLLM_KVBM_LOOKUP_DEADLINE_MS", "0").unwrap_err().to_string().contains("from 1 to 1000")
        );
    }

    #[test]
    fn adapters_salts_tenants_and_scopes_separate() {
        let settings = EngineSettings::new("/s");
        let base = settings.base("flat");
        let scoped = EngineSettings { lora_scope: "mine".into(), ..settings.clone() };
        let tenant = EngineSettings { tenant: "t".into(), ..settings.clone() };
        let all = [
            settings.namespace(base, None, None),
            settings.namespace(base, Some(0), None),
            settings.namespace(base, Some(1), None),
            settings.namespace(base, None, Some("1")),
            scoped.namespace(base, Some(1), None),
            tenant.namespace(base, None, None),
        ];
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), all.len());
        assert_eq!(
            scoped.namespace(base, None, None),
            all[0],
            "without an adapter its scope does not matter"
        );
        let other = EngineSettings { rank_count: 2, shard_count: 2, ..settings };
        assert_ne!(other.base("flat"), base);
    }
}
