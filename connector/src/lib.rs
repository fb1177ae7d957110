//! The engine's side of the daemon.
//!
//! [`DeviceCache`] is what an engine's loop owns: allocation, lookup and onboarding of the blocks of its pool, with the
//! daemon when there is one and alone when there is not. [`Client`] is the layer below, one method per message.
//!
//! ```text
//!  engine loop ── DeviceCache ── PoolTable          pure: what is where, who uses it
//!                     │ ▲
//!            commands │ │ arrivals                  bounded, never waited for
//!                     ▼ │
//!                    Link (its own thread)          connects, keeps deadlines, reconnects
//!                     │
//!                   Session ── side channel         one stream, many questions under way
//! ```
//!
//! Architecture invariant: nothing here waits for the daemon on the engine's thread, except the start, for at most
//! `init_timeout`. A daemon that is gone, slow or full is an answer.
#![forbid(unsafe_code)]

mod admin;
mod client;
mod config;
mod counters;
mod desk;
mod detach_reason;
mod device_cache;
pub mod engine;
mod error;
mod exchange;
mod link;
mod lookups;
mod pool_table;
pub mod serving;
mod session;
mod side;
mod tenants;

pub use client::{Client, Committed};
pub use config::{Config, InvalidSetting, WorkerRegistration};
pub use counters::{Counter, Counters};
pub use detach_reason::DetachReason;
pub use device_cache::{
    Allocate, CacheEvent, CacheState, DeviceCache, LeaseId, MakePool, StartError, Startup,
};
pub use error::ClientError;
pub use exchange::Waker;
pub use pool_table::{
    AdoptionEntry, AdoptionTable, BlockRef, Content, Contradiction, DaemonId, PoolTable, Release,
};
pub use tenants::Tenants;
