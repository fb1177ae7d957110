//! How fast copies in the background may go while an engine decodes: so fast that its steps take longer by a set share.
//!
//! ```text
//!            ┌──────────── enough steps ────────────┐
//!            ▼                                      │
//!   Rest: no copies, ── enough steps, or too long ──► Copy: at the rate
//!   steps measured           the rate is set anew
//!
//!   nothing begins for 20 ms: idle, no limit         no engine tells anything: a fixed share of the link
//! ```
//!
//! Steps with copies are compared with the steps right before and after them, in which nothing was copied: batches grow
//! and contexts get longer, so nothing older is comparable. What copies cost is taken to be in proportion to their rate,
//! which is what was measured, and the factor is learnt from the last few comparisons. It is told the time and the steps,
//! and gives the bytes that may be copied now.

use std::time::Duration;

use super::StepSample;

/// What decoding may suffer, and what the link can do.
#[derive(Debug, Clone, PartialEq)]
pub struct PacerConfig {
    /// How much longer a decode step may take because of copies in the background: 0.03 is 3 %. 0: they wait until the
    /// engine is idle.
    pub slowdown_share: f64,
    /// What the link between host and GPU moves in one direction, bytes per second.
    pub link_bytes_per_second: f64,
    /// Share of the link for copies in the background as long as no engine tells how fast it decodes.
    pub blind_share: f64,
}

impl Default for PacerConfig {
    fn default() -> Self {
        Self { slowdown_share: 0.03, link_bytes_per_second: 55e9, blind_share: 0.25 }
    }
}

/// What may be copied in the background now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// Whatever there is.
    Unlimited,
    /// So much. A copy may be larger if it is the only one: then the next waits longer.
    Bytes(u64),
}

impl Allowance {
    /// The stricter of the two.
    pub fn smaller(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unlimited, other) => other,
            (Self::Bytes(bytes), Self::Unlimited) => Self::Bytes(bytes),
            (Self::Bytes(a), Self::Bytes(b)) => Self::Bytes(a.min(b)),
        }
    }

    /// What is left of it.
    pub fn less(self, bytes: u64) -> Self {
        match self {
            Self::Unlimited => Self::Unlimited,
            Self::Bytes(allowed) => Self::Bytes(allowed.saturating_sub(bytes)),
        }
    }

    /// Nothing is left.
    pub fn is_exhausted(self) -> bool {
        self == Self::Bytes(0)
    }
}

/// Decode steps without copies that are measured at a time.
const REST_STEPS: u64 = 8;
/// Decode steps with copies between two rests.
const COPY_STEPS: u64 = 64;
/// Steps after a change that belong to neither: in the one under way both happened.
const SKIPPED_STEPS: u64 = 2;
/// A rest that takes longer is broken off: the engine does something else than decode.
const REST_MAX: Duration = Duration::from_millis(250);
/// Longer than an engine takes between two passes.
const IDLE_AFTER: Duration = Duration::from_millis(20);
/// Rests before and after must be that similar, else it was another batch.
const REST_DRIFT_MAX: f64 = 0.1;
/// What is left of older comparisons with each new one.
const MEMORY: f64 = 0.85;
/// Part of the allowed slowdown that is aimed at: what is measured is never exact.
const AIM: f64 = 0.85;
/// Most by which the rate changes at a time.
const RATE_DOWN: f64 = 0.5;
const RATE_UP: f64 = 1.5;
/// The slowest rate, as a part of the link: below it, nothing could be learnt any more.
const RATE_MIN: f64 = 1.0 / 256.0;
/// Unused allowance is kept for so long: copies are spread over the steps.
const BURST: Duration = Duration::from_millis(2);
/// What was copied beyond the allowance is remembered for so long.
const DEBT: Duration = Duration::from_millis(100);

/// Paces the copies that one engine suffers from.
#[derive(Debug)]
pub struct Pacer {
    config: PacerConfig,
    /// Bytes per second, while the engine decodes.
    rate: f64,
    /// Bytes that may be copied now; below 0: were copied too early.
    balance: f64,
    now: Duration,
    last: Option<StepSample>,
    active_at: Duration,
    idle: bool,
    phase: Phase,
    learnt: Learnt,
}

#[derive(Debug)]
enum Phase {
    Rest(Window, Option<Compared>),
    Copy(Window, Option<f64>),
}

/// Steps of one phase.
#[derive(Debug, Clone, Copy)]
struct Window {
    /// Decode steps at which it began; those skipped are counted first.
    decodes: u64,
    /// Where measuring begins: decode steps, their time, and the time of day.
    from: Option<(u64, Duration, Duration)>,
    began: Duration,
    /// Copied since measuring began.
    bytes: u64,
}

/// Steps with copies, and without copies before them.
#[derive(Debug, Clone, Copy)]
struct Compared {
    rest_before: f64,
    copying: f64,
    bytes_per_second: f64,
}

/// Least squares through the origin of slowdown over rate, older points counting less.
#[derive(Debug, Default)]
struct Learnt {
    products: f64,
    squares: f64,
}

impl Pacer {
    /// Begins with a rest, as soon as an engine tells something.
    pub fn new(config: PacerConfig) -> Self {
        let rate = config.link_bytes_per_second * config.blind_share;
        Self {
            config,
            rate,
            balance: 0.0,
            now: Duration::ZERO,
            last: None,
            active_at: Duration::ZERO,
            idle: false,
            phase: Phase::Rest(Window::new(0, Duration::ZERO), None),
            learnt: Learnt::default(),
        }
    }

    /// Time has passed, and the engine tells this; `None`: nothing, or nothing new.
    pub fn observe(&mut self, now: Duration, sample: Option<StepSample>) {
        let passed = now.saturating_sub(self.now);
        self.now = now;
        let was_idle = self.idle;
        if let Some(sample) = sample {
            let last = self.last.replace(sample);
            if last.is_none_or(|last| last.decodes > sample.decodes) {
                // A new engine.
                self.phase = Phase::Rest(Window::new(sample.decodes, now), None);
            }
            if sample.begun != sample.ended || last.is_none_or(|last| last.begun != sample.begun) {
                self.active_at = now;
            }
        }
        self.idle = self.last.is_some() && now.saturating_sub(self.active_at) > IDLE_AFTER;
        if self.idle || was_idle {
            self.balance = 0.0;
        }
        if let Some(sample) = self.last {
            self.step(sample);
        }
        let earned = if self.is_resting() { 0.0 } else { self.paced_rate() * passed.as_secs_f64() };
        self.balance = (self.balance + earned).min(self.paced_rate() * BURST.as_secs_f64());
    }

    /// What may be copied now.
    pub fn allowance(&self) -> Allowance {
        if self.idle {
            return Allowance::Unlimited;
        }
        if self.is_resting() {
            return Allowance::Bytes(0);
        }
        Allowance::Bytes(self.balance.max(0.0) as u64)
    }

    /// So much was copied.
    pub fn spend(&mut self, bytes: u64) {
        let debt_max = self.paced_rate() * DEBT.as_secs_f64();
        self.balance = (self.balance - bytes as f64).max(-debt_max);
        match &mut self.phase {
            Phase::Rest(window, _) | Phase::Copy(window, _) => window.bytes += bytes,
        }
    }

    /// Bytes per second at which copies go while the engine decodes; `None` while it is idle.
    pub fn rate(&self) -> Option<f64> {
        (!self.idle).then(|| self.paced_rate())
    }

    /// By how much the current rate makes steps longer, by what was learnt; `None` before the first comparison.
    pub fn expected_slowdown(&self) -> Option<f64> {
        self.learnt.factor().map(|factor| factor * self.rate)
    }

    fn paced_rate(&self) -> f64 {
        if self.last.is_some() && self.config.slowdown_share <= 0.0 { 0.0 } else { self.rate }
    }

    fn is_resting(&self) -> bool {
        self.last.is_some() && matches!(self.phase, Phase::Rest(..))
    }

    fn step(&mut self, sample: StepSample) {
        let now = self.now;
        match &mut self.phase {
            Phase::Rest(window, compared) => {
                let compared = *compared;
                if let Some(rest) = window.mean(sample, now, REST_STEPS) {
                    if let Some(compared) = compared {
                        self.compare(compared, rest);
                    }
                    self.phase = Phase::Copy(Window::new(sample.decodes, now), Some(rest));
                } else if now.saturating_sub(window.began) > self.rest_max(sample) {
                    self.phase = Phase::Copy(Window::new(sample.decodes, now), None);
                }
            }
            Phase::Copy(window, rest_before) => {
                let rest_before = *rest_before;
                let Some(copying) = window.mean(sample, now, COPY_STEPS) else { return };
                let seconds = window.seconds(now).max(1e-9);
                let bytes_per_second = window.bytes as f64 / seconds;
                if bytes_per_second < self.rate / 2.0 {
                    // There is not much to copy: nothing to learn, and no reason to rest.
                    self.phase = Phase::Copy(Window::new(sample.decodes, now), None);
                    return;
                }
                let compared =
                    rest_before.map(|rest_before| Compared { rest_before, copying, bytes_per_second });
                self.phase = Phase::Rest(Window::new(sample.decodes, now), compared);
            }
        }
    }

    /// As long as the steps should take by their mean so far, and some more.
    fn rest_max(&self, sample: StepSample) -> Duration {
        let mean = sample.decode_time.checked_div(u32::try_from(sample.decodes).unwrap_or(u32::MAX));
        let steps = 3 * (REST_STEPS + SKIPPED_STEPS) as u32;
        REST_MAX.max(mean.map_or(REST_MAX, |mean| mean * steps))
    }

    fn compare(&mut self, compared: Compared, rest_after: f64) {
        let Compared { rest_before, copying, bytes_per_second } = compared;
        if (rest_after / rest_before - 1.0).abs() > REST_DRIFT_MAX {
            return;
        }
        let rest = (rest_before + rest_after) / 2.0;
        self.learnt.add(copying / rest - 1.0, bytes_per_second);
        let factor = self.learnt.factor().unwrap_or_default();
        let wanted = if factor > 0.0 { AIM * self.config.slowdown_share / factor } else { f64::INFINITY };
        let link = self.config.link_bytes_per_second;
        let near = wanted.clamp(self.rate * RATE_DOWN, self.rate * RATE_UP);
        self.rate = near.clamp(link * RATE_MIN, link);
    }
}

impl Window {
    fn new(decodes: u64, began: Duration) -> Self {
        Self { decodes, from: None, began, bytes: 0 }
    }

    /// Mean time of a step, seconds, once there were enough of them.
    fn mean(&mut self, sample: StepSample, now: Duration, steps: u64) -> Option<f64> {
        let Some((decodes, time, _)) = self.from else {
            if sample.decodes >= self.decodes + SKIPPED_STEPS {
                self.from = Some((sample.decodes, sample.decode_time, now));
                self.bytes = 0;
            }
            return None;
        };
        let count = sample.decodes - decodes;
        (count >= steps).then(|| sample.decode_time.saturating_sub(time).as_secs_f64() / count as f64)
    }

    /// Since measuring began.
    fn seconds(&self, now: Duration) -> f64 {
        self.from.map_or(0.0, |(.., at)| now.saturating_sub(at).as_secs_f64())
    }
}

impl Learnt {
    fn add(&mut self, slowdown: f64, rate: f64) {
        // In GB/s, so that the squares stay small numbers.
        let rate = rate / 1e9;
        self.products = self.products * MEMORY + slowdown * rate;
        self.squares = self.squares * MEMORY + rate * rate;
    }

    /// Slowdown for each byte per second.
    fn factor(&self) -> Option<f64> {
        (self.squares > 0.0).then(|| self.products / self.squares / 1e9)
    }
}

#[cfg(test)]
mod tests;
