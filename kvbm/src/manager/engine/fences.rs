//! Waits for words that engines write when what they computed is complete.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::{PIECE_BLOCKS, Shared, StoreRequest};
use crate::ledger::{SessionId, StoreId};
use crate::store::EnginePoolMemory;

/// Stores that may wait for a fence, of all engines.
const WAITING_MAX: usize = 4096;
/// Between two looks at the words, while there is something to wait for: from the first to the second, the longer nothing
/// happens.
const POLL: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(1)];
/// The same while there is nothing: a new one wakes the thread.
const IDLE: Duration = Duration::from_millis(100);

/// Reached when the word is `value` or past it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// Which of the pool's fence words.
    pub word: u32,
    /// What it is to be.
    pub value: u32,
}

struct Waiting {
    session: SessionId,
    store: StoreId,
    request: StoreRequest,
    memory: Arc<EnginePoolMemory>,
}

impl Waiting {
    fn is_reached(&self) -> bool {
        let Some(Fence { word, value }) = self.request.fence else { return true };
        self.memory.words.is_reached(word, value)
    }
}

/// Stores whose fences are not reached.
#[derive(Default)]
pub(in crate::manager) struct Fences {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// Some have been taken out, and are being registered: others go behind them.
    registering: bool,
}

impl Fences {
    pub fn is_full(&self) -> bool {
        self.queue.lock().waiting.len() >= WAITING_MAX
    }

    /// Stores that wait.
    pub fn len(&self) -> usize {
        self.queue.lock().waiting.len()
    }

    pub fn wake(&self) {
        self.changed.notify_all();
    }

    /// Those that are reached, in order: of each pool, none behind one that is not. To be followed by `registered`.
    fn take_reached(&self) -> Vec<Waiting> {
        let mut queue = self.queue.lock();
        let (mut reached, mut blocked) = (Vec::new(), Vec::new());
        for store in std::mem::take(&mut queue.waiting) {
            let pool = store.request.pool;
            if !blocked.contains(&pool) && store.is_reached() {
                reached.push(store);
            } else {
                blocked.push(pool);
                queue.waiting.push_back(store);
            }
        }
        queue.registering = true;
        reached
    }

    fn registered(&self) {
        self.queue.lock().registering = false;
        self.changed.notify_all();
    }

    /// Those of a session that are reached; it forgets the others.
    fn take_last(&self, session: SessionId) -> Vec<Waiting> {
        let mut queue = self.queue.lock();
        while queue.registering {
            self.changed.wait(&mut queue);
        }
        let all = std::mem::take(&mut queue.waiting);
        let (mine, others): (VecDeque<_>, _) = all.into_iter().partition(|w| w.session == session);
        queue.waiting = others;
        mine.into_iter().take_while(Waiting::is_reached).collect()
    }

    /// Waits until something may have changed, or for so long. True if there was nothing to look at.
    fn pause(&self, limit: Duration) -> bool {
        let mut queue = self.queue.lock();
        let idle = queue.waiting.is_empty();
        self.changed.wait_for(&mut queue, if idle { IDLE } else { limit });
        idle
    }
}

impl Shared {
    /// Registers the blocks of a store now, or when its fence, and those of the stores before it, have been reached.
    pub(super) fn fenced(
        &self,
        session: SessionId,
        store: StoreId,
        request: StoreRequest,
        memory: Arc<EnginePoolMemory>,
    ) {
        let waiting = Waiting { session, store, request, memory };
        let mut queue = self.engines.fences.queue.lock();
        let is_first = queue.waiting.iter().all(|other| other.request.pool != waiting.request.pool);
        if is_first && !queue.registering && waiting.is_reached() {
            drop(queue);
            return self.register(&waiting);
        }
        queue.waiting.push_back(waiting);
        self.engines.fences.changed.notify_all();
    }

    fn register(&self, reached: &Waiting) {
        let StoreRequest { blocks, rescue_only, namespace, .. } = &reached.request;
        for piece in blocks.chunks(PIECE_BLOCKS) {
            let block_bytes = self.with_ledger(|ledger, now| {
                ledger.register(reached.store, piece, *rescue_only, now);
                ledger.block_bytes(*namespace)
            });
            if let Some(block_bytes) = block_bytes {
                self.what_if.stored(*namespace, piece.iter().map(|block| block.hash), block_bytes);
            }
        }
        self.with_ledger(|ledger, _| ledger.seal_store(reached.store));
    }

    /// The process of a session is dead: what it had completed is registered, nothing else ever will be.
    pub(in crate::manager) fn register_last(&self, session: SessionId) {
        self.engines.fences.take_last(session).iter().for_each(|reached| self.register(reached));
    }

    /// Looks at the words until the manager stops.
    pub(in crate::manager) fn watch_fences(&self) {
        let mut pause = POLL[0];
        while !self.is_stopping() {
            let fences = &self.engines.fences;
            let reached = fences.take_reached();
            reached.iter().for_each(|reached| self.register(reached));
            fences.registered();
            if !reached.is_empty() {
                pause = POLL[0];
                continue;
            }
            let idle = fences.pause(pause);
            pause = if idle { POLL[0] } else { (pause * 2).min(POLL[1]) };
        }
    }
}
