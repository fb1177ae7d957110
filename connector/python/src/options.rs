//! Settings of engines that are configured in their own way: options that the adapter passes, then the environment.

use std::collections::HashMap;
use std::path::PathBuf;

use kvbm_connector::engine as core;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// What settings are called where they are read from the environment alone.
const NAME: &str = "TLLM_KVBM_";

/// Options by their lower-case names, and what begins the names of environment variables that say the same.
pub(crate) struct Options {
    given: HashMap<String, String>,
    prefix: String,
}

impl Options {
    pub fn new(given: HashMap<String, String>, prefix: String) -> Self {
        Self { given, prefix }
    }

    /// The value of a setting: the option, else the environment's. What is no setting of ours is the environment's.
    pub fn variable(&self, name: &str) -> Option<String> {
        let Some(setting) = name.strip_prefix(NAME) else { return std::env::var(name).ok() };
        let given = self.given.get(&setting.to_lowercase()).cloned();
        given.or_else(|| std::env::var(format!("{}{setting}", self.prefix)).ok())
    }

    /// An error in the words of whoever configured it.
    pub fn wrong(&self, error: core::InvalidEngineSetting) -> PyErr {
        let setting = error.name.strip_prefix(NAME).unwrap_or(&error.name);
        let name = format!("{} (or {}{setting})", setting.to_lowercase(), self.prefix);
        PyValueError::new_err(core::InvalidEngineSetting { name, ..error }.to_string())
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PyResult<PathBuf> {
        core::socket_of(None, |name| self.variable(name)).map_err(|error| self.wrong(error))
    }
}
