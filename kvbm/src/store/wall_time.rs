//! Priorities that hold for a time, as entries that outlive the daemon say it: by the clock on the wall.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::ledger::Retention;

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// When the priority of a block ends that is stored now and not used any more; `None`: never.
pub(crate) fn expires_at_s(retention: Retention, stored_at_s: u64) -> Option<u64> {
    let duration = retention.duration?;
    // Rounded up: what was asked for is given.
    Some(stored_at_s.saturating_add(duration.as_secs() + u64::from(duration.subsec_nanos() > 0)))
}

/// How a block is to be kept that is found with these entries: for what is left of its time, and never for longer than
/// it was to be from the beginning, whatever the clock was set to meanwhile.
pub(crate) fn found(priority: u8, stored_at_s: u64, expires_at_s: Option<u64>, now_s: u64) -> Retention {
    let priority = priority.min(100);
    let Some(expires_at_s) = expires_at_s else { return Retention { priority, duration: None } };
    let left = expires_at_s.saturating_sub(now_s).min(expires_at_s.saturating_sub(stored_at_s));
    if left == 0 {
        return Retention::default();
    }
    Retention { priority, duration: Some(Duration::from_secs(left)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_duration_is_kept_and_never_more_than_all_of_it() {
        let retention = Retention { priority: 90, duration: Some(Duration::from_millis(29_500)) };
        let expires = expires_at_s(retention, 1000);
        assert_eq!(expires, Some(1030));
        let left = |seconds| Retention { priority: 90, duration: Some(Duration::from_secs(seconds)) };
        assert_eq!(found(90, 1000, expires, 1010), left(20));
        assert_eq!(found(90, 1000, expires, 500), left(30), "the clock was set back");
        assert_eq!(found(90, 1000, expires, 1030), Retention::default());
        assert_eq!(found(90, 1000, None, 9999), Retention { priority: 90, duration: None });
        assert_eq!(found(255, 1000, None, 0).priority, 100, "no more than there is");
    }
}
