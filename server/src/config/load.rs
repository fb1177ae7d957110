//! Puts the sources together and remembers where each value came from.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::nearest::nearest;
use super::setting::{Default, Setting};
use super::settings::SETTINGS;
use super::{Config, foreign, memory, quotas};
use crate::DaemonArgs;
use crate::remote::{Credentials, Misfit, Token};

/// Name of the file that is read when no other is named.
const FILE: &str = "kvbm.toml";
/// Names the file.
const FILE_VARIABLE: &str = "KVBM_CONFIG";
/// Tables of `kvbm.toml` that other parts of the project read.
const OTHER_TABLES: &[&str] = &["frontend", "worker", "connector", "up"];

/// The process environment as it was at start. Empty values count as unset.
#[derive(Debug, Clone, std::default::Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// This process's.
    pub fn of_process() -> Self {
        let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
        std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let pairs = pairs.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self(pairs.filter(|(_, value): &(String, String)| !value.is_empty()).collect())
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The command line.
    Flag(String),
    /// A variable.
    Variable(&'static str),
    /// A key of a file.
    File {
        /// The key.
        key: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The table of settings.
    Default(&'static str),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "--{flag}"),
            Self::Variable(name) => f.write_str(name),
            Self::File { key, path } => write!(f, "{key} in {}", path.display()),
            Self::Default(key) => write!(f, "{key} (default)"),
        }
    }
}

/// One line that says what to change.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A value cannot be used.
    #[error("invalid {setting} = {value:?}: permitted is {permitted}")]
    Value {
        /// As the user wrote it.
        setting: Source,
        /// As the user wrote it.
        value: String,
        /// In words.
        permitted: String,
    },
    /// A key of the file is not a setting.
    #[error("unknown setting {key:?} in {}{}", path.display(), did_you_mean(*nearest))]
    Key {
        /// The key.
        key: String,
        /// The file.
        path: PathBuf,
        /// What was probably meant.
        nearest: Option<&'static str>,
    },
    /// The file cannot be read.
    #[error("cannot read settings from {} (named by {named_by}): {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Flag or variable.
        named_by: &'static str,
        /// On one line.
        reason: String,
    },
    /// Nothing says where the daemon keeps its state.
    #[error("no state directory: set --state-dir, KVBM_STATE_DIR, XDG_STATE_HOME or HOME")]
    NoStateDirectory,
}

fn did_you_mean(name: Option<&str>) -> String {
    name.map_or_else(String::new, |name| format!(" (did you mean {name:?}?)"))
}

/// Settings with their history.
#[derive(Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// What the user should know but which is no error. To be logged once logging works.
    pub warnings: Vec<String>,
    sources: Vec<(&'static Setting, Source)>,
}

impl Loaded {
    /// Where the value of `key` came from.
    pub fn source(&self, key: &str) -> Option<&Source> {
        self.sources.iter().find(|(setting, _)| setting.key == key).map(|(_, source)| source)
    }

    /// Each setting, its value and its source, as a `kvbm.toml` with comments.
    pub fn print(&self) -> String {
        let mut text = String::new();
        for (setting, source) in &self.sources {
            let line = match setting.read(&self.config) {
                Some(value) => format!("{} = {value}", setting.key),
                None => format!("# {} is unset", setting.key),
            };
            let source = match source {
                Source::Default(_) => "default".to_owned(),
                other => other.to_string(),
            };
            writeln!(text, "{line:<48} # {source}").expect("a string takes everything");
        }
        text
    }
}

/// Reads and checks everything.
pub fn load(args: &DaemonArgs, environment: &Environment) -> Result<Loaded, ConfigError> {
    load_within(args, environment, memory::available_bytes(), memory::shared_bytes())
}

/// `available` is the memory that can be had, bytes, if that is known; `shared` that which processes share now.
pub(super) fn load_within(
    args: &DaemonArgs,
    environment: &Environment,
    available: Option<u64>,
    shared: u64,
) -> Result<Loaded, ConfigError> {
    let file = read_file(args, environment)?;
    let mut config = Config::blank();
    let mut sources = Vec::with_capacity(SETTINGS.len());
    for setting in SETTINGS {
        let given = match given(setting, args, environment, file.as_ref()) {
            Some(given) => Some(given),
            None => default(setting, &config, environment)?.map(|text| (Source::Default(setting.key), text)),
        };
        let Some((source, text)) = given else {
            sources.push((setting, Source::Default(setting.key)));
            continue;
        };
        if !setting.write(&mut config, text.trim()) {
            let permitted = setting.permitted_instead_of(&text);
            return Err(ConfigError::Value { setting: source, value: text, permitted });
        }
        sources.push((setting, source));
    }
    let mut warnings = foreign::warnings(environment);
    warnings.extend(without_effect(&config));
    warnings.extend(idle_disk(&config).map(str::to_owned));
    warnings.extend(quotas::warnings(&config.tenants, &capacities(&config)));
    let loaded = Loaded { config, warnings, sources };
    // What a holder keeps for this daemon is in use, and still to be had.
    let held = if loaded.config.holder.is_some() { shared } else { 0 };
    check_host_memory(&loaded, available.map(|available| available.saturating_add(held)))?;
    check_remote(&loaded)?;
    Ok(loaded)
}

fn given(
    setting: &Setting,
    args: &DaemonArgs,
    environment: &Environment,
    file: Option<&File>,
) -> Option<(Source, String)> {
    if let Some(text) = args.value(setting.key) {
        return Some((Source::Flag(setting.flag()), text.to_owned()));
    }
    for &name in setting.env {
        if let Some(text) = environment.get(name) {
            return Some((Source::Variable(name), text.to_owned()));
        }
    }
    let file = file?;
    let value = file.values.get(setting.key)?;
    Some((Source::File { key: setting.key, path: file.path.clone() }, text_of(value)))
}

fn default(
    setting: &Setting,
    config: &Config,
    environment: &Environment,
) -> Result<Option<String>, ConfigError> {
    let path = |path: PathBuf| Some(path.to_string_lossy().into_owned());
    Ok(match setting.default {
        Default::Text(text) => Some(text.to_owned()),
        Default::Unset => None,
        Default::InStateDir(name) => path(config.state_dir.join(name)),
        Default::StateHome => {
            let home = || Some(Path::new(environment.get("HOME")?).join(".local/state"));
            let state = environment.get("XDG_STATE_HOME").map(PathBuf::from).or_else(home);
            path(state.ok_or(ConfigError::NoStateDirectory)?.join("kvbm"))
        }
    })
}

struct File {
    path: PathBuf,
    values: toml::Table,
}

fn read_file(args: &DaemonArgs, environment: &Environment) -> Result<Option<File>, ConfigError> {
    let (path, named_by) = match (&args.config, environment.get(FILE_VARIABLE)) {
        (Some(path), _) => (path.clone(), "--config"),
        (None, Some(path)) => (path.into(), FILE_VARIABLE),
        (None, None) => (FILE.into(), "default"),
    };
    let fail = |reason: String| ConfigError::File { path: path.clone(), named_by, reason };
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named_by == "default" => {
            return Ok(None);
        }
        text => text.map_err(|error| fail(error.to_string()))?,
    };
    let values: toml::Table = text.parse().map_err(|error: toml::de::Error| fail(describe(&error, &text)))?;
    let known = |key: &str| SETTINGS.iter().any(|setting| setting.key == key) || OTHER_TABLES.contains(&key);
    if let Some(key) = values.keys().find(|key| !known(key)).cloned() {
        let nearest = nearest(&key, SETTINGS.iter().map(|setting| setting.key));
        return Err(ConfigError::Key { key, path, nearest });
    }
    Ok(Some(File { path, values }))
}

/// The parser's message without its picture of the line.
fn describe(error: &toml::de::Error, text: &str) -> String {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
    format!("line {line}: {}", error.message().replace('\n', ", "))
}

fn text_of(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(items) => items.iter().map(text_of).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Bytes of the tiers whose size is known before the first worker comes.
fn capacities(config: &Config) -> BTreeMap<&'static str, Option<u64>> {
    let bytes = |gigabytes: f64, blocks: Option<u64>| match blocks {
        Some(0) => Some(0),
        Some(_) => None,
        None => Some(super::gigabytes(gigabytes)),
    };
    let host = bytes(config.cpu_cache_gb, config.cpu_cache_blocks);
    [("host", host), ("disk", bytes(config.disk_cache_gb, config.disk_cache_blocks))].into()
}

/// Settings of a disk tier that will not write anything.
fn idle_disk(config: &Config) -> Option<&'static str> {
    let off = |gigabytes: f64, blocks: Option<u64>| blocks.map_or(gigabytes == 0.0, |blocks| blocks == 0);
    if off(config.disk_cache_gb, config.disk_cache_blocks) {
        return config.reset_disk.then_some("reset_disk has no effect: the disk tier is turned off");
    }
    if off(config.cpu_cache_gb, config.cpu_cache_blocks) {
        return Some(
            "nothing will be written to disk: blocks get there from host memory, which is turned off",
        );
    }
    (config.disk_priority_min > 35).then_some(
        "only blocks whose requests ask for more than the default priority of 35 will be written to disk \
         (disk_priority_min)",
    )
}

/// What protects a port that nobody opens.
fn without_effect(config: &Config) -> Option<String> {
    let set = [
        ("grpc_tls_cert", &config.grpc_tls_cert),
        ("grpc_tls_key", &config.grpc_tls_key),
        ("grpc_tls_client_ca", &config.grpc_tls_client_ca),
        ("grpc_token_file", &config.grpc_token_file),
    ];
    let announced = [("announce", &config.announce), ("announce_url", &config.announce_url)];
    let announced = announced.iter().filter(|(_, text)| text.is_some()).map(|(key, _)| *key);
    let set = set.iter().filter(|(_, path)| path.is_some()).map(|(key, _)| *key);
    let set: Vec<&str> = set.chain(announced).collect();
    let idle = config.grpc_listen.is_none() && !set.is_empty();
    idle.then(|| format!("without grpc_listen these settings have no effect: {}", set.join(", ")))
}

/// A port that would not be protected as it was meant to be is not opened.
fn check_remote(loaded: &Loaded) -> Result<(), ConfigError> {
    let checked = Credentials::read(&loaded.config).map(drop);
    let checked = checked.and_then(|()| Token::for_admin(&loaded.config).map(drop));
    let Err(Misfit { key, permitted }) = checked else { return Ok(()) };
    let setting = loaded.sources.iter().find(|(setting, _)| setting.key == key);
    let (setting, source) = setting.expect("misfits are named by keys of the table");
    let value = match setting.read(&loaded.config) {
        Some(toml::Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    Err(ConfigError::Value { setting: source.clone(), value, permitted })
}

/// Memory that is not there would be found missing only while serving.
fn check_host_memory(loaded: &Loaded, available: Option<u64>) -> Result<(), ConfigError> {
    let config = &loaded.config;
    let asked = config.cpu_cache_bytes();
    match available {
        Some(available) if asked > available && config.cpu_cache_blocks.is_none() => {
            Err(ConfigError::Value {
                setting: loaded.source("cpu_cache_gb").cloned().unwrap_or(Source::Default("cpu_cache_gb")),
                value: config.cpu_cache_gb.to_string(),
                permitted: format!(
                    "at most {} (GB of memory available now)",
                    (available as f64 / 1e8).floor() / 10.0
                ),
            })
        }
        _ => Ok(()),
    }
}
