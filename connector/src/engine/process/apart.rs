//! Engines whose scheduler is in no process with KV memory, or is told of nothing that its workers do except by the
//! engine: the halves find each other by what the engine carries between them.

use std::sync::Arc;
use std::time::Duration;

use kvbm_hash::BaseNamespace;

use super::{EngineProcess, Parts, Prompt};
use crate::engine::link::{LinkOwner, Registered};
use crate::engine::scheduler::SchedulerHalf;
use crate::engine::settings::EngineSettings;

/// What the scheduler half has to know of memory that it does not see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharedFacts {
    /// Names the order of bytes in a block.
    pub layout: String,
    /// All ranks have the same bytes.
    pub replicated: bool,
    /// Bytes of one rank's part of a block.
    pub block_bytes: usize,
}

/// What there is for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// So many tokens behind its local ones, and whether it is to be parked until they are there.
    Tokens(usize, bool),
    /// It is not known yet: ask again.
    Later,
}

impl EngineProcess {
    /// Makes this the process of the scheduler half. Without effect when it is that already.
    pub fn join(&self, facts: &SharedFacts) -> Result<(), String> {
        let Some(engine) = self.settings.apart else {
            return Err("join an engine: it has no name that its processes share".into());
        };
        let mut parts = self.parts.lock();
        if parts.is_some() {
            return Ok(());
        }
        let mut settings = self.settings.clone();
        if facts.replicated {
            (settings.shard, settings.shard_count) = (0, 1);
        }
        let base: BaseNamespace = settings.base(&facts.layout);
        let block_bytes = facts.block_bytes.saturating_mul(settings.shard_count as usize);
        let registered = Registered { base, block_bytes, pool: None };
        let link =
            LinkOwner::start(settings, registered).map_err(|error| format!("start threads: {error}"))?;
        let EngineSettings { tokens_per_block, load_mode, .. } = &self.settings;
        let half = SchedulerHalf::new(engine, *tokens_per_block, *load_mode, Arc::new(link.link().clone()));
        // It is the engine that says how many tokens a block has.
        *self.scheduler.lock() = Some(half.of_known_size().by_layer(self.settings.by_layer));
        link.name(engine);
        *parts = Some(Parts { link, base });
        Ok(())
    }

    /// As [`EngineProcess::query`], of an engine that asks again and has so many `others` besides this request.
    pub fn look_up(&self, prompt: Prompt, local_tokens: usize, others: usize) -> Found {
        let Some(base) = self.parts.lock().as_ref().map(|parts| parts.base) else {
            return Found::Tokens(0, false);
        };
        let new = self.request_of(base, prompt);
        let now = self.now();
        let mut scheduler = self.scheduler.lock();
        let Some(half) = scheduler.as_mut() else { return Found::Tokens(0, false) };
        match half.query_patiently(new, local_tokens, others, now) {
            Some((found, parked)) => Found::Tokens(found, parked),
            None => Found::Later,
        }
    }

    /// Some rank measured how long a block takes to load.
    pub fn block_takes(&self, block: Duration) {
        if let Some(half) = &mut *self.scheduler.lock() {
            half.measured(block);
        }
    }

    /// For a pass in which nothing is computed: returns when a parked load of this rank has ended, none is under way, or
    /// a few milliseconds have passed, for requests may come meanwhile.
    pub fn wait_for_load(&self) {
        if let Some(worker) = &mut *self.worker.lock() {
            worker.wait_for_load();
        }
    }

    /// How long a block takes to load on this rank, if any was loaded since the last time.
    pub fn take_block_time(&self) -> Option<Duration> {
        self.worker.lock().as_mut().and_then(|worker| worker.take_block_time())
    }

    /// The engine does not take up what it was offered.
    pub fn declined(&self, id: u64) {
        if let Some(half) = &mut *self.scheduler.lock() {
            half.declined(id);
        }
    }

    /// Some rank could not load these pages.
    pub fn loads_failed(&self, pages: &[i32]) {
        if let Some(half) = &mut *self.scheduler.lock() {
            half.loads_failed(pages);
        }
    }

    /// Some rank could not save blocks of these requests.
    pub fn save_again(&self, requests: &[u64]) {
        let now = self.now();
        if let Some(half) = &mut *self.scheduler.lock() {
            for id in requests {
                half.save_again(*id, now);
            }
        }
    }

    /// Pages of this rank that were not loaded though it was promised, each once.
    pub fn take_failed(&self) -> Vec<i32> {
        self.worker.lock().as_mut().map(|worker| worker.take_failed()).unwrap_or_default()
    }

    /// Requests that this rank could not save, each once.
    pub fn take_orphaned(&self) -> Vec<u64> {
        self.worker.lock().as_mut().map(|worker| worker.take_orphaned()).unwrap_or_default()
    }
}
