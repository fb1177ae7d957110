//! How a part tells `kvbm up` that it serves, and where: a small JSON file that appears whole.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What a part says when it serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// URL or socket path under which it is reached.
    pub address: String,
    /// URL of its metrics.
    pub metrics: String,
}

impl Ready {
    /// Writes the file, if one was asked for.
    pub(crate) fn announce(&self, path: Option<&Path>) -> io::Result<()> {
        let Some(path) = path else { return Ok(()) };
        let part = path.with_extension("part");
        std::fs::write(&part, serde_json::to_vec(self)?)?;
        std::fs::rename(part, path)
    }

    /// Reads the file, if it has appeared.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}
