//! What requests of the window asked for and found, and at which depths: two halves, the older one is forgotten whole.

/// Depths below this are not told apart, bytes: 4 KiB, the least a slot has.
const FIRST_OCTAVE: u32 = 12;
/// Depths of 2^52 bytes and more are not either.
const LAST_OCTAVE: u32 = 52;
/// Buckets of each doubling.
const PER_OCTAVE: usize = 32;
const BUCKETS: usize = (LAST_OCTAVE - FIRST_OCTAVE) as usize * PER_OCTAVE;

/// Depths of sampled references, each with the number of references it stands for.
#[derive(Debug, Clone)]
struct Depths {
    buckets: Vec<f64>,
    /// References whose key is in no stack although the tier has it: a capacity like today's keeps it.
    unplaced: f64,
    /// All, those deeper than any bucket included.
    total: f64,
}

impl Depths {
    fn new() -> Self {
        Self { buckets: vec![0.0; BUCKETS], unplaced: 0.0, total: 0.0 }
    }

    fn add(&mut self, depth: f64, weight: f64) {
        self.buckets[(bucket(depth) as usize).min(BUCKETS - 1)] += weight;
        self.total += weight;
    }

    /// Those that a capacity would keep, where `today` is that of today.
    fn within(&self, capacity: f64, today: f64) -> f64 {
        let at = bucket(capacity).min(BUCKETS as f64);
        let whole = at as usize;
        let below: f64 = self.buckets[..whole].iter().sum();
        let part = self.buckets.get(whole).map_or(0.0, |count| count * at.fract());
        below + part + if capacity >= today { self.unplaced } else { 0.0 }
    }
}

/// Position of a depth on the scale; its fraction is the position within the bucket.
fn bucket(depth: f64) -> f64 {
    ((depth.max(1.0).log2() - f64::from(FIRST_OCTAVE)) * PER_OCTAVE as f64).max(0.0)
}

/// One half. Blocks that were found and blocks that were missed are counted exactly, and sampled apart.
#[derive(Debug, Clone)]
struct Half {
    found: u64,
    missed: u64,
    of_found: Depths,
    of_missed: Depths,
    /// Missed ones of which it is known whether they had been there, and those that had.
    judged: f64,
    seen: f64,
}

impl Half {
    fn new() -> Self {
        let (found, missed, judged, seen) = (0, 0, 0.0, 0.0);
        Self { found, missed, of_found: Depths::new(), of_missed: Depths::new(), judged, seen }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Window {
    now: Half,
    before: Half,
}

impl Window {
    pub fn new() -> Self {
        Self { now: Half::new(), before: Half::new() }
    }

    /// A request found so many blocks and missed so many.
    pub fn count(&mut self, found: usize, missed: usize) {
        self.now.found += found as u64;
        self.now.missed += missed as u64;
    }

    /// A sampled block that was found, for `weight` of them.
    pub fn found_at(&mut self, depth: Option<f64>, weight: f64) {
        let depths = &mut self.now.of_found;
        match depth {
            Some(depth) => depths.add(depth, weight),
            None => {
                depths.unplaced += weight;
                depths.total += weight;
            }
        }
    }

    /// A sampled block that was missed, for `weight` of them.
    pub fn missed_at(&mut self, depth: Option<f64>, weight: f64) {
        let depths = &mut self.now.of_missed;
        match depth {
            Some(depth) => depths.add(depth, weight),
            None => depths.total += weight,
        }
    }

    /// A sampled block that was missed had been there, or had not.
    pub fn judge(&mut self, seen: bool, weight: f64) {
        self.now.judged += weight;
        self.now.seen += if seen { weight } else { 0.0 };
    }

    /// The next half begins.
    pub fn turn(&mut self) {
        self.before = std::mem::replace(&mut self.now, Half::new());
    }

    fn sum(&self, part: impl Fn(&Half) -> f64) -> f64 {
        part(&self.now) + part(&self.before)
    }

    /// Blocks asked for.
    pub fn blocks(&self) -> u64 {
        self.now.found + self.now.missed + self.before.found + self.before.missed
    }

    /// Share of them that was found.
    pub fn hit_rate(&self) -> f64 {
        share(self.sum(|half| half.found as f64), self.blocks() as f64)
    }

    /// Share that `capacity` would find by least recently used, where `today` is that of today. A larger one loses
    /// nothing of what is found today, a smaller one finds nothing more: the policy in force may be a better one.
    pub fn estimate(&self, capacity: f64, today: f64) -> f64 {
        // Few keys may make most of what is found, and whether they are in the sample is chance; they lie near the top.
        // So what is counted from the sample is what such a cache would lose, not what it would keep.
        let lost = self.sum(|half| half.of_found.total - half.of_found.within(capacity, today));
        let lost = if capacity > today { 0.0 } else { lost };
        let gained = share(
            self.sum(|half| half.of_missed.within(capacity, today)),
            self.sum(|half| half.of_missed.total),
        );
        let found = self.sum(|half| half.found as f64);
        let missed = self.sum(|half| half.missed as f64);
        let hits = (found - lost).max(0.0) + gained * missed;
        share(if capacity < today { hits.min(found) } else { hits }, found + missed)
    }

    /// Share that would be found if nothing were ever evicted.
    pub fn ceiling(&self) -> f64 {
        let (found, missed) = (self.sum(|half| half.found as f64), self.sum(|half| half.missed as f64));
        let seen = share(self.sum(|half| half.seen), self.sum(|half| half.judged));
        share(found + missed * seen, found + missed)
    }
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole).clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_between_buckets_count_a_part_and_old_halves_go() {
        let mut window = Window::new();
        window.count(0, 100);
        (0..100).for_each(|i| window.missed_at(Some(f64::from(1 << 20) * f64::from(i + 1)), 1.0));
        for capacity in [10.0, 33.3, 50.0, 99.0] {
            let estimate = window.estimate(f64::from(1 << 20) * capacity, f64::from(1 << 20));
            assert!((estimate - capacity / 100.0).abs() < 0.015, "{estimate} at {capacity}");
        }
        window.turn();
        assert_eq!(window.blocks(), 100);
        window.turn();
        assert_eq!((window.blocks(), window.hit_rate(), window.ceiling()), (0, 0.0, 0.0));
    }

    #[test]
    fn depths_off_the_scale_count_at_its_ends() {
        let mut depths = Depths::new();
        for depth in [0.0, 1.0, 4096.0, 1e30] {
            depths.add(depth, 1.0);
        }
        assert_eq!((depths.within(8192.0, 1.0), depths.within(1e31, 1.0)), (3.0, 4.0));
    }
}
