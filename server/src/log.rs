//! What the daemon says on standard error, and to a collector of traces.

use kvbm_telemetry::{Lines, Telemetry};

use crate::Config;

/// Starts logging as configured. Does nothing if the process logs already.
pub fn start(config: &Config) -> Telemetry {
    let lines = if config.log_json { Lines::Json } else { Lines::Text };
    kvbm_telemetry::start("kvbm-daemon", &config.log, lines)
}
