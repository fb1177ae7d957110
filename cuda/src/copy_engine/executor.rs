//! The thread of one direction of a GPU: takes orders, issues pieces, tells ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::{CopyBatch, CopyEnd, CopyFailure};
use super::device::CopyDevice;
use super::engine::{CopyEngineConfig, Shared};
use super::pacer::{Allowance, Pacer, PacerConfig};
use super::route::{Ended, Limits, Route};
use super::{LaneId, StepWords, Urgency};
use crate::Error;

/// How long the thread looks without sleeping while somebody waits: falling asleep and waking up takes as long as a copy of
/// several MiB.
const SPIN: Duration = Duration::from_millis(1);
/// How long it sleeps between two looks while something is in flight.
const LOOK_AGAIN: Duration = Duration::from_micros(50);
/// The same while something only waits for a fence or the pacer.
const LOOK_LATER: Duration = Duration::from_micros(200);

/// What the thread owns.
pub(super) struct Executor<D: CopyDevice> {
    device: D,
    shared: Arc<Shared>,
    route: Route<D>,
    limits: Limits,
    started: Instant,
    pacer_config: PacerConfig,
    pacers: Vec<(LaneId, StepWords, Pacer)>,
    /// For times when no engine tells anything.
    blind: Pacer,
    full_rate: bool,
    looked: Instant,
    progressed: Instant,
}

impl<D: CopyDevice> Executor<D> {
    pub fn new(device: D, shared: Arc<Shared>, config: &CopyEngineConfig) -> Self {
        let now = Instant::now();
        let limits = Limits {
            piece_bytes: config.piece_bytes.max(1),
            in_flight_bytes: config.in_flight_bytes.max(config.piece_bytes).max(1),
        };
        Self {
            device,
            shared,
            route: Route::new(),
            limits,
            started: now,
            pacers: Vec::new(),
            blind: Pacer::new(config.pacer.clone()),
            pacer_config: config.pacer.clone(),
            full_rate: false,
            looked: now,
            progressed: now,
        }
    }

    pub fn run(mut self) {
        loop {
            let stopping = self.take_orders();
            if let Some(error) = self.shared.out_of_service.get().cloned() {
                return self.leave_service(error);
            }
            let progress = match self.work() {
                Ok(progress) => progress,
                Err(error) => return self.leave_service(Arc::new(error)),
            };
            let idle = self.route.is_idle();
            if stopping && idle {
                return self.device.finish();
            }
            let now = Instant::now();
            if progress {
                self.progressed = now;
            } else if idle {
                let mut inbox = self.shared.inbox.lock();
                if inbox.has_no_orders() {
                    self.shared.changed.wait(&mut inbox);
                }
                drop(inbox);
                self.looked = Instant::now();
            } else if self.route.is_demanded() && now.duration_since(self.progressed) < SPIN {
                std::thread::yield_now();
            } else {
                let mut inbox = self.shared.inbox.lock();
                if inbox.has_no_orders() {
                    let limit = if self.route.is_in_flight() { LOOK_AGAIN } else { LOOK_LATER };
                    self.shared.changed.wait_for(&mut inbox, limit);
                }
            }
        }
    }

    /// Takes over what others asked for. True if the engine is being stopped.
    fn take_orders(&mut self) -> bool {
        let (batches, closed, stopping);
        {
            let mut inbox = self.shared.inbox.lock();
            batches = std::mem::take(&mut inbox.batches);
            closed = std::mem::take(&mut inbox.closed_lanes);
            stopping = inbox.stopping;
            self.full_rate = inbox.full_rate;
            if std::mem::take(&mut inbox.engines_changed) {
                let mut before = std::mem::take(&mut self.pacers);
                for (lane, words) in &inbox.engines {
                    // Whoever tells it in the same place goes on as before.
                    let known = before.iter().position(|(other, at, _)| other == lane && at.is(words));
                    self.pacers.push(match known {
                        Some(known) => before.swap_remove(known),
                        None => (*lane, words.clone(), Pacer::new(self.pacer_config.clone())),
                    });
                }
            }
        }
        let now = Instant::now();
        for batch in batches {
            self.route.accept(batch, now);
        }
        closed.iter().for_each(|lane| self.route.close_lane(*lane));
        if stopping {
            self.route.close();
        }
        stopping
    }

    /// One round: what has ended, then what may begin. True if anything did.
    fn work(&mut self) -> Result<bool, Error> {
        let now = Instant::now();
        let since = now.duration_since(std::mem::replace(&mut self.looked, now));
        let busy = if self.route.is_in_flight() { since } else { Duration::ZERO };
        let mut ended = Vec::new();
        let settled = self.route.settle(&mut self.device, now, &mut ended);
        let mut progress = !ended.is_empty();
        self.tell(ended, busy);
        settled?;
        let mut allowance = self.allowance(now);
        let mut spent = 0;
        while let Some((bytes, urgency)) = self.route.issue(&mut self.device, self.limits, now, allowance)? {
            progress = true;
            if urgency == Urgency::Background {
                spent += bytes;
                allowance = allowance.less(bytes);
            }
        }
        self.blind.spend(spent);
        self.pacers.iter_mut().for_each(|(.., pacer)| pacer.spend(spent));
        Ok(progress)
    }

    /// What may be copied in the background now, so that no engine suffers more than its share.
    fn allowance(&mut self, now: Instant) -> Allowance {
        let at = now.duration_since(self.started);
        if self.full_rate {
            return Allowance::Unlimited;
        }
        if self.pacers.is_empty() {
            self.blind.observe(at, None);
            return self.blind.allowance();
        }
        for (_, words, pacer) in &mut self.pacers {
            pacer.observe(at, words.read());
        }
        self.pacers.iter().map(|(.., pacer)| pacer.allowance()).fold(Allowance::Unlimited, Allowance::smaller)
    }

    fn tell(&mut self, ended: Vec<Ended>, busy: Duration) {
        let rate = match self.full_rate {
            true => None,
            false => self.pacers.iter().filter_map(|(.., pacer)| pacer.rate()).reduce(f64::min),
        };
        {
            let mut inbox = self.shared.inbox.lock();
            inbox.figures.paced_bytes_per_second = rate.map(|rate| rate as u64);
            inbox.figures.busy += busy;
            inbox.open -= ended.len();
            for (_, end) in &ended {
                match end {
                    CopyEnd::Done { bytes, .. } => {
                        inbox.figures.batches += 1;
                        inbox.figures.bytes += bytes;
                    }
                    CopyEnd::Failed(_) => inbox.figures.failed += 1,
                }
            }
        }
        // Room first, then the word: who is told may submit the next.
        for (batch, end) in ended {
            (batch.done)(end);
        }
    }

    /// The device is of no more use: everything ends as failed.
    fn leave_service(mut self, error: Arc<Error>) {
        if self.shared.out_of_service.set(error.clone()).is_ok() {
            tracing::error!(%error, "a GPU is out of service: its blocks are not copied any more; restart the daemon");
        }
        self.device.finish();
        // Nothing is accepted any more: whoever submits asks under this lock.
        let left: Vec<CopyBatch> = std::mem::take(&mut self.shared.inbox.lock().batches);
        let now = Instant::now();
        for batch in left {
            self.route.accept(batch, now);
        }
        let mut ended = Vec::new();
        self.route.abandon(&CopyFailure::OutOfService(error), &mut ended);
        self.tell(ended, Duration::ZERO);
    }
}
