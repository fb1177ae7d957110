//! What the daemon says on standard error.

use tracing_subscriber::EnvFilter;

use crate::Config;

/// Starts logging as configured. Does nothing if the process logs already.
pub fn start(config: &Config) {
    let filter = EnvFilter::new(&config.log);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // The outcome only says whether somebody was first.
    let _ = if config.log_json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init()
    };
}
