//! The decision of mode kv: costs from blocks and load, and what a choice adds to the load. Knows no connection, so that
//! traces can be replayed through it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::cost::{Busy, Overlap, Weights};
use super::load::{Burden, Load};

/// See the module.
#[derive(Debug, Default)]
pub struct Chooser {
    weights: Weights,
    /// Requests placed: the clock by which earlier ones are forgotten.
    placed: AtomicU64,
}

impl Chooser {
    /// Nothing was placed yet.
    pub fn new(weights: Weights) -> Self {
        Self { weights, placed: AtomicU64::new(0) }
    }

    /// What a prompt of so many tokens would cost at each worker.
    pub fn costs(&self, prompt: usize, workers: &[(Overlap, &Load)]) -> Vec<f64> {
        let now = self.placed.load(Relaxed);
        let placed: Vec<f64> = workers.iter().map(|(_, load)| load.placed(now)).collect();
        let mean = placed.iter().sum::<f64>() / workers.len() as f64;
        let excess = |placed: f64| if mean > 0.0 { (placed / mean - 1.0).min(1.0) } else { 0.0 };
        let cost = |((overlap, load), placed): (&(Overlap, &Load), f64)| {
            let busy = Busy {
                requests: load.requests(),
                prefill_tokens: load.prefill_tokens(),
                active_tokens: load.active_tokens(),
                excess: excess(placed),
            };
            self.weights.cost(prompt, *overlap, busy)
        };
        workers.iter().zip(placed).map(cost).collect()
    }

    /// Which of them it is to be, given a number in `[0, 1)`.
    pub fn choose(&self, costs: &[f64], chance: f64) -> Option<usize> {
        self.weights.choose(costs, chance)
    }

    /// A request goes to a worker, which has so many tokens to compute for it.
    pub fn place(&self, load: &Arc<Load>, compute: usize) -> Burden {
        load.place(compute as f64, self.placed.fetch_add(1, Relaxed) + 1);
        Burden::new(load, compute as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_which_nobody_has_much_go_to_all_and_a_long_prefix_draws_its_own() {
        let chooser = Chooser::default();
        let loads: Vec<Arc<Load>> = (0..4).map(|_| Arc::default()).collect();
        let mut counts = [0; 4];
        for request in 0..400 {
            // All share what the first worker has; the load is gone before the next one comes.
            let of = |at: usize| Overlap::of_depths(if at == 0 { 50 } else { 0 }, 0, 0);
            let workers: Vec<(Overlap, &Load)> = (0..4).map(|at| (of(at), &*loads[at])).collect();
            let costs = chooser.costs(1000, &workers);
            let chosen = chooser.choose(&costs, f64::from(request % 7) / 7.0).unwrap();
            counts[chosen] += 1;
            drop(chooser.place(&loads[chosen], 1000 - of(chosen).total()));
        }
        assert!(counts.iter().all(|count| (60..200).contains(count)), "{counts:?}");
        let workers: Vec<(Overlap, &Load)> =
            (0..4).map(|at| (Overlap::of_depths(if at == 0 { 600 } else { 0 }, 0, 0), &*loads[at])).collect();
        assert_eq!(chooser.choose(&chooser.costs(1000, &workers), 0.9), Some(0));
    }
}
