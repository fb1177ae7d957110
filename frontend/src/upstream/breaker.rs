//! Leaves a server alone that fails again and again.
//!
//! ```text
//!          FAILURES_MAX in a row            PAUSE over: one request is let through
//! Closed ─────────────────────────► Open ────────────────────────────────────────► Trial
//!    ▲                               ▲                 it fails                       │
//!    └───── any success ─────────────┴────────────────────────────────────────────────┘
//! ```

use std::time::Duration;

use tokio::time::Instant;

const FAILURES_MAX: u32 = 3;
const PAUSE: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breaker {
    /// Requests pass; so many in a row have failed.
    Closed(u32),
    /// None does, until then.
    Open(Instant),
    /// One is under way; another may try at that time, if nothing was heard of it.
    Trial(Instant),
}

impl Breaker {
    /// Whether a request may pass now; if it is the trial, it counts as begun.
    pub fn lets_through(&mut self, now: Instant) -> bool {
        match *self {
            Self::Closed(_) => true,
            Self::Open(until) | Self::Trial(until) if now < until => false,
            Self::Open(_) | Self::Trial(_) => {
                *self = Self::Trial(now + PAUSE);
                true
            }
        }
    }

    /// A request was answered.
    pub fn succeeded(&mut self) {
        *self = Self::Closed(0);
    }

    /// A request failed.
    pub fn failed(&mut self, now: Instant) {
        *self = match *self {
            Self::Closed(failures) if failures + 1 < FAILURES_MAX => Self::Closed(failures + 1),
            Self::Closed(_) | Self::Open(_) | Self::Trial(_) => Self::Open(now + PAUSE),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_tries_one_at_a_time() {
        let now = Instant::now();
        let mut breaker = Breaker::Closed(0);
        breaker.failed(now);
        breaker.failed(now);
        breaker.succeeded();
        for _ in 0..FAILURES_MAX {
            assert!(breaker.lets_through(now));
            breaker.failed(now);
        }
        assert!(!breaker.lets_through(now));
        let later = now + PAUSE;
        assert!(breaker.lets_through(later));
        assert!(!breaker.lets_through(later), "one at a time");
        breaker.failed(later);
        assert!(!breaker.lets_through(later));
        assert!(breaker.lets_through(later + PAUSE));
        breaker.succeeded();
        assert!(breaker.lets_through(later + PAUSE) && breaker == Breaker::Closed(0));
    }
}
