//! Time as the policy sees it: ticks, and ages in steps of half an octave.

use crate::ledger::Millis;

/// Number of age buckets. The last one begins at 9 hours and has no end.
pub const AGES: usize = 40;

/// Ages below this number of ticks are all in the first bucket.
const YOUNGEST: u32 = 64;

/// Milliseconds, modulo 2^32 (49 days).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tick(pub u32);

impl Tick {
    /// Ticks since an earlier one.
    pub fn since(self, earlier: Tick) -> u32 {
        let age = self.0.wrapping_sub(earlier.0);
        // What is "later" than now is of the same moment.
        if age > u32::MAX / 2 { 0 } else { age }
    }
}

/// Follows the caller's clock, and goes on by a quarter of a tick with each event, so that order in time stays order
/// in time where a trace has none, or where the caller's clock stands still.
#[derive(Debug, Default)]
pub struct Clock {
    quarters: u64,
}

impl Clock {
    /// The time of an event that happens now.
    pub fn event(&mut self, now: Millis) -> Tick {
        self.quarters = (self.quarters + 1).max(now.0.saturating_mul(4));
        self.now()
    }

    /// The time of the last event.
    pub fn now(&self) -> Tick {
        Tick((self.quarters / 4) as u32)
    }

    /// The caller's time, or that of the last event if it is later.
    pub fn at(&self, now: Millis) -> Tick {
        Tick((self.quarters / 4).max(now.0) as u32)
    }
}

/// The bucket of an age in ticks: `[0, 64) [64, 96) [96, 128) [128, 192) ...`
pub fn bucket(age: u32) -> usize {
    if age < YOUNGEST {
        return 0;
    }
    let octave = age.ilog2();
    let half = (age >> (octave - 1)) & 1;
    let bucket = 1 + 2 * (octave - YOUNGEST.ilog2()) + half;
    (bucket as usize).min(AGES - 1)
}

/// Ticks that a bucket spans. The last one counts as if it ended at twice its begin.
pub fn span(bucket: usize) -> u32 {
    match bucket {
        0 => YOUNGEST,
        AGES.. => 0,
        last if last == AGES - 1 => begin(last),
        _ => begin(bucket + 1) - begin(bucket),
    }
}

/// Ticks that a bucket spans, as a share of the age at its begin. So many blocks are used in it if the rate of use falls
/// as one over age. In the first bucket, which begins at no age, the rate counts as twice that of the next one.
pub fn relative_span(bucket: usize) -> f32 {
    if bucket == 0 { 2.0 } else { span(bucket) as f32 / begin(bucket) as f32 }
}

/// The age at which a bucket begins, in ticks.
pub fn begin(bucket: usize) -> u32 {
    BEGINS[bucket]
}

const BEGINS: [u32; AGES] = {
    let mut begins = [0; AGES];
    let mut bucket = 1;
    while bucket < AGES {
        let octave = YOUNGEST << ((bucket - 1) / 2);
        begins[bucket] = if bucket % 2 == 1 { octave } else { octave + octave / 2 };
        bucket += 1;
    }
    begins
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap() {
        let mut end = 0;
        for at in 0..AGES {
            assert_eq!(bucket(end), at, "begins at {end}");
            end += span(at);
            assert_eq!(bucket(end - 1), at);
        }
        assert_eq!(bucket(u32::MAX), AGES - 1);
    }

    #[test]
    fn time_goes_on_without_a_clock_and_never_back() {
        let mut clock = Clock::default();
        let first = clock.event(Millis(10));
        let later = (0..8).map(|_| clock.event(Millis(10))).last().unwrap();
        assert_eq!((first, later), (Tick(10), Tick(12)));
        assert_eq!(clock.event(Millis(3)), Tick(12));
        assert_eq!(Tick(3).since(Tick(u32::MAX)), 4);
        assert_eq!(Tick(3).since(Tick(5)), 0);
    }
}
