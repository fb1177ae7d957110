//! The reference engine: a Llama on paged KV blocks in a shared pool.
//!
//! ```text
//! Handle --requests--> Inbox -> Loop { Scheduler, Cache, Model }        (or Echo: no model)
//!    <---- events ------------            |        |       '- Llama { Engine, KvMemory }
//!                                         |        '- device pool and the tiers behind it
//!                                         '- who runs next, with which blocks
//! ```
//!
//! * [`model`]: a Hugging Face folder, read and checked.
//! * [`Engine`]: computes KV and logits; the same bits whatever the batch (see its module).
//! * [`Scheduler`]: continuous batching over a [`Cache`], a synchronous state machine.
//! * [`Loop`]: joins them; its owner turns it, usually with [`turn_until_stopped`] on a thread of its own.
//! * [`run`]: a whole worker: this loop over a pool of the daemon's, served over gRPC.
//!
//! The engine never fails because of the cache: a lookup may find nothing, an onboard may fail, and the tokens are
//! computed.
#![deny(unsafe_code)]

mod answer;
mod args;
mod base;
mod bell;
mod echo;
mod engine;
mod engine_thread;
mod error;
mod inbox;
mod listener;
mod metrics;
pub mod model;
mod pool_cache;
mod request;
mod sampling;
mod scheduler;
mod service;
mod settings;
mod system;
mod turns;
mod witness;
mod worker;
mod worker_error;

pub use args::{EngineKind, IsaChoice, WorkerArgs};
pub use base::base_namespace;
pub use bell::Bell;
pub use echo::Echo;
pub use engine::cuda::{BatchLimits, Ceilings, CudaEngine, CudaLlama, DevicePool};
pub use engine::{Answer, BlockId, Chunk, Engine, EngineOptions, Isa, KvLayout, KvMemory, Logits, Want};
pub use error::{Error, Result};
pub use inbox::{Handle, Inbox, inbox};
pub use request::{CachedTokens, Eos, Event, FinishReason, Limits, Refusal, Request, RequestId};
pub use sampling::{
    Grammar, Guide, Guides, LogitsProcessor, Logprobs, Processors, Sampling, Script, SoFar, Temperature,
};
pub use scheduler::{
    Allocate, Cache, CacheEvent, Counters, LeaseId, Onboard, Plan, Scheduler, SchedulerOptions, Ticket,
};
pub use settings::RetentionArgs;
pub use turns::{Llama, Loop, Model, Progress, Turn, turn_until_stopped};
pub use worker::{ReadyInfo, run, run_with};
pub use worker_error::WorkerError;
