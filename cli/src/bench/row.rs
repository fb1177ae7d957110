//! One measured figure.

use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Scripts read this: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    /// What the machine gives at best, in the same unit, measured in the same run.
    ceiling: Option<f64>,
    /// Achieved part of the ceiling; higher is better.
    ratio: Option<f64>,
    /// What the project demands of the ratio, where there is one, else of the value.
    limit: Option<f64>,
    ok: bool,
    detail: String,
}

impl Row {
    /// A figure without demand.
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        let (ceiling, ratio, limit, ok, detail) = (None, None, None, true, String::new());
        Self { name: name.into(), value, unit, ceiling, ratio, limit, ok, detail }
    }

    /// What could not be measured.
    pub(crate) fn failed(name: impl Into<String>, unit: &'static str, error: impl Into<String>) -> Self {
        Self { ok: false, detail: error.into(), ..Self::new(name, 0.0, unit) }
    }

    /// The best this machine does at the same task.
    pub(crate) fn ceiling(self, ceiling: f64) -> Self {
        Self { ceiling: Some(ceiling), ratio: Some(self.value / ceiling), ..self }
    }

    /// The value must be at least this.
    pub(crate) fn at_least(self, limit: f64) -> Self {
        Self { limit: Some(limit), ok: self.value >= limit, ..self }
    }

    /// The value must be at most this.
    pub(crate) fn at_most(self, limit: f64) -> Self {
        Self { limit: Some(limit), ok: self.value <= limit, ..self }
    }

    /// The ratio must be at least this.
    pub(crate) fn ratio_at_least(self, limit: f64) -> Self {
        Self { limit: Some(limit), ok: self.ratio.is_some_and(|ratio| ratio >= limit), ..self }
    }

    /// It has a limit that it misses.
    pub(crate) fn is_missed(&self) -> bool {
        !self.ok
    }

    /// What was measured, and how.
    pub(crate) fn detail(self, detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), ..self }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:30} {:>12.3} {:5}", self.name, self.value, self.unit)?;
        match (self.ceiling, self.ratio) {
            (Some(ceiling), Some(ratio)) => write!(f, " ceiling {ceiling:>10.3}  ratio {ratio:.3}")?,
            _ => write!(f, "{:36}", "")?,
        }
        match self.limit {
            Some(limit) => write!(f, "  limit {limit:<7} {}", if self.ok { "ok" } else { "MISSED" })?,
            None => write!(f, "{:21}", "")?,
        }
        write!(f, "  {}", self.detail)
    }
}

/// A percentile of durations recorded in nanoseconds, in microseconds.
pub(crate) fn percentile_us(histogram: &Histogram<u64>, percentile: f64) -> f64 {
    histogram.value_at_percentile(percentile) as f64 / 1e3
}

/// Durations from 1 ns to 100 s, three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("constant bounds are valid")
}
