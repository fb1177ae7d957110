//! What a process says about itself: lines on standard error, and traces for a collector.
//!
//! Traces are OpenTelemetry's, sent over OTLP (gRPC), and off unless the environment names a collector. Where they are off,
//! spans cost next to nothing and no context is made up; one that a client sent is handed on all the same.
#![forbid(unsafe_code)]

mod context;
mod export;

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

pub use context::{context_of, follow};
use export::Export;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Logging, and sending traces, until it is dropped: what has not been sent is sent then.
#[must_use = "traces are sent as long as this is kept"]
pub struct Telemetry {
    _export: Option<Export>,
}

/// Starts both for a part that is called `service`. `filter` is for log lines. Does nothing if the process logs already.
pub fn start(service: &str, filter: &str, lines: Lines) -> Telemetry {
    let filter = EnvFilter::new(filter);
    let text = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match lines {
        Lines::Json => text.json().flatten_event(true).with_filter(filter).boxed(),
        Lines::Text => text.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed(),
    };
    let (export, failed) = match Export::from_environment(service) {
        Ok(export) => (export, None),
        Err(error) => (None, Some(error)),
    };
    let spans = export.as_ref().map(Export::layer);
    // The outcome only says whether somebody was first.
    let _ = tracing_subscriber::registry().with(lines).with(spans).try_init();
    if let Some(error) = failed {
        tracing::warn!(error, "no traces are sent");
    }
    Telemetry { _export: export }
}
