//! Waiting for a condition.

use std::time::{Duration, Instant};

/// Polls until `ready` gives something; fails after a minute.
pub fn eventually<T>(what: &str, ready: impl FnMut() -> Option<T>) -> T {
    eventually_within(Duration::from_secs(60), what, ready)
}

/// Polls until `ready` gives something; fails after `limit`.
pub fn eventually_within<T>(limit: Duration, what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
