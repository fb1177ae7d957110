//! What was learned: how likely a block of a class is used again at an age, and what keeping it is worth.
//!
//! For each class and age bucket two numbers are kept: how many blocks of the class got that old without a use (*at
//! risk*), and how many of those were used while in that bucket (*hits*). Their ratio is the hazard. Counts fade, so
//! that what happened lately counts for more.
//!
//! The worth is Gittins' index: the best ratio of uses to time, over all ages up to which one could keep the block:
//!
//! ```text
//!   index(age) = max over end > age of  P(used before end) / E(time kept: until used, or until end)
//! ```
//!
//! Space times time is what a cache has to give away. Whoever keeps the blocks of highest index gets the most uses for
//! it, if blocks come back independently of each other. A block that is seldom used at once but often after a minute is
//! worth more after half a minute than when it is new, and nothing after ten: no order by recency or frequency says so.

use std::ops::Range;

use super::ages::{AGES, relative_span, span};
use super::class::{CLASSES, Class, GROUPS};

/// Number of cells: a cell is a class at an age.
pub const CELLS: usize = CLASSES * AGES;

/// Chance of use while age grows by its own, as long as nothing is known, of a block that was used once. The same for
/// all ages: then the index falls with age, and the order among blocks of equal uses is that of least recent use.
const UNKNOWN: f32 = 0.05;

/// Observations that what is expected counts as, against what was seen. Blocks of one request come back together, so a
/// few dozen observations may be one.
const EXPECTED_WEIGHT: f32 = 50.0;

/// Uses that the expectation for a group counts as: a block comes back in proportion to how often it did. Without it a
/// small table forgets popular blocks while it learns that they are.
const EXPECTED_USES: f32 = 50.0;

/// The number of a cell.
pub fn cell(class: Class, age: usize) -> usize {
    class.at() * AGES + age
}

type PerAge = [f32; AGES];

/// Hits and blocks at risk, by age.
#[derive(Debug, Clone, Copy)]
struct Counts {
    hits: PerAge,
    at_risk: PerAge,
}

const NO_COUNTS: Counts = Counts { hits: [0.0; AGES], at_risk: [0.0; AGES] };

/// See the module.
#[derive(Debug)]
pub struct Hazards {
    /// By class. In place of the blocks at risk, how many more they are than at the age before: a block that got through
    /// many ages at once then is two changes.
    changes: Vec<Counts>,
    /// By cell.
    index: Vec<f32>,
}

impl Default for Hazards {
    fn default() -> Self {
        let mut hazards = Self { changes: vec![NO_COUNTS; CLASSES], index: vec![0.0; CELLS] };
        hazards.learn(1.0);
        hazards
    }
}

impl Hazards {
    /// A block reached these ages, the last one excluded.
    pub fn reached(&mut self, class: Class, ages: Range<usize>) {
        let changes = &mut self.changes[class.at()].at_risk;
        changes[ages.start] += 1.0;
        if let Some(change) = changes.get_mut(ages.end) {
            *change -= 1.0;
        }
    }

    /// A block was used at that age.
    pub fn hit(&mut self, class: Class, age: usize) {
        self.changes[class.at()].hits[age] += 1.0;
    }

    /// By cell: what keeping a block is worth, in uses per tick.
    pub fn index(&self) -> &[f32] {
        &self.index
    }

    /// Computes the index anew from the counts, then lets these fade to the share `kept` of what they were.
    pub fn learn(&mut self, kept: f32) {
        let counts: Vec<Counts> = self.changes.iter().map(Counts::of_changes).collect();
        let general = sum(&counts).hazard_behind_each_other();
        for group in 0..GROUPS {
            let classes = Class::of_group(group);
            let expected = (EXPECTED_USES, Class::uses_of_group(group));
            let of_group = sum(&counts[classes.clone()]).hazard(&general, expected);
            for class in classes {
                let hazard = counts[class].hazard(&of_group, (1.0, 1.0));
                self.index[class * AGES..][..AGES].copy_from_slice(&gittins(&hazard));
            }
        }
        for changes in &mut self.changes {
            changes.hits.iter_mut().chain(&mut changes.at_risk).for_each(|count| *count *= kept);
        }
    }

    pub fn bytes(&self) -> usize {
        self.changes.capacity() * size_of::<Counts>() + self.index.capacity() * size_of::<f32>()
    }
}

impl Counts {
    fn of_changes(changes: &Self) -> Self {
        let mut sum = 0.0;
        let at_risk = changes.at_risk.map(|change| {
            sum += change;
            // What fades is rounded.
            f32::max(sum, 0.0)
        });
        Self { hits: changes.hits, at_risk }
    }

    /// The hazard of each age. An age of which little is known is expected to be like the one before it.
    fn hazard_behind_each_other(&self) -> PerAge {
        let mut expected = UNKNOWN;
        std::array::from_fn(|age| {
            let hazard = self.seen_and_expected(age, (expected * relative_span(age)).min(0.9));
            expected = hazard / relative_span(age);
            hazard
        })
    }

    /// The hazard of each age. What is expected has the shape of `alike`, and the height of what was seen, to which
    /// `weight` uses are added that came `times` as often as in `alike`.
    fn hazard(&self, alike: &PerAge, (weight, times): (f32, f32)) -> PerAge {
        let hits: f32 = self.hits.iter().sum();
        let hits_alike: f32 = self.at_risk.iter().zip(alike).map(|(at_risk, hazard)| at_risk * hazard).sum();
        let height = (hits + weight * times) / (hits_alike + weight);
        std::array::from_fn(|age| self.seen_and_expected(age, (alike[age] * height).min(0.9)))
    }

    fn seen_and_expected(&self, age: usize, expected: f32) -> f32 {
        (self.hits[age] + EXPECTED_WEIGHT * expected) / (self.at_risk[age] + EXPECTED_WEIGHT)
    }
}

fn sum(all: &[Counts]) -> Counts {
    all.iter().fold(NO_COUNTS, |sum, counts| Counts {
        hits: std::array::from_fn(|age| sum.hits[age] + counts.hits[age]),
        at_risk: std::array::from_fn(|age| sum.at_risk[age] + counts.at_risk[age]),
    })
}

/// The index of each age, from the hazard of each.
///
/// From the last age to the first: an age is joined with those after it as long as that raises its ratio of uses to
/// time. Who is joined once stays so, so this takes a number of steps proportional to that of ages.
fn gittins(hazard: &PerAge) -> PerAge {
    let hazard = hazard.map(|hazard| hazard.min(0.999));
    let mut alive = [1.0; AGES];
    for age in 1..AGES {
        alive[age] = alive[age - 1] * (1.0 - hazard[age - 1]);
    }
    let mut index = [0.0; AGES];
    let mut later = [(0.0, 0.0); AGES];
    let mut count = 0;
    for age in (0..AGES).rev() {
        let mut uses = alive[age] * hazard[age];
        // Who is used is so in the middle of the bucket.
        let mut time = alive[age] * (1.0 - hazard[age] / 2.0) * span(age) as f32;
        while count > 0 {
            let (uses_later, time_later) = later[count - 1];
            if uses_later * time <= uses * time_later {
                break;
            }
            uses += uses_later;
            time += time_later;
            count -= 1;
        }
        later[count] = (uses, time);
        count += 1;
        index[age] = uses / time;
    }
    index
}

#[cfg(test)]
mod tests {
    use super::super::class::Class;
    use super::*;

    fn young_to_old(hazards: &Hazards, class: Class) -> &[f32] {
        &hazards.index()[cell(class, 0)..][..AGES]
    }

    #[test]
    fn as_long_as_nothing_is_known_the_least_recently_and_least_often_used_is_worth_least() {
        let hazards = Hazards::default();
        for uses in [1, 2, 4, 8] {
            let index = young_to_old(&hazards, Class::new(uses, 1, false));
            assert!(index.is_sorted_by(|young, old| young > old), "{uses}: {index:?}");
            let more = young_to_old(&hazards, Class::new(uses * 2, 1, false));
            assert!(index.iter().zip(more).all(|(less, more)| less < more), "{uses}: {index:?} {more:?}");
        }
        let of_once_used = |depth, at_end| young_to_old(&hazards, Class::new(1, depth, at_end));
        assert_eq!(of_once_used(1, false), of_once_used(100, true));
    }

    #[test]
    fn a_block_is_worth_most_shortly_before_the_age_at_which_its_like_came_back() {
        let mut hazards = Hazards::default();
        let class = Class::new(2, 1, false);
        for at in 0..1000 {
            let last = if at < 500 { 20 } else { 39 };
            hazards.reached(class, 0..last + 1);
            if at < 500 {
                hazards.hit(class, 20);
            }
        }
        hazards.learn(1.0);
        let index = young_to_old(&hazards, class);
        let best = (0..AGES).max_by(|a, b| index[*a].total_cmp(&index[*b])).unwrap();
        assert_eq!(best, 20);
        assert!(index[..=20].is_sorted() && index[21] < index[0], "{index:?}");
    }

    /// By definition: all ends are tried.
    fn gittins_by_definition(hazard: &PerAge) -> PerAge {
        std::array::from_fn(|age| {
            let (mut alive, mut uses, mut time, mut best) = (1.0_f64, 0.0, 0.0, 0.0_f64);
            for end in age..AGES {
                let hazard = f64::from(hazard[end].min(0.999));
                uses += alive * hazard;
                time += alive * (1.0 - hazard / 2.0) * f64::from(span(end));
                alive *= 1.0 - hazard;
                best = best.max(uses / time);
            }
            best as f32
        })
    }

    proptest::proptest! {
        #[test]
        fn the_index_is_what_its_definition_says(shares in proptest::collection::vec(0.0f32..0.6, AGES)) {
            let hazard: PerAge = shares.try_into().unwrap();
            for (fast, slow) in gittins(&hazard).into_iter().zip(gittins_by_definition(&hazard)) {
                proptest::prop_assert!((fast - slow).abs() <= slow * 1e-3, "{fast} {slow}");
            }
        }
    }
}
