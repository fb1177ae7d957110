//! One setting: how it is read, bounded, written and explained.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use kvbm::{PolicyKind, Quotas};
use tracing_subscriber::EnvFilter;

use super::{Config, quotas};

/// One setting. Its flag is `--` and the key with dashes; of `tenants`, `--tenant-quota`.
#[derive(Debug)]
pub struct Setting {
    /// Key in `kvbm.toml`.
    pub key: &'static str,
    /// Variables, the first that is set counts.
    pub env: &'static [&'static str],
    pub(super) default: Default,
    pub(super) kind: Kind,
    /// What it does, one sentence.
    pub help: &'static str,
}

/// What holds when no source says otherwise.
#[derive(Debug)]
pub(super) enum Default {
    /// This, as the user would write it.
    Text(&'static str),
    /// `$XDG_STATE_HOME/kvbm`, else `~/.local/state/kvbm`.
    StateHome,
    /// A file of the state directory.
    InStateDir(&'static str),
    /// Nothing.
    Unset,
}

/// How it is read and where it goes.
#[derive(Debug)]
pub(super) enum Kind {
    Number {
        range: RangeInclusive<f64>,
        field: fn(&mut Config) -> &mut f64,
    },
    Count {
        range: RangeInclusive<u64>,
        field: fn(&mut Config) -> &mut u64,
    },
    OptionalCount {
        range: RangeInclusive<u64>,
        field: fn(&mut Config) -> &mut Option<u64>,
    },
    Switch {
        field: fn(&mut Config) -> &mut bool,
    },
    Path {
        bytes_max: usize,
        field: fn(&mut Config) -> &mut PathBuf,
    },
    Paths {
        count_max: usize,
        bytes_max: usize,
        field: fn(&mut Config) -> &mut Vec<PathBuf>,
    },
    Choice {
        words: &'static [&'static str],
        field: fn(&mut Config) -> &mut String,
    },
    OptionalPath {
        bytes_max: usize,
        field: fn(&mut Config) -> &mut Option<PathBuf>,
    },
    Address {
        field: fn(&mut Config) -> &mut IpAddr,
    },
    OptionalText {
        form: &'static str,
        is_form: fn(&str) -> bool,
        field: fn(&mut Config) -> &mut Option<String>,
    },
    OptionalListen {
        field: fn(&mut Config) -> &mut Option<SocketAddr>,
    },
    Users {
        field: fn(&mut Config) -> &mut Vec<u32>,
    },
    Policy {
        field: fn(&mut Config) -> &mut String,
    },
    Quotas {
        field: fn(&mut Config) -> &mut Quotas,
    },
    Filter {
        field: fn(&mut Config) -> &mut String,
    },
}

impl Setting {
    /// Name on the command line, without the leading dashes.
    pub fn flag(&self) -> String {
        if self.is_repeated() { "tenant-quota".to_owned() } else { self.key.replace('_', "-") }
    }

    /// True for settings that may be given several times on the command line.
    pub(crate) fn is_repeated(&self) -> bool {
        matches!(self.kind, Kind::Quotas { .. })
    }

    /// True for settings that need no value on the command line.
    pub(crate) fn is_switch(&self) -> bool {
        matches!(self.kind, Kind::Switch { .. })
    }

    /// Help with range, default and variables.
    pub fn long_help(&self) -> String {
        let default = match &self.default {
            Default::Text("") | Default::Unset => "none".to_owned(),
            Default::Text(text) => (*text).to_owned(),
            Default::StateHome => "$XDG_STATE_HOME/kvbm".to_owned(),
            Default::InStateDir(name) => format!("STATE_DIR/{name}"),
        };
        format!("{} [{}] [default: {default}] [env: {}]", self.help, self.permitted(), self.env.join(", "))
    }

    /// What may be written, in words.
    pub fn permitted(&self) -> String {
        match &self.kind {
            Kind::Number { range, .. } => {
                format!("a number from {} to {}", range.start(), range.end())
            }
            Kind::Count { range, .. } | Kind::OptionalCount { range, .. } => {
                format!("a whole number from {} to {}", range.start(), range.end())
            }
            Kind::Switch { .. } => "true or false".to_owned(),
            Kind::Path { bytes_max, .. } => format!("a path of 1 to {bytes_max} bytes"),
            Kind::Paths { count_max, bytes_max, .. } => {
                format!("1 to {count_max} different paths of 1 to {bytes_max} bytes, separated by commas")
            }
            Kind::Choice { words, .. } => words.join(", "),
            Kind::Policy { .. } => policy_names().collect::<Vec<_>>().join(", "),
            Kind::OptionalPath { bytes_max, .. } => {
                format!("a path of at most {bytes_max} bytes, or nothing")
            }
            Kind::Address { .. } => "an IP address".to_owned(),
            Kind::OptionalText { form, .. } => (*form).to_owned(),
            Kind::OptionalListen { .. } => {
                "an IP address and a port, as in 127.0.0.1:6881 or [::]:6881".to_owned()
            }
            Kind::Users { .. } => "user ids from 0 to 4294967294, separated by commas".to_owned(),
            Kind::Quotas { .. } => quotas::PERMITTED.to_owned(),
            Kind::Filter { .. } => {
                "levels error, warn, info, debug, trace or off, or target=level".to_owned()
            }
        }
    }

    /// What would have been permitted instead of `text`, in words.
    pub(super) fn permitted_instead_of(&self, text: &str) -> String {
        match &self.kind {
            Kind::Quotas { .. } => quotas::parse(text).err().unwrap_or_else(|| self.permitted()),
            _ => self.permitted(),
        }
    }

    /// Puts a value as the user wrote it into `config`; false if it is not permitted.
    pub(super) fn write(&self, config: &mut Config, text: &str) -> bool {
        match &self.kind {
            Kind::Number { range, field } => {
                put(field(config), text.parse().ok().filter(|value| range.contains(value)))
            }
            Kind::Count { range, field } => {
                put(field(config), text.parse().ok().filter(|value| range.contains(value)))
            }
            Kind::OptionalCount { range, field } => {
                put(field(config), text.parse().ok().filter(|value| range.contains(value)).map(Some))
            }
            Kind::Switch { field } => put(field(config), switch(text)),
            Kind::Path { bytes_max, field } => {
                put(field(config), (1..=*bytes_max).contains(&text.len()).then(|| text.into()))
            }
            Kind::Paths { count_max, bytes_max, field } => {
                put(field(config), paths(text, *count_max, *bytes_max))
            }
            Kind::Choice { words, field } => {
                put(field(config), words.contains(&text).then(|| text.to_owned()))
            }
            Kind::OptionalPath { bytes_max, field } => {
                let path = (!text.is_empty()).then(|| text.into());
                put(field(config), (text.len() <= *bytes_max).then_some(path))
            }
            Kind::Address { field } => put(field(config), text.parse().ok()),
            Kind::OptionalText { is_form, field, .. } => {
                put(field(config), is_form(text).then(|| Some(text.to_owned())))
            }
            Kind::OptionalListen { field } => put(field(config), text.parse().ok().map(Some)),
            Kind::Users { field } => put(field(config), users(text)),
            Kind::Policy { field } => {
                put(field(config), policy_names().any(|name| name == text).then(|| text.to_owned()))
            }
            Kind::Quotas { field } => put(field(config), quotas::parse(text).ok()),
            Kind::Filter { field } => put(field(config), filter(text)),
        }
    }

    /// The value as it would be written in `kvbm.toml`; `None` when it is unset.
    pub(super) fn read(&self, config: &Config) -> Option<toml::Value> {
        let config = &mut config.clone();
        let whole = |value: u64| toml::Value::Integer(i64::try_from(value).unwrap_or(i64::MAX));
        match &self.kind {
            Kind::Number { field, .. } => Some(toml::Value::Float(*field(config))),
            Kind::Count { field, .. } => Some(whole(*field(config))),
            Kind::OptionalCount { field, .. } => field(config).map(whole),
            Kind::Switch { field } => Some(toml::Value::Boolean(*field(config))),
            Kind::Path { field, .. } => Some(toml::Value::String(field(config).display().to_string())),
            Kind::Paths { field, .. } => {
                let path = |path: &PathBuf| toml::Value::String(path.display().to_string());
                Some(toml::Value::Array(field(config).iter().map(path).collect()))
            }
            Kind::Choice { field, .. } => Some(toml::Value::String(field(config).clone())),
            Kind::OptionalPath { field, .. } => {
                field(config).as_ref().map(|path| toml::Value::String(path.display().to_string()))
            }
            Kind::Address { field } => Some(toml::Value::String(field(config).to_string())),
            Kind::OptionalText { field, .. } => field(config).clone().map(toml::Value::String),
            Kind::OptionalListen { field } => {
                field(config).map(|address| toml::Value::String(address.to_string()))
            }
            Kind::Users { field } => {
                Some(toml::Value::Array(field(config).iter().map(|uid| whole((*uid).into())).collect()))
            }
            Kind::Quotas { field } => Some(quotas::table(field(config))),
            Kind::Policy { field } | Kind::Filter { field } => {
                Some(toml::Value::String(field(config).clone()))
            }
        }
    }
}

fn put<T>(field: &mut T, value: Option<T>) -> bool {
    value.map(|value| *field = value).is_some()
}

fn switch(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "on" | "yes" => Some(true),
        "0" | "false" | "off" | "no" => Some(false),
        _ => None,
    }
}

fn paths(text: &str, count_max: usize, bytes_max: usize) -> Option<Vec<PathBuf>> {
    let paths: Vec<&str> = text.split(',').map(str::trim).collect();
    let different: std::collections::BTreeSet<_> = paths.iter().collect();
    let fit = paths.iter().all(|path| (1..=bytes_max).contains(&path.len()));
    let usable = fit && paths.len() <= count_max && different.len() == paths.len();
    usable.then(|| paths.into_iter().map(PathBuf::from).collect())
}

fn users(text: &str) -> Option<Vec<u32>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().ok().filter(|uid| *uid != u32::MAX)).collect()
}

fn filter(text: &str) -> Option<String> {
    EnvFilter::try_new(text).ok().map(|_| text.to_owned())
}

fn policy_names() -> impl Iterator<Item = &'static str> {
    PolicyKind::ALL.into_iter().map(PolicyKind::name)
}
