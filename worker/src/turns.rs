//! The engine's loop: requests in, steps of the engine, events out.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::inbox::{Command, Inbox, Received};
use crate::request::{Event, Refusal, RequestId};
use crate::scheduler::{Cache, Counters, Scheduler};
use crate::{Bell, Chunk, Engine, Error, KvMemory, Logits};

/// How long a step with prompts waits for a lookup that was just begun: a short prompt may be about to overtake.
const LOOKUP_PATIENCE: Duration = Duration::from_millis(1);
/// Longest sleep while sequences wait for the cache, which should ring the bell.
const WAITING_SLEEP: Duration = Duration::from_millis(2);
/// Longest sleep without requests.
const IDLE_SLEEP: Duration = Duration::from_millis(100);

/// Something that computes batches.
pub trait Model {
    /// Computes the chunks' KV, and what they want of their last tokens. After an error nothing can be computed any more.
    fn forward(&mut self, batch: &[Chunk<'_>], logits: &mut Logits) -> Result<(), Error>;
}

/// The engine with its memory.
pub struct Llama {
    /// The engine.
    pub engine: Engine,
    /// The memory its blocks are in.
    pub kv: KvMemory,
}

impl Model for Llama {
    fn forward(&mut self, batch: &[Chunk<'_>], logits: &mut Logits) -> Result<(), Error> {
        self.engine.forward(&self.kv, batch, logits);
        Ok(())
    }
}

/// What a turn brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Something was computed: turn again.
    Worked,
    /// There are requests, but all wait for the cache.
    Waiting,
    /// There are no requests.
    Idle,
    /// There are none, and never will be: all handles are gone, or the engine failed.
    Closed,
}

/// A loop that is turned by its owner.
pub trait Turn {
    /// Does what can be done now.
    fn turn(&mut self) -> Progress;
    /// Rung when there may be more to do.
    fn bell(&self) -> &Bell;
}

/// Turns until all handles are gone or `stop` is set (ring the bell then).
pub fn turn_until_stopped(turns: &mut impl Turn, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        match turns.turn() {
            Progress::Worked => {}
            Progress::Waiting => turns.bell().wait(WAITING_SLEEP),
            Progress::Idle => turns.bell().wait(IDLE_SLEEP),
            Progress::Closed => return,
        }
    }
}

/// Scheduler, cache and model, joined.
pub struct Loop<C, M> {
    scheduler: Scheduler,
    cache: C,
    model: M,
    inbox: Inbox,
    replies: Replies,
    counters: Arc<Mutex<Counters>>,
    logits: Logits,
}

impl<C: Cache, M: Model> Loop<C, M> {
    /// Joins the parts.
    pub fn new(scheduler: Scheduler, cache: C, model: M, inbox: Inbox) -> Self {
        Self {
            scheduler,
            cache,
            model,
            inbox,
            replies: Replies::default(),
            counters: Arc::default(),
            logits: Logits::default(),
        }
    }

    /// The counters as of the last turn, for metrics.
    pub fn counters(&self) -> Arc<Mutex<Counters>> {
        self.counters.clone()
    }

    /// The cache.
    pub fn cache(&mut self) -> &mut C {
        &mut self.cache
    }

    fn publish(&self) {
        *self.counters.lock() = self.scheduler.counters();
    }

    /// Takes in what clients sent; false once all handles are gone.
    fn receive(&mut self) -> bool {
        loop {
            match self.inbox.receive() {
                Received::Command(Command::Submit(request, reply)) => {
                    self.replies.add(request.id, reply);
                    self.scheduler.submit(*request);
                }
                Received::Command(Command::Cancel(id)) => self.scheduler.cancel(id, &mut self.cache),
                Received::Empty => return true,
                Received::Closed => return false,
            }
        }
    }

    fn poll(&mut self) {
        for event in self.cache.poll() {
            self.scheduler.cache_event(event, &mut self.cache);
        }
    }

    /// Waits a moment for the answers to lookups if long work would be begun without them.
    fn await_lookups(&mut self) {
        let begin = Instant::now();
        while self.scheduler.awaits_lookup() {
            let Some(left) = LOOKUP_PATIENCE.checked_sub(begin.elapsed()) else { return };
            self.inbox.bell().wait(left);
            self.poll();
        }
    }

    fn deliver(&mut self) {
        // What a client has been told is in the counters.
        self.publish();
        for (id, event) in self.scheduler.take_events() {
            if self.replies.send(id, event) == Delivery::Gone {
                self.scheduler.cancel(id, &mut self.cache);
            }
        }
        // Of requests that were just cancelled nobody wants to hear.
        drop(self.scheduler.take_events());
    }
}

impl<C: Cache, M: Model> Turn for Loop<C, M> {
    fn turn(&mut self) -> Progress {
        let open = self.receive();
        self.poll();
        self.scheduler.admit(&mut self.cache);
        self.poll();
        self.await_lookups();
        let plan = self.scheduler.plan(&mut self.cache);
        self.deliver_starts();
        let worked = !plan.is_empty();
        if worked {
            let begin = Instant::now();
            if let Err(error) = self.model.forward(&self.scheduler.chunks(&plan), &mut self.logits) {
                tracing::error!(%error, "the engine cannot compute any more");
                self.replies.fail(&format!("the engine failed: {error}"));
                return Progress::Closed;
            }
            self.scheduler.apply(plan, &self.logits, &mut self.cache);
            self.scheduler.count_step_seconds(begin.elapsed().as_secs_f64());
        }
        self.deliver();
        self.publish();
        match (worked, self.scheduler.is_idle(), open) {
            (true, _, _) => Progress::Worked,
            (false, false, _) => Progress::Waiting,
            (false, true, true) => Progress::Idle,
            (false, true, false) => Progress::Closed,
        }
    }

    fn bell(&self) -> &Bell {
        self.inbox.bell()
    }
}

impl<C: Cache, M: Model> Loop<C, M> {
    /// Reports what planning did before the step is computed. Nothing is cancelled here: the plan is not applied yet.
    fn deliver_starts(&mut self) {
        self.publish();
        for (id, event) in self.scheduler.take_events() {
            self.replies.send(id, event);
        }
    }
}

/// Where the events of each request go.
#[derive(Default)]
pub(crate) struct Replies(HashMap<RequestId, mpsc::Sender<Event>>);

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    Sent,
    /// Nobody listens any more.
    Gone,
}

impl Replies {
    pub(crate) fn add(&mut self, id: RequestId, reply: mpsc::Sender<Event>) {
        self.0.insert(id, reply);
    }

    /// Sends an event; with the last one of a request its channel ends.
    pub(crate) fn send(&mut self, id: RequestId, event: Event) -> Delivery {
        let last = matches!(event, Event::Finished { .. } | Event::Refused(_) | Event::Failed(_));
        let sent = match self.0.get(&id).map(|reply| reply.try_send(event)) {
            Some(Ok(())) => Delivery::Sent,
            Some(Err(TrySendError::Closed(_))) | None => Delivery::Gone,
            Some(Err(TrySendError::Full(_))) => {
                // There is room for one event per token that may be generated, so this is a fault of the loop.
                tracing::error!(?id, "more events than tokens");
                Delivery::Gone
            }
        };
        if last || sent == Delivery::Gone {
            self.0.remove(&id);
        }
        sent
    }

    /// Tells all that are left that they cannot be computed.
    fn fail(&mut self, detail: &str) {
        for (_, reply) in self.0.drain() {
            // A client that is gone does not need to know.
            let _ = reply.try_send(Event::Failed(detail.to_owned()));
        }
    }

    /// Tells all that are left that the loop stops.
    pub(crate) fn stop(&mut self) {
        for (_, reply) in self.0.drain() {
            // A client that is gone does not need to know.
            let _ = reply.try_send(Event::Refused(Refusal::Stopping));
        }
    }
}

impl<C, M> Drop for Loop<C, M> {
    fn drop(&mut self) {
        self.replies.stop();
    }
}
