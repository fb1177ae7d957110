//! What this frontend has given each worker to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

/// Placements after which an earlier one counts 1/e of what it did.
const PLACEMENTS: f64 = 1024.0;

/// Of one worker. Only derived from the [`Burden`]s that exist, but for what was placed there lately.
#[derive(Debug, Default)]
pub struct Load {
    requests: AtomicU64,
    prefill_tokens: AtomicU64,
    active_tokens: AtomicU64,
    placed: Mutex<Placed>,
}

/// Tokens that a worker was given to compute, the later ones counting more.
#[derive(Debug, Default)]
struct Placed {
    tokens: f64,
    /// As of this placement, counted over all workers.
    at: u64,
}

impl Placed {
    fn as_of(&self, now: u64) -> f64 {
        self.tokens * (-(now.saturating_sub(self.at) as f64) / PLACEMENTS).exp()
    }
}

impl Load {
    /// Requests that run or wait there.
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Tokens of prompts that are still to be computed there.
    pub fn prefill_tokens(&self) -> u64 {
        self.prefill_tokens.load(Relaxed)
    }

    /// Tokens that running requests keep in blocks of their own: what of their prompts was not shared, and what they
    /// generated.
    pub fn active_tokens(&self) -> u64 {
        self.active_tokens.load(Relaxed)
    }

    /// Tokens that it was given to compute lately, as of placement `now`.
    pub fn placed(&self, now: u64) -> f64 {
        self.placed.lock().as_of(now)
    }

    /// Placement `now` gives it tokens to compute.
    pub fn place(&self, tokens: f64, now: u64) {
        let mut placed = self.placed.lock();
        *placed = Placed { tokens: placed.as_of(now) + tokens, at: now.max(placed.at) };
    }
}

/// One request at one worker, until it is dropped.
#[derive(Debug)]
pub struct Burden {
    load: Arc<Load>,
    prefill_tokens: u64,
    active_tokens: u64,
}

impl Burden {
    /// A request goes to a worker, which has `prefill_tokens` of its prompt to compute.
    pub fn new(load: &Arc<Load>, prefill_tokens: u64) -> Self {
        load.requests.fetch_add(1, Relaxed);
        load.prefill_tokens.fetch_add(prefill_tokens, Relaxed);
        load.active_tokens.fetch_add(prefill_tokens, Relaxed);
        Self { load: load.clone(), prefill_tokens, active_tokens: prefill_tokens }
    }

    /// Its prompt is computed.
    pub fn prefilled(&mut self) {
        self.load.prefill_tokens.fetch_sub(std::mem::take(&mut self.prefill_tokens), Relaxed);
    }

    /// It has generated further tokens.
    pub fn grow(&mut self, tokens: usize) {
        self.active_tokens += tokens as u64;
        self.load.active_tokens.fetch_add(tokens as u64, Relaxed);
    }
}

impl Drop for Burden {
    fn drop(&mut self) {
        self.prefilled();
        self.load.requests.fetch_sub(1, Relaxed);
        self.load.active_tokens.fetch_sub(self.active_tokens, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_the_sum_of_its_burdens() {
        let load = Arc::new(Load::default());
        let figures = || (load.requests(), load.prefill_tokens(), load.active_tokens());
        let mut a = Burden::new(&load, 100);
        let b = Burden::new(&load, 10);
        assert_eq!(figures(), (2, 110, 110));
        a.prefilled();
        a.prefilled();
        a.grow(7);
        assert_eq!(figures(), (2, 10, 117));
        drop(a);
        assert_eq!(figures(), (1, 10, 10));
        drop(b);
        assert_eq!(figures(), (0, 0, 0));
    }
}
