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
//! * [`Loop`]: joins them; its owner turns it, usually with [`run`] on a thread of its own.
//!
//! The engine never fails because of the cache: a lookup may find nothing, an onboard may fail, and the tokens are
//! computed.
#![deny(unsafe_code)]

mod bell;
mod echo;
mod engine;
mod error;
mod inbox;
pub mod model;
mod request;
mod sampling;
mod scheduler;
mod turns;

pub use bell::Bell;
pub use echo::Echo;
pub use engine::{BlockId, Chunk, Engine, EngineOptions, Isa, KvLayout, KvMemory, Logits};
pub use error::{Error, Result};
pub use inbox::{Handle, Inbox, inbox};
pub use request::{CachedTokens, Eos, Event, FinishReason, Limits, Refusal, Request, RequestId};
pub use sampling::Sampling;
pub use scheduler::{
    Allocate, Cache, CacheEvent, Counters, LeaseId, Onboard, Plan, Scheduler, SchedulerOptions, Ticket,
};
pub use turns::{Llama, Loop, Model, Progress, Turn, run};
