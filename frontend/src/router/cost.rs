//! What a request would cost at each worker, and which of them it goes to. Pure: chance is handed in.

/// How much each circumstance counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    /// Credit for a token that is found, before its tier counts.
    pub overlap: f64,
    /// Credit for a token in host memory; one in the worker's pool has 1.
    pub host: f64,
    /// Credit for a token on disk.
    pub disk: f64,
    /// Credit for a token that was there, and is there no more.
    pub gone: f64,
    /// A token that is still to be computed.
    pub prefill: f64,
    /// A token that other requests still have to have computed, or keep, beside one of the request's own.
    pub load: f64,
    /// How much dearer the tokens to be computed are at a worker that was lately given twice its share of such tokens, and
    /// cheaper at one that was given none. It decides where little is found, and makes use of all caches.
    pub spread: f64,
    /// A request that runs, in tokens.
    pub request: f64,
    /// 0: the cheapest; higher: the more by chance.
    pub temperature: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            overlap: 1.0,
            host: 0.75,
            disk: 0.25,
            gone: 0.25,
            prefill: 1.0,
            load: 0.1,
            spread: 0.25,
            request: 0.0,
            temperature: 0.0,
        }
    }
}

/// Tokens of a prompt that are where the request could go: `[0, device)` in the pool, and so on, each behind the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overlap {
    /// In the worker's pool.
    pub device: usize,
    /// Behind them, in host memory of its daemon.
    pub host: usize,
    /// Behind those, on disk.
    pub disk: usize,
    /// Behind those, not there any more: the prompt went there with these when it was shorter.
    pub gone: usize,
}

impl Overlap {
    /// From how deep each tier reaches, each from the first token on.
    pub fn of_depths(device: usize, host: usize, disk: usize) -> Self {
        let further = host.saturating_sub(device);
        Self { device, host: further, disk: disk.saturating_sub(device + further), gone: 0 }
    }

    /// At a worker to which the first `depth` of it went before.
    #[must_use]
    pub fn with_home(self, depth: usize) -> Self {
        Self { gone: depth.saturating_sub(self.total()), ..self }
    }

    /// In any tier.
    pub fn total(self) -> usize {
        self.device + self.host + self.disk
    }
}

/// What a worker has to do already.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Busy {
    /// See [`super::load::Load`].
    pub requests: u64,
    /// As there.
    pub prefill_tokens: u64,
    /// As there.
    pub active_tokens: u64,
    /// By which part its share of the tokens that were placed lately exceeds an equal share: -1 to 1.
    pub excess: f64,
}

impl Weights {
    /// What `prompt` tokens would cost, in tokens: those to be computed before its first token comes, and those that the
    /// worker then keeps. What others have there counts less than what is computed once more: a wait passes, but a block
    /// that is computed at a second place is work for everybody behind it, and pushes out another one there.
    pub fn cost(&self, prompt: usize, overlap: Overlap, busy: Busy) -> f64 {
        let found = overlap.device as f64
            + self.host * overlap.host as f64
            + self.disk * overlap.disk as f64
            + self.gone * overlap.gone as f64;
        let compute = prompt as f64 - self.overlap * found;
        let crowding = self.spread * busy.excess * compute.max(0.0);
        let new_blocks = prompt.saturating_sub(overlap.device) as f64;
        self.prefill * (self.load * busy.prefill_tokens as f64 + compute + crowding)
            + self.load * busy.active_tokens as f64
            + new_blocks
            + self.request * busy.requests as f64
    }

    /// Which of `costs` it is to be, given a number in `[0, 1)`: one of the lowest, or by chance, lower ones rather. As
    /// costs are compared with each other only, the temperature means the same for short and long prompts.
    pub fn choose(&self, costs: &[f64], chance: f64) -> Option<usize> {
        let (low, high) =
            costs.iter().fold((f64::MAX, f64::MIN), |(l, h), cost| (l.min(*cost), h.max(*cost)));
        let span = if high > low { high - low } else { 1.0 };
        let weight = |cost: f64| match self.temperature > 0.0 {
            true => (-(cost - low) / span / self.temperature).exp(),
            false => f64::from(u8::from(cost <= low)),
        };
        let total: f64 = costs.iter().map(|cost| weight(*cost)).sum();
        let mut left = chance * total;
        for (at, cost) in costs.iter().enumerate() {
            left -= weight(*cost);
            if left < 0.0 {
                return Some(at);
            }
        }
        // Rounding used up all weights.
        costs.iter().rposition(|cost| weight(*cost) > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(overlap: Overlap, busy: Busy) -> f64 {
        Weights::default().cost(1000, overlap, busy)
    }

    #[test]
    fn nearer_tiers_are_cheaper_and_any_is_cheaper_than_none() {
        let at = |device, host, disk| cost(Overlap::of_depths(device, host, disk), Busy::default());
        let order = [at(800, 0, 0), at(0, 800, 0), at(0, 0, 800), at(0, 0, 0)];
        assert!(order.is_sorted_by(|a, b| a < b), "{order:?}");
        assert!(at(400, 800, 0) < at(400, 0, 0));
        assert_eq!(at(400, 200, 100), at(400, 0, 0), "what is nearer is not counted again");
    }

    #[test]
    fn a_prefix_draws_requests_until_its_worker_has_too_much_to_do() {
        let warm = Overlap::of_depths(800, 800, 0);
        let busy = |tokens| Busy { requests: 3, prefill_tokens: tokens, active_tokens: tokens, excess: 0.0 };
        assert!(cost(warm, busy(7000)) < cost(Overlap::default(), Busy::default()));
        assert!(cost(warm, busy(9000)) > cost(Overlap::default(), Busy::default()));
    }

    #[test]
    fn what_little_is_found_goes_where_less_was_placed() {
        let full = Busy { excess: 0.5, ..Busy::default() };
        let short = Overlap::of_depths(50, 0, 0);
        assert!(cost(short, full) > cost(Overlap::default(), Busy::default()));
        assert!(cost(Overlap::of_depths(300, 0, 0), full) < cost(Overlap::default(), Busy::default()));
    }

    #[test]
    fn what_is_gone_draws_back_only_if_it_counts_and_less_than_what_is_there() {
        let weights = Weights { gone: 0.1, ..Weights::default() };
        let cost = |overlap| weights.cost(1000, overlap, Busy::default());
        let home = Overlap::default().with_home(800);
        assert!(cost(home) < cost(Overlap::default()));
        assert!(cost(Overlap::of_depths(0, 0, 400)) < cost(home));
        assert_eq!(
            Overlap::of_depths(0, 500, 0).with_home(800).gone,
            300,
            "what is there is not counted again"
        );
        assert_eq!(
            Weights { gone: 0.0, ..weights }.cost(1000, home, Busy::default()),
            cost(Overlap::default())
        );
    }

    #[test]
    fn without_temperature_the_cheapest_is_taken_and_equals_share() {
        let weights = Weights::default();
        assert_eq!(weights.choose(&[3.0, 1.0, 2.0], 0.99), Some(1));
        assert_eq!((weights.choose(&[1.0, 1.0], 0.4), weights.choose(&[1.0, 1.0], 0.6)), (Some(0), Some(1)));
        assert_eq!(weights.choose(&[], 0.5), None);
    }

    #[test]
    fn temperature_gives_the_dear_a_share_that_grows_with_it() {
        let share = |temperature| {
            let weights = Weights { temperature, ..Weights::default() };
            let dear = (0..1000).filter(|i| weights.choose(&[10.0, 20.0], f64::from(*i) / 1000.0) == Some(1));
            dear.count()
        };
        assert_eq!(share(0.0), 0);
        assert!(share(0.1) < share(0.5) && share(0.5) < share(2.0) && share(2.0) < 500);
    }

    #[test]
    fn depths_become_what_lies_behind_each_other() {
        let of = |device, host, disk| {
            let overlap = Overlap::of_depths(device, host, disk);
            (overlap.device, overlap.host, overlap.disk, overlap.total())
        };
        assert_eq!(of(10, 30, 60), (10, 20, 30, 60));
        assert_eq!(of(40, 30, 20), (40, 0, 0, 40));
        assert_eq!(of(0, 10, 5), (0, 10, 0, 10));
    }
}
