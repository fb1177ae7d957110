//! Whether lookups are asked at all.
//!
//! One that was not answered in time opens it; then no lookup waits until the daemon has answered something small
//! promptly, and until some time has passed: the longer, the more often it opened of late. So a daemon that hangs or
//! crawls holds up the engine once, and one that does so now and then does it rarely.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long it stays open at least.
const HOLD_FIRST: Duration = Duration::from_millis(250);
const HOLD_MAX: Duration = Duration::from_secs(4);

/// After so long without trouble the daemon is trusted as at first.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// Closed at first.
#[derive(Debug, Default)]
pub(super) struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    open: bool,
    opened_at: Option<Instant>,
    hold: Duration,
}

impl Breaker {
    pub fn is_open(&self) -> bool {
        self.0.lock().open
    }

    pub fn open(&self, now: Instant) {
        let mut state = self.0.lock();
        let lately = state.opened_at.is_some_and(|opened| now.duration_since(opened) < FORGOTTEN_AFTER);
        state.hold = if lately { (state.hold * 2).min(HOLD_MAX) } else { HOLD_FIRST };
        (state.open, state.opened_at) = (true, Some(now));
    }

    /// The daemon answered promptly.
    pub fn close(&self, now: Instant) {
        let mut state = self.0.lock();
        if state.opened_at.is_none_or(|opened| now.duration_since(opened) >= state.hold) {
            state.open = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_open_longer_each_time_until_all_is_well_for_long() {
        let (breaker, mut now) = (Breaker::default(), Instant::now());
        let mut stays = Vec::new();
        for _ in 0..6 {
            breaker.open(now);
            let opened = now;
            while breaker.is_open() {
                now += HOLD_FIRST;
                breaker.close(now);
            }
            stays.push((now - opened).as_millis());
        }
        assert_eq!(stays, [250, 500, 1000, 2000, 4000, 4000]);
        now += FORGOTTEN_AFTER;
        breaker.open(now);
        breaker.close(now + HOLD_FIRST);
        assert!(!breaker.is_open());
    }
}
