//! Takes in what the feed collected, and answers.

use std::time::Duration;

use parking_lot::Mutex;

use super::feed::{Batch, Feed, Kind, Sample, Sighting};
use super::seen::Seen;
use super::stack::Stack;
use super::window::Window;
use super::{CAPACITIES, Sizes, TierWhatIf, WhatIfReport};
use crate::ledger::Millis;
use crate::tier::Tier;

/// One tier with all above it.
#[derive(Debug)]
struct Level {
    tier: Tier,
    stack: Stack,
    window: Window,
    /// 0: not in service.
    capacity_bytes: u64,
}

/// See the module. Pure: it is told the time.
#[derive(Debug)]
pub(super) struct Model {
    levels: [Level; 2],
    seen: Seen,
    half: Duration,
    half_began: Millis,
    began: Millis,
    batch: Batch,
}

impl Model {
    /// Each half of the window lasts `half`; each stack has `samples_max` samples.
    pub fn new(half: Duration, samples_max: usize) -> Self {
        let level =
            |tier| Level { tier, stack: Stack::new(samples_max), window: Window::new(), capacity_bytes: 0 };
        Self {
            levels: [level(Tier::Host), level(Tier::Disk)],
            seen: Seen::new(samples_max),
            half,
            half_began: Millis(0),
            began: Millis(0),
            batch: Batch::default(),
        }
    }

    /// Everything that was fed until now.
    pub fn take_in(&mut self, feed: &Mutex<Feed>, sizes: Sizes, now: Millis) {
        self.turn(now);
        let capacities =
            [sizes.host_bytes, if sizes.disk_bytes > 0 { sizes.host_bytes + sizes.disk_bytes } else { 0 }];
        for (level, bytes) in self.levels.iter_mut().zip(capacities) {
            level.capacity_bytes = bytes;
        }
        let mut batch = std::mem::take(&mut self.batch);
        feed.lock().exchange(&mut batch, self.threshold());
        let mut samples = batch.samples.as_slice();
        for sighting in &batch.sightings {
            let (its, rest) = samples.split_at(sighting.samples);
            samples = rest;
            self.take(sighting, its);
        }
        batch.clear();
        self.batch = batch;
    }

    fn take(&mut self, sighting: &Sighting, samples: &[Sample]) {
        for level in self.levels.iter_mut().filter(|level| level.capacity_bytes > 0) {
            level.take(sighting, samples, &self.seen);
        }
        // Missed ones are remembered when they are stored: then they could be found.
        let known = match sighting.kind {
            Kind::Asked { on_disk, .. } => {
                samples.partition_point(|sample| (sample.position as usize) < on_disk)
            }
            Kind::Stored => samples.len(),
        };
        samples[..known].iter().for_each(|sample| self.seen.add(sample.word));
    }

    fn turn(&mut self, now: Millis) {
        let half = self.half.as_millis() as u64;
        let passed = now.0.saturating_sub(self.half_began.0) / half.max(1);
        // More than two change nothing further.
        for _ in 0..passed.min(2) {
            self.levels.iter_mut().for_each(|level| level.window.turn());
            self.seen.turn();
        }
        self.half_began.0 += passed * half;
        self.began.0 = self.began.0.max(self.half_began.0.saturating_sub(half));
    }

    /// Keys below it are of use to somebody.
    fn threshold(&self) -> u64 {
        let stacks = self.levels.iter().filter(|level| level.capacity_bytes > 0);
        stacks.map(|level| level.stack.threshold()).chain([self.seen.threshold()]).max().unwrap_or(u64::MAX)
    }

    /// Keys remembered in all.
    #[cfg(test)]
    pub fn samples(&self) -> usize {
        self.levels.iter().map(|level| level.stack.len()).sum::<usize>() + self.seen.len()
    }

    /// The figures. `unseen`: what the feed could not take.
    pub fn report(&self, now: Millis, unseen: u64) -> WhatIfReport {
        let tiers = self.levels.iter().filter(|level| level.capacity_bytes > 0).map(Level::report);
        let window_s = now.0.saturating_sub(self.began.0) as f64 / 1e3;
        WhatIfReport { tiers: tiers.collect(), unseen, window_s }
    }
}

impl Level {
    fn take(&mut self, sighting: &Sighting, samples: &[Sample], seen: &Seen) {
        let Self { tier, stack, window, capacity_bytes } = self;
        let bytes = sighting.block_bytes;
        match sighting.kind {
            Kind::Stored => stack.touch(samples, bytes),
            Kind::Asked { blocks, in_host, on_disk } => {
                let found = if *tier == Tier::Host { in_host } else { on_disk };
                window.count(found, blocks - found);
                let weight = 1.0 / stack.rate();
                stack.look_up(samples, |sample, depth| {
                    if (sample.position as usize) < found {
                        window.found_at(depth, weight);
                    } else {
                        window.missed_at(depth, weight);
                    }
                });
                let (found, missed) =
                    samples.split_at(samples.partition_point(|sample| (sample.position as usize) < found));
                for (seen, weight) in missed.iter().filter_map(|sample| seen.look_up(sample.word)) {
                    window.judge(seen, weight);
                }
                // What was missed is not there before it is stored: a request may come to nothing, or ask again.
                stack.touch_known(missed, bytes);
                stack.touch(found, bytes);
            }
        }
        stack.trim(*capacity_bytes as f64 * CAPACITIES[CAPACITIES.len() - 1]);
    }

    fn report(&self) -> TierWhatIf {
        let (today, window) = (self.capacity_bytes as f64, &self.window);
        let estimates = CAPACITIES.map(|times| window.estimate(today * times, today));
        let most = estimates.into_iter().fold(window.hit_rate(), f64::max);
        TierWhatIf {
            tier: self.tier,
            capacity_bytes: self.capacity_bytes,
            blocks: window.blocks(),
            hit_rate: window.hit_rate(),
            estimates,
            ceiling: window.ceiling().max(most),
            sampled: self.stack.rate(),
        }
    }
}
