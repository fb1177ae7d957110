//! Whether lookups are asked at all, and how long one may take.
//!
//! One that was not answered in time opens it; then no lookup waits until the daemon has answered something small
//! promptly, and until some time has passed: the longer, the more often it opened of late. So a daemon that hangs or
//! crawls holds up the engine once, and one that does so now and then does it rarely.
//!
//! Answers that come late but in time hold it up too. A quarter of the deadline is free each time; what goes beyond is
//! taken from an allowance of the other three quarters, which is whole again after a while. So a daemon that is slow
//! without hanging, as one that has just been started, costs one deadline as well.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long it stays open at least.
const HOLD_FIRST: Duration = Duration::from_millis(250);
const HOLD_MAX: Duration = Duration::from_secs(4);

/// After so long without trouble the daemon is trusted as at first.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// How long until an allowance that was used up is whole again.
const RESTORED_AFTER: Duration = Duration::from_secs(10);

/// Part of the deadline that each lookup may take.
const FREE_PART: u32 = 4;

/// Closed at first.
#[derive(Debug)]
pub(super) struct Breaker {
    deadline: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    opened_at: Option<Instant>,
    hold: Duration,
    /// Of the allowance, as of then.
    used: Duration,
    used_at: Option<Instant>,
}

impl Breaker {
    /// With the deadline of lookups.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline, state: Mutex::default() }
    }

    pub fn is_open(&self) -> bool {
        self.state.lock().open
    }

    /// How long a lookup may take now; `None`: it is not to be asked.
    pub fn patience(&self, now: Instant) -> Option<Duration> {
        let state = self.state.lock();
        (!state.open).then(|| self.deadline - state.used(now, self.allowance()))
    }

    /// A lookup was answered after so long.
    pub fn answered(&self, now: Instant, took: Duration) {
        let allowance = self.allowance();
        let mut state = self.state.lock();
        let used = state.used(now, allowance) + took.saturating_sub(self.deadline / FREE_PART);
        (state.used, state.used_at) = (used.min(allowance), Some(now));
    }

    /// A lookup was not answered in time.
    pub fn open(&self, now: Instant) {
        let allowance = self.allowance();
        let mut state = self.state.lock();
        let lately = state.opened_at.is_some_and(|opened| now.duration_since(opened) < FORGOTTEN_AFTER);
        // What was hurried is no proof of anything.
        let was_hurried = state.used(now, allowance) > allowance / 2;
        state.hold = match (lately, was_hurried) {
            (false, _) => HOLD_FIRST,
            (true, true) => state.hold.max(HOLD_FIRST),
            (true, false) => (state.hold * 2).min(HOLD_MAX),
        };
        (state.open, state.opened_at) = (true, Some(now));
        (state.used, state.used_at) = (allowance, Some(now));
    }

    /// The daemon answered promptly.
    pub fn close(&self, now: Instant) {
        let mut state = self.state.lock();
        if state.opened_at.is_none_or(|opened| now.duration_since(opened) >= state.hold) {
            state.open = false;
        }
    }

    fn allowance(&self) -> Duration {
        self.deadline - self.deadline / FREE_PART
    }
}

impl State {
    fn used(&self, now: Instant, allowance: Duration) -> Duration {
        let since = self.used_at.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let restored = allowance.mul_f64((since.as_secs_f64() / RESTORED_AFTER.as_secs_f64()).min(1.0));
        self.used.saturating_sub(restored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_millis(20);

    #[test]
    fn it_stays_open_longer_each_time_until_all_is_well_for_long() {
        let (breaker, mut now) = (Breaker::new(DEADLINE), Instant::now());
        let mut stays = Vec::new();
        for _ in 0..6 {
            breaker.open(now);
            let opened = now;
            while breaker.is_open() {
                now += HOLD_FIRST;
                breaker.close(now);
            }
            stays.push((now - opened).as_millis());
            now += RESTORED_AFTER;
        }
        assert_eq!(stays, [250, 500, 1000, 2000, 4000, 4000]);
        now += FORGOTTEN_AFTER;
        breaker.open(now);
        breaker.close(now + HOLD_FIRST);
        assert!(!breaker.is_open());
    }

    #[test]
    fn slow_answers_cost_one_deadline_and_then_a_quarter_of_it_each() {
        let (breaker, mut now) = (Breaker::new(DEADLINE), Instant::now());
        let slow = |now, wish: u64| {
            let took = Duration::from_millis(wish).min(breaker.patience(now).unwrap());
            breaker.answered(now, took);
            took.as_millis()
        };
        let waits: Vec<_> = [3, 15, 15, 15, 15].map(|wish| slow(now, wish)).to_vec();
        assert_eq!(waits, [3, 15, 10, 5, 5]);
        now += RESTORED_AFTER;
        assert_eq!((slow(now, 30), slow(now, 30)), (20, 5));
        breaker.open(now);
        assert_eq!(breaker.patience(now), None);
        breaker.close(now + HOLD_FIRST);
        assert!(breaker.patience(now + HOLD_FIRST).unwrap() < Duration::from_millis(6), "it is on probation");
    }
}
